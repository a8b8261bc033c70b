"""Commands that compare ways of choosing: compare, sweep, plan, bench, forecast, and the list of rules."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterable
from typing import Annotated, Any

import tyro

from jarm.acquisition.registry import COSTS, NEEDS, RULES, get_rule
from jarm.commands.options import built_by, misused
from jarm.core.compiled import keep_compiled
from jarm.core.status import JarmError
from jarm.core.streams import show
from jarm.report.figures import run_times
from jarm.runs.config import CompareConfig
from jarm.runs.elsewhere import dask_executor
from jarm.runs.grid import SweepConfig, read_sweep
from jarm.runs.progress import sweep_status
from jarm.studies.bench import BenchConfig, bench, table
from jarm.studies.compare import compare
from jarm.studies.forecast import ForecastConfig, forecast
from jarm.studies.plan import plan, plan_text
from jarm.studies.sweep import sweep
from jarm.testing.conformance import CHECKS, SPACES, check_rule


def compare_command(config: Annotated[CompareConfig, tyro.conf.OmitArgPrefixes, built_by(CompareConfig)]) -> None:
    """Compare acquisition rules: how fast does each teach a reward model, and does it beat random here?

    With no options it runs on built-in data, a minute on two cores, or a few where they are busy. Records are appended
    run by run: interrupt it at any time, and the same command goes on. On your own data (of chosen and rejected
    responses it is `jarm backtest`):

    jarm compare --data responses.parquet --embeddings embeddings.npy --target score --out out/mine
    """
    keep_compiled()
    show_comparison(compare(config), config.out)


def show_comparison(summary: dict[str, Any], out: pathlib.Path) -> None:
    """Print the answer of a comparison or a backtest, a line for each rule, and where the rest stands.

    Raises:
      JarmError: a rule has no whole run.
    """
    _show_answer(summary["answer"], summary["left_to_learn"] and summary["left_to_learn"]["sentence"])
    for rule, row in summary["rules"].items():
        failed = f" [{row['failed_seeds']} failed: {row['failure']}]" if row["failed_seeds"] else ""
        show(f"{rule:>18}  {row['verdict']}{failed}")
    shown = (out / name for name in ("summary.md", "curves.png"))
    show("\n" + "\n".join(str(path) for path in shown if os.path.isfile(path)))
    _refuse_lost(summary["rules"].items(), ", for the reason above")


def _show_answer(answer: str, left: str | None) -> None:
    """Print the answer, and beside it what is left to learn, if there is something to say."""
    show(f"{answer} {left or ''}".rstrip() + "\n")


def _refuse_lost(rows: Iterable[tuple[str, dict[str, Any]]], why: str) -> None:
    """Fail where a rule has no whole run."""
    if lost := dict.fromkeys(rule for rule, row in rows if row["failed_seeds"] and not row["seeds"]):
        raise JarmError(f"No run of {', '.join(lost)} ran to its end{why}.")


def sweep_command(
    config: Annotated[tuple[str, ...], tyro.conf.Positional],
    out: pathlib.Path | None = None,
    workers: int | None = None,
    vmap_runs: int | None = None,
    dry_run: bool = False,
    dask: str | None = None,
) -> None:
    """Run a grid of comparisons: CONFIG is a .toml with options of `jarm compare` and a table [grid], or a .py,
    which is run as a program.

    Runs are recorded as they finish: stop it at any time, and the same command goes on. See docs/sweeps.md.

    jarm sweep noise.toml

    jarm sweep status out/noise

    Args:
      config: the file; or `status` and the folder of a sweep, or its file.
      out: folder, instead of the file's.
      workers: calls at a time, instead of the file's; 0 takes one per core on a CPU, else 1.
      vmap_runs: runs per call, instead of the file's; 0 takes 1 on a CPU, else as many as fit, up to 64.
      dry_run: plan only, as `jarm plan` does.
      dask: HOST:PORT of a Dask scheduler, whose workers make the runs.
    """
    if config[:1] == ("status",) and len(config) == 2:
        _status(pathlib.Path(config[1]))
        return
    if len(config) != 1 or config == ("status",):
        misused(f"`{' '.join(('jarm sweep', *config))}`: give one file, or `status` and a folder.")
    read = read_sweep(pathlib.Path(config[0]))
    given: dict[str, Any] = {"out": out, "workers": workers, "vmap_runs": vmap_runs}
    given = {name: value for name, value in given.items() if value is not None}
    read = dataclasses.replace(read, base=dataclasses.replace(read.base, **given))
    keep_compiled()
    if dry_run:
        _print_plan(read)
        return
    with dask_executor(dask) if dask is not None else contextlib.nullcontext() as executor:
        summary = sweep(read, executor=executor)
    _show_answer(summary["answer"], summary["left_to_learn"])
    failed = sum(row["failed_seeds"] for each in summary["settings"] for row in each["rules"].values())
    if failed:
        show(f"{failed:,} run{'s' * (failed != 1)} failed; {read.out / 'summary.md'} says why.")
    show(f"{read.out / 'summary.md'}\n{read.out / 'curves.png'}")
    rows = [row for each in summary["settings"] for row in each["rules"].items()]
    _refuse_lost(sorted(rows, key=lambda row: row[0]), " in some setting, for the reasons there")


def _status(folder: pathlib.Path) -> None:
    status = sweep_status(read_sweep(folder).out if os.path.isfile(folder) else folder)
    state = "running" if status["running"] else "stopped"
    if not status["running"] and status["done"] == status["runs"]:
        state = "done" if status["summarised"] else "stopped before the summary: give the same command once more"
    show(f"{status['done']:,} of {status['runs']:,} runs, {state}")
    for message, count in status["failures"].items():
        show(f"{count:,} failed: {message}")


def plan_command(config: Annotated[pathlib.Path, tyro.conf.Positional], measure: bool = True) -> None:
    """Estimate the cost of a sweep: runs, programs, bytes and seconds, measured on some runs of every rule.

    jarm plan noise.toml

    Args:
      config: the file of the sweep.
      measure: compile the programs, and time some runs of every rule on each.
    """
    keep_compiled()
    _print_plan(read_sweep(config), measure=measure)


def _print_plan(config: SweepConfig, *, measure: bool = True) -> None:
    show(plan_text(plan(config, measure=measure)))
    if os.path.isfile(config.out / "progress.json"):
        show(f"{sweep_status(config.out)['done']:,} runs are in {config.out} already")


def bench_command(config: Annotated[BenchConfig, tyro.conf.OmitArgPrefixes, built_by(BenchConfig)]) -> None:
    """Measure the run time and memory of acquisition rules against the number of candidate pairs.

    jarm bench --rules random,dopt,greedy_dopt --sizes 10000,100000 --cores 1
    """
    rows = bench(config)
    show(f"\n{table(rows)}\n\n{config.out / 'bench.md'}")
    try:
        show(run_times(rows, config.out / "bench")[0])
    except JarmError as error:  # without matplotlib there is still a table
        show(error)


def forecast_command(config: Annotated[ForecastConfig, tyro.conf.OmitArgPrefixes, built_by(ForecastConfig)]) -> None:
    """Forecast how many labels active choice will save on your embeddings, before any pair is labelled.

    Gold rewards are drawn from a family of teachers, and campaigns simulated on them. With `--labels`, a file of
    labelled pairs, teachers that fit them count more.

    jarm forecast --data responses.parquet --embeddings embeddings.npy --out out/forecast
    """
    keep_compiled()
    summary = forecast(config)
    show(f"{summary['answer']}\n\n{config.out / 'forecast.md'}\n{config.out / 'forecast.png'}")


def rules_command(check: str | None = None) -> None:
    """List the acquisition rules, or check one of your own.

    jarm rules --check my_rules.py:best_rule

    Args:
      check: a rule to run the conformance suite on, by name or as FILE.py:FUNCTION, instead of the list.
    """
    if check is not None:
        try:
            check_rule(get_rule(check))
        except AssertionError as error:
            raise JarmError(f"{check} does not conform: {error}.") from error
        show(f"{check} conforms: {', '.join(CHECKS)}, on pairs {', '.join(SPACES)}.")
        return
    for name, entry in RULES.items():
        needs = ", ".join(NEEDS[need] for need in entry.needs)
        mark = "; contrib" * entry.contrib
        show(f"{name:<23} {entry.summary}\n{'':<23} cost {entry.cost}; needs {needs or 'the candidates alone'}{mark}")
    show(f"\n{COSTS}")
