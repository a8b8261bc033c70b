"""One store from one device, from eight, and from two processes: the same keys, and values to 1e-5."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from fixtures.tiny import write_checkpoint
from test_embed import random_rows, write_rows

from jarm.data.store import EmbeddingStore

# As from the command line; a store is written to after each batch, so that there is something to interrupt.
COMMAND = """
import sys, jarm.cli, jarm.embedding.sink
jarm.embedding.sink.COMMIT_BYTES = 1
sys.exit(jarm.cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    model = write_checkpoint(folder / "model", "llama")
    table = write_rows(folder / "r.jsonl", random_rows(150, prompt=20))
    return folder, ["--model", str(model), "--input", str(table), "--dtype", "float32", "--max-tokens-per-batch", "128"]


def start(options, out, devices=1):
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", COMMAND, "embed", *options, "--out", str(out)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    for process in processes:
        out, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors[-3000:]
        yield out


def pair(options, out, swapped=None):
    """Two processes with two devices each; the second with another input, if one is given."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = [*options, "--coordinator", address, "--processes", "2"]
    second = [
        swapped if swapped and before == "--input" else each for before, each in itertools.pairwise(["", *common])
    ]
    return [start([*given, "--process-id", str(at)], out, devices=2) for at, given in enumerate((common, second))]


@pytest.fixture(scope="module")
def reference(job):
    folder, options = job
    list(finish(start(options, folder / "one")))
    return EmbeddingStore(folder / "one")


def check(store, reference):
    assert sorted(store.keys) == sorted(reference.keys)
    np.testing.assert_allclose(store.rows(reference.keys), reference[:], rtol=0, atol=1e-5)
    assert store.verify() == []


@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.slow
@pytest.mark.nightly
def test_eight_devices(job, reference, parallel):
    folder, options = job
    out = folder / f"eight-{parallel}"
    list(finish(start([*options, "--tensor-parallel", str(parallel)], out, devices=8)))
    check(EmbeddingStore(out), reference)


@pytest.mark.slow
@pytest.mark.nightly
def test_two_processes_stop_together_and_go_on(job, reference):
    """A signal to one of them ends both after the same batch; the same commands finish the store."""
    folder, options = job
    out = folder / "stopped"
    processes = pair(options, out)
    deadline = time.monotonic() + 120
    while not (out / "journal.jsonl").exists() or not (out / "journal.jsonl").stat().st_size:
        assert time.monotonic() < deadline
        assert processes[1].poll() is None
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=120) for process in processes]
    for process in processes:
        process.communicate()
    assert codes in ([130, 130], [0, 0])  # the latter if they were done before the signal came
    said = list(finish(*pair(options, out)))
    check(EmbeddingStore(out), reference)
    assert "embedded now" in said[0]
    assert "embedded now" not in said[1]  # and whatever gloo has to say


@pytest.mark.slow
@pytest.mark.nightly
def test_processes_with_different_texts_do_not_start(job):
    folder, options = job
    other = write_rows(folder / "other.jsonl", random_rows(150, prompt=20, seed=5))
    first, second = pair(options, folder / "different", swapped=str(other))
    errors = [process.communicate(timeout=180)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [1, 1]
    assert all("The processes have different texts: give all of them the same." in each for each in errors)
    assert not (folder / "different").exists()
