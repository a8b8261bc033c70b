"""Why a batch is what it is: its numbers recomputed in float64 on the host."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from jarm.design.greedy import GreedyInfo
from jarm.selection.engine import Grown
from jarm.selection.replay import log_det_of, replay, sigmoid, whitener
from jarm.selection.request import Request
from jarm.selection.result import Certificate, Reason, Report, SelectedBatch, Swaps

_CHUNK = 1 << 14
"""Labelled pairs compared with the batch at once."""
_NORMAL_95 = 1.959963984540054


def explain(
    request: Request, information: np.ndarray, run: Grown, count: int, status: str, upper: float | None
) -> SelectedBatch:
    """The first `count` pairs of a run with their reasons and report.

    Args:
      request: the call.
      information: `[F, F]` information that the batch starts from.
      run: the batch as passes made it.
      count: number of its pairs to return.
      status: the batch in words.
      upper: bound on log det, or None.
    """
    candidates = request.candidates
    pairs = candidates.chosen(run.selection)[:count]
    x, margin, costs = request.differences(pairs), request.margins(pairs), candidates.costs_of(pairs)
    gains, later = replay(request.criterion, information, x, margin, costs)
    log_det = log_det_of(information, request.scaled_differences(pairs))
    codes, names = request.prompts, request.prompt_names
    prompts = [() if codes is None else tuple(names[code] for code in dict.fromkeys(codes[pair])) for pair in pairs]
    swapped = run.exchange
    certificate = None
    if swapped is None or not swapped.swaps:
        certificate = certify(run.greedy, gains if costs is None else gains / costs, later)
    report = Report(
        criterion=request.criterion_name,
        space=request.space_name,
        held=candidates.count,
        copies=candidates.copies,
        log_det_before=log_det_of(information),
        log_det_after=log_det,
        upper=upper,
        efficiency=None if upper is None else float(np.exp((log_det - upper) / len(information))),
        certificate=certificate,
        swaps=None if swapped is None else Swaps(*(np.asarray(each).item() for each in swapped)),
        per_prompt=_counts(prompts),
        per_response=_counts(pairs.tolist()),
        cost=None if costs is None else float(costs.sum()),
        status=status,
    )
    return SelectedBatch(pairs, gains, _reasons(request, information, pairs, prompts, gains, costs), report)


def certify(info: GreedyInfo, gains: np.ndarray, later: np.ndarray) -> Certificate:
    """How far each choice may have fallen short of the pairs outside the shortlist, and of the pairs chosen after it.

    Args:
      info: passes and ceilings of the greedy batch.
      gains: `[k]` gains of the choices per cost, in float64.
      later: `[k]` largest gain per cost of a pair chosen later.
    """
    ceilings = np.asarray(info.ceilings, np.float64)[: len(gains)]
    # Gains of 0 in float64 leave nothing to be relative to.
    known, positive = ceilings < np.inf, gains > 0
    bound = np.maximum(np.where(known, ceilings, -np.inf), later)[positive]
    gap = np.max(bound / gains[positive] - 1, initial=0)
    return Certificate(float(gap), int((~(known & positive)).sum()), int(info.passes))


def _reasons(
    request: Request,
    information: np.ndarray,
    pairs: np.ndarray,
    prompts: Sequence[tuple[Hashable, ...]],
    gains: np.ndarray,
    costs: np.ndarray | None,
) -> tuple[Reason, ...]:
    """Why each pair of a batch was chosen."""
    whiten, margin = whitener(information), request.margins(pairs)
    y = request.differences(pairs) @ whiten.T
    sd = np.sqrt(np.square(y).sum(axis=1))
    nearest, cosine = _nearest(request, y, whiten)
    p, p_sd = sigmoid(margin), sigmoid(margin) * sigmoid(-margin) * sd
    low, high = sigmoid(margin - _NORMAL_95 * sd), sigmoid(margin + _NORMAL_95 * sd)
    labelled = len(request.labelled) > 0
    return tuple(
        Reason(
            first=first,
            second=second,
            prompts=prompts[at],
            gain=float(gains[at]),
            cost=None if costs is None else float(costs[at]),
            margin=float(margin[at]),
            margin_sd=float(sd[at]),
            p=float(p[at]),
            p_sd=float(p_sd[at]),
            p_low=float(low[at]),
            p_high=float(high[at]),
            nearest=int(nearest[at]) if labelled else None,
            cosine=float(cosine[at]) if labelled else None,
        )
        for at, (first, second) in enumerate(pairs.tolist())
    )


def _nearest(request: Request, y: np.ndarray, whiten: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row of `y` the labelled pair with the largest absolute cosine, and that cosine."""
    y = _unit(y)
    nearest, best = np.zeros(len(y), np.int64), np.full(len(y), -1.0)
    for start in range(0, len(request.labelled), _CHUNK):
        labelled = _unit(request.differences(request.labelled[start : start + _CHUNK]) @ whiten.T)
        cosine = np.abs(y @ labelled.T)
        largest = cosine.argmax(axis=1)
        value = cosine[np.arange(len(y)), largest]
        nearest, best = np.where(value > best, start + largest, nearest), np.maximum(best, value)
    return nearest, np.minimum(best, 1)


def _unit(y: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.square(y).sum(axis=1, keepdims=True))
    return y / np.where(length > 0, length, 1)


def _counts(names: Sequence[Sequence[Hashable]]) -> dict[Any, int]:
    """The number of pairs with each name, largest first; a pair counts once for a name."""
    return dict(collections.Counter(name for some in names for name in set(some)).most_common())
