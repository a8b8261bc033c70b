"""The manners of the command: what it says where, and the code with which it ends."""

import io
import os
import subprocess
import sys

import pytest

import jarm
from jarm.cli import COMMANDS, main
from jarm.core.status import JarmError
from jarm.core.streams import say, show

STORE = [("store", each) for each in ("info", "verify", "export")]
WORDS = [(name,) for name in COMMANDS if name != "store"] + STORE


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_every_command_has_help_and_can_be_quiet(words, capsys):
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr()
    assert "--quiet" in shown.out
    assert "\x1b" not in shown.out
    assert shown.err == ""
    assert main(["help", *words]) == main(["--help", *words]) == 0
    assert capsys.readouterr().out == 2 * shown.out


def test_help_names_every_command_and_imports_none():
    code = (
        "import sys; from jarm.cli import main; main(['--help']); sys.exit(bool({'jax', 'pyarrow'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"• {name} " in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["comprae"], "no command `jarm comprae` (did you mean 'compare'?)"),
        (["comprae", "--help"], "no command `jarm comprae` (did you mean 'compare'?)"),
        (["--help", "comprae"], "no command `jarm comprae`"),
        (["help", "comprae"], "no command `jarm comprae`"),
        (["help", "help"], "no command `jarm help`"),
        (["--quiet", "comprae"], "no command `jarm comprae`"),
        (["store", "infos", "x", "--help"], "no command `jarm store infos` (did you mean 'info'?)"),
        (["comp\x1b[31m\nare"], r"`jarm comp\x1b[31m\nare`"),
        ([], "`jarm` needs a command: give one of backtest, bench"),
        (["--quiet"], "`jarm` needs a command"),
        (["store"], "`jarm store` needs a command: give one of info, verify, cut, export"),
        (["--rules", "dopt"], "--rules"),
        (["compare", "--seed", "3"], "--seeds"),
        (["rules", "--chek", "x"], "--check"),
        (["plan"], "PATH"),
        (["sweep"], "`jarm sweep`: give one file, or `status` and a folder"),
        (["sweep", "a.toml", "b.toml"], "give one file"),
        (["sweep", "status"], "`jarm sweep status`: give one file"),
        (["embed", "--model"], "--model"),
    ],
)
def test_what_is_no_command_line_ends_with_code_2(args, said, capsys):
    assert main(args) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""
    assert "\x1b" not in shown.err


@pytest.mark.slow
def test_without_assertions_and_docstrings_all_is_checked_as_with_them(tmp_path):
    lines = [
        "import dataclasses",
        "from jarm.acquisition.uncertainty import entropy",
        "def repeats(*args, **kw):",
        "    best = entropy(*args, **kw)",
        "    return dataclasses.replace(best, pairs=best.pairs.at[1].set(best.pairs[0]))",
    ]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    command = [sys.executable, "-OO", "-m", "jarm.cli", "rules", "--check", "mine.py:repeats"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "repeats does not conform: batch on a space of 'within' pairs: a pair was picked twice" in done.stderr


def test_the_version_is_that_of_the_package(capsys):
    for args in (["--version"], ["-V"]):
        assert main(args) == 0
        assert capsys.readouterr().out == f"jarm {jarm.__version__}\n"


@pytest.mark.parametrize(
    ("wanted", "terminals", "coloured"), [("", True, True), ("1", True, False), ("", False, False)]
)
def test_colours_are_for_terminals_that_want_them(wanted, terminals, coloured, monkeypatch):
    class Stream(io.StringIO):
        def isatty(self):
            return terminals

    monkeypatch.setenv("NO_COLOR", wanted)
    monkeypatch.setenv("TERM", "xterm-256color")
    out, error = Stream(), Stream()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", error)
    assert main(["rules", "--help"]) == 0
    assert main(["rules", "--bogus"]) == 2
    assert ["\x1b[" in each.getvalue() for each in (out, error)] == [coloured, coloured]
    assert os.environ["TERM"] == "xterm-256color"


@pytest.fixture
def runs(monkeypatch):
    """`main` with a given function in place of a command, and with other standard streams."""

    def run(function, out=None, error=None):
        monkeypatch.setattr("jarm.cli._read", lambda args: function)
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", error)
        return main([])

    return run


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_text_is_shown_whatever_the_encoding(encoding, runs):
    odd = "\u2192 \ud800 \x1b[2J"

    def speak():
        say(f"said {odd}")
        show(f"shown {odd}\nand more")
        print(f"printed {odd[0]}")
        raise JarmError(f"wrong {odd}\n")

    out, error = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n") for _ in range(2))
    assert runs(speak, out, error) == 1
    arrow = "\u2192" if encoding == "utf-8" else r"\u2192"
    shown, said = (each.buffer.getvalue().decode(encoding) for each in (out, error))
    assert shown == f"shown {arrow} \\ud800 \\x1b[2J\nand more\nprinted {arrow}\n"
    assert said == f"said {arrow} \\ud800 \\x1b[2J\njarm: wrong {arrow} \\ud800 \\x1b[2J\\n\n"
    assert out.errors == "strict"


@pytest.mark.parametrize("write", [show, print], ids=["show", "print"])
def test_a_reader_that_has_gone_is_no_error(write, runs):
    read, end = os.pipe()
    os.close(read)
    with open(end, "w") as out:
        assert runs(lambda: write("x"), out, error := io.StringIO()) == 141
    assert error.getvalue() == ""


# A device that only Linux has; elsewhere there is no file that is always full.
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("write", [show, print], ids=["show", "print"])
def test_a_full_standard_output_gets_a_sentence(write, runs):
    with open("/dev/full", "w") as full:
        assert runs(lambda: write("x"), full, error := io.StringIO()) == 1
    assert error.getvalue() == (
        "jarm: Cannot write to standard output (No space left on device): give it a file with room.\n"
    )


def test_closed_streams_get_a_sentence_or_nothing(runs):
    assert runs(lambda: show("x"), None, error := io.StringIO()) == 1
    assert error.getvalue() == "jarm: Standard output is closed: give it a file, or /dev/null.\n"
    assert runs(lambda: say("x"), out := io.StringIO(), None) == 0
    assert out.getvalue() == ""


def test_a_file_that_cannot_be_opened_is_named(tmp_path, runs):
    path = tmp_path / "no" / "such"
    assert runs(path.read_bytes, io.StringIO(), error := io.StringIO()) == 1
    assert error.getvalue() == f"jarm: No such file or directory: {path}.\n"


@pytest.mark.slow
def test_the_reader_of_a_process_goes():
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-m", "jarm.cli", "rules"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.parametrize("words", [["store", "info"], ["store", "verify"], ["--quiet", "store", "info"]], ids=" ".join)
def test_a_store_that_is_none_gets_a_sentence(words, tmp_path, capsys):
    assert main([*words, str(tmp_path)]) == 1
    assert "is no embedding store" in capsys.readouterr().err
