"""`jarm embed`: prompts and responses through a language model, once, into a store of embeddings.

Rows are committed as they are computed: killed at any moment, the same command goes on, and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from jarm.core.base import JarmError
from jarm.core.distributed import join_if_asked
from jarm.data.readers import fingerprint
from jarm.data.texts import TEMPLATE, extra_fields, read_texts
from jarm.embedding.extract import Corpus, Embedded, Model, extract
from jarm.embedding.sentence import is_sentence_model, trained_pooling
from jarm.embedding.sink import Sink, open_stores, plan_job
from jarm.embedding.tokens import Tokenizer
from jarm.llm.config import ModelConfig, read_config
from jarm.llm.model import DTYPES
from jarm.llm.pooling import Pooling
from jarm.llm.sharding import load_sharded, make_mesh, split_config
from jarm.llm.weights import find_checkpoint, weight_files

SHARE = {"auto": None, "always": True, "never": False}


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """What to embed, with which model, and where to.

    Attributes:
      model: folder of a checkpoint as Hugging Face writes it, or an id on its hub.
      input: tables (.jsonl or .parquet), a folder of them, or a dataset of the Hugging Face hub.
      out: folder of the store; with several poolings or layers, a store in it for each.
      pooling: `last` (real token), `mean` or `cls`, or several of them; by default what the model was trained with:
        what `1_Pooling` in its folder says, else `last` for decoders and `mean` for encoders.
      layer: whose output is pooled, or several: 0 is the input of the first, -1 the output of the last.
      normalize: scale embeddings to length 1.
      template: how prompt and response become one text: columns in braces, such as '{prompt}\\n\\n{response}', or
        `chat`, the model's own; by default the latter where there is one.
      max_length: tokens in a text at most; by default what the model allows.
      keep: of a text that is too long, its `start` or its `end`; by default `end` if the last token is pooled.
      dtype: of the model, `float32` or `bfloat16`; by default the former on a CPU, and the latter elsewhere.
      store_dtype: `bfloat16`, `float32`, or `float16`, which some models overflow; by default the model's.
      max_tokens_per_batch: on each device, padding included; a longer text is a batch of its own. By default 2,048 on a
        CPU, whose cache then holds what a layer works on, and 16,384 elsewhere.
      share_prompts: compute the tokens that responses to one prompt share only once (decoders): "always", "never", or
        "auto", where it saves a tenth.
      prompt_column: of the input, where it is not `prompt`.
      response_columns: of the input, where they are none of the usual.
      split: of a dataset of the hub.
      revision: of a model of the hub.
      tensor_parallel: devices that a model is spread over, for one that does not fit on one.
      distributed: join the processes that SLURM, Open MPI, Kubernetes or a TPU pod started, to work on one store.
      coordinator: HOST:PORT of process 0, to join processes that nobody else introduces.
      processes: how many there are, then.
      process_id: which of them this is, from 0.
      show: print the exact text and the token ids of so many rows, and stop.
    """

    model: str
    input: tuple[str, ...]
    out: pathlib.Path = pathlib.Path("out/embeddings")
    pooling: tuple[str, ...] = ()
    layer: tuple[int, ...] = (-1,)
    normalize: bool = False
    template: str | None = None
    max_length: int | None = None
    keep: str | None = None
    dtype: str | None = None
    store_dtype: str | None = None
    max_tokens_per_batch: int | None = None
    share_prompts: str = "auto"
    prompt_column: str | None = None
    response_columns: tuple[str, ...] = ()
    split: str | None = None
    revision: str | None = None
    tensor_parallel: int = 1
    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    show: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (("input", (str, pathlib.Path)), ("pooling", str), ("layer", int)):
            if isinstance(getattr(self, name), kinds):
                raise JarmError(f"EmbedConfig({name}=...) takes several: write ({getattr(self, name)!r},).")
        object.__setattr__(self, "out", pathlib.Path(self.out))


@dataclasses.dataclass(frozen=True)
class EmbedSummary:
    """What a run did.

    Attributes:
      stores: folders, a pooling and layer each.
      texts: in the input, and how many of them are `distinct`.
      embedded: distinct texts that this run added; the others were there.
      truncated: texts that were longer than `max_length`, of those that this run has looked at.
      empty_responses: in the input.
      tokens, padded: computed by this run, without and with padding.
      seconds: from the first batch to the last results, compilation included.
    """

    stores: tuple[pathlib.Path, ...] = ()
    texts: int = 0
    distinct: int = 0
    embedded: int = 0
    truncated: int = 0
    empty_responses: int = 0
    tokens: int = 0
    padded: int = 0
    seconds: float = 0.0

    @property
    def waste(self) -> float:
        """The part of all tokens computed that was padding."""
        return 1 - self.tokens / self.padded if self.padded else 0.0


def embed(config: EmbedConfig) -> EmbedSummary:
    """Embed every distinct text of the input that the store does not have yet.

    Args:
      config: what, with which model, and where to.

    Returns:
      What was done.

    Raises:
      JarmError: input, model or store that cannot be used, by name; what had been committed stays.
      KeyboardInterrupt: the process was told to stop, and did so after committing what was computed.
    """
    if config.max_tokens_per_batch is not None and config.max_tokens_per_batch < 1:
        raise JarmError("A batch of no tokens embeds nothing: give --max-tokens-per-batch 1 or more.")
    if config.share_prompts not in SHARE:
        raise JarmError(f"Prompts are shared {', '.join(SHARE)}, not {config.share_prompts!r}: give one of them.")
    if config.dtype not in (None, *DTYPES):
        raise JarmError(f"A model cannot run in dtype {config.dtype!r}: give --dtype {' or '.join(DTYPES)}.")
    join_if_asked(config.distributed, config.coordinator, config.processes, config.process_id)
    folder = find_checkpoint(config.model, config.revision)
    shape = read_config(folder)
    poolings = _poolings(config, folder, shape)
    read = read_texts(
        config.input,
        prompt=config.prompt_column,
        responses=config.response_columns,
        extra=extra_fields(config.template or ""),
        split=config.split,
    )
    tokenizer = Tokenizer(
        folder,
        # Texts that were split only to find their prompts are put together again as they were; and models that were
        # trained on plain texts get plain texts, whatever chat template their tokenizers brought along.
        template=config.template
        or (None if read.template == TEMPLATE and not is_sentence_model(folder) else read.template),
        max_length=config.max_length,
        keep=config.keep or ("end" if any(pooling.kind == "last" for pooling in poolings) else "start"),
        window=shape.max_positions,
    )
    corpus = Corpus(read, tokenizer)
    if config.show:
        print(_shown(corpus, np.arange(min(config.show, len(corpus)))))
        return EmbedSummary()
    keys = read.keys(tokenizer.key_template)
    mesh = make_mesh(config.tensor_parallel)
    split_config(shape, mesh)  # refuses what does not divide
    _agree(config, folder, tokenizer, keys)
    with contextlib.ExitStack() as stack:
        made = _made_by(config, folder, shape, tokenizer, poolings)
        writers = open_stores(stack, made, shape.width, config.store_dtype or _dtype(config))
        sink = Sink(keys, writers, config.normalize, corpus)
        devices = [jax.device_count(), jax.devices()[0].device_kind, jax.lib.__version__]
        rows, done = plan_job(sink, [_budget(config), config.share_prompts, config.tensor_parallel, *devices])
        summary = EmbedSummary(
            stores=tuple(writer.path for writer in sink.writers),
            texts=len(corpus),
            distinct=len(set(keys)),
            empty_responses=sum(response == "" for response in read.columns["response"]),
        )
        if done[rows].all():
            return summary
        if jax.process_index() == 0:
            print(f"{len(corpus):,} texts ({read.layout}), {summary.distinct:,} distinct; the first:", file=sys.stderr)
            print(_shown(corpus, rows[:1], most=300), file=sys.stderr)
        corpus.check(rows[~done[rows]])
        model = Model(*load_sharded(folder, shape, mesh, dtype=_dtype(config)), mesh)
        stop = stack.enter_context(_stopping())
        results = extract(
            model,
            corpus,
            rows,
            poolings=poolings,
            budget=_budget(config),
            share=SHARE[config.share_prompts],
            done=done,
            stop=stop.is_set,
        )
        return _drain(results, corpus, sink, summary, rows[~done[rows]])


def _drain(
    results: Generator[Embedded], corpus: Corpus, sink: Sink, summary: EmbedSummary, todo: np.ndarray
) -> EmbedSummary:
    """Commit results as they come, and show how it goes, until they end or a signal says stop."""
    left = np.zeros(len(corpus), bool)
    left[todo] = True
    embedded = tokens = padded = 0
    start, seconds = time.monotonic(), 0.0
    with (
        contextlib.closing(results),
        # In characters, as the texts that come first are the longest.
        tqdm(
            total=int(corpus.sizes[todo].sum()),
            bar_format="{percentage:3.0f}% |{bar}|{postfix} [{elapsed}, {remaining} left]",
            disable=jax.process_index() > 0,
        ) as bar,
    ):
        try:
            for result in results:
                sink.add(result)
                new = result.rows[left[result.rows]]
                embedded, tokens, padded = embedded + len(new), tokens + result.tokens, padded + result.padded
                seconds = time.monotonic() - start
                bar.set_postfix_str(
                    f"{embedded:,} of {len(todo):,} texts, {embedded / seconds:,.1f} texts/s, "
                    f"{tokens / seconds:,.0f} tokens/s, {1 - tokens / padded:.1%} padding",
                    refresh=False,
                )
                bar.update(int(corpus.sizes[new].sum()))
        except BaseException:
            with contextlib.suppress(JarmError):  # which may be that it cannot
                sink.commit()
            raise
        sink.commit()
    if embedded < len(todo):
        raise KeyboardInterrupt
    return dataclasses.replace(
        summary, embedded=embedded, truncated=len(corpus.cut), tokens=tokens, padded=padded, seconds=seconds
    )


@contextlib.contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that the first signal to stop sets; a second one stops at once."""
    stop = threading.Event()

    def handle(number: int, _: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("\nStopping after the batches that are under way; again to stop at once.", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agree(config: EmbedConfig, folder: pathlib.Path, tokenizer: Tokenizer, keys: Sequence[str]) -> None:
    """Refuse to start where processes were given different texts, models or settings."""
    if jax.process_count() == 1:
        return
    settings = dataclasses.replace(config, model="", input=(), out=pathlib.Path(), process_id=None, coordinator=None)
    parts = {
        "texts": json.dumps(list(keys)),
        "tokenizers or templates": json.dumps(tokenizer.made_by, sort_keys=True),
        "models": _weights(folder) + (folder / "config.json").read_text(),
        "settings": repr(settings) + _dtype(config),
    }
    own = np.array([list(hashlib.sha256(part.encode()).digest()) for part in parts.values()], np.uint8)
    every = np.asarray(multihost_utils.process_allgather(own))
    if other := [name for at, name in enumerate(parts) if (every[:, at] != every[0, at]).any()]:
        raise JarmError(f"The processes have different {' and '.join(other)}: give all of them the same.")


def _poolings(config: EmbedConfig, folder: pathlib.Path, shape: ModelConfig) -> tuple[Pooling, ...]:
    """Every pooling at every layer that was asked for."""
    kinds = config.pooling or (trained_pooling(folder) or ("mean" if shape.encoder else "last"),)
    poolings = tuple(dict.fromkeys(Pooling(kind, layer) for kind in kinds for layer in config.layer))
    for pooling in poolings:
        pooling.layer_of(len(shape.layers))
    if not poolings:
        raise JarmError("There is no layer to pool: give --layer -1 for the last.")
    return poolings


def _made_by(
    config: EmbedConfig,
    folder: pathlib.Path,
    shape: ModelConfig,
    tokenizer: Tokenizer,
    poolings: Sequence[Pooling],
) -> dict[pathlib.Path, dict[str, Any]]:
    """For each store, all that decides its rows."""
    common = {
        "model": folder.resolve().name if folder == pathlib.Path(config.model) else config.model,
        "revision": config.revision,
        "config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:16],
        "weights": _weights(folder),
        **tokenizer.made_by,
        "normalize": config.normalize,
        "compute_dtype": _dtype(config),
    }
    made = {}
    for pooling in poolings:
        layer = pooling.layer_of(len(shape.layers))
        path = config.out if len(poolings) == 1 else config.out / f"{pooling.kind}-{layer}"
        made[path] = {**common, "pooling": pooling.kind, "layer": layer}
    return made


def _dtype(config: EmbedConfig) -> str:
    return config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _budget(config: EmbedConfig) -> int:
    return config.max_tokens_per_batch or (2048 if jax.default_backend() == "cpu" else 16384)


def _weights(folder: pathlib.Path) -> str:
    """A fingerprint of all weights of a checkpoint."""
    prints = [fingerprint(path) for path in weight_files(folder)]
    return hashlib.sha256("".join(prints).encode()).hexdigest()[:16]


def _shown(corpus: Corpus, rows: np.ndarray, most: int | None = None) -> str:
    """Exact texts and ids of some rows, up to so many characters each."""
    lines = []
    for row, ids in corpus.encode(rows):
        words = corpus.tokenizer.words(ids)
        text, tokens = repr(corpus.tokenizer.render(corpus.texts.row(row))), " ".join(map(str, ids.tolist()))
        if most is not None:
            text, tokens = (each if len(each) <= most else f"{each[:most]} ..." for each in (text, tokens))
        lines += [
            f"{corpus.place(row)}: {len(ids):,} tokens, the first {words[0]!r}, the last {words[-1]!r}",
            text,
            tokens,
        ]
        if most is None:
            lines.append(" ".join(words))
    return "\n".join(lines)
