"""Settings of reward heads and of their fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jarm.core.base import RewardHead
from jarm.core.checks import INT32, Check, between, check_fields, one_of
from jarm.core.status import JarmError
from jarm.reward.heads import ACTIVATIONS, laplace_head, linear_head, mlp_head

FIT_CHECKS: Mapping[str, Check] = {
    "loss": one_of("bradley_terry", "classification"),
    "ensemble": one_of("auto", "init", "bootstrap"),
    "batching": one_of("auto", "vmap", "map"),
    "holdout": between(0, 0.5),
    **dict.fromkeys(
        ("members", "steps", "folds", "check_every", "patience", "batch_size", "newton_steps"), between(1, INT32)
    ),
}
"""Field of `FitConfig` -> the check of its values."""


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """The static part of a fit; numbers that can be swept are in `HParams`.

    MLP heads use early stopping: each head holds out its own part of the labelled pairs, and all stop when the mean
    held-out loss stops falling. `folds=1` keeps the heads of the best check as members. More folds only choose the
    number of steps, and fresh members take as many on all pairs. For a single head `folds=2, holdout=0.5` is better
    than the default, since 50 labels are too few to stop on a fifth of them (`benchmarks/README.md` has both).

    Attributes:
      loss: `bradley_terry` of pairs, or `classification` of each response by itself.
      members: K, heads in the ensemble.
      ensemble: how members differ: `init` (where they start), `bootstrap` (also Poisson(1) weights of the pairs), or
        `auto`: `bootstrap` for linear heads, whose fit has one answer, draws of the posterior for laplace heads, else
        `init`.
      steps: maximum number of Adam steps.
      holdout: share of the labelled pairs that a head holds out, rounded to 1/2, 1/3, 1/4, ...; 0 takes all `steps`.
      folds: with 1, head k holds out part k, and the heads of the best check are kept. With more, as many parts are
        held out to find the number of steps, which fresh heads then take on all pairs.
      check_every: steps between two checks of the held-out loss.
      patience: checks without a lower held-out loss before stopping.
      batch_size: pairs per step, drawn with replacement in proportion to their weight; None takes all pairs.
      newton_steps: maximum number of Newton steps of a linear or laplace head.
      evidence: whether each fit of a laplace head chooses its prior variance by the evidence of the labels, among
        `HParams.prior_variance` times 1/10, .3, 1, 3, 10, 30 and 100.
      batching: members together by `vmap`, one after the other by `map`, or `auto`: the faster one on the backend.

    Example:
      >>> import jarm
      >>> jarm.FitConfig(holdout=0.2).parts  # parts that the labelled pairs are dealt into
      5
      >>> jarm.FitConfig(loss="hinge")
      Traceback (most recent call last):
      jarm.core.status.JarmError: FitConfig.loss is 'hinge': choose one of bradley_terry, classification.
    """

    loss: str = "bradley_terry"
    members: int = 4
    ensemble: str = "auto"
    steps: int = 1000
    holdout: float = 0.2
    folds: int = 1
    check_every: int = 5
    patience: int = 5
    batch_size: int | None = None
    newton_steps: int = 60
    evidence: bool = False
    batching: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self, FIT_CHECKS, "FitConfig.{}")
        if self.holdout and self.folds > self.parts:
            raise JarmError(
                f"FitConfig.folds is {self.folds}, but there are only {self.parts} parts of {self.holdout} of the "
                f"pairs: set it to {self.parts} or less."
            )

    @property
    def parts(self) -> int:
        """Parts that the labelled pairs are dealt into."""
        return round(1 / self.holdout) if self.holdout else 1


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """A reward head in words, for the command line and for records.

    Attributes:
      hidden: widths of the hidden layers; none makes the head linear.
      activation: `gelu`, `gelu_tanh`, `relu`, `silu` or `tanh`.
      laplace: whether a linear head has a Gaussian prior, and a Laplace posterior of which its members are draws.

    Example:
      >>> import jarm
      >>> jarm.HeadConfig.parse("mlp:64,32")
      HeadConfig(hidden=(64, 32), activation='gelu', laplace=False)
      >>> jarm.HeadConfig.parse("laplace")
      HeadConfig(hidden=(), activation='gelu', laplace=True)
      >>> str(jarm.HeadConfig(hidden=()))
      'linear'
    """

    hidden: tuple[int, ...] = (64, 64, 64)
    activation: str = "gelu"
    laplace: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.hidden, str):
            raise JarmError(f"HeadConfig({self.hidden!r}) is a text: give HeadConfig.parse({self.hidden!r}).")
        check_fields(self, {"activation": one_of(*ACTIVATIONS)}, "HeadConfig.{}")
        for at, width in enumerate(self.hidden):
            between(1, INT32)(f"HeadConfig.hidden[{at}]", width)
        if self.laplace and self.hidden:
            raise JarmError(f"HeadConfig.hidden is {self.hidden}, and a laplace head has no hidden layers: give ().")

    @classmethod
    def parse(cls, text: str) -> HeadConfig:
        """Read `linear`, `laplace`, `mlp`, `mlp:64,64,64` or `mlp:64,64:relu`; `str` of a config writes such a text.

        Raises:
          JarmError: the text is none of these, or names an unknown activation.
        """
        kind, colon, rest = text.partition(":")
        if kind in ("linear", "laplace") and not rest:
            return cls(hidden=(), laplace=kind == "laplace")
        sizes, _, activation = rest.partition(":")
        try:
            hidden = tuple(int(size) for size in sizes.split(",")) if colon else cls.hidden
        except ValueError:
            hidden = ()
        if kind != "mlp" or not hidden:
            raise JarmError(f"Cannot read the head '{text}': write 'linear', 'laplace' or, say, 'mlp:64,64,64'.")
        return cls(hidden=hidden, activation=activation or cls.activation)

    def __str__(self) -> str:
        if not self.hidden:
            return "laplace" if self.laplace else "linear"
        return f"mlp:{','.join(map(str, self.hidden))}:{self.activation}"

    def head(self) -> RewardHead:
        """The functions of the head."""
        if self.laplace:
            return laplace_head()
        return mlp_head(self.hidden, self.activation) if self.hidden else linear_head()


_READ = {
    "ridge": ("linear",),
    "prior_variance": ("laplace",),
    **dict.fromkeys(("prior_weight", "prior_mix"), ("linear", "mlp")),
    **dict.fromkeys(("learning_rate", "weight_decay", "steps", "batch_size", "holdout", "folds"), ("mlp",)),
}
"""Option -> kinds of heads whose fit, or whose rules, read it: rules take the prior of a laplace head."""


def unread(config: Any) -> str:
    """Options that were changed and that the head does not read, in a sentence; empty where there are none.

    Args:
      config: a dataclass of options, `head` among them.

    Example:
      >>> from jarm import TrainConfig
      >>> unread(TrainConfig("pairs.parquet", "out/embeddings", ridge=2.0))
      'A laplace head does not read `ridge`, which changes nothing.'
    """
    head = HeadConfig.parse(config.head)
    kind = "laplace" if head.laplace else "mlp" if head.hidden else "linear"
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    names = [
        f"`{name}`"
        for name, kinds in _READ.items()
        if kind not in kinds and name in defaults and getattr(config, name) != defaults[name]
    ]
    return f"A {kind} head does not read {' and '.join(names)}, which changes nothing." if names else ""
