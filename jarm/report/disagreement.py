"""How two scores of the same responses differ: distance, order of pairs within prompts, and the widest differences."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from jarm.core.types import Float, Int
from jarm.report.clusters import centred, clustered_mean


class Distance(NamedTuple):
    """The distance of two rewards, and what it is made of.

    Attributes:
      distance: in [0, 1]: 0 where one is a positive multiple of the other within every prompt, 1 a negative one;
        NaN where both are the same for all responses to a prompt.
      correlation: cosine of the two canonical rewards, in [-1, 1]; NaN where one is the same within every prompt.
      a, b: `[n]` rewards centred within prompts and divided by their root mean square; 0 where that is 0.
    """

    distance: float
    correlation: float
    a: np.ndarray
    b: np.ndarray


def reward_distance(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"], prompts: Int[np.ndarray, "n"]) -> Distance:
    """The distance of two rewards that neither an offset of each prompt nor a positive factor changes.

        c(r)_i = r_i - mean of r over the responses to the prompt of i
        s(r) = c(r) / |c(r)|_2, or 0 where c(r) = 0
        distance = |s(a) - s(b)|_2 / 2 = sqrt((1 - cosine) / 2) where neither is 0

    In a bandit, where a response ends the episode, an offset of a prompt is what potential shaping can add, and no
    policy that is optimal for its reward changes; centring takes it away. The largest distance is 1; it is 1/2 from
    a reward that is the same within every prompt.

    Args:
      a, b: rewards of the same responses.
      prompts: number of each response's prompt, from 0.

    Example:
      >>> a, prompts = np.array([1.0, 2.0, 5.0, 9.0]), np.array([0, 0, 1, 1])
      >>> print(f"{reward_distance(a, 3 * a + np.array([7.0, 7.0, -2.0, -2.0]), prompts).distance:.3f}")
      0.000
      >>> print(f"{reward_distance(a, -a, prompts).distance:.3f}")
      1.000

    Source: Skalse et al., "STARC: A General Framework For Quantifying Differences Between Reward Functions", 2023
    (canonicalise, normalise, take the distance); the half as in the Pearson distance of Gleave et al., "Quantifying
    Differences in Reward Functions", 2020.
    """
    units = []
    for rewards in (a, b):
        middle = centred(np.asarray(rewards, np.float64), prompts)
        norm = float(np.linalg.norm(middle))
        # Rounding leaves something of rewards that are all the same.
        units.append(middle / norm if norm > 1e-12 * float(np.linalg.norm(rewards)) else np.zeros(len(middle)))
    known = bool(units[0].any() and units[1].any())
    size = math.sqrt(len(prompts))
    return Distance(
        float(np.linalg.norm(units[0] - units[1]) / 2) if units[0].any() or units[1].any() else math.nan,
        float(np.clip(units[0] @ units[1], -1, 1)) if known else math.nan,
        units[0] * size,
        units[1] * size,
    )


def agreement(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"], prompts: Int[np.ndarray, "n"]) -> dict[str, Any]:
    """The share of pairs within prompts that two rewards order alike.

    Pairs that either of them ties are left out, and counted.

    Args:
      a, b, prompts: as of `reward_distance`.

    Returns:
      `agreement` with `mean` and the ends `low` and `high` of an interval with prompts as clusters, NaN where no pair
      is left; `pairs`, all within prompts; and `tied`: pairs tied by `a` alone, by `b` alone and by `both`.

    Example:
      >>> found = agreement(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 3.0]), np.zeros(3, np.int64))
      >>> found["agreement"]["mean"], found["pairs"], found["tied"]
      (1.0, 3, {'a': 0, 'b': 1, 'both': 0})
    """
    size = int(prompts.max(initial=-1)) + 1
    alike, compared, ties = np.zeros(size), np.zeros(size), np.zeros(3, np.int64)
    count, order = np.bincount(prompts, minlength=size), np.argsort(prompts, kind="stable")
    for step in range(1, int(count.max(initial=0))):
        order = order[count[prompts[order]] > step]  # prompts with a pair that far apart
        first, second = order[:-step], order[step:]
        own = prompts[first] == prompts[second]
        first, second = first[own], second[own]
        by_a, by_b = np.sign(a[first] - a[second]), np.sign(b[first] - b[second])
        ordered = (by_a != 0) & (by_b != 0)
        alike += np.bincount(prompts[first], ordered & (by_a == by_b), size)
        compared += np.bincount(prompts[first], ordered, size)
        tied = [(by_a == 0) & (by_b != 0), (by_a != 0) & (by_b == 0), (by_a == 0) & (by_b == 0)]
        ties += [int(each.sum()) for each in tied]
    some = np.flatnonzero(compared)
    mean = clustered_mean(alike[some] / compared[some], some, counts=compared[some], bounds=(0.0, 1.0))
    tied_by = dict(zip(("a", "b", "both"), ties.tolist(), strict=True))
    return {"agreement": mean, "pairs": int((count * (count - 1) // 2).sum()), "tied": tied_by}


def widest(
    a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"], prompts: Int[np.ndarray, "n"], most: int
) -> tuple[Int[np.ndarray, "k 2"], Float[np.ndarray, "k"]]:
    """Of each prompt the pair whose difference the two rewards see most differently, and the widest of these.

    Of u = a - b the pair of the largest and the smallest value has the largest `|(a_i - a_j) - (b_i - b_j)|`.

    Args:
      a, b: rewards in one unit, such as those of `reward_distance`.
      prompts: as there.
      most: largest number of pairs, each of another prompt.

    Returns:
      Pairs, the widest first, whose first response is the one that `a` rates higher than `b` does; and the widths,
      `(a_i - a_j) - (b_i - b_j)`, above 0.

    Example:
      >>> widest(np.array([2.0, 0.0, 1.0]), np.array([0.0, 2.0, 1.0]), np.array([0, 0, 1]), 5)
      (array([[0, 1]]), array([4.]))
    """
    apart = a - b
    order = np.lexsort((apart, prompts))
    ends = np.flatnonzero(np.diff(prompts[order], append=-1))
    starts = np.r_[0, ends[:-1] + 1].astype(np.int64)
    pairs = np.stack([order[ends], order[starts]], axis=1)
    width = apart[pairs[:, 0]] - apart[pairs[:, 1]]
    best = np.argsort(-width, kind="stable")[:most]
    best = best[width[best] > 0]
    return pairs[best], width[best]
