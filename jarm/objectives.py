"""What a pair is worth to a batch: the criteria of optimal experimental design, each as a function of a few numbers.

Given the information A so far (prior, past labels, batch), a pair with feature difference x, margin m and Fisher weight
v = p (1 - p) is seen through q = x^T A^-1 x, the variance of its margin, and, where something is to be learnt about
target directions t_g, through its covariances with them, c_g = x^T A^-1 t_g, and their variances h_g = t_g^T A^-1 t_g.
A new pair changes all of these by one rank, so one engine (`jarm.greedy`) serves every criterion here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.base import record, static
from jarm.fisher import fisher_weight
from jarm.linalg import matmul
from jarm.tiles import Scorer
from jarm.types import Array, Float

_WIDE = 80.0
"""Rewards further apart than this have no finite ratio of exponentials."""


class Numbers(NamedTuple):
    """What a pass knows of responses, in coordinates in which the information is the identity: A = L L^T, y = L^-1 phi.

    Attributes:
      reward: `[n]`.
      y: `[n, F]`, so that q = |y_i - y_j|^2.
      c: `[n, G]`, so that the covariances of a pair with the targets are c_i - c_j.
    """

    reward: Float[Array, "n"]
    y: Float[Array, "n F"]
    c: Float[Array, "n G"]


@record
class Objective:
    """A criterion.

    Attributes:
      worth: `(margin, q, c[G], h[G]) -> scalar`: what pairs are ordered by, of one pair.
      tile: `(rows, columns, h[G]) -> [r, c]`: `worth` of each response of `rows: Numbers` with each of `columns`, fast.
      gain: worth -> what it means, in the units of the criterion; increasing.
      weight: margin -> v, so that a pair adds v x x^T to the information.
      ceiling: `(rest, z[G, F], gone[F, F], far) -> scalar`: the most that a pair may be worth after some others were
        chosen, if it was worth at most `rest` before, when the information was the identity; z are the targets in its
        coordinates, `gone` the identity less the inverse information now, and far bounds v q. None: there is no bound.
      targets: `[G, F]` directions to learn about, G = 0 where the criterion has none.
    """

    worth: Callable[[Array, Array, Array, Array], Array] = static()
    tile: Callable[[Numbers, Numbers, Array], Array] = static()
    gain: Callable[[Array], Array] = static()
    weight: Callable[[Array], Array] = static()
    ceiling: Callable[[Array, Array, Array, Array], Array] | None = static()
    targets: Float[Array, "G F"] | None = None

    def scorer(self, numbers: Numbers, h: Float[Array, "G"], *, gains: bool = False) -> Scorer:
        """Pairs scored by their worth, or by their gain."""
        scale = self.gain if gains else lambda worth: worth

        def pair(a: Numbers, b: Numbers) -> Float[Array, ""]:
            q = square_sum(a.y - b.y)
            return scale(self.worth(a.reward - b.reward, q, a.c - b.c, h))

        def bound(rows: Numbers, columns: Numbers) -> Float[Array, ""]:
            # Worth falls with the size of a margin and grows with q, at most (|y_i| + |y_j|)^2.
            reach = sum(jnp.sqrt(jnp.square(each.y).sum(axis=1).max()) for each in (rows, columns))
            apart = jnp.maximum(rows.reward.min() - columns.reward.max(), columns.reward.min() - rows.reward.max())
            return scale(self.worth(jnp.maximum(apart, 0), jnp.square(reach), jnp.zeros(0), h))

        def tile(rows: Numbers, columns: Numbers) -> Float[Array, "r c"]:
            return scale(self.tile(rows, columns, h))

        return Scorer(numbers, pair, tile, None if h.size else bound, numbers.reward)


def square_sum(x: Float[Array, "*n F"]) -> Float[Array, "*n"]:
    """|x|^2 over the last axis, by a product with ones: there XLA's sums take three times as long on a CPU."""
    return matmul(jnp.square(x), jnp.ones(x.shape[-1], x.dtype))


def distances(rows: Float[Array, "r F"], columns: Float[Array, "c F"]) -> Float[Array, "r c"]:
    """Squared distances of each row from each column, by one product."""
    return square_sum(rows)[:, None] + square_sum(columns)[None, :] - 2 * matmul(rows, columns.T)


def with_weights(
    score: Callable[[Array], Float[Array, "r c"]], rows: Float[Array, "r"], columns: Float[Array, "c"]
) -> Float[Array, "r c"]:
    """`score(v)`, v the Fisher weights of each reward with each, without an exponential for every pair.

    v = 1 / (a_i b_j + b_i a_j + 2), a = exp(r - middle), b = exp(middle - r), wherever these are finite.
    """
    least, most = (f(jnp.concatenate([rows, columns])) for f in (jnp.min, jnp.max))
    middle = (least + most) / 2

    def factored() -> Float[Array, "r c"]:
        up, down = jnp.exp(rows - middle)[:, None], jnp.exp(middle - rows)[:, None]
        return score(1 / (up * jnp.exp(middle - columns)[None, :] + down * jnp.exp(columns - middle)[None, :] + 2))

    return jax.lax.cond(most - least < _WIDE, factored, lambda: score(fisher_weight(rows[:, None] - columns[None, :])))


def _constant(value: Array) -> Array:
    return jnp.ones_like(value)


def _identity(worth: Array) -> Array:
    return worth


def _falls(rest: Array, z: Array, gone: Array, far: Array) -> Array:
    return rest


def _leverage(margin: Array, q: Array, c: Array, h: Array) -> Array:
    return fisher_weight(margin) * q


def _leverage_tile(rows: Numbers, columns: Numbers, h: Array) -> Array:
    return with_weights(lambda v: v * distances(rows.y, columns.y), rows.reward, columns.reward)


D_OPTIMAL = Objective(_leverage, _leverage_tile, jnp.log1p, fisher_weight, _falls)
"""Log determinant of the information: a pair gains log(1 + v q) nats, and never more than before (submodular)."""

D_UNWEIGHTED = Objective(
    lambda margin, q, c, h: q,
    lambda rows, columns, h: distances(rows.y, columns.y),
    jnp.log1p,
    _constant,
    _falls,
)
"""The same as if labels were real numbers, v = 1: gain log(1 + q). APO (Das et al. 2402.10500), grown greedily."""


def v_optimal(targets: Float[Array, "T F"], weights: Float[Array, "T"] | None = None) -> Objective:
    """Mean variance over targets: a pair gains the fall of sum_t weight_t t^T A^-1 t, v |c|^2 / (1 + v q).

    Also known as I-optimal, and with the pairs of the pool as targets as the criterion of BAIT (Ash et al. 2021). Gains
    may rise as a batch grows, so a shortlist is certified by a bound that loosens with every choice (see `_v_ceiling`).

    Args:
      targets: `[T, F]` directions: feature differences of test pairs, or of the contenders of best-of-N.
      weights: `[T]` their weights, by default 1 / T each.
    """
    targets = jnp.asarray(targets, jnp.float32)
    count, width = targets.shape
    share = jnp.full(count, 1 / count) if weights is None else jnp.asarray(weights, jnp.float32)
    root = jnp.sqrt(share)[:, None] * targets
    if count > width:
        # Only the sum of outer products counts: F directions have the same.
        values, vectors = jnp.linalg.eigh(matmul(root.T, root))
        root = jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T
    return Objective(_fall_of_variance, _fall_of_variance_tile, _identity, fisher_weight, _v_ceiling, root)


def a_optimal(width: int) -> Objective:
    """Trace of the inverse information: a pair gains its fall, v x^T A^-2 x / (1 + v q). `v_optimal` of the axes."""
    return v_optimal(jnp.eye(width), jnp.ones(width))


def _fall_of_variance(margin: Array, q: Array, c: Array, h: Array) -> Array:
    v = fisher_weight(margin)
    return v * square_sum(c) / (1 + v * q)


def _fall_of_variance_tile(rows: Numbers, columns: Numbers, h: Array) -> Array:
    def score(v: Array) -> Array:
        return v * distances(rows.c, columns.c) / (1 + v * distances(rows.y, columns.y))

    return with_weights(score, rows.reward, columns.reward)


def _v_ceiling(rest: Array, z: Array, gone: Array, far: Array) -> Array:
    """(sqrt(rest (1 + far) / (1 + (1 - e) far)) + d sqrt(far / (1 + (1 - e) far)))^2, d = |z gone|, e = |gone|.

    Of a pair with whitened difference y, worth v |z y|^2 / (1 + v |y|^2) <= rest at the start: its covariances now are
    z (y - gone y), at most d |y| longer than z y; its variance now is at least (1 - e) |y|^2; and both quotients that
    this leaves grow with v |y|^2, which is at most far. Frobenius norms bound the spectral ones.
    """
    left = jnp.maximum(1 - jnp.sqrt(jnp.square(gone).sum()), 0)
    drift = jnp.sqrt(jnp.square(matmul(z, gone)).sum())
    shrunk = 1 + left * far
    return jnp.square(jnp.sqrt(jnp.maximum(rest, 0) * (1 + far) / shrunk) + drift * jnp.sqrt(far / shrunk))
