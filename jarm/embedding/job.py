"""An embedding job: everything that decides its stores and its batches, read before anything is computed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jarm.core.files import fingerprint, write_whole
from jarm.core.outside import integer, mapping, read_json
from jarm.core.status import JarmError, printable
from jarm.data.texts import TEMPLATE, Texts, extra_fields, read_texts
from jarm.data.writer import JOBS, StoreWriter
from jarm.embedding.config import EmbedConfig
from jarm.embedding.extract import Corpus
from jarm.embedding.head import Head, Normalize
from jarm.embedding.sentence import SentenceModel, read_head, read_sentence_model
from jarm.embedding.tokens import Form, Tokenizer
from jarm.llm.config import ModelConfig, read_config
from jarm.llm.pooling import Pooling
from jarm.llm.weights import find_checkpoint, weight_files


@dataclasses.dataclass(frozen=True)
class Job:
    """A command, its model and its texts.

    Attributes:
      config: the settings, as given.
      folder: the checkpoint.
      model: architecture of the model.
      poolings: each pooling at each layer asked for; one store each, unless `head` makes one of them.
      corpus: all texts.
      normalize: whether rows are scaled to length 1.
      head: what joins or follows the poolings in a model of sentence-transformers; None for nothing.
      said: what a folder of sentence-transformers says of texts and vectors, in a line; empty for other folders.
    """

    config: EmbedConfig
    folder: pathlib.Path
    model: ModelConfig
    poolings: tuple[Pooling, ...]
    corpus: Corpus
    normalize: bool
    head: Head | None
    said: str

    @property
    def width(self) -> int:
        """Numbers in a row of a store."""
        return self.model.width if self.head is None else self.head.width

    @property
    def dtype(self) -> str:
        """Dtype of the model: float32 on a CPU and bfloat16 elsewhere, unless given."""
        return self.config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")

    @property
    def store_dtype(self) -> str:
        """Dtype of the stores: the model's, unless given."""
        return self.config.store_dtype or self.dtype

    @property
    def budget(self) -> int:
        """Tokens of a batch on one device, padding included."""
        return self.config.max_tokens_per_batch or (2048 if jax.default_backend() == "cpu" else 16384)

    @functools.cached_property
    def distinct(self) -> np.ndarray:
        """The first row of each distinct text, in order."""
        first: dict[str, int] = {}
        for row, key in enumerate(self.corpus.keys):
            first.setdefault(key, row)
        return np.array(list(first.values()))

    @functools.cached_property
    def weights(self) -> str:
        """Fingerprint of all weights of the checkpoint."""
        prints = [fingerprint(path) for path in weight_files(self.folder)]
        return hashlib.sha256("".join(prints).encode()).hexdigest()[:16]

    def finished(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What follows the poolings: what joins them, and the length of rows.

        Args:
          values: `[k, d]` float32, one array for each pooling.
        """
        rows = list(values) if self.head is None else [self.head(values)]
        return [Normalize()(each) for each in rows] if self.normalize else rows

    def made_by(self) -> dict[pathlib.Path, dict[str, Any]]:
        """Store folder -> everything that decides its rows."""
        config, out = self.config, pathlib.Path(self.config.out)
        common = {
            "model": pathlib.Path(config.model).resolve().name if os.path.isdir(config.model) else config.model,
            "revision": config.revision,
            "config": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()[:16],
            "weights": self.weights,
            **self.corpus.tokenizer.made_by,
            "normalize": self.normalize,
            "compute_dtype": self.dtype,
        }
        common |= {"include_prompt": False} if self.poolings[0].skip else {}
        if self.head is not None:
            steps = [step.said for step in self.head.steps]
            joined = {"pooling": "+".join(self.head.kinds), "layer": len(self.model.layers), "modules": steps}
            return {out: {**common, **joined}}
        made = {}
        for pooling in self.poolings:
            layer = pooling.layer_of(len(self.model.layers))
            path = out if len(self.poolings) == 1 else out / f"{pooling.kind}-{layer}"
            made[path] = {**common, "pooling": pooling.kind, "layer": layer}
        return made


def read_job(config: EmbedConfig, texts: Texts | None = None) -> Job:
    """Find the model, and read the texts as it will see them.

    Args:
      config: checked settings.
      texts: in the place of those of `config.input`.

    Raises:
      JarmError: an input, a model, a layer or a template that cannot be used, by name.
    """
    whole = find_checkpoint(config.model, config.revision)
    sentence = read_sentence_model(whole)
    folder = whole if sentence is None else sentence.transformer
    model = read_config(folder)
    head = None if sentence is None or config.pooling else read_head(sentence, model.width)
    poolings = _poolings(config, model, head)
    if texts is None:
        texts = read_texts(
            config.input,
            prompt=config.prompt_column,
            responses=config.response_columns,
            extra=extra_fields(config.template or ""),
            split=config.split,
            as_given=config.template is not None,
        )
    # Texts that were split only to find their prompts are joined again as they were, and models trained on plain texts
    # get plain texts, whatever chat template their tokenizers bring along.
    plain = texts.template != TEMPLATE or sentence is not None
    keep = None if sentence is not None else "end" if any(each.kind == "last" for each in poolings) else "start"
    tokenizer = Tokenizer(
        folder,
        template=config.template or (texts.template if plain else None),
        max_length=config.max_length,
        keep=keep if config.keep is None else config.keep,
        window=model.max_positions,
        vocab=model.vocab,
        form=_form(config, sentence),
    )
    if head is not None and not head.include_prompt and tokenizer.form.prompt:
        skip = tokenizer.prompt_tokens()
        poolings = tuple(dataclasses.replace(pooling, skip=skip) for pooling in poolings)
    normalize = config.normalize or (head is not None and head.normalize)
    said = ""
    if sentence is not None:
        name, pooled = pathlib.Path(config.model).name, "+".join(pooling.kind for pooling in poolings)
        unused = ", ".join(name for name, prompt in sentence.prompts.items() if prompt)
        if unused and not tokenizer.form.prompt:
            name += f" (with prompts that --prompt-name may take: {printable(unused)[:200]})"
        ways = f"pooling {pooled}{', as asked for' if config.pooling else ''}" if head is None else head.said
        said = f"{name} is a model of sentence-transformers: {tokenizer.said}; {ways}."
    joins = head if head is not None and head.joins else None
    return Job(config, folder, model, poolings, Corpus(texts, tokenizer), normalize, joins, said)


def _poolings(config: EmbedConfig, model: ModelConfig, head: Head | None) -> tuple[Pooling, ...]:
    """Each pooling asked for, or else of the model, at each layer asked for."""
    kinds = config.pooling or (("mean" if model.encoder else "last",) if head is None else head.kinds)
    poolings = tuple(Pooling(kind, layer) for kind in kinds for layer in config.layer)
    layers = {pooling.layer_of(len(model.layers)) for pooling in poolings}
    if not poolings:
        raise JarmError("There is no layer to pool: give --layer -1 for the last.")
    if head is None or not head.joins:
        return tuple(dict.fromkeys(poolings))
    if len(config.layer) > 1 or layers != {len(model.layers)}:
        raise JarmError(
            f"The model joins or maps what it pools of its last layer ({head.said}), and a --layer is another: give a "
            "--pooling too, to have hidden states as they are."
        )
    return poolings


def _form(config: EmbedConfig, sentence: SentenceModel | None) -> Form | None:
    """Form of texts that a folder of sentence-transformers asks for."""
    if sentence is None:
        if config.prompt_name is not None:
            raise JarmError(
                f"{config.model} has no prompts, as only models of sentence-transformers do: put the prompt into the "
                "--template in the place of --prompt-name."
            )
        return None
    if sentence.messages and config.template is None:
        raise JarmError(
            f"{sentence.folder} puts each text into its chat template ('modality_config'), which jarm does not do: "
            "give a --template to decide on the texts yourself."
        )
    return Form(sentence.prompt(config.prompt_name), sentence.lowercase, sentence.max_length)


def refuse_differences(job: Job) -> None:
    """Refuse to start where processes were given different texts, models or settings.

    Raises:
      JarmError: the kinds of things that differ, by name.
    """
    if jax.process_count() == 1:
        return
    own_ones = ("model", "input", "out", "process_id", "coordinator")
    settings = {name: value for name, value in dataclasses.asdict(job.config).items() if name not in own_ones}
    parts = {
        "texts": json.dumps(job.corpus.keys),
        "tokenizers or templates": json.dumps(job.corpus.tokenizer.made_by, sort_keys=True),
        "models": job.weights + (job.folder / "config.json").read_text("utf-8"),
        "settings": repr(settings) + job.dtype + job.said,
    }
    own = np.array([list(hashlib.sha256(part.encode()).digest()) for part in parts.values()], np.uint8)
    every = np.asarray(multihost_utils.process_allgather(own))
    if other := [name for at, name in enumerate(parts) if (every[:, at] != every[0, at]).any()]:
        raise JarmError(f"The processes have different {' and '.join(other)}: give all of them the same.")


def plan_rows(job: Job, writers: Sequence[StoreWriter]) -> tuple[np.ndarray, np.ndarray]:
    """Rows to embed, and rows that are done; the same in all processes.

    Texts that the stores held when this job began are no part of it. Its start is kept beside each store, so that after
    an interruption the job has the same rows in the same batches, and only skips those done since.

    Args:
      job: the job.
      writers: its stores; none in any process but the first.

    Returns:
      `[k]` rows of the job, one for each distinct text, and `[n]` bool, whether each of all rows is in every store.
    """
    first_of = {job.corpus.keys[row]: row for row in job.distinct.tolist()}
    devices = [jax.device_count(), jax.devices()[0].device_kind, jax.lib.__version__]
    settings = [job.budget, job.config.share_prompts, job.config.tensor_parallel, *devices]
    name = hashlib.sha256(json.dumps([settings, list(first_of)]).encode()).hexdigest()
    there = [set(writer.keys) for writer in writers]
    before = [set(writer.keys[: _rows_at_start(writer, name)]) for writer in writers]
    flags = np.array(
        [[not all(key in each for each in before), all(key in each for each in there)] for key in first_of]
    )
    if jax.process_count() > 1:
        flags = np.asarray(multihost_utils.broadcast_one_to_all(flags))
    rows = job.distinct
    done = np.zeros(len(job.corpus), bool)
    done[rows] = flags[:, 1]
    return rows[flags[:, 0]], done


def _rows_at_start(writer: StoreWriter, name: str) -> int:
    """Number of rows that a store had when a job of this name began, which may be now."""
    path, jobs = writer.path / JOBS, dict[str, int]()
    if os.path.lexists(path):
        jobs = read_json(path, mapping(integer()), cure="it is not as jarm writes it, so move it away, and start again")
    if jobs.get(name, len(writer) + 1) <= len(writer):
        return jobs[name]
    write_whole(path, json.dumps({**jobs, name: len(writer)}, indent=1) + "\n")
    return len(writer)
