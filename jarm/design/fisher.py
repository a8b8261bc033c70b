"""Fisher information of pairs of responses under a Bradley-Terry head, summed over pair spaces without building pairs.

For a pair (i, j) with feature difference x = phi_i - phi_j, margin m = r_i - r_j and p = sigmoid(m), the information
about the last layer is v x x^T with v = p (1 - p). Summed over a set of pairs it is a weighted graph Laplacian,
Phi^T (diag(V 1) - V) Phi, so memory holds one tile of weights V at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jarm.core.base import PairSpace
from jarm.core.linalg import matmul
from jarm.core.types import Array, Float, Int
from jarm.design.spaces import TILE, get_tile, tile_count


def fisher_weight(margin: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """`v = p (1 - p)`, p = sigmoid(margin): information of a label about the margin, per squared logit.

    Without cancellation: 1 - p is never formed from p.

    Args:
      margin: difference of two rewards, in logits, of any shape.

    Returns:
      Weights of that shape, in (0, 1/4], falling with the size of the margin.

    Example:
      >>> import jax.numpy as jnp
      >>> from jarm import fisher_weight
      >>> fisher_weight(jnp.array([0.0, 2.0, -2.0])).round(3)
      Array([0.25 , 0.105, 0.105], dtype=float32)
    """
    decay = jnp.exp(-jnp.abs(margin))
    return decay / jnp.square(1 + decay)


def pair_information(
    first: Float[Array, "M F"], second: Float[Array, "M F"], weight: Float[Array, "M"]
) -> Float[Array, "F F"]:
    """`sum_m weight_m x_m x_m^T`, x = first - second."""
    scaled = jnp.sqrt(weight)[:, None] * (first - second)
    return matmul(scaled.T, scaled)


def centred(features: Float[Array, "N F"], space: PairSpace) -> Float[Array, "N F"]:
    """Features without the mean, of each prompt (`within`) or of all, which no difference sees; 0 if in no pair.

    Distances and sums then lose no digits to a common shift. One response is subtracted first, so that equal features
    become exactly zero, and not rounding noise that passes for information.
    """
    width = space.width if space.kind == "within" else features.shape[0]
    grid = features.reshape(-1, width, features.shape[1])
    eligible = space.eligible
    if space.pairs is not None:  # an outlier in no pair would cost all others digits
        eligible &= jnp.zeros_like(eligible).at[space.pairs].set(True, mode="drop")
    valid = eligible.reshape(-1, width, 1)
    anchor = jnp.take_along_axis(grid, valid.argmax(axis=1, keepdims=True), axis=1)
    grid = jnp.where(valid, grid - anchor, 0)
    count = jnp.maximum(valid.sum(axis=1, keepdims=True, dtype=jnp.int32), 1).astype(grid.dtype)
    mean = grid.sum(axis=1, keepdims=True) / count
    return jnp.where(valid, grid - mean, 0).reshape(features.shape)


def within_prompts(features: Float[Array, "N F"], space: PairSpace) -> Float[Array, "N F"]:
    """Features of the eligible responses less the mean of their prompt, be they in a listed pair or not; 0 for others.

    Where every prompt has one eligible response, the mean is that of all of them.

    Example:
      >>> import jax.numpy as jnp
      >>> from jarm import pair_space
      >>> space = pair_space("all", 2, jnp.array([True, True, True, False]))  # two prompts of R = 2 responses
      >>> within_prompts(jnp.array([[1.0], [3.0], [5.0], [9.0]]), space).tolist()
      [[-1.0], [1.0], [0.0], [0.0]]
    """
    eligible = space.eligible[:, None]
    features = jnp.where(eligible, centred(features, dataclasses.replace(space, pairs=None)), 0)

    def by_prompt(numbers: Float[Array, "N n"], prompt_of: Int[Array, "N"]) -> Float[Array, "P n"]:
        return jax.ops.segment_sum(numbers, prompt_of, space.num_prompts)

    real = eligible.astype(features.dtype)
    prompt_of = jnp.where((by_prompt(real, space.prompt_of) > 1).any(), space.prompt_of, 0)
    mean = by_prompt(features, prompt_of) / jnp.maximum(by_prompt(real, prompt_of), 1)
    return jnp.where(eligible, features - mean[prompt_of], 0)


def within_covariance(features: Float[Array, "N F"], space: PairSpace) -> Float[Array, "F F"]:
    """Mean over the eligible responses of z z^T, z the features less the mean of their prompt (`within_prompts`)."""
    z = within_prompts(features, space)
    return matmul(z.T, z) / jnp.maximum(space.eligible.sum(dtype=jnp.int32), 1).astype(z.dtype)


def space_information(
    features: Float[Array, "N F"],
    rewards: Float[Array, "N"] | None,
    space: PairSpace,
    *,
    tile: int = TILE,
) -> tuple[Float[Array, "F F"], Float[Array, ""]]:
    """Information of every pair of a space, `sum v x x^T`, and the number of pairs.

    Args:
      features: `[N, F]` last-layer features of the responses.
      rewards: `[N]` rewards, for weights v = p (1 - p); None for weights of 1, the sum of x x^T.
      space: the pairs.
      tile: pairs summed together, which bounds memory.

    Returns:
      The sum over the space, `[F, F]`, and the number of pairs as float32.

    Example:
      Three responses on a line, x = 1, 1 and 2, at margin 0: (1 + 1 + 4) / 4.

      >>> import jax.numpy as jnp
      >>> from jarm import pair_space
      >>> features, space = jnp.array([[0.0], [1.0], [2.0]]), pair_space("all", 1, jnp.ones(3, bool))
      >>> information, count = space_information(features, jnp.zeros(3), space)
      >>> information.round(4).tolist(), float(count)
      ([[1.5]], 3.0)
    """
    width = features.shape[1]
    zero = (jnp.zeros((width, width), features.dtype), jnp.float32(0))
    if space.pairs is not None:
        return _listed_information(features, rewards, space.pairs, zero, max(1, tile // width))
    features = centred(features, space)
    rewards = None if rewards is None else jnp.where(space.eligible, rewards, 0)

    def cross_product(a: Array, b: Array) -> Array:
        # One product over all groups: one per group would hold an F x F matrix for each.
        return matmul(a.reshape(-1, width).T, b.reshape(-1, width))

    def add(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        total, count = carry
        rows, columns, mask = get_tile(space, index, tile)
        if rewards is None:
            weights = mask.astype(features.dtype)
        else:
            weights = fisher_weight(rewards[rows][:, :, None] - rewards[columns][:, None, :])
            weights *= mask.astype(weights.dtype)
        phi_rows, phi_columns = features[rows], features[columns]
        # A tile has its pairs in one direction, row before column: sum of v (a a^T + b b^T - a b^T - b a^T).
        mixed = cross_product(phi_rows, matmul(weights, phi_columns))
        total += cross_product(phi_rows, weights.sum(axis=2)[:, :, None] * phi_rows)
        total += cross_product(phi_columns, weights.sum(axis=1)[:, :, None] * phi_columns) - mixed - mixed.T
        return (total, count + mask.sum(dtype=jnp.float32)), None

    indices = jnp.arange(tile_count(space, tile), dtype=jnp.int32)
    (total, count), _ = jax.lax.scan(add, zero, indices)
    return (total + total.T) / 2, count


def _listed_information(
    features: Float[Array, "N F"],
    rewards: Float[Array, "N"] | None,
    pairs: Int[Array, "M 2"],
    zero: tuple[Float[Array, "F F"], Float[Array, ""]],
    chunk: int,
) -> tuple[Float[Array, "F F"], Float[Array, ""]]:
    """`space_information` of a list, added to `zero` chunk by chunk."""
    size = features.shape[0]

    def add(carry: tuple[Array, Array], part: Array) -> tuple[tuple[Array, Array], None]:
        total, count = carry
        valid = part[:, 0] < size
        first, second = jnp.minimum(part, size - 1).T
        weight = valid.astype(features.dtype)
        if rewards is not None:
            weight = jnp.where(valid, fisher_weight(rewards[first] - rewards[second]), 0)
        scaled = jnp.where(valid[:, None], jnp.sqrt(weight)[:, None] * (features[first] - features[second]), 0)
        total += matmul(scaled.T, scaled)
        return (total, count + valid.sum(dtype=jnp.float32)), None

    carry, _ = jax.lax.scan(add, zero, chunked(pairs, chunk, size))
    return carry


def chunked(pairs: Int[Array, "M 2"], chunk: int, fill: int) -> Int[Array, "c m 2"]:
    """Pairs in equal chunks of at most `chunk`, the last padded with `fill`."""
    count = max(1, -(-pairs.shape[0] // chunk))
    each = -(-pairs.shape[0] // count)
    padded = jnp.pad(pairs, ((0, count * each - pairs.shape[0]), (0, 0)), constant_values=fill)
    return padded.reshape(count, each, 2)


def pair_variance(rewards: Float[Array, "K N"], pairs: Int[Array, "M 2"]) -> Float[Array, "M"]:
    """Variance over an ensemble of the *difference* of two rewards, `[M]` (unbiased, K - 1; 0 for a single member).

    Never the sum of two marginal variances: doubt that both responses share cancels.

    Example:
      Members that disagree on the level of all rewards agree on the first pair.

      >>> import jax.numpy as jnp
      >>> rewards = jnp.array([[0.0, 1.0, 2.0], [10.0, 11.0, 16.0]])
      >>> pair_variance(rewards, jnp.array([[0, 1], [1, 2]])).tolist()
      [0.0, 8.0]
    """
    difference = rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]]
    return difference.var(axis=0, ddof=min(1, len(rewards) - 1))


MAX_EXPONENT = 80.0
"""Rewards further apart than this, in logits, have no finite ratio of exponentials."""


def with_weights(
    score: Callable[[Array], Float[Array, "r c"]], rows: Float[Array, "r"], columns: Float[Array, "c"]
) -> Float[Array, "r c"]:
    """`score(v)`, v the Fisher weights of each row with each column, without an exponential for every pair.

    v = 1 / (a_i b_j + b_i a_j + 2), a = exp(r - middle), b = exp(middle - r), wherever these are finite.

    Args:
      score: function of the weights `[r, c]`, compiled for both forms of them.
      rows, columns: rewards.
    """
    low, high = (f(jnp.concatenate([rows, columns])) for f in (jnp.min, jnp.max))
    middle = (low + high) / 2

    def factored() -> Float[Array, "r c"]:
        up, down = jnp.exp(rows - middle)[:, None], jnp.exp(middle - rows)[:, None]
        return score(1 / (up * jnp.exp(middle - columns)[None, :] + down * jnp.exp(columns - middle)[None, :] + 2))

    return jax.lax.cond(
        high - low < MAX_EXPONENT, factored, lambda: score(fisher_weight(rows[:, None] - columns[None, :]))
    )
