"""Which metric? Random labels, a linear head with a prior, and directions in which responses differ sharpened or not.

Claim     Sharpening with alpha 2 serves more embeddings than none, more, or what the labels choose by evidence.
Command   python experiments/metrics.py --table alpaca_eval_200x20.parquet \\
              --embeddings alpaca_eval_200x20_minilm_mean.npy,alpaca_eval_200x20_gemma3_270m_mean.npy
Hardware  2 CPU cores, half a minute for each embedding, target and kind of pairs.
Expected  `docs/choosing.md` has the table.

Each cell is the within-prompt Spearman on test prompts, the mean over seeds and numbers of labels. The last columns
take, for every seed and number of labels, the alpha of the largest evidence, or of the smallest leave-one-out loss.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jarm import JarmError, ResponseTable, TrainTest, load
from jarm.core.files import write_whole
from jarm.data.metric import Within, within_metric
from jarm.evaluation.ranking import spearman
from jarm.report.markdown import table as markdown_table
from jarm.report.statistics import number
from jarm.reward.laplace import posterior
from jarm.reward.losses import bradley_terry


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings. Lists are separated by commas.

    Attributes:
      table: Parquet table of responses, every prompt with as many; "synthetic:hidden" for built-in data.
      embeddings: .npy arrays in its row order.
      targets: columns of gold rewards.
      alphas: of `--metric within:ALPHA`.
      labels: numbers of random labels.
      variance: prior variance, in units of the mean squared size of differences within prompts.
      noise: beta of the annotator.
      seeds: sets of labels.
      out: file of the table.
    """

    table: str = "synthetic:hidden"
    embeddings: str = ""
    targets: str = "golden_logit,golden_z_lc"
    alphas: str = "1,2,3,6"
    labels: str = "50,100,200,450"
    variance: float = 0.1
    noise: float = 2.0
    seeds: int = 8
    out: pathlib.Path = pathlib.Path("out/metrics.md")


def mean_spearman(scores: np.ndarray, gold: np.ndarray) -> float:
    """Mean over prompts of the rank correlation of `[P, R]` scores."""
    pair = jnp.asarray(scores, jnp.float32), jnp.asarray(gold, jnp.float32)
    return float(jnp.nanmean(jax.vmap(spearman)(*pair, jnp.ones(gold.shape, bool))))


@jax.jit
def fitted(x: jax.Array, label: jax.Array, weight: jax.Array, variance: jax.Array) -> tuple[jax.Array, ...]:
    """The mode, the log evidence, and the loss of labels left out."""
    found = posterior(x, label, weight, variance)
    return found.mode, found.log_evidence, jnp.vdot(bradley_terry(found.margin_left_out, label), weight)


def drawn(gold: np.ndarray, kind: str, count: int, noise: float, seed: int) -> tuple[np.ndarray, ...]:
    """Random pairs, `[count]` prompts and places of both ends, and their labels."""
    rng, (prompts, width) = np.random.default_rng(seed), gold.shape
    p = rng.choice(prompts, count)
    q = p if kind == "within" else rng.choice(prompts, count)
    i = rng.integers(0, width, count)
    j = (i + rng.integers(1, width, count)) % width
    label = rng.random(count) < 1 / (1 + np.exp(-noise * (gold[p, i] - gold[q, j])))
    return p, i, q, j, label.astype(np.float32)


def row(config: Config, tables: dict[str, TrainTest], kind: str) -> list[float]:
    """Spearman with each metric, then with the one of the largest evidence, then of the smallest loss left out."""
    counts = [int(text) for text in config.labels.split(",")]
    rows = {name: (each.train.embeddings(), each.test.embeddings()) for name, each in tables.items()}
    train, test = next(iter(tables.values()))
    gold, total = np.float64(train.gold) / np.std(train.gold), list[list[float]]()
    for seed in range(config.seeds):
        p, i, q, j, label = drawn(gold, kind, max(counts), config.noise, seed)
        for count in counts:
            weight, scores = (np.arange(len(p)) < count).astype(np.float32), list[tuple[float, float, float]]()
            for fit_rows, test_rows in rows.values():
                x = fit_rows[p, i] - fit_rows[q, j]
                mode, evidence, loss = fitted(x, label, weight, jnp.float32(config.variance))
                scores.append((mean_spearman(test_rows @ np.asarray(mode), test.gold), float(evidence), -float(loss)))
            chosen = [max(scores, key=lambda score: score[by])[0] for by in (1, 2)]
            total.append([score[0] for score in scores] + chosen)
    return np.mean(total, axis=0).tolist()


def checked(tables: TrainTest) -> TrainTest:
    """The tables, where every prompt has as many responses and gold rewards."""

    def whole(table: ResponseTable) -> bool:
        return table.gold is not None and bool(table.mask.all())

    if not (whole(tables.train) and whole(tables.test)):
        raise JarmError("Prompts have unequal numbers of responses, or no gold rewards: give a table that is whole.")
    return tables


def main(config: Config) -> None:
    alphas, lines = config.alphas.split(","), list[list[str]]()
    synthetic = config.table.startswith("synthetic")
    arrays, targets = ([None], [None]) if synthetic else (config.embeddings.split(","), config.targets.split(","))
    for array, target in itertools.product(arrays, targets):
        plain = checked(load(config.table, embeddings=array, target=target))
        tables = {alpha: within_metric(plain, Within(float(alpha))) for alpha in alphas}
        for kind in ("within", "cross"):
            values = row(config, tables, kind)
            lines.append([pathlib.Path(array or config.table).stem, f"{target}, {kind}", *map(number, values)])
            print(*lines[-1], flush=True)
    head = ["embeddings", "target, pairs", *(f"alpha {alpha}" for alpha in alphas), "by evidence", "by leave-one-out"]
    write_whole(config.out, "\n".join(markdown_table(head, lines)) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except JarmError as error:
        sys.exit(f"metrics: {error}")
