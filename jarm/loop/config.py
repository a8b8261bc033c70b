"""The shape of a run: everything that decides what is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jarm.acquisition.registry import check_name
from jarm.core.base import Rule
from jarm.core.checks import INT32, Check, between, check_fields, named, one_of, some_distinct
from jarm.core.status import JarmError
from jarm.design.spaces import KINDS
from jarm.evaluation.annotators import AnnotatorConfig
from jarm.reward.config import FitConfig, HeadConfig


def known_rules(name: str, rules: Any) -> None:
    """Check a list of rules: one at least, none twice, every name known; rules of a file are not looked up yet."""
    some_distinct(name, rules)
    for rule in rules:
        if isinstance(rule, str):
            check_name(rule)


FIRST = {"random": "random", "d_opt": "greedy_dopt", "v_opt": "v_opt"}
"""Value of `LoopConfig.first` -> the rule that chooses the first batch."""
LOOP_CHECKS: Mapping[str, Check] = {
    "rules": known_rules,
    "pairs": named("pair space", KINDS),
    "first": one_of(*FIRST),
    "rounds": between(0, INT32),
    **dict.fromkeys(("batch", "initial", "prompts", "candidates", "per_prompt"), between(1, INT32)),
}
"""Field of `LoopConfig` -> the check of its values."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The shape of a run: everything that decides what is compiled.

    Attributes:
      rules: acquisition rules that may run, by name or as functions. A traced index says which one does, so that all
        are compiled together and the rest of the loop once.
      pairs: kind of the pair space: `within`, `cross` or `all`.
      rounds: T, batches labelled after the initial one.
      batch: B, pairs labelled per round.
      initial: pairs labelled before the first round.
      first: how they are chosen: `random`; or, without any label, `d_opt` or `v_opt`: by `greedy_dopt` or `v_opt` for a
        linear head of weights 0 with the prior of a laplace head. Those of the rule `random` are drawn all the same.
      per_prompt: largest number of pairs with a response of any one prompt in a batch of a greedy rule; None for no
        limit. A first batch that is chosen has the smallest that leaves a choice, by default: 1, where prompts suffice.
      prompts: prompts drawn per round to form the space, or None for all of them.
      candidates: candidate pairs drawn per round from the space, or None for all of them.
      head: the reward head.
      fit: how the head is fitted.
      annotator: who answers.
      warm_start: whether the fit of a round starts from the parameters of the round before.
      noise_free: whether `run` ends with a noise-free refit: the last fit once more, to the same pairs, each with the
        annotator's probability to prefer its first response as its label.

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
    first: str = "random"
    per_prompt: int | None = None
    prompts: int | None = None
    candidates: int | None = None
    head: HeadConfig = HeadConfig(hidden=(), laplace=True)
    fit: FitConfig = FitConfig()
    annotator: AnnotatorConfig = AnnotatorConfig()
    warm_start: bool = False
    noise_free: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rules, str):
            raise JarmError(f"LoopConfig(rules={self.rules!r}) is a text: give a tuple of rules, such as ('random',).")
        if isinstance(self.head, str):
            raise JarmError(f"LoopConfig(head={self.head!r}) is a text: give HeadConfig.parse({self.head!r}).")
        check_fields(self, LOOP_CHECKS)
        between(1, INT32)("The number of labels, initial + rounds x batch,", self.budget)
        if self.fit.evidence and not self.head.laplace:
            raise JarmError(
                f"FitConfig.evidence (`--evidence`) chooses the prior of a laplace head, and the head is {self.head}: "
                "take HeadConfig.parse('laplace') (`--head laplace`), or leave it out."
            )
        largest = self.batch if self.first == "random" else max(self.batch, self.initial)
        if self.candidates is not None and self.candidates < largest:
            raise JarmError(
                f"{self.candidates} candidate pairs cannot fill a batch of {largest}: draw more candidates or label "
                "fewer pairs."
            )

    @property
    def budget(self) -> int:
        """Labels in all, the initial ones included."""
        return self.initial + self.rounds * self.batch
