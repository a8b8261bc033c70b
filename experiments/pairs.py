"""(b) Pairs within prompts against pairs across prompts.

Claim     Pairs of responses to different prompts make labelling significantly more efficient than pairs of responses to
          one prompt (Shen, Sun, Ton, arXiv 2502.04354).
Command   python experiments/pairs.py --data alpaca_eval_200x20.parquet \\
              --embeddings alpaca_eval_200x20_minilm_mean.npy --targets golden_logit,golden_z_lc
Hardware  2 CPU cores.
Time      About 4 minutes a target, 12 seeds.
Expected  `experiments/README.md` has the readings.

The annotator compares any two responses by their gold rewards, across prompts as within; judged is how responses are
ranked within a test prompt. Seeds are paired: the same first heads, the same annotator.
"""

from __future__ import annotations

import pathlib

import numpy as np
import suite
from suite import Config, Reading, Records, Study

from jarm.report.curves import METRIC, curves, runs_of
from jarm.report.figures import drawing, style_of
from jarm.report.statistics import bootstrap_ci

KINDS = ("within", "cross", "all")


def records(config: Config) -> Records:
    return suite.records_of(suite.sweep_of(config, "pairs", seeds=12, grid={"pairs": KINDS}, rules=suite.TRIO))


def figure(records: Records, stem: pathlib.Path) -> None:
    """Learning curves, a column a rule, a row a panel, a line for each kind of pairs."""
    places = suite.settings(records, "pairs")
    names, rules = list(dict.fromkeys(panel for panel, _ in places)), suite.TRIO.split(",")
    with drawing(stem, (3.2 * len(rules) + 1.2, 3.2 * len(names))) as canvas:
        grid = canvas.subplots(len(names), len(rules), squeeze=False, sharex=True, sharey="row")
        for (panel, kind), own in places.items():
            style = style_of(list(KINDS), kind, baseline="within")
            for axes, rule in zip(grid[names.index(panel)], rules, strict=True):
                runs = runs_of(own)[rule]
                labels, values = (curves(runs, name, list(runs)) for name in ("labels", METRIC))
                band = np.array([bootstrap_ci(column)[:3] for column in values.T])
                axes.plot(labels.mean(0), band[:, 0], label=kind, markersize=4, **style)
                axes.fill_between(labels.mean(0), *band[:, 1:].T, color=style["color"], alpha=0.15, linewidth=0)
                axes.set_title(suite.heading(panel, rule), loc="left", fontsize=10)
                axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        for axes in grid[-1]:
            axes.set_xlabel("labels")
        for axes in grid[:, 0]:
            axes.set_ylabel("within-prompt Spearman")
        lines = grid[0, 0].get_lines()
        canvas.legend(handles=lines, loc="outside right center", frameon=False, handlelength=3.6, title="pairs")


def table(records: Records) -> suite.Rows:
    return suite.table(records, "pairs")


def readings(records: Records) -> list[Reading]:
    scores = suite.areas(records, "pairs")
    names = list(dict.fromkeys(panel for panel, _, _ in scores))

    def gains(rule: str, kind: str) -> dict[str, np.ndarray]:
        words = {suite.label(panel, rule): ((panel, kind, rule), (panel, "within", rule)) for panel in names}
        return suite.differences(scores, words)

    trio = suite.TRIO.split(",")
    return [
        suite.decide("Pairs across prompts teach more than pairs within, by the released rule", gains("dopt", "cross")),
        suite.decide(
            "So they do whichever rule chooses", {k: v for rule in trio for k, v in gains(rule, "cross").items()}
        ),
        suite.decide("Pairs of both kinds teach more than pairs within, by the released rule", gains("dopt", "all")),
    ]


STUDY = Study("b", "pairs", "Pairs within prompts against pairs across", __doc__, records, figure, table, readings)

if __name__ == "__main__":
    suite.main(STUDY)
