"""The language model of a reward model, written again as transformers reads it."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jarm.core.files import write_whole
from jarm.core.outside import read_json
from jarm.embedding.job import Job
from jarm.llm.config import FAMILIES
from jarm.llm.weights import used_tensors

SHARD_BYTES = 2 << 30
"""Bytes of a file of weights, about; one is in memory at a time."""
_OWN = ("torch_dtype", "auto_map", "transformers_version")


def write_language_model(
    job: Job,
    folder: pathlib.Path,
    settings: Mapping[str, Any],
    *,
    base: str = "",
    beside: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write weights and config of a language model, the config last, so that a folder with one is whole.

    Args:
      job: its job of `jarm embed`.
      folder: there already.
      settings: entries of `config.json` that are others than the checkpoint's.
      base: what the names of its tensors begin with.
      beside: further tensors.
    """
    import safetensors.numpy

    places, size, shards = dict[str, str](), 0, list(_shards(job, base, beside or {}))
    for at, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{at + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: np.ascontiguousarray(read()) for name, read in shard.items()}
        write_whole(folder / file, safetensors.numpy.save(tensors, metadata={"format": "pt"}))
        places |= dict.fromkeys(tensors, file)
        size += sum(each.nbytes for each in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    config = read_json(job.folder / "config.json")
    if FAMILIES[job.model.family].text_config and "text_config" in config:
        config = {"model_type": "gemma3_text", **config["text_config"]}
    config = {name: value for name, value in config.items() if name not in _OWN}
    write_whole(folder / "config.json", json.dumps({**config, **settings}, indent=1) + "\n")


def _shards(job: Job, base: str, beside: Mapping[str, np.ndarray]) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
    """Name of each tensor of a file -> what reads it, for each file."""
    checkpoint, used = used_tensors(job.folder, job.model)
    shard: dict[str, Callable[[], np.ndarray]] = {
        name: functools.partial(np.asarray, array) for name, array in beside.items()
    }
    room = SHARD_BYTES
    for name, inner in used.items():
        size = 4 * int(np.prod(checkpoint.shape(name), dtype=np.int64))
        if shard and size > room:
            yield shard
            shard, room = {}, SHARD_BYTES
        shard[base + inner], room = functools.partial(checkpoint.read, name), room - size
    yield shard
