"""A call of `jarm.select`, read into one record."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jarm.core.base import Limits
from jarm.core.buckets import bucket, padded
from jarm.core.messages import choose
from jarm.core.rows import group_rows
from jarm.core.status import JarmError
from jarm.design.criteria import BALD, D_OPTIMAL, D_UNWEIGHTED, Criterion, mean_information, sum_of_variances
from jarm.selection.arguments import (
    as_array,
    finite,
    index_pairs,
    read_costs,
    read_limits,
    refuse_large,
    single,
    truth,
    whole,
)
from jarm.selection.candidates import Candidates, codes_of, find_candidates
from jarm.selection.worths import weights_of

_CHUNK = 1 << 16
"""Pairs whose information is summed at once."""

CRITERIA: dict[str, Callable[[int, np.ndarray, np.ndarray], Criterion]] = {
    "d": lambda width, targets, margins: D_OPTIMAL,
    "d-unweighted": lambda width, targets, margins: D_UNWEIGHTED,
    "a": lambda width, targets, margins: sum_of_variances(np.eye(width, dtype=np.float32)),
    "v": lambda width, targets, margins: sum_of_variances(_mean_directions(targets)),
    "epig": lambda width, targets, margins: mean_information(
        (np.sqrt(weights_of(D_OPTIMAL, margins))[:, None] * targets).astype(np.float32)
    ),
    "bald": lambda width, targets, margins: BALD,
}
"""Criteria by name: `(F, targets [T, F], their margins [T]) -> criterion`."""
WITH_TARGETS = ("v", "epig")


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A call of `jarm.select` with its arguments read and checked.

    Attributes:
      features: `[N, F]` features as the caller gave them, float16 or wider.
      rewards: `[N]` float64.
      prompts: `[N]` codes of the prompts, or None.
      prompt_names: the prompt of each code.
      candidates: the pairs on offer.
      space_name: their kind, for print.
      labelled: `[L, 2]` int64 labelled pairs.
      criterion: the worth of a pair.
      criterion_name: its name, for print.
      limits: limits on the batch.
      k: number of pairs asked for.
      swaps: maximum number of swaps.
      bound: whether to bound the log det of every batch.
      allow_fewer: whether a batch of fewer pairs is returned instead of an error.
    """

    features: np.ndarray
    rewards: np.ndarray
    prompts: np.ndarray | None
    prompt_names: list[Any]
    candidates: Candidates
    space_name: str
    labelled: np.ndarray
    criterion: Criterion
    criterion_name: str
    limits: Limits
    k: int
    swaps: int
    bound: bool
    allow_fewer: bool

    @functools.cached_property
    def device_features(self) -> np.ndarray:
        """`[n, F]` float32 at the places of `candidates.space`, for the passes."""
        return self.candidates.gather(single("features", self.features))

    @functools.cached_property
    def device_rewards(self) -> np.ndarray:
        """`[n]` float32, likewise."""
        return self.candidates.gather(single("rewards", self.rewards))

    @property
    def reachable(self) -> int:
        """The smaller of k and the number of pairs on offer."""
        return min(self.k, self.candidates.count)

    def differences(self, pairs: np.ndarray) -> np.ndarray:
        """Feature differences x `[m, F]` of pairs, float64."""
        return _differences(self.features, pairs)

    def margins(self, pairs: np.ndarray) -> np.ndarray:
        """Margins `[m]` of pairs, float64."""
        return _margins(self.rewards, pairs)

    def scaled_differences(self, pairs: np.ndarray) -> np.ndarray:
        """sqrt(v) x `[m, F]` of pairs, float64: pairs add the products of these rows to the information."""
        return np.sqrt(weights_of(self.criterion, self.margins(pairs)))[:, None] * self.differences(pairs)

    def information(self, pairs: np.ndarray) -> np.ndarray:
        """Sum of v x x^T over pairs `[m, 2]`, `[F, F]` float64."""
        total = np.zeros((self.features.shape[1],) * 2)
        for start in range(0, len(pairs), _CHUNK):
            some = pairs[start : start + _CHUNK]
            x = self.differences(some)
            total += (weights_of(self.criterion, self.margins(some))[:, None] * x).T @ x
        return total


def read_request(
    features: Any,
    rewards: Any,
    *,
    space: Any,
    k: Any,
    prompts: Any,
    labelled: Any,
    exclude: Any,
    criterion: Any,
    targets: Any,
    costs: Any,
    per_prompt: Any,
    per_response: Any,
    similarity: Any,
    swaps: Any,
    bound: Any,
    allow_fewer: Any,
) -> Request:
    """Read and check the arguments of `jarm.select`.

    Raises:
      JarmError: an argument is wrong, or the space holds too few pairs.
    """
    features = finite("features", features, ("N", "F"))
    size = len(features)
    rewards = np.zeros(size) if rewards is None else finite("rewards", rewards, (size,)).astype(np.float64)
    k, allow_fewer = whole("k", k), truth("allow_fewer", allow_fewer)
    if space is None:
        raise JarmError("There is no space: give 'within', 'cross', 'all', or [M, 2] pairs of responses.")
    space = space if isinstance(space, str) else index_pairs("space", space, size)
    labelled, exclude = index_pairs("labelled", labelled, size), index_pairs("exclude", exclude, size)
    codes, names = (None, []) if prompts is None else codes_of(prompts, size)
    costs = read_costs(costs, size, None if isinstance(space, str) else len(space))
    limits = read_limits(per_prompt, per_response, similarity, prompts=prompts is not None)
    alike = group_rows(lambda part: features[part], *features.shape)
    candidates = find_candidates(space, size, codes, costs, np.concatenate([labelled, exclude]), alike)
    _check_count(candidates, k, allow_fewer=allow_fewer)
    name = criterion if isinstance(criterion, str) else "of the caller"
    criterion = read_criterion(criterion, targets, features, rewards, codes)
    swaps, bound = whole("swaps", swaps, 0), truth("bound", bound)
    if (swaps or bound) and not criterion.is_log_det:
        raise JarmError("Swaps and bounds are known for log det only: choose criterion 'd' or 'd-unweighted'.")
    for part, values in (("features", features), ("rewards", rewards)):
        refuse_large(part, values)
    return Request(
        features=features,
        rewards=rewards,
        prompts=codes,
        prompt_names=names,
        candidates=candidates,
        space_name=space if isinstance(space, str) else "listed",
        labelled=labelled,
        criterion=criterion,
        criterion_name=name,
        limits=limits,
        k=k,
        swaps=swaps,
        bound=bound,
        allow_fewer=allow_fewer,
    )


def _check_count(candidates: Candidates, k: int, *, allow_fewer: bool) -> None:
    """Refuse a space of too few pairs."""
    count, copies = candidates.count, candidates.copies
    if count >= (1 if allow_fewer else k):
        return
    if not count and copies:
        raise JarmError(
            f"No pair of the space would teach anything: {copies:,} are of responses with equal features, and no other "
            "is left; check the features for copies, or widen the space."
        )
    if copies:
        raise JarmError(
            f"Only {count:,} of {k:,} pairs teach anything: {copies:,} pairs of the space are of responses with equal "
            "features, and are not offered; ask for fewer, widen the space, or pass allow_fewer=True."
        )
    raise JarmError(
        f"The space holds {count:,} pairs that are not labelled or excluded, and k = {k:,} are asked "
        "for: ask for fewer, widen the space, or pass allow_fewer=True."
    )


def read_criterion(
    criterion: str | Criterion, targets: Any, features: np.ndarray, rewards: np.ndarray, prompts: np.ndarray | None
) -> Criterion:
    """A criterion by its name and targets, or the caller's own; "v" without targets is about rankings within prompts.

    Raises:
      JarmError: there is no such criterion, or targets are missing, superfluous or zero.
    """
    if not isinstance(criterion, str | Criterion):
        raise JarmError(
            f"A criterion is a name or a jarm.Criterion, not {type(criterion).__name__}: choose from "
            f"{', '.join(CRITERIA)}, or give the result of jarm.a_optimal or the like."
        )
    with_targets = isinstance(criterion, str) and choose("criterion", criterion, CRITERIA) in WITH_TARGETS
    if with_targets and targets is None:
        if criterion == "v" and prompts is not None:
            return sum_of_variances(_within_prompts(features, prompts))
        instead = ", or prompts= for the rankings within them" if criterion == "v" else ""
        raise JarmError(
            f"Criterion {criterion!r} is about targets: give targets=, [T, 2] pairs or [T, F] directions{instead}."
        )
    if targets is not None and not with_targets:
        raise JarmError(
            f"Only {' and '.join(WITH_TARGETS)} are about targets: leave targets out, or choose one of them."
        )
    if not isinstance(criterion, str):
        return criterion
    size, width = features.shape
    directions, margins = np.zeros((0, width)), np.zeros(0)
    if with_targets:
        array = as_array("targets", targets)
        if array.dtype.kind in "iu" and array.shape[1:] == (2,):
            pairs = index_pairs("targets", array, size)
            directions, margins = _differences(features, pairs), _margins(rewards, pairs)
        else:
            directions = finite("targets", array, ("T", width))
            margins = np.zeros(len(directions))
        if not np.square(directions).sum() > 0:
            raise JarmError("targets are empty or zero, so there is nothing to learn about them: give others.")
    return CRITERIA[criterion](width, directions, margins)


def _within_prompts(features: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Directions `[F, F]` whose outer products have the sum mean z z^T, z features less the mean of their prompt."""
    order = np.argsort(prompts, kind="stable")
    starts = np.flatnonzero(np.diff(prompts[order], prepend=-1))
    total, end = np.zeros((features.shape[1],) * 2), 0
    while end < len(order):  # whole prompts, _CHUNK responses or a little more at a time
        start, last = end, np.searchsorted(starts, end + _CHUNK)
        end = int(starts[last]) if last < len(starts) else len(order)
        rows = features[order[start:end]].astype(np.float64)
        of_prompt = np.unique(prompts[order[start:end]], return_inverse=True)[1]
        sums = np.add.reduceat(rows, np.flatnonzero(np.diff(of_prompt, prepend=-1)))
        rows -= (sums / np.bincount(of_prompt)[:, None])[of_prompt]
        total += rows.T @ rows
    if not total.trace() > 0:
        raise JarmError(
            "No prompt has two responses with different features, so there is no ranking within prompts to learn: give "
            "targets=, or another criterion."
        )
    return _root(total / len(order))


def _mean_directions(targets: np.ndarray) -> np.ndarray:
    """Directions `[G, F]`, few of them, whose outer products have the sum mean t t^T over targets `[T, F]`."""
    scaled = np.float64(targets) / np.sqrt(len(targets))
    if len(targets) > targets.shape[1]:
        return _root(scaled.T @ scaled)
    # Zeros are no directions: room for other numbers of targets.
    return padded(scaled.astype(np.float32), min(bucket(len(targets)), targets.shape[1]))


def _root(matrix: np.ndarray) -> np.ndarray:
    """Directions `[F, F]` in float32 whose outer products sum to a matrix."""
    variances, vectors = np.linalg.eigh(matrix)
    return np.asarray(np.sqrt(np.maximum(variances, 0))[:, None] * vectors.T, np.float32)


def _differences(features: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return features[pairs[:, 0]].astype(np.float64) - features[pairs[:, 1]].astype(np.float64)


def _margins(rewards: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
