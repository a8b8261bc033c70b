"""The table of rules: what stands here is tested by the conformance suite and offered by `jarm compare`."""

from __future__ import annotations

import dataclasses
import difflib

from jarm.acquisition import optimal_design, uncertainty
from jarm.base import JarmError, Rule


@dataclasses.dataclass(frozen=True)
class RuleEntry:
    """A rule, its cost and what it looks at.

    Attributes:
      rule: the function.
      cost: order of the work of one batch of B from S pairs of n responses with F features.
      past: whether it looks at the pairs labelled so far.
      prior: whether it uses `hparams.prior` and `hparams.prior_mix`.
    """

    rule: Rule
    cost: str
    past: bool = False
    prior: bool = False

    @property
    def summary(self) -> str:
        """The first line of the rule's docstring."""
        return (self.rule.__doc__ or "").strip().splitlines()[0]


RULES: dict[str, RuleEntry] = {
    "random": RuleEntry(uncertainty.random, "B"),
    "entropy": RuleEntry(uncertainty.entropy, "S"),
    "max_diff": RuleEntry(uncertainty.max_diff, "S"),
    "xtx": RuleEntry(optimal_design.xtx, "S F + n F^2"),
    "dopt": RuleEntry(optimal_design.dopt, "S F + n F^2"),
    "pa_dopt": RuleEntry(optimal_design.pa_dopt, "S F + n F^2", past=True),
    "greedy_dopt": RuleEntry(optimal_design.greedy_dopt, "passes (S F + n F^2)", past=True, prior=True),
    "greedy_dopt_blind": RuleEntry(optimal_design.greedy_dopt_blind, "passes (S F + n F^2)", prior=True),
}


def get_rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
      JarmError: there is none; the nearest name is given.
    """
    if name in RULES:
        return RULES[name].rule
    near = difflib.get_close_matches(name, RULES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(RULES)}."
    raise JarmError(f"There is no rule {name!r}: {hint}")
