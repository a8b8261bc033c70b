"""Checks of the batch that a rule returned."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jarm.core.base import PairSpace, Selection
from jarm.core.status import JarmError, Status, worst
from jarm.design.spaces import is_in, pair_count


def check_selection(selection: Any, space: PairSpace, k: int, name: str) -> Selection:
    """The same batch with its weights; BROKEN_RULE where it is not one: too few pairs, one twice or not of the space;
    BROKEN_SCORES where a gain is not finite or a weight not positive.

    Raises:
      JarmError: shapes or types are not those of `Selection`; the rule is named.
    """
    wanted = {"pairs": ((k, 2), "int32"), "gains": ((k,), "float32"), "valid": ((k,), "bool"), "status": ((), "int32")}
    if not isinstance(selection, Selection):
        raise JarmError(f"Rule {name!r} returned {type(selection).__name__}: return a jarm.Selection.")
    if selection.weights is None:
        selection = dataclasses.replace(selection, weights=jnp.ones(k, jnp.float32))
    wanted["weights"] = wanted["gains"]
    for field, (shape, dtype) in wanted.items():
        leaf = jnp.asarray(getattr(selection, field))
        if (leaf.shape, leaf.dtype.name) != (shape, dtype):
            raise JarmError(
                f"Rule {name!r} returned {field} of shape {list(leaf.shape)} and type {leaf.dtype.name}: return "
                f"{list(shape)} and {dtype}."
            )
    size, valid = space.eligible.shape[0], selection.valid
    pairs = jnp.where(valid[:, None], selection.pairs, size)
    first, second = jax.lax.sort((pairs[:, 0], pairs[:, 1]), num_keys=2)
    twice = ((first[1:] == first[:-1]) & (second[1:] == second[:-1]) & (first[1:] < size)).any()
    broken = twice | (valid & ~is_in(space, selection.pairs)).any()
    weighty = (selection.weights > 0) & jnp.isfinite(selection.weights)
    senseless = (valid & ~(jnp.isfinite(selection.gains) & weighty)).any()
    # Fewer pairs than there are, or holes, would be labels that one rule has and another has not.
    held = jnp.minimum(pair_count(space), k)
    broken |= (valid[1:] & ~valid[:-1]).any() | (valid.sum() < held)
    # A status of its own says why a batch is as it is.
    silent = (selection.status == Status.OK) | (selection.status == Status.EXHAUSTED)
    found = worst(
        jnp.where(broken, jnp.int32(Status.BROKEN_RULE), jnp.int32(Status.OK)),
        jnp.where(senseless, jnp.int32(Status.BROKEN_SCORES), jnp.int32(Status.OK)),
    )
    status = jnp.where(silent, worst(selection.status, found), selection.status)
    return dataclasses.replace(selection, status=status)
