"""Settings of reward heads and of their fits."""

from __future__ import annotations

import dataclasses

from jarm.core.base import RewardHead
from jarm.core.status import JarmError
from jarm.reward.heads import linear_head, mlp_head


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """The static part of a fit; numbers that can be swept are in `HParams`.

    An MLP is stopped early. Heads train side by side, each without its own part of the labelled pairs, until the mean
    loss of all that they hold out stops falling. With one fold these heads are the members, as they were at the best
    look. With more they only find the number of steps, which fresh members then take on all pairs. For a single head
    `folds=2, holdout=0.5` is better than the default, since 50 labels are too few to stop on a fifth of them
    (`benchmarks/README.md` has both).

    Attributes:
      loss: `bradley_terry` of pairs, or `classification` of each response by itself.
      members: K, heads in the ensemble.
      ensemble: how members differ: `init` (keys of their own), `bootstrap` (and Poisson(1) weights of the pairs), or
        `auto`: the former, but the latter for linear heads, whose fit has one answer.
      steps: most steps of Adam.
      holdout: share of the labelled pairs in a part, rounded to one in a whole number; 0 takes all `steps`.
      folds: number of parts held out to find the number of steps; or 1: member k holds out part k, and is kept.
      check_every: steps between two looks at the held-out pairs.
      patience: looks without a lower held-out loss before stopping.
      batch_size: pairs a step, drawn with replacement in proportion to their weight; None takes all pairs every step.
      newton_steps: most Newton steps of a linear head.
      batching: heads by `vmap`, one by one by `map`, or `auto`: as measured to be faster on the backend.
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
    batching: str = "auto"

    def __post_init__(self) -> None:
        choices = {
            "loss": ("bradley_terry", "classification"),
            "ensemble": ("auto", "init", "bootstrap"),
            "batching": ("auto", "vmap", "map"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise JarmError(f"FitConfig.{name} is '{getattr(self, name)}': choose one of {', '.join(allowed)}.")
        for name in ("members", "steps", "folds", "check_every", "patience", "newton_steps"):
            if getattr(self, name) < 1:
                raise JarmError(f"FitConfig.{name} is {getattr(self, name)}: give 1 or more.")
        if self.batch_size is not None and self.batch_size < 1:
            raise JarmError(f"FitConfig.batch_size is {self.batch_size}: give 1 or more, or None for all pairs.")
        if not 0.0 <= self.holdout <= 0.5:
            raise JarmError(f"FitConfig.holdout is {self.holdout}: give a share between 0 and 0.5.")
        if self.holdout and self.folds > self.parts:
            raise JarmError(
                f"FitConfig.folds is {self.folds}, but there are only {self.parts} parts of {self.holdout} of the "
                f"pairs: set it to {self.parts} or less."
            )

    @property
    def parts(self) -> int:
        """Parts that the pairs are dealt into, of which `folds` are held out."""
        return round(1 / self.holdout) if self.holdout else 1


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """A head in words, for the command line and for records: no hidden layer means linear."""

    hidden: tuple[int, ...] = (64, 64, 64)
    activation: str = "gelu"

    @classmethod
    def parse(cls, text: str) -> HeadConfig:
        """Read `linear`, `mlp`, `mlp:64,64,64` or `mlp:64,64:relu`; `str` of a config gives such a text back."""
        kind, _, rest = text.partition(":")
        if kind == "linear" and not rest:
            return cls(hidden=())
        sizes, _, activation = rest.partition(":")
        try:
            hidden = tuple(int(size) for size in sizes.split(",")) if sizes else cls.hidden
        except ValueError:
            hidden = ()
        if kind != "mlp" or not hidden:
            raise JarmError(f"Cannot read the head '{text}': write 'linear' or, for example, 'mlp:64,64,64'.")
        config = cls(hidden=hidden, activation=activation or cls.activation)
        config.head()
        return config

    def __str__(self) -> str:
        if not self.hidden:
            return "linear"
        return f"mlp:{','.join(map(str, self.hidden))}:{self.activation}"

    def head(self) -> RewardHead:
        """The head itself."""
        return mlp_head(self.hidden, self.activation) if self.hidden else linear_head()
