"""One sweep on one device, on eight, and by two processes: the same records, and values to 1e-3."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_compare import in_order, lines
from test_sweep import TOML

from jarm.runs.sharing import sweep_status


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    (folder / "noise.toml").write_text(TOML)
    (folder / "other.toml").write_text(TOML.replace("batch = 5", "batch = 6"))
    (folder / "broken.toml").write_text(TOML.replace('"greedy_dopt"', '"gredy"'))
    return folder


def piped(job, devices=1):
    """Options of a process whose compiled programs are kept and whose output is read."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(job / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def start(job, out, *options, devices=1, file="noise.toml"):
    command = [sys.executable, "-m", "jarm.cli", "sweep", str(job / file), "--out", str(out), *options]
    return subprocess.Popen(command, **piped(job, devices))


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def finish(*processes):
    said = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [out for out, _ in said]


def pair(job, out, files=("noise.toml", "noise.toml"), devices=1):
    """Two processes on one sweep; the second with another file, if one is given."""
    common = ("--coordinator", free_address(), "--processes", "2", "--process-id")
    return [start(job, out, *common, str(at), devices=devices, file=file) for at, file in enumerate(files)]


@pytest.mark.nightly
@pytest.mark.slow
def test_a_comparison_shares_its_runs_among_processes_too(job):
    code = """
import sys
from test_compare import SMALL
from jarm import compare
from jarm.core.distributed import join_if_asked
import dataclasses, pathlib
out, coordinator, count, at = sys.argv[1:]
join_if_asked(False, coordinator or None, *((int(count), int(at)) if coordinator else (None, None)))
print(list(compare(dataclasses.replace(SMALL, out=pathlib.Path(out)))))
"""
    alone = subprocess.Popen([sys.executable, "-c", code, str(job / "alone"), "", "1", "0"], **piped(job))
    said = finish(alone)
    assert "rules" in said[0]
    address = free_address()
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(job / "shared"), address, "2", str(at)], **piped(job))
        for at in (0, 1)
    ]
    assert finish(*both)[1].endswith("[]\n")  # after a line of Gloo
    assert sorted(in_order(job / "shared"), key=place) == sorted(in_order(job / "alone"), key=place)
    assert not list((job / "shared").glob("process-*"))


@pytest.fixture(scope="module")
def reference(job):
    finish(start(job, job / "one", "--workers", "1"))
    return in_order(job / "one")


def place(line):
    return line["kind"], line["rule"], line.get("seed", -1), line.get("noise", -1), line.get("round", -1)


def check(out, reference):
    """The same records, each once; values to 1e-3, since a batched program adds in another order."""
    found, there = sorted(in_order(out), key=place), sorted(reference, key=place)
    assert [place(line) for line in found] == [place(line) for line in there]
    for one, two in zip(found, there, strict=True):
        assert one.keys() == two.keys()
        for name, value in two.items():
            wanted = pytest.approx(value, rel=1e-3, abs=1e-3) if isinstance(value, float) else value
            assert one[name] == wanted, name
    assert not list(out.glob("process-*"))
    assert sweep_status(out) == {
        "runs": 8,
        "done": 8,
        "failed": 0,
        "failures": {},
        "running": False,
        "summarised": True,
    }
    assert json.loads((out / "summary.json").read_text())["settings"][1]["rules"]["random"]["seeds"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("together", ["0", "2"])
def test_eight_devices(together, job, reference):
    """Four cells on eight devices: one each, of which four are copies; or two each."""
    out = job / f"eight-{together}"
    finish(start(job, out, "--vmap-runs", together, devices=8))
    check(out, reference)


@pytest.mark.slow
def test_two_processes(job, reference):
    out = job / "two"
    (out / ".working").mkdir(parents=True)  # as a kill leaves it, of more processes than there are
    (out / ".working" / "7").touch()
    said = finish(*pair(job, out))
    check(out, reference)
    assert "summary.md" in said[0]
    assert "summary.md" not in said[1]
    assert not (out / ".working").exists()
    # A process alone takes what they did for its own.
    before = (out / "records.jsonl").read_bytes()
    finish(start(job, out))
    assert (out / "records.jsonl").read_bytes() == before


@pytest.mark.nightly
@pytest.mark.slow
def test_two_processes_of_two_devices(job, reference):
    finish(*pair(job, job / "four", devices=2))
    check(job / "four", reference)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["within", "cross"])
def test_every_rule_runs_on_several_devices(pairs, job):
    text = (
        TOML.replace('"greedy_dopt"', f'"all"\npairs = "{pairs}"')
        .replace("seeds = 2", "seeds = 1")
        .replace("members = 1", "members = 2")
    )
    (job / "all.toml").write_text(text)
    finish(start(job, job / pairs, devices=2, file="all.toml"))
    status = sweep_status(job / pairs)
    assert status["done"] == status["runs"] > 40
    assert not status["failed"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
@pytest.mark.nightly
def test_processes_killed_in_the_middle_leave_what_others_go_on_with(processes, job, reference):
    """Killed when the second has made a run; started again by two, or by one alone, who gathers what is there."""
    out = job / f"killed-{processes}"
    both = pair(job, out)
    theirs = out / "process-1" / "records.jsonl"
    deadline = time.monotonic() + 200
    while not (theirs.exists() and theirs.stat().st_size):
        assert time.monotonic() < deadline
        assert [process.poll() for process in both] == [None, None]
        time.sleep(0.01)
    for process in both:
        process.send_signal(signal.SIGKILL)
    for process in both:
        process.communicate()
    assert (out / "process-1").exists()
    status = sweep_status(out)
    assert 0 < status["done"] < status["runs"] == 8
    finish(*(pair(job, out) if processes == 2 else [start(job, out, "--workers", "1")]))
    check(out, reference)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("noise.toml", "other.toml"), ("The processes have different grids",) * 2),
        pytest.param(
            ("noise.toml", "broken.toml"),
            ("Another process stopped, and says why", "no rule 'gredy'"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["different", "broken"],
)
def test_processes_that_cannot_start_stop_together(files, words, job):
    refused(pair(job, job / "nothing", files), words)
    assert not (job / "nothing").exists()


@pytest.mark.slow
@pytest.mark.nightly
def test_processes_whose_folder_is_refused_stop_together(job, reference):
    before = lines(job / "one")
    refused(pair(job, job / "one", ["other.toml"] * 2), ("batch 5 there, 6 here", "Another process stopped"))
    assert lines(job / "one") == before
    assert not list((job / "one").glob("process-*"))


def test_processes_that_see_different_folders_stop_together(job):
    """Before they run anything: each would wait for the other's files."""
    common = ("--coordinator", free_address(), "--processes", "2", "--process-id")
    both = [start(job, job / f"apart-{at}", *common, str(at)) for at in (0, 1)]
    refused(both, ("is not one folder for all processes",) * 2)


def refused(processes, words):
    """Each ends with a sentence, and soon: none waits for one that has left."""
    begun = time.monotonic()
    for process, expected in zip(processes, words, strict=True):
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 1, errors[-3000:]
        assert expected in errors
        assert "Traceback" not in errors
    assert time.monotonic() - begun < 150
