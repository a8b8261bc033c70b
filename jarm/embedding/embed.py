"""`jarm embed`: prompts and responses through a language model, once, into a store of embeddings.

Rows are committed as they are computed: killed at any moment, the same command goes on, and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator

import jax
import numpy as np
from tqdm import tqdm

from jarm.core.distributed import join_if_asked
from jarm.core.status import JarmError
from jarm.data.texts import TEMPLATE, extra_fields, read_texts
from jarm.embedding.config import SHARE, EmbedConfig, EmbedSummary, _budget, _dtype
from jarm.embedding.extract import Corpus, Embedded, Model, extract
from jarm.embedding.job import _agree, _made_by, _poolings, plan_job
from jarm.embedding.sentence import is_sentence_model
from jarm.embedding.sink import Sink, open_stores
from jarm.embedding.tokens import Tokenizer
from jarm.llm.config import read_config
from jarm.llm.model import DTYPES
from jarm.llm.sharding import load_sharded, make_mesh, split_config
from jarm.llm.weights import find_checkpoint


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
