"""Prompts and responses of tables and datasets, in the usual layouts.

The first of `LAYOUTS` whose columns a table has decides how it is read, together with the types of these columns;
`docs/data.md` has the rules. Each error is one sentence that names the file and the row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jarm.core.files import PathLike
from jarm.core.messages import nearest
from jarm.core.status import JarmError
from jarm.data.arrow import is_list, is_text
from jarm.data.sources import RESPONSES, Source, read_sources
from jarm.data.store import canonical, fields, fill, key_of, without_none
from jarm.data.whole import (
    Conversation,
    conversations_hold_prompts,
    split_conversations,
    split_strings,
    strings_hold_prompts,
)

LAYOUTS = (*((name,) for name in RESPONSES), ("chosen", "rejected"), ("messages",))
"""Columns of responses, by precedence. The first three need a column of prompts, the last takes none."""

TEMPLATE, JOINED, WHOLE = "{prompt}\n\n{response}", "{prompt}{response}", "{response}"


@dataclass(frozen=True)
class Places:
    """Places of texts in the input: `places[i]` is a place in words, such as `a.jsonl, line 12, response 3`.

    Attributes:
      names: names of the files.
      starts: index of the first text of each file.
      counted: unit of the rows of each file, `row` from 0 or `line` from 1.
      rows: row or line of each text.
      slots: position of each text among the responses of its row.
      columns: columns of the slots, where responses stand in columns of their own.
    """

    names: list[str]
    starts: list[int]
    counted: list[str]
    rows: np.ndarray
    slots: np.ndarray
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        place = f"{self.names[file]}, {self.counted[file]} {self.rows[index]}"
        if not self.columns:
            return f"{place}, response {self.slots[index]}"
        return f"{place}, {self.columns[self.slots[index]]}" if len(self.columns) > 1 else place


class Texts(NamedTuple):
    """Texts, each one prompt and one response.

    Attributes:
      columns: `prompt`, `response` and the extra columns, all of one length. A prompt or a response is a str or a list
        of messages; a response of one message is the content of the message.
      places: place of each text in the input.
      layout: layout of the input, in words.
      template: default template that joins prompt and response.
      notes: what a user should know of how the input was read, in sentences.
    """

    columns: dict[str, list]
    places: Places
    layout: str
    template: str
    notes: tuple[str, ...] = ()

    def row(self, index: int) -> dict[str, Any]:
        """Columns of one text."""
        return {name: values[index] for name, values in self.columns.items()}

    def prompts(self, rows: Sequence[int] | np.ndarray | None = None) -> tuple[list[str], np.ndarray]:
        """Prompts of some texts, by default all, `[k]`; and their numbers, `[k]`, from 0 as they first appear."""
        values = self.columns["prompt"]
        some = values if rows is None else [values[row] for row in rows]
        prompts = [value if isinstance(value, str) else canonical(value) for value in some]
        numbers: dict[str, int] = {}
        return prompts, np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], np.int64)

    def keys(self, template: str) -> list[str]:
        """Key of each text in a store of this template."""
        rows = zip(*self.columns.values(), strict=True)
        return [key_of(fill(template, dict(zip(self.columns, row, strict=True)))) for row in rows]


def check_template(template: str) -> None:
    """Refuse a template that would lose a part of the texts, or write braces into them.

    Args:
      template: columns in single braces, the responses among them.

    Raises:
      JarmError: other braces, or no `{response}`.

    Example:
      >>> check_template("Q: {prompt} A: {response}")
      >>> check_template("{{ prompt }} {response}")
      Traceback (most recent call last):
      jarm.core.status.JarmError: The template '{{ prompt }} {response}' has braces that are not around the name of a \
column: write columns in single braces, such as '{prompt} {response}', and no other braces.
    """
    names, rest = fields(template), fill(template, dict.fromkeys(fields(template), ""))
    cure = "write columns in single braces, such as '{prompt} {response}', and no other braces."
    if "{" in rest or "}" in rest:
        raise JarmError(f"The template {template!r} has braces that are not around the name of a column: {cure}")
    if not names:
        raise JarmError(f"The template {template!r} names no column: {cure}")
    if "response" not in names:
        raise JarmError(
            f"The template {template!r} leaves the responses out, so all texts of a prompt would be one: put "
            "{response} where they belong; columns of other names are given by --response-columns."
        )


def extra_fields(template: str) -> list[str]:
    """Columns that a template names besides prompt and response."""
    return [name for name in fields(template) if name not in ("prompt", "response")]


def read_texts(
    inputs: Sequence[PathLike],
    *,
    prompt: str | None = None,
    responses: Sequence[str] = (),
    extra: Sequence[str] = (),
    split: str | None = None,
    as_given: bool = False,
) -> Texts:
    """Read prompts and responses; a row with several responses gives as many texts, in the order of the row.

    Args:
      inputs: `.jsonl` and `.parquet` files, folders of them (read in the order of their names), folders that
        `datasets.save_to_disk` wrote, and ids of datasets on the Hugging Face hub; all of one layout.
      prompt: column of prompts, where it is not `prompt`.
      responses: columns of responses, where they have none of the usual names.
      extra: further columns to read; a value is repeated for each response of its row.
      split: split of a dataset; by default `train`.
      as_given: take responses that begin with their prompt in some rows only as answers that repeat it.

    Raises:
      JarmError: an input is missing, damaged, or of no known layout, a text is missing, responses begin with their
        prompt in some rows only, or `datasets` is needed and not installed.
    """
    wanted = _Wanted(prompt, tuple(responses), tuple(extra), as_given)
    parts = []
    for source in read_sources(inputs, wanted.possible(), wanted.needed, split):
        try:
            parts.append(_read(source, wanted))
        except UnicodeDecodeError as error:  # Parquet files can hold any bytes as text
            raise JarmError(
                f"{source.name}: {_undecodable(source)} holds bytes that are no UTF-8 ({error.reason}): write it again "
                "as UTF-8."
            ) from None
    if not parts:
        raise JarmError("There is no input: give a .jsonl or .parquet file, a folder of them, or a dataset.")
    for part in parts:
        if part.layout != parts[0].layout:
            raise JarmError(
                f"{parts[0].places.names[0]} is read as {parts[0].layout}, and {part.places.names[0]} as "
                f"{part.layout}: embed them one after the other, with one template."
            )
    return parts[0] if len(parts) == 1 else _joined(parts)


def _undecodable(source: Source) -> str:
    """The first value that is no UTF-8, in words."""
    for name in source.columns.table.column_names:
        for row, value in enumerate(source.columns.table[name]):
            try:
                value.as_py()
            except UnicodeDecodeError:
                return f"{name} in {source.at(row).removeprefix(f'{source.name}, ')}"
    return "a column"


def _joined(parts: list[Texts]) -> Texts:
    places = [part.places for part in parts]
    return Texts(
        {name: list(itertools.chain(*(part.columns[name] for part in parts))) for name in parts[0].columns},
        Places(
            names=[place.names[0] for place in places],
            starts=np.cumsum([0, *(len(place) for place in places[:-1])]).tolist(),
            counted=[place.counted[0] for place in places],
            rows=np.concatenate([place.rows for place in places]),
            slots=np.concatenate([place.slots for place in places]),
            columns=places[0].columns,
        ),
        parts[0].layout,
        parts[0].template,
        tuple(itertools.chain(*(part.notes for part in parts))),
    )


# Choice of columns


class _Wanted(NamedTuple):
    """Names of columns that the user gave, and whether rows that begin with their prompt are taken as they are."""

    prompt: str | None
    responses: tuple[str, ...]
    extra: tuple[str, ...]
    as_given: bool

    def chosen(self, name: str, names: list[str]) -> tuple[str | None, tuple[str, ...]]:
        """The column of prompts, if any, and the columns of responses of a table called `name`."""
        for column in (*self.named(), *self.extra):
            if column not in names:
                raise JarmError(f"{name} has no column {column!r}{nearest(column, names)}: it has {', '.join(names)}.")
        prompt = self.prompt or ("prompt" if "prompt" in names else None)
        if self.responses:
            return prompt, self.responses
        for layout in LAYOUTS:
            if set(layout) <= set(names):
                if layout == ("messages",):
                    if self.prompt is None:
                        return None, layout
                elif prompt is not None or len(layout) > 1:
                    return prompt, layout
        lacking = "response" if prompt else "prompt"
        raise JarmError(
            f"{name} has no column {lacking!r}{nearest(lacking, names)}; of {', '.join(names)}, name that of the "
            "prompts (`--prompt-column`) and those of the responses (`--response-columns`)."
        )

    def named(self) -> list[str]:
        """Columns of prompts and responses that the user gave."""
        return [*([] if self.prompt is None else [self.prompt]), *self.responses]

    def needed(self, name: str, names: list[str]) -> list[str]:
        """All columns to read of a table with these names."""
        prompt, responses = self.chosen(name, names)
        return list(dict.fromkeys([*([] if prompt is None else [prompt]), *responses, *self.extra]))

    def possible(self) -> list[str]:
        """All columns that may have to be read of a table whose names are not known yet."""
        return [*self.named(), *self.extra, "prompt", *itertools.chain(*LAYOUTS)]


# Values of the columns

_TEXT, _MESSAGES, _LISTS = "text", "messages", "lists of texts"
_KEYS = frozenset(("role", "content"))


def _read(source: Source, wanted: _Wanted) -> Texts:
    """The texts of a table."""
    prompt, responses = wanted.chosen(source.name, source.columns.names)
    kind = _kind(source, responses)
    given = None if prompt is None else _values(source, prompt, _kind(source, [prompt]))
    prompts: list[Any] = given or []
    sides: list[list[Any]]
    labels: tuple[str, ...] = ()
    layout, template = " + ".join([*([] if prompt is None else [prompt]), *responses]), TEMPLATE
    if kind == _LISTS:
        rows, answers = _flattened(source, responses, given)
        slots = np.arange(len(rows)) - np.searchsorted(rows, rows)
        sides = [answers[start:end] for start, end in itertools.pairwise([*np.flatnonzero(slots == 0), len(rows)])]
        whole, notes = strings_hold_prompts(source, " and ".join(responses), prompts, sides, wanted.as_given)
    else:
        sides, labels = [_answers(source, name, kind) for name in responses], responses
        whole, notes = _hold_prompts(source, responses, given, sides, kind, wanted.as_given)
        if whole and (given is None or len(sides) > 1 or kind == _MESSAGES):
            template = JOINED if kind == _TEXT else TEMPLATE
            prompts, sides = (split_strings if kind == _TEXT else split_conversations)(sides)
            if kind == _TEXT and not any(prompts):
                raise JarmError(
                    f"{source.name}: {' and '.join(responses)} have no prompts, and no common beginning in any row "
                    "that could be one: name the column of the prompts (`--prompt-column`)."
                )
        rows, slots = np.divmod(np.arange(len(sides[0]) * len(sides)), len(sides))
        answers = [content(answer) for row in zip(*sides, strict=True) for answer in row]
    if whole:
        layout = f"{' + '.join(responses)}, which begin with the prompt"
        if template == TEMPLATE and kind != _MESSAGES:
            template = WHOLE
            notes = (
                f"{source.name}: every {responses[0]} begins with the prompt: by default it is the whole text, "
                f"--template '{WHOLE}'.",
            )
    if prompt is not None and None in prompts:
        source.column(prompt)
    order = rows.tolist()
    for row, answer in zip(order, answers, strict=True):
        if not answer and not _says(prompts[row]):
            raise JarmError(f"{source.at(row)}: prompt and response are both empty; write them, or leave the row out.")
    columns = {**{name: _extra(source, name) for name in wanted.extra}, "prompt": prompts}
    lines = source.columns.lines
    places = Places(
        names=[source.name],
        starts=[0],
        counted=["row" if lines is None else "line"],
        rows=rows if lines is None else lines[rows],
        slots=slots.astype(np.int32),
        columns=labels,
    )
    columns = {name: [values[row] for row in order] for name, values in columns.items()}
    return Texts({**columns, "response": answers}, places, layout, template, notes)


def _extra(source: Source, name: str) -> list[Any]:
    """A further column, without gaps; NaN is one."""
    values = source.column(name).to_pylist()
    gap = next((row for row, value in enumerate(values) if value != value), None)
    if gap is not None:
        raise JarmError(f"{source.at(gap)}: {name} is NaN; write a value, or leave the row out.")
    return values


def _flattened(source: Source, responses: Sequence[str], prompts: list[Any] | None) -> tuple[np.ndarray, list[Any]]:
    """The row of each response of columns of lists, and the responses: of a row, those of one column after another."""
    if prompts is None:
        raise JarmError(
            f"{source.name}: {' and '.join(responses)} holds lists of responses: name the column of the prompts "
            "(`--prompt-column`)."
        )
    rows, elements = zip(*map(source.flattened, responses), strict=True)
    of, answers = np.concatenate(rows), list(itertools.chain.from_iterable(each.to_pylist() for each in elements))
    order = np.argsort(of, kind="stable")
    return of[order], [answers[at] for at in order]


def _hold_prompts(
    source: Source, names: Sequence[str], prompts: list[Any] | None, sides: list[list[Any]], kind: str, as_given: bool
) -> tuple[bool, tuple[str, ...]]:
    """Whether columns of responses hold their prompts, and notes for the user."""
    if prompts is None:
        return True, ()
    if kind == _MESSAGES:
        return conversations_hold_prompts(source, names, prompts, sides), ()
    return strings_hold_prompts(source, " and ".join(names), prompts, zip(*sides, strict=True), as_given)


def _kind(source: Source, names: Sequence[str]) -> str:
    """Kind of the values of columns, alike in all: text, messages or lists of texts."""
    kinds = [_kind_of(source, name) for name in names]
    if len(set(kinds)) > 1:
        found = ", ".join(f"{name} {kind}" for name, kind in zip(names, kinds, strict=True))
        raise JarmError(f"{source.name}: the columns of responses hold different things ({found}): write them alike.")
    return kinds[0]


def _kind_of(source: Source, name: str) -> str:
    kind = source.columns.table[name].type
    if pa.types.is_null(kind) or is_text(kind):
        return _TEXT
    inner = kind.value_type if is_list(kind) else None
    if inner is not None and (pa.types.is_null(inner) or is_text(inner)):
        return _LISTS
    if inner is not None and pa.types.is_struct(inner):
        types = {field.name: field.type for field in inner}
        if all(key in types and (is_text(types[key]) or pa.types.is_null(types[key])) for key in _KEYS):
            return _MESSAGES
    raise JarmError(
        f"{source.at(0)}: {name} holds {kind}: give text, a list of messages with role and content, both of them text, "
        "or a list of responses."
    )


def _values(source: Source, name: str, kind: str) -> list[Any]:
    """A column of text or messages; None where a value is missing."""
    column = source.columns.table[name]
    if kind == _LISTS:
        raise JarmError(f"{source.at(0)}: {name} holds a list that is not of messages: give each a role and a content.")
    if kind == _TEXT:
        return column.to_pylist()
    values: list[Conversation | None] = []
    for chunk in column.chunks:
        messages = _messages(chunk.flatten())
        counts = np.asarray(pc.fill_null(pc.list_value_length(chunk), 0))
        ends = np.cumsum(counts)
        bad = next((at for at, message in enumerate(messages) if not message.keys() >= _KEYS), None)
        if bad is not None:
            row = len(values) + int(np.searchsorted(ends, bad, side="right"))
            raise JarmError(f"{source.at(row)}: a message of {name} has no role or no content; give each message both.")
        parts = [messages[start:end] for start, end in itertools.pairwise([0, *ends.tolist()])]
        values += [None if null else part for null, part in zip(chunk.is_null().to_pylist(), parts, strict=True)]
    return values


def _messages(values: pa.StructArray) -> Conversation:
    """Messages as Python dictionaries, without the keys that Arrow adds as nulls."""
    if {field.name for field in values.type} == _KEYS:
        roles, contents = pc.struct_field(values, "role"), pc.struct_field(values, "content")
        if not roles.null_count + contents.null_count:
            pairs = zip(roles.to_pylist(), contents.to_pylist(), strict=True)
            return [{"role": role, "content": content} for role, content in pairs]
    return [without_none(message) or {} for message in values.to_pylist()]


def _answers(source: Source, name: str, kind: str) -> list[Any]:
    """A column of responses: text, or messages that end with one of the assistant."""
    source.column(name)
    values = _values(source, name, kind)
    if kind == _MESSAGES:
        for row, messages in enumerate(values):
            if not messages:
                raise JarmError(f"{source.at(row)}: {name} is an empty list; fill it, or leave the row out.")
            if messages[-1]["role"] != "assistant":
                raise JarmError(
                    f"{source.at(row)}: {name} ends with a message of {messages[-1]['role']!r}, so there is no "
                    "response; end it with one of 'assistant', or leave the row out."
                )
    return values


def content(answer: str | Conversation) -> str | Conversation:
    """A response; the content, if it is a single message."""
    return answer[0]["content"] if isinstance(answer, list) and len(answer) == 1 else answer


def _says(prompt: str | Conversation) -> bool:
    """Whether a prompt has any text."""
    return bool(prompt) if isinstance(prompt, str) else any(message["content"] for message in prompt)
