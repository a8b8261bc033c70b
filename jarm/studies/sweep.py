"""`jarm sweep`: a grid of comparisons as few array programs, on all devices or by workers, recorded run by run.

A program runs every rule, seed and traced number of its settings; it is compiled once. Runs are appended as they
finish, and the same command makes the missing ones. A run that fails is recorded as failed and leaves its neighbours
untouched: runs share nothing but their program.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Sequence
from typing import Any

from jarm.core.status import JarmError
from jarm.report.curves import by_rule
from jarm.report.figures import axis_curves, require_matplotlib
from jarm.report.summary import write_sweep_summary
from jarm.runs.driver import Record, run_jobs
from jarm.runs.grid import Setting, SweepConfig, expand
from jarm.runs.jobs import read_jobs


def sweep(config: SweepConfig, *, executor: concurrent.futures.Executor | None = None) -> dict[str, Any]:
    """Run a sweep, or the rest of it, and write its folder.

    Example:
      >>> import pathlib, tempfile
      >>> from jarm import CompareConfig, SweepConfig, sweep
      >>> sizes = {"rounds": 1, "batch": 5, "initial": 10, "candidates": 100, "head": "linear", "first": "random"}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     base = CompareConfig(rules="entropy", seeds=1, out=pathlib.Path(folder), **sizes)
      ...     summary = sweep(SweepConfig(base, {"noise": [0.5, 2.0]}))
      >>> [setting["axes"] for setting in summary["settings"]]
      [{'noise': 0.5}, {'noise': 2.0}]

    Args:
      config: the grid.
      executor: its workers make the runs, and may come, go and die (docs/sweeps.md); by default this process does.

    Returns:
      The summary, as in `summary.json`.

    Raises:
      JarmError: the grid, the data or the folder are at fault, a run does not fit into memory, or no run worked.
    """
    require_matplotlib()  # before the runs, not after them
    settings = expand(config)
    jobs = read_jobs(settings)
    finish = functools.partial(_finish, config, settings)
    return run_jobs(jobs, config.base, config.out, finish, config.grid, executor=executor)


def _finish(config: SweepConfig, settings: Sequence[Setting], records: list[Record]) -> dict[str, Any]:
    """Write summary and figure of the runs of this grid; a folder may hold more."""
    axes, rules, places = tuple(config.grid), config.base.rule_names(), [setting.axes for setting in settings]
    here = {tuple(place.values()) for place in places}
    shown = [
        line
        for line in records
        if line["kind"] == "reference"
        or (line["rule"] in rules and line["seed"] < config.base.seeds and tuple(line[axis] for axis in axes) in here)
    ]
    shown = by_rule(shown, rules)
    runs = [line for line in shown if line["kind"] == "run"]
    if not runs:
        failed = next((line["message"] for line in shown if line["kind"] == "failed"), "")
        raise JarmError(f"No run of the sweep ran to its end. {failed}")
    try:
        summary = write_sweep_summary(shown, places, config.out)
        axis_curves(runs, axes, config.out / "curves")
    except OSError as error:
        raise JarmError(f"Cannot write to {config.out} ({error}): make room, and give the same command.") from error
    return summary
