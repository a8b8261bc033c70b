"""How to run several seeds of one rule: one by one, by `lax.map`, by `vmap`, or in threads.

    python -m benchmarks.seeds --cores all --out benchmarks/results/seeds.jsonl

Whole runs with the defaults of `jarm compare` on the built-in data, `greedy_dopt`. On all cores, since that is where
threads could win; ratios are of wall time. `jarm compare` runs seeds as the outcome says: see `jarm.runs.runner`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from typing import Any

from benchmarks import timing


def main() -> None:
    options = timing.start(data="synthetic", embeddings="", target="", seeds=4)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jarm.core.status import check
    from jarm.data.datasets import load
    from jarm.loop.device_table import prepare
    from jarm.loop.loop import make_loop
    from jarm.runs.config import PAPER, CompareConfig
    from jarm.runs.programs import default_workers

    config = CompareConfig(**{**PAPER, "rules": "greedy_dopt"})
    loop = config.loop()
    benchmark = load(options.data, embeddings=options.embeddings or None, target=options.target or None)
    device_table, hparams, _ = prepare(loop, benchmark.train, config.hparams())
    rule = jnp.int32(loop.rules.index("greedy_dopt"))

    def run_with(batching: str) -> Any:
        own = dataclasses.replace(loop, fit=dataclasses.replace(loop.fit, batching=batching))
        return functools.partial(make_loop(own).run, hparams=hparams, table=device_table, rule=rule)

    run = run_with("auto")
    keys = jnp.stack([jax.random.key(seed) for seed in range(options.seeds)])
    one = timing.jax_side("", run, keys[0])
    single = jax.jit(run).lower(keys[0]).compile()

    def in_threads() -> Any:
        with concurrent.futures.ThreadPoolExecutor(default_workers()) as workers:
            return list(workers.map(lambda key: jax.block_until_ready(single(key)), keys))

    sides = [
        timing.Side("one by one", lambda: [jax.block_until_ready(single(key)) for key in keys], one.compile_s),
        timing.Side(f"{default_workers()} threads", in_threads, one.compile_s),
        timing.jax_side("lax.map", functools.partial(jax.lax.map, run), keys),
        timing.jax_side("vmap", jax.vmap(run_with("vmap")), keys),
    ]
    sides[0].temp_bytes = one.temp_bytes
    for side in sides:
        result = side.run()
        records = [result[1]] if isinstance(result, tuple) else [records for _, records in result]
        check(np.concatenate([np.ravel(each.status) for each in records]), side.name)
        side.outcome["valid_nll"] = float(np.nanmean([np.asarray(each.fit.valid_nll) for each in records]))
    sizes = {"seeds": options.seeds, "d": int(device_table.embeddings.shape[2]), "members": config.members}
    timing.compare("seeds", sides, sizes=sizes)


if __name__ == "__main__":
    main()
