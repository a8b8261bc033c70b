"""The table of rules: the conformance suite tests every entry, and `jarm compare` offers it."""

from __future__ import annotations

import dataclasses
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
from jarm.acquisition.contrib import intervals as contrib_intervals
from jarm.acquisition.contrib import optimal_design as contrib_optimal_design
from jarm.acquisition.contrib import stochastic as contrib_stochastic
from jarm.acquisition.user_rules import rule_of_file
from jarm.core.base import Belief, HParams, PairSpace, Rule, Selection
from jarm.core.messages import choose
from jarm.core.settings import as_key
from jarm.core.signature import check_signature
from jarm.core.status import JarmError
from jarm.core.types import AnyKey

NEEDS = {
    "ensemble": "members that disagree",
    "labelled": "labelled pairs",
    "prior_weight": "a prior (`--prior-weight`, `--prior-mix`)",
    "beta": "width of intervals (`--beta`)",
    "temperature": "`--temperature`",
    "epsilon": "`--epsilon`",
    "key": "chance",
}
"""Inputs of a rule beside the features, rewards and candidate pairs: name -> words for `jarm rules`."""


def _of_any_key(rule: Rule) -> Rule:
    """The rule for keys of any kind and hyperparameters of any number type."""

    # Without `__wrapped__`, whose signature would be checked in the place of this one.
    def run(key: AnyKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
        return rule(as_key(key), hparams.as_float32(), belief, space, k)

    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(run, name, getattr(rule, name))
    return run


COSTS = "Costs: a batch of B from S pairs of N responses and P prompts, with F features and K members."


@dataclasses.dataclass(frozen=True)
class RuleEntry:
    """A rule, its cost and its inputs.

    Attributes:
      rule: the function.
      cost: order of the work of a batch of B from S pairs of N responses and P prompts, with F features and K members.
      needs: names of `NEEDS`.

    Example:
      >>> import jarm
      >>> entry = jarm.RULES["bald"]
      >>> entry.cost, entry.needs, entry.contrib
      ('S K', ('ensemble',), False)
      >>> entry.summary
      'Pairs whose label tells most about which member is right: the largest H(mean_m p_m) - mean_m H(p_m).'
    """

    rule: Rule
    cost: str
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", _of_any_key(self.rule))

    @property
    def contrib(self) -> bool:
        """Whether the rule stands in `jarm.acquisition.contrib`, outside the inclusion criteria of docs/rules.md."""
        return ".contrib." in self.rule.__module__

    @property
    def summary(self) -> str:
        """The first line of the rule's docstring."""
        return (self.rule.__doc__ or "").strip().partition("\n")[0]


RULES: dict[str, RuleEntry] = {
    "random": RuleEntry(uncertainty.random, "B", ("key",)),
    "then_random": RuleEntry(uncertainty.then_random, "B", ("key",)),
    "entropy": RuleEntry(uncertainty.entropy, "S"),
    "max_diff": RuleEntry(uncertainty.max_diff, "S"),
    "xtx": RuleEntry(optimal_design.xtx, "S F + N F^2"),
    "dopt": RuleEntry(optimal_design.dopt, "S F + N F^2"),
    "pa_dopt": RuleEntry(optimal_design.pa_dopt, "S F + N F^2", ("labelled",)),
    "greedy_dopt": RuleEntry(optimal_design.greedy_dopt, "passes (S F + N F^2)", ("labelled", "prior_weight")),
    "greedy_dopt_blind": RuleEntry(contrib_optimal_design.greedy_dopt_blind, "passes (S F + N F^2)", ("prior_weight",)),
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
        contrib_stochastic.softmax_dopt, "S F + N F^2", ("labelled", "prior_weight", "temperature", "key")
    ),
    "epsilon_greedy_dopt": RuleEntry(
        contrib_stochastic.epsilon_greedy_dopt, "passes (S F + N F^2)", ("labelled", "prior_weight", "epsilon", "key")
    ),
    "apo": RuleEntry(optimal_design.apo, "S F + N F^2", ("labelled", "prior_weight")),
    "greedy_apo": RuleEntry(optimal_design.greedy_apo, "passes (S F + N F^2)", ("labelled", "prior_weight")),
    "adpo": RuleEntry(contrib_optimal_design.adpo, "passes (S F + N F^2)", ("labelled", "prior_weight")),
    "a_opt": RuleEntry(optimal_design.a_opt, "passes (S F + N F^2)", ("labelled", "prior_weight")),
    "bait": RuleEntry(optimal_design.bait, "passes (S F + N F^2)", ("labelled", "prior_weight")),
    "v_opt": RuleEntry(optimal_design.v_opt, "passes (S F + N F^2) + B F^3", ("labelled", "prior_weight")),
    "k_centre": RuleEntry(diversity.k_centre, "(B + labels) (S + N F), S at most 10,000 unless listed", ("labelled",)),
    "kmeans_pp": RuleEntry(diversity.kmeans_pp, "(B + labels) (S + N F), S as above", ("labelled", "key")),
    "badge": RuleEntry(diversity.badge, "(B + labels) (S + N F), S as above", ("labelled", "key")),
    "lcmd": RuleEntry(diversity.lcmd, "(B + labels) (S + N F), S as above", ("labelled",)),
    "coreset": RuleEntry(coreset.coreset, "10 (S + N F), S as above", ("key",)),
    "infomax": RuleEntry(intervals.infomax, "S K", ("ensemble", "beta")),
    "infomax_marginal": RuleEntry(contrib_intervals.infomax_marginal, "S K", ("ensemble", "beta")),
    "delta_ucb": RuleEntry(intervals.delta_ucb, "S K", ("ensemble", "beta")),
    "delta_ucb_marginal": RuleEntry(contrib_intervals.delta_ucb_marginal, "S K", ("ensemble", "beta")),
    "delta_quantile": RuleEntry(intervals.delta_quantile, "S K", ("ensemble", "beta")),
    "delta_quantile_marginal": RuleEntry(contrib_intervals.delta_quantile_marginal, "S K", ("ensemble", "beta")),
    "max_min_lcb": RuleEntry(intervals.max_min_lcb, "S K + B N K", ("ensemble", "beta", "key")),
    "max_min_lcb_marginal": RuleEntry(
        contrib_intervals.max_min_lcb_marginal, "S K + B N K", ("ensemble", "beta", "key")
    ),
    "info_gain": RuleEntry(intervals.info_gain, "B N K", ("ensemble", "beta", "key")),
    "info_gain_marginal": RuleEntry(contrib_intervals.info_gain_marginal, "B N K", ("ensemble", "beta", "key")),
    "rucb": RuleEntry(intervals.rucb, "S K + B N K", ("ensemble", "beta", "key")),
    "rucb_marginal": RuleEntry(contrib_intervals.rucb_marginal, "S K + B N K", ("ensemble", "beta", "key")),
    "ids": RuleEntry(intervals.ids, "B N K", ("ensemble", "beta", "key")),
    "ids_marginal": RuleEntry(contrib_intervals.ids_marginal, "B N K", ("ensemble", "beta", "key")),
    "double_ts": RuleEntry(duels.double_ts, "B N K", ("ensemble", "key")),
    "eets": RuleEntry(duels.eets, "B N K", ("ensemble", "key")),
    "baits": RuleEntry(duels.baits, "B N K", ("ensemble", "key")),
    "drts": RuleEntry(duels.drts, "B N K", ("ensemble", "key")),
    "boltzmann": RuleEntry(duels.boltzmann, "B N", ("temperature", "key")),
    "pilaf": RuleEntry(duels.pilaf, "B N", ("temperature", "key")),
    "best_of_four": RuleEntry(duels.best_of_four, "B N", ("key",)),
}


def get_rule(name: str | Rule) -> Rule:
    """The rule of a name, or the function of a file: `my_rules.py:best_rule`; a function is a rule already.

    All rules have one signature, `(key, hparams, belief, space, k) -> Selection`.

    Args:
      name: a key of `RULES`, FILE.py:FUNCTION, or a function.

    Raises:
      JarmError: no such rule, and the message suggests the nearest name; or a function does not take the arguments of
        a rule.

    Example:
      Two of the six pairs of four responses in two prompts, by the smallest margin:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import jarm
      >>> features = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, 0.9]])  # [N, F]: 4 responses, 2 features
      >>> rewards = features.sum(axis=1)  # [N]
      >>> belief = jarm.Belief(
      ...     features=features,
      ...     rewards=rewards,
      ...     member_rewards=jnp.stack([rewards, 1.1 * rewards]),  # [K, N]: an ensemble of 2 heads
      ...     labelled_information=jnp.zeros((2, 2)),  # [F, F]: no pair is labelled yet
      ...     num_labelled=jnp.int32(0),
      ...     labelled_features=jnp.zeros((0, 2, 2)),  # [L, 2, F]
      ...     labelled_rewards=jnp.zeros((0, 2)),  # [L, 2]
      ... )
      >>> space = jarm.pair_space("all", 2, jnp.ones(4, bool))
      >>> rule = jax.jit(jarm.get_rule("entropy"), static_argnames="k")
      >>> batch = rule(jax.random.key(0), jarm.HParams(), belief, space, k=2)
      >>> batch.pairs.tolist(), [round(gain, 1) for gain in batch.gains.tolist()]
      ([[1, 3], [0, 3]], [-0.1, -0.9])
    """
    if not isinstance(name, str):
        check_signature(name, repr(getattr(name, "__name__", name)))
        return name
    check_name(name)
    if name in RULES:
        return RULES[name].rule
    path, _, function = name.rpartition(":")
    return rule_of_file(pathlib.Path(path), function)


def check_name(name: str) -> None:
    """Refuse what can be no rule: it is not in the table, and names no function of a file; no file is read.

    Raises:
      JarmError: as said; the message suggests the nearest name.
    """
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py") and function.isidentifier():
        return
    if name.endswith((".py", ".py:")):
        raise JarmError(f"{name!r} is a file and no rule: give FILE.py:FUNCTION.")
    choose("rule", name, RULES, "or FILE.py:FUNCTION")


def source_of(name: str) -> str | None:
    """The first 12 hexadecimal digits of the SHA-256 of a rule's file; None for a rule of jarm."""
    path = name.rpartition(":")[0]
    if name in RULES or not path.endswith(".py"):
        return None
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:12]


def needs_ensemble(name: str) -> bool:
    """Whether a rule of jarm needs two members that disagree."""
    return name in RULES and "ensemble" in RULES[name].needs
