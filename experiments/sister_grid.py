"""Loss, noise, number of labels and pairs: a slice of the grid of *Rethinking Bradley-Terry Models*, on random pairs.

Claim     Classifying each response by itself is as good as a Bradley-Terry loss where labels are noisy, which is ahead
          where hardly any is wrong; pairs across prompts help (Sun, Shen, Ton, arXiv 2411.04991, figures 2 to 6).
Command   python experiments/sister_grid.py --table alpaca_eval_200x20.parquet \\
              --embeddings alpaca_eval_200x20_minilm_mean.npy --target golden_logit
Hardware  2 CPU cores, about eight minutes; interrupt it as you like.
Expected  `experiments/README.md` has the reading, results/ the table.

2 losses x 6 levels of noise x 4 numbers of labels x 3 kinds of pairs x 5 seeds, 720 runs of one fit each; the published
grid has 12,960. Pairs are drawn at random; the published designs that choose pairs by their gold rewards are not here.
Intervals are of each cell alone: of 72, three or four leave out 0 by chance.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import sys
import time

import numpy as np
import tyro

from jarm import CompareConfig, JarmError, SweepConfig, sweep
from jarm.core.files import write_whole
from jarm.report.curves import METRIC, curve
from jarm.report.statistics import bootstrap_ci, paired_difference
from jarm.runs.config import PAPER
from jarm.runs.records import read_records

LOSSES = ("bradley_terry", "classification")
NOISES = (0.5, 0.7, 1.0, 3.0, 5.0, 10.0)
PAIRS = ("within", "cross", "all")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      table: Parquet table of responses; "synthetic" for the built-in data.
      embeddings: .npy array in its row order.
      target: column of gold rewards.
      labels: numbers of labels, separated by commas.
      seeds: of each set-up.
      members: heads in the ensemble.
      out: folder.
    """

    table: str = "synthetic"
    embeddings: str | None = None
    target: str | None = None
    labels: str = "500,1000,2000,4000"
    seeds: int = 5
    members: int = 1
    out: pathlib.Path = pathlib.Path("out/sister_grid")


def main(config: Config) -> None:
    given = {
        "data": config.table,
        "embeddings": config.embeddings,
        "target": config.target,
        "rules": "random",
        "rounds": 0,
        "seeds": config.seeds,
        "members": config.members,
        "out": config.out,
    }
    base = CompareConfig(**{**PAPER, **given})
    labels = [int(number) for number in config.labels.split(",")]
    grid = {"loss": LOSSES, "noise": NOISES, "initial": labels, "pairs": PAIRS}
    start = time.perf_counter()
    sweep(SweepConfig(base, grid))
    print(f"{time.perf_counter() - start:.0f} s of this command")
    lines = read_records(config.out)
    text = markdown([line for line in lines if line["kind"] == "run"], labels)
    write_whole(config.out / "sister_grid.md", text)
    print(text)


def markdown(lines: list[dict[str, object]], labels: list[int]) -> str:
    """Spearman of the Bradley-Terry loss, and how much better classification is on the same seeds, by setting."""
    found: dict[tuple[object, ...], dict[object, float]] = {}
    wrong: dict[float, list[float]] = {}
    for line in lines:
        place = line["loss"], line["noise"], line["initial"], line["pairs"]
        found.setdefault(place, {})[line["seed"]] = curve([line], METRIC)[0]
        wrong.setdefault(line["noise"], []).append(line["label_error"])
    text = [
        "| noise | wrong labels | pairs | " + " | ".join(f"{n} labels | classification" for n in labels) + " |",
        "|--:|--:|---|" + "--:|--:|" * len(labels),
    ]
    for noise, pairs in itertools.product(NOISES, PAIRS):
        cells = []
        for n in labels:
            one, other = (found[loss, noise, n, pairs] for loss in LOSSES)
            seeds = sorted(one.keys() & other.keys())
            gain = paired_difference(np.array([other[s] for s in seeds]), np.array([one[s] for s in seeds]))
            mean = bootstrap_ci(np.array(list(one.values()))).mean
            ends = f" ({gain.low:+.3f} to {gain.high:+.3f})" if len(seeds) > 1 else ""
            cells += [f"{mean:.3f}", f"{gain.mean:+.3f}{ends}"]
        text.append(f"| {noise:g} | {np.mean(wrong[noise]):.1%} | {pairs} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except JarmError as error:
        sys.exit(f"sister_grid: {error}")
