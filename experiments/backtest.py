"""Would choosing pairs have saved labels on pairs that people have labelled? `jarm backtest` on human pairs.

Claim     On recorded human pairs some rule of `jarm compare`'s defaults needs fewer labels than random.
Command   python experiments/backtest.py --data human_pairs_small.parquet \\
              --embeddings out/human_minilm,out/human_wordllama --response-columns response_a response_b \\
              --votes n_votes_a n_votes_b n_votes_tie
Hardware  2 CPU cores.
Time      4 to 10 minutes for each store of embeddings, beside `jarm embed` (WordLlama: see the README).
Expected  `experiments/README.md` has the readings, and `experiments/results/backtest_*.json` the curves.

For each store of embeddings a folder of `jarm backtest`, and a file beside it with its answer, the mean learning curve
of every rule and its difference from random.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np
import tyro

from jarm import BacktestConfig, JarmError, backtest
from jarm.core.compiled import keep_compiled
from jarm.core.files import write_whole
from jarm.core.streams import show

KEPT = ("labels", "pair_accuracy", "area", "final", "area_gain_together", "labels_needed", "verdict")
"""What the result has of each rule."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      data: a file of pairs, as `jarm backtest` takes it.
      embeddings: stores of its texts, separated by commas.
      response_columns, label, votes: as of `jarm backtest`.
      rules: separated by commas.
      seeds: of every rule.
      out: folder; one folder and one file inside for each store.
    """

    data: str
    embeddings: str
    response_columns: tuple[str, ...] = ()
    label: str | None = None
    votes: tuple[str, ...] = ()
    rules: str = BacktestConfig.rules
    seeds: int = BacktestConfig.seeds
    out: pathlib.Path = pathlib.Path("out/experiments/backtest")


def shortened(value: Any) -> Any:
    """A tree with its numbers to four digits."""
    if isinstance(value, dict):
        return {name: shortened(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shortened(each) for each in value]
    return round(value, 4) if isinstance(value, float) and np.isfinite(value) else value


def result_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The part of a summary that is kept."""
    rules = {rule: {name: row[name] for name in KEPT if name in row} for rule, row in summary["rules"].items()}
    kept = {name: summary[name] for name in ("answer", "reference", "provenance", "settings")}
    return shortened({**kept, "rules": rules})


def main(config: Config) -> None:
    keep_compiled()
    shared = {name: getattr(config, name) for name in ("data", "response_columns", "label", "votes", "rules", "seeds")}
    for store in config.embeddings.split(","):
        name = f"{pathlib.Path(config.data).stem}-{pathlib.Path(store).name}"
        summary = backtest(BacktestConfig(**shared, embeddings=store, out=config.out / name))
        write_whole(config.out / f"backtest_{name}.json", json.dumps(result_of(summary), indent=1) + "\n")
        show(f"{name}: {summary['answer']}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except JarmError as error:
        sys.exit(f"backtest: {error}")
