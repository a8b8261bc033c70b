import pytest

from jarm.core.messages import brief, choose, clock, listed, nearest, readable
from jarm.core.status import JarmError, printable

pytestmark = pytest.mark.core

KINDS = ("within", "cross", "all")


def test_a_known_name_is_returned():
    assert choose("pair space", "cross", KINDS) == "cross"
    assert choose("rule", "a", {"a": 1}, "or FILE.py:FUNCTION") == "a"


@pytest.mark.parametrize(
    ("name", "otherwise", "message"),
    [
        ("wihtin", "", "There is no pair space 'wihtin': did you mean 'within'?"),
        ("CROSS", "", "There is no pair space 'CROSS': did you mean 'cross'?"),
        ("inside", "", "There is no pair space 'inside': choose from within, cross, all."),
        ("", "or give pairs", "There is no pair space '': choose from within, cross, all, or give pairs."),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_or_with_all(name, otherwise, message):
    with pytest.raises(JarmError) as error:
        choose("pair space", name, KINDS, otherwise)
    assert str(error.value) == message


def test_nearest_is_silent_where_nothing_is_near():
    assert nearest("scor", ["prompt", "score"]) == " (did you mean 'score'?)"
    assert nearest("x", iter(["prompt", "score"])) == ""


def test_places_sizes_and_times():
    assert listed([7]) == "row 7"
    assert listed([7, 8], place=lambda row: f"line {row + 1}") == "line 8, line 9"
    assert listed([0, 1, 5, 6, 7], width=5).endswith("row 5 (prompt 1, response 0) and 2 more")
    sizes = [0, 1023, 1024, 5 << 20, 3 << 29]
    assert [readable(size) for size in sizes] == ["0 B", "1023 B", "1 KiB", "5 MiB", "1.5 GiB"]
    assert [clock(seconds) for seconds in (1.0, 119.0, 120.0, 7200.0)] == ["1 s", "119 s", "2 minutes", "2.0 hours"]
    assert brief(ValueError("first line.\nsecond")) == "first line"
    assert brief(ValueError()) == "ValueError"


def test_what_a_terminal_would_obey_is_escaped():
    assert printable("a\x1b[2J\x07\r\n\t\x7f\x9b\u202e\u2066\u200f\u2028\ud800\x00") == (
        r"a\x1b[2J\x07\r\n\t\x7f\x9b\u202e\u2066\u200f\u2028\ud800\x00"
    )
    ordinary = "Grüße, naïve \\n 'q' \N{MAN}\u200d\N{ROCKET} שלום 日本 \xa0\xad"
    assert printable(ordinary) == ordinary
    assert printable(3) == "3"
