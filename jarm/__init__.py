"""jarm: active reward modelling in JAX. Decide which pairs of responses to label next."""

from jarm.acquisition.registry import RULES, get_rule
from jarm.core.base import Belief, HParams, Limits, PairSpace, Rule, Selection
from jarm.core.status import JarmError, Status, check
from jarm.core.tables import ResponseTable, TrainTest
from jarm.core.version import __version__ as __version__
from jarm.core.version import refuse_namesake as _refuse_namesake
from jarm.data.datasets import load
from jarm.data.store import EmbeddingStore
from jarm.data.synthetic import synthetic
from jarm.data.tables import load_table
from jarm.design.criteria import Criterion, a_optimal, v_optimal
from jarm.design.fisher import fisher_weight
from jarm.design.spaces import pair_space
from jarm.design.top import top_pairs
from jarm.embedding.config import EmbedConfig
from jarm.embedding.embed import embed
from jarm.evaluation.annotators import AnnotatorConfig
from jarm.evaluation.metrics import evaluate
from jarm.export.model import RewardModel, load_model
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import prepare
from jarm.loop.loop import make_loop
from jarm.reward.config import FitConfig, HeadConfig
from jarm.runs.config import CompareConfig
from jarm.runs.grid import SweepConfig, read_sweep
from jarm.selection.result import SelectedBatch
from jarm.selection.select import select
from jarm.studies.backtest import BacktestConfig, backtest
from jarm.studies.compare import compare
from jarm.studies.forecast import ForecastConfig, forecast
from jarm.studies.plan import plan
from jarm.studies.sweep import sweep
from jarm.studies.train import TrainConfig, train

_refuse_namesake()

__all__ = [
    "RULES",
    "AnnotatorConfig",
    "BacktestConfig",
    "Belief",
    "CompareConfig",
    "Criterion",
    "EmbedConfig",
    "EmbeddingStore",
    "FitConfig",
    "ForecastConfig",
    "HParams",
    "HeadConfig",
    "JarmError",
    "Limits",
    "LoopConfig",
    "PairSpace",
    "ResponseTable",
    "RewardModel",
    "Rule",
    "SelectedBatch",
    "Selection",
    "Status",
    "SweepConfig",
    "TrainConfig",
    "TrainTest",
    "a_optimal",
    "backtest",
    "check",
    "compare",
    "embed",
    "evaluate",
    "fisher_weight",
    "forecast",
    "get_rule",
    "load",
    "load_model",
    "load_table",
    "make_loop",
    "pair_space",
    "plan",
    "prepare",
    "read_sweep",
    "select",
    "sweep",
    "synthetic",
    "top_pairs",
    "train",
    "v_optimal",
]
