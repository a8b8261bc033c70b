"""An embedding job: what its store was made by, and the batches that are left."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jarm.core.files import fingerprint, replace_text
from jarm.core.status import JarmError
from jarm.data.writer import StoreWriter, explained
from jarm.embedding.config import EmbedConfig, _dtype
from jarm.embedding.sentence import trained_pooling
from jarm.embedding.sink import Sink
from jarm.embedding.tokens import Tokenizer
from jarm.llm.config import ModelConfig
from jarm.llm.pooling import Pooling
from jarm.llm.weights import weight_files


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


def _weights(folder: pathlib.Path) -> str:
    """A fingerprint of all weights of a checkpoint."""
    prints = [fingerprint(path) for path in weight_files(folder)]
    return hashlib.sha256("".join(prints).encode()).hexdigest()[:16]


JOBS = "jobs.json"
"""In a store's folder: how many rows it had when each job began; see `plan_job`."""


def plan_job(sink: Sink, settings: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """What there is to embed, `[k]` rows, and what of all is done, `[n]` bool; the same in all processes.

    Texts that were in the store when this job began are no part of it. Its start is kept beside the store, so that
    after an interruption the job is the same, with the same batches, and what was done since is only skipped.

    Args:
      sink: where results go.
      settings: whatever else makes it this job.
    """
    first_of: dict[str, int] = {}
    for row, key in enumerate(sink.keys):
        first_of.setdefault(key, row)
    job = hashlib.sha256(json.dumps([list(settings), list(first_of)]).encode()).hexdigest()
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
    path, jobs = writer.path / JOBS, {}
    with contextlib.suppress(OSError, ValueError):
        jobs = json.loads(path.read_text())
    if isinstance(jobs, dict) and isinstance(jobs.get(job), int) and jobs[job] <= len(writer):
        return int(jobs[job])
    with explained(writer.path):
        replace_text(path, json.dumps({**(jobs if isinstance(jobs, dict) else {}), job: len(writer)}, indent=1) + "\n")
    return len(writer)
