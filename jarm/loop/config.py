"""The shape of a run: everything that decides what is compiled."""

from __future__ import annotations

import dataclasses

from jarm.core.base import Rule
from jarm.core.messages import choose
from jarm.core.status import JarmError
from jarm.design.spaces import KINDS
from jarm.evaluation.annotators import AnnotatorConfig
from jarm.reward.config import FitConfig, HeadConfig


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The shape of a run: everything that decides what is compiled.

    Attributes:
      rules: acquisition rules that may run, by name or as functions. A traced index says which one does, so that all
        are compiled together and the rest of the loop once.
      pairs: kind of the pair space: `within`, `cross` or `all`.
      rounds: T, batches labelled after the initial one.
      batch: B, pairs labelled per round.
      initial: random pairs labelled before the first round.
      prompts: prompts drawn per round to form the space, or None for all of them.
      candidates: candidate pairs drawn per round from the space, or None for all of them.
      head: the reward head.
      fit: how the head is fitted.
      annotator: who answers.
      warm_start: whether the fit of a round starts from the parameters of the round before.

    Example:
      >>> import jarm
      >>> jarm.LoopConfig(rules=("random", "dopt"), rounds=8, batch=50, initial=50).budget  # labels of each run
      450
      >>> jarm.LoopConfig(batch=9, candidates=5)
      Traceback (most recent call last):
      jarm.core.status.JarmError: 5 candidate pairs cannot fill a batch of 9: draw more candidates or label fewer pairs.
    """

    rules: tuple[str | Rule, ...] = ("greedy_dopt",)
    pairs: str = "within"
    rounds: int = 8
    batch: int = 50
    initial: int = 50
    prompts: int | None = None
    candidates: int | None = None
    head: HeadConfig = HeadConfig()
    fit: FitConfig = FitConfig()
    annotator: AnnotatorConfig = AnnotatorConfig()
    warm_start: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rules, str):
            raise JarmError(f"LoopConfig(rules={self.rules!r}) is a text: give a tuple of rules, such as ('random',).")
        if isinstance(self.head, str):
            raise JarmError(f"LoopConfig(head={self.head!r}) is a text: give HeadConfig.parse({self.head!r}).")
        choose("pair space", self.pairs, KINDS)
        for name, low in (("rounds", 0), ("batch", 1), ("initial", 1), ("prompts", 1), ("candidates", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise JarmError(f"`{name}` is {value}: give at least {low}.")
        if self.candidates is not None and self.candidates < self.batch:
            raise JarmError(
                f"{self.candidates} candidate pairs cannot fill a batch of {self.batch}: draw more candidates or label "
                "fewer pairs."
            )

    @property
    def budget(self) -> int:
        """Labels in all, the initial ones included."""
        return self.initial + self.rounds * self.batch
