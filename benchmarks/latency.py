"""How long a user waits: the command and the library in fresh processes, two checkouts of jarm in turn.

    python -m benchmarks.latency --before ../old --after . --out benchmarks/results/latency.jsonl
    python -m benchmarks.latency --before ../old --parts compare --turns 2

Processor seconds of the process and its threads, wall seconds beside them, and the largest resident memory. Parts:
`import`, `import jarm`; `jax`, `import jax` alone, the same on both sides; `help`, `jarm --help`; `command help`,
`jarm compare --help`; `compare`, the command without options, first with an empty cache of compiled programs (cold),
then with the one it left (warm); `select small`, calls of `jarm.select` for 32 of all pairs of 300 responses with 16
features, and `select large`, for 500 of those of 5,000 with 64: the first call of a process, cold and warm, and the
slowest of five after it, each with 37 responses and a pair more, all without the import; `embed`, the texts of a file
by an encoder (`--texts`, `--model`), cold and warm, and with `--peer`, the Python of an environment with
sentence-transformers, the same by that library.

Ratios are after / before of one turn. The command is that of the checkout; the instrument is this file on both sides.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks import timing

SIDES = ("before", "after")
PEER = """
import json, sys, numpy, sentence_transformers
model = sentence_transformers.SentenceTransformer(sys.argv[1], device="cpu")
model.max_seq_length = 512
rows = [json.loads(line) for line in open(sys.argv[2])]
numpy.save(sys.argv[3], model.encode([row["prompt"] + "\\n\\n" + row["response"] for row in rows]))
"""
SELECT = """
import json, sys, time
import numpy as np, jarm
jarm.select  # imported
size, width, k = map(int, sys.argv[1:])
rng, found = np.random.default_rng(0), []
for number in range(6):
    features, rewards = rng.normal(size=(size + 37 * number, width)), rng.normal(size=size + 37 * number)
    cpu, wall = time.process_time(), time.perf_counter()
    jarm.select(features, rewards, space="all", k=k + number)
    found.append({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "peak_mb": 0.0})
print(json.dumps([found[0], max(found[1:], key=lambda each: each["wall"])]))
"""
SIZES = {"select small": ("300", "16", "32"), "select large": ("5000", "64", "500")}
Measure = dict[str, float]


def took(words: Sequence[str], tree: pathlib.Path, folder: str) -> Measure:
    """Run a Python process to its end: processor and wall seconds, and megabytes at its largest."""
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": str(tree)}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(folder, "compiled"))
    start = time.perf_counter()
    process = subprocess.Popen(words, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with code {process.returncode} in {tree}.")
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": wall, "peak_mb": usage.ru_maxrss / 1e3}


def selections(part: str, tree: pathlib.Path, home: str) -> list[Measure]:
    """The first call of a process, and the slowest of those after it; programs are kept where the library does."""
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": str(tree), "HOME": home}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    words = [sys.executable, "-c", SELECT, *SIZES[part]]
    done = subprocess.run(words, env=environment, cwd=home, check=True, capture_output=True)
    found: list[Measure] = json.loads(done.stdout)
    return found


def measures(part: str, tree: pathlib.Path, texts: str, model: str) -> dict[str, Measure]:
    """Name -> what one turn of a part took."""
    jarm = [sys.executable, "-m", "jarm.cli"]
    simple = {
        "jax": [sys.executable, "-c", "import jax"],
        "import": [sys.executable, "-c", "import jarm"],
        "help": [*jarm, "--help"],
        "command help": [*jarm, "compare", "--help"],
    }
    with tempfile.TemporaryDirectory() as folder:
        if part in simple:
            return {part: took(simple[part], tree, folder)}
        if part in SIZES:
            return {
                f"{part}, {what}, {cache}": measure
                for cache in ("cold", "warm")
                for what, measure in zip(("first", "later"), selections(part, tree, folder), strict=True)
            }
        words = [*jarm, part]
        if part == "embed":
            words += ["--model", model, "--input", texts, "--max-length", "512"]
        return {f"{part}, {cache}": took([*words, "--out", cache], tree, folder) for cache in ("cold", "warm")}


def rows_of(name: str, sides: dict[str, list[Measure]], first: str) -> list[dict[str, object]]:
    """A row for each side: medians, and ratios to the first side of the same turn."""
    return [
        timing.row(
            f"latency, {name}",
            side,
            sizes={},
            cpu=statistics.median(each["cpu"] for each in found),
            wall=statistics.median(each["wall"] for each in found),
            ratios=[own["cpu"] / other["cpu"] for own, other in zip(found, sides[first], strict=True)],
            turns=len(found),
            outcome={"peak_mb": max(each["peak_mb"] for each in found)},
        )
        for side, found in sides.items()
    ]


def main() -> None:
    parts = ["jax", "import", "help", "command help", *SIZES, "compare"]
    options = timing.start(before="", after=".", parts=parts, texts="", model="", peer="")
    trees = {side: pathlib.Path(getattr(options, side)).resolve() for side in SIDES}
    texts, rows = str(pathlib.Path(options.texts).resolve()), []
    for part in options.parts:
        found: dict[str, dict[str, list[Measure]]] = {}
        for turn in range(options.turns):
            for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                for name, measure in measures(part, trees[side], texts, options.model).items():
                    found.setdefault(name, {}).setdefault(side, []).append(measure)
            if part == "embed" and options.peer:
                with tempfile.TemporaryDirectory() as folder:
                    words = [options.peer, "-c", PEER, options.model, texts, "out.npy"]
                    measure = took(words, trees["after"], folder)
                for name in found:
                    found[name].setdefault("sentence-transformers", []).append(measure)
            print(json.dumps({name: {side: each[-1] for side, each in own.items()} for name, own in found.items()}))
        for name, own in found.items():
            rows += rows_of(name, own, "before")
    timing.report(rows)


if __name__ == "__main__":
    main()
