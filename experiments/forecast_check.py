"""Forecasts of labels saved, against what happens where the gold rewards are known.

Claim     The labels that `jarm forecast` expects a way of choosing pairs to save go with those that it does save:
          over all settings the rank correlation is at least .6, and "random pairs are enough" is right in at least
          80 % of them.
Command   python experiments/forecast_check.py --data alpaca_eval_200x20.parquet,alpaca_eval_other200x16.parquet \\
              --embeddings minilm_mean,gemma3_270m_last,gemma3_270m_mean --targets golden_logit,golden_z_lc
Hardware  2 CPU cores.
Time      See `experiments/README.md`.
Expected  `experiments/README.md` has the table. The family of teachers was written down before these numbers.

A table DATA.parquet has its embeddings beside it, DATA_EMBEDDINGS.npy. Realised: runs on the true gold rewards,
beta = 2, random pairs throughout against the arms, seed by seed. Forecast: without labels, and with random pairs
labelled by the same annotator. Both are read by `jarm.report.forecast.labels_saved`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jarm import AnnotatorConfig, ForecastConfig, forecast
from jarm.core.files import write_whole
from jarm.core.settings import make_key
from jarm.core.streams import say, show
from jarm.data.datasets import load
from jarm.data.tables import load_table
from jarm.evaluation.annotators import annotate
from jarm.loop.device_table import prepare
from jarm.report.forecast import Saved, labels_saved
from jarm.report.markdown import table as markdown_table
from jarm.runs.programs import keep_compiled
from jarm.runs.simulated import Drawn, HeldOut, make_campaigns

NOISE = 2.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      data: Parquet tables, separated by commas.
      embeddings: ends of the names of their embeddings, separated by commas.
      targets: columns of gold rewards, separated by commas.
      pairs: kinds of pairs, separated by commas.
      labels: numbers of real labels that forecasts have, separated by commas.
      seeds: realised campaigns of each arm.
      campaigns: simulated ones of each forecast.
      out: folder; finished settings in it are not made again.
    """

    data: str
    embeddings: str
    targets: str
    pairs: str = "within,cross"
    labels: str = "0,50,150"
    seeds: int = 48
    campaigns: int = 2000
    out: pathlib.Path = pathlib.Path("out/forecast_check")


def realised(config: ForecastConfig, target: str, seeds: int) -> dict[str, Saved]:
    """What each arm saves on the true gold rewards."""
    tables = load(config.data, embeddings=config.embeddings, target=target, metric=config.metric)
    curves = {}
    for first in config.first_names():
        loop = config.loop(first)
        table, hparams, _ = prepare(loop, tables.train, config.hparams())
        test = HeldOut(jnp.asarray(tables.test.embeddings()), jnp.asarray(tables.test.mask))
        program, gold = make_campaigns(loop), jnp.asarray(tables.test.gold, jnp.float32)
        keys = jax.vmap(make_key)(jnp.arange(seeds, dtype=jnp.uint32))
        drawn = Drawn(
            key=keys,
            noise=jnp.full(seeds, NOISE, jnp.float32),
            train=jnp.broadcast_to(table.gold, (seeds, *table.gold.shape)),
            test=jnp.broadcast_to(gold, (seeds, *gold.shape)),
        )
        for at, rule in enumerate(config.rule_names()):
            found = program(hparams, table, test, drawn, jnp.int32(at))
            assert not np.asarray(found.status).any(), (config, target, first, rule)
            curves[f"{first}+{rule}"] = np.asarray(found.spearman, np.float64)
    labels = config.initial + config.batch * np.arange(config.rounds + 1)
    baseline = curves.pop("random+random")
    return {arm: labels_saved(labels, each, baseline) for arm, each in curves.items()}


def write_labels(path: pathlib.Path, config: ForecastConfig, target: str, count: int, seed: int = 0) -> None:
    """Label random pairs by the true gold rewards: a file as `jarm forecast --labels` takes it."""
    train = load_table(config.data, str(config.embeddings), target).train
    rng, real = np.random.default_rng(seed), np.flatnonzero(train.mask)
    width, pairs = train.mask.shape[1], list[tuple[int, int]]()
    while len(pairs) < count:
        first, second = rng.choice(real, 2, replace=False).tolist()
        if config.pairs == "within":
            inside = np.flatnonzero(train.mask[first // width]) + first // width * width
            second = int(rng.choice(inside))
        if first != second and (config.pairs != "cross" or first // width != second // width):
            pairs.append((first, second))
    gold = np.asarray(train.gold, np.float64)
    scaled = jnp.asarray((gold / gold[train.mask].std()).reshape(-1), jnp.float32)
    key, ends = make_key(1_000_000 + seed), jnp.asarray(pairs, jnp.int32)
    lengths = jnp.zeros(gold.size, jnp.float32)
    answers, _ = annotate(key, AnnotatorConfig(), jnp.float32(NOISE), ends, scaled, lengths)
    rows = train.rows.reshape(-1)
    lines = [
        json.dumps({"first": int(rows[first]), "second": int(rows[second]), "label": float(label)})
        for (first, second), label in zip(pairs, np.asarray(answers), strict=True)
    ]
    write_whole(path, "\n".join(lines) + "\n")


def rows_of(config: Config, data: str, embeddings: str, target: str, pairs: str) -> list[dict[str, Any]]:
    """One setting: a row for each arm."""
    name = f"{pathlib.Path(data).stem}-{embeddings}-{target}-{pairs}"
    folder, done = config.out / name, config.out / name / "rows.json"
    if done.is_file():
        return list(json.loads(done.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    array = pathlib.Path(data).with_name(f"{pathlib.Path(data).stem}_{embeddings}.npy")
    base = ForecastConfig(data=data, embeddings=str(array), pairs=pairs, campaigns=config.campaigns)
    true, forecasts = realised(base, target, config.seeds), {}
    for count in map(int, config.labels.split(",")):
        labels = None
        if count:
            labels = str(folder / f"labels-{count}.jsonl")
            write_labels(pathlib.Path(labels), base, target, count)
        # Without labels the target is not read: one forecast for all targets.
        out = folder / f"forecast-{count}" if count else config.out / f"{name.replace(f'-{target}', '')}-unlabelled"
        own = dataclasses.replace(base, labels=labels, out=out)
        path = out / "forecast.json"
        forecasts[count] = json.loads(path.read_text()) if path.is_file() else forecast(own)
    rows = [
        {
            "setting": name,
            "arm": arm,
            "realised": {"ratio": saved.ratio, "gain": saved.gain, "enough": saved.random_is_enough},
            "forecast": {
                str(count): {each: found["arms"][arm][each] for each in ("ratio", "gain", "ahead", "random_is_enough")}
                for count, found in forecasts.items()
            },
        }
        for arm, saved in true.items()
    ]
    write_whole(done, json.dumps(rows, indent=1) + "\n")
    return rows


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, with average ranks of ties."""

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(values < each).sum() + (values <= each).sum() for each in values], float)

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def report(rows: list[dict[str, Any]]) -> str:
    """The table, and the two numbers of the claim for each number of labels."""
    counts = list(rows[0]["forecast"])
    lines = markdown_table(
        ["setting", "arm", "realised ratio", "gain", *(f"forecast, {count} labels" for count in counts)],
        [
            [
                row["setting"],
                row["arm"],
                "{:.2f} ({:.2f} to {:.2f})".format(*row["realised"]["ratio"]),
                f"{row['realised']['gain'][0]:+.3f}" + " enough" * row["realised"]["enough"],
                *(
                    f"{row['forecast'][count]['ratio']:.2f}, {row['forecast'][count]['gain']:+.3f}"
                    + " enough" * row["forecast"][count]["random_is_enough"]
                    for count in counts
                ),
            ]
            for row in rows
        ],
    )
    lines += ["", *markdown_table(["labels", "arms", "rank correlation of ratios", "of gains", "'enough' right"], [])]
    for count in counts:
        for arm in ("all", *dict.fromkeys(row["arm"] for row in rows)):
            own = [row for row in rows if arm in ("all", row["arm"])]
            cells = [
                rank_correlation(
                    np.array([row["forecast"][count][name] for row in own]),
                    np.array([row["realised"][name][0] for row in own]),
                )
                for name in ("ratio", "gain")
            ]
            right = np.mean([row["forecast"][count]["random_is_enough"] == row["realised"]["enough"] for row in own])
            lines.append(f"| {count} | {arm} | {cells[0]:.2f} | {cells[1]:.2f} | {right:.0%} of {len(own)} |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    """Make all settings, and the report."""
    keep_compiled()
    rows = []
    for data in config.data.split(","):
        for embeddings in config.embeddings.split(","):
            for pairs in config.pairs.split(","):
                for target in config.targets.split(","):
                    say(f"{data} {embeddings} {pairs} {target}")
                    rows += rows_of(config, data, embeddings, target, pairs)
    text = report(rows)
    write_whole(config.out / "report.md", text)
    show(text)


if __name__ == "__main__":
    main(tyro.cli(Config))
