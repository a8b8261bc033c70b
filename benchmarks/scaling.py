"""What a run costs as rounds, labels, members, widths, candidates and test set grow: a model fitted to measurements.

    python -m benchmarks.scaling --out benchmarks/results/scaling.jsonl

Runs of `greedy_dopt` on random tables, one core, compilation apart. Seconds are fitted by non-negative least squares as

    a (operations of the fits) + b (candidates x F x picks of the selections) + c (operations of the evaluation)
      + d (Adam steps) + e (rounds)

with relative errors weighed alike. The last rows are what the model foretells for sizes of published studies.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from benchmarks import timing

BASE = {
    "prompts": 150,
    "responses": 20,
    "width": 384,
    "test": 50,
    "test_responses": 20,
    "rounds": 4,
    "batch": 50,
    "candidates": 5000,
    "members": 4,
    "head": 64,
}
VARIED = {
    "width": (64, 1024, 2048),
    "rounds": (2, 8),
    "batch": (25, 200),
    "candidates": (1000, 20000),
    "members": (1, 8),
    "head": (16, 128),
    "test": (500,),
}
TERMS = ("fit_operations", "selection_operations", "evaluation_operations", "steps", "rounds")


def main() -> None:
    options = timing.start(quick=0)
    import numpy as np
    import scipy.optimize

    cases = [BASE] + [BASE | {name: value} for name, values in VARIED.items() for value in values]
    cases = cases[: options.quick or None]
    measured = [measure(case, options.turns) for case in cases]
    amounts = np.array([[row[term] for term in TERMS] for row in measured])
    seconds = np.array([row["seconds"] for row in measured])
    scaled = amounts / seconds[:, None]
    unit = scaled.max(axis=0)
    rates = scipy.optimize.nnls(scaled / unit, np.ones(len(seconds)))[0] / unit
    foretold = amounts @ rates
    error = foretold / seconds - 1
    rows = []
    for case, row, guess in zip(cases, measured, foretold, strict=True):
        outcome = {"foretold_s": float(guess), **{term: float(row[term]) for term in TERMS}}
        took = row["seconds"]
        rows.append(
            timing.row(
                "scaling",
                "jarm",
                sizes=case,
                cpu=took,
                wall=took,
                ratios=(row["low"] / took, 1.0, row["high"] / took),
                turns=options.turns,
                compile_s=row["compile_s"],
                outcome=outcome,
            )
        )
    print(f"relative error: median {np.median(np.abs(error)):.3f}, largest {np.abs(error).max():.3f}")
    model = dict(zip(TERMS, rates.tolist(), strict=True))
    outcome = {**model, "median_error": float(np.median(np.abs(error))), "largest_error": float(np.abs(error).max())}
    name = "scaling, the model: seconds for one of each"
    rows.append(timing.row(name, "jarm", sizes={}, cpu=0.0, wall=0.0, outcome=outcome))
    timing.report(rows)


def measure(case: dict[str, int], turns: int) -> dict[str, float]:
    """Seconds of a run and its evaluation, and the amounts that the model is made of."""
    import jax
    import numpy as np

    from jarm.core.tables import ResponseTable
    from jarm.loop.device_table import prepare
    from jarm.runs.config import PAPER, CompareConfig
    from jarm.runs.programs import Program
    from jarm.runs.results import evaluate_runs

    rng = np.random.default_rng(0)

    def table(prompts: int, responses: int) -> ResponseTable:
        store = rng.standard_normal((prompts * responses, case["width"])).astype(np.float32)
        gold = store[:, :16].sum(axis=1).reshape(prompts, responses) / 4
        rows = np.arange(prompts * responses).reshape(prompts, responses)
        return ResponseTable(store, rows, np.ones((prompts, responses), bool), gold.astype(np.float32))

    train, test = table(case["prompts"], case["responses"]), table(case["test"], case["test_responses"])
    sizes = {name: case[name] for name in ("rounds", "batch", "candidates", "members")}
    head = ",".join([str(case["head"])] * 3)
    config = CompareConfig(**{**PAPER, "rules": "greedy_dopt", "head": f"mlp:{head}"}, **sizes)
    loop = config.loop()
    device_table, hparams, scale = prepare(loop, train, config.hparams())
    program, head = Program(dataclasses.replace(loop, rules=("greedy_dopt",))), loop.head.head()

    def once(seed: int) -> Any:
        (result,) = program("greedy_dopt", [(seed, hparams)], device_table)
        evaluate_runs(head, [result], test, annotator=loop.annotator, scale=scale, best_of=None)
        return result

    begin = time.process_time()
    result = once(0)
    compile_s = time.process_time() - begin
    spent, amounts = [], []
    weights = sum(leaf[0, 0].size for leaf in jax.tree.leaves(result.params) if leaf.ndim == 4)
    for seed in range(1, turns + 1):
        begin = time.process_time()
        result = once(seed)
        spent.append(time.process_time() - begin)
        steps = np.minimum(result.records.fit.steps + loop.fit.check_every * loop.fit.patience, loop.fit.steps)
        rows = 2 * (1 - config.holdout) * np.asarray(result.records.labels)
        amounts.append(
            {
                "fit_operations": float(6 * weights * (steps * rows[:, None]).sum()),
                "selection_operations": float(case["rounds"] * case["candidates"] * case["head"] * case["batch"]),
                "evaluation_operations": float(
                    2 * weights * case["test"] * case["test_responses"] * (case["rounds"] + 1) * case["members"]
                ),
                "steps": float(steps.sum()),
                "rounds": float(case["rounds"] + 1),
            }
        )
    mean = {term: float(np.mean([each[term] for each in amounts])) for term in TERMS}
    spread = {"low": float(np.min(spent)), "high": float(np.max(spent))}
    print(case, f"{np.mean(spent):.3f} s", flush=True)
    return {"seconds": float(np.mean(spent)), "compile_s": compile_s, **spread, **mean}


if __name__ == "__main__":
    main()
