"""BALD for whole batches: what labels tell together (BatchBALD), and BALD with a wide spread of prompts (BAL-PM).

For members m that are equally likely, the labels of a batch are independent given the member. So the joint of the
labels y of a batch is the mixture of the configurations' chances P(y | m), a configuration is seen through its chance
and the posterior w_m = P(m | y), and one more pair c adds E_y [H(sum_m w_m p_mc)] - mean_m H(p_mc): one product of
posteriors `[S, K]` and chances `[K, C]` for all candidates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jarm.acquisition.information import bald_scorer, chance, divergence
from jarm.core.base import Belief, HParams, PairSpace, Selection
from jarm.core.linalg import distances, matmul
from jarm.core.status import Status
from jarm.core.types import Array, Bool, Float, Int, PRNGKey
from jarm.design.greedy import default_shortlist
from jarm.design.passes import best_pairs
from jarm.design.scorer import Scorer
from jarm.design.spaces import most_pairs, pair_count, prompts_of
from jarm.design.top import top_scores

CANDIDATES = 10_000
"""Pairs that `batch_bald` chooses from, where a space that is not listed holds more: those of largest BALD."""
_CONFIGURATIONS = 2048
"""Configurations of labels that are followed: all of those of 11 pairs."""
_TOGETHER = 256
"""Candidates whose gains are computed together."""
_NOTHING = 1e-5
"""Gains below this share of the largest are rounding: then the batch tells nothing more."""


class _Joint(NamedTuple):
    """Configurations of the labels of a batch: their chances, summing to 1, and the posteriors of members."""

    mass: Float[Array, "S"]
    posterior: Float[Array, "S K"]


def _start(count: int, members: int) -> _Joint:
    """No labels: one configuration, and room for more."""
    return _Joint(jnp.zeros(count).at[0].set(1), jnp.full((count, members), 1 / members))


def _extend(joint: _Joint, p: Float[Array, "K"]) -> _Joint:
    """One label more: each configuration becomes two. Where there is no room for all, the likeliest stay as they are
    and the others are thinned out, evenly and without changing any mean but by how they are rounded.

    The optimal resampling of Fearnhead and Clifford (2003), systematic, from the middle: chances pi become inclusion
    probabilities min(pi / c, 1) that sum to S, and what is included has the mass max(pi, c).
    """
    room = joint.mass.shape[0]
    both = jnp.concatenate([joint.posterior * p[None, :], joint.posterior * (1 - p)[None, :]])
    told = both.sum(axis=1)
    mass = jnp.concatenate([joint.mass, joint.mass]) * told
    posterior = both / jnp.maximum(told, jnp.finfo(told.dtype).tiny)[:, None]
    # Alike posteriors stand together, so that what is thinned out has a neighbour that stands for it.
    alike = jnp.lexsort((posterior.max(axis=1), posterior.argmax(axis=1)))
    mass, posterior = mass[alike], posterior[alike]

    falling = -jnp.sort(-mass)
    tail = jnp.cumsum(falling[::-1])[::-1][:room]
    levels = tail / (room - jnp.arange(room))
    level = levels[jnp.argmax(falling[:room] <= levels)]
    certain = mass > level
    partial = jnp.cumsum(jnp.where(certain, 0, mass / jnp.maximum(level, jnp.finfo(mass.dtype).tiny)))
    count = jnp.floor(partial + 0.5)
    kept = certain | (jnp.diff(count, prepend=0) > 0)
    order = jnp.argsort(~kept, stable=True)[:room]
    return _Joint(jnp.where(kept, jnp.maximum(mass, level), 0)[order], posterior[order])


class _Choice(NamedTuple):
    """While the batch is grown.

    Attributes:
      bound: `[C]` what each candidate gained when last looked at, which it never exceeds; -inf where not left.
      fresh: `[C]` bool, whether that is its gain now.
      last: the gain of the last pair.
      left: log K less what the batch tells: what any more labels can tell.
    """

    joint: _Joint
    bound: Float[Array, "C"]
    fresh: Bool[Array, "C"]
    last: Float[Array, ""]
    left: Float[Array, ""]


def _joint_bald(p: Float[Array, "C K"], bald: Float[Array, "C"], k: int) -> tuple[Int[Array, "k"], Float[Array, "k"]]:
    """The greedy batch: places among the candidates, and gains in nats; `bald` is -inf for what is no candidate."""
    members, together = p.shape[1], min(p.shape[0], _TOGETHER)
    mean = p.mean(axis=1)
    apart = p - mean[:, None]
    nothing = _NOTHING * jnp.maximum(bald.max(), 0)

    def look(state: _Choice) -> _Choice:
        # Of those not looked at, the ones that may gain most.
        stale, some = jax.lax.top_k(jnp.where(state.fresh, -jnp.inf, state.bound), together)
        shift = matmul(state.joint.posterior - 1 / members, apart[some].T)
        lost = matmul(state.joint.mass, divergence(mean[some][None, :], shift))
        gain = jnp.where(stale > -jnp.inf, jnp.minimum(stale, bald[some] - lost), state.bound[some])
        return state._replace(bound=state.bound.at[some].set(gain), fresh=state.fresh.at[some].set(True))

    def unsure(state: _Choice) -> Array:
        stale = jnp.where(state.fresh, -jnp.inf, state.bound).max()
        return (stale > jnp.where(state.fresh, state.bound, -jnp.inf).max()) & (
            jnp.minimum(stale, state.left) > nothing
        )

    def step(state: _Choice, _: None) -> tuple[_Choice, tuple[Array, Array]]:
        state = jax.lax.while_loop(unsure, look, state)
        saturated = jnp.minimum(state.bound.max(), state.left) <= nothing
        left = state.bound > -jnp.inf
        place = jnp.argmax(jnp.where(saturated, jnp.where(left, bald, -jnp.inf), state.bound))
        gain = jnp.where(saturated, 0, jnp.minimum(jnp.minimum(state.bound[place], state.last), state.left))
        joint = jax.lax.cond(saturated, lambda: state.joint, lambda: _extend(state.joint, p[place]))
        bound = state.bound.at[place].set(-jnp.inf)
        return _Choice(joint, bound, jnp.zeros_like(state.fresh), gain, state.left - gain), (place, gain)

    start = _Choice(
        joint=_start(min(_CONFIGURATIONS, 2 ** (k - 1)), members),
        bound=bald,
        fresh=jnp.ones(bald.shape, bool),
        last=jnp.float32(jnp.inf),
        left=jnp.log(jnp.float32(members)),
    )
    return jax.lax.scan(step, start, None, length=k)[1]


def batch_bald(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs whose labels tell most together about which member is right: the largest joint mutual information.

    Grown greedily: pair c adds E_y [H(sum_m w_m p_mc)] - mean_m H(p_mc), y the labels of the batch so far, w_m the
    posterior of a member given them. All configurations of labels are followed up to 11 earlier pairs; of more, 2,048
    that stand for the rest (see `_extend`). K members can tell apart no more than log K nats: once that is
    reached, no pair gains anything, and the batch is filled up in the order of `bald`.

    Candidates are all pairs of a list, otherwise the 10,000 of largest BALD, which no pair's gain exceeds: a choice
    that gains more than the BALD of the last of them is the best of the space. Gains never rise, so only pairs that
    may be best are looked at again.

    Gain: nats; 0 where the batch is saturated. Kirsch et al. (1906.08158), whose released code samples configurations.
    """
    room = most_pairs(space) if space.pairs is not None else min(most_pairs(space), CANDIDATES)
    scorer = bald_scorer(belief, space)
    finite = jnp.isfinite(belief.member_rewards).all(axis=0)
    best = top_scores(scorer, finite, space, max(room, k))
    margins = scorer.stats[best.pairs[:, 0]] - scorer.stats[best.pairs[:, 1]]
    # The less likely label, of which no chance is rounded to 1.
    p = chance(jnp.where(margins.sum(axis=1, keepdims=True) < 0, margins, -margins))
    chosen, gains = _joint_bald(p, jnp.where(best.valid, best.gains, -jnp.inf), k)
    valid = jnp.arange(k) < best.valid.sum()
    short = jnp.where(valid.all(), jnp.int32(Status.OK), jnp.int32(Status.EXHAUSTED))
    status = jnp.where(best.status == Status.NONFINITE, best.status, short)
    return Selection(jnp.where(valid[:, None], best.pairs[chosen], 0), jnp.where(valid, gains, 0), valid, status)


NEIGHBOURS = 13
"""k of the distances to the k-th nearest prompt, as released."""
ENTROPY_WEIGHT = 0.01
"""Weight of the entropy of prompts against BALD, as released."""


class _Prompts(NamedTuple):
    """Prompts as points: the mean features of their eligible responses.

    Attributes:
      points: `[P, F]`, any number where a prompt has no response.
      reach: `[P]` distance to the k-th nearest other prompt.
      near: `[P]` how much has been labelled nearer than that, in pairs.
    """

    points: Float[Array, "P F"]
    reach: Float[Array, "P"]
    near: Float[Array, "P"]


def _prompts(belief: Belief, space: PairSpace) -> _Prompts:
    home = prompts_of(space)
    count = -(-home.shape[0] // space.width) if space.prompt is None else home.shape[0]
    alive = space.eligible
    features = jnp.where(alive[:, None], belief.features, 0)
    middle = features.sum(axis=0) / jnp.maximum(alive.sum(), 1)
    features = jnp.where(alive[:, None], features - middle[None, :], 0)
    held = jax.ops.segment_sum(alive.astype(jnp.float32), home, count)
    points = jax.ops.segment_sum(features, home, count) / jnp.maximum(held, 1)[:, None]

    # A labelled pair counts half at each end, at the prompt of the response of equal, or else of nearest, features.
    def nearest(end: Array) -> Array:
        return home[jnp.argmin(jnp.where(alive, _squares(features, end), jnp.inf))]

    ends = (belief.labelled_features - middle[None, None, :]).reshape(-1, features.shape[1])
    half = jnp.where(jnp.arange(len(ends)) < 2 * belief.num_labelled, 0.5, 0.0)
    labelled = jnp.zeros(count).at[_mapped(nearest, ends)].add(half)
    others = jnp.minimum(NEIGHBOURS, (held > 0).sum() - 1)

    def around(prompt: Array) -> tuple[Array, Array]:
        squares = _squares(points, points[prompt])
        apart = jnp.where((held > 0) & (jnp.arange(count) != prompt), squares, jnp.inf)
        rising = -jax.lax.top_k(-apart, min(NEIGHBOURS, count))[0]
        reach = jnp.where(others > 0, rising[jnp.maximum(others - 1, 0)], 0)
        return reach, jnp.where(_nearer(squares, reach), labelled, 0).sum()

    reach, near = _mapped(around, jnp.arange(count, dtype=jnp.int32))
    return _Prompts(points, reach, near)


def _mapped(f: Callable[[Array], Any], rows: Array) -> Any:
    """`f` of each row, some at a time, so that vectors become matrices."""
    count = rows.shape[0]
    groups = max(1, -(-count // 64))
    each = -(-count // groups)
    padded = jnp.pad(rows, ((0, groups * each - count),) + ((0, 0),) * (rows.ndim - 1), mode="edge")
    found = jax.lax.map(jax.vmap(f), padded.reshape(groups, each, *rows.shape[1:]))
    return jax.tree.map(lambda leaf: leaf.reshape(groups * each)[:count], found)


def _squares(points: Float[Array, "n F"], point: Float[Array, "F"]) -> Float[Array, "n"]:
    return distances(points, point[None, :])[:, 0]


def _nearer(squares: Array, reach: Array) -> Array:
    # The k-th nearest itself is not nearer, however its distance is rounded.
    return squares < reach * (1 - 1e-4)


class _Grown(NamedTuple):
    """Between two passes: the batch so far, and what has been labelled near each prompt."""

    picked: Int[Array, ""]
    pairs: Int[Array, "k 2"]
    gains: Float[Array, "k"]
    near: Float[Array, "P"]
    ended: Bool[Array, ""]


def bal_pm(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """BALD plus the entropy of the prompts asked about: pairs that are uncertain, on prompts unlike those labelled.

    Score: BALD + 0.01 h(x), h(x) = log(2 D(x) + 1e-4) - digamma(n(x) + 1). D(x) is the distance of prompt x to its
    13th nearest (or furthest, of fewer), n(x) how many pairs have been labelled nearer than D(x), before and in the
    batch: it grows as the batch does, so the choice is greedy, and exact over every pair. A prompt is the mean of the
    features of its eligible responses. A pair across prompts has the mean h of the two, and counts half at each. A
    labelled pair counts half at the prompt of each end: that of the response with nearest features, which is the
    response itself where it is still in the pool.

    Gain: the score when the pair was chosen. Melo et al. (2406.10023). Published prompt features come from the language
    model and are standardised by a slip, as mean / std; here they are those of the head and are not.
    """
    k_wanted = jnp.minimum(pair_count(space), k)
    size, home = space.eligible.shape[0], prompts_of(space)
    members = bald_scorer(belief, space)
    prompts = _prompts(belief, space)
    finite = jnp.isfinite(belief.member_rewards).all(axis=0) & jnp.isfinite(belief.features).all(axis=1)
    fine = (finite | ~space.eligible).all()
    offered = dataclasses.replace(space, costs=None)
    distance = jnp.log(2 * jnp.sqrt(jnp.maximum(prompts.reach, 0)) + 1e-4)

    def entropy(near: Array) -> Array:
        """Half of what a prompt's entropy weighs, one half for each end."""
        return ENTROPY_WEIGHT / 2 * (distance - jax.scipy.special.digamma(near + 1))

    def pair(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
        return members.pair(a[0], b[0]) + a[1] + b[1]

    def tile(rows: tuple[Array, Array], columns: tuple[Array, Array]) -> Array:
        return members.tile(rows[0], columns[0]) + (rows[1][:, None] + columns[1][None, :])

    def full_pass(start: _Grown) -> _Grown:
        scorer = Scorer((members.stats, entropy(start.near)[home]), pair, tile)
        best = best_pairs(scorer, offered, default_shortlist(space) + k)
        ends = jnp.minimum(best.pairs, size - 1)
        bald = jax.vmap(members.pair)(members.stats[ends[:, 0]], members.stats[ends[:, 1]])
        again = (best.pairs[:, None] == start.pairs[None]).all(axis=2).any(axis=1)
        bald = jnp.where((best.scores > -jnp.inf) & ~again, bald, -jnp.inf)

        def scores(bald: Array, near: Array) -> Array:
            return bald + entropy(near)[home[ends]].sum(axis=1)

        def certified(inner: tuple[_Grown, Array]) -> Array:
            state, bald = inner
            most = scores(bald, state.near).max()
            fresh = state.picked == start.picked
            return (state.picked < k_wanted) & (most > -jnp.inf) & (fresh | (most >= best.rest))

        def pick(inner: tuple[_Grown, Array]) -> tuple[_Grown, Array]:
            state, bald = inner
            worth = scores(bald, state.near)
            place = jnp.argmax(worth)
            near = state.near
            for end in (0, 1):
                squares = _squares(prompts.points, prompts.points[home[ends[place, end]]])
                near += jnp.where(_nearer(squares, prompts.reach), 0.5, 0)
            grown = _Grown(
                state.picked + 1,
                state.pairs.at[state.picked].set(best.pairs[place]),
                state.gains.at[state.picked].set(worth[place]),
                near,
                state.ended,
            )
            return grown, bald.at[place].set(-jnp.inf)

        end, _ = jax.lax.while_loop(certified, pick, (start, bald))
        return end._replace(ended=end.picked == start.picked)

    begin = _Grown(jnp.int32(0), jnp.full((k, 2), size, jnp.int32), jnp.zeros(k), prompts.near, ~fine)
    end = jax.lax.while_loop(lambda state: (state.picked < k_wanted) & ~state.ended, full_pass, begin)
    valid = jnp.arange(k) < end.picked
    short = jnp.where(valid.all(), jnp.int32(Status.OK), jnp.int32(Status.EXHAUSTED))
    status = jnp.where(fine, short, jnp.int32(Status.NONFINITE))
    return Selection(jnp.where(valid[:, None], end.pairs, 0), end.gains, valid, status)
