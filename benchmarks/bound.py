"""How near to the best batch there is: what greedy, swaps, one-shot scores and chance reach, under an upper bound.

    python -m benchmarks.bound --out benchmarks/results/bound.jsonl

All pairs of N responses, F = 64, with the default prior of `greedy_dopt`. The bound is that of the best continuous
design with weights in [0, 1] (`jarm.design.bound`); the D-efficiency exp((log det - bound) / F) is at least that.
A share of the gain is (log det - that of the prior) over (bound - that of the prior). Swaps start from the greedy batch
and from a random one. Times are processor seconds without compilation, one run.
"""

from __future__ import annotations

import functools
import time
from typing import Any

from benchmarks import timing
from benchmarks.every_pair import count_pairs, make_space, prior_of, problem
from benchmarks.near_copies import save


def timed(f: Any, *arguments: Any) -> tuple[Any, float]:
    """What a function returns, and its processor seconds when it was compiled before."""
    import jax

    compiled = jax.jit(f).lower(*arguments).compile()
    begin = time.process_time()
    result = jax.block_until_ready(compiled(*arguments))
    return result, time.process_time() - begin


def measure(kind: str, size: int, width: int, k: int, seed: int) -> list[dict[str, Any]]:
    import jax
    import numpy as np

    from benchmarks import referee
    from jarm.design.bound import design_bound
    from jarm.design.criteria import D_OPTIMAL
    from jarm.design.exchange import exchange
    from jarm.design.greedy import greedy
    from jarm.design.top import random_pairs

    features, rewards = problem(size, width, seed)
    space = make_space(kind, size)
    prior = prior_of("shaped", features, rewards, space, k)
    given = (features, rewards, space, prior)
    (grown, info), greedy_s = timed(functools.partial(greedy, D_OPTIMAL, k=k), *given)
    swap = functools.partial(exchange, D_OPTIMAL)
    (swapped, swaps), swap_s = timed(swap, *given, grown)
    chance = jax.jit(random_pairs, static_argnames="k")(jax.random.key(seed), space, k=k)
    (improved, improvements), improve_s = timed(swap, *given, chance)
    design, bound_s = timed(lambda *each: design_bound(D_OPTIMAL, *each[:4], k, start=each[4]), *given, swapped)

    def log_det(pairs: Any) -> float:
        x = features[pairs[:, 0]].astype(np.float64) - features[pairs[:, 1]]
        v = referee.fisher_weight(rewards[pairs[:, 0]].astype(np.float64) - rewards[pairs[:, 1]])
        return float(np.linalg.slogdet(np.float64(prior) + (v[:, None] * x).T @ x)[1])

    upper, before = float(design.upper), log_det(np.zeros((0, 2), int))
    sides: dict[str, tuple[Any, float, dict[str, int]]] = {
        "random": (chance, 0.0, {}),
        "greedy": (grown, greedy_s, {"passes": int(info.passes)}),
        "greedy and swaps": (swapped, swap_s, {"passes": int(swaps.passes), "swaps": int(swaps.swaps)}),
        "random and swaps": (
            improved,
            improve_s,
            {"passes": int(improvements.passes), "swaps": int(improvements.swaps)},
        ),
    }
    rows = []
    for side, (batch, seconds, counts) in sides.items():
        reached = log_det(np.asarray(batch.pairs))
        outcome = {
            "log_det": reached,
            "efficiency": float(np.exp((reached - upper) / width)),
            "share_of_gain": (reached - before) / (upper - before),
            "seconds": seconds,
            **counts,
        }
        rows.append({"side": side, "outcome": outcome})
    outcome = {
        "upper": upper,
        "seconds": bound_s,
        "passes": int(design.passes),
        "of_rounding": float(design.rounding),
        "lower": float(design.lower),
    }
    return [*rows, {"side": "bound", "outcome": outcome}]


def main() -> None:
    options = timing.start(responses=[1000, 5000], k=[50, 500, 2000], width=64, kind="all", seeds=1)
    for size in options.responses:
        for k in options.k:
            for seed in range(options.seeds):
                rows = measure(options.kind, size, options.width, k, seed)
                sizes = {"N": size, "F": options.width, "pairs": count_pairs(options.kind, size), "k": k, "seed": seed}
                for row in rows:
                    row |= {"name": f"bound, {options.kind}", "sizes": sizes}
                    print(size, k, seed, row["side"], row["outcome"], flush=True)
                save(rows, options.out)


if __name__ == "__main__":
    main()
