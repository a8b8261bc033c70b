"""(d) Width of the reward head.

Claim     The lead of D-optimal selection, which looks at the last hidden layer, does not hang on its width. (Reviewers
          of the paper asked for its hyperparameters; what it found of the width is not known here.)
Command   python experiments/head_width.py --data alpaca_eval_200x20.parquet \\
              --embeddings alpaca_eval_200x20_minilm_mean.npy --targets golden_logit,golden_z_lc
Hardware  2 CPU cores.
Time      About 8 minutes a target, 8 seeds; most of it is compilation, and the widest head.
Expected  `experiments/README.md` has the readings.

Three hidden layers of equal width, and a linear head, whose information is that of the embeddings themselves.
"""

from __future__ import annotations

import pathlib

import suite
from suite import Config, Reading, Records, Study

WIDTHS = {"small": (8,), "full": (16, 32, 64, 128, 256), "published": (64, 128, 256, 512)}


def records(config: Config) -> Records:
    heads = [{"name": str(width), "head": f"mlp:{width},{width},{width}"} for width in WIDTHS[config.size]]
    grid = {"width": [*heads, {"name": "linear", "head": "linear"}]}
    return suite.records_of(suite.sweep_of(config, "head_width", seeds=8, grid=grid, rules=suite.TRIO))


def figure(records: Records, stem: pathlib.Path) -> None:
    suite.effect(suite.areas(records, "width"), stem, "width of the three hidden layers")


def table(records: Records) -> suite.Rows:
    return suite.table(records, "width")


def readings(records: Records) -> list[Reading]:
    return suite.leads(suite.areas(records, "width"), "width")


STUDY = Study("d", "head_width", "Width of the reward head", __doc__, records, figure, table, readings)

if __name__ == "__main__":
    suite.main(STUDY)
