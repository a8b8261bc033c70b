"""A reward model as a CrossEncoder of sentence-transformers, 5.4 or later: pooling and dense layers, and no code.

Its inputs are pairs of a whole text and an empty one, `(text, "")`: the tokenizer that is written puts around such a
pair what it puts around the text alone.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from jarm.core.files import PathLike, make_folder, whole_folder, write_whole
from jarm.core.status import JarmError
from jarm.embedding.embedder import job_of
from jarm.embedding.job import Job
from jarm.embedding.tokens import CHAT
from jarm.export.card import model_card
from jarm.export.checkpoint import write_language_model
from jarm.export.layers import IDENTITY, Layer, reward_layers
from jarm.export.model import CARD, RewardModel, refuse_taken, refuse_unmade
from jarm.export.tokenizer import pad_alone, pad_apart, write_tokenizer

ACTIVATIONS = {
    IDENTITY: "torch.nn.modules.linear.Identity",
    "gelu": "torch.nn.modules.activation.GELU",
    "relu": "torch.nn.modules.activation.ReLU",
    "silu": "torch.nn.modules.activation.SiLU",
    "tanh": "torch.nn.modules.activation.Tanh",
}
"""Activation -> its class in PyTorch."""
POOLINGS = {"last": "lasttoken", "mean": "mean", "cls": "cls"}
_MODULES = "sentence_transformers."
_TYPES = {
    "Transformer": f"{_MODULES}base.modules.transformer.Transformer",
    "Pooling": f"{_MODULES}sentence_transformer.modules.pooling.Pooling",
    "Normalize": f"{_MODULES}base.modules.normalize.Normalize",
    "Dense": f"{_MODULES}base.modules.dense.Dense",
}


def write_cross_encoder(model: RewardModel, folder: PathLike, llm: str | None = None) -> dict[str, Any]:
    """Write the language model, its pooling and the head as dense layers, for `CrossEncoder(FOLDER)`.

    Args:
      model: any head on one pooling of the last layer; of several members their mean.
      folder: a new or empty one.
      llm: folder of the language model, or its id on the hub; by default the name that the embeddings came with.

    Returns:
      `layers`, the number of dense layers.

    Raises:
      JarmError: what such a model cannot hold, by name, with the ways out.
    """
    folder = pathlib.Path(folder)
    refuse_taken(folder)
    refuse_unmade(model)
    layers = reward_layers(model)
    _refuse_activation(model)
    job = job_of(model.made_by or {}, llm)
    _refuse_job(job)
    tokenizer = job.corpus.tokenizer
    if not pad_alone(tokenizer):
        raise JarmError(
            f"{job.folder} has a slow tokenizer, whose special tokens cannot be set: take a tokenizer.json, or use "
            "`jarm serve` or a reward function."
        )
    if pad_apart(tokenizer, job.model.vocab) is None:
        tokenizer.own.pad_token = tokenizer.own.eos_token  # poolings go by the mask
    settings = {"dtype": (model.made_by or {}).get("compute_dtype", "float32"), "architectures": None}
    with whole_folder(folder) as draft:
        write_tokenizer(tokenizer, draft)
        names = _write_modules(job, draft, layers)
        modules = [
            {"idx": at, "name": str(at), "path": path, "type": _TYPES[kind]} for at, (kind, path) in enumerate(names)
        ]
        _write(draft / "modules.json", modules)
        _write(draft / "sentence_bert_config.json", _FORWARD)
        _write(draft / "config_sentence_transformers.json", _CROSS)
        write_whole(draft / CARD, model_card(model, **_said(job)))
        write_language_model(job, draft, settings)
    return {"layers": len(layers)}


_FORWARD = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
_CROSS = {
    "model_type": "CrossEncoder",
    "activation_fn": ACTIVATIONS[IDENTITY],
    "prompts": {},
    "default_prompt_name": None,
    "__version__": {"sentence_transformers": "5.4.0"},
}


def _write(path: pathlib.Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")


def _refuse_activation(model: RewardModel) -> None:
    if model.head.hidden and model.head.activation not in ACTIVATIONS:
        raise JarmError(
            f"A CrossEncoder names its activations by their class in PyTorch, and {model.head.activation} has none of "
            f"its own: train with one of {', '.join(name for name in ACTIVATIONS if name != IDENTITY)}, or use "
            "`--to onnx`, `jarm serve` or a reward function."
        )


def _refuse_job(job: Job) -> None:
    pooling, depth = job.poolings[0], len(job.model.layers)
    said = f"layer {pooling.layer_of(depth)} of {depth}" if pooling.layer_of(depth) != depth else ""
    if job.head is not None or pooling.skip:
        said = "several poolings, a part of the tokens, or modules behind the pooling"
    if said:
        raise JarmError(
            f"A CrossEncoder pools the last layer once, and these embeddings are of {said}: use `--to onnx` on "
            "embeddings, `jarm serve` or a reward function."
        )


def _write_modules(job: Job, folder: pathlib.Path, layers: list[Layer]) -> list[tuple[str, str]]:
    """The folder of each module but the first; kind and path of all."""
    import safetensors.numpy

    names = [("Transformer", ""), ("Pooling", "1_Pooling")]
    pooling = {"embedding_dimension": job.model.width, "pooling_mode": POOLINGS[job.poolings[0].kind]}
    make_folder(folder / "1_Pooling")
    _write(folder / "1_Pooling" / "config.json", {**pooling, "include_prompt": True})
    if job.normalize:
        names.append(("Normalize", "2_Normalize"))
        make_folder(folder / "2_Normalize")
        _write(folder / "2_Normalize" / "config.json", {})
    for layer in layers:
        path, last = f"{len(names)}_Dense", layer is layers[-1]
        make_folder(folder / path)
        config = {
            "in_features": layer.kernel.shape[0],
            "out_features": layer.kernel.shape[1],
            "bias": True,
            "activation_function": ACTIVATIONS[layer.activation],
            "module_input_name": "sentence_embedding",
            "module_output_name": "scores" if last else "sentence_embedding",
        }
        tensors = {"linear.weight": layer.kernel.T, "linear.bias": layer.bias}
        tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
        write_whole(folder / path / "model.safetensors", safetensors.numpy.save(tensors, metadata={"format": "pt"}))
        _write(folder / path / "config.json", config)
        names.append(("Dense", path))
    return names


def _said(job: Job) -> dict[str, Any]:
    chat = job.corpus.tokenizer.template == CHAT
    form = "what the tokenizer's `apply_chat_template` makes of prompt and response"
    if not chat:
        form = f"`{job.corpus.tokenizer.form.prompt}{job.corpus.tokenizer.template}`, filled with prompt and response"
    return {
        "pipeline": "text-ranking",
        "library": "sentence-transformers",
        "remarks": [
            'Load it with `CrossEncoder(FOLDER)`, sentence-transformers 5.4 or later, and give `predict([(text, "")])` '
            f"whole texts with an empty second: {form}.",
            "Scores are the rewards of jarm. Programs that do not know its dense layers (vLLM and TEI, at the time of "
            "writing) leave them out without a word, and `AutoModelForSequenceClassification` gives random scores.",
        ],
    }
