"""jarm: active reward modelling in JAX. Decide which pairs of responses to label next."""

from importlib.metadata import version as _version

from jarm.acquisition.registry import RULES, RuleEntry, get_rule
from jarm.core.base import Belief, FitInfo, HParams, Labelled, Limits, PairSpace, RewardHead, Rule, Selection
from jarm.core.status import JarmError, Status, check
from jarm.core.tables import ResponseTable, TrainTest
from jarm.data.datasets import load, load_published, load_table, split_by
from jarm.data.standardise import standardised
from jarm.data.store import EmbeddingStore, key_of
from jarm.data.synthetic import SyntheticConfig, synthetic
from jarm.data.writer import StoreWriter
from jarm.design.bound import Design, design_bound, efficiency, rounded
from jarm.design.criteria import D_OPTIMAL, D_UNWEIGHTED, Criterion, a_optimal, v_optimal
from jarm.design.exchange import ExchangeInfo, exchange
from jarm.design.fisher import fisher_weight, pair_information, pair_variance, space_information
from jarm.design.greedy import GreedyInfo, greedy, greedy_log_det
from jarm.design.spaces import exclude, listed_space, pair_count, pair_space, sample_pairs, subset
from jarm.design.top import random_pairs, top_pairs
from jarm.embedding.config import EmbedConfig, EmbedSummary
from jarm.embedding.embed import embed
from jarm.evaluation.annotators import AnnotatorConfig, annotate, solve_noise
from jarm.evaluation.metrics import evaluate, reference_lines
from jarm.evaluation.ranking import best_of_n, spearman
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import DeviceTable, prepare
from jarm.loop.loop import Loop, make_loop
from jarm.loop.simulate import RunRecord
from jarm.loop.steps import LoopState
from jarm.reward.config import FitConfig, HeadConfig
from jarm.reward.fit import make_fit
from jarm.reward.heads import linear_head, mlp_head
from jarm.runs.config import CompareConfig
from jarm.runs.grid import SweepConfig, read_sweep
from jarm.selection.result import SelectedBatch
from jarm.selection.select import select
from jarm.studies.compare import compare
from jarm.studies.plan import Plan, plan
from jarm.studies.sweep import sweep

__version__ = _version("jarm")

__all__ = [
    "D_OPTIMAL",
    "D_UNWEIGHTED",
    "RULES",
    "AnnotatorConfig",
    "Belief",
    "CompareConfig",
    "Criterion",
    "Design",
    "DeviceTable",
    "EmbedConfig",
    "EmbedSummary",
    "EmbeddingStore",
    "ExchangeInfo",
    "FitConfig",
    "FitInfo",
    "GreedyInfo",
    "HParams",
    "HeadConfig",
    "JarmError",
    "Labelled",
    "Limits",
    "Loop",
    "LoopConfig",
    "LoopState",
    "PairSpace",
    "Plan",
    "ResponseTable",
    "RewardHead",
    "Rule",
    "RuleEntry",
    "RunRecord",
    "SelectedBatch",
    "Selection",
    "Status",
    "StoreWriter",
    "SweepConfig",
    "SyntheticConfig",
    "TrainTest",
    "a_optimal",
    "annotate",
    "best_of_n",
    "check",
    "compare",
    "design_bound",
    "efficiency",
    "embed",
    "evaluate",
    "exchange",
    "exclude",
    "fisher_weight",
    "get_rule",
    "greedy",
    "greedy_log_det",
    "key_of",
    "linear_head",
    "listed_space",
    "load",
    "load_published",
    "load_table",
    "make_fit",
    "make_loop",
    "mlp_head",
    "pair_count",
    "pair_information",
    "pair_space",
    "pair_variance",
    "plan",
    "prepare",
    "random_pairs",
    "read_sweep",
    "reference_lines",
    "rounded",
    "sample_pairs",
    "select",
    "solve_noise",
    "space_information",
    "spearman",
    "split_by",
    "standardised",
    "subset",
    "sweep",
    "synthetic",
    "top_pairs",
    "v_optimal",
]
