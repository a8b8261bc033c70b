"""Prompts of a table: which rows belong to which, and which are test prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jarm.core.messages import listed
from jarm.core.status import JarmError
from jarm.data.arrow import is_messages, is_text
from jarm.data.store import canonical

TEST_SHARE = 0.25
"""Share of test prompts, by a hash of the prompt, where a table has no split column."""


class Prompts(NamedTuple):
    """The P prompts of a table's rows.

    Attributes:
      code: `[n]` prompt of each row, in order of first appearance.
      ids: their ids, or their texts in a table without ids.
      text: `[P]` number of each prompt's text, equal where texts are; -1 where it is not known.
    """

    code: np.ndarray
    ids: list[int | str]
    text: np.ndarray


def read_prompts(name: str, columns: pa.Table) -> Prompts:
    """The prompts of a table: of its `prompt_id`, or else of its `prompt`. Where it has both, they have to agree.

    Texts are compared exactly. A prompt that is a list of messages counts as its canonical JSON.

    Raises:
      JarmError: there is no such column, an id is missing or of no type for ids, or rows of one id have different
        prompts.
    """
    key = next((key for key in ("prompt_id", "prompt") if key in columns.column_names), None)
    if key is None:
        raise JarmError(f"{name} has neither a column prompt_id nor prompt: add one of them.")
    values = columns[key]
    if values.null_count:
        row = int(np.flatnonzero(np.asarray(values.is_null()))[0])
        raise JarmError(f"{name}, row {row}: {key} is missing; say which prompt the response belongs to.")
    if is_messages(values.type):
        values = _texts(values)
    elif pa.types.is_decimal(values.type) and values.type.scale <= 0:  # integers of more than 64 bits
        values = pa.chunked_array([[str(int(value)) for value in values.to_pylist()]])
    if not (pa.types.is_integer(values.type) or is_text(values.type)):
        raise JarmError(f"{name}: column {key} holds {values.type}: give text or integers, alike for one prompt.")
    code, ids = _encoded(values)
    if key == "prompt" or "prompt" not in columns.column_names:
        return Prompts(code, ids, np.full(len(ids), -1))
    return Prompts(code, ids, _agreeing(name, code, ids, _encoded(_texts(columns["prompt"]))[0]))


def _encoded(values: pa.ChunkedArray) -> tuple[np.ndarray, list[int | str]]:
    """Values as numbers of the distinct ones, in order of first appearance; -1 where one is missing."""
    if is_text(values.type):
        values = values.cast(pa.large_string())  # all texts together may outgrow offsets of 32 bits
    encoded = pc.dictionary_encode(values.combine_chunks())
    return np.asarray(pc.fill_null(encoded.indices, -1)).astype(np.int64), encoded.dictionary.to_pylist()


def _texts(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Prompts as texts; those that are none, such as messages, as canonical JSON."""
    if is_text(values.type):
        return values
    texts = [None if value is None else canonical(value) for value in values.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.large_string())])


def _agreeing(name: str, code: np.ndarray, ids: Sequence[int | str], text: np.ndarray) -> np.ndarray:
    """The text of each prompt, `[P]`, if it has one only."""
    known = np.flatnonzero(text >= 0)
    row_of = np.full(len(ids), -1)
    row_of[code[known][::-1]] = known[::-1]  # the first row of each prompt whose text is known
    other = known[text[known] != text[row_of[code[known]]]]
    if other.size:
        row = int(other[0])
        raise JarmError(
            f"{name}, row {row}: prompt_id is {ids[code[row]]!r} as in row {row_of[code[row]]}, whose prompt is "
            f"another; {_count(other, 'such row')}: give every prompt an id of its own where tables are joined, or "
            "leave prompt_id out."
        )
    return np.where(row_of >= 0, text[row_of], -1)


def _count(rows: np.ndarray, what: str) -> str:
    return f"there is 1 {what}" if len(rows) == 1 else f"there are {len(rows):,} {what}s"


def on_test_side(
    name: str,
    columns: pa.Table,
    prompts: Prompts,
    split: str | None = None,
    *,
    allow_leakage: bool = False,
    at: Callable[[int], str] | None = None,
) -> np.ndarray:
    """Whether each prompt is a test prompt, `[P]` bool: as a column says, or by a hash of the prompt.

    By the hash, prompts of one text are on the side of the first of them.

    Args:
      name: the table, for messages.
      columns: its columns.
      prompts: its prompts.
      split: column of `train` or `test`; by default `split`, if there is one.
      allow_leakage: whether one text may stand on both sides, under two ids.
      at: a row in words, for messages; by default its number.

    Raises:
      JarmError: a value is neither, rows of one prompt differ, or prompts of one text do.
    """
    column, at = split or "split", at or f"{name}, row {{}}".format
    if column not in columns.column_names:
        of = np.arange(len(prompts.ids))
        if not allow_leakage:
            known = prompts.text >= 0
            first, where = np.unique(prompts.text[known], return_index=True)
            of[known] = of[known][where][np.searchsorted(first, prompts.text[known])]
        return np.array([_hashed(prompts.ids[prompt]) < TEST_SHARE for prompt in of])
    values, code = columns[column].to_pylist(), prompts.code
    for row, value in enumerate(values):
        if value not in ("train", "test"):
            raise JarmError(f"{at(row)}: {column} is {value!r}; write train or test.")
    is_test = np.array([value == "test" for value in values])
    per_prompt = np.zeros(len(prompts.ids), bool)
    per_prompt[code] = is_test
    mixed = np.flatnonzero(per_prompt[code] != is_test)
    if mixed.size:
        raise JarmError(
            f"{at(int(mixed[0]))}: {column} is {values[mixed[0]]!r}, but other rows of that prompt say otherwise; "
            f"put all responses of a prompt on one side."
        )
    if not allow_leakage:
        _refuse_leakage(name, column, prompts, per_prompt)
    return per_prompt


def _refuse_leakage(name: str, column: str, prompts: Prompts, is_test: np.ndarray) -> None:
    """Refuse texts that stand on both sides of the split, under different ids."""
    shared = np.intersect1d(prompts.text[is_test], prompts.text[~is_test])
    shared = shared[shared >= 0]
    if not shared.size:
        return
    leaking = [int(np.flatnonzero((prompts.text == shared[0]) & (is_test == side))[0]) for side in (False, True)]
    rows = [int(np.argmax(prompts.code == prompt)) for prompt in leaking]
    ids = " and ".join(repr(prompts.ids[prompt]) for prompt in leaking)
    raise JarmError(
        f"{name}: {listed(rows)} have one and the same prompt, under the ids {ids}, once in train and once in test "
        f"({column}); {_count(shared, 'such prompt')}: keep a prompt on one side, or say that tests on prompts of the "
        "training set are meant (`--allow-leakage`, `allow_leakage=True`)."
    )


def _hashed(prompt: object) -> float:
    """A number in [0, 1) that depends on the prompt alone."""
    return int.from_bytes(hashlib.sha256(str(prompt).encode()).digest()[:8], "big") / 2**64
