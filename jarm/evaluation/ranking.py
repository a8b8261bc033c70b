"""Metrics of order, of one prompt: Spearman's rank correlation, and exact best-of-n.

Both follow from one primitive, `ranking`: for each response, how many score less, and how many no more.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.types import Array, Bool, Float, Int

COMPARE_UP_TO = 32
"""Largest R at which all pairs are compared: a ninth of the processor time of sorting at 20, 5 times as much at 54."""


class Ranking(NamedTuple):
    """The ranking of one prompt's responses.

    Attributes:
      below: `[R]` int32, how many score less; any number where `mask` is false.
      upto: `[R]` int32, how many score no more, itself included; any number where `mask` is false.
      size: scalar int32, responses ranked; 0 where a score is NaN, since then there is no ranking.
    """

    below: Int[Array, "R"]
    upto: Int[Array, "R"]
    size: Int[Array, ""]


def _sortable(scores: Float[Array, "R"]) -> Int[Array, "R"]:
    """Integers in the order of the scores: on a CPU XLA sorts integers about five times faster than floats."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, jnp.float32(0), scores), jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def ranking(scores: Float[Array, "R"], mask: Bool[Array, "R"], *, compare_up_to: int = COMPARE_UP_TO) -> Ranking:
    """Exact ranking of one prompt's responses, ties included.

    `below_i = #{j: x_j < x_i}`, `upto_i = #{j: x_j <= x_i}`; the average rank is `(below + upto + 1) / 2`.

    Args:
      scores: `[R]` float32.
      mask: `[R]`, true where a response exists.
      compare_up_to: largest R at which all pairs are compared; above it scores are sorted and searched.
    """
    R = scores.shape[0]
    size = jnp.where((jnp.isnan(scores) & mask).any(), 0, mask.sum(dtype=jnp.int32))
    if compare_up_to >= R:
        less = (scores[:, None] < scores[None, :]) & mask[:, None]
        no_more = (scores[:, None] <= scores[None, :]) & mask[:, None]
        return Ranking(less.sum(0, dtype=jnp.int32), no_more.sum(0, dtype=jnp.int32), size)
    # Padding sorts behind every number, infinity included.
    keys = jnp.where(mask, _sortable(scores), jnp.int32(0x7FFFFFFF))
    ordered = jax.lax.sort(keys, is_stable=False)
    below = jnp.searchsorted(ordered, keys, side="left").astype(jnp.int32)
    last = jnp.concatenate([ordered[1:] != ordered[:-1], jnp.ones(1, bool)])
    ends = jax.lax.cummin(jnp.where(last, jnp.arange(1, R + 1, dtype=jnp.int32), R), reverse=True)
    return Ranking(below, ends[jnp.minimum(below, R - 1)], size)


def centred_ranks(ranks: Ranking, mask: Bool[Array, "R"]) -> Float[Array, "R"]:
    """Twice the average rank minus its mean, over the size: whole numbers until the division, so ties are exact."""
    twice = (ranks.below + ranks.upto - ranks.size).astype(jnp.float32) / jnp.maximum(ranks.size, 1).astype(jnp.float32)
    return jnp.where(mask & (ranks.size > 0), twice, 0)


def correlation(a: Float[Array, "R"], b: Float[Array, "R"]) -> Float[Array, ""]:
    """Correlation of two centred vectors; NaN where one of them is zero."""
    spread = jnp.sqrt((a * a).sum()) * jnp.sqrt((b * b).sum())
    return jnp.where(spread > 0, jnp.clip((a * b).sum() / jnp.where(spread > 0, spread, 1), -1, 1), jnp.nan)


def spearman(pred: Float[Array, "R"], gold: Float[Array, "R"], mask: Bool[Array, "R"]) -> Float[Array, ""]:
    """Spearman's rank correlation of one prompt's responses, with average ranks.

    NaN where it is undefined: fewer than two responses, all predictions or all gold rewards equal, or a NaN among them.

    Args:
      pred: `[R]` predicted rewards.
      gold: `[R]` gold rewards.
      mask: `[R]`, true where a response exists.

    Example:
      >>> rewards, gold = jnp.array([0.1, 0.2, 0.4, 0.3]), jnp.array([1.0, 2.0, 3.0, 4.0])
      >>> print(f"{spearman(rewards, gold, jnp.ones(4, bool)):.1f}")
      0.8
    """
    return correlation(centred_ranks(ranking(pred, mask), mask), centred_ranks(ranking(gold, mask), mask))


@functools.lru_cache(maxsize=32)
def subset_cdf(n: int, size: int) -> np.ndarray:
    """`C(k, n) / C(N, n)` for all N, k <= size: the chance that n of N responses are all among the k worst.

    Computed by log-gamma in float64. Rows N < n are NaN, since there is no such subset.

    Returns:
      `[size + 1, size + 1]` float32, by N and k.
    """
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size + 1, dtype=np.float64)))])
    k = np.arange(size + 1)
    log_ways = np.full(size + 1, -np.inf)
    log_ways[n:] = log_factorial[n:] - log_factorial[: max(size + 1 - n, 0)]
    table = np.full((size + 1, size + 1), np.nan)
    table[n:] = np.exp(np.minimum(log_ways[None, :] - log_ways[n:, None], 0.0))
    table[k[:, None] < k[None, :]] = np.nan
    return table.astype(np.float32)


def expected_best(
    ranks: Ranking, gold: Float[Array, "R"], mask: Bool[Array, "R"], cdf: Float[Array, "size k"]
) -> Float[Array, ""]:
    """`best_of_n`, given the ranking and `subset_cdf`."""
    row = cdf[ranks.size]
    real = mask & (ranks.size > 0)
    below, upto = jnp.where(real, ranks.below, 0), jnp.where(real, ranks.upto, 1)
    # Tied responses share the weight of their group; the weights of a prompt sum to 1.
    weight = (row[upto] - row[below]) / (upto - below).astype(jnp.float32)
    best = jnp.where(real, weight * gold, 0).sum()
    return jnp.where(jnp.isnan(row[0]), jnp.nan, best)


def best_of_n(pred: Float[Array, "R"], gold: Float[Array, "R"], mask: Bool[Array, "R"], n: int) -> Float[Array, ""]:
    """Exact expected gold reward of the best-predicted of n of one prompt's N responses, drawn without replacement.

    `sum_{i >= n} C(i-1, n-1) / C(N, n) gold_(i)`, gold ordered by prediction; ties are broken uniformly at random.

    Args:
      pred: `[R]` predicted rewards.
      gold: `[R]` gold rewards.
      mask: `[R]`, true where a response exists.
      n: responses drawn.

    Returns:
      The expectation, in units of gold; NaN where the prompt has fewer than n responses, or a NaN prediction.
    """
    return expected_best(ranking(pred, mask), gold, mask, jnp.asarray(subset_cdf(n, pred.shape[0])))
