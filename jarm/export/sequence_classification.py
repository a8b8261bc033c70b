"""A linear reward model as a sequence classification model of transformers: one vector on the last token.

Such a model has no bias and no scaling, so the standardisation is folded into the vector, and what it adds to every
reward, a constant, is left out: scores are rewards less `constant`.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from jarm.core.files import PathLike, whole_folder, write_whole
from jarm.core.status import JarmError
from jarm.data.texts import JOINED, WHOLE
from jarm.embedding.embedder import job_of
from jarm.embedding.job import Job
from jarm.embedding.tokens import CHAT
from jarm.export.card import model_card
from jarm.export.checkpoint import write_language_model
from jarm.export.layers import reward_layers
from jarm.export.model import CARD, RewardModel, refuse_taken, refuse_unmade
from jarm.export.tokenizer import pad_apart, write_tokenizer

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
    refuse_unmade(model)
    job = job_of(model.made_by or {}, llm)
    _refuse_job(job)  # first what no option cures
    _refuse_head(model)
    pad = pad_apart(job.corpus.tokenizer, job.model.vocab)
    if pad is None:
        raise JarmError(
            f"{job.folder} has no token to pad with but the one that ends texts, and its table of tokens is full: the "
            "end of a padded text could not be found, so use `jarm serve` or a reward function."
        )
    (layer,) = reward_layers(model)
    constant = float(layer.bias[0])
    settings = {
        "architectures": [f"{CLASSES[job.model.family]}ForSequenceClassification"],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "problem_type": "regression",
        "pad_token_id": pad,
        "dtype": (model.made_by or {}).get("compute_dtype", "float32"),
    }
    base, score = BASES.get(job.model.family, "model."), {"score.weight": layer.kernel.T.astype(np.float32)}
    with whole_folder(folder) as draft:
        write_tokenizer(job.corpus.tokenizer, draft)
        write_whole(draft / CARD, model_card(model, **_said(job, constant, pad)))
        write_language_model(job, draft, settings, base=base, beside=score)
    return {"constant": constant, "pad_token_id": pad}


def _refuse_head(model: RewardModel) -> None:
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
    if tokenizer.template not in (CHAT, JOINED, WHOLE) or any(tokenizer.special) or tokenizer.form.prompt:
        form = repr(tokenizer.form.prompt + tokenizer.template)
        if any(tokenizer.special):
            form += f", with {sum(tokenizer.special)} special tokens around it"
        raise JarmError(
            f"Programs that load such a model give it a chat, or prompt and response joined, without special tokens, "
            f"and this one was trained on {form}: embed with `--template chat`, and train again, or use `jarm serve` "
            "or a reward function."
        )


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
