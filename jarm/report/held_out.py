"""How well margins of a reward model predict the labels of held-out pairs, with intervals over prompts."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

from jarm.core.types import Float, Int
from jarm.report.clusters import clustered_mean

GRID = np.geomspace(1e-2, 1e2, 401)
"""Temperatures that are tried."""
BINS = 10


def _nll(margins: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`[M]` loss of each pair, in nats, against its label in [0, 1]."""
    return np.logaddexp(0, margins) - labels * margins


def _best_temperature(margins: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of least loss against labels a little short of sure, or else few pairs that are all right want 0.

    Source: Platt, "Probabilistic outputs for support vector machines", 1999.
    """
    labels = (len(labels) * labels + 0.5) / (len(labels) + 1)
    losses = [_nll(margins / each, labels).mean() for each in GRID]
    return float(GRID[int(np.argmin(losses))])


def calibrate(
    margins: Float[np.ndarray, "M"], labels: Float[np.ndarray, "M"], prompts: Int[np.ndarray, "M"]
) -> tuple[float, Float[np.ndarray, "M"]]:
    """The temperature of least loss on held-out pairs, and margins that may be judged by the same pairs.

    The prompts are dealt into two halves, and each half's margins are divided by the temperature of the other, so that
    no pair takes part in scaling itself.

    Args:
      margins: differences of rewards, in logits.
      labels: probability that the first is preferred.
      prompts: number of each pair's prompt.

    Returns:
      The temperature of all pairs, 1 where there are fewer than two prompts; and the scaled margins.

    Example:
      >>> margins = np.tile([8.0, 8.0, 8.0, -8.0], 50)  # right in three of four, and much too sure
      >>> temperature, scaled = calibrate(margins, np.ones(200), np.arange(200))
      >>> round(8 / temperature, 1)  # log odds of 3 to 1
      1.1
    """
    distinct = np.unique(prompts)
    if len(distinct) < 2:
        return 1.0, margins
    half = np.isin(prompts, np.random.default_rng(0).permutation(distinct)[::2])
    scaled = np.empty_like(margins)
    for side in (half, ~half):
        scaled[side] = margins[side] / _best_temperature(margins[~side], labels[~side])
    return _best_temperature(margins, labels), scaled


def right_of(margins: Float[np.ndarray, "H M"], labels: Float[np.ndarray, "M"]) -> Float[np.ndarray, "H M"]:
    """Share of the votes of each pair that are for the response of larger reward; 1/2 for a margin of 0.

    Args:
      margins: `[H, M]` differences of rewards of H models, in logits.
      labels: `[M]` probability, or share of votes, that the first is preferred.

    Example:
      >>> right_of(np.array([[1.0, -1.0, 0.0]]), np.array([0.75, 0.75, 0.75])).tolist()
      [[0.75, 0.25, 0.5]]
    """
    return np.where(margins > 0, labels, np.where(margins < 0, 1 - labels, 0.5))


def pair_metrics(
    margins: Float[np.ndarray, "H M"], labels: Float[np.ndarray, "M"]
) -> dict[str, Float[np.ndarray, "H"]]:
    """Accuracy and loss of several models on pairs whose labels may be shares of votes.

    Args:
      margins, labels: as of `right_of`.

    Returns:
      `pair_accuracy`: the mean of `right_of` over pairs whose label is not 1/2, NaN where there are none; and `nll`, in
      nats.

    Example:
      >>> found = pair_metrics(np.array([[1.0, -1.0, 2.0]]), np.array([0.75, 0.0, 0.5]))
      >>> found["pair_accuracy"].tolist()  # .75 and 1; the third has no majority
      [0.875]
    """
    decided = labels != 0.5
    right = right_of(margins, labels)[:, decided]
    accuracy = right.mean(axis=1) if decided.any() else np.full(len(margins), np.nan)
    return {"pair_accuracy": accuracy, "nll": _nll(margins, labels).mean(axis=1)}


def by_prompt(
    right: Float[np.ndarray, "H M"], labels: Float[np.ndarray, "M"], prompts: Int[np.ndarray, "M"]
) -> tuple[Float[np.ndarray, "H P"], Int[np.ndarray, "P"]]:
    """The mean of `right_of` on each prompt, over its pairs whose label is not 1/2, and the number of these pairs.

    Example:
      >>> shares, counts = by_prompt(np.array([[1.0, 0.0, 1.0]]), np.array([1.0, 1.0, 0.0]), np.array([3, 3, 5]))
      >>> shares.tolist(), counts.tolist()
      ([[0.5, 1.0]], [2, 1])
    """
    decided = labels != 0.5
    _, of = np.unique(prompts[decided], return_inverse=True)
    counts = np.bincount(of)
    totals = np.stack([np.bincount(of, each, minlength=len(counts)) for each in right[:, decided]])
    return totals / np.maximum(counts, 1), counts


def pack(shares: Float[np.ndarray, "P"]) -> str:
    """Shares in [0, 1] as a short text, with three digits.

    Example:
      >>> unpack(pack(np.array([0.5, 0.25, 1.0]))).tolist()
      [0.5, 0.25, 1.0]
    """
    return base64.b64encode(shares.astype("<f2").tobytes()).decode()


def unpack(text: str) -> Float[np.ndarray, "P"]:
    """The shares that `pack` made a text of."""
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float64)


def held_out(
    margins: Float[np.ndarray, "M"], labels: Float[np.ndarray, "M"], prompts: Int[np.ndarray, "M"]
) -> dict[str, Any]:
    """Accuracy, loss and calibration on held-out pairs.

    Accuracy is the share of votes for the response of larger reward (`right_of`), over pairs whose label is not 1/2:
    a vote counts the same in a row of its own as in a row of many.

    Args:
      margins, labels, prompts: as of `calibrate`.

    Returns:
      `accuracy`: its mean and the ends `low` and `high` of its 95 % interval, whose standard error takes prompts as
      clusters; `majority`, the accuracy of always siding with the majority: none is higher, and it is 1 where all votes
      of a pair agree; `nll`, in nats; and `calibration_error`, the mean distance of probabilities from labels in ten
      bins.

    Example:
      >>> found = held_out(np.array([1.0, -1.0, 2.0]), np.array([1.0, 0.25, 0.25]), np.arange(3))
      >>> round(found["accuracy"]["mean"], 3), round(found["majority"], 3)  # 1, .75 and .25; at most 1, .75 and .75
      (0.667, 0.833)
    """
    decided = labels != 0.5
    right = right_of(margins[None], labels)[0, decided]
    accuracy = clustered_mean(right, prompts[decided], bounds=(0.0, 1.0))
    majority = float(np.maximum(labels, 1 - labels)[decided].mean()) if decided.any() else math.nan
    chance = 1 / (1 + np.exp(-np.clip(margins, -500, 500)))
    # Of each pair both ways round, so that which response comes first does not matter.
    chance, target = np.concatenate([chance, 1 - chance]), np.concatenate([labels, 1 - labels])
    bins = np.minimum((chance * BINS).astype(int), BINS - 1)
    gap = np.abs(np.bincount(bins, chance - target, minlength=BINS)).sum() / len(chance)
    nll = float(_nll(margins, labels).mean())
    return {"accuracy": accuracy, "majority": majority, "nll": nll, "calibration_error": float(gap)}
