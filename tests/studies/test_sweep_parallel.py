"""One sweep on one device, and on eight: the same records, and values to 1e-3."""

import json
import os
import subprocess
import sys

import pytest
from marks import nightly
from test_compare import in_order
from test_sweep import TOML

from jarm.runs.progress import sweep_status


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    (folder / "noise.toml").write_text(TOML)
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


def finish(*processes):
    said = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [out for out, _ in said]


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
@pytest.mark.parametrize("together", ["0", nightly("2")])
def test_eight_devices(together, job, reference):
    """Four cells on eight devices: one each, of which four are copies; or two each."""
    out = job / f"eight-{together}"
    finish(start(job, out, "--vmap-runs", together, devices=8))
    check(out, reference)


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
