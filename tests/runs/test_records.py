"""A folder of records: cut anywhere it goes on, damaged it says where, and a refused one stays as it is."""

import itertools
import json
import os
import pathlib
import re
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from jarm import JarmError
from jarm.cli import main
from jarm.core.files import plain, sealed
from jarm.runs.progress import sweep_status
from jarm.runs.records import GROWING, RecordFolder, fingerprint, provenance

pytestmark = pytest.mark.core

ROUNDS = 2


def run(rule, seed, rounds=ROUNDS):
    return [{"kind": "run", "rule": rule, "seed": seed, "round": t, "nll": 0.5} for t in range(rounds + 1)]


REFERENCE = {"kind": "reference", "rule": "oracle", "spearman": 1.0}
FAILED = {"kind": "failed", "rule": "badge", "seed": 1, "message": "diverged"}


def opened(path, settings=None, rounds=ROUNDS):
    return RecordFolder.open(path, {"batch": 5} if settings is None else settings, rounds)


def holding(path, *runs):
    """A folder with these runs in it."""
    with opened(path) as folder:
        for records in runs:
            folder.append(records)
    return path / "records.jsonl"


def test_cut_at_any_byte_keeps_whole_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of times, and of no effect on what is seen here
    runs = [[REFERENCE], run("random", 0), [FAILED], run("badge", 0)]
    file = holding(tmp_path, *runs)
    text = file.read_bytes()
    ends = [end + 1 for end, byte in enumerate(text) if byte == ord("\n")]
    run_ends = [ends[n - 1] for n in itertools.accumulate(len(records) for records in runs)]
    for at in range(len(text) + 1):
        file.write_bytes(text[:at])
        whole = sum(end <= at for end in run_ends)
        kept = [record for records in runs[:whole] for record in records]
        with opened(tmp_path) as folder:
            assert folder.read() == kept
            assert folder.done == {(r["rule"], r["seed"]) for r in kept if r["kind"] != "reference"}
            assert file.read_bytes()[-1:] in (b"", b"\n")
            for records in runs[whole:]:
                folder.append(records)
        assert file.read_bytes() == text


def test_a_hole_in_a_run_drops_it_and_a_line_twice_is_one(tmp_path):
    first, second, third = run("random", 0)
    file = holding(tmp_path, [first, third], run("random", 1), run("random", 1), [second, first, second])
    with opened(tmp_path) as folder:
        assert folder.done == {("random", 0), ("random", 1)}
        assert folder.read() == [first, third, *run("random", 1), second]
    file.write_text(json.dumps(first) + "\n" + json.dumps(third) + "\n")
    with opened(tmp_path) as folder:
        assert folder.done == set()
        assert folder.read() == []


def test_a_whole_file_is_not_touched(tmp_path):
    file = holding(tmp_path, [REFERENCE], run("random", 0))
    before = file.stat()
    opened(tmp_path).close()
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"",
        b"123",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe\x00",
        b'{"kind": "run"}',
        b'{"kind": "walk", "rule": "random", "seed": 0, "round": 0}',
        b'{"kind": ["run"], "rule": "random", "seed": 0, "round": 0}',
        b'{"kind": "run", "rule": 1, "seed": 0, "round": 0}',
        b'{"kind": "run", "rule": ["random"], "seed": 0, "round": 0}',
        b'{"kind": "run", "rule": "random", "seed": 0}',
        b'{"kind": "run", "rule": "random", "seed": "0", "round": 0}',
        b'{"kind": "run", "rule": "random", "seed": true, "round": 0}',
        b'{"kind": "run", "rule": "random", "seed": 0, "round": 0.0}',
        b'{"kind": "run", "rule": "random", "seed": 0, "round": 3}',
        b'{"kind": "run", "rule": "random", "seed": 0, "round": -1}',
        b'{"kind": "failed", "rule": "random"}',
        b'{"kind": "failed", "rule": "random", "seed": []}',
        b'{"kind": "reference"}',
        b'{"kind": "reference", "rule": "oracle", "seed": {}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_named_and_nothing_changes(tmp_path, line):
    file = holding(tmp_path, [REFERENCE], run("random", 0))
    text = file.read_bytes()
    damaged = text[: text.index(b"\n") + 1] + line + b"\n" + text[text.index(b"\n") + 1 :] + b'{"kind": "ru'
    file.write_bytes(damaged)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(JarmError, match=r"Line 2 of .*records\.jsonl is not a record: remove that line"):
        opened(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    file.write_bytes(text)
    opened(tmp_path).close()  # the lock was let go


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nll": "0.5"}, "nll is '0.5', not a finite number"),
        ({"nll": [0.5]}, r"nll is \[0.5\], not a finite number"),
        ({"nll": 10**400}, "is not a record"),
        ({"nll": float("nan")}, "is not a record"),
        ({"labels": {}}, r"labels is \{\}"),
        ({"message": 5}, "message is 5, not a text"),
        ({"versions": ["0.1"]}, "versions is .*, not an object"),
        ({"versions": {"jarm": 1}}, "versions.jarm is 1, not a text"),
        ({"noise": [1]}, r"noise is \[1\], not a finite number"),
        ({"a": [[[[[]]]]]}, "a is "),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_line(tmp_path, change, said):
    file = holding(tmp_path, run("random", 0))
    lines = file.read_text().splitlines(keepends=True)
    for line in (json.dumps(run("random", 0)[1] | change) + "\n", sealed(run("random", 0)[1] | change).decode()):
        file.write_text("".join([json.dumps(run("random", 0)[0]) + "\n", line, *lines[2:]]))
        before = file.read_bytes()
        with pytest.raises(JarmError, match=rf"Line 2 of .*records\.jsonl.* {said}.*: remove that line, and") as error:
            RecordFolder.open(tmp_path, {"batch": 5}, ROUNDS, ("noise",))
        assert "\n" not in str(error.value)
        assert file.read_bytes() == before


def test_every_flipped_byte_of_a_record_is_found(tmp_path):
    file = holding(tmp_path, [REFERENCE], run("random", 0), [FAILED])
    text = file.read_bytes()
    for at in range(len(text) - 1):
        flipped = text[:at] + bytes([text[at] ^ 4]) + text[at + 1 :]
        file.write_bytes(flipped)
        with pytest.raises(JarmError, match=rf"^Line {text[:at].count(10) + 1} of .*: remove that line"):
            opened(tmp_path)
        assert file.read_bytes() == flipped


def test_a_folder_without_checksums_goes_on_and_gets_them_for_new_lines(tmp_path):
    opened(tmp_path).close()
    old = "".join(json.dumps(each) + "\n" for each in [REFERENCE, *run("random", 0)])
    (tmp_path / "records.jsonl").write_text(old)
    with opened(tmp_path) as folder:
        assert folder.read() == [REFERENCE, *run("random", 0)]
        folder.append(run("random", 1))
    text = (tmp_path / "records.jsonl").read_text()
    assert text.startswith(old)
    assert len(re.findall(r', "line": "[0-9a-f]{8}"\}\n', text)) == ROUNDS + 1
    with opened(tmp_path) as folder:
        assert folder.read() == [REFERENCE, *run("random", 0), *run("random", 1)]
    changed = text.replace('"seed": 1, "round": 1, "nll": 0.5', '"seed": 1, "round": 1, "nll": 0.6')
    (tmp_path / "records.jsonl").write_text(changed)
    with pytest.raises(JarmError, match=r"Line 6 of .* is damaged, as its checksum shows: remove that line"):
        opened(tmp_path)


def test_records_that_are_gone_though_they_were_summarised_are_missed(tmp_path):
    file = holding(tmp_path, run("random", 0))
    (tmp_path / "summary.json").write_text("{}")
    content = file.read_bytes()
    for lose in (lambda: file.write_bytes(b""), file.unlink):
        lose()
        with pytest.raises(JarmError, match=r"records\.jsonl is empty or not there.*: copy it here again"):
            opened(tmp_path)
    file.write_bytes(content)
    opened(tmp_path).close()


@pytest.mark.parametrize("name", ["x" * 5000, "y/" * 3000 + "z", "a\0b"], ids=["long", "deep", "null"])
def test_a_name_that_no_file_can_have_is_a_sentence(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    for args in ("sweep status", "sweep", "plan", "store info", "compare --embeddings e.npy --target score --data"):
        assert main([*args.split(), name]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(JarmError, match="cannot be used"):
        opened(pathlib.Path(name))
    assert list(tmp_path.iterdir()) == []


def test_runs_that_lost_lines_in_the_middle_are_listed(tmp_path):
    file = holding(tmp_path, run("random", 0), run("random", 1), run("random", 2))
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:1] + lines[2:7]))
    with opened(tmp_path) as folder:
        assert folder.done == {("random", 1)}
        assert folder.broken == [("random", 0)]  # the last is as a kill leaves it


@pytest.mark.parametrize("name", ["records.jsonl", "config.json", ".lock"])
def test_no_link_in_a_folder_of_records_is_written_through(tmp_path, name):
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    holding(out, run("random", 0))
    (out / name).rename(theirs)
    content = theirs.read_bytes()
    for make in (lambda: (out / name).symlink_to(theirs), lambda: os.mkfifo(out / name)):
        make()
        with pytest.raises(JarmError, match=re.escape(name) + " is (a link|no plain file)"):
            opened(out)
        (out / name).unlink()
        assert theirs.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("progress.json", "", "progress.json is not JSON"),
        ("progress.json", "[]", r"the content is \[\], not an object"),
        ("progress.json", '{"runs": "8"}', "runs is '8', not a whole number"),
        ("progress.json", '{"runs": -8}', "runs is -8"),
        ("progress.json", "[" * 100_000, "more than 64 lists"),
        ("config.json", '{"axes": 5}', "axes is 5, not a list"),
        ("config.json", '{"axes": [["a"]]}', r"axes\[0\] is \['a'\], not a text"),
        ("config.json", '{"axes": [], "axes": []}', "the key 'axes' occurs twice"),
        ("records.jsonl", '{"kind": "run"}\n', "Line 1 of .* is not a record"),
        ("records.jsonl", '{"kind": "run", "rule": "a", "seed": 0, "round": 0, "rounds": "2"}\n', "Line 1 of"),
        ("records.jsonl", "[]\n", "Line 1 of .* is not a record"),
    ],
)
def test_the_status_of_a_damaged_sweep_is_a_sentence(tmp_path, name, content, said):
    (tmp_path / "progress.json").write_text('{"runs": 8}')
    (tmp_path / "config.json").write_text('{"axes": []}')
    before = {path.name for path in tmp_path.iterdir()}
    assert sweep_status(tmp_path)["runs"] == 8
    assert {path.name for path in tmp_path.iterdir()} == before
    (tmp_path / name).write_text(content)
    with pytest.raises(JarmError, match=said) as error:
        sweep_status(tmp_path)
    assert "\n" not in str(error.value)


def test_settings_of_the_wrong_kind_get_a_sentence(tmp_path):
    for config in ('{"axes": 5, "named": {}}', '{"axes": [1], "named": {}}', '{"axes": [], "named": {"a": 1}}'):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(JarmError, match=r"config\.json: (axes|named).* not .*: put it right"):
            opened(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"batch": "x" * 100_000}))
    with pytest.raises(JarmError, match=r"other settings \(batch 'x+\.\.\. there, 5 here\)") as error:
        opened(tmp_path)
    assert len(str(error.value)) < 1000


def test_settings_of_an_earlier_version_stay_where_a_line_is_damaged(tmp_path):
    file = holding(tmp_path, run("random", 0))
    text = file.read_bytes()
    file.write_bytes(text + b"nonsense\n")
    (tmp_path / "config.json").write_text('{"pool": 5}')
    with pytest.raises(JarmError, match="Line 4"):
        opened(tmp_path, {"candidates": 5})
    assert (tmp_path / "config.json").read_text() == '{"pool": 5}'
    file.write_bytes(text)
    opened(tmp_path, {"candidates": 5}).close()
    assert json.loads((tmp_path / "config.json").read_text()) == {"candidates": 5}


@pytest.mark.parametrize("config", [b"[]", b"", b"7", b"null", b'{"batch"', b"\xff\xff", b"[" * 100_000])
def test_damaged_settings_get_a_sentence_and_nothing_changes(tmp_path, config):
    holding(tmp_path, run("random", 0))
    (tmp_path / "config.json").write_bytes(config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(JarmError, match=r"config\.json does not hold the settings") as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_records_without_settings_and_a_file_in_the_way_get_a_sentence(tmp_path):
    holding(tmp_path / "a", run("random", 0))
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(JarmError, match=r"without a config\.json"):
        opened(tmp_path / "a")
    (tmp_path / "b").write_text("")
    with pytest.raises(JarmError, match=r"b is a file, where a folder is wanted: give another --out"):
        opened(tmp_path / "b")


def test_other_settings_are_refused(tmp_path):
    opened(tmp_path).close()
    with pytest.raises(JarmError, match="batch 5 there, 6 here"):
        opened(tmp_path, {"batch": 6})
    with pytest.raises(JarmError, match="rule None there, 'x' here"):
        opened(tmp_path, {"batch": 5, "rule": "x"})


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    with opened(tmp_path), pytest.raises(JarmError, match="Another process is writing"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with opened(tmp_path) as folder:
        folder.append(run("random", 0))
        before = (tmp_path / "records.jsonl").read_bytes()
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(JarmError, match="make room"):
            folder.append(run("random", 1))
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_records_of_a_checkout_know_its_commit():
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
    if done.returncode == 0 and (root / ".git").exists():
        assert provenance()["commit"].removesuffix("+changes") == done.stdout.strip()


def test_other_versions_and_commits_are_listed(tmp_path):
    here = {name: provenance()[name] for name in ("versions", "commit")}
    old = {"versions": {**here["versions"], "jarm": "0.0.1"}, "commit": "0123456789ab"}
    unknown = {"versions": {**here["versions"], "jarm": "0.0.2"}, "commit": None}
    other_jax = {"versions": {**here["versions"], "jax": "0.1"}, "commit": here["commit"]}

    def by(records, made):
        return [{**record, **made} for record in records]

    holding(tmp_path, by([REFERENCE], here), by(run("random", 0), here), by(run("random", 1), other_jax))
    with opened(tmp_path) as folder:
        assert folder.others == []
        folder.append(by(run("badge", 0), unknown))
        folder.append(by(run("badge", 2), old))
        folder.append(by(run("badge", 3)[:1], {**old, "commit": "half a run"}))
        folder.append([FAILED])  # by nobody knows whom
    with opened(tmp_path) as folder:
        assert folder.others == ["jarm 0.0.1, commit 0123456789ab", "jarm 0.0.2"]


def test_records_are_plain_json():
    assert plain(np.float32("nan")) is None
    assert plain(np.int32(3)) == 3
    assert plain(jnp.float32(0.5)) == 0.5
    assert plain(float("inf")) is None


def test_a_fingerprint_is_of_the_values_and_not_of_their_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


def test_files_of_somebody_else_are_not_written_over(tmp_path):
    (tmp_path / "summary.md").write_text("mine")
    with pytest.raises(JarmError, match=r"summary.md stands there without a config.json"):
        RecordFolder.open(tmp_path, {}, rounds=0)
    assert (tmp_path / "summary.md").read_text() == "mine"


def test_a_folder_of_an_earlier_version_goes_on_with_the_new_names_of_its_options(tmp_path):
    """As written when `candidates` was `pool` and `prior_weight` was `prior`: setting, axis, options behind a name."""
    named = {"size=one": {"pool": 100}, "size=two": {"pool": 200}}
    config = {"noise": 2.0, "pool": 5000, "axes": ["prior", "size"], "named": named}
    line = {"prior": 0.1, "size": "one", "rounds": 1, "rule": "random", "seed": 0}
    old = [REFERENCE, *({"kind": "run", **line, "round": t} for t in (0, 1)), {"kind": "failed", **line, "size": "two"}]
    old[-1] |= {"message": "diverged"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "progress.json").write_text('{"runs": 8, "compiled": 1}')
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(each) + "\n" for each in old))
    before = sweep_status(tmp_path)
    assert (before["done"], before["failed"]) == (2, 1)
    settings = {"noise": 2.0, "candidates": 5000, "axes": ["prior_weight", "size"]}
    settings["named"] = {name: {"candidates": options["pool"]} for name, options in named.items()}
    with RecordFolder.open(tmp_path, settings, ROUNDS, ("prior_weight", "size"), GROWING) as folder:
        assert folder.done == {("random", 0, 0.1, "one"), ("random", 0, 0.1, "two")}
        assert [each.get("prior_weight") for each in folder.read()] == [None, 0.1, 0.1, 0.1]
        assert not any("prior" in each for each in folder.read())
    assert json.loads((tmp_path / "config.json").read_text()) == settings
    assert sweep_status(tmp_path) == before
    settings["named"]["size=one"] = {"candidates": 300}
    with pytest.raises(JarmError, match=r"size=one {'candidates': 100} there, {'candidates': 300} here"):
        RecordFolder.open(tmp_path, settings, ROUNDS, ("prior_weight", "size"), GROWING)
