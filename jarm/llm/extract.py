"""Texts through a model: planned from the whole input, tokenised ahead of the device, given back batch by batch.

The same texts and settings give the same batches, so whoever stops and comes back gets the same bits.
"""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jarm.base import JarmError
from jarm.data.store import fields, fill
from jarm.data.texts import Texts
from jarm.llm.config import ModelConfig
from jarm.llm.model import cache_bytes, can_share, concatenate, embed_tokens, prefill
from jarm.llm.plan import (
    PREFIX_SHAPES,
    SHAPES,
    Batch,
    Encoded,
    Shapes,
    Work,
    choose_lengths,
    make_chunks,
    plain_work,
    round_up,
    shared_work,
    split_prefixes,
)
from jarm.llm.pooling import Pooling
from jarm.llm.sharding import any_process, gather, share_prefix, to_mesh
from jarm.llm.tokens import Tokenizer
from jarm.types import Params

SAMPLE = 1024
"""Texts whose lengths decide the shapes of batches."""
SAVED = 0.1
"""Prompts are shared where that saves more than this part of all characters."""
CACHE_BYTES = 1 << 31
"""Of the keys and values of shared prompts, at most, on each device."""
_AHEAD = 2
"""Batches that the device has before the results of one are asked for."""
T = TypeVar("T")


class Model(NamedTuple):
    """A model on its devices."""

    config: ModelConfig
    params: Params
    mesh: jax.sharding.Mesh


class Embedded(NamedTuple):
    """A batch of results.

    Attributes:
      rows: `[k]` which texts.
      values: `[k, d]` float32, one for each pooling.
      tokens, padded: computed for them, without and with padding; prefixes count once.
    """

    rows: np.ndarray
    values: list[np.ndarray]
    tokens: int
    padded: int


class Corpus:
    """The texts that were read, as one model sees them.

    Attributes:
      texts: as they were read.
      tokenizer: of the model.
      cut: those that were longer than `max_length`, of those tokenised so far.
    """

    def __init__(self, texts: Texts, tokenizer: Tokenizer):
        self.texts, self.tokenizer = texts, tokenizer
        self.cut: set[int] = set()

    def __len__(self) -> int:
        return len(self.texts.columns["response"])

    def place(self, index: int) -> str:
        """Where a text stands in the input."""
        return self.texts.places[index]

    def size(self, index: int) -> int:
        """Characters of a text, about."""
        return len(fill(self.tokenizer.key_template, self.texts.row(index)))

    def encode(self, rows: np.ndarray) -> list[Encoded]:
        """Rows with their token ids.

        Raises:
          JarmError: a row that cannot be rendered, or has no tokens, by its place.
        """
        rendered = []
        for index in rows:
            try:
                rendered.append(self.tokenizer.render(self.texts.row(int(index))))
            except JarmError as error:
                raise JarmError(f"{self.place(int(index))}: {error}") from error
        ids, cut = self.tokenizer.encode(rendered)
        self.cut.update(int(index) for index, each in zip(rows, cut, strict=True) if each)
        if empty := [int(index) for index, each in zip(rows, ids, strict=True) if not len(each)]:
            raise JarmError(f"{self.place(empty[0])}: the text is empty, so there is nothing to embed: leave it out.")
        return [(int(index), each) for index, each in zip(rows, ids, strict=True)]


def extract(
    model: Model,
    corpus: Corpus,
    rows: np.ndarray,
    *,
    poolings: tuple[Pooling, ...],
    budget: int,
    share: bool | None = None,
    done: np.ndarray | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[Embedded]:
    """Embed rows, in an order and in batches that depend on the rows and settings alone.

    Args:
      model: on its devices; every process has to make the same call.
      corpus: all texts.
      rows: `[k]` those to embed, distinct.
      poolings: what to take of each text.
      budget: tokens of a batch on one device, padding included.
      share: whether texts with one prompt share its computation, which bounds memory for prompts by `CACHE_BYTES` a
        device; if None, where it saves much.
      done: `[n]` bool, rows that need no computing any more: batches of nothing else are left out.
      stop: asked with every batch; if it is true in any process, what was begun before is the last.

    Yields:
      Results, batch by batch.

    Raises:
      JarmError: a row that cannot be embedded, by its place.
    """
    if not len(rows):
        return
    if done is None:
        done = np.zeros(len(corpus), bool)
    groups = _groups(corpus, rows)
    most = 2 * round_up(corpus.tokenizer.max_length)  # a prefix and the rest, each with its padding
    able = can_share(model.config, most)
    if share and not able:
        raise JarmError(
            f"A {model.config.family} model reads the beginning of texts of {corpus.tokenizer.max_length:,} tokens by "
            "what follows, so prompts cannot be shared: leave --share-prompts at auto, or give a smaller --max-length."
        )
    share = able and _saved(corpus, rows, groups) > SAVED if share is None else share
    works = _shared(model, corpus, rows, groups, budget) if share else _plain(model, corpus, rows, budget)
    several = jax.process_count() > 1
    waiting: collections.deque[tuple[Batch, Work, tuple[jax.Array, ...], Any]] = collections.deque()
    for work in ahead(works):
        batches = [batch for batch in work.batches if not done[batch.rows].all()]
        prefix = _prefix(model, work.prefixes, poolings) if batches and work.prefixes else None
        for batch in batches:
            values = embed_tokens(
                model.params,
                to_mesh(model.mesh, batch.tokens),
                to_mesh(model.mesh, batch.lengths),
                config=model.config,
                poolings=poolings,
                prefix=prefix,
                group=None if batch.group is None else to_mesh(model.mesh, batch.group),
            )
            # Prefixes are counted with the first batch that they were computed for.
            counted = [batch, *work.prefixes] if batch is batches[0] else [batch]
            # All processes have to leave after the same batch, or some wait for the others for ever.
            stopped = any_process(model.mesh, stop()) if several else stop()
            waiting.append((batch, Work(counted, []), gather(model.mesh, values), stopped))
            if len(waiting) > _AHEAD:
                result, stopped = _collected(*waiting.popleft())
                yield result
                if stopped:
                    return
    while waiting:
        yield _collected(*waiting.popleft())[0]


def _collected(batch: Batch, counted: Work, values: tuple[jax.Array, ...], stopped: Any) -> tuple[Embedded, bool]:
    """Wait for a batch, and for whether to stop after it."""
    rows = [np.asarray(value)[: len(batch.rows)] for value in values]
    return Embedded(batch.rows, rows, *counted.tokens), bool(stopped)


def _prefix(model: Model, batches: list[Batch], poolings: tuple[Pooling, ...]) -> Any:
    """Prompts computed, as one."""
    parts = [
        prefill(
            model.params,
            to_mesh(model.mesh, batch.tokens),
            to_mesh(model.mesh, batch.lengths),
            config=model.config,
            poolings=poolings,
        )
        for batch in batches
    ]
    # As many as a power of two, so that few shapes compile.
    parts += parts[-1:] * ((1 << (len(parts) - 1).bit_length()) - len(parts))
    return share_prefix(model.mesh, concatenate(parts))


def _plain(model: Model, corpus: Corpus, rows: np.ndarray, budget: int) -> Iterator[Work]:
    """Work without shared prompts."""
    chunks = make_chunks(_sizes(corpus, rows), None)
    sample = rows[np.concatenate(chunks)[_spread(len(rows), SAMPLE)]]
    lengths = choose_lengths([len(ids) for _, ids in corpus.encode(sample)], SHAPES)
    shapes = Shapes(lengths, (), budget, model.mesh.shape["data"])
    yield from plain_work((corpus.encode(rows[chunk]) for chunk in chunks), shapes)


def _shared(model: Model, corpus: Corpus, rows: np.ndarray, groups: np.ndarray, budget: int) -> Iterator[Work]:
    """Work with shared prompts."""
    sizes = np.array([len(fill("{prompt}", corpus.texts.row(int(row)))) for row in rows])
    # A token is a character or more. Half, as `_prefix` may fill up to twice the room.
    room = CACHE_BYTES // 2 // cache_bytes(model.config, str(model.params["embed"]["table"].dtype))
    chunks = make_chunks(sizes, groups, room)

    def encode(chunk: np.ndarray) -> list[tuple[int, Encoded]]:
        return list(zip(groups[chunk].tolist(), corpus.encode(rows[chunk]), strict=True))

    chosen = np.unique(groups)[_spread(len(np.unique(groups)), SAMPLE // 16)]
    sample = np.concatenate([np.flatnonzero(groups == group)[:16] for group in chosen])
    prefixes, rest, _ = split_prefixes(encode(sample))
    shapes = Shapes(
        choose_lengths([len(ids) for _, ids in rest], SHAPES),
        choose_lengths([max(1, len(ids)) for _, ids in prefixes], PREFIX_SHAPES),
        budget,
        model.mesh.shape["data"],
    )
    yield from (shared_work(encode(chunk), shapes) for chunk in chunks)


def _groups(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """A number for the prompt of each row, `[k]`."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(fill("{prompt}", corpus.texts.row(int(row))), len(numbers)) for row in rows])


def _saved(corpus: Corpus, rows: np.ndarray, groups: np.ndarray) -> float:
    """The part of all characters that need not be computed if each prompt is computed once."""
    if not {"prompt"} <= set(fields(corpus.tokenizer.key_template)):
        return 0.0
    _, first = np.unique(groups, return_index=True)
    prompts = np.array([len(fill("{prompt}", corpus.texts.row(int(row)))) for row in rows])
    return float((prompts.sum() - prompts[first].sum()) / max(1, sum(_sizes(corpus, rows))))


def _sizes(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    return np.array([corpus.size(int(row)) for row in rows])


def _spread(count: int, most: int) -> np.ndarray:
    """At most so many of the numbers below `count`, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def ahead(items: Iterator[T], most: int = 2) -> Iterator[T]:
    """The same items, made in a thread that is at most so many ahead; its errors are raised here."""
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(most)
    stopped = threading.Event()

    def put(what: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            try:
                return waiting.put(what, timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            more, item = waiting.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stopped.set()
        thread.join()
