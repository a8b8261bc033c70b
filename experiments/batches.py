"""(g) How diverse and how informative the batches of each strategy are, and whether that says who wins.

Claim     D-optimal selection picks batches that are both diverse and informative, where entropy only looks for
          information and distance only for diversity (Shen, Sun, Ton, arXiv 2502.04354; its reviewers asked for
          measurements).
Command   python experiments/batches.py --data alpaca_eval_200x20.parquet \\
              --embeddings alpaca_eval_200x20_minilm_mean.npy --targets golden_logit,golden_z_lc
Hardware  2 CPU cores.
Time      None beside that of strategies.py, whose runs it reads, and makes where they are missing.
Expected  `experiments/README.md` has the readings.

Diversity: log det(I + Z Z^T / s) of a batch's embedding differences Z, in nats. Information: mean p (1 - p) under the
heads that chose. Both are means over rounds.
"""

from __future__ import annotations

import math
import pathlib
from typing import NamedTuple

import numpy as np
import strategies
import suite
from league import DESCRIPTIONS, rank_correlation
from suite import Config, Reading, Records, Study

from jarm.report.curves import runs_of
from jarm.report.figures import PALETTE, drawing, style_of
from jarm.report.statistics import bootstrap_ci, interval, number, resamples, tail

DIVERSITY, INFORMATION = "diversity_log_det", "mean_fisher_weight"
WORDS = {
    "diversity_log_det": "log det",
    "diversity_distance": "mean distance",
    "distinct_responses": "responses",
    "distinct_prompts": "prompts",
    "mean_fisher_weight": "mean p (1 - p)",
    "mean_member_variance": "variance",
    "mean_gold_gap": "gold gap",
}


class Link(NamedTuple):
    """Rank correlation, over rules, of a description with the gain over random, and its 95 % interval over seeds."""

    value: float
    low: float
    high: float
    seeds: int


def records(config: Config) -> Records:
    return strategies.records(config)


def means(records: Records, name: str) -> suite.Scores:
    """(panel, None, rule) -> seed -> mean over the batches of a run."""
    return {
        (panel, None, rule): {
            seed: float(np.mean([line[f"batch_{name}"] for line in run[1:]])) for seed, run in runs.items()
        }
        for (panel, _), own in suite.settings(records, None).items()
        for rule, runs in runs_of(own).items()
    }


def link(records: Records, panel: str, name: str) -> Link:
    """How well a description of the batches orders the rules by what they gained."""
    areas, described = suite.areas(records), means(records, name)
    rules = [rule for where, _, rule in areas if where == panel]
    common = sorted(set.intersection(*(set(areas[panel, None, rule]) for rule in rules)))
    # Gains over random are areas less the same number for all rules, which no rank hears of.
    pair = [
        np.array([[scores[panel, None, rule][s] for rule in rules] for s in common]) for scores in (areas, described)
    ]
    value = rank_correlation(*(each.mean(0) for each in pair))
    if len(common) < 2:
        return Link(value, math.nan, math.nan, len(common))
    drawn = [rank_correlation(pair[0][at].mean(0), pair[1][at].mean(0)) for at in resamples(len(common), 1000)]
    cut = tail(len(common))
    low, high = np.nanquantile(drawn, [cut, 1 - cut]) if np.isfinite(drawn).any() else (math.nan, math.nan)
    return Link(value, float(low), float(high), len(common))


def figure(records: Records, stem: pathlib.Path) -> None:
    """A column a panel: the rules by both measures; and what orders them by gain."""
    wide, deep = means(records, DIVERSITY), means(records, INFORMATION)
    names, rules = list(dict.fromkeys(panel for panel, _, _ in wide)), strategies.RULES.split(",")
    with drawing(stem, (4.8 * len(names) + 1.4, 6.6)) as canvas:
        grid = canvas.subplots(2, len(names), squeeze=False, height_ratios=(3, 2))
        for (top, bottom), panel in zip(grid.T, names, strict=True):
            for rule in rules:
                x, y = (bootstrap_ci(np.array(list(each[panel, None, rule].values()))) for each in (wide, deep))
                bars = [np.nan_to_num([[each.mean - each.low], [each.high - each.mean]]) for each in (x, y)]
                style = style_of(rules, rule) | {"linestyle": "", "label": rule, "markersize": 7}
                top.errorbar(x.mean, y.mean, bars[1], bars[0], **style | {"linewidth": 1, "elinewidth": 1})
            top.set_xlabel("diversity of a batch: log det (nats)")
            top.set_title(suite.heading(panel, "what each rule selects"), loc="left", fontsize=10)
            top.grid(color="#dddddd", linewidth=0.6)
            found = [link(records, panel, name) for name in DESCRIPTIONS]
            for place, one in enumerate(found):
                bars = np.nan_to_num([[one.value - one.low], [one.high - one.value]])
                style = {"color": PALETTE[0], "marker": "o", "capsize": 3, "linestyle": ""}
                bottom.errorbar([one.value], [place], xerr=np.maximum(bars, 0), **style)
            bottom.axvline(0, color="#555555", linewidth=0.8, zorder=1)
            bottom.set_yticks(range(len(found)), [WORDS[name] for name in DESCRIPTIONS])
            bottom.invert_yaxis()
            bottom.set_xlim(-1.05, 1.05)
            bottom.set_xticks([-1, -0.5, 0, 0.5, 1])
            bottom.set_xlabel("rank correlation with the gain, over rules")
            bottom.grid(axis="x", color="#dddddd", linewidth=0.6)
        grid[0, 0].set_ylabel("information of a pair: mean p (1 - p)")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside right upper", frameon=False)


def table(records: Records) -> suite.Rows:
    found, heights = {name: means(records, name) for name in DESCRIPTIONS}, suite.areas(records)
    several = len({panel for panel, _, _ in heights}) > 1
    rows = [[*(["data"] * several), "rule", *WORDS.values(), "mean Spearman"]]
    for key, own in heights.items():
        cells = [number(float(np.mean(list(each[key].values())))) for each in (*found.values(), heights)] if own else []
        rows.append([*([key[0]] * several), key[2], *cells])
    return rows


def readings(records: Records) -> list[Reading]:
    names = list(dict.fromkeys(suite.panel_of(line) for line in records if line["kind"] != "reference"))

    def against(measure: str, one: str, other: str) -> dict[str, np.ndarray]:
        keys = {suite.label(p, WORDS[measure], one, "-", other): ((p, None, one), (p, None, other)) for p in names}
        return suite.differences(means(records, measure), keys)

    both = against(DIVERSITY, "dopt", "entropy") | against(INFORMATION, "dopt", "xtx")
    claims = ["The batches of dopt are more diverse than entropy's, and tell more a pair than those of xtx"]
    claims.append("Exact greedy batches are more diverse than those of the released rule")
    found = [suite.decide(claims[0], both), suite.decide(claims[1], against(DIVERSITY, "greedy_dopt", "dopt"))]
    for measure in (DIVERSITY, INFORMATION):
        links = {panel: link(records, panel, measure) for panel in names}
        claim = f"Over the rules, {WORDS[measure]} of the batches goes with the gain in mean Spearman"
        if min(one.seeds for one in links.values()) < suite.SEEDS:
            found.append(Reading(claim, suite.OPEN, f"Too few seeds: run at least {suite.SEEDS}."))
            continue
        words = (
            f"{suite.label(panel, number(one.value))} {interval(one.low, one.high)}" for panel, one in links.items()
        )
        verdict = suite.HOLDS if all(one.low > 0 for one in links.values()) else suite.OPEN
        verdict = suite.FAILS if any(one.high < 0 for one in links.values()) else verdict
        found.append(Reading(claim, verdict, f"rank correlation {', '.join(words)}."))
    return found


STUDY = Study("g", "batches", "Diversity and information of the batches", __doc__, records, figure, table, readings)

if __name__ == "__main__":
    suite.main(STUDY)
