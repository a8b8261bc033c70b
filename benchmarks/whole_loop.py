"""(d) The runs of a whole `jarm compare`, against the same protocol as a plain PyTorch loop.

    python -m benchmarks.whole_loop --out benchmarks/results/whole_loop.jsonl

7 rules x 10 seeds x 8 rounds on the built-in data (`--data`, `--embeddings`, `--target` as of `jarm compare`), with
the defaults of `jarm compare`. Runs alternate: one of each side for each rule and seed. A run of jarm includes its
evaluation with all metrics; of PyTorch, the Spearman alone. The PyTorch loop has the ensemble, stopping and prior of
jarm, and the released rules; as further rows, the closed forms of these rules, its best form; and a single head stopped
on a fifth of the labels, closer to the method as published.

Ratios are of processor seconds summed over seeds, with the range over seeds. Quality is the test Spearman, averaged
over rounds and of the last round; a gap is that of a side less that of jarm, with its standard error over seeds.
Compilation, once for all rules, stands apart, and is added to jarm's seconds in the last rows. The floor of the fits is
the arithmetic of their matrix products at the rate of one large product.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from benchmarks import timing


def main() -> None:
    options = timing.start(data="synthetic", embeddings="", target="", seeds=10, rules="")
    import jax
    import numpy as np
    import torch

    from benchmarks import torch_loop
    from jarm.core.status import check
    from jarm.data.datasets import load
    from jarm.evaluation.metrics import evaluate
    from jarm.loop.device_table import prepare
    from jarm.loop.loop import make_loop
    from jarm.runs.config import PAPER, CompareConfig

    torch.set_num_threads(len(timing.os.sched_getaffinity(0)))
    config = CompareConfig(**{**PAPER, "rules": options.rules or PAPER["rules"]})
    loop, rules = config.loop(), config.rule_names()
    benchmark = load(options.data, embeddings=options.embeddings or None, target=options.target or None)
    device_table, hparams, scale = prepare(loop, benchmark.train, config.hparams())
    head, run = loop.head.head(), make_loop(loop).run

    product = timing.gemm_rate()
    begin, wall_begin = time.process_time(), time.perf_counter()
    compiled = jax.jit(run).lower(jax.random.key(0), hparams, device_table, np.int32(0)).compile()
    compile_s = time.process_time() - begin
    memory = compiled.memory_analysis()

    def fit_operations(records: Any) -> float:
        """Of the products in the fits: 2 forward and 4 backward a weight, for both ends of every pair trained on."""
        weights = sum(leaf[0, 0].size for leaf in jax.tree.leaves(records.params) if leaf.ndim == 4)
        steps = np.asarray(records.fit.steps) + loop.fit.check_every * loop.fit.patience
        rows = 2 * (1 - config.holdout) * np.asarray(records.labels)
        return float(6 * weights * (steps * rows[:, None]).sum())

    def jarm_run(rule: str, seed: int) -> Any:
        _, records = compiled(jax.random.key(seed), hparams, device_table, jax.numpy.int32(rules.index(rule)))
        check(records.status, rule)
        judge = {"noise": config.noise, "scale": scale, "best_of": config.sizes()}
        metrics = evaluate(head, records.params, benchmark.test, **judge)
        return {"spearman": metrics["spearman"], "operations": fit_operations(records)}

    begin = time.process_time()
    jarm_run(rules[0], 0)
    compile_s += time.process_time() - begin  # that of the evaluation, and one run
    compile_wall_s = time.perf_counter() - wall_begin

    same = torch_loop.Protocol(
        pairs=config.pairs,
        rounds=config.rounds,
        batch=config.batch,
        initial=config.initial,
        candidates=config.candidates,
        noise=config.noise,
        steps=config.steps,
        members=config.members,
        holdout=config.holdout,
        folds=loop.fit.folds,
        check_every=loop.fit.check_every,
        patience=loop.fit.patience,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        prior=config.prior_weight,
        prior_mix=config.prior_mix,
    )
    tables = [(table.embeddings(), table.gold) for table in (benchmark.train, benchmark.test)]

    def torch_run(protocol: torch_loop.Protocol) -> Callable[[str, int], Any]:
        return lambda rule, seed: torch_loop.run(rule, seed, *tables, protocol)

    sides = {
        "jarm": jarm_run,
        "torch, released rules": torch_run(same),
        "torch, closed forms": torch_run(dataclasses.replace(same, released=False)),
        "torch, one head": torch_run(dataclasses.replace(same, members=1, holdout=0.2, folds=1)),
    }
    for side in sides.values():
        side(rules[0], 0)

    shape = (len(sides), len(rules), options.seeds)
    cpu, wall, curves = np.zeros(shape), np.zeros(shape), np.zeros((*shape, config.rounds + 1))
    parts, operations = np.zeros((*shape, 3)), np.zeros(shape)
    for seed in range(options.seeds):
        for r, rule in enumerate(rules):
            for s, side in enumerate(sides.values()):
                wall_begin, cpu_begin = time.perf_counter(), time.process_time()
                result = side(rule, seed)
                cpu[s, r, seed] = time.process_time() - cpu_begin
                wall[s, r, seed] = time.perf_counter() - wall_begin
                curves[s, r, seed] = result["spearman"]
                operations[s, r, seed] = result.get("operations", 0)
                parts[s, r, seed] = [result.get(part, np.nan) for part in ("fit", "select", "evaluate")]

    def gap(values: np.ndarray) -> str:
        """Mean and standard error over seeds of `values[side, seed]`, less jarm's."""
        error = np.sqrt((values.var(axis=1, ddof=1) / options.seeds).sum()) if options.seeds > 1 else np.nan
        return f"{values[1].mean() - values[0].mean():+.3f} +- {error:.3f}"

    def rows(name: str, which: slice, with_compilation: bool = False) -> list[dict[str, Any]]:
        added, added_wall = np.zeros(len(sides)), np.zeros(len(sides))
        added[0], added_wall[0] = with_compilation * compile_s, with_compilation * compile_wall_s
        measured, extra = (cpu, added) if options.cores == "1" else (wall, added_wall)
        seconds = measured[:, which].sum(axis=1) + extra[:, None] / options.seeds
        ratios = seconds / seconds[0]
        mean, last = curves[:, which].mean(axis=(1, 3)), curves[:, which, :, -1].mean(axis=1)
        made = []
        for s, side in enumerate(sides):
            outcome: dict[str, Any] = {"spearman": float(mean[s].mean()), "last": float(last[s].mean())}
            if not s:
                outcome["fit_floor_s"] = float(operations[0, which].sum() / product)
            else:
                outcome |= {"gap": gap(mean[[0, s]]), "last_gap": gap(last[[0, s]])}
                outcome |= zip(
                    ("fit_s", "select_s", "evaluate_s"), parts[s, which].sum(axis=(0, 1)).tolist(), strict=True
                )
            made.append(
                {
                    "name": f"compare, {name}",
                    "side": side,
                    "device": timing.device(),
                    "cores": options.cores,
                    "sizes": {
                        "data": options.data.rpartition("/")[2],
                        "d": device_table.embeddings.shape[2],
                        "members": 1 if "one head" in side else config.members,
                        "rounds": config.rounds,
                        "batch": config.batch,
                        "seeds": options.seeds,
                    },
                    "compile_s": 0.0 if s else round(compile_s, 3),
                    "cpu_s": float(cpu[s, which].sum() + added[s]),
                    "wall_s": float(wall[s, which].sum() + added_wall[s]),
                    "ratio_median": float(seconds[s].sum() / seconds[0].sum()),
                    "ratio_low": float(ratios[s].min()),
                    "ratio_high": float(ratios[s].max()),
                    "turns": options.seeds,
                    "temp_bytes": None if s else memory.temp_size_in_bytes + memory.output_size_in_bytes,
                    "rss_growth_bytes": None,
                    "outcome": outcome,
                    "versions": timing.versions(),
                    "commit": timing.commit(),
                    "command": timing.command(),
                }
            )
        return made

    every = slice(0, len(rules))
    for r, rule in enumerate(rules):
        timing.report(rows(rule, slice(r, r + 1)))
    timing.report(rows("all rules", every))
    timing.report(rows("all rules and compilation", every, with_compilation=True))


if __name__ == "__main__":
    main()
