"""A linear reward model as a sequence classification model of transformers: one vector on the last token.

Such a model has no bias and no scaling, so the standardisation is folded into the vector, and what it adds to every
reward, a constant, is left out: scores are rewards less `constant`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jarm.core.files import PathLike, make_folder, write_whole
from jarm.core.outside import read_json
from jarm.core.status import JarmError
from jarm.data.texts import JOINED, WHOLE
from jarm.embedding.embedder import job_of
from jarm.embedding.job import Job
from jarm.embedding.tokens import CHAT
from jarm.export.card import model_card
from jarm.export.layers import reward_layers
from jarm.export.model import CARD, RewardModel, refuse_taken
from jarm.llm.config import FAMILIES
from jarm.llm.weights import used_tensors

CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3Text",
    "gemma3_text": "Gemma3Text",
    "smollm3": "SmolLM3",
    "olmo2": "Olmo2",
    "phi3": "Phi3",
    "gpt_neox": "GPTNeoX",
    "gpt2": "GPT2",
}
"""Family -> name of its class in transformers, before `ForSequenceClassification`."""
BASES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}
"""What the names of tensors begin with in that class, where it is not `model.`."""
SHARD_BYTES = 2 << 30
WAYS = (
    "use `jarm export --to cross-encoder`, `jarm serve` or a reward function, or `jarm export --distil EMBEDDINGS` for "
    "a linear model that comes close"
)


def write_sequence_classification(model: RewardModel, folder: PathLike, llm: str | None = None) -> dict[str, Any]:
    """Write the language model with the reward as its `score`, for `AutoModelForSequenceClassification`.

    Args:
      model: linear, on the last token of the last layer of a decoder.
      folder: a new or empty one.
      llm: folder of the language model, or its id on the hub; by default the name that the embeddings came with.

    Returns:
      `constant`, what a reward of `model` has more than the score; `pad_token_id`.

    Raises:
      JarmError: what such a model cannot hold, by name, with the ways out.
    """
    folder = pathlib.Path(folder)
    refuse_taken(folder)
    _refuse_head(model)
    job = job_of(model.made_by or {}, llm)
    _refuse_job(job)
    pad = job.corpus.tokenizer.pad_apart()
    if pad is None:
        raise JarmError(
            f"{job.folder} has no token to pad with but the one that ends texts, and its table of tokens is full: the "
            "end of a padded text could not be found, so use `jarm serve` or a reward function."
        )
    (layer,) = reward_layers(model)
    constant = float(layer.bias[0])
    make_folder(folder)
    job.corpus.tokenizer.save(folder)
    _write_weights(job, folder, np.float32(layer.kernel.T))
    write_whole(folder / CARD, model_card(model, **_said(job, constant, pad)))
    # Last, so that a folder with a config is whole.
    write_whole(folder / "config.json", json.dumps(_config(job, model, pad), indent=1) + "\n")
    return {"constant": constant, "pad_token_id": pad}


def _refuse_head(model: RewardModel) -> None:
    if model.made_by is None:
        raise JarmError(
            "How the embeddings of this reward model were made is not known, as they came from an .npy: train on a "
            "store of `jarm embed`, or use `--to numpy` or `--to onnx`, which read embeddings."
        )
    if model.head.hidden:
        raise JarmError(
            f"A sequence classification model has one linear layer, and this head is {model.head} (loaded there, its "
            f"score would be random): {WAYS}."
        )
    reward_layers(model)


def _refuse_job(job: Job) -> None:
    """Refuse embeddings and texts that such a model does not make."""
    pooling, tokenizer = job.poolings[0], job.corpus.tokenizer
    said = ""
    if job.model.family not in CLASSES or job.model.encoder:
        said = f"the language model is a {job.model.family}, and only decoders are read at their last token"
    elif job.head is not None or job.normalize:
        said = "embeddings are mapped or scaled after the pooling"
    elif pooling.kind != "last" or pooling.layer_of(len(job.model.layers)) != len(job.model.layers):
        said = (
            f"embeddings are the {pooling.kind} of layer {pooling.layer_of(len(job.model.layers))} of "
            f"{len(job.model.layers)}"
        )
    if said:
        raise JarmError(
            f"A sequence classification model reads the last token of a decoder's last layer, and here {said}: {WAYS}."
        )
    if tokenizer.template not in (CHAT, JOINED, WHOLE) or tokenizer.special:
        form = f"{tokenizer.template!r}" + f", with {tokenizer.special} special tokens around it" * bool(
            tokenizer.special
        )
        raise JarmError(
            f"Programs that load such a model give it a chat, or prompt and response joined, without special tokens, "
            f"and this one was trained on {form}: embed with `--template chat`, and train again, or use `jarm serve` "
            "or a reward function."
        )


def _config(job: Job, model: RewardModel, pad: int) -> dict[str, Any]:
    """The language model's config as that of its sequence classification class."""
    config = read_json(job.folder / "config.json")
    if "text_config" in config and FAMILIES[job.model.family].text_config:
        config = {"model_type": "gemma3_text", **config["text_config"]}
    for name in ("torch_dtype", "auto_map", "transformers_version"):
        config.pop(name, None)
    made = model.made_by or {}
    return {
        **config,
        "architectures": [f"{CLASSES[job.model.family]}ForSequenceClassification"],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "problem_type": "regression",
        "pad_token_id": pad,
        "dtype": made.get("compute_dtype", "float32"),
    }


def _write_weights(job: Job, folder: pathlib.Path, score: np.ndarray) -> None:
    """The tensors of the language model, with the names that the class has, and `score.weight` `[1, d]`."""
    import safetensors.numpy

    places, size = dict[str, str](), 0
    shards = list(_shards(job, score))
    for at, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{at + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: np.ascontiguousarray(read()) for name, read in names.items()}
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        size += sum(each.nbytes for each in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def _shards(job: Job, score: np.ndarray) -> Iterator[dict[str, Any]]:
    """Name of each tensor of a file -> what reads it, for each file of about `SHARD_BYTES`."""
    checkpoint, used = used_tensors(job.folder, job.model)
    base = BASES.get(job.model.family, "model.")
    shard: dict[str, Any] = {"score.weight": lambda: score}
    room = SHARD_BYTES
    for name, inner in used.items():
        size = 4 * int(np.prod(checkpoint.shape(name), dtype=np.int64))
        if shard and size > room:
            yield shard
            shard, room = {}, SHARD_BYTES
        shard[base + inner], room = lambda name=name: checkpoint.read(name), room - size
    yield shard


def _said(job: Job, constant: float, pad: int) -> dict[str, Any]:
    word = job.corpus.tokenizer.words([pad])[0]
    return {
        "pipeline": "text-classification",
        "library": "transformers",
        "remarks": [
            "Load it with `AutoModelForSequenceClassification.from_pretrained(FOLDER)`, `num_labels` 1.",
            f"Rewards of jarm are these scores plus {constant:.6g}, which changes no ranking and no difference.",
            f"Texts are padded with token {pad} (`{word}`), with which no text ends: with another, the last token of a "
            "text may be taken for padding.",
            "Texts are given as in training: "
            + (
                "a chat of the prompt and the response, by the tokenizer's template."
                if job.corpus.tokenizer.template == CHAT
                else f"`{job.corpus.tokenizer.template}`, without special tokens around it."
            ),
        ],
    }
