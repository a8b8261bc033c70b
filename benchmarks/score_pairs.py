"""(a) D-optimal and past-aware D-optimal scores of listed pairs, and the top 256, against the released rules.

    python -m benchmarks.score_pairs --out benchmarks/results/score_pairs.jsonl

Pairs of 5,000 responses, as in the paper's rounds of 500 prompts x 10 (`--responses 0`: each pair has its own two).
Every side gets what it would hold at that point: jarm the features of the responses and the indices of the pairs, the
PyTorch rules the features of both ends of every pair; and the last layer of the head. Margins, and for `pa_dopt` the
information of 1,000 labelled pairs, are part of what is timed on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import timing

LABELS = 1000


def problem(pairs: int, width: int, responses: int, seed: int = 0) -> dict[str, Any]:
    """Features, head, distinct pairs and past pairs, as NumPy arrays; margins have a standard deviation of 1.5."""
    import numpy as np

    rng = np.random.default_rng(seed)
    n = responses or 2 * (pairs + LABELS)
    features = rng.standard_normal((n, width), np.float32)
    head = rng.standard_normal(width, np.float32) * np.float32(1.5 / np.sqrt(2 * width))
    if responses:
        draws = np.sort(rng.integers(0, n, (2 * (pairs + LABELS), 2)), axis=1)
        draws = np.unique(draws[draws[:, 0] != draws[:, 1]], axis=0)
        both = rng.permutation(draws)[: pairs + LABELS]
    else:
        both = np.arange(n).reshape(-1, 2)
    return {"features": features, "head": head, "pairs": both[:pairs].astype(np.int32), "past": both[pairs:]}


def torch_rule(kind: str, rule: str, k: int, chunk: int | None, *sizes: int) -> Callable[[], Any]:
    """A PyTorch rule with its inputs prepared; `kind` is `released`, `closed_form` or `product`."""
    import torch

    from benchmarks import baselines

    torch.set_num_threads(len(timing.os.sched_getaffinity(0)))
    given = problem(*sizes)
    features, head = torch.from_numpy(given["features"]), torch.from_numpy(given["head"])
    ends = [features[torch.from_numpy(given["pairs"][:, side])] for side in (0, 1)]
    past = [features[torch.from_numpy(given["past"][:, side])] for side in (0, 1)]

    def run() -> Any:
        x = ends[0] - ends[1]
        pairs = x, x @ head
        labelled = None
        if rule == "pa_dopt":
            past_x = past[0] - past[1]
            labelled = past_x, past_x @ head
        if kind == "product":
            return baselines.gemm_dopt(torch, *pairs, k, labelled)
        if labelled is not None:
            if kind == "closed_form":
                return baselines.closed_form_dopt(*pairs, k, labelled)
            return baselines.released_pa_dopt(*pairs, *labelled, k, chunk)
        if kind == "closed_form":
            return baselines.closed_form_dopt(*pairs, k)
        return baselines.released_dopt(*pairs, k, chunk)

    return run


def numpy_rule(rule: str, k: int, *sizes: int) -> Callable[[], Any]:
    """The rule by one product in NumPy, with its inputs prepared."""
    import numpy as np

    from benchmarks import baselines

    given = problem(*sizes)
    features, head = given["features"], given["head"]
    ends, past = (tuple(features[given[name][:, side]] for side in (0, 1)) for name in ("pairs", "past"))

    def run() -> Any:
        x, past_x = ends[0] - ends[1], past[0] - past[1]
        labelled = (past_x, past_x @ head) if rule == "pa_dopt" else None
        return baselines.gemm_dopt(np, x, x @ head, k, labelled)

    return run


def main() -> None:
    options = timing.start(pairs=[10_000, 20_000], widths=[64, 256], responses=5000, k=256, largest_gb=12.0)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import referee
    from jarm.acquisition.registry import get_rule
    from jarm.core.base import Belief, HParams, PairSpace
    from jarm.core.linalg import matmul
    from jarm.design.fisher import fisher_weight, pair_information

    product, reading = timing.gemm_rate(), timing.read_rate()
    print(f"one product of 1024 x 1024: {product / 1e9:.0f} Gflop/s; reading: {reading / 1e9:.1f} GB/s")
    for width in options.widths:
        for pairs in options.pairs:
            sizes = (pairs, width, options.responses)
            given = problem(*sizes)
            x = given["features"][given["pairs"][:, 0]] - given["features"][given["pairs"][:, 1]]
            past_x = (given["features"][given["past"][:, 0]] - given["features"][given["past"][:, 1]]).astype(float)
            v, past_v = (
                referee.fisher_weight(x.astype(float) @ given["head"]),
                referee.fisher_weight(past_x @ given["head"]),
            )
            past = past_x.T @ (past_v[:, None] * past_x)
            features = jnp.asarray(given["features"])
            space = PairSpace(
                kind="listed",
                width=1,
                eligible=jnp.ones(len(features), bool),
                excluded=jnp.zeros((0, 2), jnp.int32),
                pairs=jnp.asarray(given["pairs"]),
            )
            place = {tuple(pair): index for index, pair in enumerate(given["pairs"].tolist())}
            for rule in ("dopt", "pa_dopt"):
                scores = referee.leverages(x, v, past if rule == "pa_dopt" else 0.0)

                def run(key: Any, features: Any, head: Any, labelled: Any, space: Any, rule: str = rule) -> Any:
                    rewards = matmul(features, head)
                    first, second = labelled.T
                    weight = fisher_weight(rewards[first] - rewards[second])
                    known = pair_information(features[first], features[second], weight)
                    ends = features[labelled], rewards[labelled]
                    belief = Belief(features, rewards, rewards[None], known, jnp.int32(LABELS), *ends)
                    return get_rule(rule)(key, HParams(), belief, space, options.k)

                arguments = (jax.random.key(0), features, given["head"], given["past"].astype(np.int32), space)
                ours = timing.jax_side("jarm", run, *arguments)
                sides = [ours]
                for kind, chunk in (("released", None), ("released", 1000), ("closed_form", None), ("product", None)):
                    if kind == "released" and 8 * (chunk or pairs) * width**2 > options.largest_gb * 1e9:
                        print(f"left out: {kind} whole at {pairs} x {width} needs more than {options.largest_gb} GB")
                        continue
                    arguments = (kind, rule, options.k, chunk, *sizes)
                    name = f"torch, {kind.replace('_', ' ')}" + (f" in chunks of {chunk}" if chunk else "")
                    growth = timing.resident_growth(torch_rule, *arguments)
                    sides.append(timing.Side(name, torch_rule(*arguments), rss_growth_bytes=growth))
                growth = timing.resident_growth(numpy_rule, rule, options.k, *sizes)
                own = numpy_rule(rule, options.k, *sizes)
                sides.append(timing.Side("NumPy, product", own, rss_growth_bytes=growth))
                for side in sides:
                    result = side.run()
                    if side is ours:
                        picks = np.array([place[tuple(pair)] for pair in np.asarray(result.pairs).tolist()])
                    else:
                        picks = np.asarray(result)
                    side.outcome = referee.judge_top(picks, scores)
                # The least: M F^2 operations for a symmetric sum, as many a response (or a pair, where they are
                # fewer) for a triangular product; and one reading of features and indices.
                operations = (pairs + min(pairs, len(features))) * width**2
                floor = max(operations / product, (4 * features.size + 8 * pairs) / reading)
                ours.outcome["floor_s"] = floor
                timing.compare(rule, sides, sizes={"M": pairs, "F": width, "N": len(features), "k": options.k})


if __name__ == "__main__":
    main()
