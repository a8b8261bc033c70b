"""How near to optimal a batch is: continuous D-optimal design over a pair space, and the bound that its dual gives.

A batch of k pairs gives each pair a weight of 0 or 1. Where weights may be anything between (summing to k), the best
information is a concave problem: whatever positive definite M is tried, the tangent of log det at M bounds every batch,

    log det(A0 + information) <= log det M - F + tr(M^-1 A0) + sum of the k largest u,   u = v x^T M^-1 x,

and a full pass over the space finds these k. Between passes weight is exchanged among the pairs that passes found, with
an exact line search, and M follows.

Of a batch of k < F pairs the information has rank k. With t the eigenvalues of M^-1 relative to A0^-1, the bound is the
sum over t of t - 1 - log t, and the k largest u; but only the k smallest t can meet such a batch (von Neumann's trace
inequality), so the others may be dropped. The best M then is that of the weights with the F - k + 1 or more weakest
directions made equal (Nikolov 2015), instead of spreading k pairs over all F.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import Limits, PairSpace, Selection
from jarm.core.linalg import cholesky, inverse_factor, matmul
from jarm.core.status import JarmError, Status, worst
from jarm.core.types import Array, Bool, Float, Int
from jarm.design.criteria import D_OPTIMAL, D_UNWEIGHTED, Criterion, Numbers
from jarm.design.fisher import centred
from jarm.design.greedy import greedy
from jarm.design.passes import best_pairs
from jarm.design.scorer import Best
from jarm.design.spaces import TILE, as_list

_STILL = 1e-5
"""Weight no longer moves between pairs whose u differ by less than this share."""
_ROUNDS = 4
"""Times that M is made anew between two passes where k < F: there it is not the information of the weights."""


class Design(NamedTuple):
    """A continuous design and what it proves.

    Attributes:
      upper: no batch of k pairs of the space has a larger log det of information, prior included; rounding is covered.
      lower: what `weights` reach: log det of their information, or for k < F the bound of Nikolov on batches that it
        allows. The best of all weights lies between the two; `upper` cannot be improved by more than their difference.
      rounding: the part of `upper`, in nats, that covers what float32 may have lost.
      pairs: `[C, 2]` int32, the pairs that have weight, smaller index first; N where there are fewer.
      weights: `[C]` in [0, 1], summing to k (less where the space holds fewer pairs).
      gaps: `[steps]` upper less lower bound after each pass, infinite where none was made.
      passes: scalar int32, full passes over the space.
      status: scalar int32 `Status`.
    """

    upper: Float[Array, ""]
    lower: Float[Array, ""]
    rounding: Float[Array, ""]
    pairs: Int[Array, "C 2"]
    weights: Float[Array, "C"]
    gaps: Float[Array, "steps"]
    passes: Int[Array, ""]
    status: Int[Array, ""]


def efficiency(log_det: Float[Array, "*b"], upper: Float[Array, "*b"], width: int) -> Float[Array, "*b"]:
    """D-efficiency `exp((log_det - upper) / F)`, of a batch that reaches `log_det`: at least this, at most 1.

    It compares geometric means of the eigenvalues of the information; without a prior it is the share of labels with
    which the best design would do as well.

    Args:
      log_det: log det of the information with a batch, prior included.
      upper: a bound on it, as `design_bound` gives it.
      width: F.
    """
    return jnp.exp((log_det - upper) / width)


def _require_d(criterion: Criterion, what: str) -> None:
    """Refuse a criterion that is not a log determinant."""
    if criterion.worth not in (D_OPTIMAL.worth, D_UNWEIGHTED.worth):
        raise JarmError(f"{what} knows the log determinant only: use D_OPTIMAL or D_UNWEIGHTED.")


def design_bound(
    criterion: Criterion,
    features: Float[Array, "N F"],
    rewards: Float[Array, "N"],
    space: PairSpace,
    prior: Float[Array, "F F"],
    k: int,
    *,
    start: Selection | None = None,
    steps: int = 20,
    gap: Float[Array, ""] | float = 1e-3,
    exchanges: int = 1000,
    mesh: jax.sharding.Mesh | None = None,
    tile: int = TILE,
) -> Design:
    """Bound the log det of every batch of k pairs from above, by the best design with weights between 0 and 1.

    Limits and costs only take batches away, so the bound holds with them, too.

    Args:
      criterion: `D_OPTIMAL` or `D_UNWEIGHTED`.
      features: `[N, F]` last-layer features of the responses.
      rewards: `[N]` rewards.
      space: which pairs. What they cost does not enter.
      prior: `[F, F]` positive definite information to start from (past labels and prior).
      k: pairs of a batch, a Python int.
      start: a batch to start from, which saves passes if it is good; None for the greedy one.
      steps: most passes over the space, a Python int.
      gap: stop where the bounds are this close in D-efficiency: `upper - rounding - lower <= gap F`.
      exchanges: most exchanges of weight between two passes.
      mesh: devices that share the passes over a space of `cross` or `all` pairs.
      tile: pairs of other spaces scored together, which bounds memory.

    Returns:
      The design. Fewer steps give a looser bound, never a wrong one. Status SINGULAR where the prior is not positive
      definite, NONFINITE where features or rewards of an eligible response are not finite: there is no bound then.

    Raises:
      JarmError: the criterion is not a log determinant.

    Source: exchanges of weight as in Bohning (1986) and Harman, Filova, Richtarik (2020), between passes that generate
    columns; for k < F the relaxation of Nikolov (2015).
    """
    _require_d(criterion, "A design bound")
    features, rewards, prior = (jnp.asarray(each, jnp.float32) for each in (features, rewards, prior))
    space = dataclasses.replace(jax.tree.map(jnp.asarray, space), costs=None)
    size, width = features.shape
    finite = jnp.isfinite(rewards) & jnp.isfinite(features).all(axis=1)
    if start is None:
        start, _ = greedy(criterion, features, rewards, space, prior, k, mesh=mesh, tile=tile)
    features = centred(features, space)
    found, room = k + 4 * width, k + 16 * width

    def differences(pairs: Int[Array, "m 2"]) -> Float[Array, "m F"]:
        """sqrt(v) x."""
        first, second = jnp.minimum(pairs, size - 1).T
        root = jnp.where(pairs[:, 0] < size, jnp.sqrt(criterion.weight(rewards[first] - rewards[second])), 0)
        return jnp.where(root > 0, root, 0)[:, None] * (features[first] - features[second])

    def whitened(x: Float[Array, "m F"], weights: Float[Array, "m"]) -> tuple[Float[Array, "F F"], Int[Array, ""]]:
        scaled = jnp.sqrt(weights)[:, None] * x
        information = matmul(scaled.T, scaled)
        if k < width:
            information += _evened(prior, information, k)
        return inverse_factor(prior + information)

    def full_pass(state: _State) -> _State:
        known = (state.found[:, None] == state.pairs[None]).all(axis=2).any(axis=1)
        pairs = jnp.concatenate([state.pairs, jnp.where(known[:, None], size, state.found)])
        weights = jnp.concatenate([state.weights, jnp.zeros(found)])
        alive = pairs[:, 0] < size
        x = differences(pairs)

        def improved(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            weights, _ = carry
            z = matmul(x, whitened(x, weights)[0].T)
            return _exchanged(z, _filled(weights, jnp.square(z).sum(axis=1), alive, k), alive, exchanges)

        weights, u = jax.lax.fori_loop(0, _ROUNDS if k < width else 1, improved, (weights, weights))
        _, kept = jax.lax.top_k(jnp.where(weights > 0, 1 + weights, jnp.where(alive, u / (1 + u), -1)), room)
        pairs, weights = pairs[kept], weights[kept]

        whiten, singular = whitened(x[kept], weights)
        y = matmul(features, whiten.T)
        scorer = criterion.scorer(Numbers(rewards, y, jnp.zeros((size, 0))), jnp.zeros(0))
        best = best_pairs(scorer, space, found, mesh=mesh, tile=tile)
        upper, lower, rounding = _bounds(criterion, features, rewards, y, prior, whiten, best, k)
        overflow = jnp.where(jnp.isnan(whiten).any() | (best.scores < jnp.inf).all(), Status.OK, Status.NONFINITE)
        better = upper < state.upper
        return _State(
            passes=state.passes + 1,
            pairs=pairs,
            weights=weights,
            found=best.pairs,
            upper=jnp.where(better, upper, state.upper),
            lower=lower,
            rounding=jnp.where(better, rounding, state.rounding),
            gaps=state.gaps.at[state.passes].set(jnp.where(better, upper, state.upper) - lower),
            status=worst(state.status, singular, overflow),
        )

    def unfinished(state: _State) -> Array:
        # What rounding adds to the bound stays, however many passes are made.
        far = state.upper - state.rounding - state.lower > gap * width
        return (state.passes < steps) & far & (state.status == Status.OK)

    usable = (finite | ~space.eligible).all()
    pad = room - k
    begin = _State(
        passes=jnp.int32(0),
        pairs=jnp.pad(jnp.where(start.valid[:, None], start.pairs, size), ((0, pad), (0, 0)), constant_values=size),
        weights=jnp.pad(start.valid.astype(jnp.float32), (0, pad)),
        found=jnp.full((found, 2), size, jnp.int32),
        upper=jnp.float32(jnp.inf),
        lower=jnp.float32(-jnp.inf),
        rounding=jnp.float32(0),
        gaps=jnp.full(steps, jnp.inf, jnp.float32),
        status=jnp.where(usable, jnp.int32(Status.OK), jnp.int32(Status.NONFINITE)),
    )
    end = jax.lax.while_loop(unfinished, full_pass, begin)
    pairs = jnp.where(end.weights[:, None] > 0, end.pairs, size)
    lower = jnp.minimum(end.lower, end.upper)  # float32 may have it a little above
    return Design(end.upper, lower, end.rounding, pairs, end.weights, end.gaps, end.passes, end.status)


class _State(NamedTuple):
    """Between two passes: the pairs with weight, and the best that the last pass found."""

    passes: Int[Array, ""]
    pairs: Int[Array, "C 2"]
    weights: Float[Array, "C"]
    found: Int[Array, "K 2"]
    upper: Float[Array, ""]
    lower: Float[Array, ""]
    rounding: Float[Array, ""]
    gaps: Float[Array, "steps"]
    status: Int[Array, ""]


def _bounds(
    criterion: Criterion,
    features: Float[Array, "N F"],
    rewards: Float[Array, "N"],
    y: Float[Array, "N F"],
    prior: Float[Array, "F F"],
    whiten: Float[Array, "F F"],
    best: Best,
    k: int,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Upper bound, lower bound, and what the upper holds for rounding, from a pass with M^-1 = W^T W.

    The bound is true of any M, so W is taken as it was computed, and what its Cholesky lost does not matter. What does
    is the rounding of W phi, of W A0 W^T, and of the products by which a pass scores the pairs that it leaves out. A
    product of F numbers is off by a small multiple of sqrt(F) units in the last place of the sum of their sizes
    (Higham & Mary 2019).
    """
    size, width = features.shape
    unit = jnp.sqrt(jnp.float32(width)) * jnp.finfo(jnp.float32).eps
    off = unit * jnp.sqrt(jnp.square(matmul(jnp.abs(features), jnp.abs(whiten).T)).sum(axis=1))
    first, second = jnp.minimum(best.pairs, size - 1).T
    margin = rewards[first] - rewards[second]
    u = jnp.maximum(best.scores, 0)
    most = jnp.square(jnp.sqrt(u) + jnp.sqrt(criterion.weight(margin)) * (off[first] + off[second]))
    most = jnp.where(best.pairs[:, 0] < size, most * (1 + unit * (1 + jnp.abs(margin))), 0)
    heaviest = criterion.weight(jnp.zeros(()))
    left_out = jnp.maximum(best.rest, 0) * (1 + 1e-5) + 4 * unit * heaviest * jnp.square(y).sum(axis=1).max()
    left_out = jnp.square(jnp.sqrt(left_out) + 2 * jnp.sqrt(heaviest) * off.max())
    most = jnp.maximum(jax.lax.top_k(most, k)[0], jnp.where(best.rest > -jnp.inf, left_out, 0))

    relative = matmul(matmul(whiten, prior), whiten.T)
    sizes = matmul(matmul(jnp.abs(whiten), jnp.abs(prior)), jnp.abs(whiten).T)
    logs = jnp.log(jnp.diagonal(whiten))
    lower = -2 * logs.sum()
    upper = lower + jnp.trace(relative) - width + u[:k].sum()
    rounding = (most - u[:k]).sum() + unit * (jnp.trace(sizes) + 2 * jnp.abs(logs).sum() + width + most.sum())
    if k < width:
        # Dropped: F - k times t - 1 - log t, of the largest t or of what rounding might make of it.
        t = jnp.linalg.eigvalsh(relative)[-1]
        # Errors of either sign, of size e, make a matrix of norm about 2 e sqrt(F).
        high = jnp.minimum(t + unit * (t + 2 * jnp.sqrt(jnp.square(sizes).mean() * width)), 1)
        lower += (width - k) * jnp.log(t)
        upper -= (width - k) * (t - 1 - jnp.log(t))
        rounding += (width - k) * jnp.maximum((t - jnp.log(t)) - (high - jnp.log(high)), 0)
    return upper + rounding, lower, rounding


def _evened(prior: Float[Array, "F F"], information: Float[Array, "F F"], k: int) -> Float[Array, "F F"]:
    """What to add to the information of weights so that its weakest directions, relative to the prior, become equal.

    Of its eigenvalues l_1 >= l_2 >= ... those from the first i on that are not above (sum of l_j, j >= i) / (k - i + 1)
    become that.
    """
    whiten, _ = inverse_factor(prior)
    values, vectors = jnp.linalg.eigh(matmul(matmul(whiten, information), whiten.T))
    values, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1]
    place = jnp.arange(values.shape[0])
    level = jnp.cumsum(values[::-1])[::-1][:k] / (k - place[:k])
    first = jnp.argmax(values[:k] <= level)
    more = jnp.where(place >= first, jnp.maximum(level[first] - values, 0), 0)
    root = matmul(cholesky(prior)[0], vectors) * jnp.sqrt(more)[None]
    return matmul(root, root.T)


def _filled(weights: Float[Array, "C"], u: Float[Array, "C"], alive: Bool[Array, "C"], k: int) -> Float[Array, "C"]:
    """Weights that sum to k, if there are as many pairs: what is lacking goes to the pairs of largest u."""
    order = jnp.argsort(-u)
    free = jnp.where(alive, 1 - weights, 0)[order]
    return weights.at[order].add(jnp.clip(k - weights.sum() - (jnp.cumsum(free) - free), 0, free))


def _exchanged(
    z: Float[Array, "C F"], weights: Float[Array, "C"], alive: Bool[Array, "C"], most: int
) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """Move weight from the pair of smallest u that has some to the pair of largest u that has room, again and again.

    In coordinates in which the information is the identity at the start; z are the scaled differences. Moving d from i
    to j multiplies the determinant by (1 + d u_j) (1 - d u_i) + d^2 u_ij^2, whose maximum is known.
    """

    def ends(weights: Array, u: Array) -> tuple[Array, Array]:
        gaining = jnp.argmax(jnp.where(alive & (weights < 1), u, -jnp.inf))
        return gaining, jnp.argmin(jnp.where(weights > 0, u, jnp.inf))

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        count, weights, u, _ = carry
        j, i = ends(weights, u)
        return (count < most) & (u[j] - u[i] > _STILL * u[j]) & (weights[j] < 1) & alive[j]

    def exchange(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        count, weights, u, inverse = carry
        j, i = ends(weights, u)
        p, q = matmul(jnp.stack([z[j], z[i]]), inverse)
        a, b = matmul(z, jnp.stack([p, q], axis=1)).T
        curve, room = a[j] * b[i] - jnp.square(a[i]), jnp.minimum(1 - weights[j], weights[i])
        move = jnp.where(curve > 0, jnp.minimum((a[j] - b[i]) / (2 * curve), room), room)
        # The weight of j grows first, then that of i falls: two updates of rank one.
        grow = move / (1 + move * a[j])
        b, q = b - grow * a[i] * a, q - grow * a[i] * p
        fall = move / jnp.maximum(1 - move * b[i], 1e-6)
        weights = weights.at[j].set(jnp.where(move < 1 - weights[j], weights[j] + move, 1))
        weights = weights.at[i].set(jnp.where(move < weights[i], weights[i] - move, 0))
        inverse = inverse - grow * jnp.outer(p, p) + fall * jnp.outer(q, q)
        return count + 1, weights, u - grow * jnp.square(a) + fall * jnp.square(b), inverse

    start = (jnp.int32(0), weights, jnp.square(z).sum(axis=1), jnp.eye(z.shape[1]))
    _, weights, u, _ = jax.lax.while_loop(unfinished, exchange, start)
    return weights, u


def rounded(
    criterion: Criterion,
    features: Float[Array, "N F"],
    rewards: Float[Array, "N"],
    space: PairSpace,
    prior: Float[Array, "F F"],
    k: int,
    design: Design,
    *,
    limits: Limits | None = None,
) -> Selection:
    """The greedy batch of the pairs that have weight in a design: for k > F better than greedy over the whole space.

    Args:
      criterion, features, rewards, space, prior, k: as `design_bound` had them.
      design: what it returned.
      limits: what else a batch has to keep to.

    Returns:
      The batch, as `greedy` gives it; EXHAUSTED or LIMITED where the design has too few pairs with weight.

    Raises:
      JarmError: the criterion is not a log determinant.
    """
    _require_d(criterion, "Rounding a design")
    # Of a design every pair is one of the space; a listed space has its pairs in order, padding last.
    order = jax.lax.sort((design.pairs[:, 0], design.pairs[:, 1]), num_keys=2)
    listed = as_list(space, jnp.stack(order, axis=1))
    return greedy(criterion, features, rewards, listed, prior, k, limits=limits)[0]
