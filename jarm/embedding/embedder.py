"""A language model that stays loaded, and embeds texts as those of a store were: for rewards of texts as they come."""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jarm.core.status import JarmError
from jarm.core.types import Float
from jarm.data.journal import differing
from jarm.data.texts import TEMPLATE, Places, Texts, extra_fields
from jarm.embedding.batches import Encoded, Shapes, TokenBatch, pad
from jarm.embedding.config import EmbedConfig
from jarm.embedding.extract import Corpus, Model, embed_batch
from jarm.embedding.job import Job, read_job
from jarm.embedding.sentence import read_sentence_model
from jarm.embedding.tokens import CHAT, CHAT_KEY, Tokenizer
from jarm.llm.sharding import gather, load_sharded, make_mesh
from jarm.llm.weights import find_checkpoint

SHORTEST = 16
"""Tokens of the shortest padded text; the others are twice as many each, so that few programs are compiled."""
SURROGATE = "holds half of a character (a surrogate): repair it, or leave it out."
FEW = np.array([1, 8, 64])
"""Texts of a batch on each device, where that is not full."""


class Frame(NamedTuple):
    """What a chat template writes around a response.

    Attributes:
      before: between the prompt's text and the response.
      after: behind the response.
      left, right: whether white space before and behind a response is left out.
    """

    before: str
    after: str
    left: bool
    right: bool

    def closed(self, prompt: str, response: str) -> str:
        """The whole text of a prompt, rendered up to its response, and the response.

        A prompt may end anywhere in `before`: generation prompts of some templates are shorter than what the template
        writes before an answer.

        Raises:
          JarmError: the prompt ends otherwise.

        Example:
          >>> Frame("</u><a>", "</a>", True, True).closed("<u>2 + 2?</u>", " 4")
          '<u>2 + 2?</u><a>4</a>'
        """
        shared = next((size for size in range(len(self.before), 0, -1) if prompt.endswith(self.before[:size])), 0)
        if not shared:
            raise JarmError(
                f"A prompt ends with {prompt[-40:]!r}, and the chat template that the reward model was trained with "
                f"writes {self.before[-40:]!r} before a response: render prompts with that template and its generation "
                "prompt."
            )
        response = response.lstrip() if self.left else response
        return f"{prompt}{self.before[shared:]}{response.rstrip() if self.right else response}{self.after}"


class Embedder:
    """Texts in, embeddings out, as `made_by` of a store says.

    Attributes:
      width: d, numbers in an embedding.
      max_length: largest number of tokens in a text.
    """

    def __init__(self, made_by: Mapping[str, Any], model: str | None = None, dtype: str | None = None):
        """Load the language model.

        Args:
          made_by: how the embeddings were made, as a store says it.
          model: folder of the checkpoint, or its id on the hub; by default the name in `made_by`.
          dtype: of the computation, `float32` or `bfloat16`; by default that in `made_by`.

        Raises:
          JarmError: the model cannot be had or is another one, or its texts have columns beside prompt and response.
        """
        self._job = job_of(made_by, model, dtype)
        mesh = make_mesh(devices=own_devices())
        self._model = Model(*load_sharded(self._job.folder, self._job.model, mesh, dtype=self._job.dtype), mesh)
        self.width, self.max_length = self._job.width, self._tokenizer.max_length
        lengths = [SHORTEST]
        while lengths[-1] < self.max_length:
            lengths.append(2 * lengths[-1])
        most = self._job.model.max_positions
        self._shapes = Shapes(tuple(lengths), (), self._job.budget, mesh.shape["data"], most)

    def __call__(self, prompts: Sequence[Any], responses: Sequence[Any]) -> Float[np.ndarray, "n d"]:
        """Embed each response with its prompt, float32.

        Args:
          prompts, responses: `n` of each, texts or lists of messages; without a chat template of one message.

        Raises:
          JarmError: unequal numbers of them, a text that cannot be embedded, or a vector that is NaN or infinite.
        """
        texts = texts_of(prompts, responses)
        if not self.chat:
            columns = {name: [_said(each) for each in values] for name, values in texts.columns.items()}
            texts = texts._replace(columns=columns)
        corpus = Corpus(texts, self._tokenizer)
        return self._embedded(corpus.encode(np.arange(len(corpus))))

    def whole(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Embed texts that hold prompt and response already, as the template joins them.

        Raises:
          JarmError: a text without tokens, or a vector that is NaN or infinite.
        """
        if odd := [text for text in texts if not _is_unicode(text)]:
            raise JarmError(f"The text {odd[0][:40]!r} {SURROGATE}")
        ids, _ = self._tokenizer.encode(list(texts))
        for at, each in enumerate(ids):
            if not len(each):
                raise JarmError(f"Text {at} is empty, so there is nothing to embed: leave it out.")
        return self._embedded(list(enumerate(ids)))

    @property
    def chat(self) -> bool:
        """Whether a chat template makes the texts."""
        return self._tokenizer.template == CHAT

    @functools.cached_property
    def frame(self) -> Frame | None:
        """What the chat template writes around a response; None where there is none, or it changes responses."""
        if not self.chat:
            return None
        prompt, response = "jarmsquestion", "jarmsanswer"

        def behind(text: str) -> str:
            return self._tokenizer.render({"prompt": prompt, "response": text}).partition(prompt)[2]

        before, found, after = behind(response).partition(response)
        left, right = (behind(text) == behind(response) for text in (f" {response}", f"{response} "))
        return Frame(before, after, left, right) if found else None

    @property
    def ends(self) -> tuple[str, ...]:
        """Special tokens, as text, that a model may end its responses with."""
        return self._tokenizer.ends

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._job.corpus.tokenizer

    def _embedded(self, texts: list[Encoded]) -> np.ndarray:
        """`[n, d]` embeddings of texts that are numbered from 0."""
        out = np.empty((len(texts), self.width), np.float32)
        for batch in self._batches(texts):
            values = gather(self._model.mesh, embed_batch(self._model, batch, self._job.poolings))
            (out[batch.rows],) = self._job.finished([np.asarray(each)[: len(batch.rows)] for each in values])
        finite = np.isfinite(out).all(axis=1)
        if not finite.all():
            raise JarmError(
                f"The embedding of text {int(np.argmin(finite))} is NaN or infinite: compute in float32, or leave that "
                "text out."
            )
        return out

    def _batches(self, texts: list[Encoded]) -> Iterator[TokenBatch]:
        """Texts of about one length together, in few shapes: each is a program to compile."""
        texts, at = sorted(texts, key=lambda text: -len(text[1])), 0
        while at < len(texts):
            length = self._shapes.padded(len(texts[at][1]))
            sizes = self._counts(length)
            count = next(size for size in sizes if size >= min(sizes[-1], len(texts) - at))
            yield pad(texts[at : at + count], count, length)
            at += count

    def _counts(self, length: int) -> list[int]:
        """Numbers of texts that batches of a padded length have, ascending."""
        full = self._shapes.rows(length)
        return [*(size for size in (FEW * self._shapes.devices).tolist() if size < full), full]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Texts and padded length of every batch there may be, small ones first."""
        lengths = dict.fromkeys(map(self._shapes.padded, self._shapes.lengths))
        return sorted(((count, length) for length in lengths for count in self._counts(length)), key=math.prod)

    def warm(self, count: int, length: int) -> None:
        """Compute a batch of a shape, so that the first texts of it need not wait for its program."""
        jax.block_until_ready(embed_batch(self._model, pad([], count, length), self._job.poolings))


def own_devices() -> list[jax.Device]:
    """The devices of this process: one of them where a launcher started a process for each (`LOCAL_RANK`)."""
    devices, rank = jax.local_devices(), os.environ.get("LOCAL_RANK", "")
    return [devices[int(rank) % len(devices)]] if rank.isdigit() else devices


def job_of(made_by: Mapping[str, Any], model: str | None = None, dtype: str | None = None) -> Job:
    """The job of `jarm embed` that made embeddings, without any texts; see `Embedder`.

    Raises:
      JarmError: as `Embedder`.
    """
    config = _config(made_by, model, dtype)
    try:
        job = read_job(config, texts_of([], []))
    except JarmError as error:
        raise JarmError(f"{config.model} is not the model of the training as it was: {error}") from error
    (made,) = job.made_by().values()
    if odd := differing(made_by, made):
        raise JarmError(
            f"{config.model} does not make the embeddings that the reward model was trained on ({odd}): give the "
            f"model that did, {made_by.get('model')}."
        )
    return job


@functools.lru_cache(maxsize=1)
def _loaded(made_by: str, model: str | None, dtype: str | None) -> Embedder:
    return Embedder(json.loads(made_by), model, dtype)


def loaded_embedder(made_by: Mapping[str, Any], model: str | None = None, dtype: str | None = None) -> Embedder:
    """The embedder of these arguments; the last one asked for stays loaded."""
    return _loaded(json.dumps(dict(made_by), sort_keys=True), model, dtype)


def texts_of(prompts: Sequence[Any], responses: Sequence[Any]) -> Texts:
    """Prompts and responses from memory, as texts.

    Raises:
      JarmError: unequal numbers of them, or one that is neither a text nor a list of messages.

    Example:
      >>> texts_of(["2 + 2?"], ["4"]).row(0)
      {'prompt': '2 + 2?', 'response': '4'}
    """
    for name, values in (("prompts", prompts), ("responses", responses)):
        if isinstance(values, str):
            raise JarmError(f"`{name}` is one text: give a list of texts.")
    columns = {"prompt": list(prompts), "response": list(responses)}
    if len(columns["prompt"]) != len(columns["response"]):
        raise JarmError(
            f"There are {len(columns['prompt']):,} prompts and {len(columns['response']):,} responses: give one prompt "
            "for each response."
        )
    for name, values in columns.items():
        for at, value in enumerate(values):
            if not _is_text(value):
                raise JarmError(
                    f"{name} {at} is {type(value).__name__} of another kind: give a text, or a list of messages with "
                    "`role` and a text as `content`."
                )
    count = len(columns["prompt"])
    places = Places(["the texts"], [0], ["row"], np.arange(count), np.zeros(count, np.int64), ("response",))
    return Texts(columns, places, "texts from memory", TEMPLATE)


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        if not _is_unicode(value):
            raise JarmError(f"The text {value[:40]!r} {SURROGATE}")
        return True
    return isinstance(value, list) and all(
        isinstance(each, Mapping) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in value
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _said(value: Any) -> Any:
    """The content of a single message, and all else as it is."""
    return value[0]["content"] if isinstance(value, list) and len(value) == 1 else value


def _config(made_by: Mapping[str, Any], model: str | None, dtype: str | None) -> EmbedConfig:
    """The settings of `jarm embed` that made the embeddings."""
    template = made_by.get("template")
    if template != CHAT_KEY and (extra := extra_fields(template or "")):
        raise JarmError(
            f"The texts of this reward model have the column '{extra[0]}' beside prompt and response: embed a table "
            "that has it with `jarm embed`, and score its rows."
        )
    named = model is None
    model = str(made_by.get("model")) if model is None else model
    revision = made_by.get("revision") if named else None
    sentence = read_sentence_model(_found(model, revision, named))
    wanted, prompt = made_by.get("model_prompt", ""), None
    if sentence is not None:
        known = {"none": "", **sentence.prompts}
        prompt = next((name for name, text in known.items() if text == wanted), None)
    whole = "modules" in made_by or "include_prompt" in made_by
    return EmbedConfig(
        model,
        ("texts",),
        pooling=() if whole else (made_by["pooling"],),
        layer=(-1,) if whole else (made_by["layer"],),
        normalize=bool(made_by.get("normalize")) and not whole,
        template=CHAT if template == CHAT_KEY else template,
        prompt_name=prompt,
        max_length=made_by.get("max_length"),
        keep=made_by.get("keep"),
        dtype=dtype or made_by.get("compute_dtype"),
        revision=revision,
    )


def _found(model: str, revision: str | None, named: bool) -> pathlib.Path:
    """The checkpoint of the language model."""
    try:
        return find_checkpoint(model, revision)
    except JarmError as error:
        if not named:
            raise
        raise JarmError(
            f"The reward model reads embeddings of '{model}', which is no folder here and no id that can be downloaded "
            "(give the folder of that language model as `llm`, or --llm)."
        ) from error
