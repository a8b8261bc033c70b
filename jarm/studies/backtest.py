"""`jarm backtest`: would active selection have saved labels on pairs that people have already labelled?

The pool of every run is the recorded pairs of the training prompts and nothing else, and the answer to a pair is its
recorded label: with votes their share, the same in every run. Models are judged by the recorded pairs of other prompts.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from jarm.acquisition.registry import get_rule
from jarm.core.base import HParams
from jarm.core.checks import check_fields
from jarm.core.distributed import in_step
from jarm.core.status import JarmError
from jarm.core.streams import say
from jarm.data.metric import read_metric, within_metric
from jarm.data.pairs import PairSplit
from jarm.data.readers import read_columns
from jarm.data.sources import are_pairs
from jarm.data.standardise import standardised
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import check_run, limit_per_prompt
from jarm.loop.loop import make_loop
from jarm.loop.recorded import check_recorded
from jarm.report.backtest import with_prompts
from jarm.report.curves import ACCURACY, by_rule
from jarm.report.figures import learning_curves, require_matplotlib
from jarm.report.summary import write_summary
from jarm.reward.config import FitConfig, unread
from jarm.runs.config import RULES, TEXTS, CompareConfig, as_text, documented_by
from jarm.runs.driver import Record, run_jobs
from jarm.runs.grid import Setting
from jarm.runs.jobs import refuse_large_run
from jarm.runs.records import BY_PROMPT
from jarm.studies.recorded import RecordedJob, pool_of, shuffled
from jarm.studies.train import TrainConfig, recorded_pairs, training_of


@documented_by(TrainConfig, CompareConfig, LoopConfig, FitConfig, HParams)
@dataclasses.dataclass(frozen=True)
class BacktestConfig:
    """Settings of a backtest; options and defaults are those of `jarm compare` where it has them.

    Example:
      >>> BacktestConfig(data="pairs.parquet", embeddings="out/embeddings", rules="dopt", batch=10).comparison().runs
      40
      >>> BacktestConfig(data="pairs.parquet", embeddings="out/embeddings", rules="d_opt")
      Traceback (most recent call last):
      jarm.core.status.JarmError: There is no rule 'd_opt': did you mean 'dopt'?

    Attributes:
      data: a Parquet or JSONL file of pairs: columns `chosen` and `rejected`, or two responses with `--label` or
        `--votes`.
      embeddings: a store that has the texts, or an .npy with the first and the second response of each row.
      votes: columns of votes for the first response, for the second and, if there is one, for a tie; the label of a
        pair is their share.
      out: folder for records.jsonl, summary.json, summary.md, curves.png and curves.svg.
      seeds: number of seeds; each fixes the first random pairs, the candidates and the heads.
      candidates: recorded pairs drawn at random per round; 0 considers every one that is unlabelled.
    """

    data: str
    embeddings: str
    prompt_column: str | None = None
    response_columns: tuple[str, ...] = ()
    label: str | None = None
    votes: tuple[str, ...] = ()
    split: str | None = None
    standardise: bool = CompareConfig.standardise
    metric: str = CompareConfig.metric
    out: pathlib.Path = pathlib.Path("out/backtest")
    rules: str = RULES
    rounds: int = CompareConfig.rounds
    batch: int = CompareConfig.batch
    initial: int = CompareConfig.initial
    seeds: int = 20
    candidates: int = CompareConfig.candidates
    first: str = CompareConfig.first
    per_prompt: str = CompareConfig.per_prompt
    head: str = CompareConfig.head
    members: int = CompareConfig.members
    ensemble: str = CompareConfig.ensemble
    loss: str = CompareConfig.loss
    warm_start: bool = CompareConfig.warm_start
    steps: int = CompareConfig.steps
    batch_size: int = CompareConfig.batch_size
    holdout: float = CompareConfig.holdout
    folds: int = CompareConfig.folds
    evidence: bool = CompareConfig.evidence
    learning_rate: float = CompareConfig.learning_rate
    weight_decay: float = CompareConfig.weight_decay
    ridge: float = CompareConfig.ridge
    prior_variance: float = CompareConfig.prior_variance
    label_smoothing: float = CompareConfig.label_smoothing
    prior_weight: float = CompareConfig.prior_weight
    prior_mix: float = CompareConfig.prior_mix
    beta: float = CompareConfig.beta
    temperature: float = CompareConfig.temperature
    epsilon: float = CompareConfig.epsilon
    workers: int = CompareConfig.workers
    vmap_runs: int = CompareConfig.vmap_runs
    max_runs: int = CompareConfig.max_runs

    def __post_init__(self) -> None:
        for name in TEXTS:
            if name in self.__dataclass_fields__:
                object.__setattr__(self, name, as_text(name, getattr(self, name)))
        check_fields(self)
        object.__setattr__(self, "metric", self.comparison().metric)  # one text for one metric

    def comparison(self) -> CompareConfig:
        """The same options as those of a comparison, which checks them; no label has noise to be freed of."""
        shared = self.__dataclass_fields__.keys() & CompareConfig.__dataclass_fields__.keys()
        return CompareConfig(**{name: getattr(self, name) for name in shared}, noise_free="no")

    def rule_names(self) -> list[str]:
        """Names of the rules in the order given, `random` first."""
        return self.comparison().rule_names()


def backtest_of(config: CompareConfig) -> BacktestConfig | None:
    """The backtest that a comparison on chosen and rejected responses is; None where its data are others.

    Raises:
      JarmError: an option was given that recorded labels leave no room for.
    """
    if config.target is not None or config.embeddings is None or not os.path.isfile(config.data):
        return None
    if not are_pairs(read_columns(config.data, []).names):
        return None
    names = [field.name for field in dataclasses.fields(BacktestConfig)]
    for field in dataclasses.fields(config):
        if field.name not in names and getattr(config, field.name) != field.default:
            raise JarmError(
                f"{config.data} holds pairs that are labelled already, and a comparison on them takes no "
                f"`{field.name}`: leave it out, as in `jarm backtest {config.data} --embeddings {config.embeddings}`."
            )
    return BacktestConfig(**{name: getattr(config, name) for name in names if hasattr(config, name)})


def backtest(config: BacktestConfig) -> dict[str, Any]:
    """Run a backtest, or the rest of it, and write its folder.

    Args:
      config: the settings.

    Returns:
      The summary, as in `summary.json`: `answer`, `rules`, `reference` and `provenance` as of
      `jarm.report.summary.summarise` for accuracy, with intervals over seeds and held-out prompts; of processes other
      than the first, an empty one.

    Raises:
      JarmError: the settings, the data or the folder are at fault; the message says which and what to do.

    Example:
      >>> import json, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> rows = [{"prompt": f"p{p}", "chosen": "yes, sir", "rejected": "no"} for p in range(40)]
      >>> _ = (folder / "pairs.jsonl").write_text("\\n".join(map(json.dumps, rows)))
      >>> np.save(folder / "pairs.npy", np.random.default_rng(0).normal(size=(80, 3)))
      >>> sizes = {"rounds": 1, "batch": 5, "initial": 10, "seeds": 2, "rules": "entropy", "first": "random"}
      >>> config = BacktestConfig(
      ...     data=str(folder / "pairs.jsonl"), embeddings=str(folder / "pairs.npy"), metric="none", head="linear",
      ...     members=1, out=folder / "out", **sizes,
      ... )
      >>> found = backtest(config)
      >>> found["answer"]
      'Too few seeds to say: 2 of the 5 or more that an answer needs; ...Each training prompt has one recorded pair...'
      >>> found["rules"]["entropy"]["labels"]
      [10.0, 15.0]
    """
    out = pathlib.Path(config.out)
    with in_step():
        job = read_job(config)
        if remark := unread(config):
            say(remark)
        draws = _can_draw()

    def finish(records: list[Record]) -> dict[str, Any]:
        rules = config.rule_names()
        shown = by_rule([line for line in records if line["kind"] == "reference" or line["rule"] in rules], rules)

        def amend(summary: dict[str, Any]) -> dict[str, Any]:
            found = with_prompts(summary, shown, job.decided, BY_PROMPT)
            return found | {"answer": f"{found['answer']} {job.remark}"}

        try:
            summary = write_summary(shown, out, metric=ACCURACY, amend=amend)
            if draws:
                learning_curves(shown, out / "curves", ACCURACY)
        except OSError as error:
            raise JarmError(f"Cannot write to {out} ({error}): make room, and give the same command.") from error
        return summary

    return run_jobs([job], config, out, finish, name="backtest")


def read_job(config: BacktestConfig) -> RecordedJob:
    """The runs of a backtest with their data, so that mistakes are refused before anything runs.

    Raises:
      JarmError: an option or the data are at fault; the message says which, and what to do.
    """
    options = config.comparison()
    loop, hparams = options.loop(), options.hparams()
    for rule in options.rule_names():
        get_rule(rule)  # runs the file of a rule of yours
    pairs = _read_pairs(config)
    pool = pool_of(pairs.train)
    if config.per_prompt == "auto":
        loop = dataclasses.replace(loop, per_prompt=limit_per_prompt(loop, pairs.train.table, pool.counts))
    check_recorded(loop, pool.counts)
    scale, hparams = check_run(loop, pairs.train.table, hparams)
    refuse_large_run(loop, pairs.train.table.shape[2])
    make_loop(loop)  # refuses fits and rules that do not go together
    lengths = pairs.test.table.attributes["length"].reshape(-1).astype(np.float64)
    longer = lengths[pairs.test.first] - lengths[pairs.test.second]
    test = training_of(pairs.test)
    return RecordedJob([Setting({}, options)], loop, None, pairs.tables, scale, [hparams], pool, test, longer)


def _read_pairs(config: BacktestConfig) -> PairSplit:
    """The recorded pairs as runs see them: in no order, standardised and mapped."""
    pairs = recorded_pairs(config)
    for which, side in zip(("training", "test"), pairs, strict=True):
        if (side.label == 0.5).all():
            raise JarmError(
                f"{config.data}: the labels of all {len(side):,} {which} pairs are 1/2, which prefer nothing: give "
                "pairs of which some have a majority."
            )
    pairs = PairSplit(*map(shuffled, pairs))
    if config.standardise:
        pairs = pairs.with_tables(standardised(pairs.tables))
    if found := read_metric(config.metric):
        pairs = pairs.with_tables(within_metric(pairs.tables, found))
    return pairs


def _can_draw() -> bool:
    """Whether matplotlib is installed; without it, a remark."""
    try:
        require_matplotlib()
    except JarmError as error:
        say(f"jarm: no figure is drawn. {error}")
        return False
    return True
