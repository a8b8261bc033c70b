"""`jarm compare`: how fast does each acquisition rule teach a reward model, on these data?

Every rule is run with every seed; a seed fixes the first labels, the candidates drawn and the annotator's opinions,
so rules are compared in pairs. Records are appended run by run, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jarm.acquisition.registry import get_rule
from jarm.annotators import AnnotatorConfig
from jarm.base import Benchmark, HParams, JarmError, check
from jarm.data.datasets import load
from jarm.figures import learning_curves, require_matplotlib
from jarm.fit import FitConfig
from jarm.heads import HeadConfig
from jarm.loop import LoopConfig, Pool, RunRecord, check_budget, make_hparams, make_loop, make_pool
from jarm.metrics import evaluate, reference_lines
from jarm.records import RecordFolder, fingerprint, plain, provenance
from jarm.report import write_summary
from jarm.types import Params

T = TypeVar("T")

RULES = "random,entropy,max_diff,xtx,dopt,pa_dopt,greedy_dopt"


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Settings of a comparison; the defaults finish in about two minutes on two cores.

    Attributes:
      data: "synthetic" (built in), "synthetic:outliers" (a variant where active selection does not help), a Parquet or
        JSONL table of responses, or a folder in the layout embd_{gen}_{emb}_{task}_{split}.npy.
      embeddings: .npy array with one row for each row of the table.
      target: column of the table that holds the gold reward.
      gen: for a folder that holds several settings, the generating model, as in its file names.
      emb: likewise, the embedding model.
      task: likewise, the task.
      out: folder for records.jsonl, summary.json, summary.md, curves.png and curves.svg.
      rules: acquisition rules, separated by commas; `jarm rules` lists them. "random" is always run.
      pairs: which pairs may be asked about: "within" prompts, "cross" (across prompts) or "all".
      rounds: batches bought after the first random labels.
      batch: pairs bought a round.
      initial: random pairs labelled before the first round.
      seeds: how many seeds; each fixes the first labels, the candidates and the annotator.
      pool: candidate pairs drawn at random each round; 0 considers every pair.
      prompts: prompts drawn at random each round; 0 considers every prompt.
      noise: beta of the annotator, P(first preferred) = sigmoid(beta * gold difference / standard deviation);
        negative for no noise.
      flip_rate: solve for the noise at which random pairs are answered wrongly this often, such as 0.25.
      annotator: "bradley_terry", "perfect", or "flip" (wrong with probability flip_rate whatever the pair).
      gold_scale: what gold differences are divided by: "std" of all gold rewards, or a number.
      length_bias: liking of the annotator for longer responses, in logits a standard deviation of length.
      head: reward head: "linear", or "mlp:64,64,64" for an MLP with these hidden layers.
      members: heads in the ensemble; several linear ones differ by bootstrap weights of the labels.
      warm_start: start each round's fit from the last round's heads.
      steps: most Adam steps of a fit.
      holdout: share of the labels that a member holds out, its own, to stop early; 0 takes all steps.
      folds: how many such parts are held out in turn to find when to stop, before a fit to all labels; 1 keeps the
        best head seen.
      learning_rate: of Adam.
      weight_decay: of Adam, decoupled.
      ridge: L2 penalty of a linear head.
      prior: c, weight of the prior of greedy_dopt, in units of what as many average pairs would tell.
      prior_mix: rho, shape of that prior: 0 a ridge, 1 the information of the pool.
      best_of: sizes N of best-of-N, separated by commas.
      jobs: runs at a time on a CPU; 0 takes one a core.
    """

    data: str = "synthetic"
    embeddings: str | None = None
    target: str | None = None
    gen: str | None = None
    emb: str | None = None
    task: str | None = None
    out: pathlib.Path = pathlib.Path("out/compare")
    rules: str = RULES
    pairs: str = "within"
    rounds: int = 8
    batch: int = 50
    initial: int = 50
    seeds: int = 10
    pool: int = 5000
    prompts: int = 0
    noise: float = 2.0
    flip_rate: float | None = None
    annotator: str = "bradley_terry"
    gold_scale: str = "std"
    length_bias: float = 0.0
    head: str = "mlp:64,64,64"
    members: int = LoopConfig().fit.members
    warm_start: bool = False
    steps: int = LoopConfig().fit.steps
    holdout: float = LoopConfig().fit.holdout
    folds: int = LoopConfig().fit.folds
    learning_rate: float = float(HParams().learning_rate)
    weight_decay: float = float(HParams().weight_decay)
    ridge: float = float(HParams().ridge)
    prior: float = float(HParams().prior)
    prior_mix: float = float(HParams().prior_mix)
    best_of: str = "2,5,10,20"
    jobs: int = 0

    def rule_names(self) -> list[str]:
        """The rules in the order given, each once, `random` first."""
        names = ["random", *(name.strip() for name in self.rules.split(",") if name.strip())]
        for name in names:
            get_rule(name)
        return list(dict.fromkeys(names))

    def sizes(self) -> tuple[int, ...]:
        """The sizes of best-of-N."""
        try:
            sizes = tuple(int(size) for size in self.best_of.split(","))
        except ValueError:
            raise JarmError(f"`--best-of {self.best_of}` is not a list of numbers such as 2,5,10.") from None
        if min(sizes) < 1:
            raise JarmError(f"`--best-of {self.best_of}`: the best of {min(sizes)} is nothing; give sizes from 1.")
        return sizes

    def loop(self) -> LoopConfig:
        """The loop that runs all the rules."""
        try:
            scale: str | float = self.gold_scale if self.gold_scale == "std" else float(self.gold_scale)
        except ValueError:
            raise JarmError(f"`--gold-scale {self.gold_scale}` is neither 'std' nor a number.") from None
        head = HeadConfig.parse(self.head)
        # A linear fit has one answer: only its labels can tell members apart.
        ensemble = "init" if head.hidden or self.members == 1 else "bootstrap"
        return LoopConfig(
            rules=tuple(self.rule_names()),
            pairs=self.pairs,
            rounds=self.rounds,
            batch=self.batch,
            initial=self.initial,
            prompts=self.prompts or None,
            pool=self.pool or None,
            head=head,
            fit=FitConfig(
                members=self.members, ensemble=ensemble, steps=self.steps, holdout=self.holdout, folds=self.folds
            ),
            annotator=AnnotatorConfig(self.annotator, scale, self.flip_rate, self.length_bias),
            warm_start=self.warm_start,
        )

    def hparams(self) -> HParams:
        """The traced numbers."""
        return HParams(**{field.name: getattr(self, field.name) for field in dataclasses.fields(HParams)})


# What may differ between two commands that fill the same folder.
_FREE = ("rules", "seeds", "out", "jobs")


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run the comparison, or the rest of it, and write its folder.

    Args:
      config: the settings.

    Returns:
      The summary, as in `summary.json`.

    Raises:
      JarmError: the settings, the data or the folder are at fault; the message says which and what to do.
    """
    if config.seeds < 1:
        raise JarmError(f"`--seeds {config.seeds}` runs nothing: give at least 1.")
    require_matplotlib()  # before the runs, not after them
    rules, sizes, loop_config = config.rule_names(), config.sizes(), config.loop()
    source = {name: getattr(config, name) for name in ("embeddings", "target", "gen", "emb", "task")}
    benchmark = load(config.data, **source)
    if benchmark.train.gold is None or benchmark.test.gold is None:
        raise JarmError("The data has no gold rewards, so there is nothing to judge by: give `--target COLUMN`.")
    check_budget(loop_config, benchmark.train)
    folder = RecordFolder(config.out, _settings(config, benchmark), config.rounds)
    pool, scale = make_pool(benchmark.train, loop_config.annotator)
    hparams = make_hparams(loop_config, benchmark.train, scale, config.hparams())
    judge = functools.partial(evaluate, noise=float(hparams.noise), scale=scale, best_of=sizes)
    common = {"config": fingerprint(folder.settings), **provenance()}

    known = {line["rule"] for line in folder.read() if line["kind"] == "reference"}
    references = reference_lines(benchmark.test, noise=float(hparams.noise), scale=scale, best_of=sizes)
    lacking = {name: values for name, values in references.items() if name not in known}
    if lacking:
        folder.append([{"kind": "reference", "rule": name, **values, **common} for name, values in lacking.items()])

    runner = Runner(loop_config, hparams, pool)
    head = loop_config.head.head()
    wanted = [(rule, seed) for seed in range(config.seeds) for rule in rules if (rule, seed) not in folder.done]

    def one(rule: str, seed: int) -> list[dict[str, Any]]:
        result = runner(rule, seed)
        metrics = judge(head, result.params, benchmark.test)
        return [{**line, **common} for line in result.lines(metrics)]

    # The first run of each rule goes alone, so that what is timed on it has the machine to itself.
    first = {rule: seed for rule, seed in reversed(wanted)}
    alone = [run for run in wanted if first[run[0]] == run[1]]
    rest = [run for run in wanted if first[run[0]] != run[1]]
    total, jobs = len(rules) * config.seeds, config.jobs or default_jobs()
    with tqdm(total=total, initial=total - len(wanted), unit="run", desc="compare") as bar:
        for lines in itertools.chain(side_by_side(one, alone, 1), side_by_side(one, rest, jobs)):
            folder.append(lines)
            bar.set_postfix_str(f"{lines[-1]['rule']}, seed {lines[-1]['seed']}", refresh=False)
            bar.update()
    shown = [line for line in folder.read() if line["kind"] == "reference" or line["rule"] in rules]
    try:
        summary = write_summary(shown, config.out)
        learning_curves(shown, config.out / "curves")
    except OSError as error:
        raise JarmError(f"Cannot write to {config.out} ({error}): make room, and give the same command.") from error
    return summary


def default_jobs() -> int:
    """Runs at a time: on a CPU one a core, since XLA finds little to share out in arrays this small; else 1."""
    if jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(function: Callable[..., T], calls: list[tuple[Any, ...]], jobs: int) -> Iterator[T]:
    """Results of the calls as they finish, `jobs` of them at work at a time; an error cancels what has not begun.

    None waits for a slower one before it, so that an interrupt loses only what is in flight.
    """
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(function, *call) for call in calls]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class Result:
    """One run: its records with a leading axis over rounds, the heads of every round, and what it took.

    `seconds` is the wall time of the whole run, other runs at its side; the other two are of single calls on its last
    state, with nothing beside them.
    """

    rule: str
    seed: int
    records: RunRecord
    params: Params
    seconds: float
    seconds_to_fit: float
    seconds_to_select: float

    def lines(self, metrics: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """Flat records, one a round; batch_* describe the batch that was bought just before."""
        run = self.records
        lines = []
        for t in range(len(run.labels)):
            batch = {f"batch_{name}": values[t - 1] if t else math.nan for name, values in run.batch.items()}
            line = {
                "kind": "run",
                "rule": self.rule,
                "seed": self.seed,
                "round": t,
                "labels": run.labels[t],
                "label_error": run.wrong[t] / run.labels[t],
                **{name: values[t] for name, values in metrics.items()},
                **batch,
                "fit_train_nll": run.fit.train_nll[t].mean(),
                "fit_valid_nll": run.fit.valid_nll[t].mean(),
                "fit_steps": run.fit.steps[t].mean(),
                "seconds_to_fit": self.seconds_to_fit,
                "seconds_to_select": self.seconds_to_select,
                "seconds": self.seconds,
            }
            lines.append({name: plain(value) for name, value in line.items()})
        return lines


class Runner:
    """Runs of one configuration: one program for all its rules, compiled at the first call."""

    def __init__(self, config: LoopConfig, hparams: HParams, pool: Pool):
        loop = make_loop(config)
        self.rules, self.hparams, self.pool = config.rules, hparams, pool
        self._run, self._fit, self._select = jax.jit(loop.run), jax.jit(loop.fit), jax.jit(loop.select)
        self._seconds: dict[str, tuple[float, float]] = {}

    def __call__(self, rule: str, seed: int, hparams: HParams | None = None) -> Result:
        """Run one rule with one seed; a rule's first run also times a fit and a selection on its last state."""
        hparams = hparams or self.hparams
        index = jnp.int32(self.rules.index(rule))
        start = time.perf_counter()
        state, records = jax.block_until_ready(self._run(jax.random.key(seed), hparams, self.pool, index))
        seconds = time.perf_counter() - start
        check(records.status, f"Rule {rule}, seed {seed}")
        if rule not in self._seconds:
            self._seconds[rule] = (
                _seconds(lambda: self._fit(hparams, state, self.pool)),
                _seconds(lambda: self._select(hparams, state, self.pool, index)),
            )
        host = jax.tree.map(np.asarray, records._replace(params=None))
        return Result(rule, seed, host, records.params, seconds, *self._seconds[rule])


def _seconds(call: Callable[[], Any]) -> float:
    """Median wall time of three calls, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return sorted(times)[1]


def _settings(config: CompareConfig, benchmark: Benchmark) -> dict[str, Any]:
    """What a record depends on: the options that may not change in a folder, and the data."""
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    options = {name: value for name, value in options.items() if name not in _FREE}
    return options | {"train": dict(benchmark.train.provenance), "test": dict(benchmark.test.provenance)}
