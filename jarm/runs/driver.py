"""The driver of comparisons and sweeps: jobs on all devices, recorded run by run in one folder."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from jarm.acquisition.registry import source_of
from jarm.core.columns import SPACES
from jarm.core.progress import Progress
from jarm.core.status import JarmError
from jarm.core.streams import say
from jarm.loop.device_table import count_pairs
from jarm.runs.config import ADDED, FREE, SOURCE
from jarm.runs.elsewhere import make_elsewhere
from jarm.runs.grid import OPTIONS
from jarm.runs.jobs import Call, Job, Made, calls_of
from jarm.runs.progress import write_progress
from jarm.runs.records import GROWING, IMPLIED, RECORDS, RecordFolder, fingerprint, provenance
from jarm.runs.runner import Runner, RunOptions, make_runner, side_by_side

Record: TypeAlias = dict[str, Any]


def run_jobs(
    jobs: Sequence[Job],
    base: RunOptions,
    out: pathlib.Path,
    finish: Callable[[list[Record]], dict[str, Any]],
    grid: Mapping[str, Any] | None = None,
    name: str = "",
    executor: concurrent.futures.Executor | None = None,
) -> dict[str, Any]:
    """Make the runs of some jobs that a folder lacks, and its summary.

    Args:
      jobs: the jobs.
      base: options that all jobs share, among them `rules` and `seeds`.
      out: the folder.
      finish: all records of the folder -> the summary. Called while no other command can write to the folder, so that
        files beside the records agree with them.
      grid: the axes of a sweep. Without a grid it is a comparison: nothing is written until a run has worked.
      name: of the command, for its progress; by default `compare` or `sweep`.
      executor: makes the runs of a sweep, instead of this process.

    Returns:
      The summary.

    Raises:
      JarmError: the folder is at fault, a run does not fit into memory, or in a comparison no run worked.
    """
    rules, axes, settings = base.rule_names(), tuple(grid or ()), settings_of(jobs, base, grid)
    runner = make_runner(jobs, base, placed=grid is not None)
    sources = {rule: source for rule in rules if (source := source_of(rule))}
    places = [setting.axes for job in jobs for setting in job.settings]
    with RecordFolder.open(out, settings, base.rounds, axes, GROWING) as folder:
        common = {
            "config": fingerprint({k: v for k, v in settings.items() if k not in (*GROWING, *IMPLIED)}),
            **provenance(),
        }
        wanted = {(rule, seed, *place.values()) for rule in rules for seed in range(base.seeds) for place in places}
        progress = {"runs": len(folder.done | wanted)}
        _say_found(folder)
        _say_copies([job for job in jobs if job.offers_all])
        folder.refuse_changed(sources)
        _append_references(folder, jobs, grid, common)
        if grid is not None:
            write_progress(out, progress | {"compiled": 0})
        calls = calls_of(jobs, rules, base.seeds, runner.capacity, folder.done)
        if executor is not None:
            config = str(common["config"])
            made = make_elsewhere(executor, calls, config, size=runner.capacity, vmap_runs=base.vmap_runs)
        elif grid is not None:
            made = _make(runner, calls)
        else:
            made = _make_checked(runner, calls, worked=bool(folder.done))
        for call, runs, by in _shown(made, calls, name or ("compare" if grid is None else "sweep")):
            own = common | (by or {}) | ({"source": sources[call.rule]} if call.rule in sources else {})
            folder.append([{**line, **own} for lines in runs for line in lines])
        if grid is not None:
            write_progress(out, progress | {"compiled": runner.compiled})
        return finish(folder.read())


def _say_found(folder: RecordFolder) -> None:
    """Say which runs of a folder are of others, and which are not whole."""
    if folder.others:
        say(
            f"jarm: {folder.path} holds runs by {'; '.join(folder.others)}, which are kept; to have them made anew, "
            "give another --out."
        )
    if folder.broken:
        shown = ", ".join(" ".join(map(str, run)) for run in folder.broken[:3])
        say(
            f"jarm: {folder.path / RECORDS} lacks lines of {len(folder.broken):,} runs that were recorded ({shown}"
            f"{', ...' * (len(folder.broken) > 3)}): those are made again."
        )


def _say_copies(jobs: Sequence[Job]) -> None:
    """Say how many pairs of each training table are never offered, and how many of each test table tell nothing."""
    for kind, table in {
        (job.loop.pairs, id(job.data.train)): (job.loop.pairs, job.data.train) for job in jobs
    }.values():
        offered, copies = count_pairs(table, kind)
        if copies:
            say(
                f"jarm: {copies:,} of {offered + copies:,} pairs {SPACES[kind]} are of responses with equal "
                "embeddings, which no label could tell apart: they are never offered."
            )
    for test in {id(job.data.test): job.data.test for job in jobs}.values():
        offered, copies = count_pairs(test, "within")
        if copies:
            say(
                f"jarm: {copies:,} of {offered + copies:,} pairs within prompts of the test set are of responses with "
                "equal embeddings: every model gives them equal rewards."
            )


def _make(runner: Runner, calls: Sequence[Call]) -> Iterator[Made]:
    """Make calls side by side, each job's table for as long as it has calls."""
    left = collections.Counter(id(call.job) for call in calls)
    for made in side_by_side(lambda call: Made(call, runner(call)), [(call,) for call in calls], runner.workers):
        left[id(made.call.job)] -= 1
        if not left[id(made.call.job)]:
            runner.forget(made.call.job)
        yield made


def _make_checked(runner: Runner, calls: Sequence[Call], *, worked: bool) -> Iterator[Made]:
    """Make the first call of each rule, then the others.

    Until a run has worked, the settings may be at fault and not a seed: nothing is passed on.

    Args:
      runner, calls: the calls of one job.
      worked: whether a run has worked before.

    Raises:
      JarmError: no run of the first calls worked.
    """
    first = {call.rule: call for call in reversed(calls)}
    ahead = [call for call in calls if call is first[call.rule]]
    rest = [call for call in calls if call is not first[call.rule]]
    held_back = list[Made]()
    first_ones = side_by_side(lambda call: Made(call, runner(call)), [(call,) for call in ahead], runner.workers)
    made = itertools.chain(first_ones, _make(runner, rest))
    for number, each in enumerate(made, 1):
        worked |= any(lines[0]["kind"] == "run" for lines in each.runs)
        held_back.append(each)
        if worked:
            yield from held_back
            held_back = []
        elif number == len(ahead):
            raise JarmError(f"No rule ran to its end with its first seed. {each.runs[-1][0]['message']}")


def _shown(made: Iterable[Made], calls: Sequence[Call], name: str) -> Iterator[Made]:
    """The same, with its progress."""
    total = sum(len(call.runs) for call in calls)
    with Progress(name, total, f"{total:,} runs, compiling first") as progress:
        for each in made:
            yield each
            done = progress.done + len(each.runs)
            progress.update(
                len(each.runs), f"{done:,} of {total:,} runs, {each.call.rule}, seed {each.call.runs[-1][0]}"
            )


def settings_of(jobs: Sequence[Job], base: RunOptions, grid: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of a folder: everything that its records depend on, beside their place in the grid.

    Axes are left out, since records have their values. Of values that are mappings, records have the names only:
    `named` holds the options behind the names. `tables` holds the data where an axis chooses them.

    Args:
      jobs: all jobs.
      base: options that all jobs share.
      grid: the axes, or None for a comparison.
    """
    options = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    left_out = {*FREE, *(grid or ()), *(name for name, before in ADDED.items() if options.get(name) == before)}
    options = _by_name({name: value for name, value in options.items() if name not in left_out}) | IMPLIED
    choosing = _axes_that_set(grid or {}, {"data", *SOURCE})
    tables = {}
    for job in jobs:
        data = {"train": dict(job.data.train.provenance), "test": dict(job.data.test.provenance)}
        if job.data.train.alike is not None:  # pairs of these are not offered, as they were in earlier versions
            data["train"]["copies"] = int((job.data.train.alike.ravel() != np.arange(job.data.train.alike.size)).sum())
        for setting in job.settings:
            tables[", ".join(f"{axis}={setting.axes[axis]}" for axis in choosing)] = data
    if grid is None:
        return options | tables[""]
    named = {
        f"{axis}={value['name']}": _by_name({option: each for option, each in value.items() if option != "name"})
        for axis, values in grid.items()
        if axis not in OPTIONS
        for value in values
    }
    return options | {"axes": sorted(grid), "named": named} | ({"tables": tables} if choosing else tables[""])


def _by_name(options: dict[str, Any]) -> dict[str, Any]:
    """Options with files by their names: provenance has fingerprints of their contents, and they may move."""
    return options | {name: pathlib.Path(options[name]).name for name in ("data", "embeddings") if options.get(name)}


def _axes_that_set(grid: Mapping[str, Any], options: set[str]) -> list[str]:
    return [
        axis
        for axis, values in grid.items()
        if axis in options or (axis not in OPTIONS and any(options & set(value) for value in values))
    ]


def _append_references(
    folder: RecordFolder, jobs: Sequence[Job], grid: Mapping[str, Any] | None, common: Record
) -> None:
    """Append the reference lines (oracle, length, ceiling, ...), once per test table and evaluation setting.

    Those of a comparison are evaluated at its noise; those of a sweep, where the noise may vary, without.
    """
    known = {folder.run_of(line) for line in folder.read() if line["kind"] == "reference"}
    evaluating = _axes_that_set(grid or {}, {"data", *SOURCE, "annotator", "gold_scale", "annotator_column", "best_of"})
    places = {
        tuple((axis, setting.axes[axis]) for axis in evaluating): job
        for job in reversed(jobs)
        for setting in job.settings
    }
    linear = dict[int, dict[str, np.ndarray]]()  # data -> scores, since settings share data
    for place, job in places.items():
        if all(folder.run_of({"rule": name, **dict(place)}) in known for name in job.reference_names):
            continue
        found = job.references(float(job.hparams[0].noise) if grid is None else None, linear)
        lines = [
            {"kind": "reference", "rule": name, **dict(place), **values, **common} for name, values in found.items()
        ]
        folder.append([line for line in lines if folder.run_of(line) not in known])
