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

from jarm.core.linalg import cholesky, distances, matmul, square_sum
from jarm.core.pytree import record, static
from jarm.core.status import Status
from jarm.core.types import Array, Float
from jarm.design.fisher import fisher_weight, with_weights
from jarm.design.mutual_information import _NEAR, _far, _near, mutual_information
from jarm.design.scorer import Scorer


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
class Criterion:
    """What a pair is worth, in the forms that an engine needs.

    Attributes:
      worth: `(margin, q, c[G], h[G]) -> scalar`, the order of pairs: the worth of one pair.
      tile: `(rows, columns, h[G]) -> [r, c]`: `worth` of each response of `rows: Numbers` with each of `columns`, fast.
      gain: worth -> gain in the units of the criterion; increasing.
      weight: margin -> v, so that a pair adds v x x^T to the information.
      ceiling: `(rest, z[G, F], shrunk[F, F], bound, threshold) -> scalar`, an upper bound on the worth of any pair that
        a pass left out, after the information has grown; None if there is none. In coordinates in which the information
        of the pass is the identity, z are the targets and `shrunk` is the identity less the inverse information now;
        `rest` bounds the worth of the pairs left out at the pass, `bound` their v q. A ceiling below `threshold` serves
        no better than `threshold`.
      targets: `[G, F]` directions to learn about; None where the criterion has none.
      is_log_det: whether `gain` of `worth` is the growth of the log determinant of the information.
    """

    worth: Callable[[Array, Array, Array, Array], Array] = static()
    tile: Callable[[Numbers, Numbers, Array], Array] = static()
    gain: Callable[[Array], Array] = static()
    weight: Callable[[Array], Array] = static()
    ceiling: Callable[[Array, Array, Array, Array, Array], Array] | None = static()
    targets: Float[Array, "G F"] | None = None
    is_log_det: bool = static(default=False)

    @property
    def weighted(self) -> bool | None:
        """True where pairs have their Fisher weight, False where all have weight 1, None for any other weight."""
        if self.weight is fisher_weight:
            return True
        return False if self.weight is unit_weight else None

    def scorer(
        self, numbers: Numbers, h: Float[Array, "G"], *, gains: bool = False, whiten: Float[Array, "F F"] | None = None
    ) -> Scorer:
        """Pairs scored by their worth, or by their gain; of a list, `whiten` may be left to do to differences of y."""
        scale = self.gain if gains else lambda worth: worth

        def pair(a: Numbers, b: Numbers) -> Float[Array, ""]:
            x = a.y - b.y
            q = square_sum(x if whiten is None else matmul(x, whiten.T))
            return scale(self.worth(a.reward - b.reward, q, a.c - b.c, h))

        def bound(rows: Numbers, columns: Numbers) -> Float[Array, ""]:
            # Worth falls with the size of a margin and grows with q, at most (|y_i| + |y_j|)^2.
            reach = sum(jnp.sqrt(jnp.square(each.y).sum(axis=1).max()) for each in (rows, columns))
            apart = jnp.maximum(rows.reward.min() - columns.reward.max(), columns.reward.min() - rows.reward.max())
            return scale(self.worth(jnp.maximum(apart, 0), jnp.square(reach), jnp.zeros(0), h))

        def tile(rows: Numbers, columns: Numbers) -> Float[Array, "r c"]:
            return scale(self.tile(rows, columns, h))

        return Scorer(numbers, pair, tile, None if h.size else bound, numbers.reward)


def unit_weight(margin: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """v = 1 for every pair, as if labels were real numbers."""
    return jnp.ones_like(margin)


def _identity(worth: Array) -> Array:
    return worth


def _falls(rest: Array, z: Array, shrunk: Array, bound: Array, threshold: Array) -> Array:
    return rest


def _leverage(margin: Array, q: Array, c: Array, h: Array) -> Array:
    return fisher_weight(margin) * q


def _leverage_tile(rows: Numbers, columns: Numbers, h: Array) -> Array:
    return with_weights(lambda v: v * distances(rows.y, columns.y), rows.reward, columns.reward)


D_OPTIMAL = Criterion(_leverage, _leverage_tile, jnp.log1p, fisher_weight, _falls, is_log_det=True)
"""Log determinant of the information: a pair gains log(1 + v q) nats, and never more than before (submodular)."""

D_UNWEIGHTED = Criterion(
    lambda margin, q, c, h: q,
    lambda rows, columns, h: distances(rows.y, columns.y),
    jnp.log1p,
    unit_weight,
    _falls,
    is_log_det=True,
)
"""The same as if labels were real numbers, v = 1: gain log(1 + q). APO (Das et al. 2402.10500), grown greedily."""


def v_optimal(targets: Float[Array, "T F"], weights: Float[Array, "T"] | None = None) -> Criterion:
    """Mean variance over targets: a pair gains the fall of sum_t weight_t t^T A^-1 t, v |c|^2 / (1 + v q).

    Also known as I-optimal, and with the pairs of the pool as targets as the criterion of BAIT (Ash et al. 2021). Gains
    may rise as a batch grows, so a shortlist is certified by a bound of its own (see `_v_ceiling`).

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
    return Criterion(_fall_of_variance, _fall_of_variance_tile, _identity, fisher_weight, _v_ceiling, root)


def a_optimal(width: int) -> Criterion:
    """Trace of the inverse information: a pair gains its fall, v x^T A^-2 x / (1 + v q). `v_optimal` of the axes."""
    return v_optimal(jnp.eye(width), jnp.ones(width))


def _fall_of_variance(margin: Array, q: Array, c: Array, h: Array) -> Array:
    v = fisher_weight(margin)
    return v * square_sum(c) / (1 + v * q)


def _fall_of_variance_tile(rows: Numbers, columns: Numbers, h: Array) -> Array:
    def score(v: Array) -> Array:
        q = jnp.maximum(distances(rows.y, columns.y), 0)
        return v * distances(rows.c, columns.c) / (1 + v * q)

    return with_weights(score, rows.reward, columns.reward)


def _v_ceiling(rest: Array, z: Array, gone: Array, far: Array, most: Array) -> Array:
    """`most`, if it is a bound, otherwise infinity: it is one where most M + K - rest + (most - rest) / far >= M K M.

    In that order of matrices M = 1 - gone is the inverse information and K = z^T z. For u = sqrt(v) y, y the whitened
    difference of a pair, |u|^2 <= far, and it was worth |z u|^2 / (1 + |u|^2) <= rest, so u^T (K - rest) u <= rest. Of
    the inequality between u^T and u this leaves |z M u|^2 <= most (1 + u^T M u): it is worth at most `most` now.
    """
    k, left = matmul(z.T, z), jnp.eye(z.shape[1]) - gone
    spare = (most - rest) / jnp.maximum(far, jnp.finfo(far.dtype).tiny)
    # What rounding may hide from the Cholesky factorisation.
    doubt = 4 * jnp.finfo(k.dtype).eps * (jnp.trace(k) + z.shape[1] * most)
    matrix = most * left + k + (spare - rest - doubt) * jnp.eye(z.shape[1]) - matmul(matmul(left, k), left)
    _, status = cholesky((matrix + matrix.T) / 2)
    return jnp.where((status == Status.OK) & (most >= rest), most, jnp.inf)


def epig(targets: Float[Array, "T F"], target_margins: Float[Array, "T"]) -> Criterion:
    """Expected information, in nats, of a pair's label about the label of a target pair, averaged over targets.

    Under the Laplace posterior in its Gaussian form, in which a label tells the margin with variance 1 / v, a pair
    gains mean_t -1/2 log(1 - rho_t^2), rho_t^2 = v v_t c_t^2 / ((1 + v q) (1 + v_t h_t)). To first order in rho^2 that
    is `v_optimal` of the targets with weights v_t / (2 T (1 + v_t h_t)), which fall as targets become known. Gains may
    rise as a batch grows, and no bound is used: every choice takes a pass, which holds a number for each response and
    target.
    After Bickford Smith et al. 2023, "Prediction-Oriented Bayesian Active Learning".

    Args:
      targets: `[T, F]` feature differences of the target pairs.
      target_margins: `[T]` their margins.
    """
    known = jnp.sqrt(fisher_weight(jnp.asarray(target_margins, jnp.float32)))
    # Targets of this length carry their Fisher weights: v_t c_t^2 and v_t h_t are c^2 and h of them.
    scaled = known[:, None] * jnp.asarray(targets, jnp.float32)
    return Criterion(_information, _information_tile, _identity, fisher_weight, None, scaled)


_FACTORS = 4
"""Factors 1 - rho^2 that share a logarithm; more of them might underflow."""


def _information_of(v: Array, q: Array, squares: list[Array], h: list[Array]) -> Array:
    """-1/2 log of the product of 1 - rho_t^2 over a few targets; squares c_t^2."""
    share = v / (1 + v * q)
    # The product less 1, for products near 1, and the product itself, for products near 0.
    less, product = jnp.zeros_like(v), jnp.ones_like(v)
    for square, each in zip(squares, h, strict=True):
        # Cauchy and Schwarz: c^2 <= q h, whatever rounding says.
        rho = share * jnp.minimum(square / (1 + each), q * (each / (1 + each)))
        less += rho * product
        product *= 1 - rho
    near = jnp.minimum(less, 0.5)
    return -0.5 * jnp.where(less < 0.5, jnp.log1p(-near), jnp.log(product))


def _grouped(c: Array) -> Array:
    """Targets (the last axis) in groups of `_FACTORS`, padded by targets of which nothing is told: `[g, f, ...]`."""
    c = jnp.moveaxis(c, -1, 0)
    count = -(-c.shape[0] // _FACTORS)
    padded = jnp.pad(c, ((0, count * _FACTORS - c.shape[0]),) + ((0, 0),) * (c.ndim - 1))
    return padded.reshape(count, _FACTORS, *c.shape[1:])


def _information(margin: Array, q: Array, c: Array, h: Array) -> Array:
    v = fisher_weight(margin)

    def of_group(c: Array, h: Array) -> Array:
        return _information_of(v, q, list(jnp.square(c)), list(h))

    return jax.vmap(of_group)(_grouped(c), _grouped(h)).sum() / h.shape[0]


def _information_tile(rows: Numbers, columns: Numbers, h: Array) -> Array:
    q = jnp.maximum(distances(rows.y, columns.y), 0)

    def score(v: Array) -> Array:
        def add(total: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
            here, there, h = group
            squares = [jnp.square(a[:, None] - b[None, :]) for a, b in zip(here, there, strict=True)]
            return total + _information_of(v, q, squares, list(h)), None

        groups = (_grouped(rows.c), _grouped(columns.c), _grouped(h))
        return jax.lax.scan(add, jnp.zeros_like(v), groups)[0] / h.shape[0]

    return with_weights(score, rows.reward, columns.reward)


def _mutual(margin: Array, q: Array, c: Array, h: Array) -> Array:
    return mutual_information(margin, q)


def _mutual_tile(rows: Numbers, columns: Numbers, h: Array) -> Array:
    margin, q = rows.reward[:, None] - columns.reward[None, :], jnp.maximum(distances(rows.y, columns.y), 0)
    near = _near(margin, jnp.minimum(q, _NEAR))
    # Mostly no margin is that uncertain.
    far = jax.lax.cond(q.max() > _NEAR, lambda: _far(margin, jnp.maximum(q, _NEAR)), lambda: near)
    return jnp.where(q <= _NEAR, near, far)


BALD = Criterion(_mutual, _mutual_tile, _identity, fisher_weight, _falls)
"""Mutual information of a pair's label and the last layer under the Laplace posterior, nats: see `mutual_information`.

It rises with q and q falls as a batch grows, so no pair gains more than before. Houlsby et al. 2011 (1112.5745).
"""
