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

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from jarm.base import JarmError
from jarm.data.files import fingerprint, replace_text
from jarm.data.store import fields
from jarm.data.texts import TEMPLATE, read_texts
from jarm.data.writer import StoreWriter, explained
from jarm.llm.config import ModelConfig, read_config
from jarm.llm.extract import Corpus, Embedded, Model, extract
from jarm.llm.pooling import Pooling
from jarm.llm.sharding import load_sharded, make_mesh, start_processes
from jarm.llm.tokens import Tokenizer
from jarm.llm.weights import find_checkpoint

JOB = "job.json"
"""In a store's folder: what is being embedded into it, and how many rows were there before; see `_job`."""
SHARE = {"auto": None, "always": True, "never": False}
COMMIT_BYTES, COMMIT_SECONDS = 4 << 20, 5.0
"""Rows wait for no longer than this before they are committed."""


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
      max_tokens_per_batch: on each device, padding included; by default 2,048 on a CPU, whose cache then holds what a
        layer works on, and 16,384 elsewhere.
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
    if config.coordinator or config.distributed:
        start_processes(config.coordinator, config.processes, config.process_id)
    folder = find_checkpoint(config.model, config.revision)
    shape = read_config(folder)
    poolings = _poolings(config, folder, shape)
    read = read_texts(
        config.input,
        prompt=config.prompt_column,
        responses=config.response_columns,
        extra=[name for name in fields(config.template or "") if name not in ("prompt", "response")],
        split=config.split,
    )
    tokenizer = Tokenizer(
        folder,
        # Texts that were split only to find their prompts are put together again as they were.
        template=config.template or (None if read.template == TEMPLATE else read.template),
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
    with contextlib.ExitStack() as stack:
        sink = Sink(keys, _open_stores(stack, config, folder, shape, tokenizer, poolings), config.normalize)
        rows, done = _job(config, sink)
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


class Sink:
    """Results on their way to stores: they wait until a few megabytes are together, or a few seconds have passed.

    Attributes:
      keys: of all texts.
      writers: a store for each pooling; none in any process but the first.
    """

    def __init__(self, keys: Sequence[str], writers: Sequence[StoreWriter], normalize: bool):
        self.keys, self.writers, self.normalize = keys, writers, normalize
        self._waiting: list[Embedded] = []
        self._since = time.monotonic()

    def add(self, result: Embedded) -> None:
        """Take a batch of results."""
        self._waiting.append(result)
        size = sum(value.nbytes for each in self._waiting for value in each.values)
        if size >= COMMIT_BYTES or time.monotonic() - self._since >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Write what waits; it is on disk when this returns."""
        waiting, self._waiting, self._since = self._waiting, [], time.monotonic()
        if not waiting:
            return
        keys = [self.keys[row] for each in waiting for row in each.rows.tolist()]
        for at, writer in enumerate(self.writers):
            rows = np.concatenate([each.values[at] for each in waiting])
            writer.append(keys, rows / np.linalg.norm(rows, axis=1, keepdims=True) if self.normalize else rows)


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
            total=sum(map(corpus.size, todo.tolist())),
            bar_format="{percentage:3.0f}% |{bar}|{postfix} [{elapsed}, {remaining} left]",
            disable=jax.process_index() > 0,
        ) as bar,
    ):
        try:
            for result in results:
                sink.add(result)
                new = result.rows[left[result.rows]].tolist()
                embedded, tokens, padded = embedded + len(new), tokens + result.tokens, padded + result.padded
                seconds = time.monotonic() - start
                bar.set_postfix_str(
                    f"{embedded:,} of {len(todo):,} texts, {embedded / seconds:,.1f} texts/s, "
                    f"{tokens / seconds:,.0f} tokens/s, {1 - tokens / padded:.1%} padding",
                    refresh=False,
                )
                bar.update(sum(map(corpus.size, new)))
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

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_stores(
    stack: contextlib.ExitStack,
    config: EmbedConfig,
    folder: pathlib.Path,
    shape: ModelConfig,
    tokenizer: Tokenizer,
    poolings: Sequence[Pooling],
) -> list[StoreWriter]:
    """A writer for each pooling, in the first process."""
    if jax.process_index():
        return []
    dtype = _dtype(config)
    made_by = {
        "model": folder.resolve().name if folder == pathlib.Path(config.model) else config.model,
        "config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:16],
        "weights": _weights(folder),
        **tokenizer.made_by,
        "normalize": config.normalize,
        "compute_dtype": dtype,
    }
    writers = []
    for pooling in poolings:
        layer = pooling.layer_of(len(shape.layers))
        path = config.out if len(poolings) == 1 else config.out / f"{pooling.kind}-{layer}"
        made = {**made_by, "pooling": pooling.kind, "layer": layer}
        writers.append(stack.enter_context(StoreWriter(path, shape.width, made, dtype=config.store_dtype or dtype)))
    return writers


def _job(config: EmbedConfig, sink: Sink) -> tuple[np.ndarray, np.ndarray]:
    """What there is to embed, `[k]` rows, and what of it is done, `[n]` bool; the same in all processes.

    Texts that were in the store when this job began are no part of it. Its start is kept beside the store, so that
    after an interruption the job is the same, with the same batches, and what was done since is only skipped.
    """
    first_of: dict[str, int] = {}
    for row, key in enumerate(sink.keys):
        first_of.setdefault(key, row)
    settings = [_budget(config), config.share_prompts, jax.device_count(), config.tensor_parallel]
    job = hashlib.sha256(json.dumps([settings, list(first_of)]).encode()).hexdigest()
    there = [set(writer.keys) for writer in sink.writers]
    before = [set(writer.keys[: _start(writer, job)]) for writer in sink.writers]
    flags = np.array(
        [[not all(key in each for each in before), all(key in each for each in there)] for key in first_of]
    )
    if jax.process_count() > 1:
        flags = np.asarray(multihost_utils.broadcast_one_to_all(flags))
    rows = np.array(list(first_of.values()))
    done = np.zeros(len(sink.keys), bool)
    done[rows] = flags[:, 1]
    return rows[flags[:, 0]], done


def _start(writer: StoreWriter, job: str) -> int:
    """How many rows the store had when this job began, which may be now."""
    path = writer.path / JOB
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        held = json.loads(path.read_text())
        if held["job"] == job and held["rows_before"] <= len(writer):
            return int(held["rows_before"])
    with explained(writer.path):
        replace_text(path, json.dumps({"job": job, "rows_before": len(writer)}) + "\n")
    return len(writer)


def _poolings(config: EmbedConfig, folder: pathlib.Path, shape: ModelConfig) -> tuple[Pooling, ...]:
    """Every pooling at every layer that was asked for."""
    kinds = config.pooling or (_usual_pooling(folder, shape),)
    poolings = tuple(dict.fromkeys(Pooling(kind, layer) for kind in kinds for layer in config.layer))
    for pooling in poolings:
        pooling.layer_of(len(shape.layers))
    if not poolings:
        raise JarmError("There is no layer to pool: give --layer -1 for the last.")
    return poolings


def _usual_pooling(folder: pathlib.Path, shape: ModelConfig) -> str:
    """What sentence-transformers wrote down for the model, else what suits its kind."""
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
    try:
        held = json.loads((folder / "1_Pooling" / "config.json").read_text())
        modes = [mode for mode, on in held.items() if mode.startswith("pooling_mode_") and on is True]
    except (OSError, ValueError, AttributeError):
        return "mean" if shape.encoder else "last"
    if len(modes) != 1 or modes[0] not in names:
        raise JarmError(f"{folder} was trained with {' and '.join(modes)}, which jarm does not do: choose a --pooling.")
    return names[modes[0]]


def _dtype(config: EmbedConfig) -> str:
    return config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _budget(config: EmbedConfig) -> int:
    return config.max_tokens_per_batch or (2048 if jax.default_backend() == "cpu" else 16384)


def _weights(folder: pathlib.Path) -> str:
    """A fingerprint of all weights of a checkpoint."""
    prints = [fingerprint(path) for path in sorted(folder.glob("*.safetensors"))]
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
