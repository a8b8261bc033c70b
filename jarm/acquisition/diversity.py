"""Rules that spread the batch: over feature differences x = phi_i - phi_j, away from the labelled pairs and each other.

The order of the responses of a pair means nothing, so distances are up to sign: d(x, y)^2 = min |x -+ y|^2 = |x|^2 +
|y|^2 - 2 |x^T y|. Products with a centre are differences of two numbers of responses, so a pick costs S + N F for S
pairs, and pairs are never built.

Candidates are all pairs of a `listed` space and of any other of at most `CANDIDATES` pairs. From a larger space the
rules draw `CANDIDATES` pairs at random (or 4 k, if more), the only chance in rules that are otherwise deterministic.
Pairs of equal features, which tell nothing, come last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import Belief, HParams, PairSpace, Selection
from jarm.core.linalg import matmul, square_sum
from jarm.core.status import Status, worst
from jarm.core.types import Array, Bool, Float, Int, PRNGKey
from jarm.design.fisher import centred, chunked
from jarm.design.spaces import TILE, as_list, compact, is_in, max_pairs, subset
from jarm.design.top import best_first

CANDIDATES = 10_000
"""Candidates where a space is not listed and holds more pairs."""
_CHUNK = 16
"""Labelled pairs whose distances are computed at once."""


class Points(NamedTuple):
    """Pairs as points g = scale (phi_i - phi_j).

    Attributes:
      pairs: `[M, 2]` as the space has them.
      ends: `[M, 2]` the rows of `phi` they join.
      phi: `[n, F]` centred features.
      scale: `[M]`.
      square: `[M]` |g|^2.
      valid: `[M]` bool, pairs of the space.
      informative: `[M]` bool, pairs of the space with x != 0.
      nonfinite: whether a feature, or a reward in use, of an eligible response is not finite.
    """

    pairs: Int[Array, "M 2"]
    ends: Int[Array, "M 2"]
    phi: Float[Array, "n F"]
    scale: Float[Array, "M"]
    square: Float[Array, "M"]
    valid: Bool[Array, "M"]
    informative: Bool[Array, "M"]
    nonfinite: Bool[Array, ""]

    def point(self, place: Int[Array, ""]) -> Float[Array, "F"]:
        """One point."""
        first, second = self.ends[place]
        return self.scale[place] * (self.phi[first] - self.phi[second])

    def products(self, centres: Float[Array, "c F"]) -> Float[Array, "M c"]:
        """g^T c of each point with each centre."""
        products = matmul(self.phi, centres.T)
        return self.scale[:, None] * (products[self.ends[:, 0]] - products[self.ends[:, 1]])

    def distances(self, centres: Float[Array, "c F"]) -> Float[Array, "M c"]:
        """d(g, c)^2."""
        squares = self.square[:, None] + square_sum(centres)[None, :] - 2 * jnp.abs(self.products(centres))
        return jnp.maximum(squares, 0)


def candidates(key: PRNGKey, space: PairSpace, k: int) -> PairSpace:
    """The space as a list; of one that may hold more than `CANDIDATES` pairs, a list of pairs drawn uniformly."""
    if space.pairs is not None:
        return space
    size, width = space.eligible.shape[0], space.width
    within = space.kind == "within"
    count = max(CANDIDATES, 4 * k)
    if max_pairs(space) > count:
        return subset(key, space, count)
    first, second = jnp.triu_indices(width if within else size, 1)
    pairs = jnp.stack([first, second], axis=1).astype(jnp.int32)
    if within:
        starts = jnp.arange(0, size, width, dtype=jnp.int32)
        pairs = (starts[:, None, None] + pairs[None]).reshape(-1, 2)
    return as_list(space, jnp.where(is_in(space, pairs)[:, None], pairs, size))


def make_points(
    belief: Belief, space: PairSpace, scale: Callable[[Float[Array, "M"]], Float[Array, "M"]] | None = None
) -> Points:
    """The pairs of a listed space as points; `scale` maps margins to scales, None ignores rewards and scales by 1."""
    assert space.pairs is not None
    size, width = belief.features.shape
    rewards = jnp.zeros(size, jnp.float32) if scale is None else jnp.where(space.eligible, belief.rewards, 0)
    finite = jnp.isfinite(belief.features).all(axis=1) & jnp.isfinite(rewards)
    phi, ends = centred(belief.features, space), space.pairs
    valid = (ends[:, 0] < size) & space.eligible[jnp.minimum(ends, size - 1)].all(axis=1)
    if 2 * len(ends) < size:
        responses, local = compact(space)
        assert local.pairs is not None
        phi, rewards, ends = phi[responses], rewards[responses], local.pairs
    ends = jnp.minimum(ends, phi.shape[0] - 1)

    def square(ends: Int[Array, "m 2"]) -> Float[Array, "m"]:
        return square_sum(phi[ends[:, 0]] - phi[ends[:, 1]])

    chunks = chunked(ends, max(1, TILE // width), 0)
    lengths = jax.lax.map(square, chunks).reshape(-1)[: len(ends)]
    scales = jnp.ones(len(ends), jnp.float32) if scale is None else scale(rewards[ends[:, 0]] - rewards[ends[:, 1]])
    return Points(
        pairs=space.pairs,
        ends=ends,
        phi=phi,
        scale=scales,
        square=jnp.square(scales) * lengths,
        valid=valid,
        informative=valid & (lengths > 0),
        nonfinite=~(finite | ~space.eligible).all(),
    )


class _State(NamedTuple):
    """A growing batch: squared distance to the nearest centre, its index, and whether a pair may be chosen."""

    near: Float[Array, "M"]
    owner: Int[Array, "M"]
    left: Bool[Array, "M"]


Choose = Callable[[Float[Array, "n"], Float[Array, "M"], Bool[Array, "M"], Int[Array, "M"]], Int[Array, ""]]
"""`(noise, squared distances, allowed, nearest centres) -> place`."""


def _spread(
    noise: Float[Array, "k n"],
    points: Points,
    labelled: Float[Array, "L F"],
    num_labelled: Int[Array, ""],
    choose: Choose,
) -> Selection:
    """A point for each row of noise, chosen by its distance from the labelled points and those chosen before."""
    capacity, k = labelled.shape[0], len(noise)

    def add_labelled(index: Int[Array, ""], state: _State) -> _State:
        numbers = index * _CHUNK + jnp.arange(_CHUNK, dtype=jnp.int32)
        squares = points.distances(labelled[jnp.minimum(numbers, capacity - 1)])
        squares = jnp.where(numbers[None, :] < num_labelled, squares, jnp.inf)
        place, nearest = squares.argmin(axis=1).astype(jnp.int32), squares.min(axis=1)
        owner = jnp.where(nearest < state.near, index * _CHUNK + place, state.owner)
        return state._replace(near=jnp.minimum(state.near, nearest), owner=owner)

    def pick(state: _State, step: tuple[Array, Array]) -> tuple[_State, tuple[Array, Array]]:
        noise, number = step
        # The origin is the centre before there is any.
        squares = jnp.where(jnp.isinf(state.near), points.square, state.near)
        informative = state.left & points.informative
        allowed = jnp.where(informative.any(), informative, state.left)
        place = choose(noise, squares, allowed, state.owner)
        new = points.distances(points.point(place)[None])[:, 0]
        owner = jnp.where(new < state.near, capacity + number, state.owner)
        state = _State(jnp.minimum(state.near, new), owner, state.left.at[place].set(False))
        return state, (place, jnp.sqrt(squares[place]))

    state = _State(
        near=jnp.full(points.square.shape, jnp.inf, jnp.float32),
        owner=jnp.zeros(points.square.shape, jnp.int32),
        left=points.valid,
    )
    if capacity:
        state = jax.lax.fori_loop(0, -(-num_labelled // _CHUNK), add_labelled, state)
    steps = (noise, jnp.arange(k, dtype=jnp.int32))
    _, (chosen, gains) = jax.lax.scan(pick, state, steps)
    valid = jnp.arange(k, dtype=jnp.int32) < points.valid.sum(dtype=jnp.int32)
    finite = (jnp.isfinite(labelled).all(axis=1) | (jnp.arange(capacity, dtype=jnp.int32) >= num_labelled)).all()
    finite &= jnp.isfinite(gains).all() & ~points.nonfinite
    status = worst(
        jnp.where(valid.all(), Status.OK, Status.EXHAUSTED),
        jnp.where((valid & ~points.informative[chosen]).any(), Status.UNINFORMATIVE, Status.OK),
    )
    return best_first(
        Selection(
            pairs=jnp.where(valid[:, None], points.pairs[chosen], 0),
            gains=jnp.where(valid, gains, 0),
            valid=valid,
            status=jnp.where(finite, status, Status.NONFINITE),
        )
    )


def _rule(
    key: PRNGKey,
    belief: Belief,
    space: PairSpace,
    k: int,
    choose: Choose,
    *,
    chance: bool = False,
    scale: Callable[[Array], Array] | None = None,
) -> Selection:
    key_space, key_noise = jax.random.split(key)
    points = make_points(belief, candidates(key_space, space, k), scale)
    noise = noise_of(key_noise, k, len(points.pairs)) if chance else jnp.zeros((k, 0), jnp.float32)
    labelled = belief.labelled_features[:, 0] - belief.labelled_features[:, 1]
    if scale is not None:
        labelled = scale(belief.labelled_rewards[:, 0] - belief.labelled_rewards[:, 1])[:, None] * labelled
    return _spread(noise, points, labelled, belief.num_labelled, choose)


def _farthest(noise: Array, squares: Array, allowed: Array, owner: Array) -> Int[Array, ""]:
    return jnp.where(allowed, squares, -1).argmax().astype(jnp.int32)


def _sides(count: int) -> tuple[int, int]:
    """Number of blocks for `count` places, and places per block."""
    side = max(1, math.isqrt(count))
    return -(-count // side), side


def noise_of(key: PRNGKey, draws: int, count: int) -> Float[Array, "draws n"]:
    """Gumbel noise for that many calls of `draw`, one row each, about 2 sqrt(count) numbers wide."""
    return jax.random.gumbel(key, (draws, sum(_sides(count))), jnp.float32)


def draw(noise: Float[Array, "n"], weights: Float[Array, "M"], allowed: Bool[Array, "M"]) -> Int[Array, ""]:
    """The place of one allowed point, with probability proportional to the weights; uniformly where all are 0."""
    weights = jnp.where(allowed, weights, 0)
    weights = jnp.where(weights.max() > 0, weights, allowed.astype(weights.dtype))
    # First a block, then a place in it.
    count, side = _sides(len(weights))
    blocks = jnp.pad(weights, (0, count * side - len(weights))).reshape(count, side)
    block = (jnp.log(blocks.sum(axis=1)) + noise[:count]).argmax().astype(jnp.int32)
    return block * side + (jnp.log(blocks[block]) + noise[count:]).argmax().astype(jnp.int32)


def _drawn(noise: Array, squares: Array, allowed: Array, owner: Array) -> Int[Array, ""]:
    return draw(noise, squares, allowed)


def k_centre(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Farthest first: each pair is the one farthest from the nearest pair that is labelled or chosen.

    The greedy k-centre on x = phi_i - phi_j up to sign. Without labelled pairs the longest x is first, as in MaxDist.
    Gain: d(x, nearest centre). Candidates: see the module.

    Source: Sener & Savarese (arXiv 1708.00489); MaxDist of Holzmueller et al. (arXiv 2203.09410).
    """
    return _rule(key, belief, space, k, _farthest)


def kmeans_pp(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Seeds of k-means++: pairs drawn by their squared distance from labelled and chosen pairs.

    P(x) ~ d(x, nearest centre)^2, centres the labelled pairs and the batch so far, x = phi_i - phi_j up to sign;
    without labelled pairs the first has P(x) ~ |x|^2.
    Gain: d(x, nearest centre) when drawn; the batch is listed by it. Candidates: see the module.

    Source: Arthur & Vassilvitskii (2007), as a rule of active learning in Holzmueller et al. (arXiv 2203.09410).
    """
    return _rule(key, belief, space, k, _drawn, chance=True)


def _doubt(margin: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """1 - p, p the probability of the likelier label, from the smaller exponential, which underflows late."""
    return jax.nn.sigmoid(-jnp.abs(margin))


def badge(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """BADGE: k-means++ seeds among the gradients of the likelier labels: uncertain and diverse at once.

    g = (1 - p) x, p = sigmoid(|m|): the gradient of the last layer for the loss of the likelier label. P(g) ~ d(g,
    nearest centre)^2, centres the gradients of the labelled pairs and of the batch so far.
    Gain: d(g, nearest centre) when drawn; the batch is listed by it. Candidates: see the module.

    Source: Ash et al. (arXiv 1906.03671), without the labelled pairs, and with the largest gradient first. The sign of
    g is that of the label, a coin flip near a tie, so distances are up to sign.
    """
    return _rule(key, belief, space, k, _drawn, chance=True, scale=_doubt)


def lcmd(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Largest cluster, maximum distance: each pair is the farthest from its centre in the cluster of largest size.

    A cluster holds the pairs nearest to the same labelled or chosen pair; its size is the sum of d(x, centre)^2, x =
    phi_i - phi_j up to sign. Without labelled pairs the longest x is first.
    Gain: d(x, centre) when chosen; the batch is listed by it. Candidates: see the module.

    Source: Holzmueller et al. (arXiv 2203.09410), LCMD-TP.
    """
    clusters = belief.labelled_features.shape[0] + k

    def choose(noise: Array, squares: Array, allowed: Array, owner: Array) -> Int[Array, ""]:
        sizes = jax.ops.segment_sum(jnp.where(allowed, squares, 0), owner, clusters)
        largest = owner == sizes.argmax()
        return jnp.where(allowed, jnp.where(largest, squares, -1), -2).argmax().astype(jnp.int32)

    return _rule(key, belief, space, k, choose)
