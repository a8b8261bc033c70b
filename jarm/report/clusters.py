"""Means whose intervals take prompts as clusters, and ranks within prompts; all in float64."""

from __future__ import annotations

import math

import numpy as np

from jarm.core.types import Float, Int
from jarm.report.statistics import t_quantile

LEVEL = 0.95
"""Coverage of the intervals."""


def clustered_mean(
    values: Float[np.ndarray, "n"],
    clusters: Int[np.ndarray, "n"],
    *,
    counts: np.ndarray | None = None,
    strata: np.ndarray | None = None,
    shares: np.ndarray | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, float]:
    """A mean, or a weighted sum of the means of strata, with an interval whose standard error takes clusters as units.

        mean = sum_s share_s mean_s,    mean_s = sum_{i in s} count_i value_i / sum_{i in s} count_i
        error^2 = C / (C - S) sum_c (sum_{i in c} share_s count_i (value_i - mean_s) / sum_{j in s} count_j)^2

    for C clusters and S strata; the interval reaches Student's quantile of C - S degrees times the error.

    Args:
      values: one number per unit.
      clusters: number of each unit's cluster, such as its prompt; a cluster may have units in several strata.
      counts: `[n]`, how much each unit counts in its stratum; by default all alike.
      strata: `[n]` int, stratum of each unit, from 0; by default there is one.
      shares: `[S]`, weight of each stratum's mean; by default those of `counts`.
      bounds: smallest and largest value that the mean can have, at which the interval ends.

    Returns:
      `mean`, `low` and `high`; the ends are NaN where a stratum has fewer than two clusters, and all where it is empty.

    Example:
      >>> found = clustered_mean(np.array([1.0, 0.0, 1.0, 1.0]), np.array([0, 0, 1, 2]), bounds=(0.0, 1.0))
      >>> {name: round(value, 3) for name, value in found.items()}
      {'mean': 0.75, 'low': 0.0, 'high': 1.0}

    Source: Cameron and Miller, "A Practitioner's Guide to Cluster-Robust Inference", 2015, for one stratum.
    """
    count = np.ones(len(values)) if counts is None else np.asarray(counts, np.float64)
    stratum = np.zeros(len(values), np.int64) if strata is None else strata
    size = max(int(stratum.max(initial=0)) + 1, 0 if shares is None else len(shares))
    total = np.bincount(stratum, count, minlength=size)
    if not total.size or not (total > 0).all():
        return dict.fromkeys(("mean", "low", "high"), math.nan)
    share = total / total.sum() if shares is None else np.asarray(shares, np.float64)
    means = np.bincount(stratum, count * values, minlength=size) / total
    mean = float(share @ means)
    names, of = np.unique(clusters, return_inverse=True)
    pairs = np.unique(stratum * len(names) + of)
    if (np.bincount(pairs // len(names), minlength=size) < 2).any() or len(names) <= size:
        return {"mean": mean, "low": math.nan, "high": math.nan}
    residual = np.bincount(of, (share / total)[stratum] * count * (values - means[stratum]))
    error = math.sqrt((residual**2).sum() * len(names) / (len(names) - size))
    reach = t_quantile((1 + LEVEL) / 2, len(names) - size) * error
    return {"mean": mean, "low": float(max(bounds[0], mean - reach)), "high": float(min(bounds[1], mean + reach))}


def average_ranks(values: Float[np.ndarray, "n"], prompts: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Rank of each value among those of its prompt, 1 the smallest; equal values share the mean of their ranks.

    Example:
      >>> average_ranks(np.array([5.0, 2.0, 5.0, 7.0]), np.array([0, 0, 0, 1]))
      array([2.5, 1. , 2.5, 1. ])
    """
    order = np.lexsort((values, prompts))
    prompt, value = prompts[order], values[order]
    first = np.r_[True, (prompt[1:] != prompt[:-1]) | (value[1:] != value[:-1])][: len(order)]
    start, group = np.flatnonzero(first), np.cumsum(first) - 1
    size = np.diff(np.r_[start, len(order)])
    ranks = np.empty(len(order))
    ranks[order] = start[group] - np.searchsorted(prompt, prompt) + (size[group] + 1) / 2
    return ranks


def centred(values: Float[np.ndarray, "n"], prompts: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Values less the mean value of their prompt; prompts are numbered from 0.

    Example:
      >>> centred(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 1]))
      array([-1.,  1.,  0.])
    """
    count = np.maximum(np.bincount(prompts), 1)
    return values - (np.bincount(prompts, values) / count)[prompts]


def spearman_within(
    a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"], prompts: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "P"]:
    """Spearman's rank correlation of two scores within each prompt, with average ranks.

    As `jarm.evaluation.ranking.spearman`, but of prompts of any sizes at once, and in float64.

    Args:
      a, b: two scores per response.
      prompts: number of each response's prompt, from 0.

    Returns:
      One correlation per prompt; NaN for fewer than two responses, or where one of the scores is the same for all.

    Example:
      >>> spearman_within(np.array([1.0, 2.0, 3.0, 0.0]), np.array([1.0, 3.0, 2.0, 0.0]), np.array([0, 0, 0, 1]))
      array([0.5, nan])
    """
    a, b = (centred(average_ranks(scores, prompts), prompts) for scores in (a, b))
    spread = np.sqrt(np.bincount(prompts, a * a) * np.bincount(prompts, b * b))
    shared = np.bincount(prompts, a * b)
    return np.where(spread > 0, np.clip(shared / np.where(spread > 0, spread, 1), -1, 1), math.nan)
