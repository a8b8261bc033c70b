"""Rules that choose a first and then a second response, and the engine that makes a batch of such duels.

A batch is a sequence of duels. Each has an anchor, a prompt drawn without replacement until all that still hold pairs
were used, and then again. The first response is chosen among those of the anchor that have a partner left, the second
among the partners of the first that are left: of its prompt in a `within` space, of other prompts in `cross`, any in
`all`, its partners of the list in `listed`. So no pair comes twice and nothing plays itself, which published code
avoids by trying some 10 to 30 times and then drawing at random. Gains are 0: the order is that of the draw.

R is `[K, N]`, the rewards of K members, and mu their mean. Published rules draw mu + beta z s with z uniform on (-1, 1)
and s the sd of each response by itself, as if rewards were independent; here a draw is a member, which knows how the
rewards of responses go together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import Belief, HParams, PairSpace, Selection
from jarm.core.status import Status, worst
from jarm.core.types import Array, Bool, Float, Int, PRNGKey
from jarm.design.spaces import alive_pairs, prompts_of

First = Callable[[PRNGKey, Any, Bool[Array, "n"]], tuple[Float[Array, "n"], Any]]
"""`(key, numbers of n responses, which may be first) -> scores, and what the choice of the second is to know`."""
Second = Callable[[Any, Any, Int[Array, ""], Bool[Array, "n"]], Float[Array, "n"]]
"""`(what the first handed on, numbers, which is first, which may be second) -> scores`."""
Carry = tuple[Array, Array, Array, Array, Array, Array]


def duels(
    key: PRNGKey, numbers: Any, finite: Bool[Array, "N"], space: PairSpace, k: int, first: First, second: Second
) -> Selection:
    """k duels: the response of largest `first` score, and of its partners the one of largest `second` score.

    Args:
      key: anchors and what the rule draws.
      numbers: what a rule knows of each response, a pytree of `[N, ...]`, finite.
      finite: `[N]` whether it was finite.
      space: which pairs.
      k: how many, a Python int.
      first, second: scores of the responses of an arena: of the anchor in a `within` space, where duels of many
        prompts are chosen at once, of all responses otherwise.

    Returns:
      The pairs in the order they were drawn, gains 0. Status NONFINITE, or EXHAUSTED where there are fewer pairs.
    """
    size, width = space.eligible.shape[0], space.width
    inner = space.kind == "within"
    home = prompts_of(space)
    prompts = size // width if space.prompt is None else size
    slots = min(prompts, k) if inner else 1
    key, key_order = jax.random.split(key)
    ticket = jax.random.uniform(key_order, (prompts,))
    most = jnp.iinfo(jnp.int32).max
    row = jnp.arange(slots, dtype=jnp.int32)

    def unfinished(carry: Carry) -> Bool[Array, ""]:
        _, partners, _, _, count, _ = carry
        return (count < k) & (partners > 0).any()

    def play(carry: Carry) -> Carry:
        key, partners, turns, pairs, count, bad = carry
        key, key_duels = jax.random.split(key)
        holds = jnp.zeros(prompts, bool).at[home].max(partners > 0)
        turn = holds & (turns == jnp.where(holds, turns, most).min())
        drawn, anchor = jax.lax.top_k(jnp.where(turn, ticket, -1.0), slots)
        arena = jnp.arange(size, dtype=jnp.int32)[None, :]
        local = jax.tree.map(lambda leaf: leaf[None], numbers)
        if inner:
            arena = anchor[:, None] * width + jnp.arange(width, dtype=jnp.int32)[None, :]
            local = jax.tree.map(lambda leaf: leaf[arena], numbers)
        able = (partners[arena] > 0) & (home[arena] == anchor[:, None])
        scores, memory = jax.vmap(first)(jax.random.split(key_duels, slots), local, able)
        one, bad_first = _choose(scores, able)
        i = arena[row, one]
        able = _partners_left(space, anchor, arena, i, pairs)
        two, bad_second = _choose(jax.vmap(second)(memory, local, one, able), able)
        j = arena[row, two]
        found = (drawn >= 0) & able.any(axis=1)
        place = jnp.where(found, count + jnp.cumsum(found, dtype=jnp.int32) - 1, k)
        chosen = jnp.stack([jnp.minimum(i, j), jnp.maximum(i, j)], axis=1)
        # Counted anew, so that a pair that a list holds twice cannot be waited for.
        left = jnp.maximum(able.sum(axis=1, dtype=jnp.int32) - 1, 0)
        partners = partners.at[jnp.where(drawn >= 0, i, size)].set(left, mode="drop")
        partners = partners.at[jnp.where(found, j, size)].add(-1, mode="drop")
        turns = turns.at[anchor].add(found.astype(jnp.int32))
        pairs = pairs.at[place].set(chosen, mode="drop")
        count = jnp.minimum(count + found.sum(dtype=jnp.int32), k)
        return key, partners, turns, pairs, count, bad | bad_first | bad_second

    start = (
        key,
        _partner_counts(space),
        jnp.zeros(prompts, jnp.int32),
        jnp.full((k, 2), size, jnp.int32),
        jnp.int32(0),
        jnp.bool_(False),
    )
    _, _, _, pairs, count, bad = jax.lax.while_loop(unfinished, play, start)
    valid = jnp.arange(k, dtype=jnp.int32) < count
    fine = jnp.where((finite | ~space.eligible).all() & ~bad, jnp.int32(Status.OK), jnp.int32(Status.NONFINITE))
    short = jnp.where(valid.all(), jnp.int32(Status.OK), jnp.int32(Status.EXHAUSTED))
    return Selection(jnp.where(valid[:, None], pairs, 0), jnp.zeros(k, jnp.float32), valid, worst(fine, short))


def _choose(scores: Float[Array, "c n"], able: Bool[Array, "c n"]) -> tuple[Int[Array, "c"], Bool[Array, ""]]:
    """The largest score of each row, always of one that may be chosen; and whether any is NaN or infinite."""
    best = jnp.where(able, jnp.nan_to_num(scores), -jnp.inf).argmax(axis=1).astype(jnp.int32)
    return best, (able & ~(scores < jnp.inf)).any()


def _partner_counts(space: PairSpace) -> Int[Array, "N"]:
    """With how many responses each has a pair in the space."""
    size, eligible = space.eligible.shape[0], space.eligible
    if space.pairs is not None:
        ends, alive = space.pairs, alive_pairs(space)
        held, sign = jnp.zeros(size, jnp.int32), 1
    else:
        home, ends = prompts_of(space), jnp.minimum(space.excluded, size - 1)
        same = jax.ops.segment_sum(eligible.astype(jnp.int32), home, size)[home]
        every = eligible.sum(dtype=jnp.int32)
        held = {"within": same - 1, "cross": every - same, "all": jnp.full(size, every - 1)}[space.kind]
        held, sign = jnp.where(eligible, held, 0), -1
        alive = (space.excluded < size).all(axis=1) & eligible[ends].all(axis=1)
        if space.kind != "all":
            alive &= (home[ends[:, 0]] == home[ends[:, 1]]) == (space.kind == "within")
    return held.at[jnp.where(alive[:, None], ends, size)].add(sign, mode="drop")


def _partners_left(
    space: PairSpace, anchor: Int[Array, "c"], arena: Int[Array, "c n"], i: Int[Array, "c"], pairs: Int[Array, "k 2"]
) -> Bool[Array, "c n"]:
    """Which responses of each arena have a pair with i that is in the space and not in the batch."""
    size, home = space.eligible.shape[0], prompts_of(space)
    able = space.eligible[arena] & (arena != i[:, None])
    if space.kind == "cross":
        able &= home[arena] != home[i][:, None]
    elif space.pairs is not None:
        low, high = space.pairs.T
        other = jnp.where(low == i[0], high, jnp.where(high == i[0], low, size))
        able &= jnp.zeros(size, bool).at[other].set(True, mode="drop")[None, :]
    struck = jnp.concatenate([space.excluded, pairs])
    struck = jnp.concatenate([struck, struck[:, ::-1]])
    one, other = jnp.minimum(struck, size - 1).T
    gone = (struck < size).all(axis=1)
    slot = jnp.zeros_like(one)
    if space.kind == "within":
        gone &= home[one] == home[other]
        slot = jnp.full(size // space.width, -1, jnp.int32).at[anchor].set(jnp.arange(len(anchor), dtype=jnp.int32))
        slot = slot[home[one]]
        other %= space.width
    gone &= (slot >= 0) & (i[slot] == one)
    return able.at[jnp.where(gone, slot, len(anchor)), other].set(False, mode="drop")


class Beliefs(NamedTuple):
    """What a duel looks at: mean rewards `[n]`, and the rewards of members `[n, K]`."""

    mean: Float[Array, "n"]
    members: Float[Array, "n K"]


def of_ensemble(belief: Belief) -> tuple[Beliefs, Bool[Array, "N"]]:
    """Means and members, 0 where not finite, and whether a response has all of them."""
    finite = jnp.isfinite(belief.rewards) & jnp.isfinite(belief.member_rewards).all(axis=0)
    members = jnp.where(finite[:, None], belief.member_rewards.T, 0)
    return Beliefs(jnp.where(finite, belief.rewards, 0), members), finite


def _of_mean(belief: Belief) -> tuple[Float[Array, "N"], Bool[Array, "N"]]:
    finite = jnp.isfinite(belief.rewards)
    return jnp.where(finite, belief.rewards, 0), finite


def thompson(key: PRNGKey, known: Any, able: Bool[Array, "n"]) -> tuple[Float[Array, "n"], PRNGKey]:
    """The rewards of a random member, which stands for a draw from the posterior; hands on another key."""
    key, rest = jax.random.split(key)
    return known.members[:, jax.random.randint(key, (), 0, known.members.shape[1])], rest


def _dissent(known: Beliefs, one: Int[Array, ""], able: Bool[Array, "n"]) -> Bool[Array, "K"]:
    """Which members like another response that may be chosen better than the first."""
    return jnp.where(able[:, None], known.members, -jnp.inf).max(axis=0) > known.members[one]


def double_ts(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Double Thompson sampling: the favourite of a random member against that of another draw.

    i = argmax R_m; j = argmax R_m' over i and its partners, m' drawn anew until j is not i. That is one draw among the
    members whose favourite is another. If there is none, published code gives up after 10 to 30 draws for a random j;
    here at once. Gain: 0. Source: Dwaracherla et al. (arXiv 2402.00396).
    """

    def second(key: PRNGKey, known: Beliefs, one: Array, able: Array) -> Array:
        key_member, key_any = jax.random.split(key)
        dissent = _dissent(known, one, able)
        member = jnp.where(dissent, jax.random.uniform(key_member, dissent.shape), -1.0).argmax()
        return jnp.where(dissent.any(), known.members[:, member], jax.random.uniform(key_any, able.shape))

    return duels(key, *of_ensemble(belief), space, k, thompson, second)


def eets(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Thompson sampling by members without replacement: the favourites of the first two that differ.

    i = argmax R_m of the first member of a random order; j = argmax over i and its partners of the next members, the
    first that is not i. If all name i, j is second best for the first member. Gain: 0. Source: Liu et al., SEA
    (arXiv 2411.01493, oat).
    """

    def first(key: PRNGKey, known: Beliefs, able: Array) -> tuple[Array, Array]:
        order = jnp.argsort(jax.random.uniform(key, known.members.shape[1:]))
        return known.members[:, order[0]], order

    def second(order: Array, known: Beliefs, one: Array, able: Array) -> Array:
        return known.members[:, order[_dissent(known, one, able)[order].at[0].set(False).argmax()]]

    return duels(key, *of_ensemble(belief), space, k, first, second)


def baits(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """The favourite of a random member against the response the members are least sure how to compare with it.

    i = argmax R_m; j = argmax Var_m(R_i - R_j). Gain: 0. Source: oat (arXiv 2411.01493).
    """

    def second(key: PRNGKey, known: Beliefs, one: Array, able: Array) -> Array:
        return jnp.var(known.members - known.members[one][None, :], axis=1)

    return duels(key, *of_ensemble(belief), space, k, thompson, second)


def drts(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Double reverse Thompson sampling: a likely best response against a likely worst.

    i = argmax R_m; j = argmin R_m' of a fresh member m'. Gain: 0. Source: ActiveUltraFeedback (arXiv 2603.09692).
    """

    def second(key: PRNGKey, known: Beliefs, one: Array, able: Array) -> Array:
        return -thompson(key, known, able)[0]

    return duels(key, *of_ensemble(belief), space, k, thompson, second)


def _tilted(
    key: PRNGKey, belief: Belief, space: PairSpace, k: int, scales: tuple[Array, Array], noise: Array
) -> Selection:
    """First ~ softmax(scales[0] mu / noise), second ~ softmax(scales[1] mu / noise), by the Gumbel trick."""

    def draw(key: PRNGKey, mean: Array, scale: Array) -> Array:
        return scale * mean + noise * jax.random.gumbel(key, mean.shape)

    def first(key: PRNGKey, mean: Array, able: Array) -> tuple[Array, PRNGKey]:
        key, rest = jax.random.split(key)
        return draw(key, mean, scales[0]), rest

    def second(key: PRNGKey, mean: Array, one: Array, able: Array) -> Array:
        return draw(key, mean, scales[1])

    return duels(key, *_of_mean(belief), space, k, first, second)


def boltzmann(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Two responses drawn by how good they look: probability proportional to exp(mu / temperature), twice.

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
    Source: Feng et al. (arXiv 2502.04270), here on a pool instead of by decoding.
    """
    b = jnp.asarray(hparams.temperature, jnp.float32)
    return _tilted(key, belief, space, k, (1 + b, 1 - b), b)


def best_of_four(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """UltraFeedback's heuristic: four random responses of a prompt, the best of them against another of them.

    i is the best by mu of four random responses of the prompt that have a partner left, j any other of the four; any
    partner of i where none of these is one, as in `cross` spaces. Gain: 0. Source: UltraFeedback (arXiv 2310.01377),
    as run by ActiveUltraFeedback (arXiv 2603.09692).
    """

    def first(key: PRNGKey, mean: Array, able: Array) -> tuple[Array, tuple[PRNGKey, Array]]:
        key, rest = jax.random.split(key)
        ticket = jnp.where(able, jax.random.uniform(key, able.shape), -1.0)
        least = jax.lax.top_k(ticket, min(4, len(ticket)))[0][-1]
        four = able & (ticket >= least)
        return jnp.where(four, mean, -jnp.inf), (rest, four)

    def second(handed: tuple[PRNGKey, Array], mean: Array, one: Array, able: Array) -> Array:
        key, four = handed
        return jax.random.uniform(key, able.shape) + four

    return duels(key, *_of_mean(belief), space, k, first, second)
