"""`jarm sweep`: a grid of comparisons as few array programs, on all devices and processes, recorded run by run.

A program runs every rule, seed and traced number of its settings; it is compiled once. Runs are appended as they
finish, and the same command goes on with what is missing. A run that fails is recorded as failed, its neighbours are
not touched: runs share nothing but their program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
from tqdm import tqdm

from jarm.acquisition.registry import source_of
from jarm.annotators import reward_scale
from jarm.base import Benchmark, HParams, JarmError
from jarm.compare import FREE, SOURCE
from jarm.data.datasets import load
from jarm.data.files import claim, replace_text
from jarm.figures import axis_curves, require_matplotlib
from jarm.grid import OPTIONS, Group, Setting, SweepConfig, expand, groups
from jarm.metrics import reference_lines
from jarm.pool import Pool, check_pool, make_pool
from jarm.prepare import check_budget, make_hparams
from jarm.processes import agreed, in_step
from jarm.records import RecordFolder, fingerprint, provenance
from jarm.report import write_sweep_summary
from jarm.runner import Program, Runner, default_jobs, judge, out_of_memory, side_by_side

T = TypeVar("T")
TOGETHER = 64
"""Runs that an accelerator takes together if memory allows; a larger batch waits for ever slower stragglers."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A group of settings, checked against its data and ready to run.

    Attributes:
      group: its settings, program and data.
      benchmark: the data.
      scale: what gold rewards are divided by.
      hparams: of each setting, as float32.
    """

    group: Group
    benchmark: Benchmark
    scale: float
    hparams: list[HParams]

    @property
    def program(self) -> tuple[Any, ...]:
        """Jobs that have this in common are run by one program."""
        return self.group.loop, self.benchmark.train.shape

    @property
    def judged(self) -> dict[str, Any]:
        """How its runs are evaluated, but for the noise."""
        return {"annotator": self.group.loop.annotator, "scale": self.scale, "best_of": self.group.best_of}


class Call(NamedTuple):
    """One call of one job's program: a rule at some (setting, seed)."""

    job: Job
    rule: str
    cells: list[tuple[Setting, HParams, int]]


def read_jobs(config: SweepConfig) -> list[Job]:
    """All groups of a grid with their data, so that what cannot work is refused before anything runs.

    Raises:
      JarmError: an option, a value, the data or a setting is at fault; which, and what to do.
    """
    for name, least in (("seeds", 1), ("jobs", 0), ("together", 0)):
        if getattr(config.base, name) < least:
            raise JarmError(f"`{name}` is {getattr(config.base, name)}, which makes no run: give at least {least}.")
    jobs, loaded = [], dict[tuple[Any, ...], Benchmark]()
    for group in groups(expand(config)):
        key = tuple(group.source.values())
        try:
            benchmark = loaded[key] if key in loaded else load(**group.source)
            loaded[key] = benchmark
            if benchmark.train.gold is None or benchmark.test.gold is None:
                raise JarmError("The data has no gold rewards, so there is nothing to judge by: give a `target`.")
            check_budget(group.loop, benchmark.train)
            check_pool(benchmark.train, group.loop.annotator)
            scale = reward_scale(group.loop.annotator, benchmark.train.gold, benchmark.train.mask)
        except JarmError as error:
            raise JarmError(f"In the setting {group.settings[0]}: {error}") from error
        hparams = []
        for setting in group.settings:
            try:
                numbers = make_hparams(setting.config.loop(), benchmark.train, scale, setting.config.hparams())
            except JarmError as error:
                raise JarmError(f"In the setting {setting}: {error}") from error
            hparams.append(jax.tree.map(float, numbers))
        jobs.append(Job(group, benchmark, scale, hparams))
    return jobs


class Programs:
    """The runner of each job, made when it is first asked for; jobs with equal programs and shapes share one.

    Args:
      together: runs that a device takes together, at most.
      devices: of this process, over which the runs of a call are split.
    """

    def __init__(self, together: int, devices: int):
        self.together, self.devices = together, devices
        self._programs: dict[Any, Program] = {}
        self._runners: dict[int, Runner] = {}
        self._pool: tuple[Any, Pool] | None = None
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """Most runs of a call."""
        return self.together * self.devices

    def __call__(self, job: Job) -> Runner:
        """The runner of a job."""
        with self._lock:
            if id(job) not in self._runners:
                self._runners[id(job)] = self._make(job)
            return self._runners[id(job)]

    def _make(self, job: Job) -> Runner:
        table, annotator = job.benchmark.train, job.group.loop.annotator
        which = id(table), annotator.scale, annotator.length_bias
        program = self._programs.setdefault(job.program, Program(job.group.loop, self.together, self.devices))
        try:
            if self._pool is None or self._pool[0] != which:
                self._pool = None  # the last one makes room
                self._pool = which, make_pool(table, annotator)[0]
            return Runner(program, self._pool[1], timed=False)
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            raise JarmError(
                f"In the setting {job.group.settings[0]}: the training table does not fit into memory: take fewer "
                "prompts, or narrower embeddings."
            ) from error

    def forget(self, job: Job) -> None:
        """Let go of a job's pool; its program stays, for others."""
        with self._lock:
            self._runners.pop(id(job), None)

    @property
    def compiled(self) -> int:
        """How many programs were compiled."""
        return sum(program.is_compiled for program in self._programs.values())


def make_programs(config: SweepConfig, jobs: list[Job]) -> Programs:
    """The programs of a sweep on all devices of this process, for no more runs together than a job has."""
    cells, devices = max(len(job.group.settings) for job in jobs) * config.base.seeds, jax.local_device_count()
    together = config.base.together or (1 if jax.default_backend() == "cpu" else TOGETHER)
    return Programs(max(1, min(together, -(-cells // devices))), devices)


def workers_of(config: SweepConfig, programs: Programs) -> int:
    """Calls at work at a time: where calls are split over devices, one."""
    return 1 if programs.devices > 1 else config.base.jobs or default_jobs()


def calls_of(
    jobs: list[Job], rules: list[str], seeds: int, size: int, done: set[tuple[Any, ...]], axes: tuple[str, ...]
) -> list[Call]:
    """What is left to run, at most `size` cells a call; all rules of some cells near each other."""
    calls = []
    for job in jobs:
        cells = [
            (setting, hparams, seed)
            for seed in range(seeds)
            for setting, hparams in zip(job.group.settings, job.hparams, strict=True)
        ]
        for start in range(0, len(cells), size):
            for rule in rules:
                left = [
                    (setting, hparams, seed)
                    for setting, hparams, seed in cells[start : start + size]
                    if (rule, seed, *(setting.axes[axis] for axis in axes)) not in done
                ]
                if left:
                    calls.append(Call(job, rule, left))
    return calls


def share_of(calls: list[T], process: int, processes: int, rules: int) -> list[T]:
    """The calls that a process makes: of every rule, which differ in what they take, about as many as the others."""
    return [call for at, call in enumerate(calls) if (at % rules + at // rules) % processes == process]


def run_call(programs: Programs, call: Call) -> list[list[dict[str, Any]]]:
    """The records of each run of a call."""
    job, runner = call.job, programs(call.job)
    results = runner(call.rule, [(seed, hparams) for _, hparams, seed in call.cells])
    head = job.group.loop.head.head()
    found = judge(head, results, job.benchmark.test, pad=programs.capacity, **job.judged)
    took = ("seconds_to_fit", "seconds_to_select", "seconds_to_compile")
    lines = []
    for (setting, _, _), result, metrics in zip(call.cells, results, found, strict=True):
        # With its rounds, since an axis may change them under a name of its own.
        place = {**setting.axes, "rounds": job.group.loop.rounds}
        own = [{"kind": line.pop("kind"), **place, **line} for line in result.lines(metrics)]
        lines.append([{name: value for name, value in line.items() if name not in took} for line in own])
    return lines


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
    if not agreed(repr([settings, axes, sorted(wanted, key=repr), sources, programs.capacity])):
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
                _refuse_other_sources(folder, sources)
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
        with tqdm(total=total, unit="run", desc="sweep", disable=jax.process_index() > 0) as bar:
            for runs in side_by_side(one, [(call,) for call in mine], workers_of(config, programs)):
                folder.append([line for run in runs for line in run])
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
        if line["kind"] == "reference" or (line["rule"] in rules and tuple(line[axis] for axis in axes) in here)
    ]
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


GROWING = ("named", "tables")
"""Settings of the folder to which a value more of an axis adds."""


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
        train, test = job.benchmark.train, job.benchmark.test
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
    source = {"data", *SOURCE}
    return [
        axis
        for axis, values in config.grid.items()
        if axis in source or (axis not in OPTIONS and any(source & set(value) for value in values))
    ]


@contextlib.contextmanager
def _shared_folder(
    path: pathlib.Path, settings: dict[str, Any], rounds: int, axes: tuple[str, ...]
) -> Iterator[RecordFolder]:
    """The folder that this process appends to: the first one's is the sweep's, the others' lie in it meanwhile."""
    process = jax.process_index()
    with contextlib.ExitStack() as stack:
        with in_step():
            if process == 0:
                folder = stack.enter_context(RecordFolder(path, settings, rounds, axes, GROWING))
                _gather(folder)
        with in_step():
            if process:
                own = path / f"process-{process}"
                folder = stack.enter_context(RecordFolder(own, settings, rounds, axes, GROWING))
                records = path / "records.jsonl"
                lines = records.read_text().splitlines() if records.exists() else []
                folder.done |= {folder.run_of(json.loads(line)) for line in lines}
        with in_step():
            yield folder
            if process:
                folder.close()
        with in_step():
            if process == 0:
                _gather(folder)


def _gather(folder: RecordFolder) -> None:
    """Take over what other processes wrote, and remove their folders."""
    for path in _process_folders(folder.path):
        with RecordFolder(path, folder.settings, folder.rounds, folder.axes, folder.growing) as other:
            new = [line for line in other.read() if folder.run_of(line) not in folder.done]
            if new:
                folder.append(new)
            folder.done |= other.done
        shutil.rmtree(path)


def _process_folders(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(each for each in path.glob("process-*") if re.fullmatch(r"process-\d+", each.name) and each.is_dir())


def _refuse_other_sources(folder: RecordFolder, sources: dict[str, str]) -> None:
    for line in folder.read():
        if line["rule"] in sources and line.get("source") not in (None, sources[line["rule"]]):
            raise JarmError(
                f"The file of {line['rule']} has changed since {folder.path} got runs of it: give another `out`, or "
                "another name to what is another rule."
            )


def _append_references(folder: RecordFolder, config: SweepConfig, jobs: list[Job], common: dict[str, Any]) -> None:
    """What needs no reward model, once for each table, with the values of the axes that choose it."""
    known = {folder.run_of(line) for line in folder.read() if line["kind"] == "reference"}
    tables = {
        tuple((axis, setting.axes[axis]) for axis in _source_axes(config)): job
        for job in reversed(jobs)
        for setting in job.group.settings
    }
    for place, job in tables.items():
        lines = [
            {"kind": "reference", "rule": name, **dict(place), **values, **common}
            for name, values in reference_lines(job.benchmark.test, **job.judged).items()
        ]
        if lacking := [line for line in lines if folder.run_of(line) not in known]:
            folder.append(lacking)


def _write_progress(out: pathlib.Path, progress: dict[str, Any]) -> None:
    """What `jarm sweep status` reads beside the records."""
    try:
        replace_text(out / "progress.json", json.dumps(progress) + "\n")
    except OSError as error:
        raise JarmError(f"Cannot write to {out} ({error}): make room, and give the same command.") from error


def sweep_status(out: pathlib.Path) -> dict[str, Any]:
    """How far the sweep of a folder is; nothing in it is touched.

    Returns:
      `runs` in all; `done`, of which `failed`, and the sentence of each kind of failure with its count; `running`.

    Raises:
      JarmError: the folder holds no sweep.
    """
    try:
        total = json.loads((out / "progress.json").read_text())["runs"]
        axes = json.loads((out / "config.json").read_text())["axes"]
    except (OSError, ValueError, KeyError) as error:
        raise JarmError(f"{out} holds no sweep ({error}): give the `out` of one that was started.") from None
    done, failures = set(), dict[str, int]()
    for path in (out, *_process_folders(out)):
        records = path / "records.jsonl"
        for text in records.read_bytes().split(b"\n")[:-1] if records.exists() else ():
            line = json.loads(text)
            run = line["rule"], line.get("seed"), *(line.get(axis) for axis in axes)
            if line["kind"] == "failed" and run not in done:
                failures[line["message"]] = failures.get(line["message"], 0) + 1
            if line["kind"] != "reference":
                done.add(run)
    try:
        claim(out).close()
        running = False
    except JarmError:
        running = True
    failed = sum(failures.values())
    return {"runs": total, "done": len(done), "failed": failed, "failures": failures, "running": running}
