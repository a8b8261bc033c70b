"""From hidden states of tokens to one vector per text."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jarm.core.status import JarmError
from jarm.core.types import Array, Float, Int

KINDS = ("last", "mean", "cls")


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Hidden state taken of a text, and its layer.

    Attributes:
      kind: `last` (of the last real token), `mean` (over all real tokens) or `cls` (of the first token).
      layer: as in `hidden_states` of transformers: 0 is the input of the first layer; the last, -1, is the output of
        the model with its final norm.
      skip: tokens at the beginning of each text that `mean` and `cls` leave out.
    """

    kind: str = "last"
    layer: int = -1
    skip: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise JarmError(f"Unknown pooling '{self.kind}': choose one of {', '.join(KINDS)}.")

    def layer_of(self, depth: int) -> int:
        """The layer counted from 0, in a model of `depth` layers."""
        if not -depth - 1 <= self.layer <= depth:
            raise JarmError(
                f"There is no layer {self.layer} in a model of {depth}: choose from {-depth - 1} to {depth}."
            )
        return self.layer % (depth + 1)


def pool(kind: str, hidden: Float[Array, "B T d"], lengths: Int[Array, "B"], skip: int = 0) -> Float[Array, "B d"]:
    """Pool the hidden states of right-padded texts, in float32.

    Args:
      kind: `last`, `mean` or `cls`.
      hidden: hidden states; padding is ignored.
      lengths: tokens in each text, more than `skip`.
      skip: tokens at the beginning that `mean` and `cls` leave out.

    Returns:
      One vector per text.

    Example:
      >>> hidden = jnp.arange(6.0).reshape(1, 3, 2)  # one text, padded to 3 tokens, of width 2
      >>> pool("mean", hidden, jnp.array([2]))
      Array([[1., 2.]], dtype=float32)
    """
    if kind == "cls":
        return hidden[:, min(skip, hidden.shape[1] - 1)].astype(jnp.float32)
    if kind == "last":
        chosen = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1, mode="clip")
        return chosen[:, 0].astype(jnp.float32)
    index = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None, :, None]
    real = (index >= skip) & (index < lengths[:, None, None])
    total = jnp.sum(jnp.where(real, hidden.astype(jnp.float32), 0.0), axis=1)
    return total / jnp.maximum(lengths - skip, 1)[:, None].astype(total.dtype)


def follow(
    kind: str,
    first: Float[Array, "B d"],
    before: Int[Array, "B"],
    rest: Float[Array, "B d"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B d"]:
    """Pool whole texts from their two pooled parts.

    Args:
      kind: `last`, `mean` or `cls`.
      first: the pooled first parts.
      before: tokens in each first part, 0 or more.
      rest: the pooled second parts.
      lengths: tokens in each second part, 1 or more.

    Returns:
      One vector per text, in float32.
    """
    if kind == "last":
        return rest
    if kind == "cls":
        return jnp.where(before[:, None] > 0, first, rest)
    share = (before.astype(jnp.float32) / (before + lengths).astype(jnp.float32))[:, None]
    return share * first + (1 - share) * rest
