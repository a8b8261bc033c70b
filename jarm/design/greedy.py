"""Exact greedy selection: a batch grown one pair at a time, each the best of every pair of the space.

A full pass over the space keeps a shortlist of the K best pairs. Where no pair's worth rises as the batch grows, a pair
of the shortlist that is still worth at least as much as the K-th was beats every pair outside, so a choice from the
shortlist is the choice from the whole space. Where worths may rise, a bound on the rise takes the place of the K-th.
When no choice can be certified any more, a new pass is made. The certificate travels with the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import Limits, PairSpace, Selection
from jarm.core.linalg import distances, grown_root, matmul, square_sum
from jarm.core.status import Status, worst
from jarm.core.types import AnyMesh, Array, Bool, Float, Int
from jarm.design.criteria import Criterion, Numbers
from jarm.design.problem import Problem, make_problem, near_copies, overflow, whitener
from jarm.design.scorer import Best, Scorer
from jarm.design.spaces import TILE, pair_count

_SLACK = 1e-5
"""Share by which a ceiling is raised: rounding in a pass may hide as much of the pairs left out."""


class GreedyInfo(NamedTuple):
    """The certificate of a greedy batch.

    Attributes:
      passes: scalar int32, full passes over the space.
      ceilings: `[k]` upper bounds on the gain (for its cost) of any pair outside the shortlist when each pair was
        chosen: certified where not above the gain of the choice. A pair chosen right after a pass needs no certificate.
      fresh: `[k]` bool, whether a pair was chosen right after a pass.
    """

    passes: Int[Array, ""]
    ceilings: Float[Array, "k"]
    fresh: Bool[Array, "k"]


class _State(NamedTuple):
    """The batch so far, between two passes.

    Attributes:
      wanted: pairs to choose, at most k.
      picked, passes: pairs chosen and passes made so far.
      pairs, gains, ceilings, fresh: of each pair chosen; see `Selection` and `GreedyInfo`.
      root: R `[F, F]`, triangular: the information with the batch is R^T R. It grows by orthogonal factors, because a
        sum with large terms loses the prior information about directions that no pair of the batch has.
      uses, prompt_uses: pairs of the batch with each response, with each prompt.
      floor: a lower bound on the worths of the next shortlist, so that its pass may skip pairs; -inf for none.
      ended: whether a pass over all pairs found none to choose.
    """

    wanted: Int[Array, ""]
    picked: Int[Array, ""]
    passes: Int[Array, ""]
    pairs: Int[Array, "k 2"]
    gains: Float[Array, "k"]
    ceilings: Float[Array, "k"]
    fresh: Bool[Array, "k"]
    root: Float[Array, "F F"]
    uses: Int[Array, "N"]
    prompt_uses: Int[Array, "P"]
    floor: Float[Array, ""]
    ended: Bool[Array, ""]
    status: Int[Array, ""]


class _Shortlist(NamedTuple):
    """The result of a pass, the same for all choices made from it.

    Attributes:
      best: the K best pairs.
      x: `[K, F]` their feature differences, not whitened.
      margin, weight: `[K]` their margins and weights v.
      z: `[G, F]` targets, in the coordinates of the pass.
      bound: scalar, upper bound on v q of every pair of the space.
      top: scalar, worth of the best.
      picked: scalar int32, pairs chosen before the pass.
      overflow: scalar int32, status of the scores.
    """

    best: Best
    x: Float[Array, "K F"]
    margin: Float[Array, "K"]
    weight: Float[Array, "K"]
    z: Float[Array, "G F"]
    bound: Float[Array, ""]
    top: Float[Array, ""]
    picked: Int[Array, ""]
    overflow: Int[Array, ""]


class _Choice(NamedTuple):
    """The state while choices are made from one shortlist.

    Attributes:
      y, z: `[K, F]`, `[G, F]` shortlisted pairs and targets, in coordinates in which the information is the identity:
        variances are squared lengths, which keep the digits that subtraction would lose as variances fall.
      c: `[K, G]` covariances of pairs and targets.
      basis: `[F, F]` U, from the coordinates of the pass to those of y and z.
      left: `[K]` bool, shortlisted pairs that may still be chosen.
      worth: `[K]` their worth (for their cost), -inf where not left.
      ceiling: scalar, upper bound on the worth of any other pair.
      places: `[k]` places in the shortlist of the pairs chosen.
    """

    state: _State
    y: Float[Array, "K F"]
    z: Float[Array, "G F"]
    c: Float[Array, "K G"]
    basis: Float[Array, "F F"]
    left: Bool[Array, "K"]
    worth: Float[Array, "K"]
    ceiling: Float[Array, ""]
    places: Int[Array, "k"]


def greedy(
    criterion: Criterion,
    features: Float[Array, "N F"],
    rewards: Float[Array, "N"],
    space: PairSpace,
    information: Float[Array, "F F"],
    k: int,
    *,
    count: Int[Array, ""] | int | None = None,
    limits: Limits | None = None,
    shortlist: int | None = None,
    mesh: AnyMesh | None = None,
    tile: int = TILE,
) -> tuple[Selection, GreedyInfo]:
    """Grow a batch one pair at a time, each the best of the whole space given those before it.

    Exact up to float32 rounding of the gains. Where the space has costs, the best is the pair of largest gain for its
    cost, and that quotient is reported as its gain.

    Args:
      criterion: the worth of a pair; see `jarm.design.criteria`.
      features: `[N, F]` last-layer features.
      rewards: `[N]` rewards, in logits.
      space: which pairs.
      information: `[F, F]` positive definite information to start from (labelled pairs and prior).
      k: pairs to pick, a Python int.
      count: pick only so many of k, of which the rest is not valid: another number compiles nothing. None for all.
      limits: further limits on the batch.
      shortlist: K, pairs kept by a full pass; None for a number that suits the space.
      mesh: devices that share the passes over a space of `cross` or `all` pairs.
      tile: pairs of other spaces scored together, which bounds memory.

    Returns:
      The batch in the order of choice, and its certificate. Status SINGULAR where the information is not positive
      definite, NONFINITE where features or rewards of an eligible response, or scores, are not finite, EXHAUSTED where
      the space holds fewer than k pairs, LIMITED where the limits leave fewer, UNINFORMATIVE where a pair of the batch
      gains 0.

    Example:
      Two pairs of N = 3 responses with F = 2 features: the longest difference first, then the best beside it.

      >>> import functools, jax, jax.numpy as jnp
      >>> from jarm.design.criteria import D_OPTIMAL
      >>> from jarm.design.greedy import greedy
      >>> from jarm.design.spaces import pair_space
      >>> features, rewards = jnp.array([[0.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), jnp.zeros(3)  # [N, F], [N] in logits
      >>> space = pair_space("within", 3, jnp.ones(3, bool))  # one prompt of R = 3 responses
      >>> batch, info = jax.jit(functools.partial(greedy, D_OPTIMAL, k=2))(features, rewards, space, jnp.eye(2))
      >>> batch.pairs.tolist(), [round(gain, 2) for gain in batch.gains.tolist()]  # gains in nats
      ([[1, 2], [0, 1]], [1.45, 0.72])
      >>> int(info.passes)
      1
    """
    problem = make_problem(criterion, features, rewards, space, information, limits=limits, mesh=mesh, tile=tile)
    keep = (default_shortlist(space) if shortlist is None else shortlist) + k
    total = pair_count(problem.space)
    unfinished = functools.partial(_unfinished, total)
    start = _init(problem, k, jnp.minimum(jnp.asarray(k if count is None else count, jnp.int32), k))
    end = jax.lax.while_loop(unfinished, functools.partial(_full_pass, problem, keep), start)
    return _result(problem, total, end)


def default_shortlist(space: PairSpace) -> int:
    """Pairs for a pass to keep: more where a pass costs more."""
    size = space.eligible.shape[0]
    return 1024 if space.pairs is not None or space.kind == "within" or size <= 16_384 else 8192


def _init(problem: Problem, k: int, wanted: Int[Array, ""]) -> _State:
    """The empty batch."""
    return _State(
        wanted=wanted,
        picked=jnp.int32(0),
        passes=jnp.int32(0),
        pairs=jnp.full((k, 2), problem.size, jnp.int32),
        gains=jnp.zeros(k, jnp.float32),
        ceilings=jnp.zeros(k, jnp.float32),
        fresh=jnp.zeros(k, bool),
        root=problem.root,
        uses=jnp.zeros(problem.size, jnp.int32),
        prompt_uses=jnp.zeros(problem.prompts, jnp.int32),
        floor=jnp.float32(-jnp.inf),
        ended=jnp.bool_(False),
        status=jnp.where(problem.finite, problem.singular, jnp.int32(Status.NONFINITE)),
    )


def _unfinished(total: Float[Array, ""], state: _State) -> Bool[Array, ""]:
    """Whether another pass is due, over a space of `total` pairs."""
    reachable = jnp.minimum(total, state.wanted.astype(jnp.float32)).astype(jnp.int32)
    return (state.picked < reachable) & ~state.ended & (state.status == Status.OK)


def _full_pass(problem: Problem, keep: int, state: _State) -> _State:
    """A pass that keeps so many pairs, then choices from these while they are certified."""
    shortlist, choice = _shortlist(problem, keep, state)
    certified, pick = functools.partial(_certified, problem, shortlist), functools.partial(_pick, problem, shortlist)
    return _grown(state, shortlist, jax.lax.while_loop(certified, pick, choice))


def _shortlist(problem: Problem, keep: int, state: _State) -> tuple[_Shortlist, _Choice]:
    """A pass over the space."""
    criterion, space, late = problem.criterion, problem.space, problem.whitens_late
    whiten = whitener(state.root)
    y, z = problem.features if late else matmul(problem.features, whiten.T), matmul(problem.targets, whiten.T)
    numbers, h = Numbers(problem.rewards, y, matmul(y, z.T)), jnp.square(z).sum(axis=1)
    scorer = criterion.scorer(numbers, h, gains=space.costs is not None, whiten=whiten if late else None)
    if problem.limits.similarity is not None:
        scorer = _guarded(scorer, problem.features, state, problem.limits.similarity)
    allowed = dataclasses.replace(space, eligible=space.eligible & _allowed(problem, state))
    best = problem.best_pairs(scorer, allowed, keep, floor=state.floor)

    first, second = problem.ends(best.pairs)
    x, margin = problem.differences(best.pairs), problem.margins(best.pairs)
    pair_y, c = matmul(x, whiten.T) if late else y[first] - y[second], numbers.c[first] - numbers.c[second]
    left = (best.scores > -jnp.inf) & ~(best.pairs[:, None] == state.pairs[None]).all(axis=2).any(axis=1)
    worth = _worths(problem, best, margin, pair_y, z, c, left)
    shortlist = _Shortlist(
        best=best,
        x=x,
        margin=margin,
        weight=criterion.weight(margin),
        z=z,
        bound=problem.leverage_bound(y),
        top=worth.max(),
        picked=state.picked,
        overflow=overflow(whiten, best),
    )
    basis, places = jnp.eye(problem.width, dtype=jnp.float32), jnp.zeros(state.pairs.shape[0], jnp.int32)
    ceiling = _ceiling(problem, shortlist, basis, shortlist.top)
    return shortlist, _Choice(state, pair_y, z, c, basis, left, worth, ceiling, places)


def _worths(
    problem: Problem,
    best: Best,
    margin: Float[Array, "K"],
    y: Float[Array, "K F"],
    z: Float[Array, "G F"],
    c: Float[Array, "K G"],
    left: Bool[Array, "K"],
) -> Float[Array, "K"]:
    """Worth of each shortlisted pair (for its cost), -inf where not left."""
    q, h = jnp.square(y).sum(axis=1), jnp.square(z).sum(axis=1)
    worth = jax.vmap(problem.criterion.worth, in_axes=(0, 0, 0, None))(margin, q, c, h)
    worth = worth if best.costs is None else problem.criterion.gain(worth) / best.costs
    return jnp.where(left, worth, -jnp.inf)


def _ceiling(
    problem: Problem, shortlist: _Shortlist, basis: Float[Array, "F F"], threshold: Float[Array, ""]
) -> Float[Array, ""]:
    """Upper bound on the worth (for its cost) of any pair outside the shortlist; see `Criterion.ceiling`."""
    criterion, best = problem.criterion, shortlist.best
    if criterion.ceiling is None or (best.costs is not None and criterion.targets is not None):
        ceiling = jnp.float32(jnp.inf)
    else:
        shrunk = jnp.eye(problem.width, dtype=jnp.float32) - matmul(basis.T, basis)
        ceiling = criterion.ceiling(best.rest, shortlist.z, shrunk, shortlist.bound, threshold / (1 + _SLACK))
    # A shortlist that is not full holds every pair that is left: nothing outside can beat it.
    return jnp.where(best.rest > -jnp.inf, ceiling * (1 + _SLACK), -jnp.inf)


def _certified(problem: Problem, shortlist: _Shortlist, choice: _Choice) -> Bool[Array, ""]:
    """Whether the best of the shortlist is the best of the space, and one more is wanted."""
    top = choice.worth.max()
    # Updated coordinates lose digits as worths fall: a new pass is due before the loss shows.
    min_share = 2.0**-8 if problem.criterion.targets is None else 2.0**-4
    # Right after a pass the best of the shortlist is the best of the space, whatever rounding says.
    fresh = choice.state.picked == shortlist.picked
    good = fresh | ((top >= choice.ceiling) & (top >= shortlist.top * min_share))
    return (choice.state.picked < choice.state.wanted) & (top > -jnp.inf) & good


def _pick(problem: Problem, shortlist: _Shortlist, choice: _Choice) -> _Choice:
    """Add the best pair of the shortlist to the batch."""
    best, limits = shortlist.best, problem.limits
    place = jnp.argmax(choice.worth).astype(jnp.int32)
    state = _added(problem, shortlist, choice, place)
    # With b = sqrt(v) y of the pair, (1 + b b^T)^-1/2 = 1 - s s^T: it takes y, z and U to the new coordinates.
    b = jnp.sqrt(shortlist.weight[place]) * choice.y[place]
    grown = jnp.sqrt(1 + jnp.square(b).sum())
    s = b / jnp.sqrt(grown * (1 + grown))
    y, z, basis = (a - jnp.outer(matmul(a, s), s) for a in (choice.y, choice.z, choice.basis.T))
    c = choice.c - jnp.outer(matmul(choice.y, b), matmul(choice.z, b) / jnp.square(grown))
    left = choice.left.at[place].set(False)
    if limits.per_prompt is not None or limits.per_response is not None:
        first, second = problem.ends(best.pairs)
        allowed = _allowed(problem, state)
        left &= allowed[first] & allowed[second]
    if limits.similarity is not None:
        x, own = shortlist.x, shortlist.x[place]
        square = jnp.square(x).sum(axis=-1)
        left &= ~near_copies(matmul(x, own), square, jnp.square(own).sum(), limits.similarity)
    worth = _worths(problem, best, shortlist.margin, y, z, c, left)
    ceiling = _ceiling(problem, shortlist, basis.T, worth.max())
    return _Choice(state, y, z, c, basis.T, left, worth, ceiling, choice.places.at[choice.state.picked].set(place))


def _added(problem: Problem, shortlist: _Shortlist, choice: _Choice, place: Int[Array, ""]) -> _State:
    """The batch with the pair at a place of the shortlist; its information grows at the end of the pass."""
    state, best, worth = choice.state, shortlist.best, choice.worth[place]
    ends = jnp.minimum(best.pairs[place], problem.size - 1)
    prompts = problem.prompt_of[ends]
    return state._replace(
        picked=state.picked + 1,
        pairs=state.pairs.at[state.picked].set(best.pairs[place]),
        gains=state.gains.at[state.picked].set(worth if best.costs is not None else problem.criterion.gain(worth)),
        ceilings=state.ceilings.at[state.picked].set(choice.ceiling),
        fresh=state.fresh.at[state.picked].set(state.picked == shortlist.picked),
        uses=state.uses.at[ends].add(1),
        prompt_uses=state.prompt_uses.at[prompts].add(jnp.stack([1, jnp.where(prompts[0] == prompts[1], 0, 1)])),
    )


def _grown(start: _State, shortlist: _Shortlist, choice: _Choice) -> _State:
    """The state after a pass that began with `start`: the information grows by the pairs chosen."""
    state, places = choice.state, jnp.arange(start.pairs.shape[0], dtype=jnp.int32)
    new = (places >= start.picked) & (places < state.picked)
    scaled = jnp.sqrt(shortlist.weight[choice.places])[:, None] * shortlist.x[choice.places]
    stuck, lowest = state.picked == start.picked, jnp.where(choice.left, choice.worth, jnp.inf).min()
    return state._replace(
        passes=state.passes + 1,
        root=grown_root(state.root, jnp.where(new[:, None], scaled, 0)),
        # The next shortlist reaches at least what is left of this one, but for rounding: if it finds nothing, the one
        # after it looks everywhere.
        floor=jnp.where(stuck | ~choice.left.any(), -jnp.inf, lowest * (1 - _SLACK)),
        ended=stuck & ~(start.floor > -jnp.inf),
        status=worst(state.status, shortlist.overflow),
    )


def _result(problem: Problem, total: Float[Array, ""], end: _State) -> tuple[Selection, GreedyInfo]:
    """The batch from a space of `total` pairs, and its certificate."""
    criterion = problem.criterion
    valid = jnp.arange(end.pairs.shape[0], dtype=jnp.int32) < end.picked
    exhausted = total < end.wanted.astype(jnp.float32)
    short = jnp.where(exhausted, Status.EXHAUSTED, jnp.where(end.picked < end.wanted, Status.LIMITED, Status.OK))
    idle = jnp.where((valid & (end.gains <= 0)).any(), Status.UNINFORMATIVE, Status.OK)
    ceilings = end.ceilings
    if problem.space.costs is None:  # otherwise they are in units of the gains
        ceilings = jnp.where(ceilings > 0, criterion.gain(jnp.maximum(ceilings, 0)), ceilings)
    pairs = jnp.where(valid[:, None], end.pairs, 0)
    selection = Selection(pairs, end.gains, valid, worst(end.status, short, idle))
    return selection, GreedyInfo(end.passes, ceilings, end.fresh)


def _allowed(problem: Problem, state: _State) -> Bool[Array, "N"]:
    """Responses that the limits allow in one more pair."""
    limits, allowed = problem.limits, jnp.ones(state.uses.shape, bool)
    if limits.per_response is not None:
        allowed &= state.uses < limits.per_response
    if limits.per_prompt is not None:
        allowed &= (state.prompt_uses < limits.per_prompt)[problem.prompt_of]
    return allowed


def _guarded(scorer: Scorer, features: Float[Array, "N F"], state: _State, similarity: Array | float) -> Scorer:
    """Scores that are -inf for near-copies of the batch, at the price of a comparison per pair and pick."""
    ends = jnp.minimum(state.pairs, features.shape[0] - 1)
    picks = features[ends[:, 0]] - features[ends[:, 1]]
    length = jnp.sqrt(jnp.square(picks).sum(axis=1))
    # Products with picks of length 1; a pick with equal ends has no copies.
    along = matmul(features, (picks / jnp.where(length > 0, length, 1)[:, None]).T)
    min_square, eps = jnp.square(similarity), jnp.finfo(features.dtype).eps

    def mask(square: Array, doubt: Array | float, a: Array, b: Array, scores: Array) -> Array:
        def compare(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            place, copies = carry
            ends = (jax.lax.dynamic_index_in_dim(each, place, -1, keepdims=False) for each in (a, b))
            product = jnp.subtract(*ends) if not scores.ndim else jnp.subtract.outer(*ends)
            alike = (jnp.square(product) >= min_square * square + doubt) & (square > 0) & (length[place] > 0)
            return place + 1, copies | alike

        start = (jnp.int32(0), jnp.zeros(scores.shape, bool))
        _, copies = jax.lax.while_loop(lambda carry: carry[0] < state.picked, compare, start)
        return jnp.where(copies, -jnp.inf, scores)

    def pair(a: tuple[Any, Array, Array], b: tuple[Any, Array, Array]) -> Array:
        return mask(square_sum(a[1] - b[1]), 0.0, a[2], b[2], scorer.pair(a[0], b[0]))

    def tile(rows: tuple[Any, Array, Array], columns: tuple[Any, Array, Array]) -> Array:
        # Copies within rounding stay in: the best pairs are scored again by `pair`, which decides exactly.
        doubt = 16 * eps * (square_sum(rows[1])[:, None] + square_sum(columns[1])[None, :])
        return mask(distances(rows[1], columns[1]), doubt, rows[2], columns[2], scorer.tile(rows[0], columns[0]))

    return Scorer((scorer.stats, features, along), pair, tile, order=scorer.order)
