"""The work of `jarm.select`: starting information, the batch, and the bound on every batch.

A space of few pairs is written out on the host (`jarm.selection.written_out`); others, swaps and bounds are programs
for a device, whose sizes are rounded up so that calls of any sizes share a few.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from jarm.core.base import PairSpace, Selection
from jarm.core.buckets import bucket
from jarm.core.compiled import keep_compiled
from jarm.core.status import JarmError, Status
from jarm.design.bound import design_bound
from jarm.design.exchange import ExchangeInfo, exchange
from jarm.design.fisher import space_information
from jarm.design.greedy import GreedyInfo, greedy
from jarm.selection.arguments import check_definite, read_prior
from jarm.selection.candidates import is_among
from jarm.selection.replay import log_det_of, whitener
from jarm.selection.request import Request
from jarm.selection.worths import known, weights_of
from jarm.selection.written_out import Written, greedy_written_out

PRIOR_WEIGHT = 0.1
"""c of the prior that stands in where none is given."""
CAPACITY = 512
"""Excluded pairs that passes over `cross` and `all` pairs have room for: this many, or 4, 16, ... times as many, so
that few programs are compiled. A pass over 12.5 million pairs takes a tenth longer for 512."""
FIRST_EXCLUDED = 2048
"""Excluded pairs left out of the first pass, at most; for 2,048 the same pass takes half as long again."""
WRITTEN_OUT = 1 << 21
"""Numbers of a space, F + G of each pair for F features and G targets, up to which it is written out: 16 MiB."""
WORK = 1 << 26
"""Numbers times pairs of the batch up to which it is written out: some tenths of a second on one core."""
FEW_PICKS = 32
"""Pairs of a batch that a program has room for, at least."""
CERTAIN = 80.0
"""Rewards so many logits apart leave nothing to learn from an answer."""

jit_greedy = jax.jit(greedy, static_argnames=("k",))
jit_exchange = jax.jit(exchange)
jit_design_bound = jax.jit(design_bound, static_argnames=("k",))
jit_space_information = jax.jit(space_information)


class Grown(NamedTuple):
    """A batch and how it was made.

    Attributes:
      space: the space of the passes, without the pairs that they left out.
      selection: the batch.
      greedy: passes and ceilings of the greedy batch.
      exchange: swaps made, and their gain in float64; None where none were asked for.
    """

    space: PairSpace
    selection: Selection
    greedy: GreedyInfo
    exchange: ExchangeInfo | None


def starting_information(request: Request, prior_precision: object) -> np.ndarray:
    """A0 `[F, F]`, the information of prior and labelled pairs: float64 numbers that float32 holds.

    Args:
      request: the call.
      prior_precision: a number, a matrix, or None for `PRIOR_WEIGHT` (L + k) Ibar.

    Raises:
      JarmError: the prior is not a precision, or the information is not positive definite.
    """
    width, num_labelled = request.features.shape[1], len(request.labelled)
    start = request.information(request.labelled)
    if prior_precision is None:
        start += PRIOR_WEIGHT * (num_labelled + request.reachable) * _mean_information(request)
        # As in `jarm.core.linalg.jitter`: the least that float32 keeps, in directions that no pair sees.
        start += 4 * np.finfo(np.float32).eps * np.trace(start) * np.eye(width)
    else:
        start += read_prior(prior_precision, width)
    # The batch starts from the float32 matrix, so the report speaks of it, too.
    narrow = start.astype(np.float32)
    check_definite(narrow, prior_precision, num_labelled)
    return narrow.astype(np.float64)


def _mean_information(request: Request) -> np.ndarray:
    """Ibar `[F, F]`, the mean information of a pair of the space, excluded pairs included."""
    weighted, candidates = request.criterion.weighted, request.candidates
    if weighted is None:
        raise JarmError("The mean information of a pair is not known for weights of your own: give prior_precision.")
    if is_written_out(request):
        total = request.information(candidates.written_out)
    else:
        keep_compiled()
        rewards = request.device_rewards if weighted else None
        total = jax.device_get(jit_space_information(request.device_features, rewards, candidates.space))[0]
    mean = np.asarray(total, np.float64) / candidates.total
    if not np.isfinite(mean).all():
        raise JarmError("The mean information of a pair overflows float32: scale the features down.")
    if not np.trace(mean) > 0:
        raise JarmError(_nothing(request))
    return mean


def is_written_out(request: Request) -> bool:
    """Whether every pair of the space fits into so little memory, and the batch takes so little time, on the host."""
    criterion = request.criterion
    of_pair = request.features.shape[1] + (0 if criterion.targets is None else len(criterion.targets))
    numbers = request.candidates.total * of_pair
    return known(criterion) and numbers <= WRITTEN_OUT and numbers * request.reachable <= WORK


def grow(request: Request, information: np.ndarray) -> Grown:
    """The greedy batch without excluded pairs; passes leave out no more of those than they need to.

    A batch that is greedy over more pairs and holds no excluded one is greedy without them, and no swap helps that
    would not help before. So passes leave out the excluded pairs of most leverage, and more only if a batch holds some.
    """
    candidates, excluded = request.candidates, request.candidates.excluded
    if is_written_out(request) and not (request.swaps or request.bound):
        return _run(request, information, excluded[:0], 0)
    # To leave pairs out of a list or a grid takes no time.
    first = min(len(excluded), FIRST_EXCLUDED) if candidates.space.kind in ("cross", "all") else len(excluded)
    capacity = CAPACITY
    while capacity < first:
        capacity *= 4
    if len(excluded) <= capacity:
        return _run(request, information, excluded, capacity)
    order = excluded[np.argsort(-_leverages(request, information, excluded), kind="stable")]
    left_out = order[:capacity]
    while True:
        run = _run(request, information, left_out, capacity)
        chosen = candidates.chosen(run.selection)
        chosen = chosen[is_among(chosen, excluded)]
        if not len(chosen):
            return run
        capacity *= 4
        certain = np.concatenate([left_out, chosen])
        left_out = np.concatenate([certain, order[~is_among(order, certain)]])[:capacity]


def _leverages(request: Request, information: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """v x^T A0^-1 x of pairs, `[m]`."""
    q = np.square(request.differences(pairs) @ whitener(information).T).sum(axis=1)
    return weights_of(request.criterion, request.margins(pairs)) * q


def _problem(request: Request, space: PairSpace, information: np.ndarray) -> tuple[Any, ...]:
    """The first arguments of `greedy`, `exchange` and `design_bound`."""
    narrow = information.astype(np.float32)
    return request.criterion, request.device_features, request.device_rewards, space, narrow


def _on_host(request: Request, information: np.ndarray) -> tuple[Selection, GreedyInfo]:
    """The greedy batch of a space that is written out."""
    candidates, codes = request.candidates, request.prompts
    pairs = candidates.written_out
    margin = request.margins(pairs)
    written = Written(
        pairs=pairs,
        x=request.differences(pairs),
        margin=margin,
        weight=weights_of(request.criterion, margin),
        costs=candidates.costs_of(pairs),
        prompts=None if codes is None else codes[pairs],
        offered=~is_among(pairs, candidates.excluded),
    )
    selection, info = greedy_written_out(request.criterion, written, information, request.reachable, request.limits)
    places: Any = candidates.places(np.asarray(selection.pairs))
    return dataclasses.replace(selection, pairs=places), info


def _on_device(request: Request, information: np.ndarray, space: PairSpace) -> tuple[Selection, GreedyInfo]:
    """The greedy batch of a space of any size."""
    keep_compiled()
    problem, count = _problem(request, space, information), request.reachable
    room = bucket(max(count, FEW_PICKS))
    grown: tuple[Selection, GreedyInfo] = jax.device_get(
        jit_greedy(*problem, room, count=np.int32(count), limits=request.limits)
    )
    return grown


def _run(request: Request, information: np.ndarray, left_out: np.ndarray, capacity: int) -> Grown:
    """One greedy batch and its swaps, without some pairs."""
    space = request.candidates.without(left_out, capacity)
    written = is_written_out(request)
    selection, info = _on_host(request, information) if written else _on_device(request, information, space)
    if not request.swaps or selection.status not in (Status.OK, Status.EXHAUSTED, Status.LIMITED):
        return Grown(space, selection, info, None)
    keep_compiled()
    problem = _problem(request, space, information)
    better, swapped = jax.device_get(jit_exchange(*problem, selection, limits=request.limits, swaps=request.swaps))
    if not swapped.swaps:
        return Grown(space, better, info, swapped._replace(gained=0.0))
    before, after = (
        log_det_of(information, request.scaled_differences(request.candidates.chosen(each)))
        for each in (selection, better)
    )
    # Float64 has the last word on whether swaps helped.
    if not after > before:
        undone = swapped._replace(swaps=np.int32(0), gained=0.0, optimal=np.bool_(False))
        return Grown(space, selection, info, undone)
    return Grown(space, better, info, swapped._replace(gained=after - before))


def count_useful(request: Request, selection: Selection) -> tuple[int, str]:
    """The number of pairs that teach something, the first of the batch, and in words why there are not k.

    Raises:
      JarmError: there are fewer than k and `allow_fewer` is False, or none, or float32 does not suffice.
    """
    k, status, count = request.k, Status(int(selection.status)), int(selection.valid.sum())
    if status in (Status.NONFINITE, Status.SINGULAR):
        raise JarmError(
            "Scores or information overflow or lose all digits in float32: scale the features down, or give a larger "
            "prior_precision."
        )
    idle = selection.gains[:count] <= 0
    useful = int(idle.argmax()) if idle.any() else count
    if not useful:
        raise JarmError(_nothing(request))
    if useful == k:
        return k, "Complete."
    if useful < count:
        reason = f"Only {useful:,} of {k:,} pairs teach anything: {_idle_because(request, selection, useful, count)}"
    elif count < request.reachable:
        given = [f"{name}={value:g}" for name, value in vars(request.limits).items() if value is not None]
        leave = "leaves" if len(given) == 1 else "leave"
        reason = f"{' and '.join(given)} {leave} no more than {count:,} of {k:,} pairs: raise what limits"
    else:
        reason = f"The space holds no more than {request.candidates.count:,} of {k:,} pairs"
    if not request.allow_fewer:
        raise JarmError(f"{reason}; ask for fewer, or pass allow_fewer=True.")
    return useful, f"{reason}."


def _nothing(request: Request) -> str:
    """Why no pair gains anything in float32; pairs of equal features are not offered in the first place."""
    spread = float(np.ptp(request.rewards))
    if request.criterion.weighted is not False and spread > CERTAIN:
        why = (
            f"rewards are up to {spread:.3g} logits apart, so that answers are certain; check the scale of the rewards"
        )
    else:
        why = "features of its pairs differ by less than float32 can tell; check the features for copies"
    return f"No pair of the space would teach anything: {why}."


def _idle_because(request: Request, selection: Selection, useful: int, count: int) -> str:
    """Why pairs that are left gain nothing in float32, of those that a batch holds beyond its useful ones."""
    pairs = np.sort(request.candidates.chosen(selection)[useful:count], axis=1)
    margins = np.abs(request.margins(pairs))
    certain = weights_of(request.criterion, margins).astype(np.float32) == 0
    if certain.any():
        at = int(certain.argmax())
        return (
            f"of others that are left, such as ({pairs[at, 0]}, {pairs[at, 1]}), the rewards are as far apart as "
            f"{margins[at]:.3g} logits, so the answer is certain; check the scale of the rewards"
        )
    return (
        f"of others that are left, such as ({pairs[0, 0]}, {pairs[0, 1]}), the features differ by less than float32 "
        "can tell; check the features for copies"
    )


def upper_bound(request: Request, information: np.ndarray, run: Grown) -> float | None:
    """A bound on the log det of every batch of as many pairs, in nats; None where none is asked for.

    Raises:
      JarmError: float32 does not suffice.
    """
    if not request.bound:
        return None
    keep_compiled()
    start = _cut(run.selection, request.reachable)
    problem = _problem(request, run.space, information)
    design = jax.device_get(jit_design_bound(*problem, request.reachable, start=start))
    if design.status == Status.OK:
        return float(design.upper)
    raise JarmError("The bound loses all digits in float32: give a larger prior_precision, or bound=False.")


def _cut(selection: Selection, count: int) -> Selection:
    """A batch without room for more pairs than `count`."""
    return dataclasses.replace(
        selection, pairs=selection.pairs[:count], gains=selection.gains[:count], valid=selection.valid[:count]
    )
