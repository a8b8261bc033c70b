import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

import jarm.core.files
from jarm.core.files import (
    append_whole,
    claim,
    described,
    existing_file,
    fingerprint,
    is_claimed,
    is_sealed,
    make_folder,
    plain,
    sealed,
    write_whole,
)
from jarm.core.status import JarmError

pytestmark = pytest.mark.core


def test_only_a_file_is_an_existing_file(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(JarmError, match="does not exist"):
        existing_file(path)
    with pytest.raises(JarmError, match="is a folder"):
        existing_file(tmp_path)
    with pytest.raises(JarmError, match="/dev/null is a pipe or a device, which cannot be read twice"):
        existing_file("/dev/null")
    write_whole(path, "x")
    assert existing_file(str(path)) == path


def test_a_folder_is_made_or_what_stands_there_is_named(tmp_path):
    make_folder(tmp_path / "a/b")
    make_folder(tmp_path / "a/b")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    make_folder(tmp_path / "link")
    assert (tmp_path / "a/b").is_dir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "unmounted").symlink_to("/nowhere/at/all")
    for name in ("file", "file/below"):
        with pytest.raises((JarmError, NotADirectoryError), match="file"):
            make_folder(tmp_path / name)
    for name in ("unmounted", "unmounted/below"):
        with pytest.raises(JarmError, match="unmounted is a link to /nowhere/at/all, which is not there"):
            make_folder(tmp_path / name)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a"
    for text in ("one", "two and more"):
        write_whole(path, text)
        assert path.read_text() == text
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("whole", [1 << 26, 0], ids=["whole", "sampled"])
def test_a_fingerprint_sees_size_and_content(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(jarm.core.files, "WHOLE", whole)
    contents = [bytes(1 << 17), bytes((1 << 17) + 1), bytes((1 << 17) - 1) + b"x", b"x" + bytes((1 << 17) - 1)]
    found = set()
    for place, content in enumerate(contents):
        path = tmp_path / str(place)
        path.write_bytes(content)
        found.add(fingerprint(path))
    assert len(found) == len(contents)
    assert described(table=path) == {
        "table": path.name,
        "table_bytes": 1 << 17,
        "table_fingerprint": fingerprint(path),
    }


def test_plain_values_are_json():
    values = [jnp.float32(0.5), np.int64(3), np.float32("nan"), float("inf"), np.bool_(True), "text", None]
    assert [plain(value) for value in values] == [0.5, 3, None, None, True, "text", None]
    assert json.dumps([plain(value) for value in values], allow_nan=False)


@pytest.mark.parametrize("content", ["new", b"new", lambda file: file.write(b"new")], ids=["text", "bytes", "function"])
def test_no_link_is_followed_and_no_file_of_others_touched_when_a_file_is_written(tmp_path, content):
    theirs, path = tmp_path / "theirs", tmp_path / "a"
    theirs.write_text("mine")
    (tmp_path / "a.tmp").write_text("mine too")
    path.symlink_to(theirs)
    write_whole(path, content)
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {
        "a": "new",
        "a.tmp": "mine too",
        "theirs": "mine",
    }
    assert not path.is_symlink()


def test_what_stops_a_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_whole(path, "old")

    def broken(file):
        file.write(b"new")
        raise KeyError("x")

    with pytest.raises(KeyError):
        write_whole(path, broken)
    (tmp_path / "folder").mkdir()
    for where in (tmp_path / "folder", tmp_path / "none" / "a", tmp_path / ("x" * 5000)):
        with pytest.raises(JarmError, match=r"^Cannot write .*: make room, or give another --out\.$"):
            write_whole(where, "new")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write, data in ((write_whole, "new"), (append_whole, b"new")):
        with pytest.raises(JarmError, match="make room"):
            write(path, data)
    assert path.read_text() == "old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "folder"]


def test_a_lock_is_asked_about_without_making_one(tmp_path):
    assert not is_claimed(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with claim(tmp_path):
        assert is_claimed(tmp_path)
    assert not is_claimed(tmp_path)


def test_a_sealed_line_is_known_by_its_checksum():
    line = sealed({"a": 1, "b": "ä"})
    assert json.loads(line) == {"a": 1, "b": "ä", "line": json.loads(line)["line"]}
    assert is_sealed(line[:-1]) is True
    assert is_sealed(line[:-1].replace(b"1", b"2", 1)) is False
    assert is_sealed(b'{"a": 1}') is None
