"""jarm: active reward modelling in JAX. Decide which pairs of responses to label next."""

from importlib.metadata import version as _version

from jarm.acquisition.registry import RULES, RuleEntry, get_rule
from jarm.annotators import AnnotatorConfig, annotate, solve_noise
from jarm.base import (
    Belief,
    Benchmark,
    FitInfo,
    HParams,
    JarmError,
    Labelled,
    Limits,
    PairSpace,
    ResponseTable,
    RewardHead,
    Rule,
    Selection,
    Status,
    check,
)
from jarm.compare import CompareConfig, compare
from jarm.data.datasets import load, load_published, load_table, split_by
from jarm.data.pairs import exclude, listed_space, pair_count, pair_space, sample_pairs, subset
from jarm.data.standardise import standardised
from jarm.data.store import EmbeddingStore, key_of
from jarm.data.synthetic import SyntheticConfig, synthetic
from jarm.data.writer import StoreWriter
from jarm.design import Design, design_bound, efficiency, rounded
from jarm.embed import EmbedConfig, EmbedSummary, embed
from jarm.exchange import ExchangeInfo, exchange
from jarm.fisher import fisher_weight, pair_information, pair_variance, space_information
from jarm.fit import FitConfig, make_fit
from jarm.greedy import GreedyInfo, greedy, greedy_log_det
from jarm.grid import SweepConfig, read_sweep
from jarm.heads import HeadConfig, linear_head, mlp_head
from jarm.loop import Loop, LoopConfig, LoopState, RunRecord, make_loop
from jarm.metrics import evaluate, reference_lines
from jarm.objectives import D_OPTIMAL, D_UNWEIGHTED, Objective, a_optimal, v_optimal
from jarm.plan import Plan, plan
from jarm.pool import Pool
from jarm.prepare import prepare
from jarm.ranking import best_of_n, spearman
from jarm.reasons import Batch
from jarm.select import select
from jarm.selection import random_pairs, top_pairs
from jarm.sweep import sweep

__version__ = _version("jarm")

__all__ = [
    "D_OPTIMAL",
    "D_UNWEIGHTED",
    "RULES",
    "AnnotatorConfig",
    "Batch",
    "Belief",
    "Benchmark",
    "CompareConfig",
    "Design",
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
    "Objective",
    "PairSpace",
    "Plan",
    "Pool",
    "ResponseTable",
    "RewardHead",
    "Rule",
    "RuleEntry",
    "RunRecord",
    "Selection",
    "Status",
    "StoreWriter",
    "SweepConfig",
    "SyntheticConfig",
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
