"""Ids are compared by value, and all that has none is named."""

import enum

import numpy as np
import pyarrow as pa
import pytest

from jarm.core.ids import code_ids, read_ids
from jarm.core.status import JarmError


class Number(enum.IntEnum):
    ONE = 1


class Plain(enum.Enum):
    ONE = 1


class Zero:
    """As an array of no axes of any library: compared by identity, with a number inside."""

    shape = ()

    def __init__(self, value):
        self.value = value

    def item(self):
        return self.value


@pytest.mark.parametrize(
    "values",
    [
        [7, 7, 8],
        range(7, 10),
        np.array([7, 7, 8], np.uint8),
        list(np.array([7, 7, 8], np.int16)),
        [np.array(7), np.array(7), np.array(8)],
        np.array([np.array(7), 7, np.int8(8)], object),
        [Zero(7), Zero(7), Zero(8)],
        pa.array([7, 7, 8]),
        pa.chunked_array([[7], [7, 8]]),
        list(pa.array([7, 7, 8])),
    ],
)
def test_whole_numbers_of_any_library_are_one_value(values):
    assert read_ids("prompts", values) == ([7, 8, 9] if isinstance(values, range) else [7, 7, 8])
    assert all(type(each) is int for each in read_ids("prompts", values))


def test_tensors_are_compared_by_value():
    torch = pytest.importorskip("torch")
    assert (
        read_ids("prompts", [torch.tensor(v) for v in (0, 0, 1)])
        == [0, 0, 1]
        == read_ids("prompts", torch.tensor([0, 0, 1]))
    )
    with pytest.raises(JarmError, match="Entry 0 of prompts is a Tensor"):
        read_ids("prompts", [torch.tensor(True), 1])


def test_texts_and_tuples():
    assert read_ids("prompts", ["a", np.str_("a"), np.array("b"), Number.ONE, ("a", np.int64(2))]) == [
        "a",
        "a",
        "b",
        1,
        ("a", 2),
    ]
    assert read_ids("prompts", pa.array(["a", "b"]).dictionary_encode()) == ["a", "b"]
    assert code_ids(read_ids("prompts", list("baab")))[0].tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": 1, "b": 2}, "prompts is a dict"),
        ({1, 2}, "prompts is a set"),
        ("aabb", "prompts is a str"),
        (b"aabb", "prompts is a bytes"),
        ((i for i in range(2)), "prompts is a generator"),
        (None, "prompts is a NoneType"),
        (3, "prompts is a int"),
        ([[1], [2]], "Entry 0 of prompts is a list"),
        (np.zeros((2, 1), int), r"prompts has shape \(2, 1\)"),
        (np.array(3), r"prompts has shape \(\)"),
        (["a", True], r"Entry 1 of prompts is a bool \(True\)"),
        (np.array([True, False]), "Entry 0 of prompts is a bool"),
        ([1, 2.0], r"Entry 1 of prompts is a float \(2.0\)"),
        ([2.0, 1.0], r"Entry 0 of prompts is a float \(2.0\): write the column as whole numbers \(in pandas"),
        ([1, np.float32(2)], "Entry 1 of prompts is a float32"),
        ([1, 2j], "Entry 1 of prompts is a complex"),
        ([1, b"a"], "Entry 1 of prompts is a bytes"),
        (["a", {1: 2}], "Entry 1 of prompts is a dict"),
        (["a", object()], "Entry 1 of prompts is a object"),
        (["a", Plain.ONE], "Entry 1 of prompts is a Plain"),
        (["a", ("a", 1.0)], "Entry 1 of prompts is a tuple"),
        ([np.array([1])], "Entry 0 of prompts is a ndarray"),
        (np.array(["2020-01-01"], "M8[ns]"), "Entry 0 of prompts is a datetime64"),
        ([np.timedelta64(3, "ns")], "Entry 0 of prompts is a timedelta64"),
        ([1.0, None], r"Entry 1 of prompts is missing \(None\)"),
        (np.array([1.0, np.nan]), r"Entry 1 of prompts is missing \(nan\)"),
        (np.ma.array([1, 2], mask=[False, True]), "Entry 1 of prompts is missing"),
        (pa.array([1, None]), "Entry 1 of prompts is missing"),
        ([5, 1, "2", "1"], r"Entry 3 of prompts is the text 1, and the number 1 came before \(Entry 1 of prompts\)"),
    ],
)
def test_what_is_no_id_is_named(values, message):
    with pytest.raises(JarmError, match=message):
        read_ids("prompts", values)


def test_missing_values_of_pandas_are_named():
    pandas = pytest.importorskip("pandas")
    for values in ([1, pandas.NA], pandas.Series([1, None], dtype="Int64"), [1, pandas.NaT]):
        with pytest.raises(JarmError, match="Entry 1 of prompts is missing"):
            read_ids("prompts", values)
