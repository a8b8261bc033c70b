"""Diversity and informativeness of a labelled batch."""

from __future__ import annotations

import jax.numpy as jnp

from jarm.core.linalg import log_det, matmul
from jarm.core.types import Array, Bool, Float, Int


def batch_report(
    first: Float[Array, "B d"],
    second: Float[Array, "B d"],
    pairs: Int[Array, "B 2"],
    valid: Bool[Array, "B"],
    fisher_weight: Float[Array, "B"],
    variance: Float[Array, "B"],
    gold_gap: Float[Array, "B"],
    *,
    width: int,
    scale: Float[Array, ""] | float,
) -> dict[str, Array]:
    """Diversity and informativeness of a labelled batch, in an embedding space that no head changes.

    With z the embedding differences of its pairs and s the mean squared difference of two random responses:
    `diversity_log_det = log det(I + Z Z^T / s)`, in nats; `diversity_distance`: mean over two pairs of
    `min(|z - z'|, |z + z'|) / sqrt(s)`, since a pair and its mirror image are one. Further `distinct_responses`,
    `distinct_prompts`, `mean_fisher_weight` p (1 - p), `mean_member_variance`, and `mean_gold_gap`. All are 0 for an
    empty batch.

    Args:
      first, second: `[B, d]` embeddings of the pairs' responses.
      pairs: `[B, 2]` int32 indices of the responses; response n belongs to prompt n // width.
      valid: `[B]`, false where nothing was selected.
      fisher_weight: `[B]` under the ensemble that chose the pair.
      variance: `[B]` variance of the pair's reward difference over the members of that ensemble.
      gold_gap: `[B]` gold difference, any sign, any unit.
      width: R, padding included.
      scale: s.

    Returns:
      Name -> scalar; counts are int32.
    """
    B = pairs.shape[0]
    picked = jnp.maximum(valid.sum(dtype=jnp.float32), 1)
    z = jnp.where(valid[:, None], first - second, 0) / jnp.sqrt(jnp.asarray(scale, jnp.float32))
    gram = matmul(z, z.T)
    norms = jnp.diagonal(gram)
    squared = jnp.maximum(norms[:, None] + norms[None, :] - 2 * jnp.abs(gram), 0)
    others = valid[:, None] & valid[None, :] & ~jnp.eye(B, dtype=bool)

    def distinct(numbers: Int[Array, "k"], real: Bool[Array, "k"]) -> Int[Array, ""]:
        ordered = jnp.sort(jnp.where(real, numbers, -1))
        new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
        return (new & (ordered >= 0)).sum(dtype=jnp.int32)

    def mean(values: Float[Array, "B"]) -> Float[Array, ""]:
        return jnp.where(valid, values, 0).sum() / picked

    ends, real = pairs.reshape(-1), jnp.repeat(valid, 2)
    return {
        "diversity_log_det": log_det(jnp.eye(B, dtype=gram.dtype) + gram)[0],
        "diversity_distance": jnp.where(others, jnp.sqrt(squared), 0).sum()
        / jnp.maximum(others.sum(dtype=jnp.float32), 1),
        "distinct_responses": distinct(ends, real),
        "distinct_prompts": distinct(ends // width, real),
        "mean_fisher_weight": mean(fisher_weight),
        "mean_member_variance": mean(variance),
        "mean_gold_gap": mean(jnp.abs(gold_gap)),
    }
