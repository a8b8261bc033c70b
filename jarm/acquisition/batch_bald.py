"""BALD for whole batches: joint information of the labels (BatchBALD), and BALD over a wide spread of prompts (BAL-PM).

For equally likely members m, the labels of a batch are independent given the member. So the joint distribution of the
labels y is the mixture of the chances P(y | m) of the configurations, and the chance of a configuration and the
posterior w_m = P(m | y) summarise it. One more pair c adds E_y [H(sum_m w_m p_mc)] - mean_m H(p_mc): one product of
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
from jarm.design.spaces import max_pairs, pair_count
from jarm.design.top import top_scores

CANDIDATES = 10_000
"""Candidates of `batch_bald` where a space that is not listed holds more pairs: those of largest BALD."""
CONFIGURATIONS = 2048
"""Configurations of labels to follow: all of 11 pairs."""
_CHUNK = 256
"""Candidates whose gains are computed at once."""
_ROUNDING = 1e-5
"""Gains below this share of the largest are rounding: the batch is saturated."""


class _Joint(NamedTuple):
    """Configurations of the labels of a batch: chances, summing to 1, and posteriors of the members."""

    mass: Float[Array, "S"]
    posterior: Float[Array, "S K"]


def start_joint(capacity: int, members: int) -> _Joint:
    """The joint distribution of no labels: one configuration, and room for `capacity`."""
    return _Joint(
        jnp.zeros(capacity, jnp.float32).at[0].set(1), jnp.full((capacity, members), 1 / members, jnp.float32)
    )


def extend_joint(joint: _Joint, p: Float[Array, "K"]) -> _Joint:
    """Add a label of chance p_m under member m: each configuration becomes two, thinned out to the capacity.

    The optimal resampling of Fearnhead and Clifford (2003), systematic, from the middle: chances pi become inclusion
    probabilities min(pi / c, 1) that sum to the capacity S, and an included configuration has the mass max(pi, c). So
    the likeliest stay as they are, and the others are thinned out evenly; means change only by the rounding of counts.
    """
    capacity = joint.mass.shape[0]
    both = jnp.concatenate([joint.posterior * p[None, :], joint.posterior * (1 - p)[None, :]])
    chances = both.sum(axis=1)
    mass = jnp.concatenate([joint.mass, joint.mass]) * chances
    posterior = both / jnp.maximum(chances, jnp.finfo(chances.dtype).tiny)[:, None]
    # Similar posteriors are neighbours, so that a kept configuration is similar to those thinned out beside it.
    order_by_posterior = jnp.lexsort((posterior.max(axis=1), posterior.argmax(axis=1)))
    mass, posterior = mass[order_by_posterior], posterior[order_by_posterior]

    falling = -jnp.sort(-mass)
    tail = jnp.cumsum(falling[::-1])[::-1][:capacity]
    levels = tail / jnp.arange(capacity, 0, -1, dtype=jnp.float32)
    level = levels[jnp.argmax(falling[:capacity] <= levels)]
    certain = mass > level
    partial = jnp.cumsum(jnp.where(certain, 0, mass / jnp.maximum(level, jnp.finfo(mass.dtype).tiny)))
    count = jnp.floor(partial + 0.5)
    kept = certain | (jnp.diff(count, prepend=0) > 0)
    order = jnp.argsort(~kept, stable=True)[:capacity]
    return _Joint(jnp.where(kept, jnp.maximum(mass, level), 0)[order], posterior[order])


class _Choice(NamedTuple):
    """A growing batch.

    Attributes:
      joint: of the labels of the batch.
      bound: `[C]` last computed gain of each candidate, an upper bound on its gain; -inf where it is chosen.
      fresh: `[C]` bool, whether the bound is the gain now.
      last: the gain of the last pair.
      left: log K less the information of the batch, an upper bound on that of all further labels.
    """

    joint: _Joint
    bound: Float[Array, "C"]
    fresh: Bool[Array, "C"]
    last: Float[Array, ""]
    left: Float[Array, ""]


def joint_bald(p: Float[Array, "C K"], bald: Float[Array, "C"], k: int) -> tuple[Int[Array, "k"], Float[Array, "k"]]:
    """The greedy batch of largest joint information.

    Args:
      p: `[C, K]` chance of one label of each candidate under each member; of the less likely label, to keep digits.
      bald: `[C]` BALD of each candidate in nats; -inf for padding.
      k: number of pairs, a Python int.

    Returns:
      `[k]` places among the candidates, and `[k]` gains in nats.
    """
    members, chunk = p.shape[1], min(p.shape[0], _CHUNK)
    mean = p.mean(axis=1)
    shift = p - mean[:, None]
    rounding = _ROUNDING * jnp.maximum(bald.max(), 0)

    def refresh(state: _Choice) -> _Choice:
        # The chunk of largest bounds among the stale candidates.
        stale, some = jax.lax.top_k(jnp.where(state.fresh, -jnp.inf, state.bound), chunk)
        moved = matmul(state.joint.posterior - 1 / members, shift[some].T)
        lost = matmul(state.joint.mass, divergence(mean[some][None, :], moved))
        gain = jnp.where(stale > -jnp.inf, jnp.minimum(stale, bald[some] - lost), state.bound[some])
        return state._replace(bound=state.bound.at[some].set(gain), fresh=state.fresh.at[some].set(True))

    def undecided(state: _Choice) -> Array:
        stale = jnp.where(state.fresh, -jnp.inf, state.bound).max()
        return (stale > jnp.where(state.fresh, state.bound, -jnp.inf).max()) & (
            jnp.minimum(stale, state.left) > rounding
        )

    def step(state: _Choice, _: None) -> tuple[_Choice, tuple[Array, Array]]:
        state = jax.lax.while_loop(undecided, refresh, state)
        saturated = jnp.minimum(state.bound.max(), state.left) <= rounding
        left = state.bound > -jnp.inf
        place = jnp.argmax(jnp.where(saturated, jnp.where(left, bald, -jnp.inf), state.bound)).astype(jnp.int32)
        gain = jnp.where(saturated, 0, jnp.minimum(jnp.minimum(state.bound[place], state.last), state.left))
        joint = jax.lax.cond(saturated, lambda: state.joint, lambda: extend_joint(state.joint, p[place]))
        bound = state.bound.at[place].set(-jnp.inf)
        return _Choice(joint, bound, jnp.zeros_like(state.fresh), gain, state.left - gain), (place, gain)

    start = _Choice(
        joint=start_joint(min(CONFIGURATIONS, 2 ** (k - 1)), members),
        bound=bald,
        fresh=jnp.ones(bald.shape, bool),
        last=jnp.float32(jnp.inf),
        left=jnp.log(jnp.float32(members)),
    )
    return jax.lax.scan(step, start, None, length=k)[1]


def batch_bald(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs whose labels together tell most about which member is right: the largest joint mutual information.

    Grown greedily: pair c adds E_y [H(sum_m w_m p_mc)] - mean_m H(p_mc), y the labels of the batch so far, w_m the
    posterior of a member given them. All configurations of labels are followed up to 11 earlier pairs; of more pairs,
    2,048 representative ones (see `extend_joint`). Labels tell at most log K nats about K members: a saturated batch is
    filled up in the order of `bald`.

    Candidates are all pairs of a list, otherwise the 10,000 of largest BALD. BALD bounds the gain of a pair, so a
    choice that gains more than the smallest BALD of the candidates is the best of the space. Gains never rise, so only
    pairs that may be best are scored again.

    Gain: nats; 0 where the batch is saturated. Source: Kirsch et al. (arXiv 1906.08158), whose released code samples
    configurations.
    """
    count = max_pairs(space) if space.pairs is not None else min(max_pairs(space), CANDIDATES)
    scorer = bald_scorer(belief, space)
    finite = jnp.isfinite(belief.member_rewards).all(axis=0)
    best = top_scores(scorer, finite, space, max(count, k))
    margins = scorer.stats[best.pairs[:, 0]] - scorer.stats[best.pairs[:, 1]]
    # Of the less likely label: no chance is rounded to 1.
    p = chance(jnp.where(margins.sum(axis=1, keepdims=True) < 0, margins, -margins))
    chosen, gains = joint_bald(p, jnp.where(best.valid, best.gains, -jnp.inf), k)
    valid = jnp.arange(k, dtype=jnp.int32) < best.valid.sum(dtype=jnp.int32)
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
      points: `[P, F]`, arbitrary where a prompt has no response.
      square_radius: `[P]` squared distance to the k-th nearest other prompt.
      near: `[P]` labelled pairs within that radius, half a pair per end.
    """

    points: Float[Array, "P F"]
    square_radius: Float[Array, "P"]
    near: Float[Array, "P"]


def _prompts(belief: Belief, space: PairSpace) -> _Prompts:
    prompt_of = space.prompt_of
    count = -(-prompt_of.shape[0] // space.width) if space.prompt is None else prompt_of.shape[0]
    eligible = space.eligible
    features = jnp.where(eligible[:, None], belief.features, 0)
    centre = features.sum(axis=0) / jnp.maximum(eligible.sum(), 1).astype(jnp.float32)
    features = jnp.where(eligible[:, None], features - centre[None, :], 0)
    sizes = jax.ops.segment_sum(eligible.astype(jnp.float32), prompt_of, count)
    points = jax.ops.segment_sum(features, prompt_of, count) / jnp.maximum(sizes, 1)[:, None]

    # A labelled pair counts half at each end, at the prompt of the eligible response of nearest features.
    def nearest(end: Array) -> Array:
        return prompt_of[jnp.argmin(jnp.where(eligible, _squares(features, end), jnp.inf))]

    ends = (belief.labelled_features - centre[None, None, :]).reshape(-1, features.shape[1])
    half = jnp.where(jnp.arange(len(ends), dtype=jnp.int32) < 2 * belief.num_labelled, 0.5, 0.0)
    labelled = jnp.zeros(count, jnp.float32).at[_mapped(nearest, ends)].add(half)
    others = jnp.minimum(NEIGHBOURS, (sizes > 0).sum(dtype=jnp.int32) - 1)

    def around(prompt: Array) -> tuple[Array, Array]:
        squares = _squares(points, points[prompt])
        to_others = jnp.where((sizes > 0) & (jnp.arange(count, dtype=jnp.int32) != prompt), squares, jnp.inf)
        rising = -jax.lax.top_k(-to_others, min(NEIGHBOURS, count))[0]
        radius = jnp.where(others > 0, rising[jnp.maximum(others - 1, 0)], 0)
        return radius, jnp.where(_within(squares, radius), labelled, 0).sum()

    square_radius, near = _mapped(around, jnp.arange(count, dtype=jnp.int32))
    return _Prompts(points, square_radius, near)


def _mapped(f: Callable[[Array], Any], rows: Array) -> Any:
    """`f` of each row, up to 64 rows at a time, so that products with vectors become products with matrices."""
    count = rows.shape[0]
    groups = max(1, -(-count // 64))
    each = -(-count // groups)
    padded = jnp.pad(rows, ((0, groups * each - count),) + ((0, 0),) * (rows.ndim - 1), mode="edge")
    found = jax.lax.map(jax.vmap(f), padded.reshape(groups, each, *rows.shape[1:]))
    return jax.tree.map(lambda leaf: leaf.reshape(groups * each)[:count], found)


def _squares(points: Float[Array, "n F"], point: Float[Array, "F"]) -> Float[Array, "n"]:
    return distances(points, point[None, :])[:, 0]


def _within(squares: Array, square_radius: Array) -> Array:
    # The k-th nearest itself is not within the radius, whatever the rounding of its distance.
    return squares < square_radius * (1 - 1e-4)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Constants of the passes of `bal_pm`.

    Attributes:
      space: which pairs, without costs.
      bald: scorer of the BALD of pairs.
      prompts: prompts as points.
      log_diameter: `[P]` log(2 D + 1e-4), D the radius of a prompt.
      prompt_of: `[N]` prompt of each response.
      wanted: number of pairs to pick.
      shortlist: number of pairs that a pass keeps.
    """

    space: PairSpace
    bald: Scorer
    prompts: _Prompts
    log_diameter: Float[Array, "P"]
    prompt_of: Int[Array, "N"]
    wanted: Int[Array, ""]
    shortlist: int

    def half_entropy(self, near: Float[Array, "P"]) -> Float[Array, "P"]:
        """Half the weighted entropy of each prompt, which a pair adds for each end."""
        return ENTROPY_WEIGHT / 2 * (self.log_diameter - jax.scipy.special.digamma(near + 1))


class _Grown(NamedTuple):
    """Between two passes: the batch so far, and the labelled pairs near each prompt."""

    picked: Int[Array, ""]
    pairs: Int[Array, "k 2"]
    gains: Float[Array, "k"]
    near: Float[Array, "P"]
    ended: Bool[Array, ""]


def _full_pass(problem: _Problem, start: _Grown) -> _Grown:
    """Score every pair, keep a shortlist, and pick from it while its best pair is surely the best of the space."""
    members, prompts, prompt_of = problem.bald, problem.prompts, problem.prompt_of

    def pair(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
        return members.pair(a[0], b[0]) + a[1] + b[1]

    def tile(rows: tuple[Array, Array], columns: tuple[Array, Array]) -> Array:
        return members.tile(rows[0], columns[0]) + (rows[1][:, None] + columns[1][None, :])

    scorer = Scorer((members.stats, problem.half_entropy(start.near)[prompt_of]), pair, tile)
    best = best_pairs(scorer, problem.space, problem.shortlist)
    ends = jnp.minimum(best.pairs, prompt_of.shape[0] - 1)
    bald = jax.vmap(members.pair)(members.stats[ends[:, 0]], members.stats[ends[:, 1]])
    repeated = (best.pairs[:, None] == start.pairs[None]).all(axis=2).any(axis=1)
    bald = jnp.where((best.scores > -jnp.inf) & ~repeated, bald, -jnp.inf)

    def scores(bald: Array, near: Array) -> Array:
        return bald + problem.half_entropy(near)[prompt_of[ends]].sum(axis=1)

    def certified(inner: tuple[_Grown, Array]) -> Array:
        state, bald = inner
        largest = scores(bald, state.near).max()
        fresh = state.picked == start.picked
        return (state.picked < problem.wanted) & (largest > -jnp.inf) & (fresh | (largest >= best.rest))

    def pick(inner: tuple[_Grown, Array]) -> tuple[_Grown, Array]:
        state, bald = inner
        worth = scores(bald, state.near)
        place = jnp.argmax(worth).astype(jnp.int32)
        near = state.near
        for end in (0, 1):
            squares = _squares(prompts.points, prompts.points[prompt_of[ends[place, end]]])
            near += jnp.where(_within(squares, prompts.square_radius), 0.5, 0)
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


def bal_pm(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """BALD plus the entropy of the prompts asked about: uncertain pairs, on prompts unlike those labelled.

    Score: BALD + 0.01 h(x), h(x) = log(2 D(x) + 1e-4) - digamma(n(x) + 1). D(x) is the distance of prompt x to its
    13th nearest prompt (or the furthest, of fewer), n(x) the number of pairs labelled nearer than D(x), earlier and in
    the batch. n grows with the batch, so the choice is greedy, and exact over every pair. A prompt is the mean of the
    features of its eligible responses. A pair across prompts has the mean h of the two, and counts half at each. A
    labelled pair counts half at the prompt of each end, that of the response of nearest features: the end itself, where
    it is still eligible.

    Gain: the score when the pair was chosen. Source: Melo et al. (arXiv 2406.10023). Published prompt features come
    from the language model and are standardised by a slip, as mean / std; here they are those of the head and are not.
    """
    size = space.eligible.shape[0]
    prompts = _prompts(belief, space)
    problem = _Problem(
        space=dataclasses.replace(space, costs=None),
        bald=bald_scorer(belief, space),
        prompts=prompts,
        log_diameter=jnp.log(2 * jnp.sqrt(jnp.maximum(prompts.square_radius, 0)) + 1e-4),
        prompt_of=space.prompt_of,
        wanted=jnp.minimum(pair_count(space), k).astype(jnp.int32),
        shortlist=default_shortlist(space) + k,
    )
    finite = jnp.isfinite(belief.member_rewards).all(axis=0) & jnp.isfinite(belief.features).all(axis=1)
    sound = (finite | ~space.eligible).all()
    begin = _Grown(jnp.int32(0), jnp.full((k, 2), size, jnp.int32), jnp.zeros(k, jnp.float32), prompts.near, ~sound)
    end = jax.lax.while_loop(
        lambda state: (state.picked < problem.wanted) & ~state.ended, lambda state: _full_pass(problem, state), begin
    )
    valid = jnp.arange(k, dtype=jnp.int32) < end.picked
    short = jnp.where(valid.all(), jnp.int32(Status.OK), jnp.int32(Status.EXHAUSTED))
    status = jnp.where(sound, short, jnp.int32(Status.NONFINITE))
    return Selection(jnp.where(valid[:, None], end.pairs, 0), end.gains, valid, status)
