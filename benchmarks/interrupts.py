"""How long a command takes to end after Control-C while it compiles.

    python -m benchmarks.interrupts --out benchmarks/results/interrupts.jsonl

Each command starts with an empty cache of compiled programs, gets SIGINT `--after` seconds later, and is waited for.
Wall seconds from the signal to its end: the median over `--turns`, and the largest in the outcome, with the exit codes,
which should be 130.
"""

from __future__ import annotations

import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import timing

COMMANDS = {
    "compare": ["compare", "--out", "FOLDER"],
    "bench": ["bench", "--out", "FOLDER", "--rules", "greedy_dopt,bait"],
    "rules --check": ["rules", "--check", "coreset"],
}


def interrupted(words: list[str], after: float) -> tuple[float, int]:
    """Seconds from the signal to the end of the command, and its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        kept = str(pathlib.Path(folder, "compiled"))
        words = [folder if word == "FOLDER" else word for word in words]
        process = subprocess.Popen(
            [sys.executable, "-m", "jarm.cli", *words],
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": kept},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(after)
        start = time.perf_counter()
        process.send_signal(signal.SIGINT)
        process.wait()
        return time.perf_counter() - start, process.returncode


def main() -> None:
    options = timing.start(after=10.0)
    rows = []
    for name, words in COMMANDS.items():
        ends = [interrupted(words, options.after + turn / options.turns) for turn in range(options.turns)]
        seconds = [each for each, _ in ends]
        outcome = {"largest_s": max(seconds), "codes": sorted({code for _, code in ends})}
        rows.append(
            timing.row(
                "interrupts",
                name,
                sizes={"after_s": options.after},
                cpu=0.0,
                wall=statistics.median(seconds),
                turns=options.turns,
                outcome=outcome,
            )
        )
    timing.report(rows)


if __name__ == "__main__":
    main()
