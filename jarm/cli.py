"""The `jarm` command."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import pathlib
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

import jax
import numpy as np
import tyro

from jarm.acquisition.registry import COSTS, NEEDS, RULES, get_rule
from jarm.core.distributed import in_step, join_if_asked
from jarm.core.interrupts import Stopped, leavable, was_left
from jarm.core.messages import listed, nearest
from jarm.core.settings import set_process
from jarm.core.status import JarmError, printable
from jarm.core.streams import any_text, quieted, show
from jarm.core.version import __version__
from jarm.data.store import EmbeddingStore
from jarm.data.texts import extra_fields, read_texts
from jarm.data.writer import cut
from jarm.embedding.config import EmbedConfig
from jarm.embedding.embed import embed
from jarm.report.figures import run_times
from jarm.report.statistics import interval
from jarm.runs.config import CompareConfig
from jarm.runs.grid import SweepConfig, check_arguments, read_sweep
from jarm.runs.programs import keep_compiled
from jarm.runs.sharing import sweep_status
from jarm.studies.bench import BenchConfig, bench, table
from jarm.studies.compare import compare
from jarm.studies.forecast import ForecastConfig, forecast
from jarm.studies.plan import plan, plan_text
from jarm.studies.score import ScoreConfig, score
from jarm.studies.sweep import sweep
from jarm.studies.train import TrainConfig, train
from jarm.testing.conformance import CHECKS, SPACES, check_rule

T = TypeVar("T")
Store = Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(help="The folder of the store.")]


class _Refused(Exception):
    """What a config refuses while tyro builds it: tyro makes boxes of ValueErrors, and `main` sentences."""


def _built_by(config: type[T]) -> Any:
    """How tyro builds a config: as its class does, but for the errors."""

    @functools.wraps(config, updated=())
    def build(**options: Any) -> T:
        try:
            return config(**options)
        except JarmError as error:
            raise _Refused(str(error)) from error

    build.__doc__ = config.__doc__
    build.__signature__ = inspect.signature(config)  # type: ignore[attr-defined]
    build.__annotations__ = typing.get_type_hints(config)
    return tyro.conf.arg(constructor=build)


def _compare(config: Annotated[CompareConfig, tyro.conf.OmitArgPrefixes, _built_by(CompareConfig)]) -> None:
    """Compare acquisition rules: how fast does each teach a reward model, and does it beat random here?

    With no options it runs on built-in data, a minute or two on two cores. Records are appended run by run: interrupt
    it at any time, and the same command goes on. On your own data:

    jarm compare --data responses.parquet --embeddings embeddings.npy --target score --out out/mine
    """
    keep_compiled()
    summary = compare(config)
    _show_answer(summary["answer"], summary["left_to_learn"] and summary["left_to_learn"]["sentence"])
    for rule, row in summary["rules"].items():
        failed = f" [{row['failed_seeds']} failed: {row['failure']}]" if row["failed_seeds"] else ""
        show(f"{rule:>18}  {row['verdict']}{failed}")
    show(f"\n{config.out / 'summary.md'}\n{config.out / 'curves.png'}")
    _refuse_lost(summary["rules"].items(), ", for the reason above")


def _show_answer(answer: str, left: str | None) -> None:
    """Print the answer, and beside it what is left to learn, if there is something to say."""
    show(f"{answer} {left or ''}".rstrip() + "\n")


def _refuse_lost(rows: Iterable[tuple[str, dict[str, Any]]], why: str) -> None:
    """Fail where a rule has no whole run."""
    if lost := dict.fromkeys(rule for rule, row in rows if row["failed_seeds"] and not row["seeds"]):
        raise JarmError(f"No run of {', '.join(lost)} ran to its end{why}.")


def _embed(config: Annotated[EmbedConfig, tyro.conf.OmitArgPrefixes, _built_by(EmbedConfig)]) -> None:
    """Embed prompts and responses with a language model, once, into a store.

    Stop it at any time, with Control-C or without warning: the same command goes on where it was.

    jarm embed --model HuggingFaceTB/SmolLM2-135M --input responses.jsonl --out out/embeddings
    """
    keep_compiled()
    if config.template is not None:  # as shells pass it on
        config = dataclasses.replace(config, template=config.template.replace("\\n", "\n").replace("\\t", "\t"))
    summary = embed(config)
    if config.show or jax.process_index():
        return
    show(
        f"{summary.distinct:,} distinct of {summary.texts:,} texts; {summary.embedded:,} embedded now, "
        f"{summary.distinct - summary.embedded:,} were there."
    )
    if summary.embedded:
        show(
            f"{summary.embedded / summary.seconds:,.1f} texts/s, {summary.tokens / summary.seconds:,.0f} tokens/s, "
            f"{summary.waste:.1%} padding, {summary.seconds:,.0f} s"
        )
    if summary.truncated:
        show(f"{summary.truncated:,} texts were longer than --max-length, or than the model allows, and were cut.")
    if summary.same_texts:
        show(
            f"{summary.same_texts:,} of {summary.distinct:,} distinct texts are the same tokens as another, with the "
            f"same embedding: {summary.same_pairs:,} of {summary.pairs:,} pairs within prompts, and all pairs of "
            f"{summary.same_prompts:,} of {summary.prompts:,} prompts, are left without a difference."
        )
    if summary.empty_responses:
        show(f"{summary.empty_responses:,} responses are empty; they were embedded as any other.")
    for store in summary.stores:
        show(store)


def _sweep(
    config: Annotated[tuple[str, ...], tyro.conf.Positional],
    out: pathlib.Path | None = None,
    workers: int | None = None,
    vmap_runs: int | None = None,
    dry_run: bool = False,
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    local_device: int | None = None,
) -> None:
    """Run a grid of comparisons: CONFIG is a .toml with options of `jarm compare` and a table [grid], or a .py,
    which is run as a program.

    Runs are recorded as they finish: stop it at any time, and the same command goes on. See docs/sweeps.md.

    jarm sweep noise.toml

    jarm sweep status out/noise

    Args:
      config: the file; or `status` and the folder of a sweep, or its file.
      out: folder, instead of the file's.
      workers: calls at a time, instead of the file's; 0 takes one per core on a CPU, else 1.
      vmap_runs: runs per call, instead of the file's; 0 takes 1 on a CPU, else as many as fit, up to 64.
      dry_run: plan only, as `jarm plan` does.
      distributed: join the processes that SLURM, Open MPI, Kubernetes or a TPU pod started.
      coordinator: HOST:PORT of process 0, to join processes that were started by hand.
      processes: their number.
      process_id: the number of this one, from 0.
      local_device: the only device of its host that this process takes, from 0, where each device has a process.
    """
    if config[:1] == ("status",) and len(config) == 2:
        _status(pathlib.Path(config[1]))
        return
    if len(config) != 1 or config == ("status",):
        _misused(f"`{' '.join(('jarm sweep', *config))}`: give one file, or `status` and a folder.")
    join_if_asked(distributed, coordinator, processes, process_id, local_device)
    with in_step():
        read = read_sweep(pathlib.Path(config[0]))
    given: dict[str, Any] = {"out": out, "workers": workers, "vmap_runs": vmap_runs}
    given = {name: value for name, value in given.items() if value is not None}
    read = dataclasses.replace(read, base=dataclasses.replace(read.base, **given))
    keep_compiled()
    if dry_run:
        _print_plan(read)
        return
    summary = sweep(read)
    if jax.process_index() == 0:
        _show_answer(summary["answer"], summary["left_to_learn"])
        failed = sum(row["failed_seeds"] for each in summary["settings"] for row in each["rules"].values())
        if failed:
            show(f"{failed:,} run{'s' * (failed != 1)} failed; {read.out / 'summary.md'} says why.")
        show(f"{read.out / 'summary.md'}\n{read.out / 'curves.png'}")
        rows = [row for each in summary["settings"] for row in each["rules"].items()]
        _refuse_lost(sorted(rows, key=lambda row: row[0]), " in some setting, for the reasons there")


def _status(folder: pathlib.Path) -> None:
    status = sweep_status(read_sweep(folder).out if os.path.isfile(folder) else folder)
    state = "running" if status["running"] else "stopped"
    if not status["running"] and status["done"] == status["runs"]:
        state = "done" if status["summarised"] else "stopped before the summary: give the same command once more"
    show(f"{status['done']:,} of {status['runs']:,} runs, {state}")
    for message, count in status["failures"].items():
        show(f"{count:,} failed: {message}")


def _plan(config: Annotated[pathlib.Path, tyro.conf.Positional], measure: bool = True) -> None:
    """Estimate the cost of a sweep: runs, programs, bytes and seconds, measured on some runs of every rule.

    jarm plan noise.toml

    Args:
      config: the file of the sweep.
      measure: compile the programs, and time some runs of every rule on each.
    """
    keep_compiled()
    _print_plan(read_sweep(config), measure=measure)


def _print_plan(config: SweepConfig, *, measure: bool = True) -> None:
    show(plan_text(plan(config, measure=measure)))
    if os.path.isfile(config.out / "progress.json"):
        show(f"{sweep_status(config.out)['done']:,} runs are in {config.out} already")


def _bench(config: Annotated[BenchConfig, tyro.conf.OmitArgPrefixes, _built_by(BenchConfig)]) -> None:
    """Measure the run time and memory of acquisition rules against the number of candidate pairs.

    jarm bench --rules random,dopt,greedy_dopt --sizes 10000,100000 --cores 1
    """
    rows = bench(config)
    show(f"\n{table(rows)}\n\n{config.out / 'bench.md'}")
    try:
        show(run_times(rows, config.out / "bench")[0])
    except JarmError as error:  # without matplotlib there is still a table
        show(error)


def _forecast(config: Annotated[ForecastConfig, tyro.conf.OmitArgPrefixes, _built_by(ForecastConfig)]) -> None:
    """Forecast how many labels active choice will save on your embeddings, before any pair is labelled.

    Gold rewards are drawn from a family of teachers, and campaigns simulated on them. With `--labels`, a file of
    labelled pairs, teachers that fit them count more.

    jarm forecast --data responses.parquet --embeddings embeddings.npy --out out/forecast
    """
    keep_compiled()
    summary = forecast(config)
    show(f"{summary['answer']}\n\n{config.out / 'forecast.md'}\n{config.out / 'forecast.png'}")


def _train(config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes, _built_by(TrainConfig)]) -> None:
    """Fit a reward model to labelled pairs or to scores, measure it on other prompts, and save it.

    jarm train --data pairs.parquet --embeddings out/embeddings --out out/model
    """
    keep_compiled()
    found = train(config)
    accuracy, length = found["accuracy"], found["length"]
    show(
        f"{found['labels']:,} labels of {found['prompts']['train']:,} prompts. On {found['test_pairs']:,} pairs of "
        f"{found['prompts']['test']:,} other prompts: accuracy {accuracy['mean']:.3f} "
        f"{interval(accuracy['low'], accuracy['high'])}"
        + (f", the longer response {length['mean']:.3f}" if length else "")
        + f", loss {found['nll']:.3f} nats, calibration error {found['calibration_error']:.3f}."
    )
    for row in found["curve"]:
        show(f"{row['labels']:>9,} labels  accuracy {row['accuracy']:.3f}")
    show(f"\n{config.out}")


def _score(config: Annotated[ScoreConfig, tyro.conf.OmitArgPrefixes, _built_by(ScoreConfig)]) -> None:
    """Score responses with a saved reward model, and rank those to one prompt.

    jarm score --model out/model --data answers.jsonl --embeddings out/embeddings --out out/scores.jsonl
    """
    keep_compiled()
    found = score(config)
    show(
        f"{found['responses']:,} responses to {found['prompts']:,} prompts; the best of each is {found['best_of']:.2f} "
        f"logits above its mean.\n\n{config.out}"
    )


def _rules(check: str | None = None) -> None:
    """List the acquisition rules, or check one of your own.

    jarm rules --check my_rules.py:best_rule

    Args:
      check: a rule to run the conformance suite on, by name or as FILE.py:FUNCTION, instead of the list.
    """
    if check is not None:
        try:
            check_rule(get_rule(check))
        except AssertionError as error:
            raise JarmError(f"{check} does not conform: {error}.") from error
        show(f"{check} conforms: {', '.join(CHECKS)}, on pairs {', '.join(SPACES)}.")
        return
    for name, entry in RULES.items():
        needs = ", ".join(NEEDS[need] for need in entry.needs)
        mark = "; contrib" * entry.contrib
        show(f"{name:<23} {entry.summary}\n{'':<23} cost {entry.cost}; needs {needs or 'the candidates alone'}{mark}")
    show(f"\n{COSTS}")


def _store_info(store: Store) -> None:
    """Show the contents and the provenance of a store of embeddings."""
    for name, value in EmbeddingStore(store).info().items():
        show(f"{name:<24} {value if isinstance(value, str) else json.dumps(value)}")


def _store_verify(store: Store) -> None:
    """Read every byte of a store and compare it with its checksums."""
    opened = EmbeddingStore(store)
    damage = opened.verify()
    if damage:
        places = ", ".join(f"{shard} rows {first:,} to {last:,}" for shard, first, last in damage[:3])
        more = f" and {len(damage) - 3:,} more places" if len(damage) > 3 else ""
        raise JarmError(f"{store} is damaged ({places}{more}): copy these shards again from the original store.")
    show(f"{len(opened):,} rows are as they were written.")
    if opened.uncommitted:
        show(
            f"{opened.uncommitted:,} bytes behind them are of an append that is under way, or was cut short: the next "
            "writer drops them."
        )


def _store_cut(store: Store) -> None:
    """Keep the rows of a damaged store before its first damage, and give up what came after, to embed that again."""
    rows, size = cut(store)
    show(f"{rows:,} rows are kept, and {size:,} bytes behind them given up.")


def _store_export(
    store: Store,
    out: pathlib.Path,
    table: tuple[str, ...] = (),
    prompt_column: str | None = None,
    response_columns: tuple[str, ...] = (),
    split: str | None = None,
) -> None:
    """Write rows of a store to one file, with their keys.

    Args:
      out: an .npy, which gets NAME.keys.txt beside it, or a .safetensors.
      table: embedded tables, whose texts choose and order the rows; by default all rows in the store's order.
      prompt_column: of the table, as for `jarm embed`.
      response_columns: likewise.
      split: likewise.
    """
    opened, keys = EmbeddingStore(store), None
    if table:
        extra = extra_fields(opened.template)
        texts = read_texts(
            table, prompt=prompt_column, responses=response_columns, extra=extra, split=split, as_given=True
        )
        keys = texts.keys(opened.template)
        missing = np.flatnonzero(opened.indices(keys) < 0)
        if missing.size:
            places = listed(missing, place=lambda at: texts.places[at])
            raise JarmError(f"{store} lacks {missing.size:,} of {len(keys):,} texts, {places}: embed them into it.")
    opened.export(out, keys)
    show(out)


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
    Annotated[Callable, tyro.conf.subcommand("info", constructor=_deferred(_store_info))]
    | Annotated[Callable, tyro.conf.subcommand("verify", constructor=_deferred(_store_verify))]
    | Annotated[Callable, tyro.conf.subcommand("cut", constructor=_deferred(_store_cut))]
    | Annotated[Callable, tyro.conf.subcommand("export", constructor=_deferred(_store_export))]
)


def _store(command: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[_StoreCommand]]) -> Any:
    """Inspect, check, repair or export a store of embeddings."""
    return command


COMMANDS: dict[str, Callable[..., Any]] = {
    "bench": _deferred(_bench),
    "compare": _deferred(_compare),
    "embed": _deferred(_embed),
    "forecast": _deferred(_forecast),
    "plan": _deferred(_plan),
    "rules": _deferred(_rules),
    "score": _deferred(_score),
    "store": _store,
    "sweep": _deferred(_sweep),
    "train": _deferred(_train),
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
            _misused(f"`{name}` needs a command: give one of {', '.join(known)}.")
        if not word.startswith("-") and word not in known:
            _misused(f"There is no command `{name} {word}`{nearest(word, known)}: `{name} --help` lists them.")
    return _parse(args)


def _misused(sentence: str) -> NoReturn:
    _complain(sentence)
    raise SystemExit(2)


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
    except (JarmError, _Refused) as error:
        _complain(error)
        return 130 if isinstance(error, Stopped) else 1
    except KeyboardInterrupt:
        _complain("stopped; the same command goes on from here.")
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        _complain(f"{error.strerror or type(error).__name__}{f': {error.filename}' * (error.filename is not None)}.")
        return 1
    return 0


def _complain(what: object) -> None:
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError):
        sentence = f"jarm: {printable(what)}".encode(encoding, "backslashreplace").decode(encoding)
        print(sentence, file=sys.stderr, flush=True)


def command() -> NoReturn:
    """Run the command line of this process, and end it."""
    code = main()
    if was_left():  # a thread may be compiling, and would be waited for
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
