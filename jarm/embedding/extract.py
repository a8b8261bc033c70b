"""Texts through a model: planned from the whole input, tokenised ahead of the device, given back batch by batch.

The same texts and settings give the same batches, so whoever stops and comes back gets the same bits.
"""

from __future__ import annotations

import collections
import functools
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jarm.core.status import JarmError
from jarm.core.types import Params
from jarm.data.store import fill
from jarm.data.texts import Texts
from jarm.embedding.batches import (
    PREFIX_SHAPES,
    SHAPES,
    SHARED_SHAPES,
    Encoded,
    Shapes,
    TokenBatch,
    Work,
    choose_lengths,
    make_chunks,
    plain_work,
    round_up,
    shared_work,
    split_prefixes,
)
from jarm.embedding.tokens import Tokenizer
from jarm.llm.config import ModelConfig
from jarm.llm.model import cache_bytes, can_share, concatenate, embed_tokens, prefill
from jarm.llm.pooling import Pooling
from jarm.llm.sharding import any_process, gather, share_prefix, to_mesh

SAMPLE = 1024
"""Texts whose lengths decide the shapes of batches."""
SAVED = 0.1
"""Prompts are shared where that saves at least this part of all tokens, its padding counted."""
CACHE_BYTES = 1 << 32
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

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Characters of each text, about, `[n]`."""
        template = self.tokenizer.key_template
        return np.array([len(fill(template, self.texts.row(index))) for index in range(len(self))])

    def check(self, rows: np.ndarray) -> None:
        """Refuse at once what `encode` would refuse in the end: the shortest text, and every order of roles.

        Raises:
          JarmError: a row that cannot be rendered, or has no tokens, by its place.
        """
        roles: dict[tuple[str, ...], int] = {}
        for row in rows.tolist():
            prompt = self.texts.columns["prompt"][row]
            if isinstance(prompt, list):
                roles.setdefault(tuple(str(message.get("role")) for message in prompt), row)
        self.encode(np.array([rows[np.argmin(self.sizes[rows])], *roles.values()]))

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
    works = None
    if share is not False:
        most = 2 * round_up(corpus.tokenizer.max_length)  # a prefix and the rest, each with its padding
        if can_share(model.config, most):
            works = _shared(model, corpus, rows, budget, share)
        elif share:
            raise JarmError(
                f"A {model.config.family} model reads the beginning of texts of {corpus.tokenizer.max_length:,} tokens "
                "by what follows, so prompts cannot be shared: leave --share-prompts at auto, or give a smaller "
                "--max-length."
            )
    if works is None:
        works = _plain(model, corpus, rows, budget)
    several = jax.process_count() > 1
    waiting: collections.deque[tuple[TokenBatch, Work, tuple[jax.Array, ...], Any]] = collections.deque()
    stopped: Any = False
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
            flag = any_process(model.mesh, stop()) if several else stop()
            waiting.append((batch, Work(counted, []), gather(model.mesh, values), flag))
            if len(waiting) > _AHEAD:
                result, stopped = _collected(*waiting.popleft())
                yield result
                if stopped:
                    break
        if stopped:
            break
    while waiting:
        yield _collected(*waiting.popleft())[0]


def _collected(batch: TokenBatch, counted: Work, values: tuple[jax.Array, ...], flag: Any) -> tuple[Embedded, bool]:
    """Wait for a batch, and for whether to stop after it."""
    rows = [np.asarray(value)[: len(batch.rows)] for value in values]
    return Embedded(batch.rows, rows, *counted.tokens), bool(flag)


def _prefix(model: Model, batches: list[TokenBatch], poolings: tuple[Pooling, ...]) -> Any:
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
    chunks = make_chunks(corpus.sizes[rows], None)
    sample = rows[np.concatenate(chunks)[_spread(len(rows), SAMPLE)]]
    lengths = choose_lengths([len(ids) for _, ids in corpus.encode(sample)], SHAPES)
    shapes = Shapes(lengths, (), budget, model.mesh.shape["data"], model.config.max_positions)
    yield from plain_work((corpus.encode(rows[chunk]) for chunk in chunks), shapes)


def _shared(model: Model, corpus: Corpus, rows: np.ndarray, budget: int, share: bool | None) -> Iterator[Work] | None:
    """Work with shared prompts, or None if it may be left and would not save much."""
    prompts = [fill("{prompt}", corpus.texts.row(int(row))) for row in rows]
    numbers: dict[str, int] = {}
    groups = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])
    if share is None and len(numbers) == len(rows):
        return None
    chunks = make_chunks(np.array([len(prompt) for prompt in prompts]), groups)

    def encode(chunk: np.ndarray) -> list[tuple[int, Encoded]]:
        return list(zip(groups[chunk].tolist(), corpus.encode(rows[chunk]), strict=True))

    # Some texts of prompts of every length decide the shapes.
    order = np.concatenate(chunks)
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    picked = [order[at : at + 16] for at in starts[_spread(len(starts), SAMPLE // 16)]]
    prefixes, rest, _ = split_prefixes(
        encode(np.concatenate([each[groups[each] == groups[each[0]]] for each in picked]))
    )
    token_bytes = cache_bytes(model.config, str(model.params["embed"]["table"].dtype)) // model.mesh.shape["model"]
    room, devices = CACHE_BYTES // token_bytes, model.mesh.shape["data"]
    shapes = Shapes(
        choose_lengths([len(ids) for _, ids in rest], SHARED_SHAPES),
        choose_lengths([max(1, len(ids)) for _, ids in prefixes], PREFIX_SHAPES),
        # Several batches to a filled cache, so that the last of them, which is not full, does not count for much.
        max(1, min(budget, room // (8 * devices))),
        devices,
        model.config.max_positions,
        room,
    )
    if share is None:
        chunk = encode(chunks[len(chunks) // 2][: 2 * SAMPLE])
        padded = sum(work.tokens[1] for work in shared_work(chunk, shapes))
        if padded > (1 - SAVED) * sum(len(ids) for _, (_, ids) in chunk):
            return None
    return (work for chunk in chunks for work in shared_work(encode(chunk), shapes))


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
