"""Batches of texts: few shapes and little padding, fixed by the whole input alone.

Texts are put in order of size, cut into chunks that are tokenised one after the other, and sorted by tokens within a
chunk. Where many share a prompt, a chunk keeps the texts of a prompt together, and their common tokens become a prefix.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

CHUNK = 8192
"""Approximate number of texts in a chunk."""
SHAPES, SHARED_SHAPES, PREFIX_SHAPES = 20, 8, 4
"""Numbers of lengths that whole texts, texts behind prefixes, and prefixes are padded to: each is a compilation."""

Encoded = tuple[int, np.ndarray]
"""Row of a text, and its token ids."""


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Padded texts: the first k are those of `rows`, the other B - k fill the shape.

    Attributes:
      rows: `[k]` indices of the texts.
      tokens: `[B, T]` int32, padded on the right with 0.
      lengths: `[B]` int32 tokens; 0 for an empty prefix.
      group: `[B]` int32, the prefix that each text continues, or None.
    """

    rows: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    group: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """Batches, and the prefixes that they continue, if any: batches themselves, with their numbers as `rows`."""

    batches: list[TokenBatch]
    prefixes: list[TokenBatch]

    @property
    def tokens(self) -> tuple[int, int]:
        """Real tokens, and tokens with padding."""
        every = [*self.prefixes, *self.batches]
        return sum(int(b.lengths[: len(b.rows)].sum()) for b in every), sum(b.tokens.size for b in every)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shapes that batches may have.

    Attributes:
      lengths: padded lengths of texts, or of their rests behind a prefix; longer ones are padded to `round_up`.
      prefix_lengths: padded lengths of prefixes.
      budget: tokens of a batch on one device, padding included.
      devices: number of devices that a batch is spread over.
      max_length: positions of the model; no text is padded beyond them.
      prefix_tokens: largest number of prefix tokens in memory at once, padding included.
    """

    lengths: tuple[int, ...]
    prefix_lengths: tuple[int, ...]
    budget: int
    devices: int
    max_length: int
    prefix_tokens: int = 0

    def rows(self, length: int, prefix: int = 0) -> int:
        """Texts in a batch of this length; fewer behind prefixes, whose keys and values take memory as well."""
        return max(1, min(self.budget // length, 4 * self.budget // (length + prefix))) * self.devices

    def padded(self, length: int) -> int:
        """Padded length of a text."""
        return padded_to(length, self.lengths, self.max_length)


def round_up(length: int) -> int:
    """The next length on a grid: multiples of 8, and eight steps from each power of two to the next."""
    step = max(8, (1 << (int(length) - 1).bit_length()) // 16)
    return -(-length // step) * step


def choose_lengths(lengths: Sequence[int], max_count: int, price: float = 0.0) -> tuple[int, ...]:
    """The lengths on the grid whose padding and price of these texts are least, exactly, by dynamic programming.

    Args:
      lengths: tokens of each text, or of a sample of the texts.
      max_count: largest number of lengths to choose; the longest that is needed is among them.
      price: of each length, in tokens of padding.

    Example:
      >>> choose_lengths([3, 5, 20, 22, 90], max_count=2)
      (24, 96)
      >>> choose_lengths([3, 5, 20, 22, 90], max_count=2, price=300.0)
      (96,)
      >>> choose_lengths([], max_count=2)
      ()
    """
    grid, counts = np.unique([round_up(length) for length in lengths], return_counts=True)
    m = len(grid)
    texts = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: padded tokens of the texts up to grid[j - 1], where that is chosen; each turn adds one choice.
    cost, chosen, totals = np.where(np.arange(m + 1) == 0, 0.0, np.inf), [], []
    for _ in range(min(max_count, m)):
        step = [[cost[i] + (texts[j] - texts[i]) * float(grid[j - 1]) for i in range(j)] or [0.0] for j in range(m + 1)]
        before = np.array([int(np.argmin(row)) for row in step])
        cost = np.minimum(cost, [row[i] for row, i in zip(step, before, strict=True)])
        chosen.append(before)
        totals.append(cost[-1] + len(chosen) * price)
    out, j = [], m
    for before in reversed(chosen[: int(np.argmin(totals)) + 1] if chosen else []):
        if j:
            out.append(int(grid[j - 1]))
            j = int(before[j])
    return tuple(sorted(out))


def padded_to(length: int, lengths: Sequence[int], max_length: int) -> int:
    """The smallest of `lengths` that holds a text, else its own on the grid; `max_length` at most."""
    return min(next((padded for padded in lengths if padded >= length), round_up(length)), max_length)


def part_of(full: int, count: int, devices: int) -> int:
    """Size of a last batch of `count` texts, in few shapes: eighths of a full batch, or a smaller power of two."""
    eighth = -(-full // (8 * devices)) * devices
    return min(full, -(-count // eighth) * eighth, devices << (-(-count // devices) - 1).bit_length())


def make_chunks(sizes: np.ndarray, groups: np.ndarray | None) -> list[np.ndarray]:
    """Cut texts into chunks, long texts first, or, if grouped, texts with long prompts first.

    Args:
      sizes: `[n]` approximate length of each text, or of its prompt if grouped, in any unit.
      groups: `[n]` int, the prompt of each text; None for texts by themselves. Groups beyond `CHUNK` texts are split.

    Returns:
      Rows of each chunk, the rows of a group side by side.
    """
    if groups is None:
        order = np.argsort(-sizes, kind="stable")
        return [order[at : at + CHUNK] for at in range(0, len(order), CHUNK)]
    order = np.lexsort((groups, -sizes))  # stable: in order of rows where both are equal
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
    """Split texts into the tokens that their group shares at the beginning, and the rest.

    Args:
      texts: group and text.

    Returns:
      Prefixes, numbered from 0; the rest of each text, at least one token; row -> number of its prefix.
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
    """The work of a chunk of texts, each with its group; in parts where its prefixes exceed `prefix_tokens`."""
    prefixes, rest, number = split_prefixes(chunk)
    length = padded_to(max(1, *(len(ids) for _, ids in prefixes)), shapes.prefix_lengths, shapes.max_length)
    width = shapes.rows(length)
    if len(prefixes) <= width:
        width, repeats = part_of(width, len(prefixes), shapes.devices), 1
    else:
        repeats = 1 << (-(-len(prefixes) // width) - 1).bit_length()
    if width * repeats * length > shapes.prefix_tokens and len(prefixes) > 1:
        half = len(prefixes) // 2
        first = [each for each in chunk if number[each[1][0]] < half]
        second = [each for each in chunk if number[each[1][0]] >= half]
        return [*shared_work(first, shapes), *shared_work(second, shapes)]
    heads = [pad(prefixes[at : at + width], width, length) for at in range(0, len(prefixes), width)]
    batches = [
        dataclasses.replace(batch, group=_fill([number[row] for row in batch.rows.tolist()], len(batch.tokens)))
        for batch in _cut_batches(rest, shapes, prefix=length, last=True)[0]
    ]
    return [Work(batches, heads)]


def _common(texts: list[np.ndarray]) -> int:
    """Number of tokens that all texts share at the beginning, such that each keeps one; 0 for a single text."""
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
    """Whole batches, longest texts first, and the texts left over; if `last`, these fill a smaller batch."""
    texts = sorted(texts, key=lambda text: (-len(text[1]), text[0]))
    batches, at = [], 0
    while at < len(texts):
        length = shapes.padded(len(texts[at][1]))
        count, left = shapes.rows(length, prefix), len(texts) - at
        if left < count:
            if not last:
                break
            count = part_of(count, left, shapes.devices)
        batches.append(pad(texts[at : at + count], count, length))
        at += count
    return batches, texts[at:]


def pad(texts: list[Encoded], count: int, length: int) -> TokenBatch:
    """Texts as a batch of `count` rows of `length` tokens."""
    tokens, lengths = np.zeros((count, length), np.int32), np.ones(count, np.int32)
    for at, (_, ids) in enumerate(texts):
        tokens[at, : len(ids)] = ids
        lengths[at] = len(ids)
    return TokenBatch(np.array([row for row, _ in texts], np.int64), tokens, lengths)


def _fill(values: list[int], count: int) -> np.ndarray:
    out = np.zeros(count, np.int32)
    out[: len(values)] = values
    return out
