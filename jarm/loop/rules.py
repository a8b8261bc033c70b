"""The rules of a loop: found by name, switched over by a traced index, and checked in what they return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jarm.acquisition.check import check_selection
from jarm.acquisition.registry import RULES, get_rule, needs_ensemble
from jarm.core.base import Belief, HParams, PairSpace, Rule, Selection
from jarm.core.signature import check_signature
from jarm.core.status import JarmError, Status, worst
from jarm.core.types import Array, PRNGKey
from jarm.loop.config import LoopConfig


def find_rules(config: LoopConfig) -> tuple[Rule, ...]:
    """The functions that `config.rules` names.

    Raises:
      JarmError: there is no such rule, its arguments are not those of a rule, or it needs an ensemble and there is one
        head.
    """
    rules = tuple(get_rule(rule) if isinstance(rule, str) else rule for rule in config.rules)
    for name in config.rules:
        if not isinstance(name, str):
            check_signature(name, repr(getattr(name, "__name__", name)))
        if config.fit.members < 2 and isinstance(name, str) and needs_ensemble(name):
            raise JarmError(
                f"Rule {name!r} looks at how members differ, and there is one: use two or more (`--members`)."
            )
    return rules


def pick(
    config: LoopConfig,
    rules: tuple[Rule, ...],
    key: PRNGKey,
    hparams: HParams,
    belief: Belief,
    space: PairSpace,
    rule: int | Array,
) -> Selection:
    """The batch of one of the rules, checked.

    Args:
      config: of the loop; its `rules` are the names, its `batch` is the number of pairs.
      rules: the functions, as `find_rules` returns them.
      key: chance of the rule.
      hparams, belief, space: what the rule reads.
      rule: index into `rules`, may be traced.

    Returns:
      The batch, with its weights; `NO_RULE` where the index is none of them.
    """

    def branch(one: Rule, given: str | Rule) -> Callable[..., Selection]:
        name = given if isinstance(given, str) else getattr(given, "__name__", repr(given))

        def checked(key: PRNGKey, belief: Belief, space: PairSpace) -> Selection:
            found = check_selection(one(key, hparams, belief, space, config.batch), space, config.batch, name)
            return found if given in RULES else _blame(found, belief)

        return checked

    branches = [branch(*each) for each in zip(rules, config.rules, strict=True)]
    selection = jax.lax.switch(rule, branches, key, belief, space)
    known = (jnp.asarray(rule) >= 0) & (jnp.asarray(rule) < len(rules))
    status = worst(selection.status, jnp.where(known, jnp.int32(Status.OK), jnp.int32(Status.NO_RULE)))
    return dataclasses.replace(selection, status=status)


def _blame(selection: Selection, belief: Belief) -> Selection:
    """Of a user's rule: NONFINITE becomes BROKEN_SCORES where the belief was finite."""
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(belief)]).all()
    own = finite & (selection.status == Status.NONFINITE)
    return dataclasses.replace(selection, status=jnp.where(own, jnp.int32(Status.BROKEN_SCORES), selection.status))
