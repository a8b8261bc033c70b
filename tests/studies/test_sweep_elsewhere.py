"""A sweep by the workers of an executor: what is given out again, what has failed, what travels."""

import collections
import concurrent.futures
import dataclasses
import pathlib
import pickle
import sys

import pytest
from test_compare import SMALL

from jarm import JarmError, SweepConfig
from jarm.cli import main
from jarm.core.interrupts import STOP
from jarm.runs import elsewhere
from jarm.runs.elsewhere import describe, make_elsewhere, make_task
from jarm.runs.grid import expand
from jarm.runs.jobs import calls_of, read_jobs


class KilledWorker(Exception):
    """As Dask's: the scheduler has given the call out several times before."""

    allowed_failures = 3


class Workers(concurrent.futures.Executor):
    """Workers in this process, whom all reaches through pickle.

    Args:
      fate: (rule, seed), number of the try -> None to make the call; "lost"; or an exception.
    """

    def __init__(self, fate=lambda run, number: None):
        self.fate, self.tries = fate, collections.Counter()

    def submit(self, function, /, task, tables):
        function, task, tables = pickle.loads(pickle.dumps((function, task, tables)))
        run = task.rule, task.runs[0][0]
        self.tries[run] += 1
        future, fate = concurrent.futures.Future(), self.fate(run, self.tries[run])
        if fate == "lost":
            future.cancel()
        elif fate is not None:
            future.set_exception(fate)
        else:
            future.set_result(function(task, tables))
        return future


def some_calls(**changes):
    config = SweepConfig(dataclasses.replace(SMALL, **changes), {"noise": [0.5, 1.0, 2.0]})
    return calls_of(read_jobs(expand(config)), config.base.rule_names(), config.base.seeds, 1, set())


def made(workers, calls):
    return list(make_elsewhere(workers, calls, "sweep", size=1))


def test_what_a_scheduler_gave_out_before_is_not_given_out_again():
    workers = Workers(lambda run, number: KilledWorker("all of them died"))
    (each,) = made(workers, some_calls(seeds=1)[:1])
    assert [line["message"] for (line,) in each.runs] == ["4 workers died while they made this run: all of them died"]
    assert set(workers.tries.values()) == {1}


def test_an_executor_that_is_broken_and_a_worker_without_jarm_get_a_sentence():
    class Shut(Workers):
        def submit(self, *_):
            raise RuntimeError("cannot schedule new futures")

    calls = some_calls(seeds=1)
    with pytest.raises(JarmError, match=r"takes no more calls \(cannot schedule new futures\): start its"):
        made(Shut(), calls)
    with pytest.raises(JarmError, match=r"A worker lacks a package \(No module named 'jarm'\): install"):
        made(Workers(lambda run, number: ModuleNotFoundError("No module named 'jarm'")), calls)
    with pytest.raises(ZeroDivisionError):  # a mistake of ours stays one
        made(Workers(lambda run, number: ZeroDivisionError()), calls)


def test_a_signal_to_stop_ends_it(monkeypatch):
    monkeypatch.setattr(elsewhere, "AT_ONCE", 1)

    def stop(run, number):
        STOP.set()
        return "lost"

    workers = Workers(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            made(workers, some_calls())
    finally:
        STOP.clear()
    assert workers.tries.total() == 1  # what was cancelled is no loss, and nothing else was given out


def test_a_description_holds_whole_paths_and_no_more_than_its_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rule = "from jarm import get_rule\nfar = get_rule('dopt')\n"
    pathlib.Path("mine.py").write_text(rule)
    task = describe(some_calls(rules="mine.py:far", seeds=1)[-1], "sweep", size=1)
    assert task.rule == f"{tmp_path}/mine.py:far" == task.job["loop"].rules[-1]
    assert [setting.axes for setting in task.job["settings"]] == [{"noise": 2.0}]
    assert (task.runs, task.source["data"], len(task.job["hparams"])) == (((0, 0),), "synthetic", 1)
    assert len(pickle.dumps(task)) < 10_000
    pathlib.Path("mine.py").write_text(f"{rule}# another\n")
    with pytest.raises(JarmError, match=r"mine\.py of a worker is another file"):
        make_task(task)


def test_tables_that_are_not_those_of_the_sweep_are_not_taken():
    task = describe(some_calls()[0], "sweep", size=1)
    assert elsewhere._read(task).train.shape == (200, 10, 32)
    train, test = task.tables
    assert elsewhere._read(task._replace(tables=({**train, "seed": 1}, test))) is None


def test_a_cluster_that_is_not_there_gets_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    (tmp_path / "noise.toml").write_text("seeds = 2")
    assert main(["sweep", str(tmp_path / "noise.toml"), "--dask", "127.0.0.1:1"]) == 1
    said = capsys.readouterr().err
    assert "needs the package `distributed`: install `jarm-jax[cluster]`" in said
    assert said.count("\n") == 1
