"""(j) Noise of the labels.

Claim     At beta = 10 fewer than 5 % of the labels are wrong, and at small beta up to 40 % (Shen, Sun, Ton, arXiv
          2502.04354). The lead of D-optimal selection does not hang on the noise.
Command   python experiments/label_noise.py --data alpaca_eval_200x20.parquet \\
              --embeddings alpaca_eval_200x20_minilm_mean.npy --targets golden_logit,golden_z_lc
Hardware  2 CPU cores.
Time      About 4 minutes a target, 8 seeds.
Expected  `experiments/README.md` has the readings.

P(first preferred) = sigmoid(beta * gold difference / standard deviation), for beta = .5, 1, 2, 5, 10; -1 is one
that is never wrong. Wrong labels are counted; those of random pairs are what the first claim is held against.
"""

from __future__ import annotations

import pathlib

import numpy as np
import suite
from suite import Config, Reading, Records, Study

NOISES = (0.5, 1.0, 2.0, 5.0, 10.0, -1.0)


def records(config: Config) -> Records:
    return suite.records_of(suite.sweep_of(config, "label_noise", seeds=8, grid={"noise": NOISES}, rules=suite.TRIO))


def figure(records: Records, stem: pathlib.Path) -> None:
    suite.effect(_named(suite.areas(records, "noise")), stem, "beta of the annotator, noisiest first")


def table(records: Records) -> suite.Rows:
    return suite.table(records, "noise", "beta")


def readings(records: Records) -> list[Reading]:
    wrong = suite.finals(records, "noise", "label_error")
    shares = {
        suite.label(panel, "beta", value): np.array(list(own.values()))
        for (panel, value, rule), own in wrong.items()
        if rule == "random"
    }
    few = {f"5 % less those at {name}": 0.05 - each for name, each in shares.items() if name.endswith("beta 10.0")}
    many = {f"those at {name}, less 25 %": each - 0.25 for name, each in shares.items() if name.endswith("beta 0.5")}
    return [
        suite.decide("At beta = 10, fewer than 5 % of the labels of random pairs are wrong", few),
        suite.decide("At beta = .5, more than a quarter of them are", many),
        *suite.leads(_named(suite.areas(records, "noise")), "noise"),
    ]


def _named(scores: suite.Scores) -> suite.Scores:
    """An annotator without noise by its name."""
    return {(panel, "none" if value < 0 else f"{value:g}", rule): own for (panel, value, rule), own in scores.items()}


STUDY = Study("j", "label_noise", "Noise of the labels", __doc__, records, figure, table, readings)

if __name__ == "__main__":
    suite.main(STUDY)
