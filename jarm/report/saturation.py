"""Is anything left to learn? The baseline's curve against the ceiling, and against its own end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jarm.report.answer import MIN_SEEDS
from jarm.report.curves import METRIC, curves, valued
from jarm.report.statistics import Interval, interval, number, simultaneous_ci

CLOSE = 0.01
"""Difference in mean Spearman, or accuracy, that counts as none."""


class Saturation(NamedTuple):
    """From which label counts on a mean curve has nothing to gain.

    Attributes:
      reached: the first label count from which on it is less than `CLOSE` below the height; None if never.
      flat: the first label count, of those up to half of the last, from which on it rises by less than `CLOSE`; None if
        there is none.
      below: the height less its last value; None without a height.
    """

    reached: float | None
    flat: float | None
    below: Interval | None


def saturation(labels: np.ndarray, values: np.ndarray, height: float | None, comparisons: int = 1) -> Saturation:
    """From where on a mean curve stays near a height, and from where on it is flat.

    Less than `CLOSE` is shown, not assumed: the upper end of a 95 % interval over seeds is less. Label counts are
    tested from the last back to the first that fails, so testing many takes no correction; nor does a curve that has to
    be flat up to every later count.

    Args:
      labels: `[T]`, rising.
      values: `[S, T]` curves, one per seed.
      height: in units of the curves, or None.
      comparisons: number of curves of which this is asked; intervals of all hold at once.

    Example:
      Five seeds that gain nothing after 100 labels.

      >>> values = np.array([0.3, 0.6, 0.6, 0.6]) + np.array([[-0.002], [-0.001], [0.0], [0.001], [0.002]])
      >>> found = saturation(np.array([50, 100, 150, 200]), values, 0.605)
      >>> found.reached, found.flat
      (100.0, 100.0)
    """

    def small(differences: np.ndarray) -> bool:
        return simultaneous_ci(differences, comparisons).high < CLOSE

    def first(holds: list[bool]) -> float | None:
        start = max((at + 1 for at, each in enumerate(holds) if not each), default=0)
        return float(labels[start]) if start < len(holds) else None

    T = len(labels)
    early = [t for t in range(T) if 2 * labels[t] <= labels[-1]]
    flat = first([all(small(values[:, later] - values[:, t]) for later in range(t + 1, T)) for t in early])
    if height is None:
        return Saturation(None, flat, None)
    reached = first([small(height - values[:, t]) for t in range(T)])
    return Saturation(reached, flat, simultaneous_ci(height - values[:, -1], comparisons))


def left_to_learn(
    runs: Mapping[int, list[dict[str, Any]]],
    references: Mapping[str, dict[str, Any]],
    baseline: str = "random",
    comparisons: int = 1,
    metric: str = METRIC,
) -> dict[str, Any] | None:
    """Whether the baseline's labels have anything left to teach: `saturation`, with its `sentence`.

    The height is the larger of ceiling and first component. "Nothing is left" takes a curve that is at this height and
    flat while labels at least double, since a head that is not linear may rise above a ceiling of linear ones.

    Args:
      runs: seed -> records of the baseline, as `jarm.report.curves.runs_of` returns them.
      references: name -> metrics of the reference lines; those of folders of earlier versions lack the ceiling.
      baseline: name of the rule.
      comparisons: number of settings of which this is asked.
      metric: of the curves.

    Returns:
      `after`, the label count after which nothing is left, or None; the numbers of `saturation`; and the `sentence`,
      None where nothing is shown. None for less than 5 seeds.
    """
    if len(runs) < MIN_SEEDS:
        return None
    lines = {name: valued(references.get(name, {}), metric) for name in ("ceiling", "first component")}
    known = {name: value for name, value in lines.items() if not math.isnan(value)}
    labels, height = curves(runs, "labels", list(runs)).mean(0), max(known.values(), default=None)
    found = saturation(labels, curves(runs, metric, list(runs)), height, comparisons)
    above = found.below is not None and found.below.mean < 0
    at = f"{', or above,' * above} {_words(known)}" if height is not None else ""
    sure, close = f"(95 % intervals over {len(runs)} seeds)", number(CLOSE, 2)
    sentence, after = None, None
    if found.reached is not None and found.flat is not None and 2 * found.reached <= labels[-1]:
        after = max(found.reached, found.flat)
        sentence = (
            f"Nothing is left to learn after {after:.0f} labels: from there on {baseline} is less than {close} "
            f"below{at}, and rises by less than {close} up to {labels[-1]:.0f} labels {sure}."
        )
    elif found.reached is not None:
        sentence = f"From {found.reached:.0f} labels on {baseline} is less than {close} below{at} {sure}."
    elif found.flat is not None:
        ends = ""
        if found.below is not None:
            mean, low, high, _ = found.below
            ends = f", and ends {number(mean)} {interval(low, high)} below{at}"
        sentence = (
            f"Labels after the first {found.flat:.0f} hardly teach: from there to {labels[-1]:.0f} labels {baseline} "
            f"rises by less than {close} {sure}{ends}."
        )
    return {"after": after, **found._asdict(), "sentence": sentence}


def left_in_sweep(found: Sequence[Mapping[str, Any] | None]) -> str | None:
    """In how many settings of a sweep nothing is left to learn; None for none.

    Args:
      found: of each setting, as `left_to_learn` returns it.
    """
    after = [each["after"] for each in found if each and each["after"] is not None]
    if not after:
        return None
    return (
        f"Nothing is left to learn in {len(after):,} of {len(found):,} setting{'s' * (len(found) != 1)}, after "
        f"{min(after):.0f}{f' to {max(after):.0f}' * (max(after) > min(after))} labels."
    )


def _words(known: Mapping[str, float]) -> str:
    """The height in words."""
    ceiling, one_bit = (known.get(name, -math.inf) for name in ("ceiling", "first component"))
    line = f"the first component with its sign, one bit of gold ({number(one_bit)})"
    if one_bit > ceiling:
        return f"{line}, which is above the ceiling of a linear head ({number(ceiling)})"
    also = f", where {line} is, too" if one_bit >= ceiling - CLOSE else ""
    return f"the ceiling of a linear head ({number(ceiling)}){also}"
