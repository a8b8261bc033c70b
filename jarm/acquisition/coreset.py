"""Coresets for logistic regression: pairs drawn by their sensitivity, a bound on their share of the log likelihood."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jarm.acquisition.diversity import Points, candidates, draw, make_points, noise_of
from jarm.core.base import Belief, HParams, PairSpace, Selection
from jarm.core.linalg import matmul, square_sum
from jarm.core.status import Status, worst
from jarm.core.types import Array, Float, Int, PRNGKey
from jarm.design.top import best_first

CLUSTERS = 10
"""Centres of k-means, as released."""
ROUNDS = 5
"""Steps of k-means after its seeds; the released single step changes the sensitivities."""
RADIUS = 3.0
"""Size of the ball of parameters, in units of 1 / the root mean square distance from the centres."""


def coreset(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs drawn without replacement by their sensitivity: pairs unlike most others are likelier.

    m_n = N / (1 + sum_i |G_i| exp(-R |x_n - mean of G_i|)), G_i the clusters of k-means (10 centres) on x = phi_i -
    phi_j, without pair n itself; distances and means are up to the sign of x. The k pairs of largest log m + Gumbel
    noise are a draw without replacement, each next pair with probability proportional to m among the pairs left.
    Gain: m_n; the batch is listed by it. Weights, about proportional to 1 / m, make the weighted likelihood of the
    batch that of the whole space. Candidates: see `jarm.acquisition.diversity`.

    Source: Huggins, Campbell, Broderick (arXiv 1605.06423), as called by the released rules of arXiv 2502.04354. The
    released rules draw *with* replacement, so that a pair is labelled twice, and drop the weights that make the draw a
    coreset. R is 3 over the root mean square distance from the centres, an option of the published code, whose default
    is R = 1 in the units of the features. The weights are those of priority sampling (Duffield, Lund, Thorup, J. ACM
    54, 2007) with exponential priorities.
    """
    key_space, key_seeds, key_draw = jax.random.split(key, 3)
    points = make_points(belief, candidates(key_space, space, k))
    sensitivity = sensitivities(points, *clusters(key_seeds, points))
    noise = jax.random.gumbel(key_draw, sensitivity.shape, jnp.float32)
    # Pairs of equal features tell nothing: they come last.
    ticket = jnp.where(points.informative, jnp.log(sensitivity) + noise, jnp.where(points.valid, noise - 1e6, -jnp.inf))
    best, chosen = jax.lax.top_k(ticket, min(k + 1, len(ticket)))
    weights = drawn_weights(sensitivity[chosen[:k]], best[k] if len(best) > k else jnp.float32(-jnp.inf))
    best, chosen = best[:k], chosen[:k]
    missing = k - len(chosen)
    valid = jnp.pad(best > -jnp.inf, (0, missing))
    chosen = jnp.pad(chosen, (0, missing))
    gains = sensitivity[chosen]
    weights = jnp.where(valid, jnp.pad(weights, (0, missing)), 0)
    weights *= valid.sum(dtype=jnp.float32) / jnp.maximum(weights.sum(), jnp.finfo(jnp.float32).tiny)
    status = worst(
        jnp.where(valid.all(), Status.OK, Status.EXHAUSTED),
        jnp.where((valid & ~points.informative[chosen]).any(), Status.UNINFORMATIVE, Status.OK),
    )
    nonfinite = points.nonfinite | ~jnp.isfinite(gains).all()
    return best_first(
        Selection(
            pairs=jnp.where(valid[:, None], points.pairs[chosen], 0),
            gains=jnp.where(valid, gains, 0),
            valid=valid,
            status=jnp.where(nonfinite, Status.NONFINITE, status),
            weights=jnp.where(valid, weights, 1),
        )
    )


def drawn_weights(sensitivity: Float[Array, "k"], left_out: Float[Array, ""]) -> Float[Array, "k"]:
    """1 / the chance that a pair is drawn, given the largest log m + Gumbel noise of the pairs left out."""
    return 1 / -jnp.expm1(-sensitivity * jnp.exp(-left_out))


def clusters(key: PRNGKey, points: Points) -> tuple[Float[Array, "c F"], Int[Array, "M"]]:
    """`[c, F]` means of the k-means clusters of the points up to sign, and `[M]` cluster of each point."""

    def seed(near: Float[Array, "M"], noise: Float[Array, "n"]) -> tuple[Float[Array, "M"], Float[Array, "F"]]:
        place = draw(noise, near, points.valid)
        centre = points.point(place)
        return jnp.minimum(near, points.distances(centre[None])[:, 0]), centre

    # The first seed is uniform.
    near = jnp.full(points.square.shape, jnp.finfo(jnp.float32).max / len(points.square), jnp.float32)
    _, centres = jax.lax.scan(seed, near, noise_of(key, CLUSTERS, len(points.pairs)))

    def improve(_: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        centres, _ = state
        products = points.products(centres)
        owner = (square_sum(centres)[None, :] - 2 * jnp.abs(products)).argmin(axis=1).astype(jnp.int32)
        own = owner[:, None] == jnp.arange(CLUSTERS, dtype=jnp.int32)[None, :]
        # A pair or its mirror enters the mean, whichever is nearer to the centre.
        share = jnp.where(own & points.valid[:, None], jnp.where(products < 0, -1.0, 1.0), 0)
        share /= jnp.maximum(jnp.abs(share).sum(axis=0), 1)[None, :]
        of_response = jnp.zeros((points.phi.shape[0], CLUSTERS), jnp.float32)
        of_response = of_response.at[points.ends[:, 0]].add(share).at[points.ends[:, 1]].add(-share)
        return matmul(of_response.T, points.phi), owner

    return jax.lax.fori_loop(0, ROUNDS, improve, (centres, jnp.zeros(points.square.shape, jnp.int32)))


def sensitivities(points: Points, centres: Float[Array, "c F"], owner: Int[Array, "M"]) -> Float[Array, "M"]:
    """m of each point; leaving a point out of its cluster of n moves the mean away by n / (n - 1)."""
    own = (owner[:, None] == jnp.arange(CLUSTERS, dtype=jnp.int32)[None, :]) & points.valid[:, None]
    sizes = own.sum(axis=0).astype(jnp.float32)
    distances = jnp.sqrt(points.distances(centres))
    count = points.valid.sum(dtype=jnp.float32)
    spread = jnp.sqrt((jnp.square(distances) * own.astype(jnp.float32)).sum() / jnp.maximum(count, 1))
    others = sizes[None, :] - own.astype(jnp.float32)
    stretch = jnp.where(own, sizes[None, :] / jnp.maximum(others, 1), 1)
    radius = RADIUS / jnp.where(spread > 0, spread, 1)
    return count / (1 + (others * jnp.exp(-radius * stretch * distances)).sum(axis=1))
