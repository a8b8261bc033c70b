"""Checks of the batch that a rule returned."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jarm.core.base import PairSpace, Selection
from jarm.core.settings import narrowed
from jarm.core.status import JarmError, Status, worst
from jarm.design.spaces import is_in, pair_count


def check_selection(selection: Any, space: PairSpace, k: int, name: str) -> Selection:
    """The same batch with its weights and, where the rule is broken, another status.

    Args:
      selection: the value that the rule returned.
      space: which pairs.
      k: pairs asked for.
      name: of the rule, for messages.

    Returns:
      The batch. Status BROKEN_RULE where a pair is missing, repeated or not in the space; BROKEN_SCORES where a gain
      is not finite or a weight not positive; a failure that the rule itself reports stays.

    Raises:
      JarmError: shapes or types are not those of `Selection`; the rule is named.
    """
    expected = {
        "pairs": ((k, 2), "int32"),
        "gains": ((k,), "float32"),
        "valid": ((k,), "bool"),
        "status": ((), "int32"),
    }
    if not isinstance(selection, Selection):
        raise JarmError(f"Rule {name!r} returned {type(selection).__name__}: return a jarm.Selection.")
    if selection.weights is None:
        selection = dataclasses.replace(selection, weights=jnp.ones(k, jnp.float32))
    selection = narrowed(selection)
    expected["weights"] = expected["gains"]
    for field, (shape, dtype) in expected.items():
        try:
            leaf = jnp.asarray(getattr(selection, field))
        except (TypeError, ValueError):
            kind = type(getattr(selection, field)).__name__
            raise JarmError(
                f"Rule {name!r} returned {field} as a {kind}: return an array of {list(shape)} and {dtype}."
            ) from None
        selection = dataclasses.replace(selection, **{field: leaf})
        if (leaf.shape, leaf.dtype.name) != (shape, dtype):
            raise JarmError(
                f"Rule {name!r} returned {field} of shape {list(leaf.shape)} and type {leaf.dtype.name}: return "
                f"{list(shape)} and {dtype}."
            )
    size, valid = space.eligible.shape[0], selection.valid
    pairs = jnp.where(valid[:, None], selection.pairs, size)
    first, second = jax.lax.sort((pairs[:, 0], pairs[:, 1]), num_keys=2)
    repeated = ((first[1:] == first[:-1]) & (second[1:] == second[:-1]) & (first[1:] < size)).any()
    # A short batch, or one with holes, would give its rule fewer labels than the others.
    missing = (valid[1:] & ~valid[:-1]).any() | (valid.sum(dtype=jnp.float32) < jnp.minimum(pair_count(space), k))
    broken = repeated | missing | (valid & ~is_in(space, selection.pairs)).any()
    weighted = (selection.weights > 0) & jnp.isfinite(selection.weights)
    broken_scores = (valid & ~(jnp.isfinite(selection.gains) & weighted)).any()
    found = worst(
        jnp.where(broken, jnp.int32(Status.BROKEN_RULE), jnp.int32(Status.OK)),
        jnp.where(broken_scores, jnp.int32(Status.BROKEN_SCORES), jnp.int32(Status.OK)),
    )
    reported = (selection.status != Status.OK) & (selection.status != Status.EXHAUSTED)
    status = jnp.where(reported, selection.status, worst(selection.status, found))
    return dataclasses.replace(selection, status=status)
