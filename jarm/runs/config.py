"""Settings of comparisons: the options of `jarm compare`."""

from __future__ import annotations

import dataclasses
import pathlib

from jarm.acquisition.registry import RULES as ALL_RULES
from jarm.acquisition.registry import get_rule
from jarm.core.base import HParams
from jarm.core.status import JarmError
from jarm.evaluation.annotators import AnnotatorConfig
from jarm.loop.config import LoopConfig
from jarm.reward.config import FitConfig, HeadConfig

RULES = "random,entropy,max_diff,xtx,dopt,pa_dopt,greedy_dopt"


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Settings of a comparison; the defaults finish in a minute or two on two cores.

    Attributes:
      data: "synthetic" (built in), "synthetic:outliers" (a variant where active selection does not help), a Parquet or
        JSONL table of responses, or a folder in the layout embd_{gen}_{emb}_{task}_{split}.npy.
      embeddings: .npy array with one row for each row of the table, or a store that has its texts.
      standardise: give every dimension of the embeddings mean 0 and variance 1 over the training responses.
      target: column of the table that holds the gold reward.
      gen: for a folder that holds several settings, the generating model, as in its file names.
      emb: likewise, the embedding model.
      task: likewise, the task.
      out: folder for records.jsonl, summary.json, summary.md, curves.png and curves.svg.
      rules: acquisition rules, separated by commas; `jarm rules` lists them, "all" takes every one, FILE.py:FUNCTION is
        one of yours. "random" is always run.
      pairs: which pairs may be asked about: "within" prompts, "cross" (across prompts) or "all".
      rounds: batches labelled after the first random labels.
      batch: pairs labelled per round.
      initial: random pairs labelled before the first round.
      seeds: how many seeds; each fixes the first labels, the candidates and the annotator.
      candidates: candidate pairs drawn at random each round; 0 considers every pair.
      prompts: prompts drawn at random each round; 0 considers every prompt.
      noise: beta of the annotator, P(first preferred) = sigmoid(beta * gold difference / standard deviation);
        negative for no noise.
      flip_rate: solve for the noise at which random pairs are answered wrongly this often, such as 0.25.
      annotator: "bradley_terry", "perfect", or "flip" (wrong with probability flip_rate whatever the pair).
      gold_scale: what gold differences are divided by: "std" of all gold rewards, or a number.
      length_bias: liking of the annotator for longer responses, in logits a standard deviation of length.
      head: reward head: "linear", or "mlp:64,64,64" for an MLP with these hidden layers.
      members: heads in the ensemble.
      ensemble: how members differ: "init" (where they start), "bootstrap" (also weights of the labels), or "auto" (the
        latter for linear heads, whose fit has one answer).
      loss: "bradley_terry" of pairs, or "classification" of each response by itself.
      warm_start: start each round's fit from the last round's heads, which have seen the labels it then holds out.
      steps: most Adam steps of a fit.
      batch_size: labelled pairs an Adam step looks at; 0 takes all.
      holdout: share of the labels that a member holds out, its own, to stop early; 0 takes all steps.
      folds: how many such parts are held out in turn to find when to stop, before a fit to all labels; 1 keeps the
        best head seen.
      learning_rate: of Adam.
      weight_decay: of Adam, decoupled.
      ridge: L2 penalty of a linear head.
      label_smoothing: share by which labels are drawn towards 1/2 in training.
      prior_weight: c, weight of the prior of greedy_dopt, in units of what as many average pairs would tell.
      prior_mix: rho, shape of that prior: 0 a ridge, 1 the information of the pool.
      beta: half-width of the intervals of interval rules, in standard deviations over the ensemble.
      temperature: of rules that draw their batch; 0 takes the best.
      epsilon: share of a mixed batch that is drawn at random.
      best_of: sizes N of best-of-N, separated by commas; "auto": 5, 10, 30, ... up to what 90 % of test prompts have.
      workers: runs at a time; 0 takes one a core on a CPU, else 1.
      vmap_runs: runs that a call maps over by vmap; 0 takes 1 on a CPU, where more are slower, else 16.
    """

    data: str = "synthetic"
    embeddings: str | None = None
    standardise: bool = True
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
    candidates: int = 5000
    prompts: int = 0
    noise: float = 2.0
    flip_rate: float | None = None
    annotator: str = "bradley_terry"
    gold_scale: str = "std"
    length_bias: float = 0.0
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", pathlib.Path(self.out))  # in Python, where a text will do

    def rule_names(self) -> list[str]:
        """The rules in the order given, each once, `random` first."""
        rules = ",".join(ALL_RULES) if self.rules == "all" else self.rules
        names = ["random", *(name.strip() for name in rules.split(",") if name.strip())]
        for name in names:
            get_rule(name)
        return list(dict.fromkeys(names))

    def sizes(self) -> tuple[int, ...] | None:
        """The sizes of best-of-N, or None for those that suit the table."""
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
        return LoopConfig(
            rules=tuple(self.rule_names()),
            pairs=self.pairs,
            rounds=self.rounds,
            batch=self.batch,
            initial=self.initial,
            prompts=self.prompts or None,
            candidates=self.candidates or None,
            head=HeadConfig.parse(self.head),
            fit=FitConfig(
                loss=self.loss,
                members=self.members,
                ensemble=self.ensemble,
                steps=self.steps,
                holdout=self.holdout,
                folds=self.folds,
                batch_size=self.batch_size or None,
            ),
            annotator=AnnotatorConfig(self.annotator, scale, self.flip_rate, self.length_bias),
            warm_start=self.warm_start,
        )

    def hparams(self) -> HParams:
        """The traced numbers."""
        return HParams(**{field.name: getattr(self, field.name) for field in dataclasses.fields(HParams)})


SOURCE = ("embeddings", "target", "gen", "emb", "task", "standardise")
"""Options that say which data, beside `data`."""


FREE = ("rules", "seeds", "out", "workers", "vmap_runs")
"""Options that may differ between two commands that fill the same folder."""
