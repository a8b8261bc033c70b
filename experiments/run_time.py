"""(f) Time and memory of a selection against the number of candidate pairs.

Claim     The released rule and exact greedy selection, as they are here, take time and memory no more than in
          proportion to the candidates. (Reviewers of the paper asked how it scales.)
Command   python experiments/run_time.py
Hardware  2 CPU cores; nothing else should run.
Time      About 5 minutes.
Expected  `experiments/README.md` has the readings.

Nine rules on listed pairs of 5,000 Gaussian responses, 64 features, batches of 256: processor time of compiled
programs, medians of five turns, and temporaries by XLA's account. `jarm bench` measures all rules. No data is read.
"""

from __future__ import annotations

import math
import pathlib

import numpy as np
import strategies
import suite
from suite import Config, Reading, Records, Study

from jarm.report.figures import drawing, style_of
from jarm.studies.bench import BenchConfig, bench

SIZES = {"sizes": "1000,10000,100000,1000000", "turns": 5}
SMALL = {"sizes": "200,1000", "responses": 100, "batch": 8, "width": 8, "members": 2, "labelled": 16, "turns": 2}


def records(config: Config) -> Records:
    chosen = {"rules": strategies.RULES, **(SMALL if config.size == "small" else SIZES)}
    out = config.out / "run_time"
    made = BenchConfig(**chosen, out=out)
    return suite.kept(out / "records.json", chosen, lambda: [{"kind": "bench", **row} for row in bench(made)])


def _curves(records: Records) -> dict[str, Records]:
    """Rule -> its rows by size."""
    rules = dict.fromkeys(row["rule"] for row in records)
    return {
        rule: sorted((row for row in records if row["rule"] == rule), key=lambda row: row["candidates"])
        for rule in rules
    }


def figure(records: Records, stem: pathlib.Path) -> None:
    found = _curves(records)
    with drawing(stem, (9.6, 3.8)) as canvas:
        left, right = canvas.subplots(1, 2)
        for rule, rows in found.items():
            style = style_of(list(found), rule)
            sizes = [row["candidates"] for row in rows]
            left.loglog(sizes, [row["cpu_s"] for row in rows], label=rule, markersize=4, **style)
            if all(row["temp_bytes"] for row in rows):
                right.loglog(sizes, [row["temp_bytes"] / 1e6 for row in rows], markersize=4, **style)
        for axes, words in ((left, "processor seconds a batch"), (right, "temporaries of the program, MB")):
            axes.set_title(words, loc="left", fontsize=10)
            axes.set_xlabel("candidate pairs")
            axes.grid(color="#dddddd", linewidth=0.6)
        canvas.legend(handles=left.get_lines(), loc="outside right center", frameon=False, handlelength=3.6)


def table(records: Records) -> suite.Rows:
    rows = [["rule", "pairs", "ms (least to most)", "temporaries, MB", "s to compile", "log det, nats"]]
    for row in records:
        middle, low, high = (1e3 * row[name] for name in ("cpu_s", "cpu_low_s", "cpu_high_s"))
        memory = "-" if row["temp_bytes"] is None else f"{row['temp_bytes'] / 1e6:.3g}"
        took = f"{_digits(middle)} ({_digits(low)} to {_digits(high)})"
        rest = [memory, f"{row['compile_s']:.1f}", f"{row['log_det']:.1f}"]
        rows.append([row["rule"], f"{row['candidates']:,}", took, *rest])
    return rows


def _digits(value: float) -> str:
    """Three digits, and whole numbers in full."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def readings(records: Records) -> list[Reading]:
    """Growth exponents between the two largest sizes; their ends are of the least and the most of the turns."""
    lines, times = [], {}
    for rule, rows in _curves(records).items():
        if rule in ("dopt", "greedy_dopt") and len(rows) > 1:
            small, large = rows[-2:]
            decades = math.log(large["candidates"] / small["candidates"])
            ends = [("cpu_low_s", "cpu_high_s"), ("cpu_s", "cpu_s"), ("cpu_high_s", "cpu_low_s")]
            times[rule] = [math.log(max(large[a], 1e-9) / max(small[b], 1e-9)) / decades for a, b in ends]
            if large["temp_bytes"] and small["temp_bytes"]:
                grows = math.log(large["temp_bytes"] / small["temp_bytes"]) / decades
                lines.append((f"{rule} to the power {grows:.2f}", grows))
    words = [
        f"{rule} to the power {middle:.2f} ({low:.2f} to {high:.2f})" for rule, (low, middle, high) in times.items()
    ]
    sure = times and all(high <= 1.05 for _, _, high in times.values())
    broken = any(low > 1.05 for low, _, _ in times.values())
    time = Reading(
        "Time grows no faster than the number of candidates",
        suite.HOLDS if sure else suite.FAILS if broken else suite.OPEN,
        f"between the two largest sizes, by the extremes of the turns: {', '.join(words) or 'nothing was measured'}.",
    )
    memory = Reading(
        "Memory grows no faster than the number of candidates",
        suite.OPEN if not lines else suite.HOLDS if all(np.array([g for _, g in lines]) <= 1.05) else suite.FAILS,
        f"temporaries of the compiled programs: {', '.join(w for w, _ in lines) or 'not known on this device'}.",
    )
    return [time, memory]


STUDY = Study("f", "run_time", "Time and memory against the pool", __doc__, records, figure, table, readings)

if __name__ == "__main__":
    suite.main(STUDY)
