"""Every acquisition rule on real embeddings: a league table, corrected for the number of rules compared.

Claim     Some rules teach a reward model faster than random pairs, and what a batch is like predicts which.
Command   python experiments/league.py --table alpaca_eval_200x20.parquet \\
              --embeddings alpaca_eval_200x20_minilm_mean.npy
Hardware  2 CPU cores, about half an hour of one core for each of the four settings; interrupt it as you like.
Expected  `experiments/README.md` has the tables.

`jarm compare` of all rules of `jarm rules`, first on `--seeds` seeds, then on `--more` for random, the best five and
the D-optimal family, for each target and kind of pairs. The table has the mean test Spearman over labels (area under
the curve), its difference from random on the same seeds, an interval for that rule alone, and one that holds for all
rules together: Bonferroni's, for twice as many comparisons as there are rules, because each is looked at after
`--seeds` or after `--more` of them. The best five were chosen by the first seeds, in whose favour the mean of all is;
the column "fresh seeds" has the others alone. At last, how well each description of the batches orders the rules by
what they gained; `..._marginal` rules, nearly copies, are left out of that.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
import sys
from typing import Any

import numpy as np
import tyro

from jarm import CompareConfig, JarmError, compare
from jarm.core.files import write_whole
from jarm.report.curves import area, runs_of
from jarm.report.statistics import bootstrap_ci, simultaneous_ci
from jarm.runs.config import PAPER
from jarm.runs.records import read_records

FAMILY = ("xtx", "dopt", "pa_dopt", "greedy_dopt", "greedy_dopt_blind", "adpo")
"""The D-optimal family, which gets more seeds whatever its rank."""
DESCRIPTIONS = (
    "diversity_log_det",
    "diversity_distance",
    "distinct_responses",
    "distinct_prompts",
    "mean_fisher_weight",
    "mean_member_variance",
    "mean_gold_gap",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      table: Parquet table of responses; "synthetic" for the built-in data.
      embeddings: .npy array in its row order.
      out: folder; one folder inside for each setting.
      targets: columns of gold rewards, separated by commas.
      pairs: pair spaces, separated by commas.
      rules: "all", or rules separated by commas.
      seeds: seeds of every rule.
      more: seeds of random, the best five and the D-optimal family.
    """

    table: str = "synthetic"
    embeddings: str | None = None
    out: pathlib.Path = pathlib.Path("out/league")
    targets: str = "golden_logit,golden_z_lc"
    pairs: str = "within,cross"
    rules: str = "all"
    seeds: int = 16
    more: int = 30


def areas_of(records: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Rule -> seed -> mean Spearman over labels."""
    runs = runs_of(records)
    return {rule: {seed: area(run) for seed, run in by_seed.items()} for rule, by_seed in runs.items() if by_seed}


def league(records: list[dict[str, Any]], first: int) -> list[dict[str, Any]]:
    """A row for each rule, best first: its area, and its gain over random on the same seeds; those from `first` on."""
    runs, areas = runs_of(records), areas_of(records)
    base, rows = areas["random"], []
    for rule, own in areas.items():
        paired = {seed: own[seed] - base[seed] for seed in own if seed in base}
        common = [value for seed, value in own.items() if seed < first]
        row: dict[str, Any] = {"rule": rule, "area": float(np.mean(common)), "seeds": len(own)}
        if rule != "random":
            gains = np.array(list(paired.values()))
            row["alone"], row["simultaneous"] = bootstrap_ci(gains), simultaneous_ci(gains, 2 * (len(areas) - 1))
            row["fresh"] = bootstrap_ci(np.array([gain for seed, gain in paired.items() if seed >= first]))
        for name in DESCRIPTIONS:
            known = [line[f"batch_{name}"] for run in runs[rule].values() for line in run[1:]]
            row[name] = float(np.mean(known))
        rows.append(row)
    return sorted(rows, key=lambda row: -(row["alone"].mean if "alone" in row else 0))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, equal values sharing their ranks; NaN where all are equal."""
    ranks = [(np.searchsorted(np.sort(v), v) + np.searchsorted(np.sort(v), v, "right")) / 2 for v in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1]) if all(np.ptp(rank) > 0 for rank in ranks) else math.nan


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, and what orders the rules."""
    lines = [
        "| rule | seeds | mean Spearman | against random | all rules together | fresh seeds |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = ["", "", ""]
        if "alone" in row:
            alone, simultaneous, fresh = row["alone"], row["simultaneous"], row["fresh"]
            cells = [f"{alone.mean:+.3f} ({alone.low:.3f} to {alone.high:.3f})"]
            cells.append(f"{simultaneous.low:.3f} to {simultaneous.high:.3f}")
            if simultaneous.low > 0 or simultaneous.high < 0:
                cells = [f"**{cell}**" for cell in cells]
            cells.append(f"{fresh.mean:+.3f} ({fresh.low:.3f} to {fresh.high:.3f})" if fresh.seeds > 1 else "")
        lines.append(f"| {row['rule']} | {row['seeds']} | {row['area']:.3f} | {' | '.join(cells)} |")
    others = [row for row in rows if "alone" in row and not row["rule"].endswith("_marginal")]
    if len(others) > 3:
        gains = np.array([row["alone"].mean for row in others])
        lines += ["", "| a batch's | rank correlation with the gain, over rules |", "|---|--:|"]
        for name in DESCRIPTIONS:
            lines.append(f"| {name} | {rank_correlation(np.array([row[name] for row in others]), gains):+.2f} |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    synthetic = config.table.startswith("synthetic")
    targets = [None] if synthetic else config.targets.split(",")
    for target, pairs in itertools.product(targets, config.pairs.split(",")):
        out = config.out / f"{target or config.table}-{pairs}".replace(":", "-")
        settings = {"data": config.table, "embeddings": config.embeddings, "target": target, "pairs": pairs, "out": out}
        settings = {**PAPER, **settings}
        records = compared(CompareConfig(**{**settings, "rules": config.rules}, seeds=config.seeds))
        rows = league(records, config.seeds)
        if config.more > config.seeds:
            best = [row["rule"] for row in rows if row["rule"] != "random"][:5]
            run = {row["rule"] for row in rows}
            wanted = [rule for rule in dict.fromkeys([*best, *FAMILY]) if rule in run]
            records = compared(CompareConfig(**{**settings, "rules": ",".join(wanted)}, seeds=config.more))
            rows = league(records, config.seeds)
        rounded = {
            rule: {seed: round(height, 5) for seed, height in own.items()} for rule, own in areas_of(records).items()
        }
        write_whole(out / "areas.json", json.dumps(rounded) + "\n")
        write_whole(out / "league.md", markdown(rows))
        print(f"\n{out / 'league.md'}\n{markdown(rows)}")


def compared(config: CompareConfig) -> list[dict[str, Any]]:
    """All records of a folder, those of other commands included."""
    compare(config)
    return read_records(config.out)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except JarmError as error:
        sys.exit(f"league: {error}")
