"""Rules that choose a first and then a second response, and the engine that makes a batch of such duels.

A batch is a sequence of duels. Each has an anchor, a prompt drawn without replacement until all prompts that still hold
pairs were used, and then again. The first response is chosen among the responses of the anchor with a partner left, the
second among the partners left of the first: of its prompt in a `within` space, of other prompts in `cross`, any in
`all`, its partners of the list in `listed`. So no pair comes twice and nothing plays itself; published code instead
retries 10 to 30 times and then draws at random. Gains are 0: the order is that of the draw.

R is `[K, N]`, the rewards of K members, and mu their mean. Published rules draw mu + beta z s with z uniform on (-1, 1)
and s the sd of each response by itself, as if rewards were independent; here a draw is a member, which keeps the
correlations between responses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import Belief, HParams, PairSpace, Selection
from jarm.core.status import Status, worst
from jarm.core.types import Array, Bool, Float, Int, PRNGKey
from jarm.design.spaces import may_pair, partner_counts, valid_pairs

First = Callable[[PRNGKey, Any, Bool[Array, "n"]], tuple[Float[Array, "n"], Any]]
"""`(key, stats of n responses, allowed) -> (scores, memory)`; the choice of the second response gets the memory."""
Second = Callable[[Any, Any, Int[Array, ""], Bool[Array, "n"]], Float[Array, "n"]]
"""`(memory, stats of n responses, place of the first, allowed) -> scores`."""


@dataclasses.dataclass(frozen=True)
class _Game:
    """Constants of a batch of duels.

    Attributes:
      space: which pairs.
      stats: inputs of the scores, a pytree of `[N, ...]`.
      prompt_of: `[N]` prompt of each response.
      ticket: `[P]` random order of the prompts.
      first, second: scores of the two choices.
      k: pairs wanted.
      slots: duels chosen at once, each with an anchor of its own.
    """

    space: PairSpace
    stats: Any
    prompt_of: Int[Array, "N"]
    ticket: Float[Array, "P"]
    first: First
    second: Second
    k: int
    slots: int


class _State(NamedTuple):
    """Between two calls of `_play`.

    Attributes:
      key: of the duels to come.
      partners: `[N]` number of responses with which each still has a pair.
      turns: `[P]` duels of each prompt.
      pairs: `[k, 2]` the batch so far; unused places hold N.
      total: pairs of the batch so far.
      nonfinite: whether any score was NaN or infinite.
    """

    key: PRNGKey
    partners: Int[Array, "N"]
    turns: Int[Array, "P"]
    pairs: Int[Array, "k 2"]
    total: Int[Array, ""]
    nonfinite: Bool[Array, ""]


def duels(
    key: PRNGKey, stats: Any, finite: Bool[Array, "N"], space: PairSpace, k: int, first: First, second: Second
) -> Selection:
    """k duels: the response of largest `first` score, and of its partners the one of largest `second` score.

    Args:
      key: for the anchors and the draws of the scores.
      stats: inputs of the scores, a pytree of `[N, ...]`, finite.
      finite: `[N]` whether the inputs were finite.
      space: which pairs.
      k: number of pairs, a Python int.
      first, second: scores of the responses of an arena: the anchor in a `within` space, where duels of many prompts
        are chosen at once; all responses otherwise.

    Returns:
      The pairs in the order they were drawn, gains 0. Status NONFINITE, or EXHAUSTED where there are fewer pairs.
    """
    size = space.eligible.shape[0]
    prompts = space.num_prompts
    key, key_order = jax.random.split(key)
    game = _Game(
        space=space,
        stats=stats,
        prompt_of=space.prompt_of,
        ticket=jax.random.uniform(key_order, (prompts,), jnp.float32),
        first=first,
        second=second,
        k=k,
        slots=min(prompts, k) if space.kind == "within" else 1,
    )
    start = _State(
        key=key,
        partners=_partner_counts(space),
        turns=jnp.zeros(prompts, jnp.int32),
        pairs=jnp.full((k, 2), size, jnp.int32),
        total=jnp.int32(0),
        nonfinite=jnp.bool_(False),
    )
    end = jax.lax.while_loop(
        lambda state: (state.total < k) & (state.partners > 0).any(), lambda state: _play(game, state), start
    )
    valid = jnp.arange(k, dtype=jnp.int32) < end.total
    sound = (finite | ~space.eligible).all() & ~end.nonfinite
    status = worst(
        jnp.where(sound, jnp.int32(Status.OK), jnp.int32(Status.NONFINITE)),
        jnp.where(valid.all(), jnp.int32(Status.OK), jnp.int32(Status.EXHAUSTED)),
    )
    return Selection(jnp.where(valid[:, None], end.pairs, 0), jnp.zeros(k, jnp.float32), valid, status)


def _play(game: _Game, state: _State) -> _State:
    """A duel in each of `slots` anchors."""
    space, k, slots = game.space, game.k, game.slots
    size = space.eligible.shape[0]
    key, key_duels = jax.random.split(state.key)
    drawn, anchor = _anchors(game, state)
    arena = jnp.arange(size, dtype=jnp.int32)[None, :]
    local = jax.tree.map(lambda leaf: leaf[None], game.stats)
    if space.kind == "within":
        arena = anchor[:, None] * space.width + jnp.arange(space.width, dtype=jnp.int32)[None, :]
        local = jax.tree.map(lambda leaf: leaf[arena], game.stats)
    row = jnp.arange(slots, dtype=jnp.int32)
    allowed = (state.partners[arena] > 0) & (game.prompt_of[arena] == anchor[:, None])
    scores, memory = jax.vmap(game.first)(jax.random.split(key_duels, slots), local, allowed)
    one, nonfinite_first = _choose(scores, allowed)
    i = arena[row, one]
    allowed = _partners_left(space, anchor, arena, i, state.pairs)
    two, nonfinite_second = _choose(jax.vmap(game.second)(memory, local, one, allowed), allowed)
    j = arena[row, two]

    found = drawn & allowed.any(axis=1)
    place = jnp.where(found, state.total + jnp.cumsum(found, dtype=jnp.int32) - 1, k)
    pairs = jnp.stack([jnp.minimum(i, j), jnp.maximum(i, j)], axis=1)
    # Partners of i are counted anew: a list may hold a pair twice.
    left = jnp.maximum(allowed.sum(axis=1, dtype=jnp.int32) - 1, 0)
    partners = state.partners.at[jnp.where(drawn, i, size)].set(left, mode="drop")
    return _State(
        key=key,
        partners=partners.at[jnp.where(found, j, size)].add(-1, mode="drop"),
        turns=state.turns.at[anchor].add(found.astype(jnp.int32)),
        pairs=state.pairs.at[place].set(pairs, mode="drop"),
        total=jnp.minimum(state.total + found.sum(dtype=jnp.int32), k),
        nonfinite=state.nonfinite | nonfinite_first | nonfinite_second,
    )


def _anchors(game: _Game, state: _State) -> tuple[Bool[Array, "c"], Int[Array, "c"]]:
    """A prompt for each slot, of those that hold pairs and had the fewest duels, and whether there was one left."""
    holds = jnp.zeros(len(game.ticket), bool).at[game.prompt_of].max(state.partners > 0)
    due = holds & (state.turns == jnp.where(holds, state.turns, jnp.iinfo(jnp.int32).max).min())
    ticket, anchor = jax.lax.top_k(jnp.where(due, game.ticket, -1.0), game.slots)
    return ticket >= 0, anchor


def _choose(scores: Float[Array, "c n"], allowed: Bool[Array, "c n"]) -> tuple[Int[Array, "c"], Bool[Array, ""]]:
    """The place of the largest allowed score of each row, and whether any allowed score is NaN or infinite."""
    best = jnp.where(allowed, jnp.nan_to_num(scores), -jnp.inf).argmax(axis=1).astype(jnp.int32)
    return best, (allowed & ~(scores < jnp.inf)).any()


def _partner_counts(space: PairSpace) -> Int[Array, "N"]:
    """Number of responses with which each response has a pair in the space."""
    size = space.size
    if space.pairs is not None:
        ends, valid = space.pairs, valid_pairs(space)
        count, sign = jnp.zeros(size, jnp.int32), 1
    else:
        ends, valid = space.excluded, may_pair(space, space.excluded)
        count, sign = partner_counts(space), -1
    return count.at[jnp.where(valid[:, None], ends, size)].add(sign, mode="drop")


def _partners_left(
    space: PairSpace, anchor: Int[Array, "c"], arena: Int[Array, "c n"], i: Int[Array, "c"], pairs: Int[Array, "k 2"]
) -> Bool[Array, "c n"]:
    """Whether each response of each arena has a pair with i that is in the space and not in the batch."""
    size, prompt_of = space.eligible.shape[0], space.prompt_of
    allowed = space.eligible[arena] & (arena != i[:, None])
    if space.kind == "cross":
        allowed &= prompt_of[arena] != prompt_of[i][:, None]
    elif space.pairs is not None:
        low, high = space.pairs.T
        other = jnp.where(low == i[0], high, jnp.where(high == i[0], low, size))
        allowed &= jnp.zeros(size, bool).at[other].set(True, mode="drop")[None, :]
    if space.alike is not None:
        allowed &= space.alike[arena] != space.alike[i][:, None]
    excluded = jnp.concatenate([space.excluded, pairs])
    excluded = jnp.concatenate([excluded, excluded[:, ::-1]])
    one, other = jnp.minimum(excluded, size - 1).T
    applies = (excluded < size).all(axis=1)
    slot = jnp.zeros_like(one)
    if space.kind == "within":
        applies &= prompt_of[one] == prompt_of[other]
        slot = jnp.full(size // space.width, -1, jnp.int32).at[anchor].set(jnp.arange(len(anchor), dtype=jnp.int32))
        slot = slot[prompt_of[one]]
        other %= space.width
    applies &= (slot >= 0) & (i[slot] == one)
    return allowed.at[jnp.where(applies, slot, len(anchor)), other].set(False, mode="drop")


class RewardStats(NamedTuple):
    """Mean rewards `[n]` and the rewards of members `[n, K]`."""

    mean: Float[Array, "n"]
    members: Float[Array, "n K"]


def of_ensemble(belief: Belief) -> tuple[RewardStats, Bool[Array, "N"]]:
    """Means and members, 0 where not finite, and `[N]` whether all of a response were finite."""
    finite = jnp.isfinite(belief.rewards) & jnp.isfinite(belief.member_rewards).all(axis=0)
    members = jnp.where(finite[:, None], belief.member_rewards.T, 0)
    return RewardStats(jnp.where(finite, belief.rewards, 0), members), finite


def _of_mean(belief: Belief) -> tuple[Float[Array, "N"], Bool[Array, "N"]]:
    finite = jnp.isfinite(belief.rewards)
    return jnp.where(finite, belief.rewards, 0), finite


def thompson(key: PRNGKey, stats: Any, allowed: Bool[Array, "n"]) -> tuple[Float[Array, "n"], PRNGKey]:
    """The rewards of a random member, a draw from the posterior; the memory is another key."""
    key, rest = jax.random.split(key)
    return stats.members[:, jax.random.randint(key, (), 0, stats.members.shape[1], jnp.int32)], rest


def _dissent(stats: RewardStats, one: Int[Array, ""], allowed: Bool[Array, "n"]) -> Bool[Array, "K"]:
    """Whether each member prefers an allowed response to the first."""
    return jnp.where(allowed[:, None], stats.members, -jnp.inf).max(axis=0) > stats.members[one]


def double_ts(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Double Thompson sampling: the favourite of a random member against that of another draw.

    i = argmax R_m; j = argmax R_m' over i and its partners, m' drawn anew until j is not i: one draw among the members
    whose favourite is another. Without such a member j is random; published code first retries 10 to 30 times.
    Gain: 0. Source: Dwaracherla et al. (arXiv 2402.00396).
    """

    def second(key: PRNGKey, stats: RewardStats, one: Array, allowed: Array) -> Array:
        key_member, key_any = jax.random.split(key)
        dissent = _dissent(stats, one, allowed)
        member = jnp.where(dissent, jax.random.uniform(key_member, dissent.shape, jnp.float32), -1.0).argmax()
        return jnp.where(
            dissent.any(), stats.members[:, member], jax.random.uniform(key_any, allowed.shape, jnp.float32)
        )

    return duels(key, *of_ensemble(belief), space, k, thompson, second)


def eets(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Thompson sampling by members without replacement: the favourites of the first two that differ.

    i = argmax R_m of the first member of a random order; j = argmax over i and its partners of the next members, the
    first that is not i. If all name i, j is second best for the first member. Gain: 0. Source: Liu et al., SEA
    (arXiv 2411.01493, oat).
    """

    def first(key: PRNGKey, stats: RewardStats, allowed: Array) -> tuple[Array, Array]:
        order = jnp.argsort(jax.random.uniform(key, stats.members.shape[1:], jnp.float32))
        return stats.members[:, order[0]], order

    def second(order: Array, stats: RewardStats, one: Array, allowed: Array) -> Array:
        return stats.members[:, order[_dissent(stats, one, allowed)[order].at[0].set(False).argmax()]]

    return duels(key, *of_ensemble(belief), space, k, first, second)


def baits(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """The favourite of a random member against the response of most uncertain margin to it.

    i = argmax R_m; j = argmax Var_m(R_i - R_j). Gain: 0. Source: oat (arXiv 2411.01493).
    """

    def second(key: PRNGKey, stats: RewardStats, one: Array, allowed: Array) -> Array:
        return jnp.var(stats.members - stats.members[one][None, :], axis=1)

    return duels(key, *of_ensemble(belief), space, k, thompson, second)


def drts(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Double reverse Thompson sampling: a likely best response against a likely worst.

    i = argmax R_m; j = argmin R_m' of a fresh member m'. Gain: 0. Source: ActiveUltraFeedback (arXiv 2603.09692).
    """

    def second(key: PRNGKey, stats: RewardStats, one: Array, allowed: Array) -> Array:
        return -thompson(key, stats, allowed)[0]

    return duels(key, *of_ensemble(belief), space, k, thompson, second)


def _tilted(
    key: PRNGKey, belief: Belief, space: PairSpace, k: int, scales: tuple[Array, Array], noise: Array
) -> Selection:
    """First ~ softmax(scales[0] mu / noise), second ~ softmax(scales[1] mu / noise), by the Gumbel trick."""

    def draw(key: PRNGKey, mean: Array, scale: Array) -> Array:
        return scale * mean + noise * jax.random.gumbel(key, mean.shape, jnp.float32)

    def first(key: PRNGKey, mean: Array, allowed: Array) -> tuple[Array, PRNGKey]:
        key, rest = jax.random.split(key)
        return draw(key, mean, scales[0]), rest

    def second(key: PRNGKey, mean: Array, one: Array, allowed: Array) -> Array:
        return draw(key, mean, scales[1])

    return duels(key, *_of_mean(belief), space, k, first, second)


def boltzmann(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Two responses drawn by their mean reward: probability proportional to exp(mu / temperature), twice.

    The second is drawn among the partners of the first; temperature 0 takes the best. Gain: 0. Source: the baseline of
    Dwaracherla et al. (arXiv 2402.00396).
    """
    one = jnp.float32(1)
    return _tilted(key, belief, space, k, (one, one), jnp.asarray(hparams.temperature, jnp.float32))


def pilaf(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """A response of a policy more optimistic than the optimal one against one of a more pessimistic policy.

    i ~ softmax((1/b + 1) mu), j ~ softmax((1/b - 1) mu) among its partners: the optimal policy exp(mu / b) under a KL
    penalty b, tilted by exp(mu) either way; responses stand for draws of the reference policy. b is `temperature`, as
    for `boltzmann`: at its default 1, j is a plain draw of the reference, below that both seek reward, above it j seeks
    low reward. The paper makes half of its pairs ordinary; this is the other half. Gain: 0.
    Source: Feng et al. (arXiv 2502.04270), here on given responses instead of by decoding.
    """
    b = jnp.asarray(hparams.temperature, jnp.float32)
    return _tilted(key, belief, space, k, (1 + b, 1 - b), b)


def best_of_four(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """UltraFeedback's heuristic: four random responses of a prompt, the best of them against another of them.

    i is the best by mu of four random responses of the prompt that have a partner left, j any other of the four, or any
    partner of i where none of the four is one, as in `cross` spaces. Gain: 0. Source: UltraFeedback (arXiv 2310.01377),
    as run by ActiveUltraFeedback (arXiv 2603.09692).
    """

    def first(key: PRNGKey, mean: Array, allowed: Array) -> tuple[Array, tuple[PRNGKey, Array]]:
        key, rest = jax.random.split(key)
        ticket = jnp.where(allowed, jax.random.uniform(key, allowed.shape, jnp.float32), -1.0)
        fourth = jax.lax.top_k(ticket, min(4, len(ticket)))[0][-1]
        four = allowed & (ticket >= fourth)
        return jnp.where(four, mean, -jnp.inf), (rest, four)

    def second(memory: tuple[PRNGKey, Array], mean: Array, one: Array, allowed: Array) -> Array:
        key, four = memory
        return jax.random.uniform(key, allowed.shape, jnp.float32) + four.astype(jnp.float32)

    return duels(key, *_of_mean(belief), space, k, first, second)
