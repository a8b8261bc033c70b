"""Rules on an interval for a reward difference: m +- b, m the margin of a pair and b = beta s.

s is the sd over the members of R_i - R_j, R the rewards of the K members. Published code has s_i + s_j instead, the sds
of the two rewards by themselves. That sum is never smaller than s and mostly far larger: it includes the part that all
responses share, such as the level of a member, about which a comparison tells nothing. Each rule has that form in
`jarm.acquisition.contrib.intervals`, under its name with `_marginal`.

P(i beats j) = sigmoid(R_i - R_j) grows with the difference, so bounds on one are bounds on the other, and at least even
odds are a difference of at least 0. Published RUCB and IDS compare mu + beta s of a raw reward, whose zero is
arbitrary, with the probability 1/2.
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
from jarm.core.settings import make_key
from jarm.core.types import Array, Bool, Float, Int, PRNGKey
from jarm.design.fisher import centred, fisher_weight
from jarm.design.scorer import Scorer
from jarm.design.spaces import get_tile, pair_count, sample_pairs, tile_count, valid_pairs
from jarm.design.top import top_scores

WINDOW = 0.05
"""Middle of the rank window of `delta_quantile`, and its width, as shares of the pairs."""
SAMPLED = 1 << 12
"""Pairs drawn from a space that is not listed to find the window of `delta_quantile`: its ends to .3 % of the ranks."""


class IntervalStats(NamedTuple):
    """Per-response inputs of interval rules, `[n, ...]`.

    Attributes:
      mean: mean reward.
      members: rewards of the members.
      deviations: rewards of the members less their mean, centred over the prompt or the space.
      spread: sd of the reward by itself.
      min_upper: smallest upper bound on the margin over a partner; at least 0 where no partner surely wins.
      min_lower: smallest lower bound on the margin over a partner that may be the best.
    """

    mean: Float[Array, "*n"]
    members: Float[Array, "*n K"]
    deviations: Float[Array, "*n K"]
    spread: Float[Array, "*n"]
    min_upper: Float[Array, "*n"]
    min_lower: Float[Array, "*n"]


Half = Callable[[IntervalStats, IntervalStats], Float[Array, "..."]]
"""Half-width of the interval for the margin of one response over another, elementwise."""


def _prepare(
    hparams: HParams, belief: Belief, space: PairSpace, *, marginal: bool
) -> tuple[IntervalStats, Bool[Array, "N"], Half]:
    """Stats without bounds, `[N]` whether each response is finite, and the half-width of intervals."""
    plain, finite = of_ensemble(belief)
    deviations = centred(plain.members, space)
    deviations = deviations - deviations.mean(axis=1, keepdims=True)
    degrees = max(1, deviations.shape[1] - 1)
    spread = jnp.sqrt(jnp.square(plain.members - plain.members.mean(axis=1, keepdims=True)).sum(axis=1) / degrees)
    beta = jnp.asarray(hparams.beta, jnp.float32)

    def half(a: IntervalStats, b: IntervalStats) -> Array:
        if marginal:
            return beta * (a.spread + b.spread)
        # Member by member, so that no array is pairs x members.
        squares = [jnp.square(a.deviations[..., m] - b.deviations[..., m]) for m in range(deviations.shape[1])]
        return beta * jnp.sqrt(sum(squares[1:], squares[0]) / degrees)

    zeros = jnp.zeros_like(plain.mean)
    return IntervalStats(plain.mean, plain.members, deviations, spread, zeros, zeros), finite, half


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
    stats, finite, _ = _prepare(hparams, belief, space, marginal=marginal)
    beta, degrees = jnp.asarray(hparams.beta, jnp.float32), max(1, stats.deviations.shape[1] - 1)

    def pair(a: tuple[Array, ...], b: tuple[Array, ...]) -> Array:
        spread = a[1] + b[1] if marginal else jnp.sqrt(square_sum(a[1] - b[1]) / degrees)
        return score(a[0] - b[0], beta * spread, a[2], b[2])

    def tile(rows: tuple[Array, ...], columns: tuple[Array, ...]) -> Array:
        margin = rows[0][:, None] - columns[0][None, :]
        if marginal:
            squares = jnp.square(rows[1][:, None] + columns[1][None, :])
        else:
            squares = distances(rows[1], columns[1]) / degrees
        return score(margin, beta * jnp.sqrt(jnp.maximum(squares, 0)), rows[2][:, None], columns[2][None, :])

    of_response = (stats.mean, stats.spread if marginal else stats.deviations, value)
    return top_scores(Scorer(of_response, pair, tile), finite, space, k)


def probability_gap(margin: Float[Array, "*n"], half: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """sigmoid(m + b) - sigmoid(m - b) = (1 - exp(-2 b)) sigmoid(b + m) sigmoid(b - m), without cancellation."""
    return -jnp.expm1(-2 * half) * jax.nn.sigmoid(half + margin) * jax.nn.sigmoid(half - margin)


def infomax(
    key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, marginal: bool = False
) -> Selection:
    """Pairs of the most open outcome under the members: the widest interval for the probability of a win.

    Gain: sigmoid(m + b) - sigmoid(m - b). Source: ActiveUltraFeedback (arXiv 2603.09692), with s_i + s_j.
    """
    return _best_by(
        hparams, lambda m, b, *_: probability_gap(m, b), belief.rewards, belief, space, k, marginal=marginal
    )


def delta_ucb(
    key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, marginal: bool = False
) -> Selection:
    """Pairs with the largest optimistic reward gap.

    Gain: |m| + b. Source: ActiveUltraFeedback (arXiv 2603.09692), there ub_i - lb_j = m + beta (s_i + s_j).
    """
    return _best_by(hparams, lambda m, b, *_: jnp.abs(m) + b, belief.rewards, belief, space, k, marginal=marginal)


def delta_quantile(
    key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, marginal: bool = False
) -> Selection:
    """Pairs of a large but not extreme optimistic gap whose better response has the largest optimistic value.

    Gaps |m| + b are ranked over the space, each pair once. From the window of ranks 2.5 % to 7.5 % (of k pairs, where k
    is more) the rule takes the pairs whose better response has the largest value, then the pairs of nearest gap. The
    value is mu + beta s of the response less the mean response of its prompt (`within`) or of the space. A list is
    ranked whole; for other spaces 4,096 random pairs, the same for every key, locate the window.

    Gain: the value less the smallest value, plus a thousandth of the gap, so that the larger gap decides between pairs
    with the same better response; outside the window, minus the distance of the gap from the window.
    Source: ActiveUltraFeedback (arXiv 2603.09692). There ranks are of the ordered pairs of one prompt, each counted
    both ways, so that its 5 % is about 10 % here; the window has width 0 and holds one pair per prompt, and the value
    is ub_i = mu_i + beta s_i, which compares prompts by the level of the members.
    """
    stats, _, half = _prepare(hparams, belief, space, marginal=marginal)
    beta, degrees = jnp.asarray(hparams.beta, jnp.float32), max(1, stats.deviations.shape[1] - 1)
    if marginal:
        value = stats.mean + beta * stats.spread
    else:
        value = centred(stats.mean[:, None], space)[:, 0] + beta * jnp.sqrt(square_sum(stats.deviations) / degrees)
    value -= jnp.where(space.eligible, value, jnp.inf).min()
    top, bottom = _window(stats, half, space, k)

    def score(margin: Array, width: Array, first: Array, second: Array) -> Array:
        gap = jnp.abs(margin) + width
        better = jnp.where(margin > 0, first, jnp.where(margin < 0, second, jnp.maximum(first, second)))
        return jnp.where(gap > top, top - gap, jnp.where(gap < bottom, gap - bottom, better + 1e-3 * gap))

    return _best_by(hparams, score, value, belief, space, k, marginal=marginal)


def _window(stats: IntervalStats, half: Half, space: PairSpace, k: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The largest and the smallest gap in the rank window of `delta_quantile`, half-way to the gaps beside it."""
    if space.pairs is not None:
        ends, valid = jnp.minimum(space.pairs, space.eligible.shape[0] - 1), valid_pairs(space)
        count = valid.sum(dtype=jnp.float32)
    else:
        ends, valid = sample_pairs(make_key(0), space, SAMPLED)
        count = pair_count(space)
    one, other = (jax.tree.map(lambda leaf, end=ends[:, side]: leaf[end], stats) for side in (0, 1))
    gaps = -jnp.sort(jnp.where(valid, -jnp.abs(one.mean - other.mean) - half(one, other), jnp.inf))
    ranked = valid.sum(dtype=jnp.int32)
    share = jnp.minimum(jnp.maximum(WINDOW, k / jnp.maximum(count, 1)), 1)
    start = jnp.floor(jnp.clip(WINDOW - share / 2, 0, 1 - share) * ranked.astype(jnp.float32)).astype(jnp.int32)
    end = jnp.minimum(start + jnp.ceil(share * ranked.astype(jnp.float32)).astype(jnp.int32), ranked)

    def edge(rank: Array) -> Array:
        last = len(gaps) - 1
        return (gaps[jnp.clip(rank - 1, 0, last)] + gaps[jnp.clip(rank, 0, last)]) / 2

    return jnp.where(start > 0, edge(start), jnp.inf), jnp.where(end < ranked, edge(end), -jnp.inf)


def _min_over_partners(value: Half, stats: IntervalStats, space: PairSpace) -> Float[Array, "N"]:
    """The minimum of `value(a response, a partner)` over the partners of each response; infinite without a partner."""
    minimum = jnp.full_like(stats.mean, jnp.inf)

    def at(place: Array) -> IntervalStats:
        return jax.tree.map(lambda leaf: leaf[place], stats)

    if space.pairs is not None:
        ends, valid = jnp.minimum(space.pairs, len(minimum) - 1), valid_pairs(space)
        for one, other in (ends.T, ends.T[::-1]):
            minimum = minimum.at[one].min(jnp.where(valid, value(at(one), at(other)), jnp.inf))
        return minimum

    def merge(minimum: Array, index: Array) -> tuple[Array, None]:
        rows, columns, mask = get_tile(space, index)
        a, b = at(rows[:, :, None]), at(columns[:, None, :])
        minimum = minimum.at[rows].min(jnp.where(mask, value(a, b), jnp.inf).min(axis=2))
        return minimum.at[columns].min(jnp.where(mask, value(b, a), jnp.inf).min(axis=1)), None

    return jax.lax.scan(merge, minimum, jnp.arange(tile_count(space), dtype=jnp.int32))[0]


def _one(stats: IntervalStats, one: Int[Array, ""]) -> IntervalStats:
    """The stats of one response of an arena, to broadcast against all."""
    return jax.tree.map(lambda leaf: leaf[one][None], stats)


def _prefer(allowed: Bool[Array, "n"], wanted: Bool[Array, "n"], scores: Float[Array, "n"]) -> Float[Array, "n"]:
    """Scores of the wanted responses, of all where no wanted response is allowed; -inf elsewhere."""
    return jnp.where(wanted | ~(allowed & wanted).any(), scores, -jnp.inf)


def _with_min_upper(stats: IntervalStats, half: Half, space: PairSpace) -> IntervalStats:
    return stats._replace(min_upper=_min_over_partners(lambda a, b: a.mean - b.mean + half(a, b), stats, space))


def max_min_lcb(
    key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, marginal: bool = False
) -> Selection:
    """The response that does best against its hardest opponent, and that opponent.

    Candidates are responses that no partner surely beats: m_ij + b_ij >= 0 for all partners j in the space. i is the
    candidate of the anchor with the largest min_j m_ij - b_ij over candidates j, and j, among the partners left, the
    candidate of smallest m_ij - b_ij; without candidates, all responses count. Duels are drawn as
    `jarm.acquisition.duels` says. Gain: 0. Source: Pasztor et al. (arXiv 2406.01698), as run by ActiveUltraFeedback
    (arXiv 2603.09692), which returns (i, i) where one candidate is left.
    """
    plain, finite, half = _prepare(hparams, belief, space, marginal=marginal)
    stats = _with_min_upper(plain, half, space)

    def lower(a: IntervalStats, b: IntervalStats) -> Array:
        return a.mean - b.mean - half(a, b)

    among = _min_over_partners(lambda a, b: jnp.where(b.min_upper >= 0, lower(a, b), jnp.inf), stats, space)
    stats = stats._replace(min_lower=jnp.where(among < jnp.inf, among, _min_over_partners(lower, stats, space)))

    def first(key: PRNGKey, stats: IntervalStats, allowed: Array) -> tuple[Array, None]:
        return _prefer(allowed, stats.min_upper >= 0, stats.min_lower), None

    def second(_: None, stats: IntervalStats, one: Array, allowed: Array) -> Array:
        return _prefer(allowed, stats.min_upper >= 0, -lower(_one(stats, one), stats))

    return duels(key, stats, finite, space, k, first, second)


def info_gain(
    key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, marginal: bool = False
) -> Selection:
    """The favourite of a random member against the response of the widest interval for the probability of a win.

    i = argmax R_m of the anchor; j = argmax sigmoid(m_ij + b_ij) - sigmoid(m_ij - b_ij) over its partners. Duels are
    drawn as `jarm.acquisition.duels` says. Gain: 0. Source: ActiveUltraFeedback (arXiv 2603.09692), after oat.
    """
    stats, finite, half = _prepare(hparams, belief, space, marginal=marginal)

    def second(key: PRNGKey, stats: IntervalStats, one: Array, allowed: Array) -> Array:
        chosen = _one(stats, one)
        return probability_gap(chosen.mean - stats.mean, half(chosen, stats))

    return duels(key, stats, finite, space, k, thompson, second)


def rucb(
    key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, marginal: bool = False
) -> Selection:
    """A random response that may be the best, against the partner of the most optimistic chance to beat it.

    u_ij = sigmoid(m_ij + b_ij). i is drawn among the responses of the anchor with u_ij >= 1/2 for all partners j in the
    space (among all where there are none), and j = argmax u_ji. Duels are drawn as `jarm.acquisition.duels` says.
    Gain: 0. Source: Zoghi et al. (arXiv 1312.3393). ActiveUltraFeedback compares the bound on a raw reward with 1/2,
    takes its opponent by that bound alone, and may return (i, i).
    """
    plain, finite, half = _prepare(hparams, belief, space, marginal=marginal)

    def first(key: PRNGKey, stats: IntervalStats, allowed: Array) -> tuple[Array, None]:
        return _prefer(allowed, stats.min_upper >= 0, jax.random.uniform(key, allowed.shape, jnp.float32)), None

    def second(_: None, stats: IntervalStats, one: Array, allowed: Array) -> Array:
        chosen = _one(stats, one)
        return stats.mean - chosen.mean + half(chosen, stats)

    return duels(key, _with_min_upper(plain, half, space), finite, space, k, first, second)


def ids(
    key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, marginal: bool = False
) -> Selection:
    """Information-directed sampling: the best response against the partner of least squared regret per information.

    i = argmax mu of the anchor; j = argmin D_j^2 / I_j over its partners, with D_j = d + sigmoid(m_ij) - 1/2 the regret
    of showing j, d = max_j (sigmoid(m_ji + b_ij) - 1/2)^+ the largest possible shortfall of i, and
    I_j = log(1 + 4 (p (1 - p) s_ij)^2) the information of a label of variance at most 1/4 about the probability
    p = sigmoid(m_ij). Duels are drawn as `jarm.acquisition.duels` says. Gain: 0. Source: Kirschner and Krause
    (arXiv 2105.11802), there also with a probability of playing i against itself, an uninformative label here.
    ActiveUltraFeedback adds where it should subtract the mean, multiplies by I where it should divide, compares a raw
    reward with 1/2, and may return (i, i).
    """
    stats, finite, half = _prepare(dataclasses.replace(hparams, beta=1.0), belief, space, marginal=marginal)

    def first(key: PRNGKey, stats: IntervalStats, allowed: Array) -> tuple[Array, None]:
        return stats.mean, None

    def second(_: None, stats: IntervalStats, one: Array, allowed: Array) -> Array:
        chosen = _one(stats, one)
        margin, spread = chosen.mean - stats.mean, half(chosen, stats)
        # sigmoid(x) - 1/2 = tanh(x / 2) / 2
        shortfall = jnp.tanh((hparams.beta * spread - margin) / 2) / 2
        regret = jnp.where(allowed, shortfall, 0).max().clip(0) + jnp.tanh(margin / 2) / 2
        information = jnp.log1p(4 * jnp.square(fisher_weight(margin) * spread))
        return -jnp.square(regret) / jnp.maximum(information, jnp.finfo(jnp.float32).tiny)

    return duels(key, stats, finite, space, k, first, second)
