"""`jarm embed` into a folder that is damaged, or has files of the user: it refuses, and nothing there changes."""

import contextlib
import json
import pathlib

import numpy as np
import pytest
from fixtures.tiny import write_checkpoint

from jarm.cli import main
from jarm.core.status import JarmError
from jarm.data.writer import StoreWriter
from jarm.embedding.config import EmbedConfig
from jarm.embedding.job import read_job
from jarm.embedding.sink import open_stores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def command(tmp_path, folder):
    """The command, and its store, as if it had run: no model is compiled."""
    table, out = tmp_path / "table.jsonl", tmp_path / "store"
    rows = [{"prompt": "a", "response": letter} for letter in "bcdefg"]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = read_job(EmbedConfig(model=str(folder), input=(str(table),), out=out, dtype="float32"))
    with StoreWriter(out, job.model.width, job.made_by()[out], dtype="float32") as writer:
        writer.append(job.corpus.keys, np.ones((len(rows), job.model.width), np.float32))
    return ["embed", "--model", str(folder), "--input", str(table), "--out", str(out), "--dtype", "float32"], out


def files(out):
    return {path.name: path.read_bytes() for path in pathlib.Path(out).iterdir()}


@pytest.mark.parametrize("cut", ["nothing", "half", "all but the last byte"])
def test_a_journal_shorter_than_its_shards_is_refused_and_nothing_changes(command, capsys, cut):
    args, out = command
    journal = (out / "journal.jsonl").read_bytes()
    (out / "journal.jsonl").write_bytes(journal[: {"nothing": 0, "half": len(journal) // 2}.get(cut, -1)])
    before = files(out)
    assert main(args) == 1
    said = capsys.readouterr().err
    assert "journal.jsonl has the lines of 0 rows where 6 were committed: copy it again" in said
    assert said.count("\n") == 1
    assert files(out) == before


def test_a_command_that_has_nothing_to_do_leaves_the_files_of_the_user(command, capsys):
    args, out = command
    theirs = {"shard-old.bin": b"a", "shard-00001.bin": b"b", "notes.txt": b"c"}
    for name, data in theirs.items():
        (out / name).write_bytes(data)
    assert main(args) == 0
    assert "0 embedded now, 6 were there" in capsys.readouterr().out
    assert {name: data for name, data in files(out).items() if name in theirs} == theirs


@pytest.mark.parametrize("content", ["[]", "mine", '{"a": "b"}', "[" * 1000])
def test_a_jobs_file_that_is_not_by_jarm_stays(command, capsys, content):
    args, out = command
    (out / "jobs.json").write_text(content)
    assert main(args) == 1
    assert "jobs.json" in capsys.readouterr().err
    assert (out / "jobs.json").read_text() == content


def test_a_link_in_the_place_of_the_folder_of_a_pooling_is_not_followed(tmp_path):
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    theirs.mkdir()
    out.mkdir()
    (out / "mean-1").symlink_to(theirs)
    made = {out / name: {"pooling": name} for name in ("last-1", "mean-1")}
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(JarmError, match="mean-1 is a link, and jarm writes"),
    ):
        open_stores(stack, made, 4, "float32")
    assert list(theirs.iterdir()) == []
    (tmp_path / "given").symlink_to(theirs)  # by the user, as --out
    with contextlib.ExitStack() as stack:
        assert open_stores(stack, {tmp_path / "given": {}}, 4, "float32")[0].path.name == "given"
