"""Tables as users have them: prompts under ids, types of other writers, scores of any size, embeddings gone wrong."""

import dataclasses
import decimal
import inspect
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_datasets import complaint

from jarm.core.tables import ResponseTable, TrainTest, check_embeddings
from jarm.data.arrow import plain
from jarm.data.datasets import load
from jarm.data.prompts import TEST_SHARE
from jarm.data.readers import read_columns, refuse_nonfinite
from jarm.data.standardise import standardised
from jarm.data.synthetic import SyntheticConfig, synthetic
from jarm.data.tables import load_table

WIDTH = 3


def saved(tmp_path, rows, kind="jsonl", name="t"):
    """Paths of a table and of random embeddings of its responses."""
    table, array = tmp_path / f"{name}.{kind}", tmp_path / f"{name}.npy"
    if kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), table)
    np.save(array, np.random.default_rng(0).normal(size=(len(rows), WIDTH)))
    return table, array


# --- a prompt is its id and its text ---------------------------------------------------------------------------


def merged(text="{set} {p}", ids="{p}"):
    """Two sets of six prompts with two responses each, merged."""
    return [
        {
            "prompt_id": ids.format(set=which, p=p),
            "prompt": text.format(set=which, p=p),
            "response": "no" * (r + 1),
            "score": float(r),
        }
        for which in "ab"
        for p in range(6)
        for r in range(2)
    ]


def as_messages(rows):
    return [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", [list, as_messages])
def test_one_id_for_two_prompts_is_refused_by_row(tmp_path, kind, form):
    message = complaint(load_table, *saved(tmp_path, form(merged()), kind), "score")
    assert "row 12: prompt_id is '0' as in row 0, whose prompt is another; there are 12 such rows" in message
    train, test = load_table(*saved(tmp_path, form(merged(ids="{set}{p}")), kind), "score")
    assert len(train.rows) + len(test.rows) == 12
    without = [{key: value for key, value in row.items() if key != "prompt_id"} for row in form(merged())]
    train, test = load_table(*saved(tmp_path, without, kind), "score")
    assert len(train.rows) + len(test.rows) == 12


def test_texts_are_compared_exactly_and_gaps_are_no_difference(tmp_path):
    rows = merged(ids="{set}{p}")
    rows[1]["prompt"] = None
    load_table(*saved(tmp_path, rows), "score")
    for other in ("a 0 ", "A 0", "\u00e1 0"):
        rows[1]["prompt"] = other
        assert "row 1: prompt_id is 'a0' as in row 0" in complaint(load_table, *saved(tmp_path, rows), "score")


@pytest.mark.parametrize("form", [list, as_messages])
def test_a_prompt_on_both_sides_of_the_split_is_refused_or_allowed_by_name(tmp_path, form):
    rows = [row | {"split": "train" if row["prompt_id"][0] == "a" else "test"} for row in merged("{p}", "{set}{p}")]
    paths = saved(tmp_path, form(rows))
    message = complaint(load_table, *paths, "score")
    assert "row 0, row 12 have one and the same prompt, under the ids 'a0' and 'b0'" in message
    assert "there are 6 such prompts" in message
    assert "--allow-leakage" in message
    for reader in (load_table, lambda *args, **how: load(args[0], embeddings=args[1], target=args[2], **how)):
        train, test = reader(*paths, "score", allow_leakage=True)
        assert len(train.rows) == len(test.rows) == 6
    # On one side, two ids of a text are two prompts, as the table has it.
    rows = [row | {"split": "train" if int(row["prompt"]) < 4 else "test"} for row in merged("{p}", "{set}{p}")]
    train, _ = load_table(*saved(tmp_path, form(rows)), "score")
    assert len(train.rows) == 8


def test_a_hash_splits_by_text(tmp_path):
    rows = [row for p in range(40) for row in merged(f"{p} {{p}}", f"{p}{{set}}{{p}}")]
    train, test = load_table(*saved(tmp_path, rows), "score")
    prompts = [{rows[row]["prompt"] for row in side.rows[:, 0]} for side in (train, test)]
    assert not prompts[0] & prompts[1]
    assert len(test.rows) / 480 == pytest.approx(TEST_SHARE, abs=0.06)
    leaking = load_table(*saved(tmp_path, rows), "score", allow_leakage=True)
    assert {rows[row]["prompt"] for row in leaking.train.rows[:, 0]} & {
        rows[row]["prompt"] for row in leaking.test.rows[:, 0]
    }


def test_allow_leakage_is_for_tables():
    assert "takes no allow_leakage" in complaint(load, "synthetic", allow_leakage=True)


# --- ids by value ----------------------------------------------------------------------------------------------

IDS = {
    "int64": pa.array([0, 0, 1, 1]),
    "uint64": pa.array([2**63, 2**63, 2**64 - 1, 2**64 - 1], pa.uint64()),
    "decimal": pa.array([decimal.Decimal(10**30), decimal.Decimal(10**30), decimal.Decimal(1), decimal.Decimal(1)]),
    "dictionary": pa.array(["a", "a", "b", "b"]).dictionary_encode(),
    "view": pa.array(["a", "a", "b", "b"], pa.string_view()),
    "binary": pa.array([b"a", b"a", b"\xc3\xa9", b"\xc3\xa9"]),
    "large": pa.array(["a", "a", "b", "b"], pa.large_string()),
}


@pytest.mark.parametrize("name", IDS)
def test_ids_are_told_apart_by_value(tmp_path, name):
    table = pa.table({"prompt_id": IDS[name], "score": [0, 1, 0, 1], "split": ["train", "train", "test", "test"]})
    train, test = load_table(*saved(tmp_path, table, "parquet"), "score")
    np.testing.assert_array_equal(train.rows, [[0, 1]])
    np.testing.assert_array_equal(test.rows, [[2, 3]])


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (pa.array([1.0, 1.0, 2.0, 2.0]), "column prompt_id holds double: give text or integers"),
        (pa.array([1.0, None, 2.0, 2.0]), "row 1: prompt_id is missing"),
        (pa.array([True, True, False, False]), "column prompt_id holds bool"),
        (pa.array([b"\xff", b"\xff", b"\xfe", b"\xfe"]), "column prompt_id holds binary"),
        (pa.array([decimal.Decimal("1.5")] * 4), "column prompt_id holds decimal128(2, 1)"),
        (pa.array([1, 1, 2, 2], pa.timestamp("s")), "column prompt_id holds timestamp"),
        (pa.nulls(4), "row 0: prompt_id is missing"),
    ],
)
def test_what_is_no_id_is_named(tmp_path, ids, words):
    table = pa.table({"prompt_id": ids, "score": [0, 1, 0, 1], "split": ["train", "train", "test", "test"]})
    assert words in complaint(load_table, *saved(tmp_path, table, "parquet"), "score")


def test_integers_of_any_size_are_ids_in_json(tmp_path):
    for values in ((2**63, 1), (2**70, -1), (10**30, 10**30 + 1)):
        sides = dict(zip(("train", "test"), values, strict=True))
        rows = [{"prompt_id": value, "score": r, "split": side} for side, value in sides.items() for r in (0, 1)]
        assert len(load_table(*saved(tmp_path, rows), "score").train.rows) == 1
    rows[0]["prompt_id"] = str(rows[0]["prompt_id"])
    assert "mixes types" in complaint(load_table, *saved(tmp_path, rows), "score")


# --- columns as other writers store them -----------------------------------------------------------------------

TEXT = pa.dictionary(pa.int32(), pa.string())
STORED = [
    (pa.array([["x", "y"], None, ["zz", "w"], []], pa.list_(TEXT)), [["x", "y"], None, ["zz", "w"], []]),
    (pa.array([["x", "y"], None, ["zz", "w"]], pa.list_(pa.string(), 2)), [["x", "y"], None, ["zz", "w"]]),
    (pa.array([["x"], None, ["zz", "w"]], pa.list_view(pa.string())), [["x"], None, ["zz", "w"]]),
    (pa.array([["x"], None, ["zz", "w"]], pa.large_list_view(pa.string_view())), [["x"], None, ["zz", "w"]]),
    (pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)), [[1.0, 2.0], None]),
    (pa.array(["x", None], pa.string_view()), ["x", None]),
    (pa.array(["x", None], TEXT), ["x", None]),
    (pa.array([b"x", None], pa.binary_view()), ["x", None]),
    (pa.array([b"\xff", None]), [b"\xff", None]),
    (
        pa.array([[{"role": "user", "content": "x"}], None], pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))),
        [[{"role": "user", "content": "x"}], None],
    ),
]


@pytest.mark.parametrize(("array", "values"), STORED, ids=lambda value: str(getattr(value, "type", "")))
def test_columns_of_other_writers_are_read_as_what_they_mean(array, values):
    twice = pa.chunked_array([array, array.slice(1), array.slice(0, 0)])
    assert plain(twice).to_pylist() == values + values[1:]


def test_a_table_as_polars_writes_it(tmp_path):
    """Categories within lists, lists of one size and categories, in several row groups, one of them empty."""
    table = pa.table(
        {
            "prompt_id": pa.array(["a", "b", "c"], pa.dictionary(pa.uint8(), pa.string(), ordered=True)),
            "responses": pa.array([["x", "yy"]] * 3, pa.large_list(pa.dictionary(pa.uint32(), pa.string()))),
            "score": pa.array([[1.0, 2.0], [2.0, 4.0], [0.0, 3.0]], pa.list_(pa.float32(), 2)),
            "split": pa.array(["train", "test", "test"], pa.dictionary(pa.uint32(), pa.string())),
        }
    )
    path = tmp_path / "t.parquet"
    with pq.ParquetWriter(path, table.schema) as writer:
        for part in (table.slice(0, 1), table.slice(0, 0), table.slice(1)):
            writer.write_table(part)
    np.save(tmp_path / "t.npy", np.random.default_rng(0).normal(size=(6, WIDTH)))
    assert read_columns(path, []).numeric == ["score"]
    train, test = load_table(path, tmp_path / "t.npy", "score")
    np.testing.assert_array_equal(train.gold, [[1, 2]])
    np.testing.assert_array_equal(test.gold, [[2, 4], [0, 3]])
    np.testing.assert_array_equal(test.attributes["length"], [[1, 2], [1, 2]])


def test_a_column_that_is_there_twice_is_named(tmp_path):
    columns = [pa.array([0, 0, 1, 1]), pa.array([0, 1, 0, 1]), pa.array([1, 0, 1, 0])]
    table = pa.Table.from_arrays(columns, names=["prompt_id", "score", "score"])
    message = complaint(load_table, *saved(tmp_path, table, "parquet"), "score")
    assert "has 2 columns called 'score': rename all but one" in message
    other = pa.Table.from_arrays([*columns, columns[0]], names=["prompt_id", "score", "x", "x"])
    load_table(*saved(tmp_path, other.append_column("split", [["train"] * 2 + ["test"] * 2]), "parquet"), "score")


LINES = [
    json.dumps({"prompt_id": p, "score": r, "split": side}) for p, side in enumerate(("train", "test")) for r in (0, 1)
]


@pytest.mark.parametrize(
    "text",
    [
        "\r\n".join(LINES).encode(),
        b"\xef\xbb\xbf" + "\n".join(LINES).encode(),
        ("\n\n  \n" + "\n\n".join(LINES) + "\n\n").encode(),
    ],
    ids=["CRLF", "BOM", "blank lines"],
)
def test_lines_of_other_editors(tmp_path, text):
    table, array = saved(tmp_path, [json.loads(line) for line in LINES])
    table.write_bytes(text)
    np.testing.assert_array_equal(load_table(table, array, "score").test.rows, [[2, 3]])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt_id": 0, "score": 1, "score": 2, "split": "train"}', "line 2, is not JSON as jarm"),
        ('{"prompt_id": 0, "score": NaN, "split": "train"}', "score is missing, NaN or infinite in row 1"),
        ('{"prompt_id": 0, "score": -Infinity, "split": "train"}', "in row 1"),
        ('{"prompt_id": 0, "score": 1e39, "split": "train"}', "in row 1"),
        ('{"prompt_id": 0, "score": 9007199254740993, "split": "train"}', "holds integers beyond 2**53"),
        ('{"prompt_id": 0, "score": "1", "split": "train"}', "line 2: 'score' mixes types"),
        ('{"prompt_id": 0, "score": true, "split": "train"}', "line 2: 'score' mixes types"),
        ('{"prompt_id": 0, "score": ' + "9" * 5000 + ', "split": "train"}', "line 2, is not JSON"),
        ('{"prompt_id": 0, "score": ' + "9" * 400 + ', "split": "train"}', "line 2: 'score' mixes types"),
        ("[" * 100_000, "line 2, is not JSON"),
        ('{"prompt": ' + "[" * 900 + "]" * 900 + "}", "(more than 64 lists"),
        ("[1]", "line 2, is not a JSON object"),
    ],
    ids=range(12),
)
def test_odd_lines_are_named(tmp_path, line, words):
    table, array = saved(tmp_path, [json.loads(line) for line in LINES])
    table.write_text("\n".join([LINES[0], line, *LINES[2:]]))
    assert words in complaint(load_table, table, array, "score")


# --- a target without differences ------------------------------------------------------------------------------


def scored(train, test, **columns):
    """A table of two train and two test prompts with the given scores."""
    sides = [("train", train), ("test", test)]
    return [
        {"prompt_id": f"{side}{p}", "score": value, "split": side} | columns
        for side, prompts in sides
        for p, values in enumerate(prompts)
        for value in values
    ]


@pytest.mark.parametrize(
    "test", [[[1.0, 1.0], [2.0, 2.0]], [[1.0, 1.0], [5.0]], [[0.1] * 3, [0.1] * 2]], ids=["prompts", "one", "all"]
)
def test_test_scores_that_no_metric_can_use_are_named(tmp_path, test):
    table, array = saved(tmp_path, scored([[1.0, 2.0]], test))
    message = complaint(load, table, embeddings=array, target="score")
    assert f"gold rewards of the test prompts of {table} are equal in every pair within prompts" in message


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("low", [16777216, 1e6, -(2.0**40)])
def test_scores_of_any_size_differ_as_in_the_file(tmp_path, kind, low):
    step = 1.0 if low == 16777216 else 2**-10
    values = [low, low + step, low + 2 * step]
    train, test = load_table(*saved(tmp_path, scored([values], [values]), kind), "score", attributes=["score"])
    for side in (train, test):
        np.testing.assert_array_equal(side.gold, [values])
        np.testing.assert_array_equal(side.column("score"), [values])


def test_published_rewards_keep_their_digits(tmp_path):
    gold = 1e6 + 1e-3 * np.arange(6.0).reshape(2, 3, 1)
    for split in ("train", "test"):
        np.save(tmp_path / f"embd_a_b_c_{split}.npy", np.random.default_rng(0).normal(size=(2, 3, WIDTH)))
        np.save(tmp_path / f"reward_a_b_c_{split}.npy", gold)
    np.testing.assert_array_equal(load(tmp_path).test.gold, gold[..., 0])
    np.save(tmp_path / "reward_a_b_c_test.npy", np.ones((2, 3, 1)))
    assert "are equal in every pair within prompts" in complaint(load, tmp_path)


def test_synthetic_gold_beside_huge_offsets_still_differs():
    sizes = SyntheticConfig(train=3, test=2, width=4, copies=0.0)
    far = synthetic(0, dataclasses.replace(sizes, offset=1e8)).train.gold
    near = synthetic(0, dataclasses.replace(sizes, offset=0.0)).train.gold
    np.testing.assert_allclose(far - far[:, :1], near - near[:, :1], atol=1e-6)


# --- embeddings gone wrong -------------------------------------------------------------------------------------


def test_a_column_divided_by_its_own_deviation_of_nothing_is_named(tmp_path):
    """What a standardising of one's own makes of a constant dimension."""
    array = np.random.default_rng(0).normal(size=(8, 4))
    array[:, 2] = 7
    with np.errstate(invalid="ignore"):
        own = (array - array.mean(axis=0)) / array.std(axis=0)
    own[:, 2] = np.nan
    message = complaint(refuse_nonfinite, own, "e.npy")
    assert (
        "e.npy is NaN or infinite in row 0, row 1, row 2 and 5 more; in column 2 of 4, 0.25 of all numbers;" in message
    )
    assert "a column without variance" in message
    single = np.ones((8, 4), np.float16)
    single[3, 1:3] = np.inf
    message = complaint(refuse_nonfinite, single, "e.npy")
    assert "in row 3; in column 1 and 1 more of 4, 0.062 of all numbers; float16 ends at 65,504" in message


def table_of(embeddings):
    P, R, d = embeddings.shape
    gold = np.tile(np.arange(R, dtype=np.float32), (P, 1))
    return ResponseTable(embeddings.reshape(-1, d), np.arange(P * R).reshape(P, R), np.ones((P, R), bool), gold)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
def test_the_first_bad_embedding_of_a_table_is_named(value):
    embeddings = np.random.default_rng(0).normal(size=(4, 2, 5)).astype(np.float32)
    embeddings[2, 1, 3] = value
    message = complaint(check_embeddings, embeddings, np.ones((4, 2), bool), 10)
    assert f"The embedding of response 1 of prompt 12 is {value:.3g} in column 3" in message
    assert "in 1 of 5 columns" in message
    check_embeddings(embeddings, np.arange(8).reshape(4, 2) != 5)  # not where there is no response
    table = table_of(embeddings)
    assert "response 1 of prompt 2" in complaint(standardised, TrainTest(table, table))


def test_deviations_too_small_for_float32_count_as_none():
    embeddings = np.random.default_rng(0).normal(size=(4, 2, 3))
    embeddings[..., 1] *= 1e-60
    table = table_of(embeddings)
    rows = standardised(TrainTest(table, table)).train.embeddings()
    assert np.isfinite(rows).all()
    assert not rows[..., 1].any()


def test_embeddings_without_columns_are_named():
    assert "no columns" in complaint(check_embeddings, np.zeros((2, 2, 0), np.float32), np.ones((2, 2), bool))


# --- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ([3], r"`attributes` is [3]: give names"),
        (3, "`attributes` is 3: give names"),
        ([b"help"], "give names"),
        ("length", "has no column 'length', and needs none for an attribute, which jarm makes by itself of response"),
        ("position", "needs none"),
        ("gold", "cannot be called 'gold'"),
    ],
)
def test_names_that_are_no_attributes(tmp_path, attributes, words):
    table, array = saved(tmp_path, scored([[1.0, 2.0]], [[1.0, 2.0]]))
    unchecked = inspect.unwrap(load)  # without the checks of types that tests have
    assert words in complaint(unchecked, table, embeddings=array, target="score", attributes=attributes)


def test_the_target_is_a_name(tmp_path):
    table, array = saved(tmp_path, scored([[1.0, 2.0]], [[1.0, 2.0]]))
    assert "`target` is 3" in complaint(inspect.unwrap(load_table), table, array, 3)
    load(table, embeddings=array, target="score", attributes=["score", "score"])
