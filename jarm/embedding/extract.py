"""Texts through a model: planned from the whole input, tokenised ahead of the device, embedded batch by batch.

The same texts and settings give the same batches, so a run that was stopped and resumed ends with the same bits.
"""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jarm.core.interrupts import ahead
from jarm.core.status import JarmError
from jarm.core.types import Params
from jarm.data.store import fill
from jarm.data.texts import Texts
from jarm.embedding.batches import (
    CHUNK,
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
from jarm.llm.model import Prefix, cache_bytes, can_share, concatenate, embed_tokens, prefill
from jarm.llm.pooling import Pooling
from jarm.llm.sharding import any_process, gather, share_prefix, to_mesh

SAMPLE = 1024
"""Number of texts whose lengths decide the shapes of batches."""
SAVED = 0.1
"""Prompts are shared where that saves at least this share of all tokens, padding counted."""
CACHE_BYTES = 1 << 32
"""Largest size of the keys and values of shared prompts, on each device."""
KEPT_TOKENS = 1 << 26
"""Largest number of tokens of a corpus that are kept, 256 MiB; texts beyond them are tokenised whenever read."""
COMPILING = 1e11
"""Floating-point operations that a core of a CPU makes in the time in which a program is compiled, about a second."""
_PER_TEXT = 64
"""Tokens that a kept text counts for beside its own: about what its array takes."""
_AHEAD = 2
"""Batches queued on the device while the results of an earlier one are awaited."""
T = TypeVar("T")


class Model(NamedTuple):
    """A model on its devices: architecture, parameters and mesh."""

    config: ModelConfig
    params: Params
    mesh: jax.sharding.Mesh


class Embedded(NamedTuple):
    """Embeddings of a batch of texts.

    Attributes:
      rows: `[k]` indices of the texts.
      values: `[k, d]` float32, one array for each pooling.
      tokens, padded: tokens computed for them, without and with padding; prefixes count once.
    """

    rows: np.ndarray
    values: list[np.ndarray]
    tokens: int
    padded: int


class Corpus:
    """Texts as one model sees them.

    Attributes:
      texts: prompts and responses as they were read.
      tokenizer: of the model.
      truncated: rows tokenised so far whose text was longer than `max_length`.
    """

    def __init__(self, texts: Texts, tokenizer: Tokenizer):
        self.texts, self.tokenizer = texts, tokenizer
        self.truncated: set[int] = set()
        self._kept: dict[int, np.ndarray] = {}
        self._room = KEPT_TOKENS

    def __len__(self) -> int:
        return len(self.texts.columns["response"])

    @functools.cached_property
    def keys(self) -> list[str]:
        """Key of each text in a store."""
        return self.texts.keys(self.tokenizer.key_template)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Approximate number of characters of each text, `[n]`."""
        template = self.tokenizer.key_template
        return np.array([len(fill(template, self.texts.row(index))) for index in range(len(self))])

    def alike(self, rows: np.ndarray) -> np.ndarray:
        """For each of some rows, `[k]`, the first of them that is the same tokens, `[k]`; tokenises all.

        Raises:
          JarmError: as `encode`.
        """
        first: dict[bytes, int] = {}
        same = [
            first.setdefault(hashlib.blake2b(ids.tobytes(), digest_size=16).digest(), row)
            for at in range(0, len(rows), CHUNK)
            for row, ids in self.encode(rows[at : at + CHUNK])
        ]
        return np.array(same, np.int64)

    def encode(self, rows: np.ndarray) -> list[Encoded]:
        """Rows with their token ids.

        Raises:
          JarmError: a text that cannot be rendered, or has no tokens, by its place in the input.
        """
        fresh, rendered = [row for row in rows.tolist() if row not in self._kept], []
        for row in fresh:
            try:
                rendered.append(self.tokenizer.render(self.texts.row(row)))
            except JarmError as error:
                raise JarmError(f"{self.texts.places[row]}: {error}") from error
        ids, cut = self.tokenizer.encode(rendered)
        self.truncated.update(row for row, each in zip(fresh, cut, strict=True) if each)
        made = dict(zip(fresh, ids, strict=True))
        if empty := [row for row, each in made.items() if not len(each)]:
            place = self.texts.places[empty[0]]
            raise JarmError(f"{place}: the text is empty, so there is nothing to embed: leave it out.")
        self._keep(made)
        return [(row, made[row] if row in made else self._kept[row]) for row in rows.tolist()]

    def _keep(self, made: dict[int, np.ndarray]) -> None:
        """Keep token ids for the next who asks, while there is room."""
        tokens = sum(len(ids) + _PER_TEXT for ids in made.values())
        if tokens <= self._room:
            self._room -= tokens
            self._kept |= made


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
      rows: `[k]` distinct rows to embed.
      poolings: embeddings to return of each text.
      budget: tokens of a batch on one device, padding included.
      share: whether texts with one prompt share its computation, within `CACHE_BYTES` per device; None shares where
        that saves `SAVED`.
      done: `[n]` bool, rows that need no computing any more: batches of such rows alone are left out.
      stop: called with every batch; once it is true in any process, no further batch is begun.

    Yields:
      Embeddings, batch by batch.

    Raises:
      JarmError: a text that cannot be embedded, by its place, or prompts that this model cannot share.
    """
    if not len(rows):
        return
    if done is None:
        done = np.zeros(len(corpus), bool)
    if share is None and any(pooling.skip for pooling in poolings):
        share = False
    several = jax.process_count() > 1
    waiting: collections.deque[_Pending] = collections.deque()
    stopped = False
    for work in ahead(_works(model, corpus, rows, budget, share), 2, patient=several):
        batches = [batch for batch in work.batches if not done[batch.rows].all()]
        prefix = _prefill(model, work.prefixes, poolings) if batches and work.prefixes else None
        for batch in batches:
            values = embed_batch(model, batch, poolings, prefix)
            # Prefixes are counted with the first batch that they were computed for.
            counted = [batch, *work.prefixes] if batch is batches[0] else [batch]
            # All processes have to leave after the same batch: none may wait for one that has left.
            flag = any_process(model.mesh, stop()) if several else stop()
            waiting.append(_Pending(batch.rows, gather(model.mesh, values), Work(counted, []), flag))
            if len(waiting) > _AHEAD:
                oldest = waiting.popleft()
                yield oldest.result()
                stopped = bool(oldest.stop)
                if stopped:
                    break
        if stopped:
            break
    while waiting:
        yield waiting.popleft().result()


class _Pending(NamedTuple):
    """A batch under way: texts, values on the devices, work counted with it, and whether to stop after it."""

    rows: np.ndarray
    values: tuple[jax.Array, ...]
    work: Work
    stop: Any

    def result(self) -> Embedded:
        """Wait for the values."""
        return Embedded(self.rows, [np.asarray(each)[: len(self.rows)] for each in self.values], *self.work.tokens)


def embed_batch(
    model: Model, batch: TokenBatch, poolings: tuple[Pooling, ...], prefix: Prefix | None = None
) -> tuple[jax.Array, ...]:
    """Begin the computation of a batch, `[B, d]` for each pooling."""
    return embed_tokens(
        model.params,
        to_mesh(model.mesh, batch.tokens),
        to_mesh(model.mesh, batch.lengths),
        config=model.config,
        poolings=poolings,
        prefix=prefix,
        group=None if batch.group is None else to_mesh(model.mesh, batch.group),
    )


def _prefill(model: Model, batches: list[TokenBatch], poolings: tuple[Pooling, ...]) -> Prefix:
    """Begin the computation of prompts, joined to one prefix."""
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
    # A power of two of parts, so that few shapes compile.
    parts += parts[-1:] * ((1 << (len(parts) - 1).bit_length()) - len(parts))
    return share_prefix(model.mesh, concatenate(parts))


def _works(model: Model, corpus: Corpus, rows: np.ndarray, budget: int, share: bool | None) -> Iterator[Work]:
    """Work with shared prompts if asked for or worth it, else without."""
    max_length = corpus.tokenizer.max_length
    # Of a prefix and the rest, each with its padding.
    if share is not False and can_share(model.config, 2 * round_up(max_length)):
        works = _shared(model, corpus, rows, budget, share)
    elif share:
        raise JarmError(
            f"A {model.config.family} model reads the beginning of texts of {max_length:,} tokens by what follows, so "
            "prompts cannot be shared: leave --share-prompts at auto, or give a smaller --max-length."
        )
    else:
        works = None
    return _plain(model, corpus, rows, budget) if works is None else works


def _plain(model: Model, corpus: Corpus, rows: np.ndarray, budget: int) -> Iterator[Work]:
    """Work without shared prompts."""
    chunks = make_chunks(corpus.sizes[rows], None)
    sample = rows[np.concatenate(chunks)[_spread(len(rows), SAMPLE)]]
    price = _price(model, len(sample) / len(rows))
    lengths = choose_lengths([len(ids) for _, ids in corpus.encode(sample)], SHAPES, price)
    shapes = Shapes(lengths, (), budget, model.mesh.shape["data"], model.config.max_positions)
    yield from plain_work((corpus.encode(rows[chunk]) for chunk in chunks), shapes)


def _price(model: Model, share: float) -> float:
    """Tokens of padding, in a sample that is a share of all texts, that take as long as a program to compile."""
    weights = sum(leaf.size for name, part in model.params.items() if name != "embed" for leaf in jax.tree.leaves(part))
    return share * COMPILING / (2 * weights)


def _shared(model: Model, corpus: Corpus, rows: np.ndarray, budget: int, share: bool | None) -> Iterator[Work] | None:
    """Work with shared prompts, or None where `share` is None and sharing would not save `SAVED`."""
    prompts, groups = corpus.texts.prompts(rows)
    if share is None and len(set(prompts)) == len(rows):
        return None
    chunks = make_chunks(np.array([len(prompt) for prompt in prompts]), groups)

    def encode(chunk: np.ndarray) -> list[tuple[int, Encoded]]:
        return list(zip(groups[chunk].tolist(), corpus.encode(rows[chunk]), strict=True))

    # A few texts of prompts of every length decide the shapes.
    order = np.concatenate(chunks)
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    picked = [order[at : at + 16] for at in starts[_spread(len(starts), SAMPLE // 16)]]
    prefixes, rest, _ = split_prefixes(
        encode(np.concatenate([each[groups[each] == groups[each[0]]] for each in picked]))
    )
    price = _price(model, len(rest) / len(rows))
    token_bytes = cache_bytes(model.config, str(model.params["embed"]["table"].dtype)) // model.mesh.shape["model"]
    room, devices = CACHE_BYTES // token_bytes, model.mesh.shape["data"]
    shapes = Shapes(
        choose_lengths([len(ids) for _, ids in rest], SHARED_SHAPES, price),
        choose_lengths([max(1, len(ids)) for _, ids in prefixes], PREFIX_SHAPES, price),
        # Several batches per filled cache, so that the last, partly empty one costs little.
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


def _spread(count: int, max_count: int) -> np.ndarray:
    """At most `max_count` numbers below `count`, evenly spaced, the first and the last included."""
    return np.unique(np.linspace(0, count - 1, min(count, max_count)).astype(np.int64))
