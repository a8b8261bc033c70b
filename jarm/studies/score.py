"""`jarm score`: the rewards of responses by a saved reward model, ranked within their prompts."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jarm.core.checks import Check, check_fields, one_of
from jarm.core.files import make_folder, there, write_whole
from jarm.core.status import JarmError
from jarm.core.types import Float, Int
from jarm.data.journal import differing
from jarm.data.readers import refuse_nonfinite
from jarm.data.rows import open_embeddings, rows_of_texts
from jarm.data.store import EmbeddingStore
from jarm.data.texts import Texts, extra_fields, read_texts
from jarm.export.aggregate import read_aggregate
from jarm.export.model import RewardModel, load_model

ROWS, TEXTS = 1 << 16, 1 << 10
"""Embeddings that are scored at a time, and texts that are embedded at a time."""
SCORE_CHECKS: Mapping[str, Check] = {
    "aggregate": lambda _, text: read_aggregate(text),
    "dtype": one_of("float32", "bfloat16"),
}
"""Option of `jarm score` -> the check of its values."""


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Settings of `jarm score`.

    Example:
      >>> ScoreConfig(model="out/model", data="answers.jsonl", embeddings="answers.npy").out
      PosixPath('out/scores.jsonl')

    Attributes:
      model: folder of a reward model, as `jarm train` writes it.
      data: a Parquet or JSONL file of responses, in any layout that `jarm embed` reads.
      embeddings: a store that has the texts, or an .npy with one row for each response; without one, the texts are
        embedded now, as the model's training texts were.
      llm: folder of the language model that embeds them, or its id on the hub; by default the one of the training.
      dtype: of the language model, "float32" or "bfloat16"; by default that of the training embeddings.
      aggregate: in the place of the model's own: "mean", "worst", "lower:C" or "quantile:LEVEL".
      prompt_column: column of the prompts, where it is not `prompt`.
      response_columns: columns of the responses, where they have none of the usual names.
      out: JSONL file of the scores; a new one.
    """

    model: str
    data: str
    embeddings: str | None = None
    llm: str | None = None
    dtype: str | None = None
    aggregate: str | None = None
    prompt_column: str | None = None
    response_columns: tuple[str, ...] = ()
    out: pathlib.Path = pathlib.Path("out/scores.jsonl")

    def __post_init__(self) -> None:
        check_fields(self, SCORE_CHECKS)
        refuse_both_embedded(self)


def score(config: ScoreConfig) -> dict[str, Any]:
    """Score the responses of a table, and write a line for each.

    A line has the `row` (from 0) or `line` (from 1) of the response in its file, its `response` number in it, the
    `reward` in logits, its `deviation` over the members, and its `rank` among the responses to its prompt, 1 the
    best; equal rewards are ranked in the order of the file.

    Args:
      config: the settings.

    Returns:
      Counts of `responses` and `prompts`, and `best_of`: the mean of the largest reward less the mean reward, over
      prompts.

    Raises:
      JarmError: the model, the data or the embeddings are at fault, do not go together, or the file is there already.

    Example:
      >>> import tempfile
      >>> from jarm.reward.config import HeadConfig
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> params = {"out": {"kernel": np.array([[[1.0], [0.0]]], np.float32)}}
      >>> RewardModel(HeadConfig(hidden=()), params, np.zeros(1, np.float32)).save(folder / "model")
      >>> rows = [{"prompt": "2 + 2?", "response": text} for text in ("4", "5")]
      >>> _ = (folder / "answers.jsonl").write_text("\\n".join(map(json.dumps, rows)))
      >>> np.save(folder / "answers.npy", np.array([[3.0, 0.0], [1.0, 0.0]]))
      >>> places = (str(folder / name) for name in ("model", "answers.jsonl", "answers.npy"))
      >>> score(ScoreConfig(*places, out=folder / "scores.jsonl"))
      {'responses': 2, 'prompts': 1, 'best_of': 1.0}
      >>> print((folder / "scores.jsonl").read_text().splitlines()[0])
      {"line": 1, "response": 0, "reward": 3.0, "deviation": 0.0, "rank": 1}
    """
    out = pathlib.Path(config.out)
    if there(out):
        raise JarmError(f"{out} stands there already, and stays: give another --out.")
    model = load_model(config.model)
    texts, rewards = _scored(config, model)
    aggregate = model.with_aggregate(config.aggregate).aggregate
    reward, deviation = aggregate(rewards), rewards.std(axis=0)
    _, prompt = texts.prompts()
    rank = ranks_within(prompt, reward)
    unit = texts.places.counted[0]
    lines = (
        {
            unit: int(texts.places.rows[at]),
            "response": int(texts.places.slots[at]),
            "reward": float(reward[at]),
            "deviation": float(deviation[at]),
            "rank": int(rank[at]),
        }
        for at in range(len(reward))
    )
    make_folder(out.parent)
    write_whole(out, "".join(json.dumps(line) + "\n" for line in lines))
    count = np.bincount(prompt)
    largest = np.full(len(count), -np.inf)
    np.maximum.at(largest, prompt, reward)
    return {
        "responses": len(reward),
        "prompts": len(count),
        "best_of": float((largest - np.bincount(prompt, reward) / count).mean()),
    }


def _scored(config: ScoreConfig, model: RewardModel) -> tuple[Texts, Float[np.ndarray, "K n"]]:
    """The texts, and the rewards of each member."""
    if config.embeddings is not None:
        store = open_for(model, config.embeddings)
        texts = texts_for([store], config.data, config.prompt_column, config.response_columns)
        return texts, member_rewards(model, store, rows_of_texts(config.data, texts, store, config.embeddings))
    texts, parts = embedded_now(config, model)
    return texts, np.concatenate([model.member_scores(part) for part in parts], axis=1)


def refuse_both_embedded(config: Any) -> None:
    """Refuse a config with embeddings and with what would make others.

    Raises:
      JarmError: it has both.
    """
    for name in ("llm", "dtype"):
        if getattr(config, name) is not None and config.embeddings is not None:
            raise JarmError(
                f"`{name}` embeds the texts now, and `embeddings` names those there are: give one of the two."
            )


def embedded_now(config: Any, model: RewardModel) -> tuple[Texts, Iterator[Float[np.ndarray, "n d"]]]:
    """The texts of a config without embeddings, and their embeddings, some at a time, as the model's texts were."""
    embed = model.embedder(config.llm, config.dtype)
    texts = texts_for([], config.data, config.prompt_column, config.response_columns)
    prompts, responses = texts.columns["prompt"], texts.columns["response"]
    parts = [slice(at, at + TEXTS) for at in range(0, len(responses), TEXTS)]
    return texts, (embed(prompts[part], responses[part]) for part in parts)


def open_for(model: RewardModel, embeddings: str) -> Any:
    """Embeddings for a model: a store, or the array of an `.npy`.

    Raises:
      JarmError: they are neither, damaged, hold NaN, or were made otherwise than those of the model's training.
    """
    store = open_embeddings(embeddings)
    if isinstance(store, EmbeddingStore):
        refuse_other(model, store)
    else:
        refuse_nonfinite(store, embeddings)
    return store


def texts_for(stores: Sequence[Any], data: str, prompt: str | None, responses: Sequence[str]) -> Texts:
    """The texts of a file, with the further columns of which stores make their texts."""
    templates = [store.template for store in stores if isinstance(store, EmbeddingStore)]
    extra = list(dict.fromkeys(name for template in templates for name in extra_fields(template)))
    return read_texts([data], prompt=prompt, responses=responses, extra=extra, as_given=True)


def member_rewards(model: RewardModel, store: Any, rows: Int[np.ndarray, "n"]) -> Float[np.ndarray, "K n"]:
    """Rewards of each member for some rows of embeddings, in logits.

    Raises:
      JarmError: the embeddings have another width than the model.
    """
    members = [model.member_scores(np.asarray(store[rows[at : at + ROWS]])) for at in range(0, len(rows), ROWS)]
    return np.concatenate(members, axis=1)


def ranks_within(prompt: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Rank of each reward among those of its prompt, `[n]`, 1 the largest; equal ones in their order.

    Example:
      >>> ranks_within(np.array([0, 1, 0, 0]), np.array([1.0, 0.0, 3.0, 1.0]))
      array([2, 1, 1, 3])
    """
    order = np.lexsort((-reward, prompt))
    first = np.searchsorted(prompt[order], prompt[order])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - first + 1
    return rank


def refuse_other(model: RewardModel, store: EmbeddingStore) -> None:
    """Refuse embeddings that were made otherwise than those that a model was trained on.

    Raises:
      JarmError: settings differ, by name; nothing is compared where the model's are not known.
    """
    if model.made_by is None:
        return
    if odd := differing(model.made_by, store.meta.made_by):
        raise JarmError(
            f"{store.path} was not made as the embeddings that the model was trained on ({odd}): embed the texts as "
            f"those were, with {model.made_by.get('model')}."
        )
