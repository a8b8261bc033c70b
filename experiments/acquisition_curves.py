"""Which rule teaches a reward model fastest, within and across prompts, on real embeddings?

Claim     D-optimal rules need fewer labels than random selection (Shen, Sun, Ton, arXiv 2502.04354).
Command   python experiments/acquisition_curves.py --table alpaca_eval_200x20.parquet \
              --embeddings alpaca_eval_200x20_minilm_mean.npy --out out/acquisition_curves
Hardware  2 CPU cores, about 10 minutes.
Expected  `experiments/README.md` has the table.

One `jarm compare` for each target, kind of pairs and way of fitting the heads. Interrupt it as you like.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import sys

import tyro

from jarm import CompareConfig, JarmError, compare

# The head as jarm fits it; and as in a first look at these data, where nothing keeps it from overfitting.
FITS = {"stopped": {}, "200 steps": {"members": 1, "steps": 200, "holdout": 0.0, "weight_decay": 0.01}}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      table: Parquet table of responses.
      embeddings: .npy array in its row order.
      out: folder; one folder inside for each comparison.
      targets: columns of gold rewards, separated by commas.
      fits: ways of fitting the heads, separated by commas: "stopped", "200 steps".
      pairs: pair spaces, separated by commas.
      seeds: seeds of each comparison.
    """

    table: str
    embeddings: str
    out: pathlib.Path = pathlib.Path("out/acquisition_curves")
    targets: str = "golden_logit,golden_z_lc"
    fits: str = "stopped,200 steps"
    pairs: str = "within,cross"
    seeds: int = 12


def main(config: Config) -> None:
    rows = []
    kinds = itertools.product(config.fits.split(","), config.targets.split(","), config.pairs.split(","))
    for fit, target, pairs in kinds:
        out = config.out / f"{target}-{pairs}-{fit.replace(' ', '-')}"
        print(f"\n{out}")
        settings = {"data": config.table, "embeddings": config.embeddings, "target": target, "pairs": pairs}
        summary = compare(CompareConfig(**settings, **FITS[fit], seeds=config.seeds, out=out))
        rows.append({"fit": fit, "target": target, "pairs": pairs, "rules": summary["rules"]})
    (config.out / "all.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except JarmError as error:
        sys.exit(f"acquisition_curves: {error}")
