import io

import pytest

from jarm.core import progress
from jarm.core.progress import EVERY, Progress
from jarm.core.streams import quieted, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(clock, steps, seconds, monkeypatch, first=600.0):
    """A job of `steps` runs of some seconds each, after a compilation."""
    with Progress("compare", steps, "compiling first") as shown:
        for step in range(steps):
            clock[0] += seconds + first * (step == 0)
            shown.update(1, f"run {step}")
            yield shown


def test_a_file_gets_plain_lines_at_most_every_ten_seconds(clock, monkeypatch, capsys):
    begin = clock[0]
    for _ in run(clock, 200, 1.0, monkeypatch):
        pass
    text = capsys.readouterr().err
    assert "\r" not in text
    lines = text.splitlines()
    assert lines[0] == "compare: 0%, compiling first, 00:00"
    assert len(lines) <= 2 + (clock[0] - begin) / EVERY
    assert len(text) < 2000
    assert lines[1] == "compare: 0%, run 0, 10:01"  # no time left is known yet
    assert lines[2] == "compare: 6%, run 10, 10:11, about 03:09 left"
    assert lines[-1] == "compare: 100%, run 199, 13:20"


def test_the_time_left_counts_no_compilation(clock, monkeypatch):
    seen = []
    for shown in run(clock, 11, 2.0, monkeypatch, first=4000.0):
        if shown.done == 3:  # a second program
            clock[0] += 500
            progress._count_compilation("/jax/core/compile/backend_compile_duration", 500.0)
        seen.append(shown.seconds_left())
    assert seen == [None, *(2.0 * (11 - done) for done in range(2, 12))]


def test_a_terminal_gets_a_bar_unless_it_is_dumb(clock, monkeypatch):
    for term, bar in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", term)
        monkeypatch.setattr("sys.stderr", Terminal())
        for _ in run(clock, 30, 5.0, monkeypatch):
            pass
        text = progress.sys.stderr.getvalue()
        assert ("\r" in text) == bar
        assert "about " in text
        assert "100%" in text


def test_nothing_is_said_where_it_is_quiet(clock, monkeypatch, capsys):
    with quieted():
        say("a remark")
        for _ in run(clock, 30, 5.0, monkeypatch):
            pass
        with quieted(False):
            say("a remark")
    assert capsys.readouterr().err == ""
    say("a remark of \x1b[31mred\nand a line")
    assert capsys.readouterr().err == "a remark of \\x1b[31mred\nand a line\n"


def test_nothing_to_do_shows_nothing(capsys):
    with Progress("compare", 0):
        pass
    with Progress("compare", 3, show=False) as other:
        other.update(1, "")
    assert capsys.readouterr().err == ""
