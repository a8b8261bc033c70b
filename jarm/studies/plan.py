"""`jarm plan`: the cost of a sweep on this machine, measured on some runs of every rule and program."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jarm.core.messages import clock, readable
from jarm.core.status import JarmError
from jarm.runs.grid import SweepConfig, expand
from jarm.runs.jobs import Call, Job, read_jobs
from jarm.runs.programs import free_bytes, program_bytes
from jarm.runs.runner import Runner, make_runner, side_by_side

TIMED = 16
"""Minimum number of timed runs per program, of all rules together, so that one odd run does not set the estimate."""


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """The plan for settings of a sweep that share program and data.

    Attributes:
      settings: the settings, in words.
      runs: how many, of all rules and seeds.
      vmap_runs: runs per call.
      table_bytes: of the training table on the device.
      program_bytes: of a call beside the table, by XLA's account; None where nothing was compiled.
      compile_seconds: wall time.
      seconds: rule -> wall time of a run, evaluation included, with as many calls at a time as the sweep will have.
    """

    settings: str
    runs: int
    vmap_runs: int
    table_bytes: int
    program_bytes: int | None = None
    compile_seconds: float | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan for a sweep.

    Attributes:
      settings, seeds: how many; a run has one setting, one rule and one seed.
      rules: their names.
      traced, static: axes whose values share a program, and other axes.
      programs: one plan for settings that share program and data; data of one shape can share a program, too.
      compilations: number of different programs.
      workers: calls at a time.
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
    free_bytes: int | None

    @property
    def runs(self) -> int:
        """Number of runs."""
        return self.settings * len(self.rules) * self.seeds

    @property
    def seconds(self) -> float | None:
        """Wall time of the sweep with one process, compilation included; None where nothing was measured."""
        if not all(program.seconds for program in self.programs):
            return None
        return sum(
            (program.compile_seconds or 0)
            + program.runs / len(self.rules) * sum(program.seconds[rule] for rule in self.rules)
            for program in self.programs
        )


def plan(config: SweepConfig, *, measure: bool = True) -> Plan:
    """Count a sweep, compile its programs, and time some runs of every rule on each, drawn from all runs.

    The programs go to the compilation cache, where the sweep finds them. Nothing is written to its folder.

    Example:
      >>> from jarm import CompareConfig, SweepConfig, plan
      >>> config = SweepConfig(CompareConfig(rules="dopt"), {"noise": [0.5, 2.0], "head": ["linear", "mlp:8"]})
      >>> planned = plan(config, measure=False)
      >>> planned.runs, planned.compilations  # 4 settings x 2 rules x 10 seeds; the noise is traced
      (80, 2)

    Args:
      config: the grid.
      measure: whether to compile and to time; else only runs, programs and the bytes of tables are counted.

    Raises:
      JarmError: as for `sweep`; or a table or the calls at a time do not fit into memory.
    """
    jobs, rules = read_jobs(expand(config)), config.base.rule_names()
    runner, room = make_runner(jobs, config.base), free_bytes()
    rows, seen = [], set[Any]()
    for job in jobs:
        table = job.data.train
        needed = 4 * int(table.mask.size) * (table.shape[2] + 3 + (job.loop.annotator.column != "gold"))
        if room is not None and needed > room:
            with job.settings[0].named_in_errors():
                raise JarmError(
                    f"The training table takes {readable(needed)} on the device, and {readable(room)} are free: take "
                    "fewer prompts, or narrower embeddings."
                )
        row = ProgramPlan(_words(job), len(job.runs(config.base.seeds)) * len(rules), runner.capacity, needed)
        if measure:
            row = _measured(row, job, rules, config.base.seeds, runner)
            if job.program in seen:
                row = dataclasses.replace(row, compile_seconds=0.0)
            seen.add(job.program)
        runner.forget(job)
        rows.append(row)
    needed = runner.workers * max(row.program_bytes or 0 for row in rows)
    if room is not None and needed > room and jax.default_backend() == "cpu":
        raise JarmError(
            f"{runner.workers} runs at a time take {readable(needed)}, and {readable(room)} are free: give fewer "
            "`workers`, or fewer `candidates`."
        )
    settings = [setting for job in jobs for setting in job.settings]
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
        workers=runner.workers,
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
        text.append(f"\n{program.settings}: {program.runs:,} runs, {program.vmap_runs} per call")
        text.append(f"  table {readable(program.table_bytes)} on the device")
        if program.program_bytes is not None and program.compile_seconds is not None:
            text[-1] += f", a call {readable(program.program_bytes)}; compiled in {program.compile_seconds:.1f} s"
        text += [f"  {rule:<22} {seconds:8.3f} s per run" for rule, seconds in program.seconds.items()]
    if plan.seconds is not None:
        compiling = sum(program.compile_seconds or 0 for program in plan.programs)
        at_work = f"{plan.workers} calls at a time" if plan.workers > 1 else "one call at a time"
        text.append(f"\n{clock(plan.seconds - compiling)} on this machine, {at_work}")
        text.append(f"{clock(compiling)} before that to compile, where the cache does not have it yet")
    if plan.free_bytes is not None:
        text.append(f"{readable(plan.free_bytes)} are free")
    return "\n".join(text)


def _words(job: Job) -> str:
    """Values that all settings of a job have in common."""
    settings = job.settings
    common = {name: value for name, value in settings[0].axes.items() if {s.axes[name] for s in settings} == {value}}
    return ", ".join(f"{name}={value}" for name, value in common.items()) or "all settings"


def _shares_programs(axis: str, jobs: Sequence[Job]) -> bool:
    """Whether one program runs two values of an axis."""
    values: dict[Any, set[Any]] = {}
    for job in jobs:
        values.setdefault(job.program, set()).update(setting.axes[axis] for setting in job.settings)
    return any(len(each) > 1 for each in values.values())


def _measured(row: ProgramPlan, job: Job, rules: Sequence[str], seeds: int, runner: Runner) -> ProgramPlan:
    """The plan for a job with measured bytes and seconds."""
    program, runs = runner.program(job), job.runs(seeds)
    _, size = program.compiled(runner.table(job))
    # Other runs for each rule, drawn from all: noisy labels, say, stop a fit at other steps.
    turns = -(-TIMED // (len(rules) * runner.workers * size))
    rng, seconds = np.random.default_rng(0), dict[str, float]()
    for rule in rules:
        drawn = np.resize(rng.permutation(len(runs)), (turns * runner.workers, size))
        calls = [(Call(job, rule, [runs[at] for at in some]),) for some in drawn]
        if not seconds:
            runner(*calls[0])  # compiles the evaluation
        start = time.perf_counter()
        list(side_by_side(runner, calls, runner.workers))
        seconds[rule] = (time.perf_counter() - start) / drawn.size
    compiled, size = program.compiled(runner.table(job))  # smaller by now, if memory ran out
    return dataclasses.replace(
        row,
        vmap_runs=size,
        program_bytes=program_bytes(compiled),
        compile_seconds=program.seconds_to_compile,
        seconds=seconds,
    )
