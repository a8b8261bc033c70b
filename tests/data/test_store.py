"""A store of embeddings: cut, killed, full or flipped anywhere, no committed row is lost, and damage is named."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib

import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
from hypothesis import given, settings
from marks import sampled

import jarm
from jarm import JarmError
from jarm.cli import main
from jarm.data import writer as writing
from jarm.data.journal import DTYPES, Rows, encode_rows, read_journal, read_meta
from jarm.data.store import Damage, EmbeddingStore, fill, key_of
from jarm.data.writer import StoreWriter

D = 4
MADE_BY = {"model": "tiny", "layer": -1, "template": "{prompt}\n\n{response}"}
ROOT = pathlib.Path(__file__).parents[2]


def writer(path, made_by=MADE_BY, dtype="float32", width=D, rows_per_shard=10):
    return StoreWriter(path, width, made_by, dtype=dtype, shard_bytes=rows_per_shard * width * DTYPES[dtype].itemsize)


def text(n):
    return f"text {n}"


def keys(*numbers):
    return [key_of(text(n)) for n in numbers]


def values(*numbers):
    """What the model would say of these texts."""
    return np.stack([np.random.default_rng(n).normal(size=D) for n in numbers]).astype(np.float32)


def add(store, *numbers):
    return store.append(keys(*numbers), values(*numbers))


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def holds(path, *numbers):
    store = EmbeddingStore(path)
    assert store.keys == keys(*numbers)
    assert store.verify() == []
    if numbers:
        np.testing.assert_array_equal(store.rows(keys(*numbers)), values(*numbers))
    return True


# Reading


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_what_is_written_is_read(tmp_path, dtype):
    with writer(tmp_path, dtype=dtype) as store:
        assert [add(store, *range(7)), add(store, *range(7, 35))] == [7, 28]
        assert len(store) == 35
        assert key_of(text(3)) in store
    store, expected = EmbeddingStore(tmp_path), values(*range(35)).astype(DTYPES[dtype])
    assert (store.shape, store.dtype, store.ndim, store.shards) == ((35, D), DTYPES[dtype], 2, 4)
    indices = np.random.default_rng(0).integers(-35, 35, (3, 40))
    for index in (3, -1, np.int32(11), indices, [[34]], slice(None), slice(2, 5), slice(8, 22), slice(30, 2, -3)):
        np.testing.assert_array_equal(store[index], expected[index])
    assert store[[]].shape == (0, D)
    np.testing.assert_array_equal(store.indices(keys(34, 99, 0)), [34, -1, 0])
    assert len(list(store)) == 35


def test_a_slice_of_one_shard_is_a_view_and_goes_to_the_device_without_a_copy(tmp_path):
    for dtype in DTYPES:
        with writer(tmp_path / dtype, dtype=dtype, width=64, rows_per_shard=100) as store:
            store.append(keys(*range(40)), np.ones((40, 64)))
        shard = EmbeddingStore(tmp_path / dtype)[:]
        assert isinstance(shard, np.memmap)
        assert jax.device_put(shard).unsafe_buffer_pointer() == shard.ctypes.data


def test_a_bad_index_is_an_index_error_and_a_missing_key_is_named(tmp_path):
    with writer(tmp_path) as store:
        add(store, 0, 1)
    store = EmbeddingStore(tmp_path)
    for index in (2, -3, [0, 2], 0.5, [True, False]):
        with pytest.raises(IndexError):
            store[index]
    with pytest.raises(JarmError, match=f"lacks 2 of 3 keys, the first of them '{key_of(text(7))}'"):
        store.rows(keys(1, 7, 8))


def test_an_empty_store_is_a_store(tmp_path):
    writer(tmp_path).close()
    store = EmbeddingStore(tmp_path)
    assert (len(store), store.shards, store.verify(), store[:].shape) == (0, 0, [], (0, D))


def test_a_reader_sees_what_was_committed_when_it_opened(tmp_path):
    with writer(tmp_path) as store:
        add(store, *range(5))
        reader = EmbeddingStore(tmp_path)
        add(store, *range(5, 25))
        np.testing.assert_array_equal(reader[:], values(*range(5)))
        assert holds(tmp_path, *range(25))


def test_shards_are_opened_when_needed(tmp_path):
    with writer(tmp_path) as store:
        add(store, *range(35))
    (tmp_path / "shard-00001.bin").unlink()
    store = EmbeddingStore(tmp_path)
    np.testing.assert_array_equal(store[[34, 3]], values(34, 3))
    with pytest.raises(JarmError, match=r"shard-00001\.bin holds 0 of the 160 bytes"):
        store[12]


def test_the_documented_reader_reads(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/store.md").read_text(), re.DOTALL)
    scope = {}
    exec(block, scope)
    for dtype in DTYPES:
        with writer(tmp_path / dtype, dtype=dtype) as store:
            add(store, *range(25))
        with (tmp_path / dtype / "journal.jsonl").open("ab") as file:
            file.write(b'{"start": 25, "ke')
        shards, row_of = scope["read"](tmp_path / dtype)
        np.testing.assert_array_equal(np.concatenate(shards), values(*range(25)).astype(DTYPES[dtype]))
        assert row_of[scope["key_of"](text(24))] == 24


# Writing


@settings(max_examples=30)
@given(st.lists(st.tuples(st.lists(st.integers(0, 30), max_size=25), st.booleans()), max_size=5), st.integers(1, 12))
def test_any_appends_are_a_dictionary_in_the_order_of_arrival(appends, rows_per_shard):
    with tempfile.TemporaryDirectory() as folder:
        path, seen = pathlib.Path(folder), {}
        store = writer(path, rows_per_shard=rows_per_shard)
        for numbers, reopen in appends:
            before = len(seen)
            seen.update(dict.fromkeys(numbers))
            fresh = store.append(keys(*numbers), values(*numbers) if numbers else np.zeros((0, D)))
            assert fresh == len(seen) - before
            if reopen:
                store.close()
                store = writer(path, rows_per_shard=5)  # the store keeps its own
        store.close()
        assert holds(path, *seen)
        assert {f.stat().st_size for f in path.glob("shard-*.bin")} <= {n * D * 4 for n in range(rows_per_shard + 1)}


def test_a_store_made_otherwise_is_refused_and_stays(tmp_path):
    with writer(tmp_path) as store:
        add(store, *range(5))
    before = files(tmp_path)
    for other, said in (
        ({"made_by": {**MADE_BY, "model": "large"}}, "model 'tiny' there, 'large' here"),
        ({"made_by": {**MADE_BY, "prefix": "query: "}}, "prefix None there, 'query: ' here"),
        ({"made_by": {"model": "tiny", "layer": -1}}, r"template '\{prompt\}.*' there, None here"),
        ({"dtype": "bfloat16"}, "dtype 'float32' there, 'bfloat16' here"),
        ({"width": 8}, "width 4 there, 8 here"),
    ):
        with pytest.raises(JarmError, match=said):
            writer(tmp_path, **other)
        assert files(tmp_path) == before
    with pytest.raises(JarmError, match=r"no dtype 'floot16' \(did you mean 'float16'\?\)"):
        StoreWriter(tmp_path, D, MADE_BY, dtype="floot16")
    with pytest.raises(JarmError, match="rows 0 wide holds nothing"):
        StoreWriter(tmp_path, 0, MADE_BY)


def test_one_writer_at_a_time(tmp_path):
    with writer(tmp_path) as store:
        with pytest.raises(JarmError, match="Another process is writing"):
            writer(tmp_path)
        add(store, 0)
    with writer(tmp_path) as store:
        add(store, 1)
    assert holds(tmp_path, 0, 1)


@pytest.mark.parametrize(
    ("dtype", "bad", "said"),
    [
        ("float16", 7e4, r"overflow float16 in row 1 of a batch: make a store of bfloat16"),
        ("bfloat16", 3.4e38, "overflow bfloat16 in row 1"),
        ("bfloat16", np.nan, "NaN or infinite in row 1 of a batch"),
        ("bfloat16", -np.inf, "NaN or infinite in row 1"),
        ("float32", np.nan, "NaN or infinite in row 1"),
    ],
)
def test_what_is_not_finite_is_refused(tmp_path, dtype, bad, said):
    rows = np.zeros((3, D), np.float32)
    rows[1, 2] = bad
    with writer(tmp_path, dtype=dtype) as store:
        with pytest.raises(JarmError, match=said):
            store.append(keys(0, 1, 2), rows)
        assert len(store) == 0


def test_keys_and_rows_have_to_fit(tmp_path):
    with writer(tmp_path) as store:
        for rows in (np.zeros((2, D)), np.zeros((1, D + 1)), np.zeros(D)):
            with pytest.raises(JarmError, match=r"1 keys and rows of shape .*: give it rows of shape \(1, 4\)"):
                store.append(keys(0), rows)
        for key in ("text 0", key_of("a").upper(), key_of("a") + "0"):
            with pytest.raises(JarmError, match="is no key of a store: make it with key_of"):
                store.append([key], np.zeros((1, D)))
        assert len(store) == 0


# Cut, killed, full, flipped


def in_batches(path):
    """A store of four appends in shards of six rows, and its files after each."""
    batches = [range(0, 3), range(3, 9), range(9, 14), range(14, 16)]
    states = []
    with writer(path, rows_per_shard=6) as store:
        states.append(files(path))
        for batch in batches:
            add(store, *batch)
            states.append(files(path))
    return batches, states


def put(path, content):
    """Make a folder hold these files and no others."""
    for file in path.iterdir():
        if file.name not in content:
            file.unlink()
    for name, data in content.items():
        (path / name).write_bytes(data)


@pytest.mark.parametrize("step", sampled([2, 7], 7))
def test_killed_while_a_line_was_written_a_journal_keeps_its_whole_lines_and_goes_on(tmp_path, monkeypatch, step):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of times, and of no effect on what is seen here
    batches, states = in_batches(tmp_path)
    journal = states[-1]["journal.jsonl"]
    for batch, before, after in zip(batches, states[:-1], states[1:], strict=True):
        start, stop = len(before["journal.jsonl"]), len(after["journal.jsonl"])
        for at in sorted({*range(start, stop + 1, step), stop - 1, stop}):
            written = encode_rows(Rows(batch.start, batch.stop))
            put(tmp_path, after | {"journal.jsonl": journal[:at], "rows.json": written})
            rows = sum(len(json.loads(line)["keys"]) for line in journal[:at].split(b"\n")[:-1])
            assert holds(tmp_path, *range(rows))
            assert EmbeddingStore(tmp_path).uncommitted == (batch.stop - rows) * D * 4
            with writer(tmp_path) as store:
                assert len(store) == rows
                assert (tmp_path / "journal.jsonl").read_bytes() == journal[: journal.rfind(b"\n", 0, at) + 1]
                assert sum(f.stat().st_size for f in tmp_path.glob("shard-*.bin")) == rows * D * 4
                for each in batches if at % 3 == 0 or at == stop else ():
                    add(store, *each)
                rows = len(store)
            assert holds(tmp_path, *range(rows))
            if rows == 16:
                shards = {name: data for name, data in files(tmp_path).items() if name[0] == "s"}
                assert shards == {name: data for name, data in states[-1].items() if name[0] == "s"}


def refused(path, *said):
    """Whether reading and writing refuse a store, in one sentence, and change nothing."""
    before = files(path)
    for attempt in (EmbeddingStore, writer):
        with pytest.raises(JarmError, match=".*".join(said)) as error:
            attempt(path)
        assert "\n" not in str(error.value)
    return files(path) == before


@pytest.mark.parametrize("number", range(1, 5))
def test_a_journal_shorter_than_what_was_committed_is_damage(tmp_path, number):
    _, states = in_batches(tmp_path)
    put(tmp_path, states[number])
    journal = states[number]["journal.jsonl"]
    for at in {*range(0, len(journal), 37), *(len(state["journal.jsonl"]) for state in states[:number])}:
        (tmp_path / "journal.jsonl").write_bytes(journal[:at])
        assert refused(tmp_path, "journal.jsonl has the lines of .* rows where .* were committed", "jarm store cut")


def test_a_store_without_rows_json_has_no_bytes_behind_its_journal(tmp_path):
    _, states = in_batches(tmp_path)
    (tmp_path / "rows.json").unlink()
    assert holds(tmp_path, *range(16))
    for number in range(4):
        (tmp_path / "journal.jsonl").write_bytes(states[number]["journal.jsonl"])
        rows = (0, 3, 9, 14)[number]
        assert refused(tmp_path, f"has the lines of {rows} rows and shard-0000..bin has .* bytes behind them")
    put(tmp_path, {name: data for name, data in states[-1].items() if name != "rows.json"})
    writer(tmp_path).close()
    assert holds(tmp_path, *range(16))
    (tmp_path / "journal.jsonl").write_bytes(b"")
    assert refused(tmp_path, "has the lines of 0 rows where 16 were committed")


def test_files_of_the_user_that_are_named_as_shards_stay_and_are_not_written_over(tmp_path):
    with writer(tmp_path) as store:
        add(store, *range(5))
    theirs = {"shard-mine.bin": b"a", "shard-1.bin": b"b", "shard-00007.bin": b"c", "shard-00001.bin": b"d" * 999}
    put(tmp_path, files(tmp_path) | theirs)
    with writer(tmp_path) as store:
        add(store, 5)
        with pytest.raises(JarmError, match=r"shard-00001\.bin is no part of the store.*: move it away"):
            add(store, *range(6, 25))
        add(store, *range(6, 10))
    assert holds(tmp_path, *range(10))
    assert {name: data for name, data in files(tmp_path).items() if name in theirs} == theirs


@pytest.mark.parametrize("name", [".lock", "journal.jsonl", "shard-00000.bin"])
def test_no_link_is_written_through(tmp_path, name):
    """Nor is a pipe, which would be waited for."""
    store, theirs = tmp_path / "store", tmp_path / "theirs"
    with writer(store) as opened:
        add(opened, *range(5))
    (store / name).rename(theirs)
    content = theirs.read_bytes()
    for make in (lambda: (store / name).symlink_to(theirs), lambda: os.mkfifo(store / name)):
        make()
        with pytest.raises(JarmError, match=re.escape(name)), writer(store) as opened:
            add(opened, *range(5, 9))
        (store / name).unlink()
        assert theirs.read_bytes() == content
    theirs.rename(store / name)
    (store / "rows.json").rename(theirs)
    (store / "rows.json").symlink_to(theirs)
    content = theirs.read_bytes()
    with writer(store) as opened:
        add(opened, *range(5, 9))
    assert theirs.read_bytes() == content
    assert not (store / "rows.json").is_symlink()


@pytest.mark.parametrize("name", ["journal.jsonl", "rows.json", "jobs.json", "shard-00000.bin"])
def test_a_folder_with_a_file_of_that_name_gets_no_store(tmp_path, name):
    put(tmp_path, {name: b"mine"})
    with pytest.raises(JarmError, match=r"holds parts of a store without its meta\.json: give another --out"):
        writer(tmp_path)
    assert files(tmp_path) == {name: b"mine", ".lock": b""}


def forged(content):
    """A line of a journal with these entries, and the checksum that it should have."""
    body = json.dumps(content)[:-1]
    return f'{body}, "line": "{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def test_a_line_whose_rows_are_not_there_is_damage_everywhere(tmp_path, capsys):
    with writer(tmp_path / "store") as store:
        add(store, *range(5))
    journal = (tmp_path / "store" / "journal.jsonl").read_bytes()
    for start, rows in ((5, (5, 6)), (5, range(5, 10))):
        line = forged({"start": start, "keys": keys(*rows), "crc": "00000000"})  # the checksum of no bytes
        (tmp_path / "store" / "journal.jsonl").write_bytes(journal + line)
        store = EmbeddingStore(tmp_path / "store")
        assert store.verify() == [Damage("shard-00000.bin", 5, rows[-1])]
        for read, *values_of in (
            (store.info,),
            (store.__getitem__, slice(None)),
            (store.__getitem__, 5),
            (store.rows, keys(0)),
        ):
            with pytest.raises(JarmError, match=rf"shard-00000\.bin holds 80 of the {16 * len(store)} bytes"):
                read(*values_of)
        for name, of in (("x.npy", None), ("x.safetensors", None), ("x.npy", keys(0))):
            with pytest.raises(JarmError, match=r"is damaged in rows 5 to"):
                store.export(tmp_path / name, of)
        assert main(["store", "verify", str(tmp_path / "store")]) == 1
        assert main(["store", "info", str(tmp_path / "store")]) == 1
        assert "written" not in capsys.readouterr().out
        with pytest.raises(JarmError, match=r"shard-00000\.bin holds 80 of"):
            writer(tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize(
    "change",
    [
        {"start": 5.0},
        {"start": True},
        {"start": -1},
        {"start": 4},
        {"start": 10**400},
        {"keys": []},
        {"keys": "0" * 32},
        {"keys": [1]},
        {"keys": {}},
        {"keys": [key_of("text 9")] * 2},
        {"keys": [key_of("text 1")]},
        {"keys": ["../../../../../etc/passwd".ljust(32)]},
        {"keys": [key_of(f"{n}") for n in range(11)]},
        {"crc": 7},
        {"crc": "0x1f"},
        {"crc": None},
        {"crc": "f" * 5000},
    ],
)
def test_a_line_with_its_checksum_that_is_no_commit_is_damage(tmp_path, change):
    with writer(tmp_path) as store:
        add(store, *range(5))
    line = forged({"start": 5, "keys": keys(9), "crc": "00000000"} | change)
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(line)
    assert refused(tmp_path, r"Line 2 of .*journal\.jsonl is damaged", "5 rows with `jarm store cut")


def test_lines_that_are_repeated_lost_or_out_of_order_are_damage(tmp_path):
    _, states = in_batches(tmp_path)
    lines = states[-1]["journal.jsonl"].splitlines(keepends=True)
    for order, at in (
        ([0, 0, *range(1, 6)], 2),
        ([1, 0, *range(2, 6)], 1),
        ([0, *range(2, 6)], 2),
        ([*range(6)] * 2, 7),
    ):
        (tmp_path / "journal.jsonl").write_bytes(b"".join(lines[number] for number in order))
        assert refused(tmp_path, f"Line {at} of .* is damaged")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 0}, "width is 0, not a whole number from 1"),
        ({"width": -4}, "width is -4"),
        ({"width": 4.0}, r"width is 4\.0"),
        ({"width": "4"}, "width is '4'"),
        ({"width": 10**18}, "width is 1000000000000000000"),
        ({"shard_rows": 0}, "shard_rows is 0"),
        ({"dtype": "float64"}, "dtype is 'float64', not one of 'bfloat16', 'float32', 'float16'"),
        ({"dtype": ["float32"]}, "dtype is"),
        ({"made_by": []}, r"made_by is \[\], not an object"),
        ({"jarm": None}, "jarm is null"),
        ({"format": "theirs"}, "format is 'theirs'"),
    ],
)
def test_settings_with_their_checksum_that_describe_no_store_are_named(tmp_path, change, said):
    with writer(tmp_path) as store:
        add(store, *range(5))
    content = json.loads((tmp_path / "meta.json").read_text()) | change
    del content["crc"]
    crc = f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
    (tmp_path / "meta.json").write_text(json.dumps(content | {"crc": crc}))
    assert refused(tmp_path, rf"meta\.json: {said}")


@pytest.mark.parametrize("name", ["meta.json", "rows.json", "journal.jsonl"])
@pytest.mark.parametrize("text", ["", "{", "[" * 900, '{"a":' * 100_000, "null", "[]", "\xff", '{"crc": 1}', "\n"])
def test_nonsense_in_the_place_of_a_file_is_named(tmp_path, name, text):
    with writer(tmp_path) as store:
        add(store, *range(5))
    (tmp_path / name).write_text(text, "latin-1")
    assert refused(tmp_path, re.escape(name))


def test_a_file_of_the_user_in_the_place_of_the_settings_is_said_to_be_that(tmp_path):
    put(tmp_path, {"meta.json": b'{"name": "mine"}'})
    with pytest.raises(JarmError, match=r"meta\.json is not that of an embedding store: give another"):
        writer(tmp_path)
    assert files(tmp_path)["meta.json"] == b'{"name": "mine"}'


def test_what_is_damaged_is_given_up_by_a_command(tmp_path, capsys):
    _, states = in_batches(tmp_path)
    journal = states[-1]["journal.jsonl"]
    lines = journal.splitlines(keepends=True)
    shard = states[-1]["shard-00001.bin"]
    damage = [
        ({"journal.jsonl": journal[:-1]}, 14),
        ({"journal.jsonl": b""}, 0),
        ({"rows.json": b""}, 16),
        ({"journal.jsonl": b"".join([*lines[:2], b"x" + lines[2], *lines[3:]])}, 6),
        ({"shard-00001.bin": shard[:-1]}, 9),
        ({"shard-00001.bin": bytes(4) + shard[4:]}, 6),
        ({"journal.jsonl": journal + forged({"start": 16, "keys": keys(20), "crc": "00000000"})}, 16),
    ]
    for change, rows in damage:
        put(tmp_path, states[-1] | change)
        assert main(["store", "cut", str(tmp_path)]) == 0
        size = sum(len(data) for name, data in files(tmp_path).items() if name[0] == "s")
        put(tmp_path, states[-1] | change)
        given_up = sum(len(data) for name, data in files(tmp_path).items() if name[0] == "s") - size
        assert main(["store", "cut", str(tmp_path)]) == 0
        assert capsys.readouterr().out == f"{rows} rows are kept, and {given_up} bytes behind them given up.\n" * 2
        assert holds(tmp_path, *range(rows))
        with writer(tmp_path) as store:
            add(store, *range(16))
        assert holds(tmp_path, *range(16))


HERE = [str(pathlib.Path(__file__).parents[up]) for up in (0, 1)]
CHILD = """
import sys
sys.path[:0] = {tests!r}
import test_store as t
with t.writer(t.pathlib.Path(sys.argv[1]), rows_per_shard=50) as store:
    for n in range(len(store), 4000, 3):
        t.add(store, *range(n, n + 3))
        print(n + 3, flush=True)
"""


def test_killed_and_resumed_nothing_acknowledged_is_lost(tmp_path):
    command = [sys.executable, "-c", CHILD.format(tests=HERE), str(tmp_path)]
    rows = 0
    for kill in range(4):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(20 + 7 * kill):
            line = child.stdout.readline()
        time.sleep(0.003 * kill)
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate()
        acknowledged = int((line + rest).split("\n")[-2])
        now = len(EmbeddingStore(tmp_path))
        assert now >= acknowledged > rows
        assert holds(tmp_path, *range(now))
        rows = now
    with writer(tmp_path) as store:
        add(store, *range(rows + 10))
    assert holds(tmp_path, *range(rows + 10))


FULL = """
import resource, sys
sys.path[:0] = {tests!r}
import test_store as t
with t.writer(t.pathlib.Path(sys.argv[1]), rows_per_shard=1000) as store:
    t.add(store, *range(20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    try:
        t.add(store, *range(20, 60))
    except t.JarmError as error:
        print(error)
    assert len(store) == 20
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    t.add(store, *range(30, 50))
"""


@pytest.mark.parametrize("limit", [330, 1500])  # within the rows; within their line
def test_no_room_says_so_and_what_was_there_stays(tmp_path, limit):
    command = [sys.executable, "-c", FULL.format(tests=HERE), str(tmp_path), str(limit)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "make room" in said
    assert said.count("\n") == 1
    assert holds(tmp_path, *range(20), *range(30, 50))


def test_rows_are_on_disk_before_their_line_is_written(tmp_path, monkeypatch):
    done, write, sync = [], writing.write_at, os.fsync

    def log(what, number):
        inode = os.fstat(number).st_ino
        done.append((what, next((f.name for f in tmp_path.iterdir() if f.stat().st_ino == inode), "folder")))

    with writer(tmp_path) as store:
        add(store, *range(8))
        monkeypatch.setattr(writing, "write_at", lambda f, *rest: (log("write", f.fileno()), write(f, *rest)))
        monkeypatch.setattr(writing.os, "fsync", lambda number: (log("sync", number), sync(number)))
        add(store, *range(8, 15))
        monkeypatch.undo()
    old, new, journal = "shard-00000.bin", "shard-00001.bin", "journal.jsonl"
    note, late = [("write", "rows.json"), ("sync", "rows.json")], [("write", "rows.json")]
    shards = [("write", old), ("sync", old), ("write", new), ("sync", new), ("sync", "folder")]
    assert done == [*note, *shards, ("write", journal), ("sync", journal), *late]


NO_SPACE = OSError(28, "No space left on device")


# An append into two shards syncs rows.json, the old shard, the new one, its name in the folder if it can, the journal.
@pytest.mark.parametrize(
    ("error", "call"),
    [*((NO_SPACE, call) for call in (0, 1, 2, 4)), *((KeyboardInterrupt(), call) for call in range(5))],
)
def test_a_sync_that_fails_or_is_interrupted_undoes_its_append(tmp_path, monkeypatch, error, call):
    real, calls = os.fsync, []

    def failing(file):
        calls.append(file)
        if len(calls) == call + 1:
            raise error
        real(file)

    with writer(tmp_path) as store:
        add(store, *range(8))
        monkeypatch.setattr(writing.os, "fsync", failing)
        with pytest.raises((JarmError, KeyboardInterrupt)):
            add(store, *range(8, 15))
        assert len(store) == 8
        assert holds(tmp_path, *range(8))
        assert [path.name for path in tmp_path.glob("shard-*.bin")] == ["shard-00000.bin"]
        monkeypatch.setattr(writing.os, "fsync", real)
        add(store, 40, 41)
    assert holds(tmp_path, *range(8), 40, 41)


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(["meta.json", "journal.jsonl", "rows.json", "shard-00000.bin"], "meta.json"))
def test_any_change_of_a_file_is_an_error_or_changes_no_value(tmp_path, monkeypatch, name):
    """Each byte lost, doubled, zeroed or the last: a JarmError or the same rows; a refused folder stays as it is."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    with writer(tmp_path) as store:
        add(store, *range(3))
        add(store, *range(3, 7))
    whole = files(tmp_path)
    data, same = whole[name], 0
    for at in range(len(data)):
        start, end = data[:at], data[at + 1 :]
        for changed in (start + end, start + data[at : at + 1] * 2 + end, start + b"\0" + end, start):
            put(tmp_path, whole | {name: changed})
            before = files(tmp_path)
            try:
                store = EmbeddingStore(tmp_path)
                damage = store.verify()
                read = store[:]
            except JarmError as error:
                assert "\n" not in str(error)  # noqa: PT017
            else:
                same += not damage
                assert damage or np.array_equal(read, values(*range(7)))
            assert files(tmp_path) == before
            try:
                writer(tmp_path).close()
            except JarmError:
                assert files(tmp_path) == before
            else:
                assert name != "journal.jsonl"
                assert EmbeddingStore(tmp_path).keys == keys(*range(7))
    assert same <= 4 * len(data) // 2


def test_every_flipped_byte_of_the_rows_is_found(tmp_path):
    with writer(tmp_path) as store:
        add(store, *range(4))
        add(store, *range(4, 13))
    commits = read_journal(tmp_path, read_meta(tmp_path)).commits
    assert [(commit.start, commit.stop) for commit in commits] == [
        (0, 4),
        (4, 10),
        (10, 13),
    ]
    for number, first, last, base in ((0, 0, 3, 0), (0, 4, 9, 0), (1, 10, 12, 10)):
        path = tmp_path / f"shard-{number:05d}.bin"
        data = path.read_bytes()
        for at in range((first - base) * D * 4, (last + 1 - base) * D * 4):
            path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            assert EmbeddingStore(tmp_path).verify() == [Damage(path.name, first, last)]
        path.write_bytes(data)
    (tmp_path / "shard-00001.bin").unlink()
    assert EmbeddingStore(tmp_path).verify() == [Damage("shard-00001.bin", 10, 12)]


@pytest.mark.parametrize("name", ["journal.jsonl", "meta.json", "rows.json"])
def test_every_flipped_byte_of_what_describes_them_is_refused(tmp_path, name):
    with writer(tmp_path) as store:
        add(store, *range(3))
        add(store, *range(3, 5))
    data = (tmp_path / name).read_bytes()
    for at in range(len(data)):
        flipped = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        (tmp_path / name).write_bytes(flipped)
        before = files(tmp_path)
        for attempt in (EmbeddingStore, writer):
            with pytest.raises(JarmError, match=r"is damaged, as its checksum|has version"):
                attempt(tmp_path)
        assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["meta.json", "journal.jsonl", "shard-00000.bin"])
def test_a_file_that_is_gone_or_cut_is_named_and_nothing_changes(tmp_path, name):
    with writer(tmp_path) as store:
        add(store, *range(13))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    before = files(tmp_path)
    with pytest.raises(JarmError, match=re.escape(name)):
        writer(tmp_path)
    with pytest.raises(JarmError, match=re.escape(name)):
        EmbeddingStore(tmp_path)[:]
    assert files(tmp_path) == before
    if name == "shard-00000.bin":
        (tmp_path / name).write_bytes(data[:-1])
        with pytest.raises(JarmError, match="holds 159 of the 160 bytes"):
            writer(tmp_path)
        with pytest.raises(JarmError, match="holds 159 of the 160 bytes"):
            EmbeddingStore(tmp_path)[0]


def test_another_version_of_the_format_is_refused(tmp_path):
    writer(tmp_path).close()
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "version": 2}))
    with pytest.raises(JarmError, match="has version 2 of the store's format where this jarm reads 1"):
        EmbeddingStore(tmp_path)


def test_a_file_in_the_way_gets_a_sentence(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(JarmError, match="a is a file, where a folder is wanted"):
        writer(tmp_path / "a")
    with pytest.raises(JarmError, match="is no embedding store"):
        EmbeddingStore(tmp_path / "a")


# Out of it


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_exports_are_what_others_read(tmp_path, dtype):
    with writer(tmp_path / "store", dtype=dtype) as store:
        add(store, *range(25))
    store, expected = EmbeddingStore(tmp_path / "store"), values(*range(25)).astype(DTYPES[dtype])
    store.export(tmp_path / "x.npy")
    loaded = np.load(tmp_path / "x.npy")
    np.testing.assert_array_equal(loaded.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else loaded, expected)
    np.testing.assert_array_equal(jarm.data.readers.open_npy(tmp_path / "x.npy"), expected)
    assert (tmp_path / "x.keys.txt").read_text().split() == store.keys
    store.export(tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", "flax") as file:
        np.testing.assert_array_equal(np.asarray(file.get_tensor("embeddings")), expected)
        assert [bytes(np.asarray(key)).hex() for key in file.get_tensor("keys")] == store.keys
        assert json.loads(file.metadata()["made_by"]) == MADE_BY


def test_an_export_takes_the_memory_of_one_commit(tmp_path):
    width, rows = 1024, 8192
    with StoreWriter(tmp_path / "store", width, {}, dtype="float32", shard_bytes=1 << 24) as store:
        for start in range(0, rows, 256):
            store.append(keys(*range(start, start + 256)), np.full((256, width), start, np.float32))
    store = EmbeddingStore(tmp_path / "store")
    for name in ("x.npy", "x.safetensors"):
        tracemalloc.start()
        store.export(tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3 << 20 < rows * width * 4 / 8


def test_an_export_stops_at_damage_and_leaves_no_file(tmp_path):
    with writer(tmp_path / "store") as store:
        add(store, *range(25))
    with (tmp_path / "store" / "shard-00001.bin").open("r+b") as file:
        file.write(b"\x07")
    with pytest.raises(JarmError, match=r"shard-00001\.bin is damaged in rows 10 to 19"):
        EmbeddingStore(tmp_path / "store").export(tmp_path / "x.safetensors")
    with pytest.raises(JarmError, match=r"neither \.npy nor \.safetensors"):
        EmbeddingStore(tmp_path / "store").export(tmp_path / "x.bin")
    with pytest.raises(JarmError, match="Cannot write"):
        EmbeddingStore(tmp_path / "store").export(tmp_path / "nowhere" / "x.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_an_export_leaves_a_text_of_the_user_and_the_old_file_where_it_fails(tmp_path):
    with writer(tmp_path / "store") as store:
        add(store, *range(5))
    store = EmbeddingStore(tmp_path / "store")
    (tmp_path / "x.keys.txt").write_text("mine\n")
    with pytest.raises(JarmError, match=r"x\.keys\.txt stands there and may be yours"):
        store.export(tmp_path / "x.npy")
    assert [path.name for path in tmp_path.glob("x.*")] == ["x.keys.txt"]
    store.export(tmp_path / "y.npy", keys(0))
    store.export(tmp_path / "y.npy")  # over a former export
    before = [(tmp_path / name).read_bytes() for name in ("y.npy", "y.keys.txt")]
    with (tmp_path / "store" / "shard-00000.bin").open("r+b") as file:
        file.write(b"\x07")
    with pytest.raises(JarmError, match="is damaged in rows 0 to 4"):
        store.export(tmp_path / "y.npy", keys(3))
    assert [(tmp_path / name).read_bytes() for name in ("y.npy", "y.keys.txt")] == before
    assert sorted(path.name for path in tmp_path.glob("y*")) == ["y.keys.txt", "y.npy"]


def test_the_command_shows_verifies_and_exports(tmp_path, capsys):
    path = tmp_path / "store"
    with writer(path) as store:
        add(store, *range(25))
    assert main(["store", "info", str(path)]) == 0
    assert re.search(r"rows +25\n.*made by model +tiny\n", capsys.readouterr().out, re.DOTALL)
    assert main(["store", "verify", str(path)]) == 0
    assert capsys.readouterr().out == "25 rows are as they were written.\n"
    assert main(["store", "export", str(path), "--out", str(tmp_path / "x.npy")]) == 0
    assert len(np.load(tmp_path / "x.npy")) == 25
    with (path / "shard-00002.bin").open("r+b") as file:
        file.write(b"\x07")
    capsys.readouterr()
    assert main(["store", "verify", str(path)]) == 1
    assert "damaged (shard-00002.bin rows 20 to 24): copy" in capsys.readouterr().err


# Into a table


@pytest.fixture
def table(tmp_path):
    """40 prompts with 3 responses, one text twice; its file, and the text of each row."""
    rows = [
        {"prompt_id": n // 3, "prompt": f"p{n // 3} {{response}}", "response": f"r{n % 3 if n != 2 else 1}", "score": n}
        for n in range(120)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    return tmp_path / "table.parquet", [f"{row['prompt']}\n\n{row['response']}" for row in rows]


def embedded(path, texts, made_by=MADE_BY):
    """A store of these texts, and their rows."""
    rows = np.stack([np.random.default_rng(list(t.encode())).normal(size=D) for t in texts]).astype(np.float32)
    with writer(path, made_by) as store:
        store.append([key_of(t) for t in texts], rows)
    return rows


def test_a_table_loads_from_a_store_as_from_an_array(tmp_path, table):
    path, texts = table
    rows = embedded(tmp_path / "store", texts[::-1])[::-1]
    np.save(tmp_path / "rows.npy", rows)
    sides = (
        jarm.load(path, embeddings=tmp_path / name, target="score", standardise=standardise)
        for standardise in (True, False)
        for name in ("store", "rows.npy")
    )
    for ours, theirs in zip(*[iter(sides)] * 2, strict=True):
        for stored, plain in zip(ours, theirs, strict=True):
            assert isinstance(stored.store, EmbeddingStore)
            np.testing.assert_array_equal(stored.embeddings(), plain.embeddings())
            np.testing.assert_array_equal(stored.embeddings(np.array([3, 1])), plain.embeddings(np.array([3, 1])))
            np.testing.assert_array_equal(stored.gold, plain.gold)
            assert stored.shape == plain.shape
            assert stored.provenance["embedded_by"] == MADE_BY
    assert len(EmbeddingStore(tmp_path / "store")) == 119


def test_provenance_is_of_the_rows_used_and_not_of_what_a_store_has_besides(tmp_path, table):
    path, texts = table

    def printed():
        loaded = jarm.load(path, embeddings=tmp_path / "store", target="score")
        return loaded.train.provenance["embeddings_fingerprint"]

    embedded(tmp_path / "store", texts)
    before = printed()
    embedded(tmp_path / "store", ["more", "still more"])
    assert printed() == before
    (tmp_path / "store").rename(tmp_path / "old")
    embedded(tmp_path / "store", texts, {**MADE_BY, "model": "other"})
    assert printed() != before


def test_what_a_store_lacks_is_named(tmp_path, table):
    path, texts = table
    embedded(tmp_path / "store", [t for n, t in enumerate(texts) if n not in (5, 7)])
    with pytest.raises(
        JarmError, match=r"lacks the texts of 2 of the 120 responses of .*, row 5, row 7: embed the table"
    ):
        jarm.load(path, embeddings=tmp_path / "store", target="score")
    embedded(tmp_path / "named", texts, {"template": "{system}{response}"})
    with pytest.raises(JarmError, match="has no column 'system', of which"):
        jarm.load(path, embeddings=tmp_path / "named", target="score")
    for made_by in ({}, {"template": "chat"}):
        embedded(tmp_path / f"chat{len(made_by)}", texts, made_by)
        with pytest.raises(JarmError, match="does not say how its texts are made"):
            jarm.load(path, embeddings=tmp_path / f"chat{len(made_by)}", target="score")
    rows = pq.read_table(path).to_pylist()
    rows[4]["prompt"] = None
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(JarmError, match="row 4: prompt is missing"):
        jarm.load(path, embeddings=tmp_path / "store", target="score")


def test_braces_in_a_text_are_text():
    assert fill("{a}: {b}", {"a": "{b}", "b": "{a} {c}"}) == "{b}: {a} {c}"


def test_a_key_is_of_the_exact_text():
    assert key_of("test") == "9f86d081884c7d659a2feaa0c55ad015"
    assert len({key_of(t) for t in ("é", "e\u0301", "é ", "É", "\ud800")}) == 5
