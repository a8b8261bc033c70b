"""(a) Learning curves of the eight strategies of the paper, and of exact greedy D-optimal selection.

Claim     D-optimal and past-aware D-optimal selection lead the other strategies in 1 - Spearman and in best-of-N, with
          less variance over seeds; entropy alone is poor (Shen, Sun, Ton, arXiv 2502.04354).
Command   python experiments/strategies.py --data alpaca_eval_200x20.parquet \\
              --embeddings alpaca_eval_200x20_minilm_mean.npy --targets golden_logit,golden_z_lc
Hardware  2 CPU cores.
Time      About 5 minutes a target, 12 seeds.
Expected  `experiments/README.md` has the readings.

Pairs within prompts. That D-optimal rules lead is asked against each of the other strategies of the paper, in the mean
Spearman over labels and in best-of-N at the end.
"""

from __future__ import annotations

import pathlib

import numpy as np
import suite
from suite import Config, Reading, Records, Study

from jarm.report.curves import METRIC, valued
from jarm.report.figures import curve_grid
from jarm.report.statistics import interval, number, resamples, tail

RULES = "random,entropy,max_diff,xtx,dopt,pa_dopt,coreset,batch_bald,greedy_dopt"
OTHERS = ("random", "entropy", "max_diff", "xtx", "coreset", "batch_bald")
LEADERS = ("dopt", "pa_dopt")
DISTANCE = "1 - within-prompt Spearman"


def records(config: Config) -> Records:
    return suite.records_of(suite.sweep_of(config, "strategies", seeds=12, rules=RULES))


def figure(records: Records, stem: pathlib.Path) -> None:
    shown = [line | {DISTANCE: 1 - float(np.nan_to_num(valued(line, METRIC)))} for line in records]
    curve_grid(suite.panels(shown), stem, DISTANCE)


def readings(records: Records) -> list[Reading]:
    heights, ends = suite.areas(records), suite.finals(records, metric="best_of")
    names = list(dict.fromkeys(panel for panel, _, _ in heights))
    rivals = [(panel, rule, other) for panel in names for rule in LEADERS for other in OTHERS]

    def against(scores: suite.Scores, these: list[tuple[str, str, str]], *words: str) -> dict[str, np.ndarray]:
        keys = {suite.label(p, one, "-", two, *words): ((p, None, one), (p, None, two)) for p, one, two in these}
        return suite.differences(scores, keys)

    lead = against(heights, rivals, "in Spearman") | against(ends, rivals, "in best-of-N")
    poor = [(panel, "random", "entropy") for panel in names]
    greedy = [(panel, "greedy_dopt", "dopt") for panel in names]
    return [
        suite.decide("dopt and pa_dopt lead every other strategy of the paper, on both metrics", lead),
        steadier("dopt and pa_dopt vary less over seeds at the end than random", suite.finals(records), names),
        suite.decide("Entropy is poor: random leads it (mean Spearman)", against(heights, poor)),
        suite.decide("Exact greedy selection leads the released rule (mean Spearman)", against(heights, greedy)),
    ]


def steadier(claim: str, scores: suite.Scores, names: list[str]) -> Reading:
    """Whether rules have smaller standard deviations over seeds than random: ratios, seeds resampled in pairs.

    The intervals hold for all rules and panels together.
    """
    above, below, words = [], [], []
    for panel in names:
        for rule in LEADERS:
            own, base = scores.get((panel, None, rule), {}), scores.get((panel, None, "random"), {})
            seeds = [seed for seed in own if seed in base]
            if len(seeds) < suite.SEEDS:
                return Reading(claim, suite.OPEN, f"{len(seeds)} seeds are too few: run at least {suite.SEEDS}.")
            pair = np.array([[each[seed] for seed in seeds] for each in (own, base)])
            drawn = pair[:, resamples(len(seeds))].std(axis=-1)
            cut = tail(len(seeds), 1 - 0.05 / (len(names) * len(LEADERS)))
            low, high = np.quantile(drawn[0] / np.maximum(drawn[1], 1e-12), [cut, 1 - cut])
            spread = pair.std(axis=1)
            above.append(high < 1)
            below.append(low > 1)
            words.append(f"{suite.label(panel, rule)} {number(spread[0] / spread[1], 2)} times {interval(low, high)}")
    verdict = suite.HOLDS if all(above) else suite.FAILS if any(below) else suite.OPEN
    return Reading(claim, verdict, f"standard deviation of the final Spearman: {', '.join(words)} that of random.")


STUDY = Study("a", "strategies", "Learning curves of the strategies", __doc__, records, figure, suite.table, readings)

if __name__ == "__main__":
    suite.main(STUDY)
