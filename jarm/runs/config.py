"""Settings of comparisons: the options of `jarm compare`."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any, TypeVar

from jarm.acquisition.registry import RULES as ALL_RULES
from jarm.acquisition.registry import get_rule
from jarm.core.base import HParams
from jarm.core.status import JarmError
from jarm.evaluation.annotators import AnnotatorConfig
from jarm.loop.config import LoopConfig
from jarm.reward.config import FitConfig, HeadConfig

T = TypeVar("T")
RULES = "random,entropy,max_diff,xtx,dopt,pa_dopt,greedy_dopt"
SOURCE = ("embeddings", "target", "attributes", "gen", "emb", "task", "standardise", "allow_leakage")
"""Options that choose the data, beside `data`."""
FREE = ("rules", "seeds", "out", "workers", "vmap_runs")
"""Options that may differ between two commands that fill the same folder."""
ADDED = ("attributes", "annotator_column", "allow_leakage")
"""Options that the settings of a folder leave out at their default, since older folders lack them."""


def documented_by(*records: type) -> Callable[[type[T]], type[T]]:
    """List all options in the docstring of a config; those that it leaves out get their text from `records`.

    The texts are the help of the command line, where the symbol that some begin with ("T, batches") says nothing.

    Raises:
      TypeError: an option has no text.
    """

    def complete(config: type[T]) -> type[T]:
        if config.__doc__ is None:  # python -OO
            return config
        texts = dict[str, str]()
        for each in (config, *records):
            _, _, attributes = (each.__doc__ or "").partition("    Attributes:\n")
            for text, name in re.findall(r"^(      (\w+): .*\n(?: {8}.*\n)*)", attributes, re.M):
                texts.setdefault(name, re.sub(r": [A-Z], ", ": ", text, count=1))
        options = config.__dataclass_fields__.keys()  # type: ignore[attr-defined]
        if missing := options - texts.keys():
            raise TypeError(f"{config.__name__} has no text for {', '.join(sorted(missing))}: write it in a docstring.")
        head, title, _ = config.__doc__.partition("    Attributes:\n")
        config.__doc__ = f"{head}{title}{''.join(texts[name] for name in options)}    "
        return config

    return complete


@documented_by(LoopConfig, FitConfig, AnnotatorConfig, HParams)
@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Settings of a comparison; the defaults finish in a minute or two on two cores.

    Example:
      >>> config = CompareConfig(rules="dopt,greedy_dopt", head="linear", batch=10, rounds=4)
      >>> config.rule_names()
      ['random', 'dopt', 'greedy_dopt']
      >>> config.loop().budget  # labels: 50 random ones, then 10 in each of 4 rounds
      90

    Attributes:
      data: "synthetic" (built in), "synthetic:outliers" (a variant where active selection does not help), a Parquet or
        JSONL table of responses, or a folder in the layout embd_{gen}_{emb}_{task}_{split}.npy.
      embeddings: .npy array with one row for each row of the table, or a store that has its texts.
      standardise: give every dimension of the embeddings mean 0 and variance 1 over the training responses.
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
        one of yours. "random" is always run.
      seeds: number of seeds; each fixes the first labels, the candidates and the annotator.
      prompts: prompts drawn at random per round; 0 considers every prompt.
      candidates: candidate pairs drawn at random per round; 0 considers every pair.
      noise: beta of the annotator, P(first preferred) = sigmoid(beta * gold difference / standard deviation);
        negative for no noise.
      annotator: "bradley_terry", "perfect", or "flip" (wrong with probability flip_rate on every pair).
      flip_rate: solve for the noise at which random pairs are answered wrongly this often, such as 0.25, against the
        column that the annotator answers by.
      gold_scale: divisor of gold differences: "std" of all gold rewards, or a number.
      annotator_column: column that the annotator answers by: "gold", or "length" or another attribute in its place.
        The flip rate and the scale are of this column; label_error and the metrics of models are against gold all the
        same.
      head: reward head: "linear", or "mlp:64,64,64" for an MLP with these hidden layers.
      batch_size: labelled pairs per Adam step; 0 takes all.
      holdout: share of the labels that each head holds out, to stop its fit early; 0 takes all steps.
      folds: 1 keeps each head as it was at its best on the labels it held out. With more, as many parts of the labels
        are held out to find the number of steps, and new heads are fitted to all labels.
      prior_weight: weight of the prior of rules that have one, such as greedy_dopt: 1 counts as much as all labels
        would, had they the information of average pairs.
      prior_mix: shape of that prior, from 0, equal in all directions, to 1, the mean information of the candidates.
      best_of: sizes N of best-of-N, separated by commas; "auto": 5, 10, 30, ... up to the responses that 90 % of test
        prompts have.
      workers: calls at a time; 0 takes one per core on a CPU, else 1. On a host with several devices a comparison
        splits its seeds over all of them, and this does nothing.
      vmap_runs: runs per call, mapped over by vmap; 0 takes 1 on a CPU, where more are slower, else 16.
    """

    data: str = "synthetic"
    embeddings: str | None = None
    standardise: bool = True
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
    noise: float = 2.0
    flip_rate: float | None = None
    annotator: str = "bradley_terry"
    gold_scale: str = "std"
    length_bias: float = 0.0
    annotator_column: str = AnnotatorConfig().column
    head: str = "mlp:64,64,64"
    members: int = FitConfig().members
    ensemble: str = FitConfig().ensemble
    loss: str = FitConfig().loss
    warm_start: bool = False
    steps: int = FitConfig().steps
    batch_size: int = 0
    holdout: float = FitConfig().holdout
    folds: int = FitConfig().folds
    learning_rate: float = float(HParams().learning_rate)
    weight_decay: float = float(HParams().weight_decay)
    ridge: float = float(HParams().ridge)
    label_smoothing: float = float(HParams().label_smoothing)
    prior_weight: float = float(HParams().prior_weight)
    prior_mix: float = float(HParams().prior_mix)
    beta: float = float(HParams().beta)
    temperature: float = float(HParams().temperature)
    epsilon: float = float(HParams().epsilon)
    best_of: str = "auto"
    workers: int = 0
    vmap_runs: int = 0

    def rule_names(self) -> list[str]:
        """Names of the rules in the order given, each once, `random` first."""
        rules = ",".join(ALL_RULES) if self.rules == "all" else self.rules
        names = ["random", *(name.strip() for name in rules.split(",") if name.strip())]
        for name in names:
            get_rule(name)
        return list(dict.fromkeys(names))

    def sizes(self) -> tuple[int, ...] | None:
        """Sizes of best-of-N, or None for the sizes that suit the table."""
        if self.best_of == "auto":
            return None
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
        return self._named(
            LoopConfig,
            rules=tuple(self.rule_names()),
            prompts=self.prompts or None,
            candidates=self.candidates or None,
            head=HeadConfig.parse(self.head),
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
