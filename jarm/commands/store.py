"""Commands about a store of embeddings: info, verify, cut, export."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import tyro

from jarm.commands.options import deferred
from jarm.core.messages import listed
from jarm.core.status import JarmError
from jarm.core.streams import show
from jarm.data.store import EmbeddingStore
from jarm.data.texts import extra_fields, read_texts
from jarm.data.writer import cut

Store = Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(help="The folder of the store.")]


def store_info_command(store: Store) -> None:
    """Show the contents and the provenance of a store of embeddings."""
    for name, value in EmbeddingStore(store).info().items():
        show(f"{name:<24} {value if isinstance(value, str) else json.dumps(value)}")


def store_verify_command(store: Store) -> None:
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


def store_cut_command(store: Store) -> None:
    """Keep the rows of a damaged store before its first damage, and give up what came after, to embed that again."""
    rows, size = cut(store)
    show(f"{rows:,} rows are kept, and {size:,} bytes behind them given up.")


def store_export_command(
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


_StoreCommand = (
    Annotated[Callable, tyro.conf.subcommand("info", constructor=deferred(store_info_command))]
    | Annotated[Callable, tyro.conf.subcommand("verify", constructor=deferred(store_verify_command))]
    | Annotated[Callable, tyro.conf.subcommand("cut", constructor=deferred(store_cut_command))]
    | Annotated[Callable, tyro.conf.subcommand("export", constructor=deferred(store_export_command))]
)


def store_command(command: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[_StoreCommand]]) -> Any:
    """Inspect, check, repair or export a store of embeddings."""
    return command
