"""(b) Exact greedy D-optimal choice of 256 listed pairs, against rank-one greedy in NumPy and MaxDet of `bmdal_reg`.

    python -m benchmarks.greedy --out benchmarks/results/greedy.jsonl

All sides start from the same ridge, `c n tr(Ibar) / F`, and get what they would hold at that point: jarm features of
responses and indices of pairs, the others sqrt(v) x of every pair. The judge is a float64 replay of the picks.
`bmdal_reg` is optional: where it cannot be imported its rows are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from benchmarks import timing
from benchmarks.score_pairs import problem


def scaled_problem(pairs: int, width: int, responses: int, k: int, prior: float) -> tuple[Any, Any, Any, float]:
    """Features x `[M, F]`, weights v `[M]` and sqrt(v) x, float32, and the ridge."""
    import numpy as np

    from benchmarks import referee

    given = problem(pairs, width, responses)
    x = given["features"][given["pairs"][:, 0]] - given["features"][given["pairs"][:, 1]]
    v = referee.fisher_weight(x @ given["head"])
    s = np.sqrt(v)[:, None] * x
    return x, v, s, float(prior * k * np.square(s).sum() / pairs / width)


def numpy_greedy(dtype: str, k: int, *sizes: Any) -> Callable[[], Any]:
    """Rank-one greedy with its inputs prepared."""
    import numpy as np

    from benchmarks import referee

    x, v, _, ridge = scaled_problem(*sizes)
    x, v = x.astype(dtype), v.astype(dtype)
    return functools.partial(referee.rank_one_greedy, x, v, ridge * np.eye(x.shape[1]), k)


def bmdal_maxdet(feature_space: bool, dtype: str, k: int, *sizes: Any) -> Callable[[], Any]:
    """MaxDet of `bmdal_reg` on the linear kernel of sqrt(v) x, noise variance = the ridge; inputs prepared.

    In kernel space, its default, or in feature space, which it recommends for batches of more than 4 F.
    """
    import numpy as np
    import torch

    np.Inf = np.inf  # noqa: NPY201  its last release uses the name that NumPy 2 dropped
    from bmdal_reg.bmdal.feature_data import TensorFeatureData
    from bmdal_reg.bmdal.feature_maps import IdentityFeatureMap
    from bmdal_reg.bmdal.features import Features
    from bmdal_reg.bmdal.selection import MaxDetFeatureSpaceSelectionMethod, MaxDetSelectionMethod

    torch.set_num_threads(len(timing.os.sched_getaffinity(0)))
    *_, s, ridge = scaled_problem(*sizes)
    data = TensorFeatureData(torch.from_numpy(s.astype(dtype)))
    method = MaxDetFeatureSpaceSelectionMethod if feature_space else MaxDetSelectionMethod

    def run() -> Any:
        with torch.no_grad():
            pool = Features(IdentityFeatureMap(n_features=s.shape[1]), data)
            return method(pool, pool[:1], sel_with_train=False, noise_sigma=ridge**0.5, verbosity=0).select(k)

    return run


def main() -> None:
    options = timing.start(pairs=[10_000, 100_000], width=64, responses=5000, k=256, prior=0.1)
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import referee
    from jarm.base import PairSpace
    from jarm.greedy import greedy_log_det

    try:
        import bmdal_reg  # noqa: F401

        has_bmdal = True
    except ImportError:
        print("bmdal_reg cannot be imported: MaxDet is left out")
        has_bmdal = False

    product, reading = timing.gemm_rate(), timing.read_rate()
    print(f"one product of 1024 x 1024: {product / 1e9:.0f} Gflop/s; reading: {reading / 1e9:.1f} GB/s")
    for pairs in options.pairs:
        given = problem(pairs, options.width, options.responses)
        sizes = (pairs, options.width, options.responses, options.k, options.prior)
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
        run = functools.partial(greedy_log_det, k=options.k)
        arguments = (features, features @ given["head"], space, jnp.asarray(prior, jnp.float32))
        ours = timing.jax_side("jarm", run, *arguments)
        sides = [ours]
        for dtype in ("float32", "float64"):
            sides.append(timing.Side(f"numpy rank-one, {dtype}", numpy_greedy(dtype, options.k, *sizes)))
            sides[-1].rss_growth_bytes = timing.resident_growth(numpy_greedy, dtype, options.k, *sizes)
        for space_name in ("kernel", "feature") if has_bmdal else ():
            setup = (space_name == "feature", "float64", options.k, *sizes)
            sides.append(timing.Side(f"bmdal_reg MaxDet, {space_name} space", bmdal_maxdet(*setup)))
            sides[-1].rss_growth_bytes = timing.resident_growth(bmdal_maxdet, *setup)
        place = {tuple(pair): index for index, pair in enumerate(given["pairs"].tolist())}
        for side in sides:
            result = side.run()
            if side is ours:
                selection, info = result
                picks = np.array([place[tuple(pair)] for pair in np.asarray(selection.pairs).tolist()])
                # One pass: whiten the responses or the pairs, whichever are fewer, and read what is scored.
                whitened = min(pairs, len(features))
                operations = whitened * options.width**2 + 4 * pairs * options.width
                floor = max(operations / product, 4 * features.size / reading)
                side.outcome = {"passes": int(info.passes), "one_pass_floor_s": floor}
            else:
                picks = np.asarray(result[0] if isinstance(result, tuple) else result)
                side.outcome = {}
            side.outcome |= referee.judge_greedy(picks, x, v, prior)
            side.outcome["log_det"] = referee.log_det(x, v, prior, picks)
        timing.compare(
            "greedy_dopt",
            sides,
            sizes={"M": pairs, "F": options.width, "N": len(features), "k": options.k, "c": options.prior},
        )


if __name__ == "__main__":
    main()
