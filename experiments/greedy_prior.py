"""How should the prior of exact greedy D-optimal selection be set?

A0 = past + c n [(1 - rho) tr(Ibar)/F I + rho Ibar]: c is its weight, rho its shape (0 a ridge, 1 the pool's).

Claim     A default (c, rho) exists whose paired 95 % lower bound against the released one-shot D-optimal rule lies
          above -.01 in mean Spearman, within and across prompts, on built-in and on real data.
Command   python experiments/greedy_prior.py --out out/greedy_prior
          python experiments/greedy_prior.py --data alpaca_eval_200x20.parquet \
              --embeddings alpaca_eval_200x20_minilm_mean.npy --target golden_logit --out out/greedy_prior_real
Hardware  2 CPU cores; about 10 minutes, and 20 on the real data.
Expected  `experiments/README.md` has the table.

A grid of priors on some seeds shows the landscape; finalists, named before their runs, and the rules they are held
against get all seeds. All priors of a kind of pairs share one compiled program: c and rho are traced. `blind` is greedy
selection that forgets the labels so far.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from jarm import CompareConfig, JarmError, TrainTest, evaluate, load, prepare
from jarm.core.files import write_whole
from jarm.report.statistics import paired_difference
from jarm.runs.config import PAPER
from jarm.runs.programs import Program, default_workers
from jarm.runs.records import provenance
from jarm.runs.runner import side_by_side

GRID = [*itertools.product((0.01, 0.1, 1.0), (0.0, 0.5, 1.0)), (10.0, 0.0), (10.0, 1.0), (0.001, 1.0)]
FINALISTS = [(0.1, 1.0), (1.0, 1.0), (0.1, 0.0), (0.001, 1.0)]  # the last after the grid
BLIND = [(0.1, 1.0), (1.0, 1.0)]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      data: as in `jarm compare`.
      embeddings: as in `jarm compare`.
      target: as in `jarm compare`.
      out: folder of `within.json` and `cross.json`, one entry a run, written as they finish.
      seeds: seeds of random, of the released rule and of the finalists.
      grid_seeds: seeds of the other priors.
    """

    data: str = "synthetic"
    embeddings: str | None = None
    target: str | None = None
    out: pathlib.Path = pathlib.Path("out/greedy_prior")
    seeds: int = 30
    grid_seeds: int = 12


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    tables = load(config.data, embeddings=config.embeddings, target=config.target)
    for pairs in ("within", "cross"):
        curves = _curves(config, tables, pairs)
        print(f"\n{pairs}: mean Spearman over rounds; differences over paired seeds, with 95 % intervals")
        for name, values in curves.items():
            seeds = len(values)
            against = [paired_difference(values, curves[base][:seeds]) for base in ("dopt", "random")]
            shown = "  ".join(f"{d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f})" for d in against)
            print(f"{name:34s} {seeds:3d} seeds  {values.mean():.3f}  against dopt, random: {shown}", flush=True)


def _curves(config: Config, tables: TrainTest, pairs: str) -> dict[str, np.ndarray]:
    """Mean Spearman after the labelled batches, by arm, one value a seed."""
    options = CompareConfig(**{**PAPER, "rules": "random,dopt,greedy_dopt,greedy_dopt_blind", "pairs": pairs})
    loop = options.loop()
    device_table, hparams, scale = prepare(loop, tables.train)
    program, head = Program(loop), loop.head.head()
    judge = functools.partial(evaluate, head, noise=float(hparams.noise), scale=scale)
    arms = {"random": ("random", hparams, config.seeds), "dopt": ("dopt", hparams, config.seeds)}
    for rule, priors in (("greedy_dopt", GRID), ("greedy_dopt_blind", BLIND)):
        for c, rho in priors:
            prior = dataclasses.replace(hparams, prior_weight=jnp.float32(c), prior_mix=jnp.float32(rho))
            final = rule == "greedy_dopt" and (c, rho) in FINALISTS
            seeds = config.seeds if final else min(config.seeds, config.grid_seeds)
            arms[f"{rule} c={c:g} rho={rho:g}"] = (rule, prior, seeds)

    path = config.out / f"{pairs}.json"
    settings = {name: getattr(config, name) for name in ("data", "embeddings", "target")} | {"loop": str(loop)}
    there = json.loads(path.read_text("utf-8")) if path.exists() else {"settings": settings, "runs": {}}
    if any(there["settings"].get(name) != value for name, value in settings.items()):
        raise JarmError(f"{path} holds runs with other settings: give another --out.")
    done = there["runs"]

    def one(arm: str, seed: int) -> tuple[str, list[float]]:
        rule, hparams, _ = arms[arm]
        (result,) = program(rule, [(seed, hparams)], device_table)
        if result.failure:
            raise JarmError(f"{arm}, seed {seed}: {result.failure}")
        return f"{arm}, seed {seed}", judge(result.params, tables.test)["spearman"].tolist()

    seeds = max(config.seeds, config.grid_seeds)
    calls = [(arm, seed) for seed in range(seeds) for arm, (*_, own) in arms.items() if seed < own]
    calls = [(arm, seed) for arm, seed in calls if f"{arm}, seed {seed}" not in done]
    for name, curve in tqdm(side_by_side(one, calls, default_workers()), total=len(calls), desc=pairs, unit="run"):
        done[name] = curve
        write_whole(path, json.dumps({"settings": settings | provenance(), "runs": done}) + "\n")
    return {
        arm: np.array([np.mean(done[f"{arm}, seed {seed}"][1:]) for seed in range(seeds)])
        for arm, (*_, seeds) in arms.items()
    }


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except JarmError as error:
        sys.exit(f"greedy_prior: {error}")
