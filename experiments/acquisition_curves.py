"""Which rule teaches a reward model fastest, within and across prompts, on real embeddings?

Claim     D-optimal rules need fewer labels than random selection (Shen, Sun, Ton, arXiv 2502.04354).
Command   python experiments/acquisition_curves.py --table alpaca_eval_200x20.parquet \
              --embeddings alpaca_eval_200x20_minilm_mean.npy --out out/acquisition_curves
Hardware  2 CPU cores, about 20 minutes.
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
from jarm.core.files import write_whole
from jarm.runs.config import PAPER

# The head as jarm fits it, and as in a first look at these data, where nothing keeps it from overfitting; each also on
# embeddings as they are, of norm 1.
LOOSE = {"members": 1, "steps": 200, "holdout": 0.0, "weight_decay": 0.01}
RAW = {"standardise": False}
FITS = {"stopped": {}, "stopped, raw": RAW, "200 steps": LOOSE, "200 steps, raw": LOOSE | RAW}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      table: Parquet table of responses.
      embeddings: .npy array in its row order.
      out: folder; one folder inside for each comparison.
      targets: columns of gold rewards, separated by commas.
      fits: ways of fitting, separated by semicolons: "stopped", "stopped, raw", "200 steps", "200 steps, raw".
      pairs: pair spaces, separated by commas.
      seeds: seeds of each comparison.
    """

    table: str
    embeddings: str
    out: pathlib.Path = pathlib.Path("out/acquisition_curves")
    targets: str = "golden_logit,golden_z_lc"
    fits: str = "; ".join(FITS)
    pairs: str = "within,cross"
    seeds: int = 12


def main(config: Config) -> None:
    rows = []
    fits = [name.strip() for name in config.fits.split(";")]
    unknown = [name for name in fits if name not in FITS]
    if unknown:
        raise JarmError(f"There is no way of fitting called {unknown[0]!r}: choose from {'; '.join(FITS)}.")
    for fit, target, pairs in itertools.product(fits, config.targets.split(","), config.pairs.split(",")):
        out = config.out / f"{target}-{pairs}-{fit.replace(',', '').replace(' ', '-')}"
        print(f"\n{out}")
        settings = {"data": config.table, "embeddings": config.embeddings, "target": target, "pairs": pairs}
        summary = compare(CompareConfig(**{**PAPER, **settings, **FITS[fit]}, seeds=config.seeds, out=out))
        rows.append({"fit": fit, "target": target, "pairs": pairs, "rules": summary["rules"]})
    write_whole(config.out / "all.json", json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except JarmError as error:
        sys.exit(f"acquisition_curves: {error}")
