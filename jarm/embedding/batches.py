"""Which texts go through the model together: batches of few shapes and little padding, fixed by the whole input alone.

Texts are put in order of size, cut into chunks that are tokenised one after the other, and sorted by tokens within a
chunk. Where many share a prompt, a chunk keeps the texts of a prompt together and their common tokens are taken out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

CHUNK = 8192
"""Texts in a chunk, about."""
SHAPES, SHARED_SHAPES, PREFIX_SHAPES = 20, 8, 4
"""How many lengths whole texts are padded to, texts behind prefixes, and prefixes: each is a compilation."""

Encoded = tuple[int, np.ndarray]
"""The row of a text, and its token ids."""


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Padded texts: the first `len(rows)` are those of `rows`, the others fill the shape.

    Attributes:
      rows: `[k]` which texts these are.
      tokens: `[B, T]` int32, padded on the right with 0.
      lengths: `[B]` int32; 0 is an empty prefix.
      group: `[B]` int32, the prefix that each continues, or None.
    """

    rows: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    group: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """Batches, after prefixes that they continue, if any; prefixes come as batches whose `rows` are their numbers."""

    batches: list[TokenBatch]
    prefixes: list[TokenBatch]

    @property
    def tokens(self) -> tuple[int, int]:
        """Real tokens, and tokens with padding."""
        every = [*self.prefixes, *self.batches]
        return sum(int(b.lengths[: len(b.rows)].sum()) for b in every), sum(b.tokens.size for b in every)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes that batches may have.

    Attributes:
      lengths: that texts, or what is left of them after a prefix, are padded to; longer ones to `round_up`.
      prefix_lengths: that prefixes are padded to.
      budget: tokens of a batch on one device, padding included.
      devices: that a batch is spread over.
      longest: positions that the model has; nothing is padded beyond them.
      room: tokens of prefixes, padding included, that are held at once.
    """

    lengths: tuple[int, ...]
    prefix_lengths: tuple[int, ...]
    budget: int
    devices: int
    longest: int
    room: int = 0

    def rows(self, length: int, prefix: int = 0) -> int:
        """Texts in a batch of this length; with prefixes fewer, as keys and values take room as well."""
        return max(1, min(self.budget // length, 4 * self.budget // (length + prefix))) * self.devices

    def padded(self, length: int) -> int:
        """The length that a text is padded to."""
        return padded_to(length, self.lengths, self.longest)


def round_up(length: int) -> int:
    """The next of a grid of lengths: multiples of 8, and eight steps from each power of two to the next."""
    step = max(8, (1 << (int(length) - 1).bit_length()) // 16)
    return -(-length // step) * step


def choose_lengths(lengths: Sequence[int], most: int) -> tuple[int, ...]:
    """The lengths of the grid, at most so many, that pad these texts least: exact, by dynamic programming.

    Args:
      lengths: tokens of each text; a sample of them will do.
      most: how many lengths may be chosen; the largest of the grid that is needed is among them.
    """
    grid, counts = np.unique([round_up(length) for length in lengths], return_counts=True)
    m = len(grid)
    texts = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: tokens of the texts up to grid[j - 1], which is chosen; one more choice at each turn.
    cost, chosen = np.where(np.arange(m + 1) == 0, 0.0, np.inf), []
    for _ in range(min(most, m)):
        step = [[cost[i] + (texts[j] - texts[i]) * float(grid[j - 1]) for i in range(j)] or [0.0] for j in range(m + 1)]
        before = np.array([int(np.argmin(row)) for row in step])
        cost = np.minimum(cost, [row[i] for row, i in zip(step, before, strict=True)])
        chosen.append(before)
    out, j = [], m
    for before in reversed(chosen):
        if j:
            out.append(int(grid[j - 1]))
            j = int(before[j])
    return tuple(sorted(out))


def padded_to(length: int, lengths: Sequence[int], longest: int) -> int:
    """The least of `lengths` that holds this one, else its own on the grid; `longest` at most."""
    return min(next((padded for padded in lengths if padded >= length), round_up(length)), longest)


def part_of(full: int, count: int, devices: int) -> int:
    """Room for what is left over, in few shapes: eighths of a full batch, or a power of two where that is less."""
    eighth = -(-full // (8 * devices)) * devices
    return min(full, -(-count // eighth) * eighth, devices << (-(-count // devices) - 1).bit_length())


def make_chunks(sizes: np.ndarray, groups: np.ndarray | None) -> list[np.ndarray]:
    """Cut texts into chunks, the long ones first, or, if grouped, those with long prompts first.

    Args:
      sizes: `[n]` about how long each text is, in any unit; if grouped, how long its prompt is.
      groups: `[n]` int, texts of one number share a prompt; or None. More than `CHUNK` of them are parted.

    Returns:
      Rows of each chunk, the rows of a group side by side.
    """
    if groups is None:
        order = np.argsort(-sizes, kind="stable")
        return [order[at : at + CHUNK] for at in range(0, len(order), CHUNK)]
    order = np.lexsort((groups, -sizes))  # stable, so in order of rows where both are the same
    starts = [*np.flatnonzero(np.diff(groups[order], prepend=-1)), len(order)]
    chunks, first = [], 0
    for start, end in itertools.pairwise(starts):
        if end - first > CHUNK and start > first:
            chunks.append(order[first:start])
            first = start
    chunks.append(order[first:])
    return [chunk[at : at + CHUNK] for chunk in chunks for at in range(0, len(chunk), CHUNK)]


def plain_work(chunks: Iterable[list[Encoded]], shapes: Shapes) -> Iterator[Work]:
    """Batches of chunks in order; texts that do not fill a batch wait for the next chunk."""
    waiting: list[Encoded] = []
    for chunk in chunks:
        batches, waiting = _cut_batches([*waiting, *chunk], shapes, last=False)
        yield Work(batches, [])
    yield Work(_cut_batches(waiting, shapes, last=True)[0], [])


def split_prefixes(texts: list[tuple[int, Encoded]]) -> tuple[list[Encoded], list[Encoded], dict[int, int]]:
    """The tokens that all texts of a group begin with, apart from the rest.

    Args:
      texts: the group of each, and the text.

    Returns:
      Prefixes, numbered from 0; what is left of each text, one token at least; the number of each row's prefix.
    """
    members: dict[int, list[Encoded]] = {}
    for group, text in texts:
        members.setdefault(group, []).append(text)
    prefixes: list[Encoded] = []
    rest: list[Encoded] = []
    number: dict[int, int] = {}
    for each in members.values():
        shared = _common([ids for _, ids in each])
        number |= {row: len(prefixes) for row, _ in each}
        prefixes.append((len(prefixes), each[0][1][:shared]))
        rest += [(row, ids[shared:]) for row, ids in each]
    return prefixes, rest, number


def shared_work(chunk: list[tuple[int, Encoded]], shapes: Shapes) -> list[Work]:
    """The work of a chunk of texts, each with the number of its prompt; in parts where room for prefixes ends."""
    prefixes, rest, number = split_prefixes(chunk)
    longest = padded_to(max(1, *(len(ids) for _, ids in prefixes)), shapes.prefix_lengths, shapes.longest)
    width = shapes.rows(longest)
    if len(prefixes) <= width:
        width, repeats = part_of(width, len(prefixes), shapes.devices), 1
    else:
        repeats = 1 << (-(-len(prefixes) // width) - 1).bit_length()
    if width * repeats * longest > shapes.room and len(prefixes) > 1:
        half = len(prefixes) // 2
        first = [each for each in chunk if number[each[1][0]] < half]
        second = [each for each in chunk if number[each[1][0]] >= half]
        return [*shared_work(first, shapes), *shared_work(second, shapes)]
    heads = [_pad(prefixes[at : at + width], width, longest) for at in range(0, len(prefixes), width)]
    batches = [
        dataclasses.replace(batch, group=_fill([number[row] for row in batch.rows.tolist()], len(batch.tokens)))
        for batch in _cut_batches(rest, shapes, prefix=longest, last=True)[0]
    ]
    return [Work(batches, heads)]


def _common(texts: list[np.ndarray]) -> int:
    """How many tokens all begin with, such that each has one left; none if there is one text."""
    if len(texts) == 1:
        return 0
    shared = min(map(len, texts)) - 1
    for ids in texts[1:]:
        differ = np.flatnonzero(texts[0][:shared] != ids[:shared])
        shared = int(differ[0]) if differ.size else shared
    return shared


def _cut_batches(
    texts: list[Encoded], shapes: Shapes, *, last: bool, prefix: int = 0
) -> tuple[list[TokenBatch], list[Encoded]]:
    """Whole batches, the longest texts first, and what is left; if these are the `last`, it fills a smaller one."""
    texts = sorted(texts, key=lambda text: (-len(text[1]), text[0]))
    batches, at = [], 0
    while at < len(texts):
        length = shapes.padded(len(texts[at][1]))
        count, left = shapes.rows(length, prefix), len(texts) - at
        if left < count:
            if not last:
                break
            count = part_of(count, left, shapes.devices)
        batches.append(_pad(texts[at : at + count], count, length))
        at += count
    return batches, texts[at:]


def _pad(texts: list[Encoded], count: int, length: int) -> TokenBatch:
    tokens, lengths = np.zeros((count, length), np.int32), np.ones(count, np.int32)
    for at, (_, ids) in enumerate(texts):
        tokens[at, : len(ids)] = ids
        lengths[at] = len(ids)
    return TokenBatch(np.array([row for row, _ in texts], np.int64), tokens, lengths)


def _fill(values: list[int], count: int) -> np.ndarray:
    out = np.zeros(count, np.int32)
    out[: len(values)] = values
    return out
