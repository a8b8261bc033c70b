"""Criteria of optimal experimental design: the worth of a pair to a batch, each a function of a few numbers.

Let A be the information so far (prior, labelled pairs, batch). A pair with feature difference x, margin m and Fisher
weight v = p (1 - p) enters through q = x^T A^-1 x, the variance of its margin. A criterion about target directions t_g
also needs the covariances c_g = x^T A^-1 t_g of the margin with them, and their variances h_g = t_g^T A^-1 t_g. A new
pair changes all of these by one rank, so one engine (`jarm.design.greedy`) serves every criterion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.linalg import cholesky, distances, matmul, square_sum
from jarm.core.pytree import record, static
from jarm.core.status import Status
from jarm.core.types import Array, Float
from jarm.design.fisher import fisher_weight, with_weights
from jarm.design.mutual_information import (
    MAX_QUADRATURE_VARIANCE,
    mixture_information,
    mutual_information,
    quadrature_information,
)
from jarm.design.scorer import Scorer


class Numbers(NamedTuple):
    """Numbers of responses, in coordinates in which the information is the identity: A = L L^T, y = L^-1 phi.

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
    targets: Float[Array | np.ndarray, "G F"] | None = None
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
        """The worth of pairs as scores of a pass.

        Args:
          numbers: numbers of the responses.
          h: `[G]` variances of the targets.
          gains: score by gain, not worth.
          whiten: W, where `numbers.y` are features that are not whitened, for a list: then q = |W (y_i - y_j)|^2.
        """
        scale = self.gain if gains else lambda worth: worth

        def pair(a: Numbers, b: Numbers) -> Float[Array, ""]:
            x = a.y - b.y
            q = square_sum(x if whiten is None else matmul(x, whiten.T))
            return scale(self.worth(a.reward - b.reward, q, a.c - b.c, h))

        def bound(rows: Numbers, columns: Numbers) -> Float[Array, ""]:
            # Worth falls with the size of a margin and grows with q, at most (|y_i| + |y_j|)^2.
            reach = sum(jnp.sqrt(jnp.square(each.y).sum(axis=1).max()) for each in (rows, columns))
            gap = jnp.maximum(rows.reward.min() - columns.reward.max(), columns.reward.min() - rows.reward.max())
            return scale(self.worth(jnp.maximum(gap, 0), jnp.square(reach), jnp.zeros(0, jnp.float32), h))

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
"""Log determinant of the information: a pair gains log(1 + v q) nats, never more than earlier (submodular)."""

D_UNWEIGHTED = Criterion(
    lambda margin, q, c, h: q,
    lambda rows, columns, h: distances(rows.y, columns.y),
    jnp.log1p,
    unit_weight,
    _falls,
    is_log_det=True,
)
"""`D_OPTIMAL` with v = 1, as if labels were real numbers: gain log(1 + q) nats. Greedy APO (Das et al. 2402.10500)."""


def v_optimal(targets: Float[Array, "T F"], weights: Float[Array, "T"] | None = None) -> Criterion:
    """Mean variance over targets: a pair gains the fall of sum_t weight_t t^T A^-1 t, v |c|^2 / (1 + v q).

    Also known as I-optimal; with the candidates as targets it is the criterion of BAIT. Gains may rise as a
    batch grows, so a shortlist is certified by a bound of its own (see `_v_ceiling`).

    Args:
      targets: `[T, F]` directions: feature differences of test pairs, or of the contenders of best-of-N.
      weights: `[T]` their weights, by default 1 / T each.

    Returns:
      The criterion; its gains are in squared logits. For T > F it holds F directions that have the same sum of outer
      products.

    Source: Ash et al., Gone Fishing (2021).

    Example:
      N = 3 responses with F = 2 features; both targets see the first feature, one the second.

      >>> import jax.numpy as jnp, numpy as np, jarm
      >>> features, rewards = np.array([[0.0, 0], [1, 0], [0, 2]]), np.zeros(3)  # [N, F], [N] in logits
      >>> pairs, criterion = [[0, 1], [0, 2], [1, 2]], jarm.v_optimal(jnp.array([[1.0, 0.0], [1.0, 1.0]]))
      >>> batch = jarm.select(features, rewards, space=pairs, k=1, criterion=criterion, prior_precision=2.0)
      >>> batch.pairs.tolist(), batch.gains.round(3).tolist()
      ([[0, 2]], [0.083])
    """
    targets = jnp.asarray(targets, jnp.float32)
    count, width = targets.shape
    share = jnp.full(count, 1 / count, jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    root = jnp.sqrt(share)[:, None] * targets
    if count > width:
        values, vectors = jnp.linalg.eigh(matmul(root.T, root))
        root = jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T
    return sum_of_variances(root)


def sum_of_variances(directions: Float[Array | np.ndarray, "G F"]) -> Criterion:
    """`v_optimal` of `[G, F]` directions of weight 1, of JAX or NumPy, as they are."""
    return Criterion(fall_of_variance, _fall_of_variance_tile, _identity, fisher_weight, _v_ceiling, directions)


def a_optimal(width: int) -> Criterion:
    """Trace of the inverse information: a pair gains its fall, v x^T A^-2 x / (1 + v q). `v_optimal` of the axes.

    Args:
      width: F, features of a response.

    Returns:
      The criterion; its gains are in squared units of a weight of the last layer.

    Example:
      Under the prior precision 2 I, the variances of F = 2 weights sum to 1; one label takes away a fifth.

      >>> import numpy as np, jarm
      >>> features, rewards = np.array([[0.0, 0], [1, 0], [0, 2]]), np.zeros(3)  # [N, F], [N] in logits
      >>> pairs, criterion = [[0, 1], [0, 2], [1, 2]], jarm.a_optimal(2)
      >>> batch = jarm.select(features, rewards, space=pairs, k=1, criterion=criterion, prior_precision=2.0)
      >>> batch.pairs.tolist(), batch.gains.round(3).tolist()
      ([[1, 2]], [0.192])
    """
    return sum_of_variances(jnp.eye(width, dtype=jnp.float32))


def fall_of_variance(margin: Array, q: Array, c: Array, h: Array) -> Array:
    """The worth of `v_optimal`: v |c|^2 / (1 + v q)."""
    v = fisher_weight(margin)
    return v * square_sum(c) / (1 + v * q)


def _fall_of_variance_tile(rows: Numbers, columns: Numbers, h: Array) -> Array:
    def score(v: Array) -> Array:
        q = jnp.maximum(distances(rows.y, columns.y), 0)
        return v * distances(rows.c, columns.c) / (1 + v * q)

    return with_weights(score, rows.reward, columns.reward)


def _v_ceiling(rest: Array, z: Array, shrunk: Array, bound: Array, threshold: Array) -> Array:
    """`threshold` = t if t M + K - rest + (t - rest) / bound >= M K M, which makes it an upper bound; else infinity.

    The order is that of matrices, M = 1 - shrunk is the inverse information now, and K = z^T z. For u = sqrt(v) y, y
    the whitened difference of a pair, |u|^2 <= bound, and at the pass the pair was worth |z u|^2 / (1 + |u|^2) <= rest,
    so u^T (K - rest) u <= rest. With u^T on its left and u on its right, the inequality then leaves
    |z M u|^2 <= t (1 + u^T M u): the pair is worth at most t now.
    """
    k, left = matmul(z.T, z), jnp.eye(z.shape[1], dtype=jnp.float32) - shrunk
    spare = (threshold - rest) / jnp.maximum(bound, jnp.finfo(bound.dtype).tiny)
    # Rounding may hide this much from the Cholesky factorisation.
    doubt = 4 * jnp.finfo(k.dtype).eps * (jnp.trace(k) + z.shape[1] * threshold)
    matrix = (
        threshold * left
        + k
        + (spare - rest - doubt) * jnp.eye(z.shape[1], dtype=jnp.float32)
        - matmul(matmul(left, k), left)
    )
    _, status = cholesky((matrix + matrix.T) / 2)
    return jnp.where((status == Status.OK) & (threshold >= rest), threshold, jnp.inf)


def epig(targets: Float[Array, "T F"], target_margins: Float[Array, "T"]) -> Criterion:
    """Expected information, in nats, of a pair's label about the label of a target pair, averaged over targets.

    Under the Laplace posterior in its Gaussian form, a label observes the margin with variance 1 / v. A pair then
    gains mean_t -1/2 log(1 - rho_t^2), rho_t^2 = v v_t c_t^2 / ((1 + v q) (1 + v_t h_t)). To first order in rho^2 that
    is `v_optimal` of the targets with weights v_t / (2 T (1 + v_t h_t)), which fall as targets become known. Gains may
    rise as a batch grows and no bound is known, so every choice takes a pass, in memory for N T numbers.

    Args:
      targets: `[T, F]` feature differences of the target pairs.
      target_margins: `[T]` their margins, in logits.

    Source: Bickford Smith et al., Prediction-Oriented Bayesian Active Learning (2023).
    """
    known = jnp.sqrt(fisher_weight(jnp.asarray(target_margins, jnp.float32)))
    # Targets scaled by the root of their Fisher weight have v_t c_t^2 and v_t h_t as their c^2 and h.
    return mean_information(known[:, None] * jnp.asarray(targets, jnp.float32))


def mean_information(scaled: Float[Array | np.ndarray, "T F"]) -> Criterion:
    """`epig` of `[T, F]` targets, of JAX or NumPy, that are scaled by the root of their Fisher weight."""
    return Criterion(information_about, _information_tile, _identity, fisher_weight, None, scaled)


_FACTORS = 4
"""Factors 1 - rho^2 that share a logarithm; more of them might underflow."""


def _information_of(v: Array, q: Array, squares: list[Array], h: list[Array]) -> Array:
    """-1/2 log of the product of 1 - rho_t^2 over a few targets; squares c_t^2."""
    share = v / (1 + v * q)
    # 1 less the product keeps the digits of a product near 1, the product itself those of one near 0.
    less, product = jnp.zeros_like(v), jnp.ones_like(v)
    for square, each in zip(squares, h, strict=True):
        # Cauchy and Schwarz: c^2 <= q h, whatever rounding says.
        rho = share * jnp.minimum(square / (1 + each), q * (each / (1 + each)))
        less += rho * product
        product *= 1 - rho
    near = jnp.minimum(less, 0.5)
    return -0.5 * jnp.where(less < 0.5, jnp.log1p(-near), jnp.log(product))


def _grouped(c: Array) -> Array:
    """Targets (the last axis) in groups of `_FACTORS`, padded with targets about which no pair tells: `[g, f, ...]`."""
    c = jnp.moveaxis(c, -1, 0)
    count = -(-c.shape[0] // _FACTORS)
    padded = jnp.pad(c, ((0, count * _FACTORS - c.shape[0]),) + ((0, 0),) * (c.ndim - 1))
    return padded.reshape(count, _FACTORS, *c.shape[1:])


def information_about(margin: Array, q: Array, c: Array, h: Array) -> Array:
    """The worth of `epig`, of targets scaled by the root of their weight."""
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
    limit = MAX_QUADRATURE_VARIANCE
    near = quadrature_information(margin, jnp.minimum(q, limit))
    # Few tiles have a margin of so large a variance.
    far = jax.lax.cond(q.max() > limit, lambda: mixture_information(margin, jnp.maximum(q, limit)), lambda: near)
    return jnp.where(q <= limit, near, far)


BALD = Criterion(_mutual, _mutual_tile, _identity, fisher_weight, _falls)
"""Mutual information, in nats, of a pair's label and the last layer under the Laplace posterior: `mutual_information`.

It rises with q, and q falls as a batch grows, so no pair gains more than earlier. Houlsby et al. 2011 (1112.5745).
"""
