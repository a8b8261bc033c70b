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

import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
from hypothesis import given, settings

import jarm
from jarm import JarmError
from jarm.cli import main
from jarm.data import writer as writing
from jarm.data.journal import DTYPES, read_journal, read_meta
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


def test_a_journal_cut_at_any_byte_keeps_its_whole_lines_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of times, and of no effect on what is seen here
    batches = [range(0, 3), range(3, 9), range(9, 14), range(14, 16)]
    with writer(tmp_path, rows_per_shard=6) as store:
        for batch in batches:
            add(store, *batch)
    whole = files(tmp_path)
    journal = whole["journal.jsonl"]
    for at in range(len(journal) + 1):
        (tmp_path / "journal.jsonl").write_bytes(journal[:at])
        rows = sum(len(json.loads(line)["keys"]) for line in journal[:at].split(b"\n")[:-1])
        assert holds(tmp_path, *range(rows))
        with writer(tmp_path) as store:
            assert len(store) == rows
            assert (tmp_path / "journal.jsonl").read_bytes() == journal[: journal.rfind(b"\n", 0, at) + 1]
            assert sum(f.stat().st_size for f in tmp_path.glob("shard-*.bin")) == rows * D * 4
            for batch in batches:
                add(store, *batch)
        assert {name: data for name, data in files(tmp_path).items() if name[0] == "s"} == {
            name: data for name, data in whole.items() if name[0] == "s"
        }
        assert holds(tmp_path, *range(16))


CHILD = """
import sys
sys.path[:0] = [{tests!r}]
import test_store as t
with t.writer(t.pathlib.Path(sys.argv[1]), rows_per_shard=50) as store:
    for n in range(len(store), 4000, 3):
        t.add(store, *range(n, n + 3))
        print(n + 3, flush=True)
"""


def test_killed_and_resumed_nothing_acknowledged_is_lost(tmp_path):
    command = [sys.executable, "-c", CHILD.format(tests=str(pathlib.Path(__file__).parent)), str(tmp_path)]
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
sys.path[:0] = [{tests!r}]
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
    command = [sys.executable, "-c", FULL.format(tests=str(pathlib.Path(__file__).parent)), str(tmp_path), str(limit)]
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
    shards = [("write", old), ("sync", old), ("write", new), ("sync", new), ("sync", "folder")]
    assert done == [*shards, ("write", journal), ("sync", journal)]


NO_SPACE = OSError(28, "No space left on device")


# An append into two shards syncs the old one, the new one, its name in the folder if it can, the journal.
@pytest.mark.parametrize(
    ("error", "call"), [*((NO_SPACE, call) for call in (0, 1, 3)), *((KeyboardInterrupt(), call) for call in range(4))]
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
        monkeypatch.setattr(writing.os, "fsync", real)
        add(store, 40, 41)
    assert holds(tmp_path, *range(8), 40, 41)


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


@pytest.mark.parametrize("name", ["journal.jsonl", "meta.json"])
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
    with pytest.raises(JarmError, match="Cannot write to the store"):
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
