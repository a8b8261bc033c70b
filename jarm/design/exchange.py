"""Fedorov exchange: a batch improved by swaps of one of its pairs for one outside, until no swap of the space helps.

Let A be the information with the whole batch, u = v x^T A^-1 x and u_ij = sqrt(v_i v_j) x_i^T A^-1 x_j. A swap of i for
j multiplies det A by

    (1 + u_j) (1 - u_i) + u_ij^2 <= 1 + u_j - u_i,

so only members with u_i below the largest u_j matter, few where the batch is good. A full pass finds the pairs with the
best swaps; the best of these swaps are made until none is left, and then a new pass is made.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import Limits, PairSpace, Selection
from jarm.core.linalg import distances, grown_root, matmul
from jarm.core.status import Status, worst
from jarm.core.types import AnyMesh, Array, Bool, Float, Int
from jarm.design.criteria import Criterion
from jarm.design.fisher import with_weights
from jarm.design.greedy import greedy
from jarm.design.problem import Problem, make_problem, near_copies, overflow, require_log_det, whitener
from jarm.design.scorer import Scorer
from jarm.design.spaces import TILE, as_list, exclude, find

_MIN_GAIN = 1e-4
"""A swap counts if it multiplies the determinant by more than 1 + this: ten times the accuracy of float32."""
_NOISE = 8 * float(jnp.finfo(jnp.float32).eps)
"""Rounding of a gain, as a share of 1 + u."""


class ExchangeInfo(NamedTuple):
    """What an exchange did.

    Attributes:
      swaps: scalar int32, swaps made.
      passes: scalar int32, full passes over the space.
      gained: log det of the information, in nats, above that with the batch at the start.
      optimal: scalar bool: the last pass shows that no swap of one pair, within the limits, gains more than 1e-4 nats.
    """

    swaps: Int[Array, ""]
    passes: Int[Array, ""]
    gained: Float[Array, ""]
    optimal: Bool[Array, ""]


class _End(NamedTuple):
    """Numbers of responses, given the batch; any shape.

    Attributes:
      response: which response it is.
      reward, cost: its reward and cost; the cost is 0 where responses have none.
      open, open_prompt: whether the caps leave room for one more pair with the response, with its prompt.
    """

    response: Int[Array, "*n"]
    reward: Float[Array, "*n"]
    cost: Float[Array, "*n"]
    open: Bool[Array, "*n"]
    open_prompt: Bool[Array, "*n"]


class _Member(NamedTuple):
    """Pairs of the batch.

    Attributes:
      z: `[k, F]` scaled differences sqrt(v) x, in coordinates in which the information is the identity.
      u: `[k]` leverages; infinite where there is no pair.
      pairs, cost: `[k, 2]`, `[k]`.
    """

    z: Float[Array, "*k F"]
    u: Float[Array, "*k"]
    pairs: Int[Array, "*k 2"]
    cost: Float[Array, "*k"]


class _State(NamedTuple):
    """Between two passes: the batch, log det of its information, and whether another pass is of use."""

    pairs: Int[Array, "k 2"]
    log_det: Float[Array, ""]
    swaps: Int[Array, ""]
    passes: Int[Array, ""]
    ended: Bool[Array, ""]
    optimal: Bool[Array, ""]
    status: Int[Array, ""]


class _Inner(NamedTuple):
    """Between two swaps.

    Attributes:
      pairs, shortlist: the batch, and the pairs that may enter it.
      whiten, log_det: of the information with the batch.
      best: factor of the determinant, less 1, of the best swap.
      more: whether that was enough to look again.
    """

    pairs: Int[Array, "k 2"]
    shortlist: Int[Array, "K 2"]
    whiten: Float[Array, "F F"]
    log_det: Float[Array, ""]
    swaps: Int[Array, ""]
    best: Float[Array, ""]
    more: Bool[Array, ""]


def exchange(
    criterion: Criterion,
    features: Float[Array, "N F"],
    rewards: Float[Array, "N"],
    space: PairSpace,
    information: Float[Array, "F F"],
    selection: Selection,
    *,
    limits: Limits | None = None,
    shortlist: int = 1024,
    swaps: Int[Array, ""] | int | None = None,
    mesh: AnyMesh | None = None,
    tile: int = TILE,
) -> tuple[Selection, ExchangeInfo]:
    """Swap pairs of a batch for others of the space while that raises the log det of the information.

    The batch can only become better: each swap is judged by log det computed afresh.

    Args:
      criterion: a log determinant: `D_OPTIMAL` or `D_UNWEIGHTED`.
      features: `[N, F]` last-layer features of the responses.
      rewards: `[N]` rewards, in logits.
      space: which pairs; where they have costs, no pair is swapped for one that costs more.
      information: `[F, F]` positive definite information to start from (labelled pairs and prior).
      selection: the batch, of pairs of the space within the limits.
      limits: limits on the batch; a swap counts without the pair that leaves.
      shortlist: K, pairs kept by a full pass.
      swaps: maximum number of swaps; None for 10 k.
      mesh: devices that share the passes over a space of `cross` or `all` pairs.
      tile: pairs of other spaces scored together, which bounds memory.

    Returns:
      The batch in greedy order (each pair has the largest gain of those left) with gains in that order, or the given
      batch where no swap helps; and what was done. Status SINGULAR or NONFINITE, with the given batch, as for `greedy`.

    Raises:
      JarmError: the criterion is not a log determinant.

    Source: Fedorov, Theory of Optimal Experiments (1972).

    Example:
      From the worst pair to the best by one swap:

      >>> import functools, jax, jax.numpy as jnp
      >>> from jarm.core.base import Selection
      >>> from jarm.design.criteria import D_OPTIMAL
      >>> from jarm.design.exchange import exchange
      >>> from jarm.design.spaces import pair_space
      >>> features, rewards = jnp.array([[0.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), jnp.zeros(3)  # [N, F], [N] in logits
      >>> space = pair_space("within", 3, jnp.ones(3, bool))  # one prompt of R = 3 responses
      >>> start = Selection(jnp.array([[0, 2]]), jnp.zeros(1), jnp.ones(1, bool), jnp.int32(0))
      >>> swap = jax.jit(functools.partial(exchange, D_OPTIMAL))
      >>> batch, info = swap(features, rewards, space, jnp.eye(2), start)
      >>> batch.pairs.tolist(), int(info.swaps), bool(info.optimal)
      ([[1, 2]], 1, True)
    """
    require_log_det(criterion, "Exchange")
    problem = make_problem(criterion, features, rewards, space, information, limits=limits, mesh=mesh, tile=tile)
    max_swaps = 10 * selection.pairs.shape[0] if swaps is None else swaps
    pairs = jnp.where(selection.valid[:, None], selection.pairs, problem.size)
    before = _measured(problem, pairs)[1]
    status = jnp.where(problem.finite, jnp.int32(Status.OK), jnp.int32(Status.NONFINITE))
    start = _State(pairs, before, jnp.int32(0), jnp.int32(0), jnp.bool_(False), jnp.bool_(False), status)
    end = jax.lax.while_loop(_unfinished, functools.partial(_full_pass, problem, shortlist, max_swaps), start)
    fine = end.status == Status.OK
    better = fine & (end.swaps > 0)
    ordered = dataclasses.replace(_ordered(problem, end.pairs), status=selection.status)
    batch = jax.tree.map(lambda new, old: jnp.where(better, new, old), ordered, selection)
    info = ExchangeInfo(end.swaps, end.passes, jnp.where(better, end.log_det - before, 0), end.optimal & fine)
    return dataclasses.replace(batch, status=worst(selection.status, end.status)), info


def _unfinished(state: _State) -> Bool[Array, ""]:
    return ~state.ended & (state.status == Status.OK)


def _full_pass(problem: Problem, shortlist: int, max_swaps: Int[Array, ""] | int, state: _State) -> _State:
    """A pass that keeps so many pairs, then swaps for these while they help."""
    whiten, log_det = _measured(problem, state.pairs)
    y = matmul(problem.features, whiten.T)
    members = _members(problem, whiten, state.pairs)
    members = jax.tree.map(lambda leaf: leaf[jnp.argsort(members.u)], members)
    others = exclude(_without_costs(problem.space), state.pairs)
    best = problem.best_pairs(_swap_scorer(problem, members, _ends(problem, state.pairs), y), others, shortlist)

    positive = problem.singular == Status.OK
    begin = _Inner(state.pairs, best.pairs, whiten, log_det, state.swaps, jnp.float32(jnp.inf), positive)
    swap = functools.partial(_swap, problem)
    end = jax.lax.while_loop(lambda inner: inner.more & (inner.swaps < max_swaps), swap, begin)
    optimal = (end.swaps == state.swaps) & (jnp.maximum(best.rest, end.best) <= _MIN_GAIN)
    # Where rounding of the largest leverage may hide the smallest gain, nothing is claimed.
    optimal &= _NOISE * (1 + problem.leverage_bound(y)) <= _MIN_GAIN
    return _State(
        pairs=end.pairs,
        log_det=end.log_det,
        swaps=end.swaps,
        passes=state.passes + 1,
        ended=(end.swaps == state.swaps) | (end.swaps >= max_swaps),
        optimal=optimal,
        status=worst(state.status, problem.singular, overflow(whiten, best)),
    )


def _swap(problem: Problem, inner: _Inner) -> _Inner:
    """Make the best swap of a member for a pair of the shortlist, if it helps."""
    gains, u = _swap_gains(problem, inner)
    i, j = jnp.divmod(jnp.argmax(gains).astype(jnp.int32), inner.shortlist.shape[0])
    pairs = inner.pairs.at[i].set(inner.shortlist[j])
    shortlist = inner.shortlist.at[j].set(inner.pairs[i])
    whiten, log_det = _measured(problem, pairs)
    more = (
        (gains[i, j] > _MIN_GAIN + _NOISE * (1 + u[j]))
        & (log_det > inner.log_det + _MIN_GAIN / 2)
        & (problem.singular == Status.OK)
    )
    new = _Inner(pairs, shortlist, whiten, log_det, inner.swaps + 1, gains[i, j], more)
    old = inner._replace(best=gains[i, j], more=more)
    return jax.tree.map(lambda x, y: jnp.where(more, x, y), new, old)


def _swap_gains(problem: Problem, inner: _Inner) -> tuple[Float[Array, "k K"], Float[Array, "K"]]:
    """Factor of the determinant, less 1, of each swap, -inf where it may not be made; and u of the shortlist."""
    space, limits = problem.space, problem.limits
    members = _members(problem, inner.whiten, inner.pairs)
    z = matmul(problem.scaled_differences(inner.shortlist), inner.whiten.T)
    u = jnp.square(z).sum(axis=1)
    gains = u[None] - members.u[:, None] * (1 + u)[None] + jnp.square(matmul(members.z, z.T))
    gains = jnp.where(inner.shortlist[:, 0][None] < problem.size, gains, -jnp.inf)
    if space.costs is not None:
        gains = jnp.where(_costs(problem, inner.shortlist)[None] <= members.cost[:, None], gains, -jnp.inf)
    if limits.per_prompt is not None or limits.per_response is not None:
        ends = _ends(problem, inner.pairs)
        a, b = (jax.tree.map(lambda leaf, end=end: leaf[end], ends) for end in problem.ends(inner.shortlist))
        each = jax.vmap(functools.partial(_fits, problem), in_axes=(None, 0, 0))
        gains = jnp.where(jax.vmap(each, in_axes=(0, None, None))(members, a, b), gains, -jnp.inf)
    if limits.similarity is not None:
        x_in, x_out = problem.differences(inner.pairs), problem.differences(inner.shortlist)
        squares = jnp.square(x_in).sum(axis=1)[:, None], jnp.square(x_out).sum(axis=1)[None]
        alike = near_copies(matmul(x_in, x_out.T), *squares, limits.similarity)
        others = alike.sum(axis=0, dtype=jnp.int32)[None] - alike.astype(jnp.int32)
        gains = jnp.where(others == 0, gains, -jnp.inf)
    return gains, u


def _measured(problem: Problem, pairs: Int[Array, "k 2"]) -> tuple[Float[Array, "F F"], Float[Array, ""]]:
    """W that whitens the information with a batch, and the log det of that information."""
    root = grown_root(problem.root, problem.scaled_differences(pairs))
    return whitener(root), 2 * jnp.log(jnp.abs(jnp.diagonal(root))).sum()


def _members(problem: Problem, whiten: Float[Array, "F F"], pairs: Int[Array, "k 2"]) -> _Member:
    """Pairs of the batch, whitened."""
    z = matmul(problem.scaled_differences(pairs), whiten.T)
    u = jnp.where(pairs[:, 0] < problem.size, jnp.square(z).sum(axis=1), jnp.inf)
    return _Member(z, u, pairs, _costs(problem, pairs))


def _ends(problem: Problem, pairs: Int[Array, "k 2"]) -> _End:
    """Numbers of each response, given the batch."""
    space, limits, size, prompts = problem.space, problem.limits, problem.size, problem.prompts
    uses = jnp.zeros(size, jnp.int32).at[pairs].add(1, mode="drop")
    own = jnp.where(pairs < size, problem.prompt_of[jnp.minimum(pairs, size - 1)], prompts)
    prompt_uses = jnp.zeros(prompts, jnp.int32).at[own[:, 0]].add(1, mode="drop")
    prompt_uses = prompt_uses.at[jnp.where(own[:, 0] == own[:, 1], prompts, own[:, 1])].add(1, mode="drop")
    everywhere = jnp.ones(size, bool)
    return _End(
        response=jnp.arange(size, dtype=jnp.int32),
        reward=problem.rewards,
        cost=jnp.zeros(size, jnp.float32) if space.costs is None or space.pairs is not None else space.costs,
        open=everywhere if limits.per_response is None else uses < limits.per_response,
        open_prompt=everywhere if limits.per_prompt is None else (prompt_uses < limits.per_prompt)[problem.prompt_of],
    )


def _costs(problem: Problem, pairs: Int[Array, "m 2"]) -> Float[Array, "m"]:
    """Costs of pairs, 0 where they have none."""
    costs, listed = problem.space.costs, problem.space.pairs
    if costs is None:
        return jnp.zeros(pairs.shape[0], jnp.float32)
    if listed is not None:
        return costs[find(listed, pairs)[0]]
    return costs[jnp.minimum(pairs, problem.size - 1)].sum(axis=1)


def _fits(problem: Problem, member: _Member, a: _End, b: _End) -> Bool[Array, "*n"]:
    """Whether the caps let the pair of two responses take the place of a member."""
    prompt_of, (first, second) = problem.prompt_of, member.pairs

    def has_room(end: _End) -> Array:
        freed = (end.response == first) | (end.response == second)
        prompt = prompt_of[end.response]
        return (end.open | freed) & (end.open_prompt | (prompt == prompt_of[first]) | (prompt == prompt_of[second]))

    return has_room(a) & has_room(b)


def _swap_scorer(problem: Problem, members: _Member, ends: _End, y: Float[Array, "N F"]) -> Scorer:
    """Pairs scored by their best swap: the factor of the determinant, less 1. Members come by rising u."""
    criterion, limits = problem.criterion, problem.limits
    capped = limits.per_prompt is not None or limits.per_response is not None
    priced = problem.space.costs is not None and problem.space.pairs is None

    def change(member: _Member, along: Array, v: Array, u: Array, a: _End, b: _End) -> Array:
        gain = u - member.u * (1 + u) + v * jnp.square(along)
        if capped:
            gain = jnp.where(_fits(problem, member, a, b), gain, -jnp.inf)
        if priced:
            gain = jnp.where(a.cost + b.cost <= member.cost, gain, -jnp.inf)
        return gain

    def pair(a: tuple[_End, Array], b: tuple[_End, Array]) -> Array:
        x = a[1] - b[1]
        v = criterion.weight(a[0].reward - b[0].reward)
        along = matmul(members.z, x)
        each = jax.vmap(lambda member, s: change(member, s, v, v * jnp.square(x).sum(), a[0], b[0]))
        return each(members, along).max()

    def tile(rows: tuple[_End, Array], columns: tuple[_End, Array]) -> Array:
        (a, y_rows), (b, y_columns) = rows, columns
        if criterion.weighted:
            v = with_weights(lambda v: v, a.reward, b.reward)
        else:
            v = criterion.weight(a.reward[:, None] - b.reward[None, :])
        u = v * jnp.maximum(distances(y_rows, y_columns), 0)
        s_rows, s_columns = matmul(members.z, y_rows.T), matmul(members.z, y_columns.T)
        a, b = jax.tree.map(lambda leaf: leaf[:, None], a), jax.tree.map(lambda leaf: leaf[None], b)

        def better(place: Array, best: Array) -> Array:
            member = jax.tree.map(lambda leaf: leaf[place], members)
            along = s_rows[place][:, None] - s_columns[place][None]
            return jnp.maximum(best, change(member, along, v, u, a, b))

        promising = (members.u < u.max()).sum(dtype=jnp.int32)
        return jax.lax.fori_loop(jnp.int32(0), promising, better, jnp.full(u.shape, -jnp.inf, jnp.float32))

    return Scorer((ends, y), pair, tile)


def _ordered(problem: Problem, pairs: Int[Array, "k 2"]) -> Selection:
    """Pairs in greedy order."""
    listed = jnp.stack(jax.lax.sort((pairs[:, 0], pairs[:, 1]), num_keys=2), axis=1)
    space = as_list(problem.space, listed)
    k = pairs.shape[0]
    return greedy(problem.criterion, problem.features, problem.rewards, space, problem.information, k, shortlist=k)[0]


def _without_costs(space: PairSpace) -> PairSpace:
    return dataclasses.replace(space, costs=None)
