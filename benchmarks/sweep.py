"""A whole sweep by `jarm sweep`, against the same runs one by one in jarm and as a PyTorch loop.

    python -m benchmarks.sweep --part sweep --cores all --data alpaca_eval_200x20.parquet \\
        --embeddings alpaca_eval_200x20_minilm_mean.npy --target golden_logit --out benchmarks/results/sweep.jsonl
    python -m benchmarks.sweep --part killed --kills 3 --records records.jsonl (the same otherwise)
    python -m benchmarks.sweep --part cluster --records records.jsonl (the same otherwise; it needs the extra `cluster`)
    python -m benchmarks.sweep --part sample --cores 1 --sample 2 (the same otherwise)

`sweep`: 7 rules x 16 seeds x 9 levels of noise, 8 rounds each, by the command in a process of its own, with an empty
compilation cache: runs a minute, processor time and peak memory of the process, beside what `jarm plan` said before;
`--records` keeps its records.
`killed`: the same sweep, ended by SIGKILL at evenly spread counts of finished runs and started again, and its records
held against those of `--records`: the same keys, the same values.
`cluster`: the same on three workers of Dask here, one of which is killed when a third of the runs is recorded, and one
joins.
`sample`: some of the same runs, in turn: by a call of jarm each, and by the PyTorch loop of `benchmarks.torch_loop`
with the ensemble, the stopping and the rules (closed forms, its best) of jarm. On one pinned core: PyTorch's threads
take several times the processor time where the others are busy. Ratios are of processor seconds; "a step" divides by
the Adam steps that each side took, which makes it the very same work; `products_of_fits_s_a_run` is the floor of both,
the products of jarm's fits at the rate of a large square product here.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import timing

NOISES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
RULES = ("random", "entropy", "max_diff", "xtx", "dopt", "pa_dopt", "greedy_dopt")


def command(folder: pathlib.Path, *arguments: str) -> tuple[str, float, float, int]:
    """Run the command: what it printed, wall and processor seconds, and its peak of resident bytes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "jarm.cli", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    wall = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, wall, cpu, 1024 * after.ru_maxrss


def main() -> None:
    options = timing.start(
        data="synthetic",
        embeddings="",
        target="",
        seeds=16,
        noises=len(NOISES),
        sample=2,
        part="sweep",
        records="",
        kills=3,
        rounds=8,
        candidates=5000,
    )
    given = {name: getattr(options, name) for name in ("data", "embeddings", "target") if getattr(options, name)}
    noises = NOISES[:: max(1, len(NOISES) // options.noises)][: options.noises]
    sizes = {"data": options.data.rpartition("/")[2], "seeds": options.seeds, "noises": len(noises)}
    sizes |= {"rounds": options.rounds, "candidates": options.candidates}
    if options.part == "sample":
        timing.report(sampled(given, noises, options, sizes | {"seeds": options.sample}))
        return
    runs = len(RULES) * options.seeds * len(noises)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        text = [f"{option} = {json.dumps(value)}" for option, value in given.items()]
        text += [f"rules = {json.dumps(RULES)}", f"seeds = {options.seeds}", f"rounds = {options.rounds}"]
        text += [f"candidates = {options.candidates}", f"out = {json.dumps(str(folder / 'out'))}"]
        (folder / "sweep.toml").write_text("\n".join([*text, "", "[grid]", f"noise = {list(noises)}"]) + "\n")
        if options.part in ("killed", "cluster"):
            unbroken = pathlib.Path(options.records)
            if options.part == "killed":
                outcome = killed(folder, unbroken, runs, options.rounds, options.kills)
            else:
                outcome = clustered(folder, unbroken, runs, options.rounds)
            cpu, wall = outcome.pop("took")
            timing.report(
                [timing.row(f"sweep, {options.part}", "jarm sweep", sizes=sizes, cpu=cpu, wall=wall, outcome=outcome)]
            )
            return
        planned, plan_wall, _, _ = command(folder, "plan", str(folder / "sweep.toml"))
        print(planned)
        (folder / "compiled").rename(folder / "of the plan")
        _, wall, cpu, peak = command(folder, "sweep", str(folder / "sweep.toml"))
        records = (folder / "out" / "records.jsonl").read_text()
        if options.records:
            pathlib.Path(options.records).write_text(records)
        done = {key for key in by_key(records) if key[-1] == options.rounds}
    outcome: dict[str, Any] = {
        "runs": runs,
        "failed": runs - len(done),
        "runs_a_minute": 60 * runs / wall,
        "cpu_a_run": cpu / runs,
        "plan": re.findall(r"^\d.* on this machine.*$", planned, re.M),
        "plan_wall_s": plan_wall,
        "peak_gib": peak / 2**30,
    }
    timing.report([timing.row("sweep", "jarm sweep", sizes=sizes, cpu=cpu, wall=wall, outcome=outcome)])


def by_key(records: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Records by what says which they are: kind, rule, seed, noise and round, as far as a record has them."""
    lines = [json.loads(line) for line in records.splitlines()]
    return {tuple(line.get(name) for name in ("kind", "rule", "seed", "noise", "round")): line for line in lines}


def killed(folder: pathlib.Path, unbroken: pathlib.Path, runs: int, last: int, kills: int) -> dict[str, Any]:
    """Run the sweep, killed `kills` times at even steps of its runs, and hold its records against the unbroken ones."""
    path, cut, start = folder / "out" / "records.jsonl", 0, time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for step in range(1, kills + 1):
        process = subprocess.Popen(
            [sys.executable, "-m", "jarm.cli", "sweep", str(folder / "sweep.toml")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")},
        )
        while process.poll() is None and (
            not path.exists() or path.read_bytes().count(b'"round": %d,' % last) < runs * step // (kills + 1)
        ):
            time.sleep(0.05)
        if process.poll() is not None:
            sys.exit("The sweep ended before it could be killed.")
        process.kill()
        process.wait()
        cut += not path.read_bytes().endswith(b"\n")
    command(folder, "sweep", str(folder / "sweep.toml"))
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"took": (cpu, wall), "kills": kills, "cut_lines": cut} | against(path, unbroken)


def clustered(folder: pathlib.Path, unbroken: pathlib.Path, runs: int, last: int) -> dict[str, Any]:
    """Run the sweep on three workers of Dask, of which one is killed at a third of the runs, and one joins."""
    from distributed import LocalCluster

    path, start = folder / "out" / "records.jsonl", time.perf_counter()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with LocalCluster(n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        process = subprocess.Popen(
            [sys.executable, "-m", "jarm.cli", "sweep", str(folder / "sweep.toml"), "--dask", cluster.scheduler_address]
        )
        while process.poll() is None and (
            not path.exists() or path.read_bytes().count(b'"round": %d,' % last) < runs // 3
        ):
            time.sleep(0.05)
        if process.poll() is not None:
            sys.exit("The sweep ended before a worker could be killed.")
        os.kill(cluster.workers[0].process.pid, signal.SIGKILL)
        cluster.scale(4)
        if process.wait():
            sys.exit("The sweep failed.")
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"took": (cpu, wall), "workers": 3, "killed": 1, "joined": 1} | against(path, unbroken)


def against(path: pathlib.Path, unbroken: pathlib.Path) -> dict[str, Any]:
    """Records held against those of an unbroken sweep."""
    ours, theirs = by_key(path.read_text()), by_key(unbroken.read_text())
    timed = {"cpu_s", "wall_s", "seconds", "line"}  # the last is a checksum
    differ = [
        (key, name)
        for key in ours.keys() & theirs.keys()
        for name in (ours[key].keys() | theirs[key].keys()) - timed
        if ours[key].get(name) != theirs[key].get(name)
    ]
    return {
        "records": len(ours),
        "same_keys": ours.keys() == theirs.keys(),
        "lines_twice": len(path.read_text().splitlines()) - len(ours),
        "values_that_differ": len(differ),
        "fields_that_differ": sorted({name for _, name in differ}),
    }


def sampled(
    given: dict[str, str], noises: tuple[float, ...], options: Any, sizes: dict[str, Any]
) -> list[dict[str, Any]]:
    """Runs of a sample by jarm and by PyTorch in turn."""
    import numpy as np
    import torch

    from benchmarks import torch_loop
    from jarm.data.datasets import load
    from jarm.evaluation.metrics import evaluate
    from jarm.loop.device_table import prepare
    from jarm.runs.config import PAPER, CompareConfig
    from jarm.runs.programs import Program

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = CompareConfig(**{**PAPER, "rules": ",".join(RULES), **given})
    loop, benchmark = config.loop(), load(**given)
    device_table, hparams, scale = prepare(loop, benchmark.train, config.hparams())
    program, head = Program(loop), loop.head.head()
    tables = [(table.embeddings(), table.gold) for table in (benchmark.train, benchmark.test)]
    names = (
        "rounds",
        "batch",
        "initial",
        "candidates",
        "steps",
        "members",
        "holdout",
        "folds",
        "prior_weight",
        "prior_mix",
    )
    names += ("learning_rate", "weight_decay")
    shared: dict[str, Any] = {name: getattr(config, name) for name in names}
    shared |= {"check_every": loop.fit.check_every, "patience": loop.fit.patience, "released": False}

    widths = [benchmark.train.shape[2], *loop.head.hidden, 1]
    layers = [2 * one * other for one, other in itertools.pairwise(widths)]
    # Forwards, and backwards to the weights and to the inputs, which the first layer does not need.
    operations_a_row = 3 * sum(layers) - layers[0]
    operations = []

    def ours(rule: str, seed: int, noise: float) -> tuple[list[float], int]:
        (result,) = program(rule, [(seed, dataclasses.replace(hparams, noise=np.float32(noise)))], device_table)
        found = evaluate(head, result.params, benchmark.test, noise=noise, scale=scale)
        # Each member looks `patience` times more after its best.
        more = loop.fit.check_every * loop.fit.patience
        steps = np.minimum(result.records.fit.steps + more, loop.fit.steps)
        rows = 2 * (1 - config.holdout) * np.asarray(result.records.labels)
        operations.append(operations_a_row * (steps * rows[:, None]).sum())
        return found["spearman"].tolist(), int(steps.sum())

    def theirs(rule: str, seed: int, noise: float) -> tuple[list[float], int]:
        done = torch_loop.run(rule, seed, *tables, torch_loop.Protocol(noise=noise, **shared))
        return done["spearman"], done["steps"]

    sides = {"jarm, one by one": ours, "torch": theirs}
    for side in sides.values():
        side(RULES[0], 0, noises[0])
    cells = [(rule, seed, noise) for seed in range(options.sample) for noise in noises for rule in RULES]
    cpu, wall, steps = (np.zeros((len(sides), len(cells))) for _ in range(3))
    quality = np.zeros((len(sides), len(cells), 2))
    for c, cell in enumerate(cells):
        for s, side in enumerate(sides.values()):
            marks = time.perf_counter(), time.process_time()
            curve, steps[s, c] = side(*cell)
            wall[s, c], cpu[s, c] = time.perf_counter() - marks[0], time.process_time() - marks[1]
            quality[s, c] = np.mean(curve), curve[-1]
    rate = timing.gemm_rate()
    gaps = (quality[1] - quality[0]).reshape(options.sample, -1, 2).mean(axis=1)
    rows, rules = [], np.array([rule for rule, *_ in cells])
    for s, name in enumerate(sides):
        ratios = [cpu[s, rules == rule].sum() / cpu[0, rules == rule].sum() for rule in RULES]
        outcome = {
            "cpu_a_run": cpu[s].mean(),
            "runs_a_minute": 60 / wall[s].mean(),
            "steps_a_run": steps[s].mean(),
            "against_one_by_one": cpu[s].sum() / cpu[0].sum(),
            "against_one_by_one_a_step": (cpu[s].sum() / steps[s].sum()) / (cpu[0].sum() / steps[0].sum()),
            "spearman": quality[s, :, 0].mean(),
            "last": quality[s, :, 1].mean(),
        }
        if s == 0:
            outcome["products_of_fits_s_a_run"] = np.mean(operations[1:]) / rate
        else:  # less jarm's; runs of a seed share their labels' luck, so that seeds are what is counted
            for metric, gap in zip(("spearman", "last"), gaps.T, strict=True):
                outcome[f"{metric}_less_jarm"] = gap.mean()
                if len(gap) > 1:
                    outcome[f"{metric}_less_jarm_error"] = gap.std(ddof=1) / len(gap) ** 0.5
        outcome = {key: float(value) for key, value in outcome.items()}
        total = {"cpu": float(cpu[s].sum()), "wall": float(wall[s].sum())}
        rows.append(
            timing.row("sweep, a sample", name, sizes=sizes, **total, ratios=ratios, turns=len(cells), outcome=outcome)
        )
    return rows


if __name__ == "__main__":
    main()
