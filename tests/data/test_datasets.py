"""Data in: layouts are read as written, without copies, and each fault is one sentence that names the row."""

import inspect
import json
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable, TrainTest
from jarm.data import readers, standardise, tables, words
from jarm.data.datasets import load, load_published
from jarm.data.standardise import standardised
from jarm.data.tables import load_table, split_by

SETTING = "Gemma2b-sft_Gemma2b_Harmless"
WIDTH = 5


def complaint(call, *args, **kwargs):
    """The message of the error a call raises: one sentence of printable words."""
    with pytest.raises(JarmError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def shares_file(array):
    """Whether an array's memory is that of a memory map."""
    while array is not None:
        if isinstance(array, np.memmap) and array.filename is not None and array.base is not None:
            return True
        array = getattr(array, "base", None)
    return False


# --- the published layout -------------------------------------------------------------------------------------


def publish(directory, setting=SETTING, dtype=np.float32, train=(6, 3), test=(4, 7)):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, (P, R) in (("train", train), ("test", test)):
        arrays[split] = rng.standard_normal((P, R, WIDTH)).astype(dtype), rng.standard_normal((P, R, 1)).astype("f4")
        np.save(directory / f"embd_{setting}_{split}.npy", arrays[split][0])
        np.save(directory / f"reward_{setting}_{split}.npy", arrays[split][1])
    return arrays


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_published_layout_is_read_without_a_copy(tmp_path, dtype):
    arrays = publish(tmp_path, dtype=dtype)
    for split, table in zip(("train", "test"), load(tmp_path, standardise=False), strict=True):
        embeddings, rewards = arrays[split]
        assert table.shape == embeddings.shape
        assert table.store.dtype == dtype
        assert shares_file(table.store)
        assert not table.store.flags.owndata
        assert not table.store.flags.writeable
        np.testing.assert_array_equal(table.embeddings(), embeddings.astype(np.float32))
        np.testing.assert_array_equal(table.gold, rewards[..., 0])
        assert table.provenance["setting"] == SETTING
        assert table.provenance["split"] == split
        assert table.provenance["prompts"] == len(embeddings)


def test_rewards_may_lack_the_last_axis(tmp_path):
    arrays = publish(tmp_path)
    np.save(tmp_path / f"reward_{SETTING}_train.npy", arrays["train"][1][..., 0])
    np.testing.assert_array_equal(load_published(tmp_path).train.gold, arrays["train"][1][..., 0])


def test_several_settings_are_told_apart(tmp_path):
    publish(tmp_path)
    publish(tmp_path, "Gemma2b_Gemma2b_Harmless", train=(2, 3))
    publish(tmp_path, "my_own_gen_Gemma2b_Helpful", train=(3, 3))
    message = complaint(load, tmp_path)
    assert "3 fit" in message
    assert SETTING in message
    assert load(tmp_path, gen="Gemma2b-sft").train.shape[0] == 6
    assert load(tmp_path, gen="Gemma2b").train.shape[0] == 2
    assert load(tmp_path, task="Helpful").train.shape[0] == 3
    assert load(tmp_path, gen="my_own_gen", emb="Gemma2b", task="Helpful").train.shape[0] == 3
    assert "0 fit" in complaint(load, tmp_path, gen="Llama")


def test_published_faults(tmp_path):
    assert "holds no files embd_" in complaint(load, tmp_path)
    assert "is not a folder" in complaint(load_published, tmp_path / "nowhere")
    arrays = publish(tmp_path)

    path = tmp_path / f"reward_{SETTING}_test.npy"
    np.save(path, arrays["test"][1][:-1])
    assert "(3, 7, 1)" in complaint(load, tmp_path)
    rewards = arrays["test"][1].copy()
    rewards[2, 5] = np.nan
    np.save(path, rewards)
    assert "row 19 (prompt 2, response 5)" in complaint(load, tmp_path)
    path.unlink()
    assert f"{path} does not exist" in complaint(load, tmp_path)
    np.save(path, arrays["test"][1])

    path = tmp_path / f"embd_{SETTING}_train.npy"
    embeddings = arrays["train"][0].copy()
    embeddings[[0, 1, 3, 5], 1, 2] = np.inf
    np.save(path, embeddings)
    message = complaint(load, tmp_path)
    assert "row 1 (prompt 0, response 1), row 4 (prompt 1, response 1), row 10" in message
    assert "and 1 more" in message
    assert load(tmp_path, validate=False, standardise=False).train.shape == embeddings.shape
    np.save(path, arrays["train"][0][..., :-1])
    assert "train embeddings are 4 wide" in complaint(load, tmp_path)
    np.save(path, arrays["train"][0][:, 0])
    assert "(prompts, responses, width)" in complaint(load, tmp_path)
    np.save(path, arrays["train"][0][:, :1])
    np.save(tmp_path / f"reward_{SETTING}_train.npy", arrays["train"][1][:, :1])
    assert "every train prompt has one response" in complaint(load, tmp_path)


# --- .npy files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", ["{'descr': '<f4', 'fortran_order': False, 'shape': (-2, 3), }", "{'descr': '<f4', ("]
)
def test_a_damaged_header_of_an_npy_says_so(tmp_path, header):
    path = tmp_path / "e.npy"
    text = header.ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(100))
    assert "not a readable .npy" in complaint(readers.open_npy, path)


@pytest.mark.parametrize(
    ("shape", "descr", "words"),
    [
        ("(4294967296, 4294967296)", "'<f4'", "truncated"),  # the product is 0 in 64 bits
        ("(2147483648, 2147483648, 4)", "'<f4'", "truncated"),
        ("(9223372036854775807,)", "'<f4'", "truncated"),
        (f"({10**400},)", "'<f4'", "truncated"),
        ("(True, 2)", "'<f4'", "not a readable .npy"),
        ("(2.0, 2)", "'<f4'", "not a readable .npy"),
        ("('2', 2)", "'<f4'", "not a readable .npy"),
        ("2", "'<f4'", "not a readable .npy"),
        ("(" + "1, " * 100 + ")", "'<f4'", "cannot be mapped"),
        ("(2, 2)", "'O'", "holds object, not floats"),
        ("(2, 2)", "[('a', '<f4')]", "not floats"),
        ("(2, 2)", "'<f3'", "not a readable .npy"),
        ("(2, 2)", "5", "not a readable .npy"),
        ("(2, 2)", "[" * 900 + "]" * 900, "not a readable .npy"),
        ("(2, 2)", "{1: 2}", "not a readable .npy"),
        ("__import__('os').getcwd()", "'<f4'", "not a readable .npy"),
    ],
)
def test_a_header_that_lies_is_one_sentence(tmp_path, shape, descr, words):
    path = tmp_path / "e.npy"
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(100))
    message = complaint(readers.open_npy, path)
    assert words in message
    assert "\n" not in message


def test_a_big_endian_npy_has_the_same_values(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "e.npy", values.astype(">f4"))
    read = readers.open_npy(tmp_path / "e.npy")
    np.testing.assert_array_equal(np.asarray(read, np.float32), values)
    assert list(readers.nonfinite_rows(read)) == []


@pytest.mark.parametrize("missing", [1, 100, 10**6])
def test_a_truncated_npy_says_so(tmp_path, missing):
    path = tmp_path / "e.npy"
    np.save(path, np.ones((100, 3), np.float32))
    path.write_bytes(path.read_bytes()[: max(0, path.stat().st_size - missing)])
    message = complaint(readers.open_npy, path)
    assert "truncated" in message or "not a readable .npy" in message


def test_every_cut_of_a_small_npy_is_noticed(tmp_path):
    path = tmp_path / "e.npy"
    np.save(path, np.ones((2, 2), np.float32))
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        complaint(readers.open_npy, path)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((3, 2), int), "not floats"),
        (np.array([[None]], object), "not floats"),
        (np.asfortranarray(np.ones((3, 2))), "Fortran"),
        (np.ones((0, 2)), "no rows"),
        (np.float64(1), "no rows"),
    ],
)
def test_arrays_that_are_no_embeddings(tmp_path, array, words):
    np.save(tmp_path / "e.npy", array, allow_pickle=True)
    assert words in complaint(readers.open_npy, tmp_path / "e.npy")


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 5),
    bad=st.sets(st.integers(0, 39), max_size=5),
    scan=st.integers(1, 99),
)
def test_blocks_find_what_the_whole_would(rows, width, bad, scan):
    array = np.zeros((rows, width), np.float32)
    expected = sorted(row for row in bad if row < rows)
    for row in expected:
        array[row, row % width] = np.inf if row % 2 else np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "SCAN_BYTES", scan)
        assert list(readers.nonfinite_rows(array)) == expected


# --- tables ---------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt_id": prompt, "prompt": f"Say {prompt}!", "response": text, "score": score, "split": split}
    for prompt, text, score, split in [
        ("b", "say b", 0.5, "train"),
        ("a", "Hello you", 1.5, "test"),
        ("b", "bee", -1.0, "train"),
        ("a", "say A, a", 2.0, "test"),
        ("c", "alone", 0.0, "train"),
        ("b", "", 3.0, "train"),
    ]
]


def write(tmp_path, rows, kind="jsonl", embeddings=None, name="t"):
    table, array = tmp_path / f"{name}.{kind}", tmp_path / f"{name}.npy"
    if kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), table)
    if embeddings is None:
        embeddings = np.arange(len(rows) * WIDTH, dtype=np.float16).reshape(len(rows), WIDTH)
    np.save(array, embeddings)
    return table, array


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_table_is_grouped_by_prompt_padded_and_masked(tmp_path, kind):
    table, array = write(tmp_path, ROWS, kind)
    train, test = load(table, embeddings=array, target="score", standardise=False)
    np.testing.assert_array_equal(train.rows[train.mask], [0, 2, 5, 4])
    np.testing.assert_array_equal(train.mask, [[True, True, True], [True, False, False]])
    np.testing.assert_array_equal(train.gold, np.float32([[0.5, -1.0, 3.0], [0, 0, 0]]))
    np.testing.assert_array_equal(test.rows[test.mask], [1, 3])
    np.testing.assert_array_equal(test.attributes["length"], [[9, 8, 0]])
    np.testing.assert_array_equal(test.attributes["position"], [[0, 1, 0]])
    # "Say a!" against "Hello you" (nothing) and "say A, a" (say 1, a 2)
    np.testing.assert_allclose(test.attributes["prompt_cosine"], [[0, 3 / np.sqrt(2 * 5), 0]], rtol=1e-6)
    assert all(values.dtype == np.float32 for values in train.attributes.values())
    assert train.store.base is test.store.base or np.shares_memory(train.store, test.store)
    assert shares_file(train.store)
    np.testing.assert_array_equal(train.embeddings()[0, 1], np.arange(10, 15))
    assert not train.embeddings()[1, 1:].any()
    provenance = train.provenance
    assert (provenance["prompts"], provenance["responses"], provenance["target"]) == (2, 4, "score")
    assert provenance["split_by"] == "column split"
    assert provenance["table_bytes"] == table.stat().st_size


def test_parquet_and_jsonl_agree(tmp_path):
    one, two = (
        load(t, embeddings=e, target="score") for t, e in (write(tmp_path, ROWS, k) for k in ("jsonl", "parquet"))
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.rows, b.rows)
        np.testing.assert_array_equal(a.gold, b.gold)
        for name in a.attributes:
            np.testing.assert_array_equal(a.attributes[name], b.attributes[name])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_standardised_embeddings_have_no_mean_and_unit_variance(tmp_path, dtype, monkeypatch):
    """By the training responses, masked ones left out, in chunks, for both sides; a constant dimension becomes 0."""
    rng = np.random.default_rng(0)
    raw = (1000 * rng.normal(size=WIDTH) + rng.normal(size=(len(ROWS), WIDTH)) * np.geomspace(1, 50, WIDTH)).astype(
        dtype
    )
    raw[:, 2] = 7
    paths = write(tmp_path, ROWS, "jsonl", raw)
    monkeypatch.setattr(standardise, "CHUNK", 1)
    train, test = load(paths[0], embeddings=paths[1], target="score")
    own = raw[train.rows[train.mask]].astype(np.float64)
    deviation = np.where(own.std(axis=0) > 0, own.std(axis=0), np.inf)
    for table in (train, test):
        expected = (raw[table.rows[table.mask]].astype(np.float64) - own.mean(axis=0)) / deviation
        np.testing.assert_allclose(table.embeddings()[table.mask], expected, rtol=1e-4, atol=1e-4)
        assert not table.embeddings()[~table.mask].any()
        assert shares_file(table.store)
        assert table.provenance["standardised"]
    again = standardised(TrainTest(train, test)).train
    np.testing.assert_array_equal(again.embeddings(), train.embeddings())


def test_constant_embeddings_and_those_beyond_float32_are_named(tmp_path):
    paths = write(tmp_path, ROWS, "jsonl", np.ones((len(ROWS), WIDTH)))
    assert "Every dimension of the embeddings is constant" in complaint(
        load, paths[0], embeddings=paths[1], target="score"
    )
    huge = np.random.default_rng(0).normal(size=(len(ROWS), WIDTH))
    huge[3, 1] = 1e39
    paths = write(tmp_path, ROWS, "jsonl", huge)
    assert "NaN or infinite in row 3" in complaint(load, paths[0], embeddings=paths[1], target="score")


def test_categories_blank_lines_and_extra_columns_are_fine(tmp_path):
    columns = {name: pa.array([row[name] for row in ROWS]) for name in ROWS[0]}
    columns |= {name: columns[name].dictionary_encode() for name in ("prompt_id", "split")}
    columns["extra"] = pa.array([[1]] * len(ROWS))
    table, array = write(tmp_path, ROWS)
    text = table.read_text().replace("\n", "\n\n").replace('"split"', '"extra": {"x": [1]}, "split"')
    table.write_text(text)
    category = tmp_path / "category.parquet"
    pq.write_table(pa.table(columns), category)
    for path in (table, category):
        assert load_table(path, array, "score").train.shape == (2, 3, WIDTH)


def test_without_scores_there_is_no_gold(tmp_path):
    assert load_table(*write(tmp_path, ROWS)).train.gold is None


def test_without_scores_nothing_is_held_out_unasked(tmp_path):
    rows = [{key: row[key] for key in ("prompt_id",)} for row in ROWS]
    table, array = write(tmp_path, rows)
    for train, test in (load_table(table, array), load(table, embeddings=array)):
        assert (train.mask.sum(), train.provenance["split_by"]) == (len(ROWS), "no test set")
        assert test.shape == (0, *train.shape[1:])
        assert test.embeddings().shape == test.shape
    within = load(table, embeddings=array, metric="within:1")
    assert within.test.embeddings().shape == (0, *within.train.shape[1:])
    train, test = load_table(*write(tmp_path, ROWS))
    assert (train.provenance["split_by"], len(test.rows)) == ("column split", 1)


def test_a_table_of_pairs_is_sent_to_its_reader(tmp_path):
    table, array = write(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 2)
    assert "`jarm.data.pairs.load_pairs`" in complaint(load_table, table, array)


def test_only_the_attributes_that_the_columns_allow(tmp_path):
    rows = [{"prompt_id": i // 2, "score": 1, "side": "train" if i < 4 else "test"} for i in range(8)]
    train, _ = load_table(*write(tmp_path, rows), "score", split="side")
    assert set(train.attributes) == {"position"}
    rows = [{"prompt": row["prompt"], "score": row["score"], "split": row["split"]} for row in ROWS]
    assert load_table(*write(tmp_path, rows), "score").train.mask.sum() == 4


def many(P, R=2):
    return [{"prompt_id": p, "response": str(r), "score": float(r)} for p in range(P) for r in range(R)]


def test_hash_split_depends_on_the_prompt_alone(tmp_path):
    def test_prompts(rows, name):
        train, test = load_table(*write(tmp_path, rows, name=name), "score")
        assert train.provenance["split_by"] == "hash, 25% test"
        return {rows[row]["prompt_id"] for row in test.rows[:, 0]}

    few, all_of_them = test_prompts(many(60), "few"), test_prompts(many(400)[::-1], "all")
    assert few == {prompt for prompt in all_of_them if prompt < 60}
    assert len(all_of_them) / 400 == pytest.approx(tables.TEST_SHARE, abs=0.06)


def changed(row, **values):
    return [{**record, **values} if at == row else record for at, record in enumerate(ROWS)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("rows", "target", "words"),
    [
        (ROWS, "scores", "no column 'scores' (did you mean 'score'?); columns of numbers are score"),
        (ROWS, "response", "column 'response' holds"),
        (changed(3, score=None), "score", "missing, NaN or infinite in row 3;"),
        (changed(3, score=float("nan")), "score", "in row 3;"),
        (changed(3, score=1e300), "score", "score is beyond the numbers of float32 (3.4e38) in row 3:"),
        (changed(2, prompt_id=None), "score", "row 2: prompt_id is missing"),
        (changed(2, split="dev"), "score", "row 2: split is 'dev'"),
        (changed(2, split=None), "score", "row 2: split is None"),
        (changed(2, split="test"), "score", "row 2: split is 'test', but"),
        ([{**row, "split": "train"} for row in ROWS], "score", "no test prompts"),
        ([{**row, "split": "test"} for row in ROWS], "score", "no train prompts"),
        (
            [{**row, "prompt_id": str(at)} for at, row in enumerate(ROWS)],
            "score",
            "every train prompt has one response",
        ),
        ([{"score": 1.0}, {"score": 2.0}], "score", "neither a column prompt_id nor prompt"),
        ([{"prompt": [1], "score": 1.0}], "score", "column prompt holds list"),
    ],
)
def test_table_faults(tmp_path, kind, rows, target, words):
    table, array = write(tmp_path, rows, kind)
    assert words in complaint(load, table, embeddings=array, target=target)


def test_embeddings_that_do_not_fit_the_table(tmp_path):
    table, array = write(tmp_path, ROWS, embeddings=np.zeros((5, 2), np.float32))
    assert "has 6 responses" in complaint(load_table, table, array, "score")
    write(tmp_path, ROWS, embeddings=np.zeros((6, 2, 2), np.float32))
    assert "shape (6, 2, 2)" in complaint(load_table, table, array, "score")
    embeddings = np.zeros((6, 2), np.float16)
    embeddings[4, 1] = np.nan
    write(tmp_path, ROWS, embeddings=embeddings)
    assert "in row 4;" in complaint(load_table, table, array, "score")
    assert load_table(table, array, "score", validate=False).train.shape == (2, 3, 2)


def test_truncated_tables(tmp_path):
    table, array = write(tmp_path, ROWS)
    text = table.read_text()
    table.write_text(text[:-20])
    assert f"{table}, line 6, is not JSON" in complaint(load_table, table, array, "score")
    table.write_text(text + "[1]\n")
    assert "line 7" in complaint(load_table, table, array, "score")
    table.write_text(text.replace('"b"', "7", 1))
    assert "'prompt_id' mixes types" in complaint(load_table, table, array, "score")
    table.write_bytes(text.encode().replace(b"Hello", b"H\xe9llo"))
    assert "line 2" in complaint(load_table, table, array, "score")
    table.write_text("")
    assert "holds no rows" in complaint(load_table, table, array, "score")
    table, array = write(tmp_path, ROWS, "parquet")
    whole = table.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        table.write_bytes(whole[:size])
        assert "not a whole Parquet file" in complaint(load_table, table, array, "score")
    table.write_bytes(whole[:4] + bytes(200) + whole[204:])
    assert "not a whole Parquet file" in complaint(load_table, table, array, "score")


def test_load_says_what_is_missing(tmp_path):
    table, array = write(tmp_path, ROWS)
    assert "(`--embeddings`)" in complaint(load, table, target="score")
    assert "does not exist" in complaint(load, tmp_path / "none.jsonl", embeddings=array, target="score")
    assert "does not exist" in complaint(load, table, embeddings=tmp_path / "none.npy", target="score")
    assert "is a folder" in complaint(load, table, embeddings=tmp_path, target="score")
    assert "neither .parquet nor .jsonl" in complaint(load, array, embeddings=array, target="score")
    assert "takes no target" in complaint(load, "synthetic", target="score")
    assert "takes no embeddings or target" in complaint(load, tmp_path, embeddings=array, target="score")
    assert "takes no gen" in complaint(load, table, embeddings=array, target="score", gen="x")
    assert "did you mean 'outliers'?" in complaint(load, "synthetic:outlier")
    assert "no column 'sides'" in complaint(load_table, table, array, "score", split="sides")


@pytest.mark.parametrize("option", ["allow_leakage", "standardise", "validate"])
def test_a_switch_of_load_is_no_text(tmp_path, option):
    """A text such as "no" is true in Python, and so would let leakage pass."""
    table, array = write(tmp_path, ROWS)
    unchecked = inspect.unwrap(load)  # without the checks of types that tests have
    message = complaint(unchecked, table, embeddings=array, target="score", **{option: "no"})
    assert f"`{option}` is 'no': give true or false" in message
    assert "`embeddings` is" in complaint(unchecked, table, embeddings=np.load(array), target="score")


def test_load_synthetic():
    np.testing.assert_array_equal(load("synthetic").train.gold, load("synthetic:default", seed=0).train.gold)
    assert load("synthetic:outliers").train.provenance["outliers"] > 0


# --- words ----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(*[st.none() | st.text("aAbé1 ,.\n", max_size=12)] * 2), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_bag_cosine_against_counting(pairs, rows):
    def counts(text):
        found = "".join(c if c.isalnum() else " " for c in (text or "").lower()).split()
        return {word: found.count(word) for word in found}

    expected = []
    for first, second in pairs:
        a, b = counts(first), counts(second)
        norm = np.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
        expected.append(sum(a[w] * b.get(w, 0) for w in a) / norm if norm else 0.0)
    first, second = (pa.chunked_array([pa.array(side, pa.string())]) for side in zip(*pairs, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "COSINE_ROWS", rows)
        np.testing.assert_allclose(words.bag_cosine(first, second), expected, rtol=1e-6)


def test_split_by_shares_the_store():
    table = ResponseTable(np.ones((6, 2), np.float32), np.arange(6).reshape(3, 2), np.ones((3, 2), bool))
    train, test = split_by(table, np.array([False, True, False]))
    assert train.store is test.store is table.store
    np.testing.assert_array_equal(test.rows, [[2, 3]])
    assert (train.provenance["prompts"], test.provenance["split"]) == (2, "test")


@pytest.mark.parametrize(
    "is_test",
    [[1], [0, 1, 0], [True, False], [[True], [False], [False]], True, [0.0, 1, 0], []],
)
def test_split_by_takes_a_bool_a_prompt_and_nothing_else(is_test):
    table = ResponseTable(np.ones((6, 2), np.float32), np.arange(6).reshape(3, 2), np.ones((3, 2), bool))
    assert "one bool for each of the 3 prompts" in complaint(split_by, table, np.array(is_test))
    train, test = split_by(table, np.array([False, True, False]))
    assert not set(train.rows.ravel()) & set(test.rows.ravel())


def test_examples_of_the_page_on_data_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert examples
    for example in examples:
        exec(example, {})


# --- real data, where it is at hand ----------------------------------------------------------------------------

# The data may not be passed on, so they are not in the repository; `.ci/run` names them where they lie beside it.
SHARED = os.environ.get("JARM_SHARED_DATA")


# Needs data that may not be passed on.
@pytest.mark.skipif(SHARED is None, reason="JARM_SHARED_DATA does not name a folder with alpaca_eval_200x20.parquet")
@pytest.mark.parametrize(("target", "length"), [("golden_logit", 0.65), ("golden_z_lc", 0.28)])
def test_real_embeddings(target, length):
    stem = Path(SHARED) / "alpaca_eval_200x20"
    train, test = load(f"{stem}.parquet", embeddings=f"{stem}_minilm_mean.npy", target=target, standardise=False)
    assert train.shape == (150, 20, 384)
    assert test.shape == (50, 20, 384)
    assert train.mask.all()
    assert train.store.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(test.embeddings(), axis=-1), 1, atol=2e-3)
    correlation = np.mean(
        [spearmanr(*pair).statistic for pair in zip(test.gold, test.attributes["length"], strict=True)]
    )
    assert correlation == pytest.approx(length, abs=0.01)


# --- attributes -----------------------------------------------------------------------------------------------

SCORED = [
    {"prompt": f"p{p}", "response": "no" * r, "score": p - r, "help": 10 * p + r} for p in range(8) for r in (1, 2)
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("names", [("help", "score"), "help, score"])
def test_further_columns_are_attributes(tmp_path, kind, names):
    table, array = write(tmp_path, SCORED, kind)
    for side in load(table, embeddings=array, target="score", attributes=names):
        assert side.attributes.keys() == {"position", "length", "prompt_cosine", "help", "score"}
        np.testing.assert_array_equal(side.column("gold"), side.column("score"))
        np.testing.assert_array_equal(side.column("help") % 10, np.tile([1, 2], (len(side.rows), 1)))
        assert side.column("help").dtype == np.float32
        assert side.provenance["attributes"] == ["help", "score"]
    assert load_table(table, array, "score", attributes=names).test.provenance["attributes"] == ["help", "score"]
    assert "attributes" not in load(table, embeddings=array, target="score").train.provenance


def test_an_attribute_may_take_the_place_of_an_automatic_one_and_be_in_lists(tmp_path):
    rows = [{"prompt": f"p{p}", "responses": ["a", "b"], "score": [0, 1], "length": [7, 8 + p]} for p in range(8)]
    table, array = write(tmp_path, rows, embeddings=np.eye(16))
    sides = load(table, embeddings=array, target="score", attributes=["length"])
    assert sorted(int(side.column("length")[p, 1]) for side in sides for p in range(len(side.rows))) == [*range(8, 16)]


@pytest.mark.parametrize(
    ("attributes", "change", "words"),
    [
        (("hepl",), {}, "no column 'hepl' (did you mean 'help'?)"),
        (("help",), {"help": None}, "help is missing, NaN or infinite in row 3"),
        (("response",), {}, "column 'response' holds string, not numbers"),
        (("oracle",), {"oracle": 1.0}, "cannot be called 'oracle'"),
    ],
)
def test_faults_of_attributes_are_named(tmp_path, attributes, change, words):
    rows = [row | (change if at == 3 else {}) for at, row in enumerate(SCORED)]
    table, array = write(tmp_path, rows, "jsonl")
    assert words in complaint(load, table, embeddings=array, target="score", attributes=attributes)


def test_a_column_that_is_not_there_is_named():
    table = ResponseTable(np.eye(2), np.array([[0, 1]]), np.ones((1, 2), bool), attributes={"length": np.ones((1, 2))})
    assert complaint(table.column, "gold") == (
        "The table has no column 'gold': choose from length; other columns are read with `--attributes`."
    )
    assert "takes no attributes" in complaint(load, "synthetic", attributes=("length",))
