"""Settings of comparisons: the options of `jarm compare`."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from jarm.acquisition.registry import RULES as ALL_RULES
from jarm.acquisition.registry import check_name
from jarm.core.base import HParams
from jarm.core.checks import INT32, Check, at_least, between, check_fields, distinct, one_of
from jarm.core.status import JarmError
from jarm.data.metric import read_metric
from jarm.evaluation.annotators import ANNOTATOR_CHECKS, AnnotatorConfig
from jarm.loop.config import LOOP_CHECKS, LoopConfig
from jarm.reward.config import FIT_CHECKS, FitConfig, HeadConfig

T = TypeVar("T")
MAX_RUNS = 100_000
"""Number of runs that an option has to allow: they would take days."""
TEXTS = ("rules", "attributes", "best_of", "gold_scale", "per_prompt")
"""Options that are one text, and may be given as a list or a number."""
RULES = "random,then_random,v_opt,greedy_dopt,dopt,entropy,max_diff"
PAPER: Mapping[str, str] = {
    "data": "synthetic",
    "rules": "random,entropy,max_diff,xtx,dopt,pa_dopt,greedy_dopt",
    "head": "mlp:64,64,64",
    "metric": "none",
    "first": "random",
    "per_prompt": "0",
}
"""Options of the papers' learner and rules: the defaults of jarm before a linear head with a prior took their place."""
SOURCE = ("embeddings", "target", "attributes", "gen", "emb", "task", "standardise", "metric", "allow_leakage")
"""Options that choose the data, beside `data`."""
FREE = ("rules", "seeds", "out", "workers", "vmap_runs", "max_runs")
"""Options that may differ between two commands that fill the same folder."""
NOISE_FREE = ("auto", "yes", "no")
"""Values of `noise_free`."""
ADDED: Mapping[str, Any] = {
    "attributes": None,
    "annotator_column": "gold",
    "allow_leakage": False,
    "evidence": False,
    "prior_variance": 0.1,
    "first": "random",
    "per_prompt": "0",
    "metric": "none",
    "noise_free": "auto",
}
"""Options that older folders lack -> what they had in their place; the settings of a folder leave these out there."""


def documented_by(*records: type) -> Callable[[type[T]], type[T]]:
    """List all options in the docstring of a config; those that it leaves out get their text from `records`.

    The texts are the help of the command line, where the symbol that some begin with ("T, batches") says nothing.

    Raises:
      TypeError: an option has no text.
    """

    def complete(config: type[T]) -> type[T]:
        if config.__doc__ is None or sys.flags.optimize > 1:  # python -OO keeps none
            return config
        texts = dict[str, str]()
        for each in (config, *records):
            # Python 3.13 takes the indentation out of docstrings, and earlier ones leave it in.
            _, _, attributes = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
            for text, name in re.findall(r"^(  (\w+): .*\n(?: {4}.*\n)*)", f"{attributes}\n", re.M):
                texts.setdefault(name, re.sub(r": [A-Z], ", ": ", text, count=1))
        options = config.__dataclass_fields__.keys()  # type: ignore[attr-defined]
        if missing := options - texts.keys():
            raise TypeError(f"{config.__name__} has no text for {', '.join(sorted(missing))}: write it in a docstring.")
        head, title, _ = inspect.cleandoc(config.__doc__).partition("Attributes:\n")
        config.__doc__ = f"{head}{title}{''.join(texts[name] for name in options)}"
        return config

    return complete


def as_text(option: str, value: Any) -> Any:
    """A list of names or whole numbers with commas between them; a number as text where the option is of numbers."""
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, (list, tuple)) and all(isinstance(each, (str, int, np.integer)) for each in value):
        return value if any(isinstance(each, bool) for each in value) else ",".join(map(str, value))
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return str(value) if is_number and option in ("best_of", "gold_scale", "sizes", "per_prompt") else value


def parts(name: str, text: str) -> list[str]:
    """The names in a text, between commas.

    Raises:
      JarmError: one of them is empty, or occurs twice.

    Example:
      >>> parts("`rules`", "dopt, greedy_dopt")
      ['dopt', 'greedy_dopt']
      >>> parts("`rules`", "dopt,,greedy_dopt")
      Traceback (most recent call last):
      jarm.core.status.JarmError: `rules` is 'dopt,,greedy_dopt', with nothing between two commas: leave one out.
    """
    names = [each.strip() for each in text.split(",")]
    if not all(names):
        raise JarmError(f"{name} is {text!r}, with nothing between two commas: leave one out.")
    distinct(name, names)
    return names


def refuse_many(what: str, runs: int, limit: int) -> None:
    """Refuse more runs than an option allows, by their number alone.

    Raises:
      JarmError: there are more.
    """
    if runs > limit:
        raise JarmError(f"{what} are {runs:,} runs, more than the {limit:,} of `max_runs`: take fewer, or raise it.")


def known_names(name: str, text: str) -> None:
    """Check that a text is "all", or names of rules with commas between them; no file of a rule is read."""
    if text != "all":
        for rule in parts(name, text):
            check_name(rule)


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers from 1 in a text, between commas."""
    try:
        found = tuple(int(each) for each in parts(name, text))
    except ValueError as error:
        if isinstance(error, JarmError):
            raise
        raise JarmError(f"{name} is {text!r}, not a list of numbers such as 2,5,10.") from None
    for each in found:
        between(1, INT32)(f"A number in {name}", each)
    return found


def _sizes(name: str, text: str) -> tuple[int, ...] | None:
    return None if text == "auto" else numbers(name, text)


def _scale(name: str, text: str) -> str | float:
    try:
        scale: str | float = text if text == "std" else float(text)
    except ValueError:
        raise JarmError(f"{name} is {text!r}, neither 'std' nor a number.") from None
    if not isinstance(scale, str):
        between()(name, scale)
    ANNOTATOR_CHECKS["scale"](name, scale)
    return scale


def _limit(name: str, text: str) -> int | None:
    """A limit of pairs per prompt; None for 0, which is none, and for "auto", which the data decide."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise JarmError(f"{name} is {text!r}, neither 'auto' nor a whole number from 0, which is no limit.")
    between(0, INT32)(name, int(text))
    return int(text) or None


def _learning_rate(name: str, rate: float) -> None:
    if rate == 0:
        raise JarmError(f"{name} is 0, at which no head learns: give a positive number, such as 0.001.")


_SHARED = ("pairs", "rounds", "batch", "initial", "first", "members", "ensemble", "loss", "steps", "holdout", "folds")
COMPARE_CHECKS: Mapping[str, Check] = {
    **{name: check for name, check in [*LOOP_CHECKS.items(), *FIT_CHECKS.items()] if name in _SHARED},
    **dict.fromkeys(("candidates", "prompts", "batch_size"), between(0, INT32)),
    **dict.fromkeys(("workers", "vmap_runs"), between(0, 1 << 16)),
    "rules": known_names,
    "attributes": parts,
    "metric": lambda _, text: read_metric(text),
    "seeds": at_least(1),
    "max_runs": between(1, 1 << 32),
    "annotator": ANNOTATOR_CHECKS["kind"],
    "flip_rate": ANNOTATOR_CHECKS["flip_rate"],
    "gold_scale": _scale,
    "per_prompt": _limit,
    "head": lambda _, text: HeadConfig.parse(text),
    "learning_rate": _learning_rate,
    "best_of": _sizes,
    "noise_free": one_of(*NOISE_FREE),
}
"""Option of `jarm compare` -> the check of its values; those of `HParams` check themselves."""


@documented_by(LoopConfig, FitConfig, AnnotatorConfig, HParams)
@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Settings of a comparison; the defaults finish in a minute or two on two cores.

    Every option is checked by itself when the config is built; whether they go together is checked when it runs, since
    the axes of a sweep may set some of them. Lists of names or numbers may be given as one.

    Example:
      >>> config = CompareConfig(rules="dopt,greedy_dopt", head="linear", batch=10, rounds=4)
      >>> config.rule_names()
      ['random', 'dopt', 'greedy_dopt']
      >>> config.loop().budget  # labels: 50 random ones, then 10 in each of 4 rounds
      90

    Attributes:
      data: "synthetic:hidden" (built in, like hidden states of a decoder), "synthetic" (like sentence embeddings),
        "synthetic:outliers" (where active selection does not help), a Parquet or JSONL table of responses, or of
        chosen and rejected ones, or a folder in the layout embd_{gen}_{emb}_{task}_{split}.npy.
      embeddings: .npy array with one row for each row of the table, or a store that has its texts.
      standardise: give every dimension of the embeddings mean 0 and variance 1 over the training responses.
      metric: map of the embeddings by differences of responses to one prompt, made without labels or gold:
        "within:ALPHA:RANK" sharpens the directions in which they differ most, the more the larger ALPHA is over 1, and
        keeps no more of them than RANK; "within:ALPHA" keeps all; "none" leaves embeddings as they are.
      target: column of the table that holds the gold reward.
      attributes: further columns of numbers of the table, separated by commas; annotators can answer by them, and each
        becomes a reference line.
      allow_leakage: let one prompt stand in the training and in the test set, under two ids; else this is refused,
        since tests on prompts of the training set flatter every model.
      gen: the generating model, as in the file names of a folder that holds several settings.
      emb: the embedding model, likewise.
      task: the task, likewise.
      out: folder for records.jsonl, summary.json, summary.md, curves.png and curves.svg.
      rules: acquisition rules, separated by commas; `jarm rules` lists them, "all" takes every one, FILE.py:FUNCTION is
        one of yours, and the file is run as a program. "random" is always run.
      seeds: number of seeds; each fixes the first labels, the candidates and the annotator.
      prompts: prompts drawn at random per round; 0 considers every prompt.
      candidates: candidate pairs drawn at random per round; 0 considers every pair.
      per_prompt: largest number of pairs with a response of any one prompt in a batch of a greedy rule; "auto" is 1
        where prompts suffice for every batch, else no limit, as is 0. A first batch that is chosen has the smallest
        that leaves a choice with both.
      noise: beta of the annotator, P(first preferred) = sigmoid(beta * gold difference / standard deviation);
        negative for no noise.
      annotator: "bradley_terry", "perfect", or "flip" (wrong with probability flip_rate on every pair).
      flip_rate: solve for the noise at which random pairs are answered wrongly this often, such as 0.25, against the
        column that the annotator answers by.
      gold_scale: divisor of gold differences: "std" of all gold rewards, or a number.
      annotator_column: column that the annotator answers by: "gold", or "length" or another attribute in its place.
        The flip rate and the scale are of this column; label_error and the metrics of models are against gold all the
        same.
      head: reward head: "laplace", linear with a Gaussian prior and its posterior, fitted in milliseconds; "linear",
        without; or "mlp:64,64,64" for an MLP with these hidden layers, stopped early.
      batch_size: labelled pairs per Adam step; 0 takes all.
      holdout: share of the labels that each head holds out, to stop its fit early; 0 takes all steps.
      folds: 1 keeps each head as it was at its best on the labels it held out. With more, as many parts of the labels
        are held out to find the number of steps, and new heads are fitted to all labels.
      prior_weight: weight of the prior of rules that have one, such as greedy_dopt: 1 counts as much as all labels
        would, had they the information of average pairs.
      prior_mix: shape of that prior, from 0, equal in all directions, to 1, the mean information of the candidates.
      best_of: sizes N of best-of-N, separated by commas; "auto": 5, 10, 30, ... up to the responses that 90 % of test
        prompts have.
      noise_free: whether each run ends with a noise-free refit, the last fit once more with the annotator's
        probabilities as labels, which tells noise of the labels from what pairs and head cost: "yes", "no", or "auto",
        for linear and laplace heads, whose runs it makes an eighth longer (those of an MLP more than a quarter).
      workers: calls at a time; 0 takes one per core on a CPU, else 1. On a host with several devices a comparison
        splits its seeds over all of them, and this does nothing.
      vmap_runs: runs per call, mapped over by vmap; 0 takes 1 on a CPU, where more are slower, else 16.
      max_runs: number of runs, of all settings, rules and seeds, above which nothing is begun.
    """

    data: str = "synthetic:hidden"
    embeddings: str | None = None
    standardise: bool = True
    metric: str = "within:2:128"
    target: str | None = None
    attributes: str | None = None
    allow_leakage: bool = False
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
    candidates: int = 5000
    prompts: int = 0
    first: str = "v_opt"
    per_prompt: str = "auto"
    noise: float = 2.0
    flip_rate: float | None = None
    annotator: str = "bradley_terry"
    gold_scale: str = "std"
    length_bias: float = 0.0
    annotator_column: str = AnnotatorConfig().column
    head: str = "laplace"
    members: int = FitConfig().members
    ensemble: str = FitConfig().ensemble
    loss: str = FitConfig().loss
    warm_start: bool = False
    steps: int = FitConfig().steps
    batch_size: int = 0
    holdout: float = FitConfig().holdout
    folds: int = FitConfig().folds
    evidence: bool = FitConfig().evidence
    learning_rate: float = float(HParams().learning_rate)
    weight_decay: float = float(HParams().weight_decay)
    ridge: float = float(HParams().ridge)
    prior_variance: float = float(HParams().prior_variance)
    label_smoothing: float = float(HParams().label_smoothing)
    prior_weight: float = float(HParams().prior_weight)
    prior_mix: float = float(HParams().prior_mix)
    beta: float = float(HParams().beta)
    temperature: float = float(HParams().temperature)
    epsilon: float = float(HParams().epsilon)
    best_of: str = "auto"
    noise_free: str = "auto"
    workers: int = 0
    vmap_runs: int = 0
    max_runs: int = MAX_RUNS

    def __post_init__(self) -> None:
        for name in TEXTS:
            object.__setattr__(self, name, as_text(name, getattr(self, name)))
        check_fields(self, COMPARE_CHECKS)
        object.__setattr__(self, "metric", str(read_metric(self.metric) or "none"))  # one text for one metric
        self.hparams()
        refuse_many(f"{self.seeds:,} seeds x {len(self.rule_names())} rules", self.runs, self.max_runs)

    @property
    def runs(self) -> int:
        """Number of runs: of every rule with every seed."""
        return self.seeds * len(self.rule_names())

    def rule_names(self) -> list[str]:
        """Names of the rules in the order given, `random` first."""
        names = list(ALL_RULES) if self.rules == "all" else parts("`rules`", self.rules)
        return list(dict.fromkeys(["random", *names]))

    def sizes(self) -> tuple[int, ...] | None:
        """Sizes of best-of-N, or None for the sizes that suit the table."""
        return _sizes("`best_of`", self.best_of)

    def loop(self) -> LoopConfig:
        """The loop that runs all the rules.

        Raises:
          JarmError: options do not go together, such as fewer candidates than a batch.
        """
        scale, head = _scale("`gold_scale`", self.gold_scale), HeadConfig.parse(self.head)
        return self._named(
            LoopConfig,
            rules=tuple(self.rule_names()),
            prompts=self.prompts or None,
            candidates=self.candidates or None,
            per_prompt=_limit("`per_prompt`", self.per_prompt),
            head=head,
            noise_free=self.noise_free == "yes" or (self.noise_free == "auto" and not head.hidden),
            fit=self._named(FitConfig, batch_size=self.batch_size or None),
            annotator=self._named(AnnotatorConfig, kind=self.annotator, scale=scale, column=self.annotator_column),
        )

    def hparams(self) -> HParams:
        """The traced numbers."""
        return self._named(HParams)

    def _named(self, record: type[T], **given: Any) -> T:
        """A record with the options that have the names of its fields; `given` takes precedence."""
        names = record.__dataclass_fields__.keys() & self.__dataclass_fields__.keys()  # type: ignore[attr-defined]
        return record(**{name: getattr(self, name) for name in names} | given)
