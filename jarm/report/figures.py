"""From records to figures that suit colour-blind readers and print. Needs the extra `plots`."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pathlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jarm.core.files import write_whole
from jarm.core.status import JarmError
from jarm.report.curves import METRIC, area, best_of_names, curves, references_of, runs_of, valued
from jarm.report.statistics import bootstrap_ci

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too pale for a line on white; the baseline is grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
BASELINE = "#777777"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX*"
Heights = dict[tuple[str, int, tuple[Any, ...]], float]
"""(rule, seed, setting) -> mean height of the learning curve."""
TITLES = {"spearman": "within-prompt Spearman", "pair_accuracy": "pair accuracy", "nll": "NLL (nats per pair)"}
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "jarm",
    "svg.fonttype": "none",
}


def title(metric: str) -> str:
    """A metric's name for an axis."""
    return f"gold reward, best of {metric[8:]}" if metric.startswith("best_of_") else TITLES.get(metric, metric)


def require_matplotlib() -> None:
    """Import matplotlib, whatever backend the environment names: a notebook's may be unknown to this installation.

    Raises:
      JarmError: the extra `plots` is not installed.
    """
    named = os.environ.pop("MPLBACKEND", None)  # figures here have a canvas of their own
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise JarmError("Figures need matplotlib: install it with `pip install matplotlib`.") from error
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named


def learning_curves(
    records: list[dict[str, Any]], path_stem: pathlib.Path | str, metric: str = METRIC, baseline: str = "random"
) -> list[pathlib.Path]:
    """Draw learning curves of every rule: `metric` at the left, best-of-N at the right.

    Lines are means over seeds, bands their 95 % bootstrap intervals (`jarm.report.statistics.bootstrap_ci`), each rule
    by itself: the summary pairs rules by seed, the bands do not. Thin lines are references without a reward model.

    Args:
      records: as `jarm.report.summary.summarise` takes them.
      path_stem: where to write, without suffix.
      metric: of the left panel.
      baseline: the rule drawn in grey.

    Returns:
      The files written: `.png` and `.svg`, the same for the same records and version of matplotlib.

    Raises:
      JarmError: matplotlib is not installed.
    """
    return curve_grid({"": records}, path_stem, metric, baseline)


def curve_grid(
    panels: Mapping[str, list[dict[str, Any]]],
    path_stem: pathlib.Path | str,
    metric: str = METRIC,
    baseline: str = "random",
) -> list[pathlib.Path]:
    """Draw learning curves as `learning_curves` does, a row of panels for each name.

    Args:
      panels: name -> records, as `jarm.report.summary.summarise` takes them.
      path_stem: where to write, without suffix.
      metric: of the panels at the left.
      baseline: the rule drawn in grey.

    Returns:
      The files written: `.png` and `.svg`.

    Raises:
      JarmError: matplotlib is not installed.
    """
    metrics = {name: [metric, *best_of_names(records)[-1:]] for name, records in panels.items()}
    columns = max(map(len, metrics.values()))
    with drawing(path_stem, (4.2 * columns + 1.2, 3.5 * len(panels)), dpi=200) as figure:
        grid = figure.subplots(len(panels), columns, squeeze=False)
        for line, (row, records) in zip(grid, panels.items(), strict=True):
            runs = {rule: seeds for rule, seeds in runs_of(records).items() if seeds}
            for axes, name in zip(line, metrics[row], strict=False):
                draw_curves(axes, runs, references_of(records), name, baseline)
                if row:
                    axes.set_title(f"{row}\n{title(name)}", loc="left", fontsize=10)
            for axes in line[len(metrics[row]) :]:
                axes.axis("off")
        _legend(figure, {rule: seeds for rule, seeds in runs_of(next(iter(panels.values()))).items() if seeds})
    return files_of(path_stem)


@contextlib.contextmanager
def drawing(path_stem: pathlib.Path | str, size: tuple[float, float], dpi: int = 150) -> Iterator[Figure]:
    """A figure in the style of all figures here, saved when the block ends: `.png` and `.svg`.

    The files are the same for the same drawing and version of matplotlib.

    Args:
      path_stem: where to write, without suffix.
      size: inches, across and down.
      dpi: of the `.png`.

    Raises:
      JarmError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        png, svg = files_of(path_stem)
        png.parent.mkdir(parents=True, exist_ok=True)
        # Metadata would differ from run to run.
        plain = {"Software": None}
        write_whole(png, lambda file: figure.savefig(file, format="png", dpi=dpi, metadata=plain))
        bare = {"Date": None, "Creator": None}
        write_whole(svg, lambda file: figure.savefig(file, format="svg", metadata=bare))


def files_of(path_stem: pathlib.Path | str) -> list[pathlib.Path]:
    """The two files of a figure."""
    stem = pathlib.Path(path_stem)
    return [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]


def style_of(rules: list[str], rule: str, baseline: str = "random") -> dict[str, Any]:
    """Options of `plot` for the line of a rule: color, linestyle, marker, linewidth and zorder."""
    if rule == baseline:
        return {"color": BASELINE, "linestyle": "-", "marker": "o", "linewidth": 2.4, "zorder": 2}
    i = [name for name in rules if name != baseline].index(rule)
    return {
        "color": PALETTE[i % len(PALETTE)],
        "linestyle": DASHES[i % len(DASHES)],
        "marker": MARKERS[(i + 1) % len(MARKERS)],
        "linewidth": 1.6,
        "zorder": 3,
    }


def draw_curves(
    axes: Axes,
    runs: Mapping[str, dict[int, list[dict[str, Any]]]],
    references: Mapping[str, dict[str, Any]],
    metric: str = METRIC,
    baseline: str = "random",
) -> None:
    """Draw the learning curves of one panel: a line with a band for each rule, and thin lines for references.

    Args:
      axes: where to draw.
      runs: rule -> seed -> records, as `jarm.report.curves.runs_of` returns them.
      references: name -> metrics, as `jarm.report.curves.references_of` returns them.
      metric: what to draw.
      baseline: the rule drawn in grey.
    """
    low, high = math.inf, -math.inf
    for rule, by_seed in runs.items():
        seeds = list(by_seed)
        labels, values = curves(by_seed, "labels", seeds).mean(0), curves(by_seed, metric, seeds)
        band = np.array([bootstrap_ci(column)[:3] for column in values.T])
        style = style_of(list(runs), rule, baseline)
        axes.plot(labels, band[:, 0], label=_short(rule), markersize=4, markevery=max(len(labels) // 12, 1), **style)
        axes.fill_between(labels, band[:, 1], band[:, 2], color=style["color"], alpha=0.15, linewidth=0)
        if np.isfinite(band).any():
            low, high = min(low, np.nanmin(band)), max(high, np.nanmax(band))
    axes.set_xlabel("labels")
    axes.set_title(title(metric), loc="left", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    if low <= high:
        _draw_references(axes, references, metric, low, high)


def _draw_references(
    axes: Axes, references: Mapping[str, dict[str, Any]], metric: str, low: float, high: float
) -> None:
    """Thin lines named at their left end; a line too far from the curves is named at the edge beyond which it lies."""
    room = 0.6 * max(high - low, 1e-6)
    known = {name: valued(line, metric) for name, line in references.items()}
    known = {name: value for name, value in known.items() if not math.isnan(value)}
    near = {name: value for name, value in known.items() if low - room <= value <= high + room}
    low, high = min([low, *near.values()]), max([high, *near.values()])
    above = [f"{name} {value:.2f}" for name, value in known.items() if value > high]
    below = [f"{name} {value:.2f}" for name, value in known.items() if value < low]
    margin = 0.06 * max(high - low, 1e-6)
    axes.set_ylim(low - (2 if below else 1) * margin, high + (3 if above else 2) * margin)
    place, last = 0.01, -math.inf
    for name, value in sorted(near.items(), key=lambda item: item[1]):
        # Names of lines close to one another stand side by side.
        place, last = (place + 0.25 if value - last < margin else 0.01), value
        axes.axhline(value, color="#555555", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        written = axes.annotate(
            name, (place, value), xycoords=("axes fraction", "data"), va="bottom", fontsize=7.5, color="#555555"
        )
        written.set_in_layout(False)  # else many names, or long ones, leave no room for the axes
    for names, arrow, height, side in ((above, "\u2191", 0.985, "top"), (below, "\u2193", 0.015, "bottom")):
        if names:
            text = textwrap.fill(f"{arrow} {', '.join(names)}", 56)
            written = axes.annotate(
                text, (0.01, height), xycoords="axes fraction", va=side, fontsize=7.5, color="#555555"
            )
            written.set_in_layout(False)


def _short(rule: str, longest: int = 40) -> str:
    """The end of a name, which of a rule of a file may be a long path: a legend leaves room for the axes."""
    return rule if len(rule) <= longest else f"...{rule[3 - longest :]}"


def _legend(figure: Figure, runs: dict[str, Any]) -> None:
    lines = figure.axes[0].get_lines()[: len(runs)]
    # From top to bottom as the curves end.
    lines = sorted(lines, key=lambda line: np.nan_to_num(np.asarray(line.get_ydata(), float)[-1]), reverse=True)
    counts = sorted({len(seeds) for seeds in runs.values()})
    seeds = " to ".join(str(count) for count in ([counts[0], counts[-1]] if len(counts) > 1 else counts)) or "no"
    bands = "\nbands: 95 % bootstrap" if counts and counts[-1] > 1 else ""
    figure.legend(
        handles=lines,
        loc="outside right center",
        frameon=False,
        handlelength=3.6,
        title=f"mean of {seeds} seed{'s' * (counts != [1])}{bands}",
        title_fontsize=8,
        alignment="left",
    )


def axis_curves(
    records: list[dict[str, Any]],
    axes: Sequence[str],
    path_stem: pathlib.Path | str,
    metric: str = METRIC,
    baseline: str = "random",
) -> list[pathlib.Path]:
    """Draw the mean height of the learning curve against the values of each axis of a sweep, one line per rule.

    A point is the mean over the seeds and the values of other axes for which every rule has a run at every value of the
    axis; its band is the 95 % bootstrap interval over seeds. Without axes, learning curves.

    Args:
      records: of a sweep; runs that are not whole are left out.
      axes: names of its axes.
      path_stem: where to write, without suffix.
      metric: the metric of the curves.
      baseline: the rule drawn in grey.

    Returns:
      The files written: `.png` and `.svg`.

    Raises:
      JarmError: matplotlib is not installed.
    """
    several = [axis for axis in axes if len({record.get(axis) for record in records}) > 1]
    if not several:
        return learning_curves(records, path_stem, metric, baseline)
    heights = _heights(records, axes, metric)
    with drawing(path_stem, (3.4 * len(several) + 1.6, 3.2)) as figure:
        for panel, axis in zip(np.atleast_1d(figure.subplots(1, len(several), sharey=True)), several, strict=True):
            _draw_axis(panel, heights, list(axes).index(axis), baseline, short=axis == "embeddings")
            panel.set_xlabel(axis)
        first = figure.axes[0]
        first.set_title(f"{title(metric)}, mean over labels", loc="left", fontsize=10)
        figure.legend(handles=first.get_lines(), loc="outside right center", frameon=False, handlelength=3.6)
    return files_of(path_stem)


def _draw_axis(axes: Axes, heights: Heights, place: int, baseline: str, *, short: bool) -> None:
    """A panel of `axis_curves`: heights against the values of the axis at one place of the settings."""
    rules = list(dict.fromkeys(rule for rule, *_ in heights))
    values = list(dict.fromkeys(setting[place] for _, _, setting in heights))
    # (rule, value) -> (seed, *values of the other axes) -> height.
    cells: dict[tuple[str, Any], dict[tuple[Any, ...], float]] = {}
    for (rule, seed, setting), height in heights.items():
        others = seed, *setting[:place], *setting[place + 1 :]
        cells.setdefault((rule, setting[place]), {})[others] = height
    # Only seeds and other values that every rule has at every value: else points would average unlike things.
    common = set.intersection(*(set(cell) for cell in cells.values()))
    for rule in rules:
        points = []
        for value in values:
            by_seed: dict[int, list[float]] = {}
            for others, height in cells.get((rule, value), {}).items():
                if others in common or not common:
                    by_seed.setdefault(others[0], []).append(height)
            points.append(bootstrap_ci(np.array([np.mean(each) for each in by_seed.values()]))[:3])
        mean, low, high = np.array(points).T
        style = style_of(rules, rule, baseline)
        axes.plot(range(len(values)), mean, label=_short(rule), markersize=4, **style)
        axes.fill_between(range(len(values)), low, high, color=style["color"], alpha=0.15, linewidth=0)
    names = short_names(values) if short else [str(value) for value in values]
    axes.set_xticks(range(len(values)), names, rotation=30 if len(values) > 4 else 0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def short_names(values: Sequence[str]) -> list[str]:
    """File names without folders, `.npy` and the words that all begin or end with; whole where short ones coincide."""
    words = [pathlib.Path(value).name.removesuffix(".npy").split("_") for value in values]

    def common(of: list[list[str]]) -> int:
        return sum(1 for _ in itertools.takewhile(lambda each: len(set(each)) == 1, zip(*of, strict=False)))

    start, end = common(words), common([each[::-1] for each in words])
    short, whole = (["_".join(each) for each in of] for of in ([w[start : len(w) - end] for w in words], words))
    return next((names for names in (short, whole) if all(names) and len(set(names)) == len(values)), list(values))


def _heights(records: list[dict[str, Any]], axes: Sequence[str], metric: str) -> Heights:
    by_setting: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        by_setting.setdefault(tuple(record.get(axis) for axis in axes), []).append(record)
    return {
        (rule, seed, setting): area(run, metric)
        for setting, own in by_setting.items()
        for rule, runs in runs_of(own).items()
        for seed, run in runs.items()
    }


def run_times(rows: list[dict[str, Any]], path_stem: pathlib.Path | str) -> list[pathlib.Path]:
    """Draw processor time against candidate pairs, one panel per family of rules, and log det against time.

    Args:
      rows: as `jarm.studies.bench.bench` returns them.
      path_stem: where to write, without suffix.

    Returns:
      The files written: `.png` and `.svg`.

    Raises:
      JarmError: matplotlib is not installed.
    """
    families: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if row["rule"].endswith("_marginal"):  # as its twin
            continue
        families.setdefault(row["family"], {}).setdefault(row["rule"], []).append(row)
    columns = min(3, len(families) + 1)
    lines = -(-(len(families) + 1) // columns)
    with drawing(path_stem, (4.2 * columns, 3.3 * lines)) as figure:
        grid = np.atleast_1d(figure.subplots(lines, columns)).ravel()
        for axes in grid[len(families) + 1 :]:
            axes.axis("off")
        for axes, (family, rules) in zip(grid[: len(families)], families.items(), strict=True):
            _draw_family(axes, family, rules)
            axes.sharey(grid[0])
        grid[0].set_ylabel("processor seconds per batch")
        grid[0].set_ylim(top=30 * grid[0].get_ylim()[1])  # room for the legends
        _draw_information(grid[len(families)], families)
    return files_of(path_stem)


def _draw_family(axes: Axes, family: str, rules: dict[str, list[dict[str, Any]]]) -> None:
    """A panel of `run_times`: processor time of the rules of one family against candidate pairs."""
    for rule, rows in rules.items():
        rows = sorted(rows, key=lambda row: row["candidates"])
        style = style_of(list(rules), rule, "random")
        axes.loglog(
            [row["candidates"] for row in rows],
            [row["cpu_s"] for row in rows],
            label=_short(rule),
            markersize=4,
            **style,
        )
    axes.set_title(family, loc="left", fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(fontsize=6.5, handlelength=3, ncols=2, loc="upper left", framealpha=0.8, edgecolor="none")
    axes.set_xlabel("candidate pairs")


def _draw_information(axes: Axes, families: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """The last panel of `run_times`: log det of a batch against processor time, at most candidate pairs."""
    rows = {family: [row for each in rules.values() for row in each] for family, rules in families.items()}
    largest = max(row["candidates"] for each in rows.values() for row in each)
    for index, (family, each) in enumerate(rows.items()):
        last = [row for row in each if row["candidates"] == largest]
        color, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        style = {"color": color, "marker": marker, "linestyle": "", "label": family}
        axes.semilogx([row["cpu_s"] for row in last], [row["log_det"] for row in last], markersize=5, **style)
    axes.set_title(f"information against time, {largest:,} pairs", loc="left", fontsize=10)
    axes.set_xlabel("processor seconds per batch")
    axes.set_ylabel("log det above the prior (nats)")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=7)
