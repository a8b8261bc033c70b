"""A sweep on a real cluster of Dask, whose workers die and join; in an environment of its own (CONTRIBUTING.md)."""

import dataclasses
import os
import signal
import threading
import time

import pytest
from test_compare import SMALL, in_order

from jarm import JarmError, SweepConfig, sweep
from jarm.runs import elsewhere
from jarm.runs.elsewhere import dask_executor

pytestmark = [pytest.mark.dask, pytest.mark.filterwarnings("default")]
GRID = {"noise": [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]}


def small(out, **changes):
    return SweepConfig(dataclasses.replace(SMALL, out=out, **changes), GRID)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "whole"
    sweep(small(out))
    return in_order(out)


@pytest.fixture
def cluster():
    from distributed import LocalCluster

    with LocalCluster(n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None) as made:
        yield made


def test_one_of_three_workers_is_killed_and_one_joins(cluster, whole, tmp_path):
    """Killed by a signal when a third of the 24 runs is recorded; the nanny starts another in its place."""
    killed = []

    def disturb():
        records, end = tmp_path / "records.jsonl", time.monotonic() + 200
        while not records.exists() or records.read_text().count('"round": 2') < 8:
            if time.monotonic() > end:
                return
            time.sleep(0.02)
        killed.append(cluster.workers[0].process.pid)
        os.kill(killed[0], signal.SIGKILL)
        cluster.scale(4)

    thread = threading.Thread(target=disturb)
    thread.start()
    with dask_executor(cluster.scheduler_address) as executor:
        sweep(small(tmp_path), executor=executor)
    thread.join()
    assert len(killed) == 1
    assert in_order(tmp_path) == whole


def test_tables_that_workers_cannot_read_are_scattered(cluster, whole, tmp_path, monkeypatch):
    describe, scatter, scattered = elsewhere.describe, elsewhere._scatter, []
    elsewhere_is = {"data": "/nowhere/responses.parquet"}
    monkeypatch.setattr(elsewhere, "describe", lambda *a, **k: describe(*a, **k)._replace(source=elsewhere_is))
    monkeypatch.setattr(elsewhere, "_scatter", lambda *a: scattered.append(a) or scatter(*a))
    with dask_executor(cluster.scheduler_address) as executor:
        sweep(small(tmp_path), executor=executor)
    assert len(scattered) == 1
    assert in_order(tmp_path) == whole


def test_an_address_without_a_scheduler_gets_a_sentence(monkeypatch):
    monkeypatch.setattr(elsewhere, "ANSWER_SECONDS", 1)
    for address in ("127.0.0.1:1", "nobody", ""):
        with (
            pytest.raises(JarmError, match=r"No Dask scheduler answers at .* within 1 s"),
            dask_executor(address),
        ):
            pass
