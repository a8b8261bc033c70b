"""A table of responses, and their embeddings in an `.npy` of the same order or in a store."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jarm.core.columns import smallest
from jarm.core.files import PathLike, described
from jarm.core.messages import listed, nearest
from jarm.core.status import JarmError
from jarm.core.tables import Origin, ResponseTable, TrainTest
from jarm.data.arrow import is_number, is_text
from jarm.data.prompts import TEST_SHARE, on_test_side, read_prompts
from jarm.data.readers import read_columns, refuse_nonfinite
from jarm.data.rows import open_embeddings, stored_rows
from jarm.data.sources import CHOSEN, RESPONSES, Source, are_pairs, one_row_a_response
from jarm.data.store import EmbeddingStore, fields, fill, key_of
from jarm.data.texts import content
from jarm.data.words import bag_cosine

AUTOMATIC = {"length": "response", "position": None, "prompt_cosine": "prompt and response"}
"""Attributes that a table has by itself, and the columns that they are made of."""

RESERVED = ("gold", "oracle", "mean response", "first component", "ceiling")
"""Names that an attribute cannot have: those of the target and of reference lines."""


def load_table(
    table: PathLike,
    embeddings: PathLike,
    target: str | None = None,
    *,
    attributes: str | Sequence[str] = (),
    split: str | None = None,
    validate: bool = True,
    allow_leakage: bool = False,
) -> TrainTest:
    """Read a Parquet or JSONL table of responses, and their embeddings from an `.npy` or a store.

    Rows of one `prompt_id` (of one `prompt`, without that column) are the responses of one prompt, wherever they
    stand; prompts are in order of first appearance. Prompts with fewer responses than others are padded and masked.
    Where the table has both columns, rows of one id have to have the same prompt, and one prompt under two ids has to
    be on one side of the split.
    A row may also hold a list of `responses` and a list of their scores: it counts as a row for each response.

    Args:
      table: `.parquet` or `.jsonl`.
      embeddings: `.npy` (n, d) in the table's order, or the folder of an `EmbeddingStore`, whose rows are found by
        their texts: its template filled in with the table's columns. Either is memory-mapped and never copied.
      target: column of gold scores (arbitrary units, larger is better); None for a table without scores, whose
        prompts are all in the training table, unless a column says otherwise.
      attributes: further columns of numbers, each read as an attribute of its name; names, or a text with commas
        between.
      split: column of `train` or `test`, the same in all rows of a prompt; by default `split` if the table has it,
        else a hash of each prompt puts about a quarter of the prompts in the test set of a table with scores.
      validate: whether to read all embeddings of an `.npy` once in search of NaN and infinities; a store has none.
      allow_leakage: whether one prompt may be in the training and in the test set, under two ids.

    Returns:
      Train and test tables over one store. Beside the `attributes` asked for they have those that the columns allow:
      `length` (characters of `response`), `position` (index in the prompt), `prompt_cosine` (of the word counts of
      `prompt` and `response`). A column of one of these names takes its place.

    Raises:
      JarmError: a file is missing or damaged, a column is missing or has gaps, the two files disagree, the store
        lacks a text, a value is not finite, ids and prompts disagree, a prompt is on both sides of the split, a side
        has no prompt with two responses, or the rows are pairs, which `load_pairs` reads.

    Example:
      >>> import json, pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> rows = [{"prompt": f"p{p}", "response": "no" * r, "score": r} for p in range(6) for r in (1, 2)]
      >>> _ = (folder / "rows.jsonl").write_text("\\n".join(map(json.dumps, rows)))
      >>> np.save(folder / "rows.npy", np.arange(36.0).reshape(12, 3))  # one row of width 3 per response
      >>> train, test = load_table(folder / "rows.jsonl", folder / "rows.npy", "score")
      >>> train.shape[1:], len(train.rows) + len(test.rows)
      ((2, 3), 6)
      >>> train.gold[0], train.attributes["length"][0]
      (array([1., 2.], dtype=float32), array([2., 4.], dtype=float32))
      >>> train, test = load_table(folder / "rows.jsonl", folder / "rows.npy")  # without scores nothing is held out
      >>> len(train.rows), len(test.rows), train.gold
      (6, 0, None)
    """
    whole = whole_table(
        table,
        embeddings,
        target,
        attributes=attributes,
        split=split,
        validate=validate,
        allow_leakage=allow_leakage,
        hold_out=target is not None,
    )
    tables = split_by(whole.table, whole.is_test)
    return check_sides(tables, str(table), one_side=target is None)


class Whole(NamedTuple):
    """A table before it is split.

    Attributes:
      table: all P prompts.
      is_test: `[P]` bool, those of the test side.
      row: `[P, R]` row of each response in the file, from 0; any where the mask of the table is false.
    """

    table: ResponseTable
    is_test: np.ndarray
    row: np.ndarray


def whole_table(
    table: PathLike,
    embeddings: PathLike,
    target: str | None,
    *,
    attributes: str | Sequence[str] = (),
    split: str | None = None,
    validate: bool = True,
    allow_leakage: bool = False,
    hold_out: bool = True,
) -> Whole:
    """The table that `load_table` splits, with arguments and errors as there; a side may be empty.

    Without `hold_out`, no prompt is a test prompt unless a column says so.
    """
    name, store = str(table), open_embeddings(embeddings)
    attributes = attribute_names(name, attributes)
    for what, column in (("target", target), ("split", split)):
        if not isinstance(column, str | None):
            raise JarmError(f"`{what}` is {column!r}, and the column of a table has a text as its name: give that.")
    scores = [*([] if target is None else [target]), *attributes]
    wanted = ["prompt_id", "prompt", *RESPONSES, split or "split", *scores]
    source = Source(
        name, read_columns(table, [*wanted, *(fields(store.template) if isinstance(store, EmbeddingStore) else [])])
    )
    names, numeric = source.columns.names, source.columns.numeric
    if split is not None and split not in names:
        raise JarmError(f"{name} has no column {split!r}{nearest(split, names)}: it has {', '.join(names)}.")
    if target is None and are_pairs(names):
        raise JarmError(
            f"{name} holds pairs, {' and '.join(CHOSEN)}, and no responses: read it by `jarm.data.pairs.load_pairs`."
        )
    prompts = read_prompts(name, source.columns.table)
    split_by = f"column {split or 'split'}" if (split or "split") in names else f"hash, {TEST_SHARE:.0%} test"
    is_test = np.zeros(len(prompts.ids), bool)
    if hold_out or (split or "split") in names:
        is_test = on_test_side(name, source.columns.table, prompts, split, allow_leakage=allow_leakage)
    else:
        split_by = "no test set"
    columns, row_of = one_row_a_response(source, scores)
    n = len(columns)

    def place(response: int) -> str:
        row = row_of[response]
        within = f", response {response - np.searchsorted(row_of, row)}" if n > len(source.columns.table) else ""
        return f"row {row}{within}"

    if isinstance(store, EmbeddingStore):
        places = _places(name, columns, store, place)
    elif store.ndim != 2:
        raise JarmError(f"{embeddings} has shape {store.shape}: save one row of d numbers per row of {name}.")
    elif len(store) != n:
        raise JarmError(
            f"{name} has {n:,} responses and {embeddings} has {len(store):,} rows: embed the table again, one row a "
            "response."
        )
    else:
        places = np.arange(n)
    values = {score: _scores(name, columns, score, names, numeric, place) for score in scores}
    rows, mask = _grouped(prompts.code[row_of], len(prompts.ids))
    found = {"position": np.tile(np.arange(rows.shape[1], dtype=np.float32), (len(rows), 1))}
    if _is_text(columns, "response"):
        found["length"] = _numpy(pc.fill_null(pc.utf8_length(columns["response"]), 0))[rows]
        if _is_text(columns, "prompt"):
            found["prompt_cosine"] = bag_cosine(columns["prompt"], columns["response"])[rows]
    found |= {attribute: values[attribute][rows] for attribute in attributes}
    if validate and not isinstance(store, EmbeddingStore):
        refuse_nonfinite(store, str(embeddings))
    whole = ResponseTable(
        store=store,
        rows=places[rows],
        mask=mask,
        gold=None if target is None else np.where(mask, values[target][rows], 0),
        attributes={key: np.where(mask, value, 0) for key, value in found.items()},
        provenance={
            "source": "table",
            **described(table=table),
            **_described(store, embeddings, places),
            "dtype": str(store.dtype),
            "target": target,
            **({"attributes": list(attributes)} if attributes else {}),
            "split_by": split_by,
        },
    )
    lines = source.columns.lines
    origin = Origin(
        str(name),
        "row" if lines is None else "line",
        (row_of if lines is None else np.asarray(lines)[row_of])[rows],
        rows,
        prompts.ids,
        functools.partial(_texts, name),
    )
    return Whole(dataclasses.replace(whole, origin=origin), is_test, row_of[rows])


def _texts(name: str) -> tuple[Any, Any]:
    """Prompts and responses of a table, one for each response; None for those that it lacks."""
    source = Source(name, read_columns(name, ["prompt", *RESPONSES]))
    columns, row_of = one_row_a_response(source, ())
    names = columns.column_names
    prompts = source.columns.table["prompt"].take(pa.array(row_of)) if "prompt" in names else None
    return prompts, columns["response"] if "response" in names else None


def split_by(table: ResponseTable, is_test: np.ndarray) -> TrainTest:
    """Split a table by prompt; both sides share its embeddings.

    Args:
      table: P prompts.
      is_test: `[P]` bool.

    Raises:
      JarmError: `is_test` is no such array, but numbers of prompts, for example.
    """
    is_test = np.asarray(is_test)
    if is_test.dtype != bool or is_test.shape != table.rows.shape[:1]:
        raise JarmError(
            f"The mask of test prompts is {is_test.dtype} of shape {is_test.shape}: give one bool for each of the "
            f"{len(table.rows)} prompts, such as `np.isin(np.arange({len(table.rows)}), test_prompts)`."
        )
    sides = table.take(~is_test), table.take(is_test)
    return TrainTest(*(stated(side, split) for side, split in zip(sides, ("train", "test"), strict=True)))


def stated(table: ResponseTable, split: str) -> ResponseTable:
    """The table with the name and the sizes of its side in its provenance."""
    counts = {"split": split, "prompts": len(table.rows), "responses": int(table.mask.sum())}
    return dataclasses.replace(table, provenance={**table.provenance, **counts})


def check_sides(tables: TrainTest, name: str, *, one_side: bool = False) -> TrainTest:
    """The tables, if each side has a prompt with two responses; with `one_side`, that of the test may be empty.

    Raises:
      JarmError: a side has no prompts, or none with two responses.
    """
    for split, table in zip(("train", "test"), tables, strict=True):
        if split == "test" and one_side and not len(table.rows):
            continue
        if not len(table.rows):
            raise JarmError(f"{name} has no {split} prompts: give it more prompts, or a split column with both sides.")
        if (table.mask.sum(axis=1) < 2).all():
            raise JarmError(
                f"{name}: every {split} prompt has one response, so there is no pair to compare; give two responses "
                f"or more to a prompt, and rows of one prompt the same prompt_id."
            )
    return tables


def attribute_names(name: str, attributes: Any) -> list[str]:
    """Names of attributes, each once, from a sequence or a text with commas between.

    Raises:
      JarmError: something is no name, or one that no attribute can have.

    Example:
      >>> attribute_names("rows.jsonl", "help, verbosity")
      ['help', 'verbosity']
    """
    given = attributes.split(",") if isinstance(attributes, str) else attributes
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
        raise JarmError(f"`attributes` is {attributes!r}: give names of columns, as a list of texts.")
    names = list(dict.fromkeys(each.strip() for each in given if each.strip()))
    if taken := [each for each in names if each in RESERVED]:
        raise JarmError(f"{name}: an attribute cannot be called {taken[0]!r}: give the column another name.")
    return names


def _places(name: str, columns: pa.Table, store: EmbeddingStore, place: Callable[[int], str]) -> np.ndarray:
    """Row of the store that has the text of each response, `[n]`."""
    template = store.template
    for column in fields(template):
        if column not in columns.column_names:
            raise JarmError(f"{name} has no column {column!r}, of which {store.path} makes its texts: add it.")
        if columns[column].null_count:
            row = int(np.flatnonzero(np.asarray(columns[column].is_null()))[0])
            raise JarmError(f"{name}, {place(row)}: {column} is missing; {store.path} makes its texts of it.")
    values = {column: columns[column].to_pylist() for column in fields(template)}
    if "response" in values:
        values["response"] = [content(response) for response in values["response"]]
    rows = zip(*values.values(), strict=True)
    texts = (fill(template, dict(zip(fields(template), row, strict=True))) for row in rows)
    return stored_rows(store, map(key_of, texts), name, place)


def _described(store: Any, embeddings: PathLike, places: np.ndarray) -> dict[str, Any]:
    """Provenance of the embeddings."""
    if not isinstance(store, EmbeddingStore):
        return described(embeddings=embeddings)
    return {
        "embeddings": store.path.name,
        "embeddings_fingerprint": store.fingerprint(places),
        "embedded_by": dict(store.meta.made_by),
    }


def _scores(
    name: str,
    columns: pa.Table,
    target: str,
    names: Sequence[str],
    numeric: Sequence[str],
    place: Callable[[int], str],
) -> np.ndarray:
    """A column of finite numbers, one per response, `[n]`, float32 where that is exact."""
    if target not in names:
        if target in AUTOMATIC:
            made = f" of {AUTOMATIC[target]}" if AUTOMATIC[target] else ""
            raise JarmError(
                f"{name} has no column {target!r}, and needs none for an attribute, which jarm makes by itself{made}: "
                "leave the name out of `--attributes`, and give the target a column of scores."
            )
        raise JarmError(f"{name} has no column {target!r}{nearest(target, numeric or names)}; {choice(numeric)}.")
    if not is_number(columns[target].type):
        raise JarmError(f"{name}: column {target!r} holds {columns[target].type}, not numbers; {choice(numeric)}.")
    try:
        gold = _numpy(columns[target])
    except pa.ArrowInvalid:
        raise JarmError(
            f"{name}: {target} holds integers beyond 2**53, which floats cannot tell apart: subtract what they have in "
            "common, or divide them."
        ) from None
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(gold.astype(np.float32)))
    if bad.size and np.isfinite(gold).all():
        raise JarmError(
            f"{name}: {target} is beyond the numbers of float32 (3.4e38) in {listed(bad, place=place)}: divide the "
            "column by what its values have in common."
        )
    if bad.size:
        raise JarmError(
            f"{name}: {target} is missing, NaN or infinite in {listed(bad, place=place)}; score those responses, or "
            f"leave them out of the table and of the embeddings."
        )
    return gold


def _grouped(code: np.ndarray, P: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each prompt in their order, and the mask, both `[P, R]`; padding repeats the prompt's first row."""
    counts = np.bincount(code, minlength=P)
    order = np.argsort(code, kind="stable")
    starts = np.cumsum(counts) - counts
    mask = np.arange(counts.max()) < counts[:, None]
    return order[np.where(mask, starts[:, None] + np.arange(counts.max()), starts[:, None])], mask


def _is_text(columns: pa.Table, name: str) -> bool:
    return name in columns.column_names and is_text(columns[name].type)


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers as `[n]`, float32 where that is exact, else float64; NaN where it is null."""
    return smallest(column.cast(pa.float64()).to_numpy())


def choice(numeric: Sequence[str]) -> str:
    """Part of a sentence that names the columns that could be the target."""
    return f"columns of numbers are {', '.join(numeric)}" if numeric else "it has no column of numbers"
