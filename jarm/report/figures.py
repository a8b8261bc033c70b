"""From records to figures, made for colour-blind readers and for print. Needs the extra `plots`."""

from __future__ import annotations

import contextlib
import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

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
TITLES = {"spearman": "within-prompt Spearman", "pair_accuracy": "pair accuracy", "nll": "NLL (nats a pair)"}
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
    """Raise `JarmError` where the extra `plots` is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise JarmError("Figures need matplotlib: install it with `pip install matplotlib`.") from error


def learning_curves(
    records: list[dict[str, Any]], path_stem: pathlib.Path | str, metric: str = METRIC, baseline: str = "random"
) -> list[pathlib.Path]:
    """Draw learning curves of every rule: `metric` at the left, best-of-N at the right.

    Lines are means over seeds, bands their 95 % bootstrap intervals (`jarm.report.statistics.bootstrap_ci`), each rule
    by itself; that rules share seeds is in the summary, not in the bands. Thin lines need no reward model.

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
                _panel(axes, runs, references_of(records), name, baseline)
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
        # Without what differs from run to run.
        figure.savefig(png, dpi=dpi, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None, "Creator": None})


def files_of(path_stem: pathlib.Path | str) -> list[pathlib.Path]:
    """The two files of a figure."""
    stem = pathlib.Path(path_stem)
    return [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]


def style_of(rules: list[str], rule: str, baseline: str = "random") -> dict[str, Any]:
    """How the line of one of some rules is drawn: color, linestyle, marker, linewidth and zorder."""
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


def _panel(axes: Axes, runs: dict[str, Any], references: dict[str, dict[str, Any]], metric: str, baseline: str) -> None:
    low, high = math.inf, -math.inf
    for rule, by_seed in runs.items():
        seeds = list(by_seed)
        labels, values = curves(by_seed, "labels", seeds).mean(0), curves(by_seed, metric, seeds)
        band = np.array([bootstrap_ci(column)[:3] for column in values.T])
        style = style_of(list(runs), rule, baseline)
        axes.plot(labels, band[:, 0], label=rule, markersize=4, markevery=max(len(labels) // 12, 1), **style)
        axes.fill_between(labels, band[:, 1], band[:, 2], color=style["color"], alpha=0.15, linewidth=0)
        if np.isfinite(band).any():
            low, high = min(low, np.nanmin(band)), max(high, np.nanmax(band))
    axes.set_xlabel("labels")
    axes.set_title(title(metric), loc="left", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    if low <= high:
        _references(axes, references, metric, low, high)


def _references(axes: Axes, references: dict[str, dict[str, Any]], metric: str, low: float, high: float) -> None:
    """Thin lines, named at their left end; one that would squash the curves is named at the edge it lies beyond."""
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
        axes.annotate(
            name, (place, value), xycoords=("axes fraction", "data"), va="bottom", fontsize=7.5, color="#555555"
        )
    for names, arrow, height, side in ((above, "\u2191", 0.985, "top"), (below, "\u2193", 0.015, "bottom")):
        if names:
            text = f"{arrow} {', '.join(names)}"
            axes.annotate(text, (0.01, height), xycoords="axes fraction", va=side, fontsize=7.5, color="#555555")


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
    """Draw what each axis of a sweep does: the mean height of the learning curve against its values, a line a rule.

    A point is the mean over seeds and over the other axes, as far as every rule has a run there at every value of the
    axis; its band is the 95 % bootstrap interval over seeds. Without axes, learning curves.

    Args:
      records: of a sweep; runs that are not whole are left out.
      axes: names of its axes.
      path_stem: where to write, without suffix.
      metric: what is drawn.
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
    rules = list(dict.fromkeys(rule for rule, *_ in heights))
    with drawing(path_stem, (3.4 * len(several) + 1.6, 3.2)) as figure:
        for axes_, axis in zip(np.atleast_1d(figure.subplots(1, len(several), sharey=True)), several, strict=True):
            at = list(axes).index(axis)
            values = list(dict.fromkeys(setting[at] for _, _, setting in heights))
            # Of seeds and the other axes, what every rule has at every value: else points would average unlike things.
            places: dict[tuple[str, Any], dict[tuple[Any, ...], float]] = {}
            for (rule, seed, setting), height in heights.items():
                others = seed, *setting[:at], *setting[at + 1 :]
                places.setdefault((rule, setting[at]), {})[others] = height
            common = set.intersection(*(set(each) for each in places.values()))
            for rule in rules:
                points = []
                for value in values:
                    own: dict[int, list[float]] = {}
                    for others, height in places.get((rule, value), {}).items():
                        if others in common or not common:
                            own.setdefault(others[0], []).append(height)
                    points.append(bootstrap_ci(np.array([np.mean(each) for each in own.values()]))[:3])
                low, mean, high = np.array(points)[:, [1, 0, 2]].T
                style = style_of(rules, rule, baseline)
                axes_.plot(range(len(values)), mean, label=rule, markersize=4, **style)
                axes_.fill_between(range(len(values)), low, high, color=style["color"], alpha=0.15, linewidth=0)
            names = short_names(values) if axis == "embeddings" else [str(value) for value in values]
            axes_.set_xticks(range(len(values)), names, rotation=30 if len(values) > 4 else 0)
            axes_.set_xlabel(axis)
            axes_.grid(axis="y", color="#dddddd", linewidth=0.6)
        first = figure.axes[0]
        first.set_title(f"{title(metric)}, mean over labels", loc="left", fontsize=10)
        figure.legend(handles=first.get_lines(), loc="outside right center", frameon=False, handlelength=3.6)
    return files_of(path_stem)


def short_names(values: Sequence[str]) -> list[str]:
    """Files without folders, `.npy`, and the words that all begin or end with; as they are where these are the same."""
    words = [pathlib.Path(value).name.removesuffix(".npy").split("_") for value in values]

    def common(of: list[list[str]]) -> int:
        return sum(1 for _ in itertools.takewhile(lambda each: len(set(each)) == 1, zip(*of, strict=False)))

    start, end = common(words), common([each[::-1] for each in words])
    short, whole = (["_".join(each) for each in of] for of in ([w[start : len(w) - end] for w in words], words))
    return next((names for names in (short, whole) if all(names) and len(set(names)) == len(values)), list(values))


def _heights(
    records: list[dict[str, Any]], axes: Sequence[str], metric: str
) -> dict[tuple[str, int, tuple[Any, ...]], float]:
    """(rule, seed, setting) -> mean height of the learning curve."""
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
    """Draw processor time against candidate pairs, a panel for each family of rules, and quality against time.

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
    largest = max(row["candidates"] for row in rows)
    columns = min(3, len(families) + 1)
    lines = -(-(len(families) + 1) // columns)
    with drawing(path_stem, (4.2 * columns, 3.3 * lines)) as figure:
        grid = np.atleast_1d(figure.subplots(lines, columns)).ravel()
        for axes in grid[len(families) + 1 :]:
            axes.axis("off")
        first = grid[0]
        for axes, (family, rules) in zip(grid[: len(families)], families.items(), strict=True):
            for rule, cells in rules.items():
                cells = sorted(cells, key=lambda row: row["candidates"])
                style = style_of(list(rules), rule, "random")
                x = [row["candidates"] for row in cells]
                axes.loglog(x, [row["cpu_s"] for row in cells], label=rule, markersize=4, **style)
            axes.sharey(first)
            axes.set_title(family, loc="left", fontsize=10)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.legend(fontsize=6.5, handlelength=3, ncols=2, loc="upper left", framealpha=0.8, edgecolor="none")
            axes.set_xlabel("candidate pairs")
        first.set_ylabel("processor seconds a batch")
        first.set_ylim(top=30 * first.get_ylim()[1])  # room for the legends
        axes = grid[len(families)]
        for index, (family, rules) in enumerate(families.items()):
            last = [row for cells in rules.values() for row in cells if row["candidates"] == largest]
            color = PALETTE[index % len(PALETTE)]
            style = {"color": color, "marker": MARKERS[index % len(MARKERS)], "linestyle": "", "label": family}
            axes.semilogx([row["cpu_s"] for row in last], [row["log_det"] for row in last], markersize=5, **style)
        axes.set_title(f"information against time, {largest:,} pairs", loc="left", fontsize=10)
        axes.set_xlabel("processor seconds a batch")
        axes.set_ylabel("log det above the prior (nats)")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, fontsize=7)
    return files_of(path_stem)
