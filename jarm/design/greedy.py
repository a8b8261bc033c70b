"""Exact greedy selection: a batch grown one pair at a time, each the best of every pair of the space.

A full pass over the space keeps the K best pairs. Where no pair's worth rises as the batch grows, any of them that is
still worth at least what the K-th was beats every pair outside, so a choice made among the K is the choice of the whole
space; where worths may rise, a bound on how much takes the place of the K-th. When no choice can be certified any more,
a new pass is made. The certificate travels with the batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import Limits, PairSpace, Selection
from jarm.core.linalg import cholesky, distances, grown_root, matmul, square_sum
from jarm.core.status import Status, worst
from jarm.core.types import Array, Bool, Float, Int
from jarm.design.criteria import D_OPTIMAL, Criterion, Numbers
from jarm.design.fisher import centred
from jarm.design.passes import best_pairs
from jarm.design.scorer import Scorer
from jarm.design.spaces import TILE, pair_count, whitens_differences

_SLACK = 1e-5
"""By this share a ceiling is raised: what rounding may hide, in a pass, from the pairs left out."""


class GreedyInfo(NamedTuple):
    """What exact greedy reports beside its batch.

    Attributes:
      passes: scalar int32, full passes over the space.
      ceilings: `[k]` the most that a pair outside the shortlist could gain (for its cost) when each pair was chosen:
        certified where not above the gain of the choice. A pair chosen right after a pass needs no certificate.
      fresh: `[k]` bool, whether a pair was chosen right after a pass.
    """

    passes: Int[Array, ""]
    ceilings: Float[Array, "k"]
    fresh: Bool[Array, "k"]


class _State(NamedTuple):
    """Between two passes: the batch so far, and how often responses and prompts are in it.

    Attributes:
      root: R `[F, F]`, triangular: the information with the batch is R^T R. It grows by orthogonal factors, because a
        sum that holds large terms has lost what the prior says of the directions that are left.
    """

    picked: Int[Array, ""]
    passes: Int[Array, ""]
    pairs: Int[Array, "k 2"]
    gains: Float[Array, "k"]
    ceilings: Float[Array, "k"]
    fresh: Bool[Array, "k"]
    root: Float[Array, "F F"]
    uses: Int[Array, "N"]
    prompt_uses: Int[Array, "P"]
    floor: Float[Array, ""]
    ended: Bool[Array, ""]
    status: Int[Array, ""]


class _Inner(NamedTuple):
    """While choices are made from one shortlist.

    Attributes:
      x, z: `[K, F]`, `[G, F]` shortlisted pairs and targets, in coordinates in which the information is the identity:
        variances are squared lengths, which do not lose the digits by which they fall, as by subtraction they would.
      c: `[K, G]` covariances of pairs and targets.
      turn: `[F, F]` U, from the coordinates of the pass to those of x and z.
      left: `[K]` bool, shortlisted pairs that may still be chosen.
      worth: `[K]` what they are worth (for their cost), -inf where not left.
      ceiling: scalar, the most that any other pair may be worth.
      chosen: `[k]` places in the shortlist.
    """

    state: _State
    x: Float[Array, "K F"]
    z: Float[Array, "G F"]
    c: Float[Array, "K G"]
    turn: Float[Array, "F F"]
    left: Bool[Array, "K"]
    worth: Float[Array, "K"]
    ceiling: Float[Array, ""]
    chosen: Int[Array, "k"]


def greedy_log_det(
    features: Float[Array, "N F"],
    rewards: Float[Array, "N"],
    space: PairSpace,
    prior: Float[Array, "F F"],
    k: int,
    *,
    shortlist: int | None = None,
    tile: int = TILE,
) -> tuple[Selection, GreedyInfo]:
    """`greedy` for the log det of the information: gain log(1 + v x^T A^-1 x) nats."""
    return greedy(D_OPTIMAL, features, rewards, space, prior, k, shortlist=shortlist, tile=tile)


def greedy(
    criterion: Criterion,
    features: Float[Array, "N F"],
    rewards: Float[Array, "N"],
    space: PairSpace,
    prior: Float[Array, "F F"],
    k: int,
    *,
    limits: Limits | None = None,
    shortlist: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    tile: int = TILE,
) -> tuple[Selection, GreedyInfo]:
    """Grow a batch one pair at a time, each the best of the whole space given those before it.

    Exact up to float32 rounding of the gains. Where the space has costs, the best is the pair of largest gain for its
    cost, and that quotient is reported as its gain.

    Args:
      criterion: what a pair is worth; see `jarm.design.criteria`.
      features: `[N, F]` last-layer features.
      rewards: `[N]` rewards.
      space: which pairs.
      prior: `[F, F]` positive definite information to start from (past labels and prior).
      k: pairs to pick, a Python int.
      limits: what else a batch has to keep to.
      shortlist: K, pairs kept by a full pass; None for as many as suit the space.
      mesh: devices that share the passes over a space of `cross` or `all` pairs.
      tile: pairs of other spaces scored together, which bounds memory.

    Returns:
      The batch in the order of choice, and its certificate. Status SINGULAR where the prior is not positive definite,
      NONFINITE where features or rewards of an eligible response, or scores, are not finite, EXHAUSTED where the space
      holds fewer than k pairs, LIMITED where the limits leave fewer, UNINFORMATIVE where a pair of the batch gains 0.
    """
    # NumPy arrays, of any number type, are as good as JAX's.
    features, rewards, prior = (jnp.asarray(each, jnp.float32) for each in (features, rewards, prior))
    space = jax.tree.map(jnp.asarray, space)
    limits = Limits() if limits is None else limits
    size, width = features.shape
    home = space.prompt_of
    prompts = space.num_prompts
    finite = jnp.isfinite(rewards) & jnp.isfinite(features).all(axis=1)
    features = centred(features, space)
    rewards = jnp.where(space.eligible, rewards, 0)  # what no pair reaches may be anything
    targets = jnp.zeros((0, width)) if criterion.targets is None else jnp.asarray(criterion.targets, jnp.float32)
    held = pair_count(space)
    # Bounds for targets look at whitened responses.
    late = criterion.targets is None and whitens_differences(space)
    keep = (default_shortlist(space) if shortlist is None else shortlist) + k

    def full_pass(state: _State) -> _State:
        whiten = jax.scipy.linalg.solve_triangular(state.root.T, jnp.eye(width), lower=True)
        y, z = features if late else matmul(features, whiten.T), matmul(targets, whiten.T)
        numbers, h = Numbers(rewards, y, matmul(y, z.T)), jnp.square(z).sum(axis=1)
        scorer = criterion.scorer(numbers, h, gains=space.costs is not None, whiten=whiten if late else None)
        if limits.similarity is not None:
            scorer = _guarded(scorer, features, state, limits.similarity)
        allowed = dataclasses.replace(space, eligible=space.eligible & _allowed(state, limits, home))
        best = best_pairs(scorer, allowed, keep, floor=state.floor, mesh=mesh, tile=tile)

        first, second = jnp.minimum(best.pairs, size - 1).T
        raw, margin = features[first] - features[second], rewards[first] - rewards[second]
        x = matmul(raw, whiten.T) if late else y[first] - y[second]
        weight = criterion.weight(margin)
        far = 4 * jnp.square(y).sum(axis=1).max() * criterion.weight(jnp.zeros(()))

        def worth(x: Array, z: Array, c: Array, left: Array) -> Array:
            q, h = jnp.square(x).sum(axis=1), jnp.square(z).sum(axis=1)
            own = jax.vmap(criterion.worth, in_axes=(0, 0, 0, None))(margin, q, c, h)
            own = own if best.costs is None else criterion.gain(own) / best.costs
            return jnp.where(left, own, -jnp.inf)

        def ceiling(turn: Array, most: Array) -> Array:
            if criterion.ceiling is None or (best.costs is not None and criterion.targets is not None):
                bound = jnp.float32(jnp.inf)
            else:
                gone = jnp.eye(width) - matmul(turn.T, turn)
                bound = criterion.ceiling(best.rest, z, gone, far, most / (1 + _SLACK))
            # A shortlist that is not full holds every pair that is left: nothing outside can beat it.
            return jnp.where(best.rest > -jnp.inf, bound * (1 + _SLACK), -jnp.inf)

        def pick(inner: _Inner) -> _Inner:
            state, place = inner.state, jnp.argmax(inner.worth)
            most = inner.worth[place]
            ahead = jnp.sqrt(weight[place]) * inner.x[place]
            grown = jnp.sqrt(1 + jnp.square(ahead).sum())
            shrink = ahead / jnp.sqrt(grown * (1 + grown))
            x, z, turn = (a - jnp.outer(matmul(a, shrink), shrink) for a in (inner.x, inner.z, inner.turn.T))
            c = inner.c - jnp.outer(matmul(inner.x, ahead), matmul(inner.z, ahead) / jnp.square(grown))
            ends = jnp.stack([first[place], second[place]])
            homes = home[ends]
            same = homes[0] == homes[1]
            state = state._replace(
                picked=state.picked + 1,
                pairs=state.pairs.at[state.picked].set(best.pairs[place]),
                gains=state.gains.at[state.picked].set(most if best.costs is not None else criterion.gain(most)),
                ceilings=state.ceilings.at[state.picked].set(inner.ceiling),
                fresh=state.fresh.at[state.picked].set(state.picked == start.picked),
                uses=state.uses.at[ends].add(1),
                prompt_uses=state.prompt_uses.at[homes].add(jnp.stack([1, jnp.where(same, 0, 1)])),
            )
            left = inner.left.at[place].set(False)
            if limits.per_prompt is not None or limits.per_response is not None:
                allowed = _allowed(state, limits, home)
                left &= allowed[first] & allowed[second]
            if limits.similarity is not None:
                left &= ~_alike(matmul(raw, raw[place]), raw, raw[place], limits.similarity)
            chosen = inner.chosen.at[state.picked - 1].set(place)
            after = worth(x, z, c, left)
            return _Inner(state, x, z, c, turn.T, left, after, ceiling(turn.T, after.max()), chosen)

        def certified(inner: _Inner) -> Array:
            most = inner.worth.max()
            # Right after a pass the best of the shortlist is the best of the space, whatever rounding says. Later,
            # what is updated loses the digits by which it falls: start afresh before it shows.
            fresh = inner.state.picked == start.picked
            good = fresh | ((most >= inner.ceiling) & (most >= freshest * least))
            return (inner.state.picked < k) & (most > -jnp.inf) & good

        start = state
        left = (best.scores > -jnp.inf) & ~(best.pairs[:, None] == state.pairs[None]).all(axis=2).any(axis=1)
        c, turn = numbers.c[first] - numbers.c[second], jnp.eye(width)
        before = worth(x, z, c, left)
        freshest, least = before.max(), 2.0**-8 if criterion.targets is None else 2.0**-4
        inner = _Inner(state, x, z, c, turn, left, before, ceiling(turn, freshest), jnp.zeros(k, jnp.int32))
        inner = jax.lax.while_loop(certified, pick, inner)
        state = inner.state
        new = (jnp.arange(k) >= start.picked) & (jnp.arange(k) < state.picked)
        added = jnp.where(new[:, None], jnp.sqrt(weight[inner.chosen])[:, None] * raw[inner.chosen], 0)
        overflow = jnp.where(jnp.isnan(whiten).any() | (best.scores < jnp.inf).all(), Status.OK, Status.NONFINITE)
        stuck, lowest = state.picked == start.picked, jnp.where(inner.left, inner.worth, jnp.inf).min()
        return state._replace(
            passes=state.passes + 1,
            root=grown_root(state.root, added),
            # What is left of this shortlist, the next will reach at least, but for rounding: if it finds nothing, the
            # one after it looks everywhere.
            floor=jnp.where(stuck | ~inner.left.any(), -jnp.inf, lowest * (1 - _SLACK)),
            ended=stuck & ~(start.floor > -jnp.inf),
            status=worst(state.status, overflow),
        )

    def unfinished(state: _State) -> Array:
        return (state.picked < jnp.minimum(held, k)) & ~state.ended & (state.status == Status.OK)

    unusable = ~(finite | ~space.eligible).all()
    root, singular = cholesky(prior)
    begin = _State(
        picked=jnp.int32(0),
        passes=jnp.int32(0),
        pairs=jnp.full((k, 2), size, jnp.int32),
        gains=jnp.zeros(k, jnp.float32),
        ceilings=jnp.zeros(k, jnp.float32),
        fresh=jnp.zeros(k, bool),
        root=root.T,
        uses=jnp.zeros(size, jnp.int32),
        prompt_uses=jnp.zeros(prompts, jnp.int32),
        floor=jnp.float32(-jnp.inf),
        ended=jnp.bool_(False),
        status=jnp.where(unusable, jnp.int32(Status.NONFINITE), singular),
    )
    end = jax.lax.while_loop(unfinished, full_pass, begin)
    valid = jnp.arange(k, dtype=jnp.int32) < end.picked
    short = jnp.where(held < k, Status.EXHAUSTED, jnp.where(end.picked < k, Status.LIMITED, Status.OK))
    idle = jnp.where((valid & (end.gains <= 0)).any(), Status.UNINFORMATIVE, Status.OK)
    status = worst(end.status, short, idle)
    pairs = jnp.where(valid[:, None], end.pairs, 0)
    info = GreedyInfo(end.passes, _in_gains(criterion, space, end), end.fresh)
    return Selection(pairs, end.gains, valid, status), info


def default_shortlist(space: PairSpace) -> int:
    """Pairs for a pass to keep: more where a pass costs more."""
    size = space.eligible.shape[0]
    return 1024 if space.pairs is not None or space.kind == "within" or size <= 16_384 else 8192


def _in_gains(criterion: Criterion, space: PairSpace, end: _State) -> Float[Array, "k"]:
    """Ceilings in the units of the gains."""
    if space.costs is not None:
        return end.ceilings
    return jnp.where(end.ceilings > 0, criterion.gain(jnp.maximum(end.ceilings, 0)), end.ceilings)


def _allowed(state: _State, limits: Limits, home: Int[Array, "N"]) -> Bool[Array, "N"]:
    """Responses that may be in one more pair."""
    allowed = jnp.ones(state.uses.shape, bool)
    if limits.per_response is not None:
        allowed &= state.uses < limits.per_response
    if limits.per_prompt is not None:
        room = state.prompt_uses < limits.per_prompt
        allowed &= room[home]
    return allowed


def _alike(product: Array, x: Float[Array, "*m F"], other: Float[Array, "F"], similarity: Array | float) -> Array:
    """Whether the cosine of two differences with this product is at least `similarity`, in either direction."""
    both = jnp.square(x).sum(axis=-1) * jnp.square(other).sum()
    return (jnp.square(product) >= jnp.square(similarity) * both) & (both > 0)


def _guarded(scorer: Scorer, features: Float[Array, "N F"], state: _State, similarity: Array | float) -> Scorer:
    """-inf for near-copies of the pairs of the batch: a product more, and a comparison a pair for each pick."""
    ends = jnp.minimum(state.pairs, features.shape[0] - 1)
    picks = features[ends[:, 0]] - features[ends[:, 1]]
    length = jnp.sqrt(jnp.square(picks).sum(axis=1))
    # Products with picks of length 1; of picks with equal ends nothing is a copy.
    along = matmul(features, (picks / jnp.where(length > 0, length, 1)[:, None]).T)
    least, eps = jnp.square(similarity), jnp.finfo(features.dtype).eps

    def mask(square: Array, doubt: Array | float, a: Array, b: Array, scores: Array) -> Array:
        def more(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            place, found = carry
            ends = (jax.lax.dynamic_index_in_dim(each, place, -1, keepdims=False) for each in (a, b))
            off = jnp.subtract(*ends) if not scores.ndim else jnp.subtract.outer(*ends)
            return place + 1, found | ((jnp.square(off) >= least * square + doubt) & (square > 0) & (length[place] > 0))

        start = (jnp.int32(0), jnp.zeros(scores.shape, bool))
        _, found = jax.lax.while_loop(lambda carry: carry[0] < state.picked, more, start)
        return jnp.where(found, -jnp.inf, scores)

    def pair(a: tuple[Any, Array, Array], b: tuple[Any, Array, Array]) -> Array:
        return mask(square_sum(a[1] - b[1]), 0.0, a[2], b[2], scorer.pair(a[0], b[0]))

    def tile(rows: tuple[Any, Array, Array], columns: tuple[Any, Array, Array]) -> Array:
        # What only rounding makes a copy stays in: `pair`, which looks at the best again, tells exactly.
        doubt = 16 * eps * (square_sum(rows[1])[:, None] + square_sum(columns[1])[None, :])
        return mask(distances(rows[1], columns[1]), doubt, rows[2], columns[2], scorer.tile(rows[0], columns[0]))

    return Scorer((scorer.stats, features, along), pair, tile, order=scorer.order)
