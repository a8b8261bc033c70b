"""How every benchmark here measures: two programs side by side in one process, in turn, on one pinned core.

    from benchmarks import timing

    timing.start()                          # before jax, numpy or torch is imported: pins the process
    import jax
    ours = timing.jax_side("jarm", f, *args)            # compiles, and times that apart
    theirs = timing.Side("torch", lambda: g(*torch_args))
    theirs.outcome["same_picks"] = ...
    timing.compare("scores", [ours, theirs], sizes={"M": 10_000})

Processor time counts all threads of the process; `python -m benchmarks.X --cores all` compares wall time on
every core instead. The first side is what the others are compared with: a row's ratio is its own time over
the first side's in the same turn, as a median over turns with the extremes.
`python -m benchmarks.timing FILE.jsonl ...` prints rows as a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

RESULTS = pathlib.Path(__file__).parent / "results"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def pin(cores: Literal["1", "all"] = "1") -> None:
    """Confine this process, and every thread it will start, to its last core; or do nothing for `all`."""
    if cores == "all":
        return
    if {"numpy", "jax", "torch"} & sys.modules.keys():
        raise RuntimeError("timing.pin comes too late: call it before numpy, jax or torch is imported.")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))


def start(**options: Any) -> argparse.Namespace:
    """Read `--cores`, `--turns`, `--out` and the options of a benchmark (name=default); pin the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cores", choices=("1", "all"), default="1")
    parser.add_argument("--turns", type=int, default=7, help="alternating runs of each side")
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines are appended here (default: only printed)")
    for name, default in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(default, list | tuple):
            parser.add_argument(flag, nargs="+", type=type(default[0]), default=default)
        else:
            parser.add_argument(flag, type=type(default), default=default)
    arguments = parser.parse_args()
    pin(arguments.cores)
    _SETTINGS.update(cores=arguments.cores, turns=arguments.turns, out=arguments.out)
    return arguments


_SETTINGS: dict[str, Any] = {"cores": "1", "turns": 7, "out": None}


@dataclasses.dataclass
class Side:
    """One program of a comparison: `run()` does all the work and returns when it is done.

    Attributes:
      name: what it is.
      run: the work, without arguments; its result is kept in `result`.
      compile_s: seconds to compile it, 0 where nothing compiles.
      temp_bytes: temporaries plus outputs of the compiled program.
      rss_growth_bytes: growth of resident memory in a fresh process that runs it once (`resident_growth`).
      outcome: what it achieved: same picks, loss, distance from the floor.
      result: what the last run returned.
    """

    name: str
    run: Callable[[], Any]
    compile_s: float = 0.0
    temp_bytes: int | None = None
    rss_growth_bytes: int | None = None
    outcome: dict[str, Any] = dataclasses.field(default_factory=dict)
    result: Any = None


def jax_side(name: str, f: Callable[..., Any], *args: Any) -> Side:
    """Compile `f(*args)`, timed apart; a run of the side ends when the results are there."""
    import jax

    begin = time.perf_counter()
    compiled = jax.jit(f).lower(*args).compile()
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    size = None if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes
    return Side(name, lambda: jax.block_until_ready(compiled(*args)), seconds, size)


def alternate(
    sides: Sequence[Side], *, turns: int, at_least_s: float = 0.05, warm: bool = True
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Processor and wall seconds of each side, one entry a turn: A B A B ...

    A side that takes less than `at_least_s` runs several times in its turn, and the mean is its entry. Two
    runs of each side, not counted, come first, unless not `warm`: for what takes minutes.
    """
    repeats = {side.name: 1 for side in sides}
    for side in sides if warm else ():
        side.result = side.run()
        begin = time.perf_counter()
        side.result = side.run()
        repeats[side.name] = max(1, round(at_least_s / (time.perf_counter() - begin)))
    cpu: dict[str, list[float]] = {side.name: [] for side in sides}
    wall: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(turns):
        for side in sides:
            repeat = repeats[side.name]
            wall_begin, cpu_begin = time.perf_counter(), time.process_time()
            for _ in range(repeat):
                side.result = side.run()
            cpu[side.name].append((time.process_time() - cpu_begin) / repeat)
            wall[side.name].append((time.perf_counter() - wall_begin) / repeat)
    return cpu, wall


def compare(
    name: str,
    sides: Sequence[Side],
    *,
    sizes: Mapping[str, int | str],
    turns: int | None = None,
    at_least_s: float = 0.05,
    warm: bool = True,
    after: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure the sides in turn; print one row each, and append it to `--out`. `after` may fill their outcomes.

    The first side is the reference. Ratios are of processor time on one core, and of wall time on all cores.
    """
    cpu, wall = alternate(sides, turns=turns or _SETTINGS["turns"], at_least_s=at_least_s, warm=warm)
    measured = cpu if _SETTINGS["cores"] == "1" else wall
    reference = measured[sides[0].name]
    if after is not None:
        after()
    rows = []
    for side in sides:
        ratios = [own / other for own, other in zip(measured[side.name], reference, strict=True)]
        rows.append(
            row(
                name,
                side.name,
                sizes=sizes,
                cpu=statistics.median(cpu[side.name]),
                wall=statistics.median(wall[side.name]),
                ratios=ratios,
                turns=len(ratios),
                compile_s=round(side.compile_s, 4),
                temp_bytes=side.temp_bytes,
                rss_growth_bytes=side.rss_growth_bytes,
                outcome=side.outcome,
            )
        )
    report(rows)
    return rows


def row(
    name: str,
    side: str,
    *,
    sizes: Mapping[str, Any],
    cpu: float,
    wall: float,
    outcome: Mapping[str, Any],
    ratios: Sequence[float] = (1.0,),
    turns: int = 1,
    compile_s: float = 0.0,
    temp_bytes: int | None = None,
    rss_growth_bytes: int | None = None,
) -> dict[str, Any]:
    """A row of results, with where and by which command it was measured; ratios are the reference's by default."""
    return {
        "name": name,
        "side": side,
        "device": device(),
        "cores": _SETTINGS["cores"],
        "sizes": dict(sizes),
        "compile_s": compile_s,
        "cpu_s": cpu,
        "wall_s": wall,
        "ratio_median": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "turns": turns,
        "temp_bytes": temp_bytes,
        "rss_growth_bytes": rss_growth_bytes,
        "outcome": dict(outcome),
        "versions": versions(),
        "commit": commit(),
        "command": command(),
    }


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table, and append them to `--out` where that was given."""
    print(table(rows), flush=True)
    if _SETTINGS["out"]:
        _SETTINGS["out"].parent.mkdir(parents=True, exist_ok=True)
        with open(_SETTINGS["out"], "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def resident_growth(setup: Callable[..., Callable[[], Any]], *args: Any) -> int:
    """Bytes by which the peak resident memory of a fresh process grows while it runs `setup(*args)()` once.

    `setup`, a function of a module, imports what it needs and prepares the inputs; only the call of what it
    returns is measured.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_measure_growth, args=(send, setup, args))
    child.start()
    send.close()
    try:
        return int(receive.recv())
    except EOFError:
        raise RuntimeError(f"the process that measured the memory of {setup.__name__} ended early.") from None
    finally:
        child.join()


def _measure_growth(send: Any, setup: Callable[..., Callable[[], Any]], args: Sequence[Any]) -> None:
    run = setup(*args)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = _memory("VmRSS")
    run()
    send.send(_memory("VmHWM") - before)


def _memory(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@functools.cache
def device() -> str:
    """The processor, or the accelerator that JAX found."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.default_backend() != "cpu":
        return str(jax.devices()[0].device_kind)
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")
    return f"{model}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the numerical libraries that are loaded."""
    loaded = {name: sys.modules.get(name) for name in ("jax", "jaxlib", "numpy", "torch", "transformers", "optax")}
    found = {name: str(module.__version__) for name, module in loaded.items() if module is not None}
    return {"python": platform.python_version()} | found


@functools.cache
def commit() -> str:
    """The commit of the working tree, with a + where `jarm` or `benchmarks` differ from it."""
    git = functools.partial(subprocess.run, cwd=RESULTS.parents[1], capture_output=True, text=True, check=False)
    head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = git(["git", "status", "--porcelain", "--", "jarm", "benchmarks/*.py"]).stdout.strip()
    return head + ("+" if changed else "")


def command() -> str:
    """The command line of this process, without the path of the interpreter."""
    return " ".join(["python", *sys.orig_argv[1:]])


def gemm_rate(n: int = 1024) -> float:
    """Float32 operations a second of a square matrix product of JAX here: what floors are counted in."""
    import jax.numpy as jnp

    product = jax_side("product", lambda x: x @ x, jnp.ones((n, n), jnp.float32))
    return 2 * n**3 / _least_time(product.run)


def read_rate(size: int = 1 << 28) -> float:
    """Bytes a second at which NumPy sums a float32 array that fits in no cache."""
    import numpy as np

    return size / _least_time(np.ones(size // 4, np.float32).sum)


def _least_time(run: Callable[[], Any], repeats: int = 7) -> float:
    clock = time.process_time if _SETTINGS["cores"] == "1" else time.perf_counter
    times = []
    for _ in range(repeats):
        begin = clock()
        run()
        times.append(clock() - begin)
    return min(times)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table."""
    lines = [
        "| benchmark | sizes | side | cores | compile s | processor s | wall s | ratio | MB | outcome |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        sizes = " ".join(f"{key}={value}" for key, value in row["sizes"].items())
        outcome = ", ".join(f"{key}: {_short(value)}" for key, value in row["outcome"].items())
        ratio = f"{row['ratio_median']:.3g} ({row['ratio_low']:.3g} to {row['ratio_high']:.3g})"
        memory = [row["temp_bytes"], row["rss_growth_bytes"]]
        megabytes = next((f"{size / 1e6:.1f}" for size in memory if size is not None), "")
        cells = [row["name"], sizes, row["side"], row["cores"], f"{row['compile_s']:.2f}"]
        cells += [f"{row['cpu_s']:.4g}", f"{row['wall_s']:.4g}", ratio, megabytes, outcome]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    paths = map(pathlib.Path, sys.argv[1:])
    print(table([json.loads(line) for path in paths for line in path.read_text().splitlines()]))
