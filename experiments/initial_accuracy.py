"""(h) Initial against final accuracy.

Claim     What D-optimal selection gains does not hang on how good the first head is. (Reviewers of the paper asked for
          initial and final accuracy; what it found is not known here.)
Command   python experiments/initial_accuracy.py --data alpaca_eval_200x20.parquet \\
              --embeddings alpaca_eval_200x20_minilm_mean.npy --targets golden_logit,golden_z_lc
Hardware  2 CPU cores.
Time      About 6 minutes a target, 10 seeds.
Expected  `experiments/README.md` has the readings.

10 to 200 random labels first, then as many labelled whatever the start. A point of the figure is one run: within-prompt
Spearman of the first head, and of the last.
"""

from __future__ import annotations

import pathlib

import numpy as np
import suite
from suite import Config, Reading, Records, Study

from jarm.report.curves import METRIC, curves, runs_of
from jarm.report.figures import MARKERS, drawing, style_of

INITIAL = {"small": (10, 20), "full": (10, 25, 50, 100, 200), "published": (125, 250, 500, 1000)}


def records(config: Config) -> Records:
    grid = {"initial": INITIAL[config.size]}
    return suite.records_of(suite.sweep_of(config, "initial_accuracy", seeds=10, grid=grid, rules=suite.TRIO))


def figure(records: Records, stem: pathlib.Path) -> None:
    """A column a panel; colours are rules, markers are counts of initial labels."""
    places, rules = suite.settings(records, "initial"), suite.TRIO.split(",")
    names, counts = (list(dict.fromkeys(each)) for each in zip(*places, strict=True))
    with drawing(stem, (4.4 * len(names) + 1.4, 4.2)) as canvas:
        grid = canvas.subplots(1, len(names), squeeze=False)[0]
        for (panel, count), own in places.items():
            axes = grid[names.index(panel)]
            for rule, runs in runs_of(own).items():
                first, *_, last = curves(runs, METRIC, list(runs)).T
                look = {"color": style_of(rules, rule)["color"], "marker": MARKERS[counts.index(count)]}
                axes.plot(first, last, linestyle="", markersize=5, alpha=0.75, **look)
        for axes, panel in zip(grid, names, strict=True):
            low, high = axes.dataLim.intervalx.min(), axes.dataLim.intervaly.max()
            axes.plot([low, high], [low, high], color="#555555", linewidth=0.8, zorder=1)
            axes.annotate("no change", (high, high), fontsize=7.5, color="#555555", ha="right", va="bottom")
            axes.set_title(suite.heading(panel, "final Spearman against initial"), loc="left", fontsize=10)
            axes.set_xlabel("after the initial labels")
            axes.grid(color="#dddddd", linewidth=0.6)
        grid[0].set_ylabel("at the end")
        looks = [{"color": style_of(rules, rule)["color"], "marker": "s", "label": rule} for rule in rules]
        looks += [
            {"color": "#333333", "marker": mark, "label": f"{count} first"}
            for mark, count in zip(MARKERS, counts, strict=False)
        ]
        handles = [grid[0].plot([], [], linestyle="", markersize=5, **look)[0] for look in looks]
        canvas.legend(handles=handles, loc="outside right center", frameon=False)


def table(records: Records) -> suite.Rows:
    """The table of all studies, with the initial Spearman."""
    rows = suite.table(records, "initial", "initial labels")
    firsts = [
        curves(runs, METRIC, list(runs))[:, 0].mean() if runs else None
        for own in suite.settings(records, "initial").values()
        for runs in runs_of(own).values()
    ]
    at = rows[0].index("mean Spearman")
    cells = ["initial Spearman", *("" if value is None else f"{value:.3f}" for value in firsts)]
    return [[*row[:at], cell, *row[at:]] for row, cell in zip(rows, cells, strict=True)]


def readings(records: Records) -> list[Reading]:
    ends = suite.finals(records, "initial")
    starts = {
        (panel, value, rule): dict(zip(runs, curves(runs, METRIC, list(runs))[:, 0].tolist(), strict=True))
        for (panel, value), own in suite.settings(records, "initial").items()
        for rule, runs in runs_of(own).items()
    }
    better = {
        suite.label(panel, value, "initial labels"): np.array(
            [end - starts[panel, value, rule][s] for s, end in own.items()]
        )
        for (panel, value, rule), own in ends.items()
        if rule == "dopt"
    }
    return [
        suite.decide("The released rule ends above its start at every count of initial labels", better),
        *suite.leads(ends, "count of initial labels", "final Spearman"),
    ]


STUDY = Study("h", "initial_accuracy", "Initial against final accuracy", __doc__, records, figure, table, readings)

if __name__ == "__main__":
    suite.main(STUDY)
