"""JSON of others: every malformed text or field is one sentence that names its place, and nothing else."""

import json

import pytest

from jarm.core.outside import (
    array,
    boolean,
    either,
    enum,
    integer,
    mapping,
    maybe,
    number,
    parse_json,
    read_json,
    string,
    struct,
)
from jarm.core.status import JarmError


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "ä [{"]}, [], 0, "", {"": {}}, 10**200, "[" * 1000])
def test_json_is_read_as_json_is(value):
    for dumped in (json.dumps(value), json.dumps(value, ensure_ascii=False), "\ufeff" + json.dumps(value)):
        assert parse_json(dumped, "x", "y") == parse_json(dumped.encode(), "x", "y") == value


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ('{"a": 1} {', "Extra data"),
        ('{"a": 1, "a": 1}', "the key 'a' occurs twice"),
        ('[{"b": {"a": 1, "c": 2, "a": 1}}]', "the key 'a' occurs twice"),
        ("[NaN]", "the number NaN is not finite"),
        ("[-Infinity]", "the number -Infinity is not finite"),
        ("[1e400]", "the number 1e400 is not finite"),
        ("9" * 5000, "the number 9{20} is not finite"),
        ("9" * 320 + ".5", "is not finite"),
        (b'"\xff"', "not valid Unicode"),
        (r'"\ud800"', "not valid Unicode"),
        (r'["\\ud83d\ud83d"]', "not valid Unicode"),
        *[(opening * deep, "more than 64 lists") for opening in ("[", '{"a":') for deep in (65, 900, 100_000)],
        ("[" * 900 + "]" * 900, "more than 64 lists"),
        ('"' + r"\"" * 200_000 + "[" * 100, "Unterminated string"),
    ],
)
def test_what_is_no_json_is_one_sentence(broken, said):
    with pytest.raises(JarmError, match=rf"^line 3 is not JSON as jarm reads it \([^\n]*{said}[^\n]*\): cut it\.$"):
        parse_json(broken, "line 3", "cut it")


def test_a_pair_of_surrogates_is_a_letter_and_a_table_takes_numbers_as_they_are():
    assert parse_json(r'"\ud83d\ude00"', "x", "y") == "\N{GRINNING FACE}"
    assert parse_json("[Infinity, 1e400]", "x", "y", strict=False) == [float("inf")] * 2


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (integer(1, 9), [1, 9], [0, 10, 1.0, True, "1", None, [1], 10**300]),
        (integer(), [0, 10**30], [-1, float("nan")]),
        (number(), [0, -1.5, 10**300], [True, "1", None, float("inf"), float("nan"), 10**400]),
        (number(0, 1), [0, 1, 0.5], [-0.1, 1.1]),
        (string(3), ["", "abc"], ["abcd", 1, None, []]),
        (boolean, [True, False], [0, 1, "true", None]),
        (enum("a", 1), ["a", 1], ["b", True, 1.0, None, [], {}]),
        (maybe(integer()), [None, 1], [-1, "1"]),
        (either(integer(), array(integer())), [1, [1, 2]], ["1", [1, "2"], None]),
        (array(integer(), 1, 2), [[1], [1, 2]], [[], [1, 2, 3], ["1"], 1, {}, "1"]),
        (mapping(string()), [{}, {"a": "b"}], [[], {"a": 1}, None]),
        (
            struct({"a": integer()}, {"b": string()}),
            [{"a": 1}, {"a": 1, "b": "", "c": []}],
            [{}, {"a": 1, "b": 2}, [], 1],
        ),
    ],
)
def test_a_check_takes_what_it_says_and_nothing_else(check, good, bad):
    assert [check(value, "x") for value in good] == [None] * len(good)
    for value in bad:
        assert "\n" not in check(value, "x")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"layers": [{"width": -4}]}, r"layers\[0\].width is -4, not a whole number of at least 1"),
        ({"layers": [{"height": 4}]}, r"layers\[0\] has no 'width'"),
        ({"layers": None}, "layers is null, not a list of at least 0 values"),
        ({"other": [], "layers": [[[["x" * 5000]]]]}, r"layers\[0\] is \[.{0,80}, not an object"),
        ([], r"the content is \[\], not an object"),
    ],
)
def test_a_fault_names_the_field_and_its_value(tmp_path, value, said):
    path, check = tmp_path / "x.json", struct({"layers": array(struct({"width": integer(1)}))})
    path.write_text(json.dumps(value))
    with pytest.raises(JarmError, match=rf"x\.json: {said}: copy or download it again\.$"):
        read_json(path, check)


def test_a_file_has_to_be_there_and_of_a_bearable_size(tmp_path):
    for missing in (tmp_path / "none", tmp_path / ("x" * 5000), tmp_path / "a\0b"):
        with pytest.raises(JarmError, match="does not exist"):
            read_json(missing)
    (tmp_path / "x").write_text("[" + " " * 20 + "]")
    with pytest.raises(JarmError, match="x has 22 B, more than the 10 B it may have: copy"):
        read_json(tmp_path / "x", limit=10)
    assert read_json(tmp_path / "x") == []
