"""Rules that look at an interval for a reward difference: the margin m of a pair, give or take b = beta s.

s is the sd over the members of R_i - R_j, and R the rewards of the K members. Published code has s_i + s_j instead, the
sds of two rewards each by itself. That is never smaller than s and mostly far larger: it also holds what all
responses share, such as the level of a member, of which a comparison teaches nothing. Each rule has that form,
too, under its name with `_marginal`.

P(i beats j) = sigmoid(R_i - R_j) grows with the difference, so that bounds on one are bounds on the other, and at least
even odds are a difference of at least 0. Published RUCB and IDS compare mu + beta s of a raw reward, whose zero is
anywhere, with the probability 1/2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.acquisition.duels import duels, of_ensemble, thompson
from jarm.core.base import Belief, HParams, PairSpace, Selection
from jarm.core.linalg import distances, square_sum
from jarm.core.types import Array, Bool, Float, Int, PRNGKey
from jarm.design.fisher import centred, fisher_weight
from jarm.design.scorer import Scorer
from jarm.design.spaces import alive_pairs, get_tile, pair_count, sample_pairs, tile_count
from jarm.design.top import top_scores

WINDOW = 0.05
"""Middle of the rank window of `delta_quantile`, and its width, as shares of the pairs."""
SAMPLED = 1 << 12
"""Pairs of a space that is not a list by which `delta_quantile` finds the window: its ends to .3 % of the ranks."""


class Known(NamedTuple):
    """What interval rules know of each response, `[n, ...]`.

    Attributes:
      mean: mean reward.
      members: rewards of the members.
      apart: rewards of the members less their mean and less what differences do not see.
      spread: sd of the reward by itself.
      reach: least upper bound on the margin over a partner; at least 0 where no partner surely wins.
      floor: least lower bound on the margin over a partner that may be the best.
    """

    mean: Float[Array, "*n"]
    members: Float[Array, "*n K"]
    apart: Float[Array, "*n K"]
    spread: Float[Array, "*n"]
    reach: Float[Array, "*n"]
    floor: Float[Array, "*n"]


Half = Callable[[Known, Known], Float[Array, "..."]]
"""Half the width of the interval for the margin of one response over another, elementwise."""


def _prepare(
    hparams: HParams, belief: Belief, space: PairSpace, *, marginal: bool
) -> tuple[Known, Bool[Array, "N"], Half]:
    plain, finite = of_ensemble(belief)
    apart = centred(plain.members, space)
    apart = apart - apart.mean(axis=1, keepdims=True)
    degrees = max(1, apart.shape[1] - 1)
    spread = jnp.sqrt(jnp.square(plain.members - plain.members.mean(axis=1, keepdims=True)).sum(axis=1) / degrees)
    beta = jnp.asarray(hparams.beta, jnp.float32)

    def half(a: Known, b: Known) -> Array:
        if marginal:
            return beta * (a.spread + b.spread)
        # Member by member: no array over pairs and members.
        each = [jnp.square(a.apart[..., m] - b.apart[..., m]) for m in range(apart.shape[1])]
        return beta * jnp.sqrt(sum(each[1:], each[0]) / degrees)

    nothing = jnp.zeros_like(plain.mean)
    return Known(plain.mean, plain.members, apart, spread, nothing, nothing), finite, half


def _best_by(
    hparams: HParams,
    score: Callable[[Array, Array, Array, Array], Array],
    value: Float[Array, "N"],
    belief: Belief,
    space: PairSpace,
    k: int,
    *,
    marginal: bool,
) -> Selection:
    """The k pairs of largest `score(m, b, value_i, value_j)`."""
    known, finite, _ = _prepare(hparams, belief, space, marginal=marginal)
    beta, degrees = jnp.asarray(hparams.beta, jnp.float32), max(1, known.apart.shape[1] - 1)

    def pair(a: tuple[Array, ...], b: tuple[Array, ...]) -> Array:
        spread = a[1] + b[1] if marginal else jnp.sqrt(square_sum(a[1] - b[1]) / degrees)
        return score(a[0] - b[0], beta * spread, a[2], b[2])

    def tile(rows: tuple[Array, ...], columns: tuple[Array, ...]) -> Array:
        def each(f: Callable[[Array, Array], Array], place: int) -> Array:
            return f(rows[place][:, None], columns[place][None, :])

        squares = jnp.square(each(jnp.add, 1)) if marginal else distances(rows[1], columns[1]) / degrees
        return score(
            each(jnp.subtract, 0), beta * jnp.sqrt(jnp.maximum(squares, 0)), rows[2][:, None], columns[2][None, :]
        )

    numbers = (known.mean, known.spread if marginal else known.apart, value)
    return top_scores(Scorer(numbers, pair, tile), finite, space, k)


def probability_gap(margin: Float[Array, "*n"], half: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """sigmoid(m + b) - sigmoid(m - b) = (1 - exp(-2 b)) sigmoid(b + m) sigmoid(b - m), which cancels no digits."""
    return -jnp.expm1(-2 * half) * jax.nn.sigmoid(half + margin) * jax.nn.sigmoid(half - margin)


def infomax(
    key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, marginal: bool = False
) -> Selection:
    """Pairs whose outcome the members leave most open: the widest interval for the probability of a win.

    Gain: sigmoid(m + b) - sigmoid(m - b). Source: ActiveUltraFeedback (arXiv 2603.09692), with s_i + s_j.
    """
    return _best_by(
        hparams, lambda m, b, *_: probability_gap(m, b), belief.rewards, belief, space, k, marginal=marginal
    )


def delta_ucb(
    key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, marginal: bool = False
) -> Selection:
    """Pairs that may be furthest apart: the largest optimistic reward gap.

    Gain: |m| + b. Source: ActiveUltraFeedback (arXiv 2603.09692), there ub_i - lb_j = m + beta (s_i + s_j).
    """
    return _best_by(hparams, lambda m, b, *_: jnp.abs(m) + b, belief.rewards, belief, space, k, marginal=marginal)


def delta_quantile(
    key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, marginal: bool = False
) -> Selection:
    """Pairs of a large but not extreme optimistic gap, those whose better response may be best.

    Gaps |m| + b are ranked, and of the ranks from 2.5 % to 7.5 % (of k pairs, if that are more) the pairs are taken
    whose better response has the largest optimistic value; then those with gaps closest to these. The value is
    mu + beta s of the response less the mean response of its prompt (`within`) or of the pool. A list is ranked
    itself; otherwise 4,096 random pairs, the same for every key, say where the window is.
    Ranks are of pairs of the whole pool, each counted once.

    Gain: the value less the least in the pool, plus a thousandth of the gap, so that of two pairs with one better
    response that with the larger gap is first; of a pair beside the window, minus how far its gap is from it.
    Source: ActiveUltraFeedback (arXiv 2603.09692). There ranks are of the ordered pairs of one prompt, each counted
    both ways, so that its 5 % is about 10 % here; the window has width 0, in which there is one
    pair a prompt, and the value is ub_i = mu_i + beta s_i, which compares prompts by the level of the members.
    """
    known, _, half = _prepare(hparams, belief, space, marginal=marginal)
    beta, degrees = jnp.asarray(hparams.beta, jnp.float32), max(1, known.apart.shape[1] - 1)
    if marginal:
        value = known.mean + beta * known.spread
    else:
        value = centred(known.mean[:, None], space)[:, 0] + beta * jnp.sqrt(square_sum(known.apart) / degrees)
    value -= jnp.where(space.eligible, value, jnp.inf).min()
    top, bottom = _window(known, half, space, k)

    def score(margin: Array, width: Array, first: Array, second: Array) -> Array:
        gap = jnp.abs(margin) + width
        better = jnp.where(margin > 0, first, jnp.where(margin < 0, second, jnp.maximum(first, second)))
        return jnp.where(gap > top, top - gap, jnp.where(gap < bottom, gap - bottom, better + 1e-3 * gap))

    return _best_by(hparams, score, value, belief, space, k, marginal=marginal)


def _window(known: Known, half: Half, space: PairSpace, k: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The largest and the least gap in the rank window of `delta_quantile`, half-way to the gaps beside it."""
    if space.pairs is not None:
        ends, there = jnp.minimum(space.pairs, space.eligible.shape[0] - 1), alive_pairs(space)
        held = there.sum(dtype=jnp.float32)
    else:
        ends, there = sample_pairs(jax.random.key(0), space, SAMPLED)
        held = pair_count(space)
    one, other = (jax.tree.map(lambda leaf, end=ends[:, side]: leaf[end], known) for side in (0, 1))
    gaps = -jnp.sort(jnp.where(there, -jnp.abs(one.mean - other.mean) - half(one, other), jnp.inf))
    ranked = there.sum(dtype=jnp.int32)
    share = jnp.minimum(jnp.maximum(WINDOW, k / jnp.maximum(held, 1)), 1)
    start = jnp.floor(jnp.clip(WINDOW - share / 2, 0, 1 - share) * ranked).astype(jnp.int32)
    end = jnp.minimum(start + jnp.ceil(share * ranked).astype(jnp.int32), ranked)

    def edge(rank: Array) -> Array:
        last = len(gaps) - 1
        return (gaps[jnp.clip(rank - 1, 0, last)] + gaps[jnp.clip(rank, 0, last)]) / 2

    return jnp.where(start > 0, edge(start), jnp.inf), jnp.where(end < ranked, edge(end), -jnp.inf)


def _least(value: Half, known: Known, space: PairSpace) -> Float[Array, "N"]:
    """The least `value(of a response, of a partner)` over the partners of each response; infinite where it has none."""
    least = jnp.full_like(known.mean, jnp.inf)

    def at(place: Array) -> Known:
        return jax.tree.map(lambda leaf: leaf[place], known)

    if space.pairs is not None:
        ends, alive = jnp.minimum(space.pairs, len(least) - 1), alive_pairs(space)
        for one, other in (ends.T, ends.T[::-1]):
            least = least.at[one].min(jnp.where(alive, value(at(one), at(other)), jnp.inf))
        return least

    def merge(least: Array, index: Array) -> tuple[Array, None]:
        rows, columns, mask = get_tile(space, index)
        a, b = at(rows[:, :, None]), at(columns[:, None, :])
        least = least.at[rows].min(jnp.where(mask, value(a, b), jnp.inf).min(axis=2))
        return least.at[columns].min(jnp.where(mask, value(b, a), jnp.inf).min(axis=1)), None

    return jax.lax.scan(merge, least, jnp.arange(tile_count(space), dtype=jnp.int32))[0]


def _one(known: Known, one: Int[Array, ""]) -> Known:
    """What is known of one response of an arena, to be set against all."""
    return jax.tree.map(lambda leaf: leaf[one][None], known)


def _prefer(able: Bool[Array, "n"], wanted: Bool[Array, "n"], scores: Float[Array, "n"]) -> Float[Array, "n"]:
    """Scores, only of those wanted unless none of these may be chosen."""
    return jnp.where(wanted | ~(able & wanted).any(), scores, -jnp.inf)


def _with_reach(known: Known, half: Half, space: PairSpace) -> Known:
    return known._replace(reach=_least(lambda a, b: a.mean - b.mean + half(a, b), known, space))


def max_min_lcb(
    key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, marginal: bool = False
) -> Selection:
    """The response that does best against its hardest opponent, and that opponent.

    Candidates are responses that no partner surely beats: m_ij + b_ij >= 0 for all partners j in the space. i is the
    candidate of the anchor with the largest min_j m_ij - b_ij over candidates j, and j, among the partners that are
    left, the candidate of least m_ij - b_ij; where there are no candidates, all responses count. Duels are drawn as
    `jarm.acquisition.duels` says. Gain: 0. Source: Pasztor et al. (arXiv 2406.01698), as run by ActiveUltraFeedback
    (arXiv 2603.09692), which returns (i, i) where one candidate is left.
    """
    plain, finite, half = _prepare(hparams, belief, space, marginal=marginal)
    known = _with_reach(plain, half, space)

    def lower(a: Known, b: Known) -> Array:
        return a.mean - b.mean - half(a, b)

    among = _least(lambda a, b: jnp.where(b.reach >= 0, lower(a, b), jnp.inf), known, space)
    known = known._replace(floor=jnp.where(among < jnp.inf, among, _least(lower, known, space)))

    def first(key: PRNGKey, known: Known, able: Array) -> tuple[Array, None]:
        return _prefer(able, known.reach >= 0, known.floor), None

    def second(_: None, known: Known, one: Array, able: Array) -> Array:
        return _prefer(able, known.reach >= 0, -lower(_one(known, one), known))

    return duels(key, known, finite, space, k, first, second)


def info_gain(
    key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, marginal: bool = False
) -> Selection:
    """The favourite of a random member against the response of the widest interval for the probability of a win.

    i = argmax R_m of the anchor; j = argmax sigmoid(m_ij + b_ij) - sigmoid(m_ij - b_ij) over its partners. Duels are
    drawn as `jarm.acquisition.duels` says. Gain: 0. Source: ActiveUltraFeedback (arXiv 2603.09692), after oat.
    """
    known, finite, half = _prepare(hparams, belief, space, marginal=marginal)

    def second(key: PRNGKey, known: Known, one: Array, able: Array) -> Array:
        chosen = _one(known, one)
        return probability_gap(chosen.mean - known.mean, half(chosen, known))

    return duels(key, known, finite, space, k, thompson, second)


def rucb(
    key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, marginal: bool = False
) -> Selection:
    """A random response that may be the best, against the one most likely to beat it at best.

    u_ij = sigmoid(m_ij + b_ij). i is drawn among the responses of the anchor with u_ij >= 1/2 for all partners j in the
    space (among all where there are none), and j = argmax u_ji. Duels are drawn as `jarm.acquisition.duels` says.
    Gain: 0. Source: Zoghi et al. (arXiv 1312.3393). ActiveUltraFeedback compares the bound on a raw reward with 1/2,
    takes its opponent by that bound alone, and may return (i, i).
    """
    plain, finite, half = _prepare(hparams, belief, space, marginal=marginal)

    def first(key: PRNGKey, known: Known, able: Array) -> tuple[Array, None]:
        return _prefer(able, known.reach >= 0, jax.random.uniform(key, able.shape)), None

    def second(_: None, known: Known, one: Array, able: Array) -> Array:
        chosen = _one(known, one)
        return known.mean - chosen.mean + half(chosen, known)

    return duels(key, _with_reach(plain, half, space), finite, space, k, first, second)


def ids(
    key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, marginal: bool = False
) -> Selection:
    """Information-directed sampling: the best response against the one whose duel costs least regret for what it tells.

    i = argmax mu of the anchor; j = argmin D_j^2 / I_j over its partners, with D_j = d + sigmoid(m_ij) - 1/2 the regret
    of showing j, d = max_j (sigmoid(m_ji + b_ij) - 1/2)^+ the most that i may fall short of the best, and
    I_j = log(1 + 4 (p (1 - p) s_ij)^2) the information of a label of variance at most 1/4 about the probability
    p = sigmoid(m_ij). Duels are drawn as `jarm.acquisition.duels` says. Gain: 0. Source: Kirschner and Krause
    (arXiv 2105.11802), there also with the probability of playing i against itself, which teaches nothing and costs a
    label here. ActiveUltraFeedback adds where it should subtract the mean, multiplies by I where it should divide,
    compares a raw reward with 1/2, and may return (i, i).
    """
    known, finite, half = _prepare(dataclasses.replace(hparams, beta=1.0), belief, space, marginal=marginal)

    def first(key: PRNGKey, known: Known, able: Array) -> tuple[Array, None]:
        return known.mean, None

    def second(_: None, known: Known, one: Array, able: Array) -> Array:
        chosen = _one(known, one)
        margin, spread = chosen.mean - known.mean, half(chosen, known)
        # sigmoid(x) - 1/2 = tanh(x / 2) / 2
        short = jnp.tanh((hparams.beta * spread - margin) / 2) / 2
        regret = jnp.where(able, short, 0).max().clip(0) + jnp.tanh(margin / 2) / 2
        told = jnp.log1p(4 * jnp.square(fisher_weight(margin) * spread))
        return -jnp.square(regret) / jnp.maximum(told, jnp.finfo(jnp.float32).tiny)

    return duels(key, known, finite, space, k, first, second)
