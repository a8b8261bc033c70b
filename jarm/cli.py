"""The `jarm` command."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NoReturn

import tyro

from jarm.commands.backtests import backtest_command
from jarm.commands.experiments import (
    bench_command,
    compare_command,
    forecast_command,
    plan_command,
    rules_command,
    sweep_command,
)
from jarm.commands.exports import export_command, serve_command
from jarm.commands.judging import diff_command, evaluate_command
from jarm.commands.models import embed_command, score_command, train_command
from jarm.commands.options import Refused, complain, misused
from jarm.commands.store import store_cut_command, store_export_command, store_info_command, store_verify_command
from jarm.core.files import remove_drafts
from jarm.core.interrupts import Stopped, leavable, was_left
from jarm.core.messages import nearest
from jarm.core.settings import set_process
from jarm.core.status import JarmError
from jarm.core.streams import any_text, quieted, show
from jarm.core.version import __version__
from jarm.runs.grid import check_arguments


def _deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A command with the option `--quiet`, as a function that returns what is to be run once all options are read."""

    @functools.wraps(command)
    def wrapper(*args: Any, quiet: bool = False, **options: Any) -> Callable[[], None]:
        def run() -> None:
            with quieted(quiet):
                command(*args, **options)

        return run

    text = tyro.conf.arg(help="Leave progress and remarks out; results and errors stay.")
    kind = Annotated[bool, tyro.conf.FlagCreatePairsOff, text]
    option = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
    signature = inspect.signature(command)
    hints = {**typing.get_type_hints(command, include_extras=True), "quiet": kind}
    parameters = [each.replace(annotation=hints[each.name]) for each in signature.parameters.values()]
    wrapper.__dict__.update(__signature__=signature.replace(parameters=[*parameters, option]))
    wrapper.__annotations__ = hints
    del wrapper.__wrapped__
    return wrapper


_StoreCommand = (
    Annotated[Callable, tyro.conf.subcommand("info", constructor=_deferred(store_info_command))]
    | Annotated[Callable, tyro.conf.subcommand("verify", constructor=_deferred(store_verify_command))]
    | Annotated[Callable, tyro.conf.subcommand("cut", constructor=_deferred(store_cut_command))]
    | Annotated[Callable, tyro.conf.subcommand("export", constructor=_deferred(store_export_command))]
)


def _store(command: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[_StoreCommand]]) -> Any:
    """Inspect, check, repair or export a store of embeddings."""
    return command


COMMANDS: dict[str, Callable[..., Any]] = {
    "backtest": _deferred(backtest_command),
    "bench": _deferred(bench_command),
    "compare": _deferred(compare_command),
    "diff": _deferred(diff_command),
    "embed": _deferred(embed_command),
    "evaluate": _deferred(evaluate_command),
    "export": _deferred(export_command),
    "forecast": _deferred(forecast_command),
    "plan": _deferred(plan_command),
    "rules": _deferred(rules_command),
    "score": _deferred(score_command),
    "serve": _deferred(serve_command),
    "store": _store,
    "sweep": _deferred(sweep_command),
    "train": _deferred(train_command),
}
STORE_COMMANDS = ("info", "verify", "cut", "export")


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
        return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="jarm", args=args)


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
    set_process()
    try:
        with any_text():
            words = sys.argv[1:] if args is None else args
            check_arguments(words)
            command = _read(words)
            leavable(command)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    except (JarmError, Refused) as error:
        complain(error)
        return 130 if isinstance(error, Stopped) else 1
    except KeyboardInterrupt:
        complain("stopped; the same command goes on from here.")
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        complain(f"{error.strerror or type(error).__name__}{f': {error.filename}' * (error.filename is not None)}.")
        return 1
    return 0


def command() -> NoReturn:
    """Run the command line of this process, and end it."""
    code = main()
    if was_left():  # a thread may be compiling, and would be waited for
        remove_drafts()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
