"""The two engines that rules are made of: the k best pairs of a space, and the exact greedy D-optimal batch.

Both see a pair only through its margin m = r_i - r_j and a squared distance q = |y_i - y_j|^2 of whitened features,
because every x^T A^-1 x is one: with A = L L^T, y = L^-1 phi. So a tile of n responses against n others costs one
matrix product, and no pair is ever built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.base import PairSpace, Selection, Status
from jarm.data.pairs import TILE, get_tile, pair_count, sample_pairs, tile_count
from jarm.fisher import centred, chunked, fisher_weight
from jarm.linalg import inverse_factor, matmul, worst
from jarm.types import Array, Float, Int, PRNGKey

Score = Callable[[Float[Array, "..."], Float[Array, "..."]], Float[Array, "..."]]
"""`(margin, squared distance) -> score`, elementwise; larger is better."""


def top_pairs(
    score: Score,
    rewards: Float[Array, "N"],
    features: Float[Array, "N F"] | None,
    space: PairSpace,
    k: int,
    *,
    whiten: Float[Array, "G F"] | None = None,
    tile: int = TILE,
) -> Selection:
    """The k pairs of a space with the largest scores, exactly, in O(tile + k) memory.

    Args:
      score: elementwise function of margins and squared distances.
      rewards: `[N]`, for the margins.
      features: `[N, F]`, or None where the score does not look at distances.
      space: which pairs.
      k: how many, a Python int.
      whiten: W `[G, F]`: distances are |W (phi_i - phi_j)|^2; None for the identity.
      tile: pairs scored together, which bounds memory.

    Returns:
      The pairs, best first; equal scores in the order of the space. Status NONFINITE where features or rewards of
      an eligible response, or scores, are not finite, EXHAUSTED where the space holds fewer than k pairs.
    """
    rewards, space = jnp.asarray(rewards, jnp.float32), jax.tree.map(jnp.asarray, space)
    finite = jnp.isfinite(rewards)
    if features is not None:
        features = jnp.asarray(features, jnp.float32)
        finite &= jnp.isfinite(features).all(axis=1)
    best = _best_tiled if space.pairs is None else _best_listed
    gains, pairs = best(score, rewards, features, space, k, whiten, tile)
    # Scores may overflow where features do not, and a NaN comes out on top; but a singular metric is another status.
    singular = jnp.isnan(0.0 if whiten is None else whiten).any()
    fine = (finite | ~space.eligible).all() & (singular | (gains < jnp.inf).all())
    status = jnp.where(fine, jnp.int32(Status.OK), jnp.int32(Status.NONFINITE))
    valid = gains > -jnp.inf
    short = jnp.where(valid.all(), jnp.int32(Status.OK), jnp.int32(Status.EXHAUSTED))
    return Selection(
        pairs=jnp.where(valid[:, None], pairs, 0),
        gains=jnp.where(valid, gains, 0),
        valid=valid,
        status=worst(status, short),
    )


def _best_tiled(
    score: Score, rewards: Array, features: Array | None, space: PairSpace, k: int, whiten: Array | None, tile: int
) -> tuple[Array, Array]:
    """The k best scores and their pairs, tile by tile; -inf where the space holds fewer."""
    if features is not None:
        features = centred(features, space)
        features = features if whiten is None else matmul(features, whiten.T)

    def merge(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        best, pairs = carry
        rows, columns, mask = get_tile(space, index, tile)
        margin = rewards[rows][:, :, None] - rewards[columns][:, None, :]
        distance = jnp.zeros_like(margin)
        if features is not None:
            left, right = features[rows], features[columns]
            square_left, square_right = jnp.square(left).sum(axis=2), jnp.square(right).sum(axis=2)
            product = matmul(left, right.swapaxes(1, 2))
            distance = jnp.maximum(square_left[:, :, None] + square_right[:, None, :] - 2 * product, 0)
        scores = jnp.where(mask, score(margin, distance), -jnp.inf).reshape(-1)
        # Without the barrier XLA fuses `some[0]` with the top-k, no longer knows it, and sorts the whole tile.
        some, flat = jax.lax.optimization_barrier(jax.lax.top_k(scores, min(k, scores.shape[0])))

        def better(_: None) -> tuple[Array, Array]:
            group, place = jnp.divmod(flat, rows.shape[1] * columns.shape[1])
            first, second = jnp.divmod(place, columns.shape[1])
            found = jnp.stack([rows[group, first], columns[group, second]], axis=1)
            values, order = jax.lax.top_k(jnp.concatenate([best, some]), k)
            return values, jnp.concatenate([pairs, found])[order]

        return jax.lax.cond(some[0] <= best[-1], lambda _: (best, pairs), better, None), None  # a NaN is better

    start = (jnp.full(k, -jnp.inf, rewards.dtype), jnp.full((k, 2), rewards.shape[0], jnp.int32))
    return jax.lax.scan(merge, start, jnp.arange(tile_count(space, tile), dtype=jnp.int32))[0]


def _best_listed(
    score: Score, rewards: Array, features: Array | None, space: PairSpace, k: int, whiten: Array | None, tile: int
) -> tuple[Array, Array]:
    """As `_best_tiled`, but all scores are kept, 4 bytes a pair where the list itself has 8, for a single top-k."""
    assert space.pairs is not None
    size = space.eligible.shape[0]
    width = 1 if features is None else features.shape[1]
    # A quarter of a tile, so that the differences of a chunk stay in a core's own cache.
    chunks = chunked(space.pairs, max(1, tile // (4 * width)), size)
    if features is not None and whiten is not None and size < space.pairs.shape[0]:
        # Cheaper once a response than once a pair.
        features, whiten = matmul(centred(features, space), whiten.T), None

    def scored(pairs: Array) -> Array:
        first, second = jnp.minimum(pairs, size - 1).T
        margin = rewards[first] - rewards[second]
        distance = jnp.zeros_like(margin)
        if features is not None:
            difference = features[first] - features[second]
            difference = difference if whiten is None else matmul(difference, whiten.T)
            # A product with ones: XLA's row sums on a CPU take twice as long.
            distance = matmul(jnp.square(difference), jnp.ones(difference.shape[1], difference.dtype))
        return jnp.where(pairs[:, 0] < size, score(margin, distance), -jnp.inf)

    scores = jax.lax.map(scored, chunks).reshape(-1)
    lacking = max(0, k - scores.shape[0])
    best, chosen = jax.lax.top_k(scores, k - lacking)
    pairs = jnp.pad(chunks.reshape(-1, 2)[chosen], ((0, lacking), (0, 0)))
    return jnp.pad(best, (0, lacking), constant_values=-jnp.inf), pairs


def random_pairs(key: PRNGKey, space: PairSpace, k: int) -> Selection:
    """k distinct pairs of a space, uniformly without replacement; gains are 0."""
    pairs, valid = sample_pairs(key, space, k)
    short = jnp.where(valid.all(), jnp.int32(Status.OK), jnp.int32(Status.EXHAUSTED))
    return Selection(pairs=pairs, gains=jnp.zeros(k, jnp.float32), valid=valid, status=short)


class _Greedy(NamedTuple):
    """State of `greedy_log_det` between two full passes over the space."""

    picked: Int[Array, ""]
    passes: Int[Array, ""]
    pairs: Int[Array, "k 2"]
    gains: Float[Array, "k"]
    information: Float[Array, "F F"]
    status: Int[Array, ""]


class GreedyInfo(NamedTuple):
    """What exact greedy reports beside its batch: how many full passes over the space it took."""

    passes: Int[Array, ""]


def greedy_log_det(
    features: Float[Array, "N F"],
    rewards: Float[Array, "N"],
    space: PairSpace,
    prior: Float[Array, "F F"],
    k: int,
    *,
    shortlist: int = 1024,
    tile: int = TILE,
) -> tuple[Selection, GreedyInfo]:
    """Grow a batch one pair at a time, each the best of the whole space for log det of the information.

    Gain of a pair given the information A so far: log(1 + v x^T A^-1 x). Gains never increase as A grows, so after
    a full pass over the space that keeps the K best pairs, any of them that still gains at least what the K-th
    gained then beats every pair outside: a choice made inside the shortlist is the choice of the whole space. When
    none does, a new pass is made. Exact up to float32 rounding of the gains.

    Args:
      features: `[N, F]` last-layer features.
      rewards: `[N]` rewards.
      space: which pairs.
      prior: `[F, F]` positive definite information to start from (past labels and prior).
      k: pairs to pick, a Python int.
      shortlist: K, pairs kept by a full pass.
      tile: pairs scored together, which bounds memory.

    Returns:
      The batch in the order of choice, with gains in nats, and how many passes it took. Status SINGULAR where the
      prior is not positive definite, and as `top_pairs` otherwise.
    """
    # NumPy arrays, of any number type, are as good as JAX's.
    features, rewards, prior = (jnp.asarray(each, jnp.float32) for each in (features, rewards, prior))
    space = jax.tree.map(jnp.asarray, space)
    size = space.eligible.shape[0]
    keep = max(shortlist, k)
    available = jnp.minimum(pair_count(space), k).astype(jnp.int32)

    def score(margin: Array, distance: Array) -> Array:
        return fisher_weight(margin) * distance  # the leverage: in the order of the gains

    def full_pass(state: _Greedy) -> _Greedy:
        whiten, singular = inverse_factor(state.information)
        # With room for the k that may be chosen already: finding them here is cheaper than excluding them there.
        best = top_pairs(score, rewards, features, space, keep + k, whiten=whiten, tile=tile)
        left = best.valid & ~(best.pairs[:, None] == state.pairs[None]).all(axis=2).any(axis=1)
        # A shortlist that is not full holds every pair that is left: nothing outside can beat it.
        bound = jnp.where(best.valid[-1], best.gains[-1], -jnp.inf)
        raw = features[best.pairs[:, 0]] - features[best.pairs[:, 1]]
        weight = fisher_weight(rewards[best.pairs[:, 0]] - rewards[best.pairs[:, 1]])
        scaled = jnp.sqrt(weight)[:, None] * matmul(raw, whiten.T)
        leverage = jnp.where(left, jnp.square(scaled).sum(axis=1), -1)
        # Leverages are updated by subtraction, which loses the digits by which they fall: start afresh before it shows.
        bound = jnp.maximum(bound, leverage.max() / 16)

        def pick(inner: tuple[Array, ...]) -> tuple[Array, ...]:
            count, pairs, gains, leverage, inverse, chosen = inner
            index = jnp.argmax(leverage)
            direction = matmul(inverse, scaled[index])
            growth = 1 + leverage[index]
            pairs = pairs.at[count].set(best.pairs[index])
            gains = gains.at[count].set(jnp.log1p(leverage[index]))
            chosen = chosen.at[count].set(jnp.where(count < k, index, 0))
            lower = leverage - jnp.square(matmul(scaled, direction)) / growth
            leverage = jnp.where(leverage < 0, -1, jnp.maximum(lower, 0)).at[index].set(-1)
            inverse = inverse - jnp.outer(direction, direction) / growth
            return count + 1, pairs, gains, leverage, inverse, chosen

        def certified(inner: tuple[Array, ...]) -> Array:
            count, _, _, leverage, _, _ = inner
            most = leverage.max()
            # Right after a pass the best of the shortlist is the best of the space, whatever rounding says.
            fresh = count == state.picked
            return (count < available) & (most >= 0) & (fresh | (most >= bound))

        identity = jnp.eye(prior.shape[0], dtype=prior.dtype)
        start: tuple[Array, ...] = (state.picked, state.pairs, state.gains, leverage, identity, jnp.zeros(k, jnp.int32))
        count, pairs, gains, _, _, chosen = jax.lax.while_loop(certified, pick, start)
        place = jnp.arange(k, dtype=jnp.int32)
        new = (place >= state.picked) & (place < count)
        x = jnp.where(new[:, None], raw[chosen], 0)
        information = state.information + matmul(x.T, weight[chosen][:, None] * x)
        stuck = jnp.where(count == state.picked, jnp.int32(Status.EXHAUSTED), jnp.int32(Status.OK))
        full = jnp.where(best.status == Status.EXHAUSTED, jnp.int32(Status.OK), best.status)
        status = worst(state.status, singular, full, stuck)
        return _Greedy(count, state.passes + 1, pairs, gains, information, status)

    def unfinished(state: _Greedy) -> Array:
        return (state.picked < available) & (state.status == Status.OK)

    start = _Greedy(
        picked=jnp.int32(0),
        passes=jnp.int32(0),
        pairs=jnp.full((k, 2), size, jnp.int32),
        gains=jnp.zeros(k, features.dtype),
        information=prior,
        status=jnp.int32(Status.OK),
    )
    end = jax.lax.while_loop(unfinished, full_pass, start)
    valid = jnp.arange(k, dtype=jnp.int32) < end.picked
    short = jnp.where(available < k, jnp.int32(Status.EXHAUSTED), jnp.int32(Status.OK))
    selection = Selection(
        pairs=jnp.where(valid[:, None], end.pairs, 0),
        gains=end.gains,
        valid=valid,
        status=worst(end.status, short),
    )
    return selection, GreedyInfo(end.passes)
