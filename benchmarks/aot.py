"""What the TPU compiler makes of the main programs, on a machine without a TPU: estimates, memory, communication.

    pip install libtpu==0.0.42.1                       # as jaxlib 0.10.2 wants it: `pip install 'jax[tpu]'` chooses
    python -m benchmarks.aot --out benchmarks/results/aot.jsonl
    python -m benchmarks.aot --list short              # compile only, the programs that CI compiles
    python -m benchmarks.aot --list all --topology v5e:4x4

Nothing runs: these are the compiler's figures, and no measurements. It gives each operation a number of cycles; a loop
counts as often as its condition says, and once where the data decide; of branches the longest counts. Sorts and calls
of the compiler's own have no number, and are counted apart. Seconds are cycles at 1.5 GHz, at which the matrix units of
a v5e do their 197 TFLOP/s. The roofline is the larger of the operations that the task needs at that bfloat16 rate and
the bytes that it has to read at 819 GB/s.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
CLOCK, FLOPS, BANDWIDTH = 1.5e9, 197e12, 819e9
"""Of a v5e: cycles, bfloat16 operations and bytes a second."""
COLLECTIVES = r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("


class Task(NamedTuple):
    """A program at a size that matters, and what it cannot do without: operations, and bytes read or written.

    `loop` ends the source of the loop of which one turn is the task; "" for the whole program.
    """

    build: Callable[[], Any]
    flops: float = 0.0
    bytes: float = 0.0
    loop: str = ""


class Estimate(NamedTuple):
    """Cycles of a computation, and how many operations have no number."""

    cycles: float
    unknown: int

    def plus(self, other: Estimate, times: int = 1) -> Estimate:
        """The sum with another, so many times."""
        return Estimate(self.cycles + times * other.cycles, self.unknown + other.unknown)


def computations(text: str) -> dict[str, list[str]]:
    """Computations of a compiled program -> their instructions; the entry is ""."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if begin := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
            found["" if begin[1] else begin[2]] = lines = []
        elif line.startswith("  ") and found:
            lines.append(line)
    return found


class Loop(NamedTuple):
    """A loop of a compiled program: where it is in the source, its turns (0: the data decide), and cycles of a turn."""

    source: str
    turns: int
    cycles: float


def estimate(text: str) -> tuple[Estimate, list[Loop]]:
    """Cycles of a compiled program, and its loops."""
    parts, loops = computations(text), list[Loop]()

    def of(name: str) -> Estimate:
        total = Estimate(0.0, 0)
        for line in parts[name]:
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
                total = total.plus(Estimate(float(cycles[1]), 0))
            elif loop := re.search(r" while\(.*condition=%(\S+?), body=%(\S+?)[,\s]", line):
                turns, turn = turns_of(parts[loop[1]]), of(loop[2])
                source = re.search(r'op_name="([^"]*)"', line)
                loops.append(Loop(source[1] if source else loop[2], turns, turn.cycles))
                total = total.plus(turn, max(1, turns))
            elif " conditional(" in line:
                total = total.plus(max(map(of, branches_of(line))))
            elif call := re.search(r" call\(.*to_apply=%([^,\s]+)", line):
                total = total.plus(of(call[1]))
            elif re.search(r" (sort|custom-call)\(", line) and not re.search(r"AllocateBuffer|Bitcast|InBound", line):
                total = total.plus(Estimate(0.0, 1))
        return total

    return of(""), loops


def branches_of(line: str) -> list[str]:
    """Names of the branches of a conditional."""
    if listed := re.search(r"branch_computations=\{([^}]*)\}", line):
        return re.findall(r"%([^,\s}]+)", listed[1])
    return re.findall(r"(?:true|false)_computation=%([^,\s]+)", line)


def turns_of(condition: Sequence[str]) -> int:
    """Turns of a loop whose condition is that a counter is below a constant; else 0."""
    text = "\n".join(condition)
    limits = re.findall(r"%(\S+) = s32\[\]\S* constant\((\d+)\)", text)
    root = re.search(r"ROOT \S+ = \S+ compare\(%\S+, %(\S+?)\), direction=LT", text)
    return int(dict(limits).get(root[1], 0)) if root else 0


def meshes(topology: str) -> tuple[Any, Callable[[tuple[int, ...], tuple[str, ...]], Any]]:
    """A mesh of one device of a topology, and a function that makes a mesh of all: `-1` is what is left for an axis."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    devices = np.array(topologies.get_topology_desc(topology, platform="tpu").devices)

    def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
        return Mesh(devices.reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))

    return Mesh(devices[:1], ("one",)), mesh


def tasks() -> dict[str, Task]:
    """Programs at sizes that matter."""
    from benchmarks import programs
    from jarm.runs.config import CompareConfig

    n, d, heads, labels = 100_000, 64, 64, 450
    layers = sum(a * b for a, b in ((128, 64), (64, 64), (64, 64), (64, 1)))
    decoder = programs.smollm2()
    texts, length = 16, 512
    tokens = texts * length
    weights = 30 * (576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536)
    return {
        f"pass over all pairs, n={n:,} d={d}": Task(lambda: programs.one_pass(n, d), n * n * d, 4 * n * d),
        f"greedy over all pairs, n={n:,} d={d} k=256": Task(lambda: programs.batch("all", n, d), n * n * d, 4 * n * d),
        f"fit step, {heads} heads 128-64-64-64-1, {labels} labels": Task(
            # Forward, and backward but for the gradient of the embeddings; weights and Adam's two moments, in and out.
            lambda: programs.fit("mlp:64,64,64", heads, labels=labels, batching="vmap"),
            heads * 2 * labels * 2 * (3 * layers - 128 * 64),
            6 * 4 * heads * layers,
            "/vmap()/while",
        ),
        f"decoder, {texts} texts of {length} tokens": Task(
            lambda: programs.embedding(decoder, texts, length),
            2.0 * weights * tokens + 30 * 2.0 * texts * length * length * 576,
            2.0 * (weights + 49_152 * 576),
        ),
        "whole default run": Task(lambda: programs.run(CompareConfig(), (200, 10, 128))),
    }


def compiled_row(name: str, task: Task, topology: str) -> dict[str, Any]:
    """Compile a program, and say what the compiler says of it."""
    one, _ = meshes(topology)
    program = task.build().on(one)
    begin = time.process_time()
    compiled = program.function.lower(*program.args).compile()
    took, text, memory = time.process_time() - begin, compiled.as_text(), compiled.memory_analysis()
    total, loops = estimate(text)
    cycles = next((loop.cycles for loop in loops if task.loop and loop.source.endswith(task.loop)), total.cycles)
    roofline = max(task.flops / FLOPS, task.bytes / BANDWIDTH)
    costs = compiled.cost_analysis()
    return {
        "name": name,
        "topology": topology,
        "compile_cpu_s": round(took, 1),
        "estimate_s": cycles / CLOCK,
        "roofline_s": roofline or None,
        "ratio": cycles / CLOCK / roofline if roofline else None,
        "without_estimate": total.unknown,
        "xla_flops": costs.get("flops"),
        "xla_bytes": costs.get("bytes accessed"),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "collectives": Counter(re.findall(COLLECTIVES, text)),
        "loops": [loop._asdict() for loop in loops if loop.cycles],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--list", choices=("sizes", "short", "all"), default="sizes")
    parser.add_argument("--only", nargs="*", default=["*"], help="names of programs, or patterns of them")
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines are appended here (default: only printed)")
    options = parser.parse_args()
    from benchmarks import programs, timing

    if options.list == "sizes":
        chosen = tasks()
    else:
        _, mesh = meshes(options.topology)
        every = programs.table(mesh)
        names = programs.SHORT if options.list == "short" else tuple(every)
        chosen = {name: Task(every[name]) for name in names}
    for name, task in chosen.items():
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in options.only):
            continue
        print(name, file=sys.stderr, flush=True)  # a failed check of the compiler ends the process
        row = compiled_row(name, task, options.topology)
        print(json.dumps({key: value for key, value in row.items() if key != "loops"}), flush=True)
        if options.out:
            versions = timing.versions() | {"libtpu": importlib.metadata.version("libtpu")}
            row |= {"versions": versions, "commit": timing.commit(), "command": timing.command()}
            with open(options.out, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
