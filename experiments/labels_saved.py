"""What saves labels? Learners, metrics, first batches and rules on real embeddings, each against random labels.

Claim     A linear head with a Gaussian prior learns from random labels what MLPs learn, in a fraction of the time; and
          a first batch chosen without labels teaches more than a random one.
Command   python experiments/labels_saved.py --table alpaca_eval_200x20.parquet \\
              --embeddings alpaca_eval_200x20_minilm_mean.npy,alpaca_eval_200x20_gemma3_270m_mean.npy
Hardware  2 CPU cores, about ten minutes of one core for each embedding, target and kind of pairs; interrupt it as
          you like.
Expected  `docs/choosing.md` has the table.

An arm is a learner, a metric, a first batch and a rule; all arms of a setting share seeds. For every arm the table has
the test Spearman after the first batch, its mean over later rounds and its last value, less those of random labels with
the learner of `--against`; and the labels that it needs for what these random labels end with. Intervals of one setting
hold for all arms of all settings together (Bonferroni's), those of numbers of labels for one arm alone; those over
settings run from the least to the largest mean.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import sys
from typing import Any

import numpy as np
import tyro

from jarm import CompareConfig, JarmError, compare
from jarm.core.files import write_whole
from jarm.report.curves import METRIC, curves, runs_of
from jarm.report.markdown import table as markdown_table
from jarm.report.statistics import LabelSaving, interval, label_saving, number, simultaneous_ci
from jarm.runs.records import read_records

Curves = dict[int, np.ndarray]
"""Seed -> test Spearman over rounds."""
LEARNERS: dict[str, dict[str, Any]] = {
    "mlp": {"head": "mlp:64,64,64", "metric": "none"},
    "laplace": {"head": "laplace", "metric": "none"},
    "laplace-2": {"head": "laplace", "metric": "within:2:128"},
}
"""Name -> options of `jarm compare`."""
ARMS: dict[str, dict[str, str]] = {
    "mlp": {"random": "random"},
    "laplace": {"random": "random"},
    "laplace-2": {
        "random": "random,v_opt,greedy_dopt",
        "v_opt": "then_random,v_opt,greedy_dopt",
        "d_opt": "then_random,greedy_dopt",
    },
}
"""Learner -> first batch -> rules; with one that is chosen, `random` is run, too, but stands there already."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings. Lists are separated by commas.

    Attributes:
      table: Parquet table of responses; "synthetic" or a variant of it for built-in data.
      embeddings: .npy arrays in its row order.
      targets: columns of gold rewards.
      pairs: pair spaces.
      learners: of `mlp`, `laplace`, and `laplace-2`, which has the metric within:2:128.
      against: learner whose random labels the others are held against.
      per_prompt: largest number of pairs per prompt in later batches; 0 is no limit.
      seeds: of every arm.
      annotator: as of `jarm compare`.
      out: folder; one folder inside for each setting and arm.
      workers: runs at a time; 0 takes one per core.
    """

    table: str = "synthetic"
    embeddings: str = ""
    targets: str = "golden_logit,golden_z_lc"
    pairs: str = "within,cross"
    learners: str = ",".join(LEARNERS)
    against: str = "laplace-2"
    per_prompt: int = 1
    seeds: int = 20
    annotator: str = "bradley_terry"
    out: pathlib.Path = pathlib.Path("out/labels_saved")
    workers: int = 0


def settings_of(config: Config) -> dict[str, dict[str, Any]]:
    """Name -> options of `jarm compare` that say which data and pairs."""
    if config.table.startswith("synthetic"):
        rows: dict[str, dict[str, Any]] = {
            f"{config.table}, {pairs}".replace(":", "-"): {"pairs": pairs} for pairs in config.pairs.split(",")
        }
    else:
        every = itertools.product(*(text.split(",") for text in (config.embeddings, config.targets, config.pairs)))
        rows = {
            f"{pathlib.Path(array).stem}, {target}, {pairs}": {"embeddings": array, "target": target, "pairs": pairs}
            for array, target, pairs in every
        }
    return {name: {"data": config.table, "annotator": config.annotator, **row} for name, row in rows.items()}


def runs_of_arms(config: Config, setting: dict[str, Any], out: pathlib.Path) -> tuple[np.ndarray, dict[str, Curves]]:
    """Label counts; and arm -> seed -> curve, arms named "learner, first batch, rule"."""
    found: dict[str, Curves] = {}
    labels = np.zeros(0)
    for learner in config.learners.split(","):
        for first, rules in ARMS[learner].items():
            folder = out / f"{learner}-{first}"
            options = {**setting, **LEARNERS[learner], "first": first, "per_prompt": config.per_prompt}
            if learner == "mlp":
                options["per_prompt"] = 0
            compare(CompareConfig(**options, rules=rules, seeds=config.seeds, out=folder, workers=config.workers))
            runs = runs_of(read_records(folder))
            for rule in rules.split(","):
                labels = np.array([record["labels"] for record in next(iter(runs[rule].values()))], np.float64)
                own = curves(runs[rule], METRIC, sorted(runs[rule]))
                found[f"{learner}, {first}, {rule}"] = dict(zip(sorted(runs[rule]), own, strict=True))
    return labels, found


def gains(own: Curves, base: Curves) -> dict[str, np.ndarray]:
    """Differences on the same seeds, `[S]`: at the first batch, on average later, and at last."""
    difference = np.array([own[seed] - base[seed] for seed in sorted(base)])
    return {"first": difference[:, 0], "later": difference[:, 1:].mean(axis=1), "last": difference[:, -1]}


def saving_of(labels: np.ndarray, own: Curves, base: Curves) -> LabelSaving:
    """Labels that an arm needs for what the baseline ends with."""
    pair = [np.array([arm[seed] for seed in sorted(base)]) for arm in (own, base)]
    return label_saving(labels, pair[0], labels, pair[1])


def rows_of(name: str, labels: np.ndarray, arms: dict[str, Curves], base: str, together: int) -> list[list[str]]:
    """Rows of the table of one setting."""
    heights = np.array([arms[base][seed] for seed in sorted(arms[base])]).mean(axis=0)
    rows = [[name, base, *(number(h) for h in (heights[0], heights[1:].mean(), heights[-1])), ""]]
    for arm, own in arms.items():
        if arm != base:
            cells = []
            for values in gains(own, arms[base]).values():
                found = simultaneous_ci(values, together)
                sure = "**" if found.low > 0 or found.high < 0 else ""
                cells.append(f"{sure}{found.mean:+.3f}{sure} {interval(found.low, found.high)}")
            saving = saving_of(labels, own, arms[base])
            fewer = f"{saving.ratio.mean:.1f} {saving.bound}".strip()
            rows.append(["", arm, *cells, f"{fewer} ({saving.ratio.low:.1f} to {saving.ratio.high:.1f})"])
    return rows


def pooled_rows(results: dict[str, tuple[np.ndarray, dict[str, Curves]]], base: str) -> list[list[str]]:
    """Each arm over settings: the mean and the worst of its mean gains, and how often it saves labels by half."""
    rows, arms = [], list(next(iter(results.values()))[1])
    for arm in arms:
        if arm == base:
            continue
        of_setting = [gains(found[arm], found[base]) for _, found in results.values()]
        cells = []
        for when in of_setting[0]:
            means = np.array([float(each[when].mean()) for each in of_setting])
            cells.append(f"{means.mean():+.3f} ({means.min():+.3f} to {means.max():+.3f})")
        ratios = np.array([saving_of(labels, found[arm], found[base]).ratio.mean for labels, found in results.values()])
        rows.append([arm, *cells, f"{np.median(ratios):.1f}, {int((ratios >= 1.5).sum())} of {len(ratios)}"])
    return rows


def main(config: Config) -> None:
    results = {}
    for name, setting in settings_of(config).items():
        results[name] = runs_of_arms(config, setting, config.out / name.replace(", ", "-"))
        print(f"{name}: {len(results[name][1])} arms", flush=True)
    base = f"{config.against}, random, random"
    together = 3 * sum(len(found) - 1 for _, found in results.values())
    rows = [row for name, (labels, found) in results.items() for row in rows_of(name, labels, found, base, together)]
    first = next(iter(results.values()))[0]
    budget = [f"at {first[0]:.0f}", f"mean of {first[1]:.0f} to {first[-1]:.0f}", f"at {first[-1]:.0f}"]
    pooled = markdown_table(
        [
            "over settings",
            *(f"{each}, mean (least to most)" for each in budget),
            "times fewer labels: median, 1.5 or more",
        ],
        pooled_rows(results, base),
    )
    single = markdown_table(["setting", "learner, first batch, rule", *budget, "times fewer labels"], rows)
    rounded = {
        name: {arm: {seed: np.round(curve, 4).tolist() for seed, curve in own.items()} for arm, own in found.items()}
        for name, (_, found) in results.items()
    }
    write_whole(config.out / "curves.json", json.dumps(rounded) + "\n")
    write_whole(config.out / "table.md", "\n".join([*pooled, "", *single]) + "\n")
    print("\n".join([*pooled, "", *single]))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except JarmError as error:
        sys.exit(f"labels_saved: {error}")
