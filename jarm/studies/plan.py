"""`jarm plan`: what a sweep will take on this machine, measured on some runs of every rule and program."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from typing import Any

import jax
import numpy as np

from jarm.core.messages import clock, readable
from jarm.core.status import JarmError
from jarm.runs.grid import SweepConfig
from jarm.runs.jobs import Call, Job, Programs, make_programs, read_jobs, run_call
from jarm.runs.programs import free_bytes, program_bytes
from jarm.runs.runner import side_by_side

FIGURE, LINE = 32 << 20, 8 << 10
"""Bytes of what comes after the runs: a figure, and for the summary each line of the records, 4 to 5 KiB in Python."""

TIMED = 16
"""Runs of a program that are timed at least, of all rules together, so that one odd run does not set the estimate."""


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """Settings of a sweep that share a program and data.

    Attributes:
      settings: the settings that it runs, in words.
      runs: how many, of all rules and seeds.
      vmap_runs: runs of a call.
      pool_bytes: the training table on the device.
      program_bytes: what a call takes beside it, by XLA's account; None where nothing was compiled.
      compile_seconds: wall time.
      seconds: rule -> wall time of a run, evaluation included, as many at a time as the sweep will have.
    """

    settings: str
    runs: int
    vmap_runs: int
    pool_bytes: int
    program_bytes: int | None = None
    compile_seconds: float | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep before it runs.

    Attributes:
      settings, rules, seeds: counts; a run is one of each.
      traced, static: the axes that share a program, and those that do not.
      programs: what shares a program and data; data of one shape can have a program in common.
      compilations: how many different programs these are.
      workers: calls at work at a time.
      peak_bytes: most memory of this process, on a CPU: what it took while planning and what more calls and
        the summary add. Where programs come from the compilation cache, without what it takes to compile them.
      free_bytes: of the device, or of the machine on a CPU.
    """

    settings: int
    rules: tuple[str, ...]
    seeds: int
    traced: tuple[str, ...]
    static: tuple[str, ...]
    programs: tuple[ProgramPlan, ...]
    compilations: int
    workers: int
    peak_bytes: int | None
    free_bytes: int | None

    @property
    def runs(self) -> int:
        """All of them."""
        return self.settings * len(self.rules) * self.seeds

    @property
    def seconds(self) -> float | None:
        """Wall time of the whole sweep with one process, compilation included; None where nothing was measured."""
        if not all(program.seconds for program in self.programs):
            return None
        return sum(
            (program.compile_seconds or 0)
            + program.runs / len(self.rules) * sum(program.seconds[rule] for rule in self.rules)
            for program in self.programs
        )


def plan(config: SweepConfig, *, measure: bool = True) -> Plan:
    """Count a sweep, compile its programs, and time some runs of every rule on each, drawn from all that there are.

    What is compiled is in the compilation cache when the sweep wants it. Nothing is written to its folder.

    Args:
      config: the grid.
      measure: whether to compile and to time; else runs and bytes of tables are counted only.

    Raises:
      JarmError: as for `sweep`; or a table or a program does not fit into memory.
    """
    jobs, rules = read_jobs(config), config.base.rule_names()
    programs, room = make_programs(config, jobs), free_bytes()
    workers = programs.workers
    rows, most, seen = [], 0, set[Any]()
    for job in jobs:
        table = job.data.train
        needed = 4 * int(table.mask.size) * (table.shape[2] + 3)
        if room is not None and needed > room:
            raise JarmError(
                f"In the setting {job.group.settings[0]}: the training table takes {readable(needed)} on the device, "
                f"and {readable(room)} are free: take fewer prompts, or narrower embeddings."
            )
        runs = len(job.group.settings) * len(rules) * config.base.seeds
        row = ProgramPlan(_words(job), runs, programs.capacity, needed)
        if measure:
            row = _measured(row, job, rules, config.base.seeds, programs, workers)
            if job.program in seen:
                row = dataclasses.replace(row, compile_seconds=0.0)
            seen.add(job.program)
            most = max(most, row.program_bytes or 0)
        programs.forget(job)
        rows.append(row)
    peak = None
    if measure and jax.default_backend() == "cpu":
        # Each worker's call was at work while this was measured; compiling the largest program may come on top again.
        lines = sum(row.runs * (job.group.loop.rounds + 1) for row, job in zip(rows, jobs, strict=True))
        peak = _peak_resident() + workers * most + FIGURE + lines * LINE
        if room is not None and workers * most > room:
            raise JarmError(
                f"{workers} runs at a time take {readable(workers * most)}, and {readable(room)} are free: give fewer "
                "`workers`, or fewer `candidates`."
            )
    settings = [setting for job in jobs for setting in job.group.settings]
    axes = tuple(axis for axis, values in config.grid.items() if len(values) > 1)
    traced = tuple(axis for axis in axes if _shares_programs(axis, jobs))
    return Plan(
        settings=len(settings),
        rules=tuple(rules),
        seeds=config.base.seeds,
        traced=traced,
        static=tuple(axis for axis in axes if axis not in traced),
        programs=tuple(rows),
        compilations=len({job.program for job in jobs}),
        workers=workers,
        peak_bytes=peak,
        free_bytes=room,
    )


def plan_text(plan: Plan) -> str:
    """A plan for print."""
    share = f"{plan.compilations} programs" if plan.compilations > 1 else "one program"
    text = [
        f"{plan.settings:,} settings x {len(plan.rules)} rules x {plan.seeds} seeds = {plan.runs:,} runs, {share}",
        f"axes that share a program: seeds, rules{''.join(', ' + axis for axis in plan.traced)}",
        f"axes that compile: {', '.join(plan.static) or 'none'}",
    ]
    for program in plan.programs:
        text.append(f"\n{program.settings}: {program.runs:,} runs, {program.vmap_runs} a call")
        text.append(f"  table {readable(program.pool_bytes)} on the device")
        if program.program_bytes is not None and program.compile_seconds is not None:
            text[-1] += f", a call {readable(program.program_bytes)}; compiled in {program.compile_seconds:.1f} s"
        text += [f"  {rule:<22} {seconds:8.3f} s a run" for rule, seconds in program.seconds.items()]
    if plan.seconds is not None:
        compiling = sum(program.compile_seconds or 0 for program in plan.programs)
        at_work = f"{plan.workers} calls at a time" if plan.workers > 1 else "one call at a time"
        text.append(f"\n{clock(plan.seconds - compiling)} on this machine, {at_work}")
        text.append(f"{clock(compiling)} before that to compile, where the cache does not have it yet")
    if plan.peak_bytes is not None:
        text.append(f"{readable(plan.peak_bytes)} of memory at most")
    if plan.free_bytes is not None:
        text.append(f"{readable(plan.free_bytes)} are free")
    return "\n".join(text)


def _words(job: Job) -> str:
    """The values that all settings of a job have."""
    settings = job.group.settings
    common = {name: value for name, value in settings[0].axes.items() if {s.axes[name] for s in settings} == {value}}
    return ", ".join(f"{name}={value}" for name, value in common.items()) or "all settings"


def _shares_programs(axis: str, jobs: list[Job]) -> bool:
    """Whether two values of an axis are run by one program."""
    values: dict[Any, set[Any]] = {}
    for job in jobs:
        values.setdefault(job.program, set()).update(setting.axes[axis] for setting in job.group.settings)
    return any(len(each) > 1 for each in values.values())


def _measured(
    row: ProgramPlan, job: Job, rules: list[str], seeds: int, programs: Programs, workers: int
) -> ProgramPlan:
    runner = programs(job)
    _, size = runner.program.compiled(runner.table)
    cells = [
        (setting, hparams, seed)
        for seed in range(seeds)
        for setting, hparams in zip(job.group.settings, job.hparams, strict=True)
    ]
    # Others for each rule, drawn from all: noisy labels, say, stop a fit at other steps.
    turns = -(-TIMED // (len(rules) * workers * size))
    rng, seconds = np.random.default_rng(0), dict[str, float]()
    for rule in rules:
        drawn = np.resize(rng.permutation(len(cells)), (turns * workers, size))
        calls = [Call(job, rule, [cells[at] for at in some]) for some in drawn]
        if not seconds:
            run_call(programs, calls[0])  # compiles the evaluation
        start = time.perf_counter()
        list(side_by_side(lambda call: run_call(programs, call), [(call,) for call in calls], workers))
        seconds[rule] = (time.perf_counter() - start) / drawn.size
    compiled, size = runner.program.compiled(runner.table)  # smaller by now, if memory ran out
    return dataclasses.replace(
        row,
        vmap_runs=size,
        program_bytes=program_bytes(compiled),
        compile_seconds=runner.program.seconds_to_compile,
        seconds=seconds,
    )


def _peak_resident() -> int:
    """Most memory that this process has held, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
