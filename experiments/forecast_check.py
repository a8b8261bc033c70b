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
labelled by the same annotator. Both are read by `jarm.report.forecast.labels_saved`. Forecasts with labels weigh the
draws of the one without, where `jarm forecast` would draw half of its teachers by their weight. Curves in the folder
are used again, so give another one after a change of options.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro
from league import rank_correlation

from jarm import AnnotatorConfig, ForecastConfig
from jarm.core.compiled import keep_compiled
from jarm.core.files import write_whole
from jarm.core.settings import make_key
from jarm.core.streams import say, show
from jarm.data.datasets import load
from jarm.data.metric import read_metric, within_metric
from jarm.data.tables import load_table
from jarm.data.teachers import TeacherSpace, family, teacher_space
from jarm.evaluation.annotators import annotate
from jarm.loop.device_table import prepare
from jarm.report.forecast import Saved, labels_saved
from jarm.report.markdown import table as markdown_table
from jarm.runs.simulated import BLOCK, Drawn, HeldOut, make_campaigns, simulate
from jarm.studies.forecast import read_tables, summarise
from jarm.studies.weighing import allocate, read_labels, teacher_weights

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
      workers: calls at a time; 0 takes one per core.
      out: folder; finished campaigns in it are not made again.
    """

    data: str
    embeddings: str
    targets: str
    pairs: str = "within,cross"
    labels: str = "0,50,150"
    seeds: int = 16
    campaigns: int = 2000
    workers: int = 0
    out: pathlib.Path = pathlib.Path("out/forecast_check")


def realised(config: ForecastConfig, target: str, seeds: int, path: pathlib.Path) -> dict[str, Saved]:
    """What each arm saves on the true gold rewards."""
    curves = dict(np.load(path)) if path.is_file() else true_curves(config, target, seeds)
    write_whole(path, lambda file: np.savez(file, **curves))
    labels = config.initial + config.batch * np.arange(config.rounds + 1)
    baseline = curves.pop("random+random")
    return {arm: labels_saved(labels, each, baseline) for arm, each in curves.items()}


def true_curves(config: ForecastConfig, target: str, seeds: int) -> dict[str, np.ndarray]:
    """Learning curves `[seeds, T + 1]` of every arm on the true gold rewards."""
    tables = load(config.data, embeddings=config.embeddings, target=target, metric=config.metric)
    test = HeldOut(jnp.asarray(tables.test.embeddings()), jnp.asarray(tables.test.mask))
    gold, curves = jnp.asarray(tables.test.gold, jnp.float32), dict[str, np.ndarray]()
    for first, loop in config.loops(tables.train).items():
        table, hparams, _ = prepare(loop, tables.train, config.hparams())
        table = dataclasses.replace(table, gold_rest=None)
        for at, rule in enumerate(config.rule_names()):
            made = list[np.ndarray]()
            for start in range(0, seeds, BLOCK):  # as many at a time as in a forecast, by the same program
                drawn = Drawn(
                    seed=jnp.arange(start, start + BLOCK, dtype=jnp.uint32),
                    noise=jnp.full(BLOCK, NOISE, jnp.float32),
                    train=jnp.broadcast_to(table.gold, (BLOCK, *table.gold.shape)),
                    test=jnp.broadcast_to(gold, (BLOCK, *gold.shape)),
                )
                found = make_campaigns(loop)(hparams, table, test, drawn, jnp.int32(at))
                assert not np.asarray(found.status).any(), (config, target, first, rule)
                made.append(np.asarray(found.spearman, np.float64))
            curves[f"{first}+{rule}"] = np.concatenate(made)[:seeds]
    return curves


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


def simulated(config: ForecastConfig, path: pathlib.Path) -> tuple[TeacherSpace, np.ndarray, dict[str, np.ndarray]]:
    """Teachers of some draws, all as likely, and the curves of every arm: made once, whatever labels weigh them."""
    tables = read_tables(config)
    space = teacher_space(tables, config.seed)
    teachers = family(length=space.length is not None)
    equal = np.full(len(teachers), 1 / len(teachers))
    which, _ = allocate(teachers, equal, config.campaigns // len(config.arms()), config.seed)
    if path.is_file():
        return space, which, dict(np.load(path))
    metric = read_metric(config.metric)
    assert metric is not None
    mapped = within_metric(tables, metric)
    loops = config.loops(mapped.train)
    drawn = [teachers[at] for at in which]
    curves = simulate(loops, config.hparams(), mapped, space, drawn, seed=config.seed, workers=config.workers)
    write_whole(path, lambda file: np.savez(file, **curves))
    return space, which, curves


def rows_of(config: Config, data: str, embeddings: str, pairs: str) -> list[dict[str, Any]]:
    """A row for each target and arm."""
    table, name = pathlib.Path(data), f"{pathlib.Path(data).stem}-{embeddings}-{pairs}"
    base = ForecastConfig(
        data=data,
        embeddings=str(table.with_name(f"{table.stem}_{embeddings}.npy")),
        pairs=pairs,
        campaigns=config.campaigns,
        workers=config.workers,
    )
    config.out.mkdir(parents=True, exist_ok=True)
    space, which, curves = simulated(base, config.out / f"{name}.npz")
    teachers, tables, rows = family(length=space.length is not None), read_tables(base), list[dict[str, Any]]()
    for target in config.targets.split(","):
        own = f"{name}-{target}"
        true, forecasts = realised(base, target, config.seeds, config.out / f"{own}.npz"), {}
        for count in map(int, config.labels.split(",")):
            labels = None
            if count:
                path = config.out / f"{own}-{count}.jsonl"
                write_labels(path, base, target, count)
                labels = read_labels(path, tables)
            weights = teacher_weights(space, teachers, labels)
            importance = weights[which] * len(teachers)
            forecasts[count] = summarise(base, space, teachers, weights, which, importance, curves)
            forecasts[count]["effective"] = float(importance.sum() ** 2 / np.square(importance).sum())
        for arm, saved in true.items():
            told = {str(n): {**found["arms"][arm], "effective": found["effective"]} for n, found in forecasts.items()}
            truth = {"ratio": saved.saving.ratio[:3], "gain": saved.gain[:3], "verdict": saved.verdict}
            rows.append({"setting": own, "arm": arm, "realised": truth, "forecast": told})
    return rows


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
                f"{row['realised']['gain'][0]:+.3f} {row['realised']['verdict']}",
                *(
                    f"{row['forecast'][count]['ratio']:.2f}, {row['forecast'][count]['gain']:+.3f}"
                    + f" {row['forecast'][count]['verdict']}"
                    for count in counts
                ),
            ]
            for row in rows
        ],
    )
    lines += [
        "",
        *markdown_table(
            ["labels", "arms", "rank correlation of ratios", "of gains", "verdict right, where it is known"], []
        ),
    ]
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
            known = [row for row in own if row["realised"]["verdict"] != "not known"]
            right = sum(row["forecast"][count]["verdict"] == row["realised"]["verdict"] for row in known)
            lines.append(f"| {count} | {arm} | {cells[0]:.2f} | {cells[1]:.2f} | {right} of {len(known)} |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    """Make all settings, and the report."""
    keep_compiled()
    rows = []
    for pairs in config.pairs.split(","):
        for data in config.data.split(","):
            for embeddings in config.embeddings.split(","):
                say(f"{data} {embeddings} {pairs}")
                rows += rows_of(config, data, embeddings, pairs)
                write_whole(config.out / "rows.json", json.dumps(rows, indent=1) + "\n")
                write_whole(config.out / "report.md", report(rows))
    text = report(rows)
    show(text)


if __name__ == "__main__":
    main(tyro.cli(Config))
