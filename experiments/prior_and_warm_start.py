"""(i) The prior of exact greedy selection, and warm starts.

Claim     The default prior of exact greedy selection is nowhere more than .01 below another, and a fit that starts from
          the last round's heads does no better than one from scratch. (Neither is the paper's: it has no greedy rule,
          and whether its heads start from scratch is not known here.)
Command   python experiments/prior_and_warm_start.py --data alpaca_eval_200x20.parquet \\
              --embeddings alpaca_eval_200x20_minilm_mean.npy --targets golden_logit,golden_z_lc
Hardware  2 CPU cores.
Time      About 5 minutes a target, 12 seeds.
Expected  `experiments/README.md` has the readings.

The prior's weight c is traced, so that one program runs them all. A warm start has seen the labels that it then holds
out to stop early; from scratch it has not.
"""

from __future__ import annotations

import pathlib

import numpy as np
import suite
from suite import Config, Reading, Records, Study

from jarm.report.figures import drawing, style_of
from jarm.report.statistics import bootstrap_ci

PRIORS = (0.001, 0.01, 0.1, 1.0, 10.0)
DEFAULT = 0.1
STARTS = {False: "from scratch", True: "warm"}


def records(config: Config) -> Records:
    folder = "prior_and_warm_start"
    priors = suite.sweep_of(config, f"{folder}/prior", 12, {"prior_weight": PRIORS}, rules="random,greedy_dopt")
    starts = suite.sweep_of(config, f"{folder}/warm_start", 12, {"warm_start": list(STARTS)}, rules=suite.TRIO)
    return [*suite.records_of(priors), *suite.records_of(starts)]


def _with(records: Records, axis: str) -> Records:
    return [line for line in records if axis in line]


def figure(records: Records, stem: pathlib.Path) -> None:
    """Above, greedy selection by its prior, against random; below, warm starts less fits from scratch, by rule."""
    priors = suite.areas(_with(records, "prior_weight"), "prior_weight")
    starts = suite.areas(_with(records, "warm_start"), "warm_start")
    names, rules = list(dict.fromkeys(panel for panel, _, _ in priors)), suite.TRIO.split(",")
    with drawing(stem, (4.4 * len(names) + 1.4, 5.6)) as canvas:
        grid = canvas.subplots(2, len(names), squeeze=False, sharey="row")
        for (top, bottom), panel in zip(grid.T, names, strict=True):
            for rule in ("random", "greedy_dopt"):
                found = [bootstrap_ci(np.array(list(priors[panel, c, rule].values())))[:3] for c in PRIORS]
                mean, low, high = np.array(found).T
                style = style_of(rules, rule)
                top.plot(PRIORS, mean, label=rule, markersize=4, **style)
                top.fill_between(PRIORS, low, high, color=style["color"], alpha=0.15, linewidth=0)
            top.set_xscale("log")
            top.set_xlabel("weight c of the prior")
            top.set_title(suite.heading(panel, "mean Spearman over labels"), loc="left", fontsize=10)
            gains = suite.differences(starts, {rule: ((panel, True, rule), (panel, False, rule)) for rule in rules})
            for place, (rule, values) in enumerate(gains.items()):
                mean, low, high, _ = bootstrap_ci(values)
                bars = np.nan_to_num([[mean - low], [high - mean]])
                style = style_of(rules, rule) | {"linestyle": ""}
                bottom.errorbar([place], [mean], bars, capsize=3, markersize=6, **style)
            bottom.axhline(0, color="#555555", linewidth=0.8, zorder=1)
            bottom.set_xticks(range(len(rules)), rules)
            bottom.set_xlim(-0.5, len(rules) - 0.5)
            bottom.set_title("warm start less from scratch, same seeds", loc="left", fontsize=10)
            for axes in (top, bottom):
                axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        canvas.legend(handles=grid[0, 0].get_lines(), loc="outside right center", frameon=False, handlelength=3.6)


def table(records: Records) -> suite.Rows:
    head, *priors = suite.table(_with(records, "prior_weight"), "prior_weight", "setting")
    starts = suite.table(_with(records, "warm_start"), "warm_start", "setting")[1:]
    at = head.index("setting")
    words = [f"prior {row[at]}" for row in priors] + [STARTS[row[at] == "True"] for row in starts]
    rows = zip([*priors, *starts], words, strict=True)
    return [head, *([*row[:at], word, *row[at + 1 :]] for row, word in rows)]


def readings(records: Records) -> list[Reading]:
    priors = suite.areas(_with(records, "prior_weight"), "prior_weight")
    starts = suite.areas(_with(records, "warm_start"), "warm_start")
    names = list(dict.fromkeys(panel for panel, _, _ in priors))
    others = {
        suite.label(panel, f"c = {DEFAULT} - c = {c:g}"): ((panel, DEFAULT, "greedy_dopt"), (panel, c, "greedy_dopt"))
        for panel in names
        for c in PRIORS
        if c != DEFAULT
    }
    scratch = {
        suite.label(panel, rule): ((panel, False, rule), (panel, True, rule))
        for panel in names
        for rule in suite.TRIO.split(",")
    }
    no_worse = "The default prior c = .1 is no more than .01 below any other"
    return [
        suite.decide(no_worse, suite.differences(priors, others), bound=-0.01),
        suite.decide(
            "Fits from scratch are no more than .01 below warm starts", suite.differences(starts, scratch), bound=-0.01
        ),
    ]


STUDY = Study("i", "prior_and_warm_start", "Prior and warm start", __doc__, records, figure, table, readings)

if __name__ == "__main__":
    suite.main(STUDY)
