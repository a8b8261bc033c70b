"""The `jarm` command."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Annotated

import jax
import numpy as np
import tyro

from jarm.acquisition.registry import COSTS, NEEDS, RULES, get_rule
from jarm.base import JarmError
from jarm.bench import BenchConfig, bench, table
from jarm.compare import CompareConfig, compare
from jarm.data.files import listed
from jarm.data.store import EmbeddingStore
from jarm.data.texts import extra_fields, read_texts
from jarm.embed import EmbedConfig, embed
from jarm.figures import run_times
from jarm.testing import CHECKS, SPACES, check_rule

Store = Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(help="The folder of the store.")]


def _compare(config: Annotated[CompareConfig, tyro.conf.OmitArgPrefixes]) -> None:
    """Compare acquisition rules: how fast does each teach a reward model, and does it beat random here?

    With no options it runs on built-in data and takes about two minutes. Records are appended run by run: interrupt
    it as you like, and the same command goes on. On your own data:

    jarm compare --data responses.parquet --embeddings embeddings.npy --target score --out out/mine
    """
    _keep_compiled()
    summary = compare(config)
    for rule, row in summary["rules"].items():
        failed = f" [{row['failed_seeds']} failed: {row['failure']}]" if row["failed_seeds"] else ""
        print(f"{rule:>18}  {row['verdict']}{failed}")
    print(f"\n{config.out / 'summary.md'}\n{config.out / 'curves.png'}")


def _embed(config: Annotated[EmbedConfig, tyro.conf.OmitArgPrefixes]) -> None:
    """Embed prompts and responses with a language model, once, into a store.

    Stop it as you like, with Control-C or without warning: the same command goes on where it was.

    jarm embed --model HuggingFaceTB/SmolLM2-135M --input responses.jsonl --out out/embeddings
    """
    _keep_compiled()
    if config.template is not None:  # as shells pass it on
        config = dataclasses.replace(config, template=config.template.replace("\\n", "\n").replace("\\t", "\t"))
    summary = embed(config)
    if config.show or jax.process_index():
        return
    print(
        f"{summary.distinct:,} distinct of {summary.texts:,} texts; {summary.embedded:,} embedded now, "
        f"{summary.distinct - summary.embedded:,} were there."
    )
    if summary.embedded:
        print(
            f"{summary.embedded / summary.seconds:,.1f} texts/s, {summary.tokens / summary.seconds:,.0f} tokens/s, "
            f"{summary.waste:.1%} padding, {summary.seconds:,.0f} s"
        )
    if summary.truncated:
        print(f"{summary.truncated:,} texts were longer than --max-length, or than the model allows, and were cut.")
    if summary.empty_responses:
        print(f"{summary.empty_responses:,} responses are empty; they were embedded as any other.")
    for store in summary.stores:
        print(store)


def _bench(config: Annotated[BenchConfig, tyro.conf.OmitArgPrefixes]) -> None:
    """Measure the run time and memory of acquisition rules against the number of candidate pairs.

    jarm bench --rules random,dopt,greedy_dopt --sizes 10000,100000 --cores 1
    """
    rows = bench(config)
    print(f"\n{table(rows)}\n\n{config.out / 'bench.md'}")
    try:
        print(*run_times(rows, config.out / "bench")[:1])
    except JarmError as error:  # without matplotlib there is still a table
        print(error)


def _keep_compiled() -> None:
    """What goes on, or differs only in numbers, need not compile again."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "jarm" / "compiled"))


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
        print(f"{check} conforms: {', '.join(CHECKS)}, on pairs {', '.join(SPACES)}.")
        return
    for name, entry in RULES.items():
        needs = ", ".join(NEEDS[need] for need in entry.needs)
        print(f"{name:<22} {entry.summary}\n{'':<22} cost {entry.cost}; needs {needs or 'the pool alone'}")
    print(f"\n{COSTS}")


def _store_info(store: Store) -> None:
    """Show what a store of embeddings holds and what made it."""
    for name, value in EmbeddingStore(store).info().items():
        print(f"{name:<24} {value if isinstance(value, str) else json.dumps(value)}")


def _store_verify(store: Store) -> None:
    """Read every byte of a store and compare it with its checksums."""
    opened = EmbeddingStore(store)
    damage = opened.verify()
    if damage:
        places = ", ".join(f"{shard} rows {first:,} to {last:,}" for shard, first, last in damage[:3])
        more = f" and {len(damage) - 3:,} places more" if len(damage) > 3 else ""
        raise JarmError(f"{store} is damaged ({places}{more}): copy these shards again from where the store was made.")
    print(f"{len(opened):,} rows are as they were written.")
    if opened.uncommitted:
        print(
            f"{opened.uncommitted:,} bytes behind them are in no line of the journal: of an append that was cut short, "
            "which the next writer drops, or of a journal that was cut: then copy it again before anything is written."
        )


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
      table: what was embedded; its texts decide which rows, and their order. By default all, in the store's order.
      prompt_column: of the table, as for `jarm embed`.
      response_columns: likewise.
      split: likewise.
    """
    opened, keys = EmbeddingStore(store), None
    if table:
        extra = extra_fields(opened.template)
        texts = read_texts(table, prompt=prompt_column, responses=response_columns, extra=extra, split=split)
        keys = texts.keys(opened.template)
        missing = np.flatnonzero(opened.indices(keys) < 0)
        if missing.size:
            places = listed(missing, place=lambda at: texts.places[at])
            raise JarmError(f"{store} lacks {missing.size:,} of {len(keys):,} texts, {places}: embed them into it.")
    opened.export(out, keys)
    print(out)


_StoreCommand = (
    Annotated[None, tyro.conf.subcommand("info", constructor=_store_info)]
    | Annotated[None, tyro.conf.subcommand("verify", constructor=_store_verify)]
    | Annotated[None, tyro.conf.subcommand("export", constructor=_store_export)]
)


def _store(command: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[_StoreCommand]]) -> None:
    """Look into a store of embeddings, check it, or export it."""


def main(args: list[str] | None = None) -> int:
    """Entry point: 0 if all went well, 1 with one sentence on standard error if not."""
    try:
        commands: dict[str, Callable[..., None]] = {
            "bench": _bench,
            "compare": _compare,
            "embed": _embed,
            "rules": _rules,
            "store": _store,
        }
        tyro.extras.subcommand_cli_from_dict(commands, prog="jarm", args=args)
    except JarmError as error:
        print(f"jarm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\njarm: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
