"""Exact greedy selection over every pair of N responses, none of them listed, against bare products of the same blocks.

    python -m benchmarks.every_pair --out benchmarks/results/every_pair.jsonl
    python -m benchmarks.every_pair --kind within --responses 5000 400000 --out benchmarks/results/every_pair.jsonl
    python -m benchmarks.every_pair --figure docs/figures/every_pair.png

Bare products: the blocks of features of all pairs of responses, each with each, reduced to one maximum; nothing is
weighted, masked, ranked or kept. A pass keeps the best K + k pairs. A greedy batch is timed against as many such passes
as it made, one run after the other. The judge goes through all pairs in float64 at evenly spaced steps of the batch.
"""

from __future__ import annotations

import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import timing

WIDTH = 10
"""Responses a prompt."""
LONG = 2e8
"""From so many pairs on everything runs once."""


def problem(size: int, width: int, seed: int = 0) -> tuple[Any, Any]:
    """Features `[N, F]` and rewards `[N]`, float32; margins have a standard deviation of 1.5."""
    import numpy as np

    rng = np.random.default_rng(seed)
    features = rng.standard_normal((size, width), np.float32)
    return features, features @ (rng.standard_normal(width, np.float32) * np.float32(1.5 / np.sqrt(2 * width)))


def count_pairs(kind: str, size: int) -> int:
    return size * (size - 1) // 2 if kind == "all" else size * (WIDTH - 1) // 2


def make_space(kind: str, size: int) -> Any:
    import jax.numpy as jnp

    from jarm.design.spaces import pair_space

    return pair_space(kind, WIDTH if size % WIDTH == 0 else 1, jnp.ones(size, bool))


def one_pass(features: Any, rewards: Any, space: Any, keep: int) -> Any:
    """The `keep` pairs of largest leverage."""
    import jax.numpy as jnp

    from jarm.design.criteria import D_OPTIMAL, Numbers
    from jarm.design.passes import best_pairs

    numbers = Numbers(rewards, features, features[:, :0])
    return best_pairs(D_OPTIMAL.scorer(numbers, jnp.zeros(0)), space, keep)


def bare_products(features: Any, kind: str, block: int = 500) -> Any:
    """The largest product of features of two responses: blocks on and above the diagonal, or prompt by prompt."""
    import jax
    import jax.numpy as jnp

    from jarm.core.linalg import matmul

    size, width = features.shape
    if kind == "within":
        prompts = features.reshape(-1, WIDTH, width)
        return jax.lax.map(lambda own: matmul(own, own.T).max(), prompts, batch_size=500).max()
    count = -(-size // block)
    block = -(-size // count)
    features = jnp.pad(features, ((0, count * block - size), (0, 0)))
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, features, slice_size=block)

    def of_block(row: Any, best: Any) -> Any:
        def of_pair(column: Any, best: Any) -> Any:
            return jnp.maximum(best, matmul(cut(row * block), cut(column * block).T).max())

        return jax.lax.fori_loop(row, count, of_pair, best)

    return jax.lax.fori_loop(0, count, of_block, jnp.float32(-jnp.inf))


def numpy_products(features: Any, block: int = 500) -> float:
    """The same in NumPy, for all pairs."""
    import numpy as np

    size, best = len(features), -np.inf
    space = np.empty(block * block, np.float32)
    for row in range(0, size, block):
        own = features[row : row + block]
        for column in range(row, size, block):
            other = features[column : column + block]
            out = space[: len(own) * len(other)].reshape(len(own), len(other))
            best = max(best, np.matmul(own, other.T, out=out).max())
    return float(best)


def prior_of(name: str, features: Any, rewards: Any, space: Any, k: int) -> Any:
    """A ridge of so much, or `shaped`: .1 k times the mean information of a pair, the default of `greedy_dopt`."""
    import jax
    import jax.numpy as jnp

    from jarm.design.fisher import space_information

    if name != "shaped":
        return float(name) * jnp.eye(features.shape[1])
    total, count = jax.jit(space_information)(features, rewards, space)
    return jax.block_until_ready(0.1 * k * total / count)


def greedy_run(kind: str, size: int, width: int, k: int, prior: Any) -> Callable[[], Any]:
    """The greedy batch, compiled, with its inputs prepared: for the memory that a run takes."""
    import jax
    import jax.numpy as jnp

    from jarm.design.criteria import D_OPTIMAL
    from jarm.design.greedy import greedy

    features, rewards = map(jnp.asarray, problem(size, width))
    space = make_space(kind, size)
    arguments = (features, rewards, space, jnp.asarray(prior))
    compiled = jax.jit(functools.partial(greedy, D_OPTIMAL, k=k)).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def judge(
    picks: Any, info: Any, features: Any, rewards: Any, prior: Any, kind: str, steps: int, kept: int
) -> dict[str, Any]:
    """The referee at `steps` steps, evenly spaced; every other one is moved to the nearest that follows a pass."""
    import numpy as np

    from benchmarks import referee

    size, k = len(features), len(picks)
    fresh = np.asarray(info.fresh)
    wanted = np.linspace(0, k - 1, min(steps, k)).astype(int)
    passes = np.flatnonzero(fresh)
    if steps < k:
        wanted[::2] = [passes[np.abs(passes - step).argmin()] for step in wanted[::2]]
    parts = referee.all_parts() if kind == "all" else referee.listed_parts(referee.within_pairs(size, WIDTH))
    arrays = (np.asarray(each) for each in (picks, features, rewards, prior))
    certificate = {"ceilings": np.asarray(info.ceilings), "fresh": fresh, "kept": kept}
    return referee.judge_in_space(*arrays, parts, wanted.tolist(), **certificate)


def measure(size: int, options: Any, product: float) -> None:
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import referee
    from jarm.design.criteria import D_OPTIMAL
    from jarm.design.greedy import default_shortlist, greedy

    kind, k = options.kind, options.k
    pairs = count_pairs(kind, size)
    host, rewards = problem(size, options.width)
    features, rewards = jnp.asarray(host), jnp.asarray(rewards)
    space = make_space(kind, size)
    keep = default_shortlist(space) + k
    sizes: dict[str, Any] = {"N": size, "F": options.width, "pairs": pairs}
    long = pairs >= LONG
    once: dict[str, Any] = {"turns": 1, "warm": False} if long else {}

    whole = timing.jax_side("jarm, one exact pass", functools.partial(one_pass, keep=keep), features, rewards, space)
    bare = timing.jax_side("tiled products, reduced", functools.partial(bare_products, kind=kind), features)
    sides = [bare, whole]
    if kind == "all":
        sides.append(timing.Side("tiled products, reduced, NumPy", functools.partial(numpy_products, host)))
    whole.outcome = {"kept": keep, "floor_s": 2 * pairs * options.width / product}
    if pairs < LONG:
        parts = referee.all_parts() if kind == "all" else referee.listed_parts(referee.within_pairs(size, WIDTH))
        found = np.asarray(whole.run().scores)
        last = float(found[np.isfinite(found)][-1])
        # How many pairs score more than the worst that was kept, and how many clearly more.
        for name, bound in (("above_last", last), ("clearly_above_last", last * (1 + 1e-5))):
            whole.outcome[name] = referee.count_above(bound, host, np.asarray(rewards), parts)
    rows = timing.compare(f"one pass, {kind}", sides, sizes=sizes, **once)

    seconds = rows[1]["cpu_s" if options.cores == "1" else "wall_s"]

    for name in options.priors[-1:] if long else options.priors:
        begin = time.process_time()
        prior = prior_of(name, features, rewards, space, k)
        prior_s = time.process_time() - begin
        arguments = (features, rewards, space, prior)
        side = timing.jax_side("jarm, exact greedy", functools.partial(greedy, D_OPTIMAL, k=k), *arguments)
        if options.cores == "1":
            side.rss_growth_bytes = timing.resident_growth(greedy_run, kind, size, options.width, k, np.asarray(prior))

        def look(side: timing.Side = side, prior: Any = prior, prior_s: float = prior_s, name: str = name) -> None:
            selection, info = side.result
            side.outcome = {"passes": int(info.passes), "kept": keep, "status": int(selection.status)}
            side.outcome["seconds_of_passes"] = int(info.passes) * seconds
            if name == "shaped":
                side.outcome["seconds_of_prior"] = prior_s  # compiled with it
            if options.judge:
                side.outcome |= judge(selection.pairs, info, host, rewards, prior, kind, options.judge, keep)

        sides = [side]
        if not long:
            count = int(side.run()[1].passes)
            sides.insert(0, timing.Side(f"{count} passes", functools.partial(_repeat, whole.run, count)))
        sizes_of = {**sizes, "k": k, "prior": name}
        timing.compare(f"exact greedy, {kind}", sides, sizes=sizes_of, after=look, **once)


def _repeat(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Processor seconds against pairs, both on log axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        kind = row["name"].split(", ")[-1]
        if row["cores"] != "1" or kind != "all" or row["sizes"].get("prior", "shaped") != "shaped":
            continue
        label = {
            "jarm, one exact pass": "one exact pass",
            "tiled products, reduced": "bare products, reduced to a maximum",
            "jarm, exact greedy": "exact greedy batch of 500",
        }.get(row["side"])
        if label:
            lines.setdefault(label, {})[row["sizes"]["pairs"]] = row["cpu_s"]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (label, points), style in zip(lines.items(), (":s", "--o", "-o"), strict=True):
        x = sorted(points)
        axes.loglog(x, [points[each] for each in x], style, markersize=4, label=label)
    axes.set(xlabel="pairs of responses, all of them candidates", ylabel="processor seconds, one core")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = timing.start(
        responses=[142, 448, 1415, 5000, 20_000, 100_000],
        kind="all",
        width=64,
        k=500,
        priors=["0.01", "1", "100", "shaped"],
        judge=0,
        figure="",
    )
    if options.figure:
        rows = [json.loads(line) for line in (timing.RESULTS / "every_pair.jsonl").read_text().splitlines()]
        draw(pathlib.Path(options.figure), rows)
        return
    product = timing.gemm_rate()
    print(f"one product of 1024 x 1024: {product / 1e9:.0f} Gflop/s")
    for size in options.responses:
        measure(size, options, product)


if __name__ == "__main__":
    main()
