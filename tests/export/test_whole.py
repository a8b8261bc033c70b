"""An export or a model is there whole or not at all, whatever ends its making."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from fixtures.tiny import CHAT, write_checkpoint
from reward_models import model_on

from jarm.core.status import JarmError
from jarm.export.arrays import write_numpy, write_onnx
from jarm.export.cross_encoder import write_cross_encoder
from jarm.export.model import load_model
from jarm.export.sequence_classification import write_sequence_classification

WRITERS = {
    "model": lambda model, out, llm: model.save(out, "card"),
    "numpy": lambda model, out, llm: write_numpy(model, out),
    "onnx": lambda model, out, llm: write_onnx(model, out),
    "cross-encoder": write_cross_encoder,
    "sequence-classification": write_sequence_classification,
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama", chat=CHAT))


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, llm, name):
    model, out = model_on(llm), tmp_path / "out"
    out.mkdir()
    seen, fails, sync = [], [1], os.fsync

    def fsync(file):
        seen.append([path for path in out.iterdir() if not path.name.startswith(".")])  # the draft is hidden
        if len(seen) in fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr("jarm.core.files.os.fsync", fsync)
    for fails[0] in (1, 2):
        seen.clear()
        with pytest.raises(JarmError, match="No space left on device"):
            WRITERS[name](model, out, llm)
        assert (list(tmp_path.iterdir()), list(out.iterdir())) == ([out], [])
    fails.clear()
    WRITERS[name](model, out, llm)
    assert not any(seen)
    assert (list(tmp_path.iterdir()), len(list(out.iterdir())) > 1) == ([out], True)
    with pytest.raises(JarmError, match="holds files already"):
        WRITERS[name](model, out, llm)


STALLED = """
import sys, time
import jarm.core.files
from jarm.cli import command

def fsync(file):
    print("writing", flush=True)
    time.sleep(60)

jarm.core.files.os.fsync = fsync
sys.argv = ["jarm", "export", "--to", "numpy", *sys.argv[1:]]
command()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "left"), [(signal.SIGTERM, 130, 0), (signal.SIGINT, 130, 0), (signal.SIGKILL, -9, 1)]
)
def test_a_signal_leaves_what_was_there(tmp_path, llm, number, code, left):
    model_on(llm).save(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-c", STALLED, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    assert process.wait(60) == code
    process.stdout.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[left:] == ["model"]
    assert all(name.startswith(".out.") for name in names[:left])
    assert load_model(tmp_path / "model").members == 2
