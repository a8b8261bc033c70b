"""`jarm.select`: which pairs to label next, for loops of your own. Plain arrays in, a small result out, no training."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.base import Limits, PairSpace, Selection
from jarm.core.status import JarmError, Status
from jarm.design.bound import design_bound
from jarm.design.criteria import BALD, D_OPTIMAL, D_UNWEIGHTED, Criterion, a_optimal, epig, v_optimal
from jarm.design.exchange import ExchangeInfo, exchange
from jarm.design.fisher import fisher_weight, space_information
from jarm.design.greedy import GreedyInfo, greedy
from jarm.selection.arguments import (
    as_array,
    check_definite,
    finite,
    index_pairs,
    read_costs,
    read_limits,
    read_prior,
    single,
    whole,
)
from jarm.selection.candidates import Candidates, codes_of, find_candidates, is_among
from jarm.selection.explain import counted, reasons
from jarm.selection.replay import replay, weights_of, whitener
from jarm.selection.result import Certificate, Report, SelectedBatch, Swaps

PRIOR = 0.1
"""c of the prior that stands in where none is given."""
ROOM = (512, 2048)
"""Pairs struck out of passes over `cross` and `all` pairs: so many, or four times, and so on, so that few programs are
made; and how many at first. A pass over 12.5 million pairs takes a tenth longer for 512, and half as long for 2,048."""
AUTO = 1 << 25
"""Pairs of a space up to which a bound is computed unasked: seconds on one core."""
_CHUNK = 1 << 16
"""Labelled pairs whose information is summed at once."""
_NOTHING = (
    "No pair of the space would teach anything: all have equal features at both ends, or rewards so far apart that the "
    "answer is certain; check the features for copies, and the scale of the rewards."
)

CRITERIA: dict[str, Callable[[int, np.ndarray, np.ndarray], Criterion]] = {
    "d": lambda width, targets, margins: D_OPTIMAL,
    "d-unweighted": lambda width, targets, margins: D_UNWEIGHTED,
    "a": lambda width, targets, margins: a_optimal(width),
    "v": lambda width, targets, margins: v_optimal(jnp.asarray(targets, jnp.float32)),
    "epig": lambda width, targets, margins: epig(jnp.asarray(targets), jnp.asarray(margins)),
    "bald": lambda width, targets, margins: BALD,
}
"""Criteria by name: `(F, targets [T, F], their margins [T]) -> objective`."""
WITH_TARGETS = ("v", "epig")

_greedy = jax.jit(greedy, static_argnames=("k",))
_information = jax.jit(space_information)
_exchange = jax.jit(exchange)
_design = jax.jit(design_bound, static_argnames=("k",))


def select(
    features: Any,
    rewards: Any = None,
    *,
    space: Any,
    k: int,
    prompts: Sequence[Any] | np.ndarray | None = None,
    prior_precision: Any = None,
    labelled: Any = None,
    exclude: Any = None,
    criterion: str | Criterion = "d",
    targets: Any = None,
    costs: Any = None,
    per_prompt: int | None = None,
    per_response: int | None = None,
    similarity: float | None = None,
    swaps: int = 0,
    bound: bool | str = "auto",
    allow_fewer: bool = False,
) -> SelectedBatch:
    """The k pairs of responses to label next: an exact greedy batch over every pair of a space.

    A batch is grown one pair at a time, each the best of all pairs of the space given those before it, by default for
    log det of the information A = A0 + sum v x x^T: x the difference of two responses' features, v = p (1 - p) its
    Fisher weight, p = sigmoid(difference of rewards), A0 prior and labelled pairs. No pair is ever built.

    Args:
      features: `[N, F]` features of the responses, such as the last hidden layer of a reward head; for a linear head
        the embeddings. Anything that `numpy.asarray` takes.
      rewards: `[N]` rewards by the current head, in logits; None takes every pair for a toss-up, v = 1/4.
      space: which pairs may be asked about: "within" prompts, "cross" (across prompts), "all", or `[M, 2]` indices.
      k: pairs to choose.
      prompts: `[N]` ids of any kind that can be a dictionary's key; any number of responses each, in any order.
      prior_precision: a number lambda > 0 for lambda I, or `[F, F]`. None for .1 (L + k) Ibar, Ibar the mean of v x x^T
        over the space and L the number of labelled pairs: the prior weighs a tenth of what as many average pairs tell.
      labelled: `[L, 2]` labelled pairs. Their information with the current features and rewards is added to the prior,
        and they are not offered again.
      exclude: `[E, 2]` further pairs not to offer.
      criterion: "d" (log det), "d-unweighted" (v = 1), "a" (trace of the inverse), "v" (mean variance of targets),
        "epig" (expected information about targets), "bald" (about the head), or a `jarm.Criterion`.
      targets: of "v" and "epig": `[T, 2]` integers, pairs of responses, or `[T, F]` floats, directions (of margin 0).
      costs: `[N]` of each response, of which a pair costs the sum, or `[M]` of each listed pair. The best pair is then
        the one of largest gain for its cost.
      per_prompt: most pairs with a response of any one prompt.
      per_response: most pairs with any one response.
      similarity: leave out pairs whose feature difference has at least this cosine with one of the batch: near-copies.
      swaps: most swaps of a pair of the batch for one outside that raise log det further (Fedorov exchange).
      bound: whether to bound the log det of every batch of k pairs from above, for the D-efficiency of this one, at the
        price of another batch; "auto" does in spaces of up to 2^25 pairs. Both are for "d" and "d-unweighted".
      allow_fewer: return fewer pairs where there are no k, instead of raising.

    Returns:
      The batch: `pairs`, `gains`, `why` each was chosen, and a `report`. Inputs are not modified.

    Raises:
      JarmError: something given is wrong, the space or the limits hold no k pairs, or pairs would teach nothing.

    The method is that of Shen, Sun and Ton (arXiv 2502.04354), grown greedily; see docs/selection.md.
    """
    phi = finite("features", features, ("N", "F"))
    size, width = phi.shape
    r = np.zeros(size) if rewards is None else finite("rewards", rewards, (size,)).astype(np.float64)
    k = whole("k", k)
    if space is None:
        raise JarmError("There is no space: give 'within', 'cross', 'all', or [M, 2] pairs of responses.")
    offered = space if isinstance(space, str) else index_pairs("space", space, size)
    labelled, banned = index_pairs("labelled", labelled, size), index_pairs("exclude", exclude, size)
    codes, names = (None, []) if prompts is None else codes_of(prompts, size)
    price = read_costs(costs, size, None if isinstance(offered, str) else len(offered))
    limits = read_limits(per_prompt, per_response, similarity, prompts=prompts is not None)
    candidates = find_candidates(offered, size, codes, price, np.concatenate([labelled, banned]))
    held = candidates.total - len(candidates.excluded)
    if held < (1 if allow_fewer else k):
        raise JarmError(
            f"The space holds {held:,} pairs that are not labelled or excluded, and k = {k:,} are asked for: ask for "
            "fewer, widen the space, or pass allow_fewer=True."
        )

    asked = min(k, held)

    def differences(pairs: np.ndarray) -> np.ndarray:
        return phi[pairs[:, 0]].astype(np.float64) - phi[pairs[:, 1]].astype(np.float64)

    def margins(pairs: np.ndarray) -> np.ndarray:
        return r[pairs[:, 0]] - r[pairs[:, 1]]

    def information(objective: Criterion, pairs: np.ndarray) -> np.ndarray:
        total = np.zeros((width, width))
        for at in range(0, len(pairs), _CHUNK):
            some = pairs[at : at + _CHUNK]
            x = differences(some)
            total += (weights_of(objective, margins(some))[:, None] * x).T @ x
        return total

    objective = _objective(criterion, targets, phi, differences, margins)
    of_log_det = objective.worth in (D_OPTIMAL.worth, D_UNWEIGHTED.worth)
    swaps = whole("swaps", swaps, 0)
    if not isinstance(bound, bool | np.bool_) and bound != "auto":
        raise JarmError(f"bound is {bound!r}: give True, False or 'auto'.")
    asked_for = not isinstance(bound, str) and bool(bound)
    if (swaps or asked_for) and not of_log_det:
        raise JarmError("Swaps and bounds are known for log det only: choose criterion 'd' or 'd-unweighted'.")
    y, own = (candidates.gather(single(*each)) for each in (("features", phi), ("rewards", r)))
    start = information(objective, labelled)
    if prior_precision is None:
        start += PRIOR * (len(labelled) + asked) * _mean_information(objective, y, own, candidates)
        # As `jarm.core.linalg.jitter`: of directions that no pair sees, the least that float32 does not lose.
        start += 4 * np.finfo(np.float32).eps * np.trace(start) * np.eye(width)
    else:
        start += read_prior(prior_precision, width)
    # What float32 makes of it is what the batch starts from, and what the report speaks of.
    narrow = start.astype(np.float32)
    check_definite(narrow, prior_precision, len(labelled))
    start = narrow.astype(np.float64)

    def run(struck: np.ndarray, room: int) -> _Run:
        offer = candidates.without(struck, room)
        selection, info = jax.device_get(_greedy(objective, y, own, offer, narrow, asked, limits=limits))
        if not swaps or selection.status not in (Status.OK, Status.EXHAUSTED, Status.LIMITED):
            return _Run(offer, selection, info, None)
        better, swapped = jax.device_get(
            _exchange(objective, y, own, offer, narrow, selection, limits=limits, swaps=swaps)
        )
        # Float64 has the last word on whether swaps helped.
        gained = log_det_of(better) - log_det_of(selection)
        if swapped.swaps and not gained > 0:
            return _Run(
                offer, selection, info, swapped._replace(swaps=np.int32(0), gained=0.0, optimal=np.bool_(False))
            )
        return _Run(offer, better, info, swapped._replace(gained=gained if swapped.swaps else 0.0))

    def log_det_of(selection: Selection) -> float:
        pairs = candidates.back(np.asarray(selection.pairs)[np.asarray(selection.valid)])
        return float(np.linalg.slogdet(start + information(objective, pairs))[1])

    def leverages(pairs: np.ndarray) -> np.ndarray:
        q = np.square(differences(pairs) @ whitener(start).T).sum(axis=1)
        return weights_of(objective, margins(pairs)) * q

    done = _struck_out(candidates, leverages, run)
    count, status = _judged(done.selection, asked, k, held, limits, allow_fewer=allow_fewer)
    upper = None
    if asked_for or (isinstance(bound, str) and of_log_det and held <= AUTO):
        design = jax.device_get(_design(objective, y, own, done.offer, narrow, asked, start=done.selection))
        if asked_for and design.status != Status.OK:
            raise JarmError("The bound loses all digits in float32: give a larger prior_precision, or bound=False.")
        upper = float(design.upper) if design.status == Status.OK else None
    pairs = candidates.back(np.asarray(done.selection.pairs)[:count])
    x, margin, cost = differences(pairs), margins(pairs), candidates.cost_of(pairs)
    gains, later = replay(objective, start, x, margin, cost)
    named = [[names[code] for code in dict.fromkeys(codes[pair])] if codes is not None else [] for pair in pairs]
    log_det = float(np.linalg.slogdet(start + information(objective, pairs))[1])
    report = Report(
        criterion=criterion if isinstance(criterion, str) else "of the caller",
        space=offered if isinstance(offered, str) else "listed",
        held=held,
        log_det_before=float(np.linalg.slogdet(start)[1]),
        log_det_after=log_det,
        upper=upper,
        efficiency=None if upper is None else float(np.exp((log_det - upper) / width)),
        certificate=_certificate(done, gains if cost is None else gains / cost, later),
        swaps=None if done.swapped is None else Swaps(*(np.asarray(each).item() for each in done.swapped)),
        per_prompt=counted(named),
        per_response=counted(pairs.tolist()),
        cost=None if cost is None else float(cost.sum()),
        status=status,
    )
    return SelectedBatch(
        pairs, gains, reasons(pairs, gains, cost, named, margin, x, labelled, differences, start), report
    )


class _Run(NamedTuple):
    """What the engines made of an offer."""

    offer: PairSpace
    selection: Selection
    info: GreedyInfo
    swapped: ExchangeInfo | None


def _objective(
    criterion: str | Criterion,
    targets: Any,
    phi: np.ndarray,
    differences: Callable[[np.ndarray], np.ndarray],
    margins: Callable[[np.ndarray], np.ndarray],
) -> Criterion:
    """The criterion of that name, about those targets."""
    size, width = phi.shape
    if not isinstance(criterion, str | Criterion):
        raise JarmError(
            f"A criterion is a name or a jarm.Criterion, not {type(criterion).__name__}: choose from "
            f"{', '.join(CRITERIA)}, or give what jarm.a_optimal or the like returns."
        )
    if isinstance(criterion, Criterion):
        named = False
    elif criterion in CRITERIA:
        named = criterion in WITH_TARGETS
    else:
        near = difflib.get_close_matches(criterion.lower(), CRITERIA, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(CRITERIA)}."
        raise JarmError(f"There is no criterion {criterion!r}: {hint}")
    if named != (targets is not None):
        if named:
            raise JarmError(
                f"Criterion {criterion!r} is about targets: give targets=, [T, 2] pairs or [T, F] directions."
            )
        raise JarmError(
            f"Only {' and '.join(WITH_TARGETS)} are about targets: leave targets out, or choose one of them."
        )
    if not isinstance(criterion, str):
        return criterion
    directions, of_targets = np.zeros((0, width)), np.zeros(0)
    if named:
        array = as_array("targets", targets)
        if array.dtype.kind in "iu" and array.shape[1:] == (2,):
            pairs = index_pairs("targets", array, size)
            directions, of_targets = differences(pairs), margins(pairs)
        else:
            directions = finite("targets", array, ("T", width))
            of_targets = np.zeros(len(directions))
        if not np.square(directions).sum() > 0:
            raise JarmError("targets are empty or zero, so there is nothing to learn about them: give others.")
    return CRITERIA[criterion](width, directions, of_targets)


def _mean_information(
    objective: Criterion, features: np.ndarray, rewards: np.ndarray, candidates: Candidates
) -> np.ndarray:
    """Ibar `[F, F]`, the mean information of a pair of the space, what is excluded included."""
    if objective.weight not in (fisher_weight, D_UNWEIGHTED.weight):
        raise JarmError("The pool's mean information is not known for weights of your own: give prior_precision.")
    weighted = rewards if objective.weight is fisher_weight else None
    total = jax.device_get(_information(features, weighted, candidates.space)[0])
    mean = np.asarray(total, np.float64) / candidates.total
    if not np.isfinite(mean).all():
        raise JarmError("The information of the pool overflows float32: scale the features down.")
    if not np.trace(mean) > 0:
        raise JarmError(_NOTHING)
    return mean


def _struck_out(
    candidates: Candidates,
    leverages: Callable[[np.ndarray], np.ndarray],
    run: Callable[[np.ndarray, int], _Run],
) -> _Run:
    """A batch without what is excluded, of which passes strike out no more than they need to.

    A batch that is greedy over more pairs and has none of those excluded is greedy without them, and no swap helps that
    would not help before. So the excluded pairs of most leverage are struck out, and more only if others are chosen.
    """
    excluded = candidates.excluded
    # To strike pairs out of a list or a grid takes no time.
    first = min(len(excluded), ROOM[1]) if candidates.space.kind in ("cross", "all") else len(excluded)
    room = ROOM[0]
    while room < first:
        room *= 4
    if len(excluded) <= room:
        return run(excluded, room)
    order = excluded[np.argsort(-leverages(excluded), kind="stable")]
    struck = order[:room]
    while True:
        done = run(struck, room)
        chosen = candidates.back(np.asarray(done.selection.pairs)[np.asarray(done.selection.valid)])
        chosen = chosen[is_among(chosen, excluded)]
        if not len(chosen):
            return done
        room *= 4
        known = np.concatenate([struck, chosen])
        struck = np.concatenate([known, order[~is_among(order, known)]])[:room]


def _judged(
    selection: Selection, asked: int, k: int, held: int, limits: Limits, *, allow_fewer: bool
) -> tuple[int, str]:
    """How many pairs of the batch are good, and in words why not more."""
    status, count = Status(int(selection.status)), int(selection.valid.sum())
    if status in (Status.NONFINITE, Status.SINGULAR):
        raise JarmError(
            "Scores or information overflow or lose all digits in float32: scale the features down, or give a larger "
            "prior_precision."
        )
    idle = selection.gains[:count] <= 0
    useful = int(idle.argmax()) if idle.any() else count
    if not useful:
        raise JarmError(_NOTHING)
    if useful == k:
        return k, "Complete."
    words = []
    if useful < count:
        words.append(
            f"Only {useful:,} of {k:,} pairs teach anything: all others that are left are copies of each other"
        )
    elif count < asked:
        given = [f"{name}={value:g}" for name, value in vars(limits).items() if value is not None]
        leave = "leaves" if len(given) == 1 else "leave"
        words.append(f"{' and '.join(given)} {leave} no more than {count:,} of {k:,} pairs: raise what limits")
    else:
        words.append(f"The space holds no more than {held:,} of {k:,} pairs")
    if allow_fewer:
        return useful, f"{words[0]}."
    raise JarmError(f"{words[0]}; ask for fewer, or pass allow_fewer=True.")


def _certificate(done: _Run, gains: np.ndarray, later: np.ndarray) -> Certificate | None:
    """What bounds each choice: the ceiling of what was outside the shortlist, and the pairs chosen after it."""
    if done.swapped is not None and done.swapped.swaps > 0:
        return None
    ceilings = np.asarray(done.info.ceilings, np.float64)[: len(gains)]
    open_ended = ~(ceilings < np.inf)
    bound = np.maximum(np.where(open_ended, -np.inf, ceilings), later)
    return Certificate(float(np.max(bound / gains - 1, initial=0)), int(open_ended.sum()), int(done.info.passes))
