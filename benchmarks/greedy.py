"""Exact greedy choice of 256 listed pairs, D-optimal and V-optimal, against what else computes the same batch.

    python -m benchmarks.greedy --out benchmarks/results/greedy.jsonl
    python -m benchmarks.greedy --responses 0 --out benchmarks/results/greedy.jsonl

D-optimal: rank-one greedy in NumPy, MaxDet of `bmdal_reg` in kernel and in feature space, and the released rule, which
scores each pair once and is judged by the same measure. V-optimal, the fall of tr(C A^-1) with C the second moment of
the pool: rank-one greedy in NumPy, and BAIT of `bmdal_reg` (forward), whose score is this fall times the ridge.

All sides start from the same ridge, `c n tr(Ibar) / F`, and get what they would hold at that point: jarm features of
responses and indices of pairs (`--responses 0`: each pair has two of its own), the others sqrt(v) x of every pair. The
judge is a float64 replay of the picks. `bmdal_reg` is optional: where it cannot be imported its rows are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import timing
from benchmarks.score_pairs import problem


def scaled_problem(pairs: int, width: int, responses: int, k: int, prior_weight: float) -> tuple[Any, Any, Any, float]:
    """Features x `[M, F]`, weights v `[M]` and sqrt(v) x, float32, and the ridge."""
    import numpy as np

    from benchmarks import referee

    given = problem(pairs, width, responses)
    x = given["features"][given["pairs"][:, 0]] - given["features"][given["pairs"][:, 1]]
    v = referee.fisher_weight(x @ given["head"])
    s = np.sqrt(v)[:, None] * x
    return x, v, s, float(prior_weight * k * np.square(s).sum() / pairs / width)


def numpy_greedy(criterion: str, dtype: str, k: int, *sizes: Any) -> Callable[[], Any]:
    """Rank-one greedy with its inputs prepared; `criterion` is `dopt` or `trace`."""
    import numpy as np

    from benchmarks import referee

    x, v, s, ridge = scaled_problem(*sizes)
    x, v, s = x.astype(dtype), v.astype(dtype), s.astype(dtype)
    prior = ridge * np.eye(x.shape[1])
    if criterion == "dopt":
        return functools.partial(referee.rank_one_greedy, x, v, prior, k)
    return lambda: referee.rank_one_trace(x, v, prior, s.T @ s, k)


def bmdal(method: str, dtype: str, k: int, *sizes: Any) -> Callable[[], Any]:
    """A method of `bmdal_reg` on the linear kernel of sqrt(v) x, noise variance = the ridge; inputs prepared.

    `MaxDet` in kernel space, its default, or in feature space, which it recommends for batches of more than 4 F; `Bait`
    exists in feature space. There is no train set: MaxDet does not look at it, and BAIT is given one of zeros.
    """
    import numpy as np
    import torch

    np.Inf = np.inf  # noqa: NPY201  its last release uses the name that NumPy 2 dropped
    from bmdal_reg.bmdal import selection
    from bmdal_reg.bmdal.feature_data import TensorFeatureData
    from bmdal_reg.bmdal.feature_maps import IdentityFeatureMap
    from bmdal_reg.bmdal.features import Features

    torch.set_num_threads(len(timing.os.sched_getaffinity(0)))
    *_, s, ridge = scaled_problem(*sizes)
    data = [TensorFeatureData(torch.from_numpy(each.astype(dtype))) for each in (s, np.zeros_like(s[:1]))]
    chosen = getattr(selection, f"{method}SelectionMethod")

    def run() -> Any:
        with torch.no_grad():
            pool, train = (Features(IdentityFeatureMap(n_features=s.shape[1]), each) for each in data)
            return chosen(pool, train, sel_with_train=False, noise_sigma=ridge**0.5, verbosity=0).select(k)

    return run


def released(k: int, *sizes: Any) -> Callable[[], Any]:
    """The released rule in its faster form, in chunks, on differences and margins."""
    import torch

    from benchmarks import baselines

    torch.set_num_threads(len(timing.os.sched_getaffinity(0)))
    given = problem(*sizes[:3])
    first, second = (torch.from_numpy(given["features"][given["pairs"][:, side]]) for side in (0, 1))
    x, head = first - second, torch.from_numpy(given["head"])
    return lambda: baselines.released_dopt(x, x @ head, k, 1000)


def v_greedy(features: Any, rewards: Any, space: Any, prior: Any, k: int) -> Any:
    """Greedy for the fall of tr(C A^-1), C summed here: C = L L^T, so the columns of L are targets."""
    import jax.numpy as jnp

    from jarm.core.linalg import cholesky
    from jarm.design.criteria import v_optimal
    from jarm.design.fisher import space_information
    from jarm.design.greedy import greedy

    factor, _ = cholesky(space_information(features, rewards, space)[0])
    return greedy(v_optimal(factor.T, jnp.ones(len(factor))), features, rewards, space, prior, k)


def judge(sides: Sequence[timing.Side], criterion: str, pairs: Any, x: Any, v: Any, prior: Any, floor: float) -> None:
    """What the batch of each side is worth by either criterion, and whether its own was served at every step."""
    import numpy as np

    from benchmarks import referee

    second = x.astype(float).T @ (v[:, None] * x.astype(float))
    place = {tuple(pair): index for index, pair in enumerate(pairs.tolist())}
    for side in sides:
        if side is sides[0]:
            selection, info = side.result
            picks = np.array([place[tuple(pair)] for pair in np.asarray(selection.pairs).tolist()])
            side.outcome = {"passes": int(info.passes), "one_pass_floor_s": floor}
        else:
            picks = np.asarray(side.result[0] if isinstance(side.result, tuple) else side.result)
        if criterion == "dopt":
            side.outcome |= referee.judge_greedy(picks, x, v, prior)
        else:
            side.outcome |= referee.judge_trace(picks, x, v, prior, second)
        side.outcome["log_det"] = referee.log_det(x, v, prior, picks)
        side.outcome["trace"] = referee.trace(x, v, prior, second, picks)


def main() -> None:
    options = timing.start(
        pairs=[10_000, 100_000], width=64, responses=5000, k=256, prior_weight=0.1, criteria=["dopt", "trace"]
    )
    import jax.numpy as jnp
    import numpy as np

    from jarm.core.base import PairSpace
    from jarm.design.criteria import D_OPTIMAL
    from jarm.design.greedy import greedy

    try:
        import bmdal_reg  # noqa: F401

        has_bmdal = True
    except ImportError:
        print("bmdal_reg cannot be imported: MaxDet and BAIT are left out")
        has_bmdal = False

    product, reading = timing.gemm_rate(), timing.read_rate()
    print(f"one product of 1024 x 1024: {product / 1e9:.0f} Gflop/s; reading: {reading / 1e9:.1f} GB/s")
    for pairs in options.pairs:
        given = problem(pairs, options.width, options.responses)
        sizes = (pairs, options.width, options.responses, options.k, options.prior_weight)
        x, v, _, ridge = scaled_problem(*sizes)
        prior = ridge * np.eye(options.width)
        features = jnp.asarray(given["features"])
        space = PairSpace(
            kind="listed",
            width=1,
            eligible=jnp.ones(len(features), bool),
            excluded=jnp.zeros((0, 2), jnp.int32),
            pairs=jnp.asarray(given["pairs"]),
        )
        arguments = (features, features @ given["head"], space, jnp.asarray(prior, jnp.float32))
        # One pass: whiten the responses or the pairs, whichever are fewer, and read what is scored.
        operations = min(pairs, len(features)) * options.width**2 + 4 * pairs * options.width
        floor = max(operations / product, 4 * features.size / reading)
        for criterion in options.criteria:
            chosen = functools.partial(greedy, D_OPTIMAL) if criterion == "dopt" else v_greedy
            run = functools.partial(chosen, k=options.k)
            sides = [timing.jax_side("jarm", run, *arguments)]
            others: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
            for dtype in ("float32", "float64"):
                others[f"numpy rank-one, {dtype}"] = (numpy_greedy, (criterion, dtype))
                methods = {"dopt": ("MaxDet", "MaxDetFeatureSpace"), "trace": ("BaitFeatureSpace",)}[criterion]
                for method in methods if has_bmdal else ():
                    others[f"bmdal_reg {method}, {dtype}"] = (bmdal, (method, dtype))
            if criterion == "dopt":
                others["released rule, one shot"] = (released, ())
            for name, (setup, extra) in others.items():
                sides.append(timing.Side(name, setup(*extra, options.k, *sizes)))
                sides[-1].rss_growth_bytes = timing.resident_growth(setup, *extra, options.k, *sizes)

            judged = functools.partial(judge, sides, criterion, given["pairs"], x, v, prior, floor)
            timing.compare(
                f"greedy_{criterion}",
                sides,
                sizes={"M": pairs, "F": options.width, "N": len(features), "k": options.k, "c": options.prior_weight},
                after=judged,
            )


if __name__ == "__main__":
    main()
