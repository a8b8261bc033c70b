"""Fedorov exchange: a batch made better by swapping one of its pairs for one outside, until no swap of the space helps.

With A the information with the whole batch and u = v x^T A^-1 x, u_ij = sqrt(v_i v_j) x_i^T A^-1 x_j, a swap of i for j
multiplies det A by

    (1 + u_j) (1 - u_i) + u_ij^2 <= 1 + u_j - u_i,

so that only members with u_i below the largest u_j have to be looked at, few where the batch is good. A full pass finds
the pairs with the best swaps; swaps among these are made, best first, until none is left, and then a new pass is made.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import Limits, PairSpace, Selection
from jarm.core.linalg import cholesky, distances, grown_root, matmul
from jarm.core.status import JarmError, Status, worst
from jarm.core.types import Array, Bool, Float, Int
from jarm.design.criteria import D_OPTIMAL, D_UNWEIGHTED, Criterion
from jarm.design.fisher import centred, fisher_weight, with_weights
from jarm.design.greedy import greedy
from jarm.design.passes import best_pairs
from jarm.design.scorer import Scorer
from jarm.design.spaces import TILE, as_list, exclude, find

_LEAST = 1e-4
"""A swap counts where it multiplies the determinant by more than 1 + this: ten times what float32 can vouch for."""


class ExchangeInfo(NamedTuple):
    """What exchange reports beside its batch.

    Attributes:
      swaps: scalar int32, swaps made.
      passes: scalar int32, full passes over the space.
      gained: log det of the information, in nats, above that with the batch it started from.
      optimal: scalar bool: the last pass shows that no swap of one pair, within the limits, gains more than 1e-4 nats.
    """

    swaps: Int[Array, ""]
    passes: Int[Array, ""]
    gained: Float[Array, ""]
    optimal: Bool[Array, ""]


class _End(NamedTuple):
    """What a pass knows of responses; any shape.

    Attributes:
      number: which response it is.
      reward, cost: its own, 0 where responses have no costs.
      open, open_prompt: whether the caps leave room for one more pair with it, with its prompt.
    """

    number: Int[Array, "*n"]
    reward: Float[Array, "*n"]
    cost: Float[Array, "*n"]
    open: Bool[Array, "*n"]
    open_prompt: Bool[Array, "*n"]


class _Member(NamedTuple):
    """Pairs of the batch, those with the least to lose first.

    Attributes:
      z: `[k, F]` scaled differences sqrt(v) x, in coordinates in which the information is the identity.
      own: `[k]` u of each; infinite where there is no pair.
      pairs, cost: `[k, 2]`, `[k]`.
    """

    z: Float[Array, "*k F"]
    own: Float[Array, "*k"]
    pairs: Int[Array, "*k 2"]
    cost: Float[Array, "*k"]


class _State(NamedTuple):
    """Between two passes: the batch, log det of its information, and whether the last pass was of use."""

    pairs: Int[Array, "k 2"]
    log_det: Float[Array, ""]
    swaps: Int[Array, ""]
    passes: Int[Array, ""]
    ended: Bool[Array, ""]
    optimal: Bool[Array, ""]
    status: Int[Array, ""]


class _Inner(NamedTuple):
    """Between two swaps: the batch, the shortlist, what whitens the information, its log det.

    Attributes:
      best: by how much, less 1, the best swap multiplies the determinant.
      more: whether that was enough for another look.
    """

    pairs: Int[Array, "k 2"]
    listed: Int[Array, "K 2"]
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
    prior: Float[Array, "F F"],
    selection: Selection,
    *,
    limits: Limits | None = None,
    shortlist: int = 1024,
    swaps: Int[Array, ""] | int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    tile: int = TILE,
) -> tuple[Selection, ExchangeInfo]:
    """Swap pairs of a batch for others of the space while that raises the log det of the information.

    The batch can only become better: each swap is judged by log det computed afresh.

    Args:
      criterion: `D_OPTIMAL` or `D_UNWEIGHTED`.
      features: `[N, F]` last-layer features of the responses.
      rewards: `[N]` rewards.
      space: which pairs; where they have costs, no pair is swapped for one that costs more.
      prior: `[F, F]` positive definite information to start from (past labels and prior).
      selection: the batch, of pairs of the space within the limits.
      limits: what a batch has to keep to; a swap counts without the pair that leaves.
      shortlist: K, pairs kept by a full pass.
      swaps: most swaps; None for 10 k.
      mesh: devices that share the passes over a space of `cross` or `all` pairs.
      tile: pairs of other spaces scored together, which bounds memory.

    Returns:
      The batch in greedy order (each pair adds most of those left) with gains in that order, or the given one where no
      swap helps; and what was done. Status SINGULAR or NONFINITE, with the given batch, as for `greedy`.

    Raises:
      JarmError: the criterion is not a log determinant.

    Source: Fedorov, Theory of Optimal Experiments (1972).
    """
    if criterion.worth not in (D_OPTIMAL.worth, D_UNWEIGHTED.worth):
        raise JarmError("Exchange knows the log determinant only: use D_OPTIMAL or D_UNWEIGHTED.")
    features, rewards, prior = (jnp.asarray(each, jnp.float32) for each in (features, rewards, prior))
    space = jax.tree.map(jnp.asarray, space)
    limits = Limits() if limits is None else limits
    size, k, home = features.shape[0], selection.pairs.shape[0], space.prompt_of
    most = 10 * k if swaps is None else swaps
    finite = ((jnp.isfinite(rewards) & jnp.isfinite(features).all(axis=1)) | ~space.eligible).all()
    features, rewards = centred(features, space), jnp.where(space.eligible, rewards, 0)
    free = dataclasses.replace(space, costs=None)
    of_prior, singular = cholesky(prior)
    noise = 8 * jnp.finfo(jnp.float32).eps

    def differences(pairs: Int[Array, "m 2"]) -> tuple[Float[Array, "m F"], Float[Array, "m F"]]:
        """x and sqrt(v) x."""
        first, second = jnp.minimum(pairs, size - 1).T
        x = jnp.where(pairs[:, :1] < size, features[first] - features[second], 0)
        return x, jnp.sqrt(criterion.weight(rewards[first] - rewards[second]))[:, None] * x

    def measured(pairs: Int[Array, "k 2"]) -> tuple[Float[Array, "F F"], Float[Array, ""], Int[Array, ""]]:
        """What whitens the information with a batch, and its log det."""
        root = grown_root(of_prior.T, differences(pairs)[1])
        whiten = jax.scipy.linalg.solve_triangular(root.T, jnp.eye(root.shape[0]), lower=True)
        return whiten, 2 * jnp.log(jnp.abs(jnp.diagonal(root))).sum(), singular

    def ends(pairs: Int[Array, "k 2"]) -> _End:
        """Numbers of each response, given the batch."""
        uses = jnp.zeros(size, jnp.int32).at[pairs].add(1, mode="drop")
        prompts = space.num_prompts
        homes = jnp.where(pairs < size, home[jnp.minimum(pairs, size - 1)], prompts)
        used = jnp.zeros(prompts, jnp.int32).at[homes[:, 0]].add(1, mode="drop")
        used = used.at[jnp.where(homes[:, 0] == homes[:, 1], prompts, homes[:, 1])].add(1, mode="drop")
        everywhere = jnp.ones(size, bool)
        return _End(
            number=jnp.arange(size, dtype=jnp.int32),
            reward=rewards,
            cost=jnp.zeros(size) if space.costs is None or space.pairs is not None else space.costs,
            open=everywhere if limits.per_response is None else uses < limits.per_response,
            open_prompt=everywhere if limits.per_prompt is None else (used < limits.per_prompt)[home],
        )

    def cost_of(pairs: Int[Array, "m 2"]) -> Float[Array, "m"]:
        if space.costs is None:
            return jnp.zeros(pairs.shape[0])
        if space.pairs is not None:
            return space.costs[find(space.pairs, pairs)[0]]
        return space.costs[jnp.minimum(pairs, size - 1)].sum(axis=1)

    def fits(member: _Member, a: _End, b: _End) -> Bool[Array, "*n"]:
        """Whether the caps let a pair take the place of a member."""

        def room(end: _End) -> Array:
            first, second = member.pairs
            freed = (end.number == first) | (end.number == second)
            same = (home[end.number] == home[first]) | (home[end.number] == home[second])
            return (end.open | freed) & (end.open_prompt | same)

        return room(a) & room(b)

    capped = limits.per_prompt is not None or limits.per_response is not None
    priced = space.costs is not None and space.pairs is None

    def swap_scorer(members: _Member, of_each: _End, y: Float[Array, "N F"]) -> Scorer:
        """What the best swap for a pair multiplies the determinant by, less 1."""

        def change(member: _Member, along: Array, v: Array, u: Array, a: _End, b: _End) -> Array:
            gain = u - member.own * (1 + u) + v * jnp.square(along)
            if capped:
                gain = jnp.where(fits(member, a, b), gain, -jnp.inf)
            if priced:
                gain = jnp.where(a.cost + b.cost <= member.cost, gain, -jnp.inf)
            return gain

        def pair(a: tuple[_End, Array], b: tuple[_End, Array]) -> Array:
            x = a[1] - b[1]
            v = criterion.weight(a[0].reward - b[0].reward)
            along = matmul(members.z, x)
            each = jax.vmap(lambda member, s: change(member, s, v, v * jnp.square(x).sum(), a[0], b[0]))
            return each(members, along).max()

        def tile_of(rows: tuple[_End, Array], columns: tuple[_End, Array]) -> Array:
            (a, y_rows), (b, y_columns) = rows, columns
            if criterion.weight is fisher_weight:
                v = with_weights(lambda v: v, a.reward, b.reward)
            else:
                v = jnp.ones((a.reward.shape[0], b.reward.shape[0]))
            u = v * jnp.maximum(distances(y_rows, y_columns), 0)
            s_rows, s_columns = matmul(members.z, y_rows.T), matmul(members.z, y_columns.T)
            a, b = jax.tree.map(lambda leaf: leaf[:, None], a), jax.tree.map(lambda leaf: leaf[None], b)

            def better(place: Array, best: Array) -> Array:
                member = jax.tree.map(lambda leaf: leaf[place], members)
                along = s_rows[place][:, None] - s_columns[place][None]
                return jnp.maximum(best, change(member, along, v, u, a, b))

            promising = (members.own < u.max()).sum(dtype=jnp.int32)
            return jax.lax.fori_loop(jnp.int32(0), promising, better, jnp.full(u.shape, -jnp.inf))

        return Scorer((of_each, y), pair, tile_of)

    def full_pass(state: _State) -> _State:
        whiten, log_det, singular = measured(state.pairs)
        y = matmul(features, whiten.T)
        scaled = matmul(differences(state.pairs)[1], whiten.T)
        own = jnp.where(state.pairs[:, 0] < size, jnp.square(scaled).sum(axis=1), jnp.inf)
        members = _Member(scaled, own, state.pairs, cost_of(state.pairs))
        members = jax.tree.map(lambda leaf: leaf[jnp.argsort(own)], members)
        others = exclude(free, state.pairs)
        best = best_pairs(swap_scorer(members, ends(state.pairs), y), others, shortlist, mesh=mesh, tile=tile)

        def swap(inner: _Inner) -> _Inner:
            raw_in, z_in = differences(inner.pairs)
            raw_out, z_out = differences(inner.listed)
            z_in, z_out = matmul(z_in, inner.whiten.T), matmul(z_out, inner.whiten.T)
            own = jnp.where(inner.pairs[:, 0] < size, jnp.square(z_in).sum(axis=1), jnp.inf)
            u = jnp.square(z_out).sum(axis=1)
            gain = u[None] - own[:, None] * (1 + u)[None] + jnp.square(matmul(z_in, z_out.T))
            gain = jnp.where(inner.listed[:, 0][None] < size, gain, -jnp.inf)
            if space.costs is not None:
                gain = jnp.where(cost_of(inner.listed)[None] <= cost_of(inner.pairs)[:, None], gain, -jnp.inf)
            if capped:
                of_each = ends(inner.pairs)
                place = jnp.minimum(inner.listed, size - 1)
                a, b = (jax.tree.map(lambda leaf, end=end: leaf[place[:, end]], of_each) for end in (0, 1))
                members = _Member(z_in, own, inner.pairs, own)
                fit = jax.vmap(jax.vmap(fits, in_axes=(None, 0, 0)), in_axes=(0, None, None))(members, a, b)
                gain = jnp.where(fit, gain, -jnp.inf)
            if limits.similarity is not None:
                both = jnp.square(raw_in).sum(axis=1)[:, None] * jnp.square(raw_out).sum(axis=1)[None]
                alike = (jnp.square(matmul(raw_in, raw_out.T)) >= jnp.square(limits.similarity) * both) & (both > 0)
                crowd = alike.sum(axis=0, dtype=jnp.int32)[None] - alike
                gain = jnp.where(crowd == 0, gain, -jnp.inf)
            i, j = jnp.divmod(jnp.argmax(gain), shortlist)
            pairs = inner.pairs.at[i].set(inner.listed[j])
            listed = inner.listed.at[j].set(inner.pairs[i])
            whiten, log_det, singular = measured(pairs)
            more = (
                (gain[i, j] > _LEAST + noise * (1 + u[j]))
                & (log_det > inner.log_det + _LEAST / 2)
                & (singular == Status.OK)
            )
            new = _Inner(pairs, listed, whiten, log_det, inner.swaps + 1, gain[i, j], more)
            old = inner._replace(best=gain[i, j], more=more)
            return jax.tree.map(lambda x, y: jnp.where(more, x, y), new, old)

        begin = _Inner(
            state.pairs, best.pairs, whiten, log_det, state.swaps, jnp.float32(jnp.inf), singular == Status.OK
        )
        end = jax.lax.while_loop(lambda inner: inner.more & (inner.swaps < most), swap, begin)
        ended = (end.swaps == state.swaps) | (end.swaps >= most)
        optimal = (end.swaps == state.swaps) & (jnp.maximum(best.rest, end.best) <= _LEAST)
        # No leverage of the space exceeds this: where it drowns the least gain in rounding, nothing is claimed.
        optimal &= noise * (1 + 4 * jnp.square(y).sum(axis=1).max() * criterion.weight(jnp.zeros(()))) <= _LEAST
        fine = jnp.isnan(whiten).any() | (best.scores < jnp.inf).all()
        overflow = jnp.where(fine, Status.OK, Status.NONFINITE)
        return _State(
            end.pairs, end.log_det, end.swaps, state.passes + 1, ended, optimal, worst(state.status, singular, overflow)
        )

    def unfinished(state: _State) -> Array:
        return ~state.ended & (state.status == Status.OK)

    pairs = jnp.where(selection.valid[:, None], selection.pairs, size)
    before = measured(pairs)[1]
    status = jnp.where(finite, jnp.int32(Status.OK), jnp.int32(Status.NONFINITE))
    false = jnp.bool_(False)
    start = _State(pairs, before, jnp.int32(0), jnp.int32(0), false, false, status)
    end = jax.lax.while_loop(unfinished, full_pass, start)
    better = (end.status == Status.OK) & (end.swaps > 0)
    ordered = _ordered(criterion, features, rewards, free, prior, end.pairs)
    ordered = Selection(ordered.pairs, ordered.gains, ordered.valid, selection.status)
    batch = jax.tree.map(lambda new, old: jnp.where(better, new, old), ordered, selection)
    info = ExchangeInfo(
        end.swaps, end.passes, jnp.where(better, end.log_det - before, 0), end.optimal & (end.status == Status.OK)
    )
    return dataclasses.replace(batch, status=worst(selection.status, end.status)), info


def _ordered(
    criterion: Criterion,
    features: Float[Array, "N F"],
    rewards: Float[Array, "N"],
    space: PairSpace,
    prior: Float[Array, "F F"],
    pairs: Int[Array, "k 2"],
) -> Selection:
    """Pairs in greedy order."""
    listed = jnp.stack(jax.lax.sort((pairs[:, 0], pairs[:, 1]), num_keys=2), axis=1)
    only = as_list(space, listed)
    return greedy(criterion, features, rewards, only, prior, pairs.shape[0], shortlist=pairs.shape[0])[0]
