"""Harder settings on real embeddings: gold rewards planted in a stated number of directions, and larger budgets.

Claim     Choosing pairs saves labels also where the reward has many directions, which another model's embedding holds;
          and it still does at ten times the budget.
Command   python experiments/planted.py --tables alpaca_eval_200x20.parquet --teacher gemma3_270m_mean \\
              --embeddings minilm_mean --targets planted
          python experiments/planted.py --tables alpaca_eval_200x20.parquet,alpaca_eval_other200x16.parquet \\
              --embeddings minilm_mean,gemma3_270m_mean --targets golden_logit --rounds 20 --batch 250 --seeds 3
Hardware  One CPU core; `experiments/README.md` says how long.
Expected  `experiments/README.md` has the tables.

A table DATA.parquet has its embeddings beside it, DATA_EMBEDDINGS.npy; several tables, which share no prompt, are
joined. The target `planted` stands for `planted_K` of every K of `--directions`: the standardised scores of responses
on the first K principal components of differences within prompts, of the *teacher's* embedding, in equal parts with
random signs. The learner sees another embedding, so that part of the reward is beyond it; the ceiling says how much.
The learner, the first batch and the limit per prompt are the defaults of `jarm compare`.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from jarm import CompareConfig, JarmError, compare
from jarm.report.clusters import centred
from jarm.report.curves import METRIC, curves, references_of, runs_of
from jarm.report.markdown import table as markdown_table
from jarm.report.statistics import label_saving, number
from jarm.runs.records import read_records


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings. Lists are separated by commas.

    Attributes:
      tables: Parquet tables with a column `split`, to be joined.
      embeddings: ends of the names of the learner's embeddings.
      targets: columns of gold rewards; `planted` for those that are planted.
      teacher: end of the name of the embedding in which they are.
      directions: numbers of directions K.
      rules: as of `jarm compare`.
      rounds, batch, initial, seeds: as of `jarm compare`.
      out: folder; one folder inside for each setting.
      workers: runs at a time; 0 takes one per core.
    """

    tables: str
    embeddings: str
    targets: str = "planted"
    teacher: str = ""
    directions: str = "1,4,16,64"
    rules: str = "random,then_random,v_opt,greedy_dopt"
    rounds: int = 8
    batch: int = 50
    initial: int = 50
    seeds: int = 8
    out: pathlib.Path = pathlib.Path("out/planted")
    workers: int = 0


def planted(features: np.ndarray, prompts: np.ndarray, train: np.ndarray, directions: int) -> np.ndarray:
    """Gold rewards `[N]`: scores on the first components of differences within prompts, in equal parts, random signs.

    Args:
      features: `[N, d]` of the teacher.
      prompts: `[N]` numbers of prompts, from 0.
      train: `[N]` responses that components and standard deviations are those of.
      directions: K.
    """
    within = np.stack([centred(column, prompts) for column in features.T.astype(np.float64)], axis=1)
    axes = np.linalg.svd(within[train], full_matrices=False)[2][:directions]
    scores = within @ axes.T
    signs = np.random.default_rng(directions).choice([-1.0, 1.0], directions)
    return np.asarray(scores / scores[train].std(axis=0) @ signs / np.sqrt(directions))


def joined(config: Config) -> tuple[str, dict[str, str]]:
    """Path of the joined table with its planted columns, and of each embedding."""
    paths = [pathlib.Path(path) for path in config.tables.split(",")]
    config.out.mkdir(parents=True, exist_ok=True)
    names = [each for each in {*config.embeddings.split(","), config.teacher} if each]
    arrays = {
        name: np.concatenate([np.load(path.with_name(f"{path.stem}_{name}.npy")) for path in paths]) for name in names
    }
    rows = pa.concat_tables([pq.read_table(path) for path in paths], promote_options="permissive")
    if config.teacher:
        prompts = np.unique(np.asarray(rows["prompt_id"]), return_inverse=True)[1]
        train = np.asarray(rows["split"]) == "train"
        for count in map(int, config.directions.split(",")):
            gold = planted(arrays[config.teacher], prompts, train, count)
            rows = rows.append_column(f"planted_{count}", pa.array(gold))
    pq.write_table(rows, config.out / "table.parquet")
    for name, array in arrays.items():
        np.save(config.out / f"{name}.npy", array)
    return str(config.out / "table.parquet"), {name: str(config.out / f"{name}.npy") for name in names}


def rows_of(name: str, records: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each rule: its curve at three numbers of labels; of others than random, less that of random."""
    runs = runs_of(records)
    seeds = sorted(set.intersection(*(set(each) for each in runs.values())))
    labels = np.array([record["labels"] for record in runs["random"][seeds[0]]], np.float64)
    base = curves(runs["random"], METRIC, seeds)
    ceiling = references_of(records).get("ceiling", {}).get(METRIC, np.nan)
    at = [0, int(np.argmin(np.abs(labels - labels[-1] / 4))), -1]
    heights = [number(base.mean(axis=0)[place]) for place in at]
    found = [[f"{name}; ceiling {number(ceiling)}", "random", *heights, number(base.mean()), ""]]
    for rule in runs:
        if rule == "random":
            continue
        own = curves(runs[rule], METRIC, seeds)
        gains = [*(own - base)[:, at].T, (own - base).mean(axis=1)]
        cells = [f"{gain.mean():+.3f} ({gain.std(ddof=1) / np.sqrt(len(seeds)):.3f})" for gain in gains]
        saving = label_saving(labels, own, labels, base)
        found.append(["", rule, *cells, f"{saving.ratio.mean:.1f} {saving.bound}".strip()])
    return found


def main(config: Config) -> None:
    data, arrays = joined(config)
    targets = [
        name
        for target in config.targets.split(",")
        for name in ([f"planted_{k}" for k in config.directions.split(",")] if target == "planted" else [target])
    ]
    rows, shared = [], ("rules", "rounds", "batch", "initial", "seeds", "workers")
    for learner, target in itertools.product(config.embeddings.split(","), targets):
        options = {name: getattr(config, name) for name in shared}
        out = config.out / f"{learner}-{target}"
        compare(
            CompareConfig(data=data, embeddings=arrays[learner], target=target, noise_free="no", out=out, **options)
        )
        rows += rows_of(f"{learner}, {target}", read_records(out))
        labels = [config.initial, "a quarter", config.initial + config.rounds * config.batch]
        head = ["learner's embedding, target", "rule", *(f"at {each}" for each in labels), "mean", "times fewer labels"]
        (config.out / "table.md").write_text("\n".join(markdown_table(head, rows)) + "\n")
    print((config.out / "table.md").read_text())


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except JarmError as error:
        sys.exit(f"planted: {error}")
