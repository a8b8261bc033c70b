"""Distance of a batch from the optimum: continuous D-optimal design over a pair space, and the bound of its dual.

A batch of k pairs gives each pair a weight of 0 or 1. With weights anywhere between (summing to k), the best
information is a concave problem: for any positive definite M, the tangent of log det at M bounds every batch,

    log det(A0 + information) <= log det M - F + tr(M^-1 A0) + sum of the k largest u,   u = v x^T M^-1 x,

and a full pass over the space finds these k. Between passes, weight is exchanged among the pairs that passes found,
with an exact line search, and M follows.

The information of a batch of k < F pairs has rank k. With t the eigenvalues of M^-1 relative to A0^-1, the bound is the
sum over t of t - 1 - log t, and the k largest u; but only the k smallest t can meet such a batch (von Neumann's trace
inequality), so the others may be dropped. The best M then evens out the F - k + 1 or more weakest directions of the
information of the weights (Nikolov 2015), instead of spreading k pairs over all F.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import Limits, PairSpace, Selection
from jarm.core.linalg import inverse_factor, matmul
from jarm.core.status import Status, worst
from jarm.core.types import AnyMesh, Array, Bool, Float, Int
from jarm.design.criteria import Criterion, Numbers
from jarm.design.greedy import greedy
from jarm.design.problem import Problem, make_problem, overflow, require_log_det, whitener
from jarm.design.scorer import Best
from jarm.design.spaces import TILE, as_list

_STILL = 1e-5
"""Weight no longer moves between pairs whose u differ by less than this share."""
_UPDATES = 4
"""Updates of M between two passes where k < F: there it is not the information of the weights."""


class Design(NamedTuple):
    """A continuous design and the bound that it proves.

    Attributes:
      upper: upper bound on the log det of the information, prior included, with any batch of k pairs of the space;
        rounding is covered.
      lower: log det of the information with `weights`, or for k < F the bound of Nikolov on batches that they allow.
        The best of all weights lies between the two; `upper` cannot be improved by more than their difference.
      rounding: the part of `upper`, in nats, that covers the rounding of float32.
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


def efficiency(log_det: Float[Array, "*b"], upper: Float[Array, "*b"], width: int) -> Float[Array, "*b"]:
    """D-efficiency `exp((log_det - upper) / F)` of a batch that reaches `log_det`: at least this, at most 1.

    It compares geometric means of the eigenvalues of the information; without a prior it is the share of labels with
    which the best design would do as well.

    Args:
      log_det: log det of the information with a batch, prior included.
      upper: upper bound on it, as in `Design`.
      width: F.
    """
    return jnp.exp((log_det - upper) / width)


def design_bound(
    criterion: Criterion,
    features: Float[Array, "N F"],
    rewards: Float[Array, "N"],
    space: PairSpace,
    information: Float[Array, "F F"],
    k: int,
    *,
    start: Selection | None = None,
    steps: int = 20,
    gap: Float[Array, ""] | float = 1e-3,
    exchanges: int = 1000,
    mesh: AnyMesh | None = None,
    tile: int = TILE,
) -> Design:
    """Bound the log det of every batch of k pairs from above, by the best design with weights between 0 and 1.

    Limits and costs only take batches away, so the bound holds with them, too.

    Args:
      criterion: a log determinant: `D_OPTIMAL` or `D_UNWEIGHTED`.
      features: `[N, F]` last-layer features of the responses.
      rewards: `[N]` rewards, in logits.
      space: which pairs; their costs are ignored.
      information: `[F, F]` positive definite information to start from (labelled pairs and prior).
      k: pairs of a batch, a Python int.
      start: a batch to start from, which saves passes if it is good; None for the greedy one.
      steps: maximum number of passes over the space, a Python int.
      gap: stop where the bounds are this close in D-efficiency: `upper - rounding - lower <= gap F`.
      exchanges: maximum number of exchanges of weight between two passes.
      mesh: devices that share the passes over a space of `cross` or `all` pairs.
      tile: pairs of other spaces scored together, which bounds memory.

    Returns:
      The design. Fewer steps give a looser bound, never a wrong one. Status SINGULAR where the information is not
      positive definite, NONFINITE where features or rewards of an eligible response are not finite: then there is no
      bound.

    Raises:
      JarmError: the criterion is not a log determinant.

    Source: exchanges of weight as in Bohning (1986) and Harman, Filova, Richtarik (2020), between passes that generate
    columns; for k < F the relaxation of Nikolov (2015).

    Example:
      How near to the optimum is one pair of N = 3 responses with F = 2 features?

      >>> import functools, jax, jax.numpy as jnp
      >>> from jarm.core.base import Selection
      >>> from jarm.design.bound import design_bound, efficiency
      >>> from jarm.design.criteria import D_OPTIMAL
      >>> from jarm.design.spaces import pair_space
      >>> features, rewards = jnp.array([[0.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), jnp.zeros(3)  # [N, F], [N] in logits
      >>> space = pair_space("within", 3, jnp.ones(3, bool))  # one prompt of R = 3 responses
      >>> batch = Selection(jnp.array([[0, 1]]), jnp.zeros(1), jnp.ones(1, bool), jnp.int32(0))
      >>> bound = jax.jit(functools.partial(design_bound, D_OPTIMAL, k=1))
      >>> design = bound(features, rewards, space, jnp.eye(2), start=batch)
      >>> log_det = jnp.log(1 + 9 / 4)  # of I + v x x^T, with v = 1 / 4 and |x| = 3
      >>> round(float(efficiency(log_det, design.upper, 2)), 2)
      0.87
    """
    require_log_det(criterion, "A design bound")
    space = dataclasses.replace(space, costs=None)
    if start is None:
        start, _ = greedy(criterion, features, rewards, space, information, k, mesh=mesh, tile=tile)
    problem = make_problem(criterion, features, rewards, space, information, mesh=mesh, tile=tile)
    unfinished = functools.partial(_unfinished, gap * problem.width)
    full_pass = functools.partial(_full_pass, problem, k, exchanges)
    end = jax.lax.while_loop(unfinished, full_pass, _init(problem, start, steps))
    pairs = jnp.where(end.weights[:, None] > 0, end.pairs, problem.size)
    lower = jnp.minimum(end.lower, end.upper)  # float32 may have it a little above
    return Design(end.upper, lower, end.rounding, pairs, end.weights, end.gaps, end.passes, end.status)


def rounded(
    criterion: Criterion,
    features: Float[Array, "N F"],
    rewards: Float[Array, "N"],
    space: PairSpace,
    information: Float[Array, "F F"],
    k: int,
    design: Design,
    *,
    limits: Limits | None = None,
) -> Selection:
    """The greedy batch of the pairs that have weight in a design: for k > F better than greedy over the whole space.

    Args:
      criterion, features, rewards, space, information, k: as for `design_bound`.
      design: its result.
      limits: further limits on the batch.

    Returns:
      The batch, as from `greedy`; EXHAUSTED or LIMITED where the design has too few pairs with weight.

    Raises:
      JarmError: the criterion is not a log determinant.
    """
    require_log_det(criterion, "Rounding a design")
    # All pairs of a design are pairs of the space; a listed space has its pairs in order, padding last.
    order = jax.lax.sort((design.pairs[:, 0], design.pairs[:, 1]), num_keys=2)
    listed = as_list(space, jnp.stack(order, axis=1))
    return greedy(criterion, features, rewards, listed, information, k, limits=limits)[0]


def _init(problem: Problem, start: Selection, steps: int) -> _State:
    """A batch as a design: its pairs have weight 1. There is room for 16 F more; a pass finds up to 4 F + k."""
    size, k, pad = problem.size, start.pairs.shape[0], 16 * problem.width
    return _State(
        passes=jnp.int32(0),
        pairs=jnp.pad(jnp.where(start.valid[:, None], start.pairs, size), ((0, pad), (0, 0)), constant_values=size),
        weights=jnp.pad(start.valid.astype(jnp.float32), (0, pad)),
        found=jnp.full((k + 4 * problem.width, 2), size, jnp.int32),
        upper=jnp.float32(jnp.inf),
        lower=jnp.float32(-jnp.inf),
        rounding=jnp.float32(0),
        gaps=jnp.full(steps, jnp.inf, jnp.float32),
        status=jnp.where(problem.finite, jnp.int32(Status.OK), jnp.int32(Status.NONFINITE)),
    )


def _unfinished(gap: Float[Array, ""] | float, state: _State) -> Bool[Array, ""]:
    """Whether the bounds are more than `gap` nats apart, and another pass may help."""
    # The share of rounding in the bound stays, however many passes are made.
    apart = state.upper - state.rounding - state.lower > gap
    return (state.passes < state.gaps.shape[0]) & apart & (state.status == Status.OK)


def _full_pass(problem: Problem, k: int, exchanges: int, state: _State) -> _State:
    """Weight moves to the pairs that the last pass found; then a pass bounds the result and finds more."""
    pairs, weights, x = _reweighted(problem, k, exchanges, state)
    whiten, singular = _weighted_whitener(problem, k, x, weights)
    y = matmul(problem.features, whiten.T)
    scorer = problem.criterion.scorer(
        Numbers(problem.rewards, y, jnp.zeros((problem.size, 0), jnp.float32)), jnp.zeros(0, jnp.float32)
    )
    best = problem.best_pairs(scorer, problem.space, state.found.shape[0])
    upper, lower, rounding = _bounds(problem, y, whiten, best, k)
    better = upper < state.upper
    upper = jnp.where(better, upper, state.upper)
    return _State(
        passes=state.passes + 1,
        pairs=pairs,
        weights=weights,
        found=best.pairs,
        upper=upper,
        lower=lower,
        rounding=jnp.where(better, rounding, state.rounding),
        gaps=state.gaps.at[state.passes].set(upper - lower),
        status=worst(state.status, singular, overflow(whiten, best)),
    )


def _reweighted(
    problem: Problem, k: int, exchanges: int, state: _State
) -> tuple[Int[Array, "C 2"], Float[Array, "C"], Float[Array, "C F"]]:
    """The pairs with weight and the most promising without, their weights after exchanges, and sqrt(v) x."""
    known = (state.found[:, None] == state.pairs[None]).all(axis=2).any(axis=1)
    pairs = jnp.concatenate([state.pairs, jnp.where(known[:, None], problem.size, state.found)])
    weights = jnp.concatenate([state.weights, jnp.zeros(state.found.shape[0], jnp.float32)])
    valid = pairs[:, 0] < problem.size
    x = problem.scaled_differences(pairs)

    def update(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        weights, _ = carry
        z = matmul(x, _weighted_whitener(problem, k, x, weights)[0].T)
        return _exchanged(z, _filled(weights, jnp.square(z).sum(axis=1), valid, k), valid, exchanges)

    weights, u = jax.lax.fori_loop(0, _UPDATES if k < problem.width else 1, update, (weights, weights))
    order = jnp.where(weights > 0, 1 + weights, jnp.where(valid, u / (1 + u), -1))
    _, kept = jax.lax.top_k(order, state.pairs.shape[0])
    return pairs[kept], weights[kept], x[kept]


def _weighted_whitener(
    problem: Problem, k: int, x: Float[Array, "C F"], weights: Float[Array, "C"]
) -> tuple[Float[Array, "F F"], Int[Array, ""]]:
    """W, M^-1 = W^T W, for the M of weights, and its status; x are scaled differences."""
    scaled = jnp.sqrt(weights)[:, None] * x
    information = matmul(scaled.T, scaled)
    if k < problem.width:
        information += _evened(problem.root, information, k)
    return inverse_factor(problem.information + information)


def _bounds(
    problem: Problem, y: Float[Array, "N F"], whiten: Float[Array, "F F"], best: Best, k: int
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Upper bound, lower bound, and the share of rounding in the upper, from a pass with M^-1 = W^T W.

    The bound is true of any M, so W counts as it was computed, whatever its Cholesky lost. The bound has to cover the
    rounding of W phi, of W A0 W^T, and of the products by which a pass scores the pairs that it leaves out. A product
    of F numbers is off by a small multiple of sqrt(F) units in the last place of the sum of their sizes (Higham & Mary
    2019).
    """
    criterion, width = problem.criterion, problem.width
    unit = jnp.sqrt(jnp.float32(width)) * jnp.finfo(jnp.float32).eps
    off = unit * jnp.sqrt(jnp.square(matmul(jnp.abs(problem.features), jnp.abs(whiten).T)).sum(axis=1))
    (first, second), margin = problem.ends(best.pairs), problem.margins(best.pairs)
    u = jnp.maximum(best.scores, 0)
    max_u = jnp.square(jnp.sqrt(u) + jnp.sqrt(criterion.weight(margin)) * (off[first] + off[second]))
    max_u = jnp.where(best.pairs[:, 0] < problem.size, max_u * (1 + unit * (1 + jnp.abs(margin))), 0)
    max_weight = criterion.weight(jnp.zeros((), jnp.float32))
    left_out = jnp.maximum(best.rest, 0) * (1 + 1e-5) + 4 * unit * max_weight * jnp.square(y).sum(axis=1).max()
    left_out = jnp.square(jnp.sqrt(left_out) + 2 * jnp.sqrt(max_weight) * off.max())
    max_u = jnp.maximum(jax.lax.top_k(max_u, k)[0], jnp.where(best.rest > -jnp.inf, left_out, 0))

    relative = matmul(matmul(whiten, problem.information), whiten.T)
    sizes = matmul(matmul(jnp.abs(whiten), jnp.abs(problem.information)), jnp.abs(whiten).T)
    logs = jnp.log(jnp.diagonal(whiten))
    lower = -2 * logs.sum()
    upper = lower + jnp.trace(relative) - width + u[:k].sum()
    rounding = (max_u - u[:k]).sum() + unit * (jnp.trace(sizes) + 2 * jnp.abs(logs).sum() + width + max_u.sum())
    if k < width:
        # Dropped: F - k times t - 1 - log t, of the largest t or of its value within rounding.
        t = jnp.linalg.eigvalsh(relative)[-1]
        # Errors of either sign, of size e, make a matrix of norm about 2 e sqrt(F).
        high = jnp.minimum(t + unit * (t + 2 * jnp.sqrt(jnp.square(sizes).mean() * width)), 1)
        lower += (width - k) * jnp.log(t)
        upper -= (width - k) * (t - 1 - jnp.log(t))
        rounding += (width - k) * jnp.maximum((t - jnp.log(t)) - (high - jnp.log(high)), 0)
    return upper + rounding, lower, rounding


def _evened(root: Float[Array, "F F"], information: Float[Array, "F F"], k: int) -> Float[Array, "F F"]:
    """The matrix that makes the weakest directions of the information of weights equal, relative to the prior R^T R.

    Of its eigenvalues l_1 >= l_2 >= ... those from the first i on that are not above (sum of l_j, j >= i) / (k - i + 1)
    become that.
    """
    whiten = whitener(root)
    values, vectors = jnp.linalg.eigh(matmul(matmul(whiten, information), whiten.T))
    values, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1]
    place = jnp.arange(values.shape[0], dtype=jnp.int32)
    level = jnp.cumsum(values[::-1])[::-1][:k] / (k - place[:k]).astype(values.dtype)
    first = jnp.argmax(values[:k] <= level).astype(jnp.int32)
    more = jnp.where(place >= first, jnp.maximum(level[first] - values, 0), 0)
    scaled = matmul(root.T, vectors) * jnp.sqrt(more)[None]
    return matmul(scaled, scaled.T)


def _filled(weights: Float[Array, "C"], u: Float[Array, "C"], valid: Bool[Array, "C"], k: int) -> Float[Array, "C"]:
    """Weights that sum to k, if there are as many pairs: the rest goes to the pairs of largest u."""
    order = jnp.argsort(-u)
    free = jnp.where(valid, 1 - weights, 0)[order]
    return weights.at[order].add(jnp.clip(k - weights.sum() - (jnp.cumsum(free) - free), 0, free))


def _exchanged(
    z: Float[Array, "C F"], weights: Float[Array, "C"], valid: Bool[Array, "C"], max_moves: int
) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """Move weight from the pair of smallest u that has some to the pair of largest u that has room, again and again.

    In coordinates in which the information is the identity at the start; z are the scaled differences. Moving d from i
    to j multiplies the determinant by (1 + d u_j) (1 - d u_i) + d^2 u_ij^2, whose maximum is known.

    Returns:
      The weights, and u of each pair.
    """

    def ends(weights: Array, u: Array) -> tuple[Array, Array]:
        gaining = jnp.argmax(jnp.where(valid & (weights < 1), u, -jnp.inf))
        losing = jnp.argmin(jnp.where(weights > 0, u, jnp.inf))
        return gaining.astype(jnp.int32), losing.astype(jnp.int32)

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        count, weights, u, _ = carry
        j, i = ends(weights, u)
        return (count < max_moves) & (u[j] - u[i] > _STILL * u[j]) & (weights[j] < 1) & valid[j]

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

    start = (jnp.int32(0), weights, jnp.square(z).sum(axis=1), jnp.eye(z.shape[1], dtype=jnp.float32))
    _, weights, u, _ = jax.lax.while_loop(unfinished, exchange, start)
    return weights, u
