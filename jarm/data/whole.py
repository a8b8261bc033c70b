"""Responses that begin with their prompt: found row by row, and split at the end of the prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from jarm.core.messages import listed
from jarm.core.status import JarmError
from jarm.data.sources import Source

Conversation = list[dict[str, Any]]

REPEATS = 0.1
"""Less than this share of the rows may have responses that begin with their prompt, as answers that repeat it."""

_TURN = "\n\nAssistant:"
_LEAD = re.compile(r"\s*(?:<[^<>\s]{1,40}>|\[[A-Z]{2,5}\])?\s*")  # white space and a special token, as <s> or [CLS]


def strings_hold_prompts(
    source: Source, column: str, prompts: Sequence[Any], rows: Iterable[Sequence[str]], as_given: bool
) -> tuple[bool, tuple[str, ...]]:
    """Whether the strings of every row begin with its prompt; rows without a prompt do not count.

    White space and a special token at the beginning, and white space at the end of a prompt, make no difference.

    Args:
      source: the table.
      column: name of the responses in sentences.
      prompts: prompt of each row.
      rows: responses of each row.
      as_given: take rows that differ from others as they are.

    Returns:
      The answer, and a note where rows differ.

    Raises:
      JarmError: the strings of some rows begin with their prompt, and those of others do not.
    """
    begin = {
        row: all(_begins(text, prompt) for text in texts)
        for row, (prompt, texts) in enumerate(zip(prompts, rows, strict=True))
        if isinstance(prompt, str) and _core(prompt)
    }
    hold, apart = ([row for row, each in begin.items() if each is side] for side in (True, False))
    if not hold or not apart:
        return bool(hold), ()
    found = f"{source.name}: {column} begins with the prompt in {len(hold):,} of {len(begin):,} rows"
    if as_given or len(hold) < REPEATS * len(begin):
        return False, (f"{found} ({_places(source, hold)}), and is read as an answer that repeats it.",)
    which = f"not in {_places(source, apart)}" if len(apart) <= len(hold) else _places(source, hold)
    raise JarmError(
        f"{found} ({which}): write all rows alike, or, if these are answers that repeat it, give the --template that "
        "joins prompt and response."
    )


def _core(text: str) -> str:
    """A prompt without what `_LEAD` matches, and without white space at its end."""
    return text[_lead(text) :].rstrip()


def _lead(text: str) -> int:
    found = _LEAD.match(text)
    return found.end() if found else 0


def _begins(text: str, prompt: str) -> bool:
    return text.startswith(_core(prompt), _lead(text))


def conversations_hold_prompts(
    source: Source, names: Sequence[str], prompts: Sequence[Any], sides: Sequence[Sequence[Conversation]]
) -> bool:
    """Whether all lists of messages are whole conversations, with their prompt, rather than responses.

    Args:
      source: the table.
      names: names of the columns.
      prompts: prompt of each row.
      sides: messages of each row, for each column.

    Raises:
      JarmError: some are, and others are not.
    """
    first = _is_whole(sides[0][0], prompts[0])
    alike: list[tuple[int, str]] = []
    other: list[tuple[int, str]] = []
    for row, conversations in enumerate(zip(*sides, strict=True)):
        for name, messages in zip(names, conversations, strict=True):
            (alike if _is_whole(messages, prompts[row]) == first else other).append((row, name))
    if not other:
        return first
    odd = min(other, alike, key=len)
    row, name = odd[0]
    messages = sides[names.index(name)][row]
    role = messages[0]["role"]
    start = "the prompt" if role == "assistant" and _is_whole(messages, prompts[row]) else f"a message of {role!r}"
    rows = sorted({row for row, _ in odd} - {row})
    more = f" (likewise {_places(source, rows)})" if rows else ""
    raise JarmError(
        f"{source.at(row)}: {name} begins with {start}, and others do not{more}: have all begin with the prompt, or "
        "none."
    )


def _places(source: Source, rows: Sequence[int]) -> str:
    """Some rows in words, without the name of their table."""
    return listed(rows, place=lambda row: source.at(row).removeprefix(f"{source.name}, "))


def _is_whole(messages: Conversation, prompt: Any) -> bool:
    """Whether messages begin with another than the assistant's, or with the prompt, or repeat its text."""
    if messages[0]["role"] != "assistant":
        return True
    if isinstance(prompt, str):
        return bool(prompt.strip()) and any(
            message["role"] != "assistant" and message["content"].strip() == prompt.strip() for message in messages
        )
    return bool(prompt) and messages[: len(prompt)] == prompt


def split_conversations(sides: list[list[Conversation]]) -> tuple[list[Conversation], list[list[Conversation]]]:
    """Split each row at the end of the shared messages, the prompt; a response keeps at least its last message."""
    prompts: list[Conversation] = []
    rests: list[list[Conversation]] = [[] for _ in sides]
    for row in zip(*sides, strict=True):
        first, *others = row
        bound = min(map(len, row)) - 1
        shared = next((at for at in range(bound) if any(other[at] != first[at] for other in others)), bound)
        prompts.append(first[:shared])
        for rest, messages in zip(rests, row, strict=True):
            rest.append(messages[shared:])
    return prompts, rests


def split_strings(sides: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Split each row at the end of the shared beginning, the prompt: the assistant's last turn, or a white space."""
    ends = [_prompt_end(row) if len(row) > 1 else 0 for row in zip(*sides, strict=True)]
    prompts = [text[:end] for text, end in zip(sides[0], ends, strict=True)]
    return prompts, [[text[end:] for text, end in zip(side, ends, strict=True)] for side in sides]


def _prompt_end(texts: Sequence[str]) -> int:
    """Length of the prompt that texts share."""
    first, last = min(texts), max(texts)  # all texts share a beginning that these two share
    same, differs = 0, len(first) + 1
    while differs - same > 1:
        middle = (same + differs) // 2
        if first[same:middle] == last[same:middle]:
            same = middle
        else:
            differs = middle
    turn = first.rfind(_TURN, 0, same)
    if turn >= 0:
        return turn + len(_TURN)
    # The mark extends the last word, so that a white space before it counts.
    words = (first[:same] + "|").rsplit(None, 1)
    return len(words[0]) if len(words) > 1 else 0
