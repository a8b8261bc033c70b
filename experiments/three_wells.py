"""(e) What each strategy picks, in two dimensions, where it can be seen.

Claim     Entropy picks near ties wherever they are, distance picks far ends whatever they are, and D-optimal selection
          weighs both (Shen, Sun, Ton, arXiv 2502.04354, has such an illustration with three wells).
Command   python experiments/three_wells.py
Hardware  2 CPU cores.
Time      About a minute, 20 seeds.
Expected  `experiments/README.md` has the readings.

Responses are 300 points of a square, their gold reward three Gaussian bumps, their embedding 25 narrower ones on a
lattice. A linear head learns from 60 random pairs, of which hardly any label is wrong; each rule then picks 15 of all
pairs. Seeds draw other first labels. No data is read.
"""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import strategies
import suite
from suite import Config, Reading, Records, Study

from jarm import FitConfig, HeadConfig, HParams, LoopConfig, ResponseTable, make_loop, prepare
from jarm.core.files import plain
from jarm.core.status import check
from jarm.report.figures import PALETTE, drawing
from jarm.report.statistics import number
from jarm.runs.records import provenance

WELLS = np.array([[-0.55, -0.45], [0.6, -0.35], [0.0, 0.6]])
HEIGHTS, WIDTH = np.array([1.0, 0.8, -1.0]), 0.35

SIZES = {"points": 300, "batch": 15, "initial": 60}
SMALL = {"points": 60, "batch": 5, "initial": 10}


def gold(points: np.ndarray) -> np.ndarray:
    """Reward of points `[..., 2]`: two bumps and a hollow."""
    squared = np.square(points[..., None, :] - WELLS).sum(-1)
    return 4 * np.exp(-squared / (2 * WIDTH**2)) @ HEIGHTS


def points_of(count: int) -> np.ndarray:
    """Some points of the square, the same for the same count."""
    return np.random.default_rng(0).uniform(-1, 1, (count, 2)).astype(np.float32)


def embedded(points: np.ndarray) -> np.ndarray:
    """`[count, 25]`: Gaussian bumps around a lattice, at the points."""
    side = np.linspace(-1, 1, 5)
    lattice = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    return np.exp(-np.square(points[:, None] - lattice).sum(-1) / (2 * WIDTH**2)).astype(np.float32)


def records(config: Config) -> Records:
    sizes = SMALL if config.size == "small" else SIZES
    chosen = {"seeds": config.seeds_of(20), "rules": strategies.RULES, **sizes}
    return suite.kept(config.out / "three_wells" / "records.json", chosen, lambda: _picked(chosen["seeds"], **sizes))


def _picked(seeds: int, points: int, batch: int, initial: int) -> Records:
    """What every rule picks first, by seed."""
    rules, places = tuple(strategies.RULES.split(",")), points_of(points)
    table = ResponseTable(
        store=embedded(places),
        rows=np.arange(points)[None],
        mask=np.ones((1, points), bool),
        gold=gold(places)[None].astype(np.float32),
        attributes={},
        provenance={"source": "three wells"},
    )
    config = LoopConfig(
        rules=rules,
        rounds=1,
        batch=batch,
        initial=initial,
        head=HeadConfig.parse("linear"),
        fit=FitConfig(members=4),
    )
    device_table, hparams, _ = prepare(config, table, HParams(noise=10.0))
    run = jax.jit(make_loop(config).run)
    lines = []
    for seed in range(seeds):
        for index, rule in enumerate(rules):
            _, found = run(jax.random.key(seed), hparams, device_table, index)
            check(found.status[-1], f"{rule}, seed {seed}")
            described = {f"batch_{name}": plain(values[0]) for name, values in found.batch.items()}
            pairs = np.asarray(found.selection.pairs[0]).tolist()
            lines.append({"kind": "picked", "rule": rule, "seed": seed, "points": points, "pairs": pairs, **described})
    return [line | provenance() for line in lines]


def figure(records: Records, stem: pathlib.Path) -> None:
    """A panel a rule: the pairs of the first seed over the contours of gold."""
    shown = [line for line in records if line["seed"] == 0]
    places = points_of(shown[0]["points"])
    side = np.linspace(-1, 1, 80)
    heights = gold(np.stack(np.meshgrid(side, side), axis=-1))
    with drawing(stem, (7.8, 8.1)) as canvas:
        for axes, line in zip(canvas.subplots(3, 3, sharex=True, sharey=True).ravel(), shown, strict=True):
            axes.contourf(side, side, heights, levels=12, cmap="Greys", alpha=0.55)
            axes.plot(*places.T, ".", color="#444444", markersize=1.5, alpha=0.6)
            for pair in line["pairs"]:
                axes.plot(*places[pair].T, "o-", color=PALETTE[1], markersize=3.5, linewidth=1.2)
            measured = f"log det {line['batch_diversity_log_det']:.1f}, p(1-p) {line['batch_mean_fisher_weight']:.3f}"
            axes.set_title(f"{line['rule']}\n{measured}", loc="left", fontsize=8.5)
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])


def _means(records: Records, name: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for line in records:
        found.setdefault(line["rule"], {})[line["seed"]] = line[f"batch_{name}"]
    return found


MEASURES = {
    "diversity_log_det": "log det",
    "diversity_distance": "mean distance",
    "mean_fisher_weight": "mean p (1 - p)",
}
MEASURES |= {"distinct_responses": "responses", "mean_gold_gap": "gold gap"}


def table(records: Records) -> suite.Rows:
    found = {words: _means(records, name) for name, words in MEASURES.items()}
    rules = list(dict.fromkeys(line["rule"] for line in records))
    cells = [[number(float(np.mean(list(found[words][rule].values())))) for words in found] for rule in rules]
    return [["rule", *found], *([rule, *row] for rule, row in zip(rules, cells, strict=True))]


def readings(records: Records) -> list[Reading]:
    wide, deep = _means(records, "diversity_log_det"), _means(records, "mean_fisher_weight")
    ties = suite.differences(
        deep, {f"p (1 - p), entropy - {rule}": ("entropy", rule) for rule in deep if rule != "entropy"}
    )
    weighs = suite.differences(wide, {"log det, dopt - entropy": ("dopt", "entropy")})
    weighs |= suite.differences(deep, {"p (1 - p), dopt - xtx": ("dopt", "xtx")})
    spread = suite.differences(wide, {"log det, greedy_dopt - dopt": ("greedy_dopt", "dopt")})
    return [
        suite.decide("Entropy picks nearer ties than every other rule", ties),
        suite.decide(
            "The released D-optimal rule picks wider pairs than entropy, and nearer ties than distance", weighs
        ),
        suite.decide("Exact greedy selection spreads its batch more than the released rule", spread),
    ]


STUDY = Study("e", "three_wells", "What each strategy picks", __doc__, records, figure, table, readings)

if __name__ == "__main__":
    suite.main(STUDY)
