"""Metrics on a test set of the published size, 2,000 x 500 x 2,048, memory-mapped: time, and memory beyond the file.

    python -m benchmarks.evaluate --out benchmarks/results/evaluate.jsonl

The file is made in a temporary folder (4.1 GB of float16). Memory is the growth of the process's own pages, sampled
every few milliseconds; pages of the file that the system keeps in its cache are not counted. The floor is one reading
of the file plus the products of the heads, at the rates measured here.
"""

from __future__ import annotations

import pathlib
import tempfile
import threading
import time
from typing import Any

from benchmarks import timing


class Watch(threading.Thread):
    """Samples the resident memory of this process that belongs to no file, until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stopped, self.before, self.most = threading.Event(), self.now(), 0

    @staticmethod
    def now() -> int:
        """Bytes of this moment."""
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

    def run(self) -> None:
        """Keep the most that was seen."""
        while not self.stopped.wait(0.005):
            self.most = max(self.most, self.now() - self.before)


def main() -> None:
    options = timing.start(prompts=2000, responses=500, width=2048, members=4)
    import jax
    import numpy as np

    from jarm.core.tables import ResponseTable
    from jarm.evaluation.metrics import evaluate
    from jarm.reward.heads import mlp_head

    P, R, d = options.prompts, options.responses, options.width
    product, reading = timing.gemm_rate(), timing.read_rate()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "embeddings.npy"
        store = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(P * R, d))
        block = rng.standard_normal((10_000, d), np.float32).astype(np.float16)
        for start in range(0, P * R, len(block)):
            store[start : start + len(block)] = block[: P * R - start]
        store.flush()
        table = ResponseTable(
            store=np.load(path, mmap_mode="r"),
            rows=np.arange(P * R).reshape(P, R),
            mask=np.ones((P, R), bool),
            gold=rng.standard_normal((P, R)).astype(np.float32),
        )
        head = mlp_head()
        keys = jax.random.split(jax.random.key(0), (1, options.members))
        params = jax.vmap(jax.vmap(lambda key: head.init(key, d)))(keys)

        def run() -> Any:
            return evaluate(head, params, table, noise=2.0, scale=1.0)

        watch = Watch()
        watch.start()
        begin = time.perf_counter()
        run()
        first_s = time.perf_counter() - begin
        watch.stopped.set()
        watch.join()
        side = timing.Side("jarm", run, rss_growth_bytes=watch.most)
        operations = 2.0 * P * R * options.members * (d * 64 + 2 * 64 * 64 + 64)
        side.outcome = {"first_s": first_s, "floor_s": operations / product + 2.0 * P * R * d / reading}
        sizes = {"P": P, "R": R, "d": d, "members": options.members}
        timing.compare("evaluate", [side], sizes=sizes, turns=3)


if __name__ == "__main__":
    main()
