"""(c) Labels per round: 125, 250, 500 or 1,000, at equal totals.

Claim     The lead of D-optimal selection does not hang on the batch size. (The paper varies it; what it found of it is
          not known here.) Smaller batches, with a fit after each, end better.
Command   python experiments/batch_size.py --data alpaca_eval_200x20.parquet \\
              --embeddings alpaca_eval_200x20_minilm_mean.npy --targets golden_logit,golden_z_lc
Hardware  2 CPU cores.
Time      About 5 minutes a target, 10 seeds.
Expected  `experiments/README.md` has the readings.

125 random labels, then 1,000 more in 8, 4, 2 or 1 rounds (at the published size 1,000, then 4,000 in 32 to 4). Compared
is what the last head ranks: the height of a curve of two points is not that of one of nine.
"""

from __future__ import annotations

import pathlib

import suite
from suite import Config, Reading, Records, Study

AXIS = "labels_a_round"


def records(config: Config) -> Records:
    initial, total, sizes = {
        "small": (10, 10, (5, 10)),
        "full": (125, 1000, (125, 250, 500, 1000)),
        "published": (1000, 4000, (125, 250, 500, 1000)),
    }[config.size]
    grid = {AXIS: [{"name": str(size), "batch": size, "rounds": total // size} for size in sizes]}
    return suite.records_of(
        suite.sweep_of(config, "batch_size", seeds=10, grid=grid, rules=suite.TRIO, initial=initial)
    )


def figure(records: Records, stem: pathlib.Path) -> None:
    suite.effect(suite.finals(records, AXIS), stem, "labels per round", "final Spearman")


def table(records: Records) -> suite.Rows:
    return suite.table(records, AXIS, "labels per round")


def readings(records: Records) -> list[Reading]:
    scores = suite.finals(records, AXIS)
    names = list(dict.fromkeys(panel for panel, _, _ in scores))
    sizes = sorted({size for _, size, _ in scores}, key=int)
    words = {
        suite.label(panel, rule, sizes[0], "-", sizes[-1]): ((panel, sizes[0], rule), (panel, sizes[-1], rule))
        for panel in names
        for rule in ("dopt", "greedy_dopt")
    }
    smaller = suite.decide(
        "The smallest batches end better than the largest (final Spearman)", suite.differences(scores, words)
    )
    return [*suite.leads(scores, "batch size", "final Spearman"), smaller]


STUDY = Study("c", "batch_size", "Labels per round", __doc__, records, figure, table, readings)

if __name__ == "__main__":
    suite.main(STUDY)
