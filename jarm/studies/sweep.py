"""`jarm sweep`: a grid of comparisons as few array programs, on all devices and processes, recorded run by run.

A program runs every rule, seed and traced number of its settings; it is compiled once. Runs are appended as they
finish, and the same command goes on with what is missing. A run that fails is recorded as failed, its neighbours are
not touched: runs share nothing but their program.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import threading
from typing import Any

import jax
from tqdm import tqdm

from jarm.acquisition.registry import source_of
from jarm.core.distributed import agreed, in_step
from jarm.core.status import JarmError
from jarm.evaluation.metrics import reference_lines
from jarm.report.curves import by_rule
from jarm.report.figures import axis_curves, require_matplotlib
from jarm.report.summary import write_sweep_summary
from jarm.runs.config import FREE, SOURCE
from jarm.runs.grid import OPTIONS, SweepConfig, expand
from jarm.runs.jobs import Call, Job, calls_of, make_programs, read_jobs, run_call, share_of
from jarm.runs.records import GROWING, RecordFolder, _shared_folder, _write_progress, fingerprint, provenance
from jarm.runs.runner import side_by_side


def sweep(config: SweepConfig) -> dict[str, Any]:
    """Run a sweep, or the rest of it, and write its folder.

    Under `jax.distributed` every process calls this with the same configuration, a share of the runs is done by each,
    and the first gathers them; the folder has to be one that all of them see.

    Args:
      config: the grid.

    Returns:
      The summary, as in `summary.json`; of processes other than the first, an empty one.

    Raises:
      JarmError: the grid, the data or the folder are at fault, a run does not fit into memory, or no run worked.
    """
    with in_step():
        require_matplotlib()  # before the runs, not after them
        jobs, rules = read_jobs(config), config.base.rule_names()
        programs = make_programs(config, jobs)
        settings, axes, out = _settings(config, jobs), tuple(config.grid), config.base.out
        sources = {rule: digits for rule in rules if (digits := source_of(rule))}
        wanted = {
            (rule, seed, *setting.axes.values())
            for rule in rules
            for seed in range(config.base.seeds)
            for setting in expand(config)
        }
    # In their order, since calls are dealt out in it.
    places = [setting.axes for setting in expand(config)]
    if not agreed(repr([settings, axes, rules, config.base.seeds, places, sources, programs.capacity])):
        raise JarmError(
            "The processes have different grids, data, rules or numbers of devices: give all of them the same."
        )
    with _shared_folder(out, settings, config.base.rounds, axes) as folder:
        common = {
            "config": fingerprint({name: value for name, value in settings.items() if name not in GROWING}),
            **provenance(),
        }
        with in_step():
            if folder.others:
                print(f"jarm: {out} holds runs by {'; '.join(folder.others)}, which are kept.", file=sys.stderr)
            if jax.process_index() == 0:
                folder.refuse_changed(sources)
                _append_references(folder, config, jobs, common)
                _write_progress(out, {"runs": len(folder.done | wanted), "compiled": 0})
        calls = calls_of(jobs, rules, config.base.seeds, programs.capacity, folder.done, axes)
        mine = share_of(calls, jax.process_index(), jax.process_count(), len(rules))
        left = {id(job): sum(call.job is job for call in mine) for job in jobs}
        lock = threading.Lock()

        def one(call: Call) -> list[list[dict[str, Any]]]:
            own = common | ({"source": sources[call.rule]} if call.rule in sources else {})
            runs = run_call(programs, call)
            with lock:
                left[id(call.job)] -= 1
                if not left[id(call.job)]:
                    programs.forget(call.job)
            return [[{**line, **own} for line in run] for run in runs]

        total = sum(len(call.cells) for call in mine)
        if jax.process_count() > 1:
            print(f"jarm: process {jax.process_index()} has {total:,} of the runs that are missing.", file=sys.stderr)
        with tqdm(total=total, unit="run", desc="sweep", disable=jax.process_index() > 0 or not total) as bar:
            bar.set_postfix_str("compiling first")
            for runs in side_by_side(one, [(call,) for call in mine], programs.workers):
                folder.append([line for run in runs for line in run])
                bar.set_postfix_str("", refresh=False)
                bar.update(len(runs))
        if jax.process_index() == 0:
            _write_progress(out, {"runs": len(folder.done | wanted), "compiled": programs.compiled})
    with in_step():  # so that none leaves while the first still works
        return {} if jax.process_index() else _finish(config, folder.read(), axes, rules)


def _finish(
    config: SweepConfig, records: list[dict[str, Any]], axes: tuple[str, ...], rules: list[str]
) -> dict[str, Any]:
    """Summary and figure of what belongs to this grid; a folder may hold more."""
    points = [setting.axes for setting in expand(config)]
    here = {tuple(point[axis] for axis in axes) for point in points}
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
        summary = write_sweep_summary(shown, points, config.base.out)
        axis_curves(runs, axes, config.base.out / "curves")
    except OSError as error:
        out = config.base.out
        raise JarmError(f"Cannot write to {out} ({error}): make room, and give the same command.") from error
    return summary


def _settings(config: SweepConfig, jobs: list[Job]) -> dict[str, Any]:
    """What a record depends on beside its place in the grid.

    Options that are axes are left out, since their values are in the records. Of values that are mappings, records have
    the names only: `named` says what these stand for. `tables` are the data where an axis chooses them.
    """
    options = {field.name: getattr(config.base, field.name) for field in dataclasses.fields(config.base)}
    options = {name: value for name, value in options.items() if name not in FREE and name not in config.grid}
    named = {
        f"{axis}={value['name']}": _by_name({option: each for option, each in value.items() if option != "name"})
        for axis, values in config.grid.items()
        if axis not in OPTIONS
        for value in values
    }
    tables = {}
    for job in jobs:
        train, test = job.data.train, job.data.test
        for setting in job.group.settings:
            place = ", ".join(f"{axis}={setting.axes[axis]}" for axis in _source_axes(config)) or "all"
            tables[place] = {"train": dict(train.provenance), "test": dict(test.provenance)}
    data = {"named": named, "tables": tables} if _source_axes(config) else {"named": named, **tables["all"]}
    return _by_name(options) | {"axes": sorted(config.grid), **data}


def _by_name(options: dict[str, Any]) -> dict[str, Any]:
    """Options with files by their names: what they hold is in their fingerprints, and they may move."""
    return options | {name: pathlib.Path(options[name]).name for name in ("data", "embeddings") if options.get(name)}


def _source_axes(config: SweepConfig) -> list[str]:
    """Axes that say which data."""
    return _axes_that_set(config, {"data", *SOURCE})


def _axes_that_set(config: SweepConfig, options: set[str]) -> list[str]:
    return [
        axis
        for axis, values in config.grid.items()
        if axis in options or (axis not in OPTIONS and any(options & set(value) for value in values))
    ]


def _append_references(folder: RecordFolder, config: SweepConfig, jobs: list[Job], common: dict[str, Any]) -> None:
    """What needs no reward model, once for each table and way to judge, with the axes that choose them."""
    known = {folder.run_of(line) for line in folder.read() if line["kind"] == "reference"}
    judging = _axes_that_set(config, {"data", *SOURCE, "annotator", "gold_scale", "best_of"})
    tables = {
        tuple((axis, setting.axes[axis]) for axis in judging): job
        for job in reversed(jobs)
        for setting in job.group.settings
    }
    for place, job in tables.items():
        if folder.run_of({"rule": "oracle", **dict(place)}) in known:
            continue
        lines = [
            {"kind": "reference", "rule": name, **dict(place), **values, **common}
            for name, values in reference_lines(job.data.test, **job.judged).items()
        ]
        folder.append([line for line in lines if folder.run_of(line) not in known])
