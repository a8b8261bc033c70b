"""The arguments of a rule: refused where a function does not take them in their order."""

from __future__ import annotations

import inspect
from typing import Any

from jarm.core.base import Belief, HParams, PairSpace, Rule, Selection
from jarm.core.status import JarmError
from jarm.core.types import PRNGKey

ARGUMENTS = ("key", "hparams", "belief", "space", "k")
"""Arguments of a rule."""
_ORDER = f"({', '.join(ARGUMENTS)})"


def check_signature(rule: Any, name: str) -> None:
    """Refuse what is no function of the arguments of a rule, in their order.

    Raises:
      JarmError: it is no function, has the order of earlier versions, or does not take five arguments.

    Example:
      >>> check_signature(lambda key, belief, space, k, hparams: None, "'mine'")
      Traceback (most recent call last):
      jarm.core.status.JarmError: Rule 'mine' takes `belief` too early: the order is (key, hparams, belief, space, k).
    """
    if not callable(rule):
        raise JarmError(f"{name} is a {type(rule).__name__}: give a rule by name or as a function of {_ORDER}.")
    try:
        signature = inspect.signature(rule)
    except (TypeError, ValueError):  # Python does not know the arguments
        return
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [each.name for each in signature.parameters.values() if each.kind in kinds]
    moved = [each for each, due in zip(names, ARGUMENTS, strict=False) if each in ARGUMENTS and each != due]
    if moved:
        early = names.index(moved[0]) < ARGUMENTS.index(moved[0])
        raise JarmError(f"Rule {name} takes `{moved[0]}` too {'early' if early else 'late'}: the order is {_ORDER}.")
    try:
        signature.bind(*ARGUMENTS)
    except TypeError:
        raise JarmError(
            f"Rule {name} takes {len(names)} arguments, ({', '.join(names)}), and a rule is called with {_ORDER}."
        ) from None


def with_named_k(rule: Rule) -> Rule:
    """The rule, of which the number of pairs may be given by name."""
    try:
        inspect.signature(rule).bind(*ARGUMENTS[:4], k=1)
    except TypeError:

        def named(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
            return rule(key, hparams, belief, space, k)

        return named
    except ValueError:  # Python does not know the arguments
        pass
    return rule
