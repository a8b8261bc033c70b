"""`jarm embed`: prompts and responses through a language model, once, into a store of embeddings.

Rows are committed as they are computed. A command killed at any moment goes on when given again, and ends with the same
bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Generator

import jax
import numpy as np

from jarm.core.distributed import join_if_asked
from jarm.core.interrupts import ahead, stoppable
from jarm.core.progress import Progress
from jarm.core.rows import count_alike
from jarm.core.status import JarmError, printable
from jarm.core.streams import say, show
from jarm.embedding.config import SHARE_PROMPTS, EmbedConfig, EmbedSummary
from jarm.embedding.extract import Corpus, Embedded, Model, extract
from jarm.embedding.job import Job, plan_rows, read_job, refuse_differences
from jarm.embedding.sink import Sink, open_stores
from jarm.llm.sharding import load_sharded, make_mesh, split_config


def embed(config: EmbedConfig) -> EmbedSummary:
    """Embed every distinct text of the input that the store lacks.

    The store then finds the row of a text by its key, `store.rows([key_of(text)])`, and `load` the rows of a table of
    responses.

    Args:
      config: input, model and store.

    Returns:
      Numbers of texts and tokens, and the folders of the stores.

    Raises:
      JarmError: an input, model or store that cannot be used, by name; committed rows stay.
      KeyboardInterrupt: the process was told to stop, and stopped after committing the rows computed so far.

    Example:
      >>> embed(EmbedConfig("HuggingFaceTB/SmolLM2-135M", ("responses.jsonl",), dtype="float8"))
      Traceback (most recent call last):
      jarm.core.status.JarmError: `dtype` is 'float8' (did you mean 'float32'?): choose one of float32, bfloat16.
    """
    join_if_asked(config.distributed, config.coordinator, config.processes, config.process_id)
    job = read_job(config)
    corpus = job.corpus
    if jax.process_index() == 0:
        for remark in (job.said, *corpus.texts.notes):
            if remark:
                say(remark)
    if config.show:
        show(_shown(corpus, np.arange(min(config.show, len(corpus)))))
        return EmbedSummary()
    mesh = make_mesh(config.tensor_parallel)
    split_config(job.model, mesh)  # refuses a model that does not divide
    refuse_differences(job)
    distinct = job.distinct
    same = corpus.alike(distinct)  # before the first batch, so that a text that cannot be embedded shows now
    with contextlib.ExitStack() as stack:
        writers = open_stores(stack, job.made_by(), job.width, job.store_dtype)
        rows, done = plan_rows(job, writers)
        summary = EmbedSummary(
            stores=tuple(writer.path for writer in writers),
            texts=len(corpus),
            distinct=len(distinct),
            truncated=len(corpus.truncated),
            empty_responses=sum(response == "" for response in corpus.texts.columns["response"]),
            **count_same(corpus.texts.prompts(distinct)[1], same),
        )
        todo = rows[~done[rows]]
        if not len(todo):
            return summary
        if jax.process_index() == 0:
            layout = corpus.texts.layout
            say(f"{len(corpus):,} texts ({layout}), {len(distinct):,} distinct; the first:")
            say(_shown(corpus, rows[:1], max_characters=300))
        alike = _grouped(rows, same[np.searchsorted(distinct, rows)])
        complete = np.zeros(len(corpus), bool)
        complete[list(alike)] = [done[group].all() for group in alike.values()]
        results = extract(
            Model(*load_sharded(job.folder, job.model, mesh, dtype=job.dtype), mesh),
            corpus,
            np.array(list(alike)),
            poolings=job.poolings,
            budget=job.budget,
            share=SHARE_PROMPTS[config.share_prompts],
            done=complete,
            stop=stack.enter_context(stoppable()).is_set,
        )
        results = _finished(results, job)
        # In a thread that can be left while it compiles, unless other processes wait for this one.
        results = ahead(results, patient=jax.process_count() > 1)
        return _commit_all(results, Sink(corpus, writers, alike), summary, todo)


def _finished(results: Generator[Embedded], job: Job) -> Generator[Embedded]:
    """The same results, as the stores hold them."""
    with contextlib.closing(results):
        for result in results:
            yield result._replace(values=job.finished(result.values))


def _grouped(rows: np.ndarray, same: np.ndarray) -> dict[int, list[int]]:
    """The first row of each number in `same`, which goes through the model, and the rows that get its embedding."""
    groups: dict[int, list[int]] = {}
    for row, number in zip(rows.tolist(), same.tolist(), strict=True):
        groups.setdefault(number, []).append(row)
    return {group[0]: group for group in groups.values()}


def count_same(prompts: np.ndarray, same: np.ndarray) -> dict[str, int]:
    """Texts, pairs within prompts, and prompts that their tokens leave without a difference.

    Args:
      prompts: `[k]` number of the prompt of each distinct text, from 0 without gaps.
      same: `[k]` number that texts with the same tokens share.

    Returns:
      Fields of `EmbedSummary`.

    Example:
      >>> count_same(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 2, 3, 3, 0]))["same_pairs"]  # of 4
      2
    """
    _, sizes = np.unique(same, return_counts=True)
    texts = np.bincount(prompts)
    pairs = texts * (texts - 1) // 2
    same_pairs = count_alike(same, prompts)
    return {
        "same_texts": int(sizes[sizes > 1].sum()),
        "pairs": int(pairs.sum()),
        "same_pairs": int(same_pairs.sum()),
        "prompts": len(texts),
        "same_prompts": int(((texts > 1) & (same_pairs == pairs)).sum()),
    }


def _commit_all(results: Generator[Embedded], sink: Sink, summary: EmbedSummary, todo: np.ndarray) -> EmbedSummary:
    """Commit results as they come, and show progress, until they end or a signal stops them."""
    sizes = sink.corpus.sizes
    left = np.zeros(len(sizes), bool)
    left[todo] = True
    embedded = tokens = padded = 0
    start, seconds = time.monotonic(), 0.0
    with (
        contextlib.closing(results),
        # In characters, as the longest texts come first.
        Progress("embed", int(sizes[todo].sum()), "compiling first", show=jax.process_index() == 0) as progress,
    ):
        try:
            for result in results:
                sink.add(result)
                new = np.concatenate([sink.alike[row] for row in result.rows.tolist()])
                new = new[left[new]]
                embedded, tokens, padded = embedded + len(new), tokens + result.tokens, padded + result.padded
                seconds = time.monotonic() - start
                progress.update(
                    int(sizes[new].sum()),
                    f"{embedded:,} of {len(todo):,} texts, {embedded / seconds:,.1f} texts/s, "
                    f"{tokens / seconds:,.0f} tokens/s, {1 - tokens / padded:.1%} padding",
                )
        except BaseException:
            with contextlib.suppress(JarmError):  # the error may be that the store cannot be written
                sink.commit()
            raise
        sink.commit()
    if embedded < len(todo):
        raise KeyboardInterrupt
    return dataclasses.replace(summary, embedded=embedded, tokens=tokens, padded=padded, seconds=seconds)


def _shown(corpus: Corpus, rows: np.ndarray, max_characters: int | None = None) -> str:
    """Exact texts and token ids of some rows, each shortened to `max_characters` where given."""
    lines, places = [], corpus.texts.places
    seen: dict[bytes, int] = {}
    for row, ids in corpus.encode(rows):
        words = corpus.tokenizer.words(ids)
        text, tokens = repr(corpus.tokenizer.render(corpus.texts.row(row))), " ".join(map(str, ids.tolist()))
        if max_characters is not None:
            text, tokens = (
                each if len(each) <= max_characters else f"{each[:max_characters]} ..." for each in (text, tokens)
            )
        head = f"{places[row]}: {len(ids):,} tokens, the first {words[0]!r}, the last {words[-1]!r}"
        head += "; the text was cut" * (row in corpus.truncated)
        if (first := seen.setdefault(ids.tobytes(), row)) != row and corpus.keys[first] != corpus.keys[row]:
            head += f"; the same tokens as {places[first]}"
        lines += [head, text, tokens]
        if max_characters is None:
            lines.append(" ".join(words))
    return "\n".join(map(printable, lines))
