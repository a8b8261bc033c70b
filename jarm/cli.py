"""The `jarm` command."""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import tyro

from jarm.commands.options import Refused, complain, deferred, misused
from jarm.core.interrupts import Stopped, leavable, was_left
from jarm.core.messages import nearest
from jarm.core.status import JarmError
from jarm.core.streams import any_text, show
from jarm.core.version import __version__
from jarm.runs.arguments import check_arguments

COMMANDS = {
    "backtest": "backtests",
    "bench": "experiments",
    "compare": "experiments",
    "diff": "judging",
    "embed": "models",
    "evaluate": "judging",
    "export": "exports",
    "forecast": "experiments",
    "plan": "experiments",
    "rules": "experiments",
    "score": "models",
    "serve": "exports",
    "store": "store",
    "sweep": "experiments",
    "train": "models",
}
"""Command -> its module in `jarm.commands`, which is imported when the command is asked for."""
STORE_COMMANDS = ("info", "verify", "cut", "export")


def _commands(asked: str) -> dict[str, Callable[..., Any]]:
    """Every command as a function: the one asked for, and the others as their descriptions alone, without an import."""
    found: dict[str, Callable[..., Any]] = {}
    for module in dict.fromkeys(COMMANDS.values()):
        source = pathlib.Path(__file__).with_name("commands").joinpath(f"{module}.py")
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_command"):
                found[node.name.removesuffix("_command")] = _described(ast.get_docstring(node))
    if asked in COMMANDS:
        command = getattr(importlib.import_module(f"jarm.commands.{COMMANDS[asked]}"), f"{asked}_command")
        found[asked] = command if asked == "store" else deferred(command)  # those of a store are deferred one by one
    return {name: found[name] for name in COMMANDS}


def _described(text: str | None) -> Callable[[], None]:
    def command() -> None:
        pass

    command.__doc__ = text
    return command


def _read(args: Sequence[str]) -> Callable[[], None]:
    """What the words of a command line ask for.

    Raises:
      SystemExit: they ask for help (code 0), or are no command line (code 2).
    """
    args = list(args)
    if args[:1] == ["--quiet"]:  # before a command as behind it
        args = [*args[1:], *args[:1]] if args[1:] else []
    if args[:1] == ["help"] or (args[:1] in (["-h"], ["--help"]) and len(args) > 1):
        args = [*args[1:], "--help"]
    if args in (["--version"], ["-V"]):
        show(f"jarm {__version__}")
        raise SystemExit(0)
    commands = [("jarm", list(COMMANDS)), *([("jarm store", list(STORE_COMMANDS))] if args[:1] == ["store"] else [])]
    for place, (name, known) in enumerate(commands):
        word = args[place] if len(args) > place else None
        if word is None:
            with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
                _parse([*args, "--help"])
            misused(f"`{name}` needs a command: give one of {', '.join(known)}.")
        if not word.startswith("-") and word not in known:
            misused(f"There is no command `{name} {word}`{nearest(word, known)}: `{name} --help` lists them.")
    return _parse(args)


def _parse(args: list[str]) -> Callable[[], None]:
    with _colours():
        return tyro.extras.subcommand_cli_from_dict(_commands(args[0]), prog="jarm", args=args)


@contextlib.contextmanager
def _colours() -> Iterator[None]:
    """Colours in help and errors only on terminals, and only if wanted: a parser that looks at TERM leaves them out."""
    before, wanted = os.environ.get("TERM"), not os.environ.get("NO_COLOR")
    if not (wanted and sys.stdout.isatty() and sys.stderr.isatty()):
        os.environ["TERM"] = "dumb"
    try:
        yield
    finally:
        os.environ.pop("TERM", None)
        if before is not None:
            os.environ["TERM"] = before


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
      args: its words, without `jarm`; by default those of this process.

    Returns:
      The exit code: 0 if all went well; 1 with one sentence on standard error if not; 2 if the words are no command
      line; 130 if a signal stopped it, with what was done on disk; 141 if the reader of standard output has gone.
    """
    try:
        with any_text():
            words = sys.argv[1:] if args is None else args
            check_arguments(words)
            command = _read(words)
            from jarm.core.settings import set_process  # with JAX, which help does without

            set_process()
            leavable(command)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    except (JarmError, Refused) as error:
        complain(error)
        return 130 if isinstance(error, Stopped) else 1
    except KeyboardInterrupt:
        complain("stopped; the same command goes on from what is on disk.")
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        complain(f"{error.strerror or type(error).__name__}{f': {error.filename}' * (error.filename is not None)}.")
        return 1
    return 0


def _stop_at_once(*_: object) -> NoReturn:
    complain("stopped before it began.")
    os._exit(130)


def command() -> NoReturn:
    """Run the command line of this process, and end it."""
    for number in (signal.SIGINT, signal.SIGTERM):  # while modules are imported, where an exception may be lost
        signal.signal(number, _stop_at_once)
    code = main()
    if was_left():  # a thread may be compiling, and would be waited for
        from jarm.core.files import remove_drafts  # with JAX, as above

        remove_drafts()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
