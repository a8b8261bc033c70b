"""Reward functions for programs of reinforcement learning: TRL, Tunix, verl and OpenRLHF.

All of them are one function of texts, `TextScorer`, behind the arguments and names that each program has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from jarm.core.status import JarmError
from jarm.export.batcher import Batcher, Scores
from jarm.export.model import RewardModel

if TYPE_CHECKING:
    from jarm.embedding.embedder import Frame

UNSCORED = float("nan")
"""The reward of a completion that is no text, which TRL leaves out of its means."""


@runtime_checkable
class Embeds(Protocol):
    """What embeds texts: `jarm.embedding.embedder.Embedder`, or a double of it in a test."""

    max_length: int

    def __call__(self, prompts: Sequence[Any], responses: Sequence[Any]) -> np.ndarray:
        """`[n, d]` embeddings."""

    def whole(self, texts: Sequence[str]) -> np.ndarray:
        """`[n, d]` embeddings of texts that hold prompt and response."""

    @property
    def chat(self) -> bool:
        """Whether a chat template makes the texts."""

    @property
    def frame(self) -> Frame | None:
        """What a chat template writes around a response; None where there is none, or it changes responses."""

    @property
    def ends(self) -> tuple[str, ...]:
        """Special tokens that end responses."""


class TextScorer:
    """A reward model and its language model as one function of texts; any number of threads may call it."""

    def __init__(
        self,
        model: RewardModel,
        llm: str | None = None,
        *,
        dtype: str | None = None,
        embed: Embeds | None = None,
        **batching: Any,
    ):
        """Load the language model.

        Args:
          model: the reward model.
          llm: folder of the language model, or its id on the hub; by default the name that the embeddings came with.
          dtype: of the language model; by default that of the training embeddings.
          embed: in the place of the language model, what embeds texts.
          **batching: `budget`, `wait` and `most` of `Batcher`.

        Raises:
          JarmError: as `RewardModel.embedder`.
        """
        self.model, self.embed = model, embed if embed is not None else model.embedder(llm, dtype)
        self.watch: Callable[[np.ndarray], None] = lambda embeddings: None
        self.batcher = Batcher(self._score, size=self._size, **batching)

    def __call__(self, prompts: Sequence[Any], responses: Sequence[Any]) -> Scores:
        """Rewards `[n]` in logits, and their deviations over members `[n]`.

        Raises:
          JarmError: texts that cannot be embedded; `Busy` if too many wait.
        """
        if len(prompts) != len(responses):
            raise JarmError(f"There are {len(prompts):,} prompts and {len(responses):,} responses: give one for each.")
        return self.batcher.submit(list(zip(prompts, responses, strict=True))).result()

    def queries(self, queries: Sequence[str], prompts: Sequence[str]) -> Scores:
        """The same of queries: a prompt as it was given to a policy, with what the policy wrote behind it.

        Raises:
          JarmError: a query that does not begin with its prompt, or a prompt that ends otherwise than the chat template
            says.
        """
        return self.batcher.submit(self.texts(queries, prompts)).result()

    def texts(self, queries: Sequence[str], prompts: Sequence[str]) -> list[Any]:
        """Queries as texts of `batcher`: pairs, or, under a chat template, texts that its frame is around already."""
        if len(queries) != len(prompts):
            raise JarmError(f"There are {len(queries):,} queries and {len(prompts):,} prompts: give one for each.")
        ends, frame = self.embed.ends, self.embed.frame
        if self.embed.chat and frame is None:
            raise JarmError(
                "The chat template of this reward model changes what responses say, so that queries cannot be told "
                "apart in prompt and response: give it prompts and completions, as messages."
            )
        if frame is None:
            return [(prompt, response_in(query, prompt, ends)) for query, prompt in zip(queries, prompts, strict=True)]
        ends = (*ends, frame.after.strip())
        pairs = zip(queries, prompts, strict=True)
        return [frame.closed(prompt, response_in(query, prompt, ends)) for query, prompt in pairs]

    def _size(self, text: Any) -> int:
        """Tokens of a text, about."""
        parts = [text] if isinstance(text, str) else text
        letters = sum(len(part) if isinstance(part, str) else sum(len(m["content"]) for m in part) for part in parts)
        return min(self.embed.max_length, letters // 3 + 1)

    def _score(self, texts: list[Any]) -> Scores:
        whole = np.array([isinstance(text, str) for text in texts], bool)
        embeddings = np.empty((len(texts), self.model.width), np.float32)
        if whole.any():
            embeddings[whole] = self.embed.whole([text for text in texts if isinstance(text, str)])
        if not whole.all():
            pairs = [text for text in texts if not isinstance(text, str)]
            embeddings[~whole] = self.embed([prompt for prompt, _ in pairs], [response for _, response in pairs])
        self.watch(embeddings)
        members = self.model.member_scores(embeddings)
        return self.model.aggregate(members), members.std(axis=0)


def response_in(query: str, prompt: str, ends: Sequence[str] = ()) -> str:
    """What stands in a query behind its prompt, without special tokens at its end.

    Raises:
      JarmError: the query does not begin with the prompt.

    Example:
      >>> response_in("2 + 2?4</s>", "2 + 2?", ["</s>"])
      '4'
    """
    at = query.find(prompt)
    if at < 0 or len(query[:at]) > 40:  # special tokens may stand before the prompt
        raise JarmError(
            f"The query {query[:40]!r} does not begin with its prompt {prompt[:40]!r}: give both as text, and whole: "
            "nothing says where the response to a cut prompt begins."
        )
    response, before = query[at + len(prompt) :], None
    while response != before:
        before = response
        for end in filter(None, ends):
            if response.rstrip().endswith(end):
                response = response.rstrip().removesuffix(end)
    return response


def trl_function(model: RewardModel, llm: str | None = None, *, name: str = "jarm", **options: Any) -> Callable:
    """A reward function of TRL (GRPO, RLOO) and of Tunix: of prompts and completions, texts or messages.

    The mean deviation over members goes to `log_metric`, each one to `log_extra`, where the program has them. A
    completion that is no text, such as a call of a tool, gets NaN, which TRL leaves out.

    Args:
      model: the reward model.
      llm: as for `TextScorer`, which takes the `options`, too.
      name: `__name__` of the function, by which both log it.

    Returns:
      `reward(prompts, completions, **columns) -> list of float`.
    """
    score = TextScorer(model, llm, **options)

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        if isinstance(prompts, str) or isinstance(completions, str) or len(prompts) != len(completions):
            raise JarmError("A reward function takes a list of prompts and a list of as many completions: give both.")
        scored = [at for at, completion in enumerate(completions) if _is_said(completion)]
        out = np.full((2, len(completions)), UNSCORED)
        if scored:
            framed = score.embed.chat
            pairs = [[_text(each[at], framed) for at in scored] for each in (prompts, completions)]
            out[:, scored] = score(*pairs)
        if log_metric is not None and scored:
            log_metric(f"{name}/deviation", float(np.nanmean(out[1])))
        if log_extra is not None:
            log_extra(f"{name}_deviation", out[1].tolist())
        return out[0].tolist()

    reward.__name__ = name
    return reward


def verl_function(model: RewardModel, llm: str | None = None, **options: Any) -> Callable:
    """A `compute_score` of verl, of one response or, for its batch reward manager, of lists.

    verl hands over no prompt: the data have to hold it as `extra_info["prompt"]`.

    Args:
      model: the reward model.
      llm: as for `TextScorer`, which takes the `options`, too.

    Returns:
      `compute_score(data_source, solution_str, ground_truth, extra_info) -> float`, and the same of lists, in the
      plural.
    """
    score = TextScorer(model, llm, **options)

    def prompt_of(extra: Mapping[str, Any] | None) -> Any:
        if not extra or "prompt" not in extra:
            raise JarmError(
                "A reward needs the prompt of a response, and verl hands none over: write it into the column "
                "`extra_info` of the data, as `prompt`."
            )
        return extra["prompt"]

    def compute_score(
        data_source: Any = None,
        solution_str: str | None = None,
        ground_truth: Any = None,
        extra_info: Mapping[str, Any] | None = None,
        *,
        solution_strs: Sequence[str] | None = None,
        extra_infos: Any = None,  # an array of objects, or a list
        **_: Any,
    ) -> Any:
        if solution_strs is not None:
            if extra_infos is None:
                extra_infos = [{}] * len(solution_strs)
            prompts = [prompt_of(each) for each in extra_infos]
            return score(prompts, solution_strs)[0].tolist()
        return float(score([prompt_of(extra_info)], [solution_str])[0][0])

    return compute_score


def openrlhf_function(model: RewardModel, llm: str | None = None, **options: Any) -> Callable:
    """A `reward_func` of OpenRLHF, which calls it from many threads with one query each: they are scored together.

    Args:
      model: the reward model.
      llm: as for `TextScorer`, which takes the `options`, too.

    Returns:
      `reward_func(queries, prompts, labels) -> {"rewards", "scores", "extra_logs"}`: tensors of PyTorch where it is
      installed; scores in [0, 1], the probability to be preferred to the average training response.
    """
    score = TextScorer(model, llm, **options)

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Any = None, **_: Any) -> dict[str, Any]:
        return _tensors(answer_of(*score.queries(queries, prompts)))

    return reward_func


def answer_of(rewards: np.ndarray, deviations: np.ndarray) -> dict[str, Any]:
    """Rewards in the form of OpenRLHF.

    Example:
      >>> answer_of(np.array([0.0]), np.array([0.5]))
      {'rewards': [0.0], 'scores': [0.5], 'extra_logs': {'deviation': [0.5]}}
    """
    scores = 1 / (1 + np.exp(-np.clip(np.asarray(rewards, np.float64), -500, 500)))
    return {
        "rewards": np.asarray(rewards, np.float64).tolist(),
        "scores": scores.tolist(),
        "extra_logs": {"deviation": np.asarray(deviations, np.float64).tolist()},
    }


def _tensors(answer: dict[str, Any]) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        tensor: Callable[[list], Any] = functools.partial(np.asarray, dtype=np.float32)
    else:
        tensor = functools.partial(torch.tensor, dtype=torch.float32)
    logs = {name: tensor(values) for name, values in answer["extra_logs"].items()}
    return {"rewards": tensor(answer["rewards"]), "scores": tensor(answer["scores"]), "extra_logs": logs}


def _is_said(completion: Any) -> bool:
    """Whether a completion is text, or messages of text alone."""
    if isinstance(completion, list):
        return bool(completion) and all(
            isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in completion
        )
    return isinstance(completion, str)


def _text(value: Any, framed: bool) -> Any:
    """A text, or messages for a chat template; the content of one message for another."""
    if not framed and isinstance(value, list):
        if len(value) != 1:
            raise JarmError(
                f"A prompt or completion has {len(value)} messages, and this reward model was trained on plain texts: "
                "train one on chats (`jarm embed --template chat`)."
            )
        return value[0]["content"]
    return value
