"""The table of rules: what stands here is tested by the conformance suite and offered by `jarm compare`."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import pathlib

from jarm.acquisition import (
    batch_bald,
    coreset,
    diversity,
    duels,
    information,
    intervals,
    optimal_design,
    stochastic,
    uncertainty,
)
from jarm.acquisition.user_rules import _of_file
from jarm.core.base import Rule
from jarm.core.status import JarmError

NEEDS = {
    "ensemble": "members that disagree",
    "labelled": "labelled pairs",
    "prior_weight": "a prior (`--prior-weight`, `--prior-mix`)",
    "beta": "width of intervals (`--beta`)",
    "temperature": "`--temperature`",
    "epsilon": "`--epsilon`",
    "key": "chance",
}
"""What a rule may look at beside the features, rewards and pairs of the pool."""


COSTS = "Costs: a batch of B from S pairs of N responses and P prompts, with F features and K members."


@dataclasses.dataclass(frozen=True)
class RuleEntry:
    """A rule, its cost and what it looks at.

    Attributes:
      rule: the function.
      cost: order of the work of a batch of B from S pairs of N responses and P prompts, with F features and K members.
      needs: names of `NEEDS`.
    """

    rule: Rule
    cost: str
    needs: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The first line of the rule's docstring."""
        return (self.rule.__doc__ or "").strip().splitlines()[0]


RULES: dict[str, RuleEntry] = {
    "random": RuleEntry(uncertainty.random, "B", ("key",)),
    "entropy": RuleEntry(uncertainty.entropy, "S"),
    "max_diff": RuleEntry(uncertainty.max_diff, "S"),
    "xtx": RuleEntry(optimal_design.xtx, "S F + N F^2"),
    "dopt": RuleEntry(optimal_design.dopt, "S F + N F^2"),
    "pa_dopt": RuleEntry(optimal_design.pa_dopt, "S F + N F^2", ("labelled",)),
    "greedy_dopt": RuleEntry(optimal_design.greedy_dopt, "passes (S F + N F^2)", ("labelled", "prior_weight")),
    "greedy_dopt_blind": RuleEntry(optimal_design.greedy_dopt_blind, "passes (S F + N F^2)", ("prior_weight",)),
    "variance": RuleEntry(information.variance, "S K", ("ensemble",)),
    "variance_prob": RuleEntry(information.variance_prob, "S K", ("ensemble",)),
    "bald": RuleEntry(information.bald, "S K", ("ensemble",)),
    "batch_bald": RuleEntry(batch_bald.batch_bald, "S K + B S 2^min(B, 11) K", ("ensemble",)),
    "bal_pm": RuleEntry(batch_bald.bal_pm, "passes S K + (P + B) P F", ("ensemble", "labelled")),
    "power_bald": RuleEntry(stochastic.power_bald, "S K", ("ensemble", "temperature", "key")),
    "softmax_bald": RuleEntry(stochastic.softmax_bald, "S K", ("ensemble", "temperature", "key")),
    "bald_laplace": RuleEntry(information.bald_laplace, "S F + N F^2", ("labelled", "prior_weight")),
    "greedy_bald_laplace": RuleEntry(
        information.greedy_bald_laplace, "passes (S F + N F^2)", ("labelled", "prior_weight")
    ),
    "epig": RuleEntry(information.epig, "B (S F + N F^2)", ("labelled", "prior_weight", "key")),
    "eubo": RuleEntry(information.eubo, "S F + N F^2", ("labelled", "prior_weight")),
    "softmax_dopt": RuleEntry(
        stochastic.softmax_dopt, "S F + N F^2", ("labelled", "prior_weight", "temperature", "key")
    ),
    "epsilon_greedy_dopt": RuleEntry(
        stochastic.epsilon_greedy_dopt, "passes (S F + N F^2)", ("labelled", "prior_weight", "epsilon", "key")
    ),
    "apo": RuleEntry(optimal_design.apo, "S F + N F^2", ("labelled", "prior_weight")),
    "greedy_apo": RuleEntry(optimal_design.greedy_apo, "passes (S F + N F^2)", ("labelled", "prior_weight")),
    "adpo": RuleEntry(optimal_design.adpo, "passes (S F + N F^2)", ("labelled", "prior_weight")),
    "a_opt": RuleEntry(optimal_design.a_opt, "passes (S F + N F^2)", ("labelled", "prior_weight")),
    "bait": RuleEntry(optimal_design.bait, "passes (S F + N F^2)", ("labelled", "prior_weight")),
    "k_centre": RuleEntry(diversity.k_centre, "(B + labels) (S + N F), S at most 10,000 unless listed", ("labelled",)),
    "kmeans_pp": RuleEntry(diversity.kmeans_pp, "(B + labels) (S + N F), S as above", ("labelled", "key")),
    "badge": RuleEntry(diversity.badge, "(B + labels) (S + N F), S as above", ("labelled", "key")),
    "lcmd": RuleEntry(diversity.lcmd, "(B + labels) (S + N F), S as above", ("labelled",)),
    "coreset": RuleEntry(coreset.coreset, "10 (S + N F), S as above", ("key",)),
    "infomax": RuleEntry(intervals.infomax, "S K", ("ensemble", "beta")),
    "infomax_marginal": RuleEntry(intervals.infomax_marginal, "S K", ("ensemble", "beta")),
    "delta_ucb": RuleEntry(intervals.delta_ucb, "S K", ("ensemble", "beta")),
    "delta_ucb_marginal": RuleEntry(intervals.delta_ucb_marginal, "S K", ("ensemble", "beta")),
    "delta_quantile": RuleEntry(intervals.delta_quantile, "S K", ("ensemble", "beta")),
    "delta_quantile_marginal": RuleEntry(intervals.delta_quantile_marginal, "S K", ("ensemble", "beta")),
    "max_min_lcb": RuleEntry(intervals.max_min_lcb, "S K + B N K", ("ensemble", "beta", "key")),
    "max_min_lcb_marginal": RuleEntry(intervals.max_min_lcb_marginal, "S K + B N K", ("ensemble", "beta", "key")),
    "info_gain": RuleEntry(intervals.info_gain, "B N K", ("ensemble", "beta", "key")),
    "info_gain_marginal": RuleEntry(intervals.info_gain_marginal, "B N K", ("ensemble", "beta", "key")),
    "rucb": RuleEntry(intervals.rucb, "S K + B N K", ("ensemble", "beta", "key")),
    "rucb_marginal": RuleEntry(intervals.rucb_marginal, "S K + B N K", ("ensemble", "beta", "key")),
    "ids": RuleEntry(intervals.ids, "B N K", ("ensemble", "beta", "key")),
    "ids_marginal": RuleEntry(intervals.ids_marginal, "B N K", ("ensemble", "beta", "key")),
    "double_ts": RuleEntry(duels.double_ts, "B N K", ("ensemble", "key")),
    "eets": RuleEntry(duels.eets, "B N K", ("ensemble", "key")),
    "baits": RuleEntry(duels.baits, "B N K", ("ensemble", "key")),
    "drts": RuleEntry(duels.drts, "B N K", ("ensemble", "key")),
    "boltzmann": RuleEntry(duels.boltzmann, "B N", ("temperature", "key")),
    "pilaf": RuleEntry(duels.pilaf, "B N", ("temperature", "key")),
    "best_of_four": RuleEntry(duels.best_of_four, "B N", ("key",)),
}


def get_rule(name: str) -> Rule:
    """The rule of that name, or the function of a file: `my_rules.py:best_rule`.

    Raises:
      JarmError: there is none; the nearest name is given.
    """
    if name in RULES:
        return RULES[name].rule
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        return _of_file(pathlib.Path(path), function)
    if name.endswith(".py"):
        raise JarmError(f"{name!r} is a file and no rule: give FILE.py:FUNCTION.")
    near = difflib.get_close_matches(name, RULES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(RULES)}, or FILE.py:FUNCTION."
    raise JarmError(f"There is no rule {name!r}: {hint}")


def source_of(name: str) -> str | None:
    """Twelve digits that stand for the file of a rule, or None for a rule of jarm."""
    path = name.rpartition(":")[0]
    if name in RULES or not path.endswith(".py"):
        return None
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:12]


def needs_ensemble(name: str) -> bool:
    """Whether a rule means nothing without two members that disagree."""
    return name in RULES and "ensemble" in RULES[name].needs
