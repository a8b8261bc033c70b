"""From simulated campaigns to a forecast: labels saved against random pairs, with intervals, and a sentence."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jarm.report.figures import drawing, files_of
from jarm.report.markdown import table
from jarm.report.statistics import (
    Interval,
    LabelSaving,
    area_under_curve,
    ends,
    interval,
    label_saving,
    number,
    resampled_shares,
    times,
)

ENOUGH_RATIO, ENOUGH_GAIN = 1.1, 0.01
"""Random pairs are enough where the labels saved are less than this ratio, or the gain in mean Spearman is below this,
and choosing pays where both are above it, in each case with the whole interval; else it is not known."""
CAVEAT = (
    "In 24 settings of two real tables forecasts were too hopeful (docs/forecast.md): hold this against `jarm compare` "
    "where you have gold rewards."
)
"""What is known of forecasts."""
FEW = 5
"""Campaigns below which intervals of a bootstrap are too narrow (see `jarm.report.statistics.tail`)."""
DRAWS = 1000
"""Resamples of an interval, of which a forecast has a hundred."""


class Saved(NamedTuple):
    """What a way of choosing saves against random pairs, over simulated campaigns or real ones.

    Attributes:
      saving: labels after which the mean curves first reach the baseline's final value, as of a comparison.
      gain: mean height of the curve less the baseline's over label counts.
      ahead: share of the campaigns in which this difference is positive.
    """

    saving: LabelSaving
    gain: Interval
    ahead: float

    @property
    def verdict(self) -> str:
        """`choose` where it pays, `random` where random pairs are enough, else `not known`: see `ENOUGH_RATIO`.

        Of fewer than `FEW` campaigns, by effective number, nothing is known: their intervals are too narrow.
        """
        ratio, gain = self.saving.ratio, self.gain
        if gain.seeds < FEW:
            return "not known"
        if ratio.low > ENOUGH_RATIO and gain.low >= ENOUGH_GAIN:
            return "choose"
        return "random" if ratio.high <= ENOUGH_RATIO or gain.high < ENOUGH_GAIN else "not known"


def labels_saved(
    labels: np.ndarray, curves: np.ndarray, baseline: np.ndarray, weights: np.ndarray | None = None, seed: int = 0
) -> Saved:
    """Labels saved for the baseline's final value, and the gain in mean height, from campaigns of some weights.

    Intervals are those of `jarm.report.statistics.label_saving`, by the effective number of campaigns; NaN for one.

    Args:
      labels: `[T]` label counts.
      curves, baseline: `[S, T]`, campaign by campaign with the same gold rewards, first labels and annotator.
      weights: `[S]` weights of the campaigns, by default equal; those of weight 0 do not count.
      seed: of the resampling.

    Example:
      >>> labels, random = np.array([50, 100, 150]), np.array([[0.2, 0.3, 0.4], [0.3, 0.4, 0.5]] * 3)
      >>> saved = labels_saved(labels, random + 0.1, random)
      >>> saved.saving.labels, saved.saving.baseline_labels, saved.saving.ratio.mean, saved.verdict
      (100.0, 150.0, 1.5, 'choose')
    """
    weights = np.ones(len(curves)) if weights is None else np.asarray(weights, np.float64)
    curves, baseline, weights = curves[weights > 0], baseline[weights > 0], weights[weights > 0]
    saving = label_saving(labels, curves, labels, baseline, weights, draws=DRAWS, seed=seed)
    gains, effective = area_under_curve(labels, curves) - area_under_curve(labels, baseline), saving.ratio.seeds
    shares, drawn = weights / weights.sum(), resampled_shares(weights, DRAWS, seed)
    gain = Interval(float(shares @ gains), *ends(drawn @ gains, effective), effective)
    return Saved(saving, gain, float(shares @ (gains > 0)))


def quantiles(values: np.ndarray, weights: np.ndarray, shares: Sequence[float]) -> list[float]:
    """Weighted quantiles: the smallest value at which the weights up to it are so large a share.

    Example:
      >>> quantiles(np.array([3.0, 1.0, 2.0]), np.array([1, 1, 2]), [0.1, 0.5, 0.9])
      [1.0, 2.0, 3.0]
    """
    order = np.argsort(values)
    upto = np.cumsum(weights[order]) / np.sum(weights)
    places = np.minimum(np.searchsorted(upto, np.asarray(shares)), len(values) - 1)
    return [float(value) for value in values[order][places]]


def arm_in_words(arm: str) -> str:
    """`v_opt+random` as `v_opt, then random`.

    Example:
      >>> arm_in_words("v_opt+random"), arm_in_words("v_opt+v_opt")
      ('v_opt first, then random', 'v_opt throughout')
    """
    first, _, rule = arm.partition("+")
    return f"{first} throughout" if first == rule else f"{first} first, then {rule}"


def forecast_in_words(
    arms: Mapping[str, Saved], ranges: Mapping[str, Sequence[float]], weighed: bool, campaigns: int
) -> str:
    """The answer of a forecast in two or three sentences.

    Args:
      arms: arm -> what it saves, expected over the teachers.
      ranges: arm -> low and high end of the ratio over shapes and noises of teachers, of 80 % of their weight.
      weighed: whether labels weigh the teachers.
      campaigns: number of simulated campaigns.

    Returns:
      The answer, which ends with how far forecasts were right where that is known.
    """
    return f"{_expected(arms, ranges, weighed, campaigns)} {CAVEAT}"


def _expected(arms: Mapping[str, Saved], ranges: Mapping[str, Sequence[float]], weighed: bool, campaigns: int) -> str:
    best = max(arms, key=lambda arm: arms[arm].gain.mean)
    useful = [arm for arm in arms if arms[arm].verdict == "choose"]
    if useful:
        best = max(useful, key=lambda arm: arms[arm].gain.mean)
    saved, saving = arms[best], arms[best].saving
    gain = f"{saved.gain.mean:+.3f}".replace("0.", ".", 1)
    ends = interval(saving.ratio.low, saving.ratio.high, lambda x: f"{x:.1f}")
    ratio = f"{times(saving.ratio.mean, saving.bound)} fewer labels than random pairs {ends}"
    needs = f"needs {ratio}"
    if math.isinf(saving.labels):
        needs = f"does not reach within {saving.limit:.0f} labels what {saving.baseline_labels:.0f} random pairs teach"
    if not useful and any(each.verdict == "not known" for each in arms.values()):
        return (
            f"Not known from {campaigns:,} campaigns: {arm_in_words(best)} is expected to gain most, {gain} in mean "
            f"Spearman {interval(saved.gain.low, saved.gain.high)}, and {needs}; simulate more (`--campaigns`)."
        )
    if not useful:
        return (
            f"Random pairs are enough on embeddings like these: of the other ways, {arm_in_words(best)} is expected "
            f"to gain most, {gain} in mean Spearman, and {needs}"
            + (f" for what {saving.baseline_labels:.0f} of them teach." if math.isfinite(saving.labels) else ".")
        )
    likely = "weighed by the labels" if weighed else "all as likely"
    text = (
        f"Expect {arm_in_words(best)}: it needs {ratio}, {saving.labels:.0f} for what {saving.baseline_labels:.0f} "
        f"teach; mean Spearman {gain}, ahead in {saved.ahead:.0%} of the simulated campaigns. Over shapes and "
        f"noises of teachers, {likely}, the ratio is {ranges[best][0]:.1f} to {ranges[best][1]:.1f} (80 %)."
    )
    first, _, rule = best.partition("+")
    alone = arms.get(f"{first}+random")
    if first != "random" and rule != "random" and alone is not None and saved.gain.mean > 0:
        text += f" The first batch alone gains {max(alone.gain.mean, 0) / saved.gain.mean:.0%} of that."
    return text


def forecast_text(summary: dict[str, Any]) -> str:
    """`forecast.md`: the answer, and its tables, of a summary as in `forecast.json`."""
    lines = ["# Forecast", "", summary["answer"], ""]
    lines += [
        f"{summary['campaigns']:,} simulated campaigns on {summary['draws']:,} draws of gold rewards from "
        f"{summary['teachers']:,} teachers"
        + (f", weighed by {summary['labels_given']:,} labels." if summary["labels_given"] else ", weighed equally.")
        + (f" {summary['failed']:,} draws failed." if summary["failed"] else ""),
        "",
        f"Choosing pays where the ratio is above {ENOUGH_RATIO} and the gain {number(ENOUGH_GAIN, 2)} or more, and "
        "random pairs are enough where one of the two is not, in each case with the whole interval. Ratios: labels "
        "that random pairs need over labels that choosing needs for what random pairs teach with all labels. Intervals "
        "of 95 %: over draws, of the expectation; `shapes, noises`: 80 % of the weight of the cells of the last table.",
        "",
        *_arms_table(summary),
        "",
        "Ratio by budget (labels), with the gain in mean Spearman over labels up to it:",
        "",
        *_budgets_table(summary),
        "",
        "Ratio by teacher, of " + arm_in_words(summary["best"]) + ": complexity down (effective dimension), the "
        "annotator's beta across; `random` where random pairs are enough, ? where it is not known; weight of the "
        "teachers in brackets.",
        "",
        *_cells_table(summary),
    ]
    return "\n".join(lines) + "\n"


def _arms_table(summary: dict[str, Any]) -> list[str]:
    head = ["choose", "times fewer labels", "shapes, noises", "gain in mean Spearman", "ahead", "verdict"]
    rows = []
    for arm, row in summary["arms"].items():
        rows.append(
            [
                arm_in_words(arm),
                f"{_bounded(row)} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
                f"{row['range'][0]:.1f} to {row['range'][1]:.1f}",
                f"{number(row['gain'])} {interval(row['gain_low'], row['gain_high'])}",
                f"{row['ahead']:.0%}",
                row["verdict"],
            ]
        )
    return table(head, rows)


def _bounded(row: Mapping[str, Any]) -> str:
    """A ratio with two digits, `or more` or `or less` behind one that is a bound."""
    return f"{row['ratio']:.2f} {row['bound']}".strip()


def _budgets_table(summary: dict[str, Any]) -> list[str]:
    arms = summary["arms"]
    by_budget = zip(*(arm["budgets"] for arm in arms.values()), strict=True)
    rows = [
        [str(some[0]["budget"]), *(f"{_bounded(row)}, {number(row['gain'])}" for row in some)] for some in by_budget
    ]
    return table(["labels", *map(arm_in_words, arms)], rows)


def _cells_table(summary: dict[str, Any]) -> list[str]:
    cells, best = summary["cells"], summary["best"]
    noises = sorted({cell["noise"] for cell in cells})
    rows = []
    for shape in dict.fromkeys(cell["shape"] for cell in cells):
        own = {cell["noise"]: cell for cell in cells if cell["shape"] == shape}
        texts = [
            f"{_cell(cell['arms'][best])} ({cell['weight']:.1%})" if (cell := own.get(noise)) else "-"
            for noise in noises
        ]
        rows.append([f"{shape} ({next(iter(own.values()))['dimension']:.0f})", *texts])
    return table(["teacher", *(f"beta {noise:g}" for noise in noises)], rows)


def _cell(row: Mapping[str, Any]) -> str:
    if row["verdict"] == "random":
        return "random"
    return f"{row['ratio']:.2f}{'?' * (row['verdict'] == 'not known')}"


def forecast_figure(summary: dict[str, Any], path_stem: pathlib.Path) -> list[pathlib.Path]:
    """Draw labels saved over complexity and noise, a panel for each arm; circles mark where labels put the user's data.

    Args:
      summary: as in `forecast.json`.
      path_stem: where to write, without suffix.

    Raises:
      JarmError: matplotlib is not installed.
    """
    cells, arms = summary["cells"], list(summary["arms"])
    shapes = sorted({(cell["dimension"], cell["shape"]) for cell in cells})
    noises = sorted({cell["noise"] for cell in cells})
    grids = np.full((len(arms), len(noises), len(shapes)), np.nan)
    weights = np.zeros(grids.shape[1:])
    for cell in cells:
        at = noises.index(cell["noise"]), shapes.index((cell["dimension"], cell["shape"]))
        weights[at] = cell["weight"]
        grids[(slice(None), *at)] = [cell["arms"][arm]["ratio"] for arm in arms]
    size = max(1.5, float(np.nanmax(grids)), 1 / float(np.nanmin(grids)))
    with drawing(path_stem, (3.4 * len(arms) + 1.2, 3.6)) as figure:
        panels = np.atleast_1d(figure.subplots(1, len(arms), sharey=True))
        for axes, arm, grid in zip(panels, arms, grids, strict=True):
            image = axes.imshow(
                np.log(grid), cmap="PuOr_r", vmin=-math.log(size), vmax=math.log(size), origin="lower", aspect="auto"
            )
            for (row, column), ratio in np.ndenumerate(grid):
                if not math.isnan(ratio):
                    axes.text(column, row + 0.27, f"{ratio:.1f}", ha="center", va="center", fontsize=8)
            if summary["labels_given"]:
                rows, columns = np.indices(weights.shape)
                axes.scatter(
                    columns.ravel(), rows.ravel(), s=2000 * weights.ravel(), facecolors="none", edgecolors="#000000"
                )
            axes.set_xticks(
                range(len(shapes)), [f"{shape}\n{dimension:.0f}" for dimension, shape in shapes], fontsize=7
            )
            axes.set_yticks(range(len(noises)), [f"{noise:g}" for noise in noises])
            axes.set_xlabel("teacher, effective dimension")
            axes.set_title(arm_in_words(arm), loc="left", fontsize=10)
        panels[0].set_ylabel("beta of the annotator")
        bar = figure.colorbar(image, ax=panels, label="times fewer labels than random")
        ticks = [tick for tick in (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 9) if 1 / size <= tick <= size]
        bar.set_ticks([math.log(tick) for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    return files_of(path_stem)
