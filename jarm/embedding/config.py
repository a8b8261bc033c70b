"""Settings and summary of an embedding job."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

from jarm.core.checks import INT32, Check, between, check_fields, distinct, one_of, some_distinct
from jarm.core.messages import choose
from jarm.core.status import JarmError
from jarm.data.texts import check_template
from jarm.embedding.tokens import CHAT
from jarm.llm.model import DTYPES
from jarm.llm.pooling import KINDS

SHARE_PROMPTS: dict[str, bool | None] = {"auto": None, "always": True, "never": False}
"""Values of `EmbedConfig.share_prompts`, and the `share` of `extract` that each stands for."""


def _poolings(name: str, kinds: tuple[str, ...]) -> None:
    distinct(name, kinds)
    for kind in kinds:
        choose("pooling", kind, KINDS)


_CHECKS: Mapping[str, Check] = {
    "input": some_distinct,
    "pooling": _poolings,
    "layer": some_distinct,
    "response_columns": distinct,
    "keep": one_of("start", "end"),
    "dtype": one_of(*DTYPES),
    "store_dtype": one_of("bfloat16", "float32", "float16"),
    "share_prompts": one_of(*SHARE_PROMPTS),
    **dict.fromkeys(("max_length", "max_tokens_per_batch", "tensor_parallel", "processes"), between(1, INT32)),
    **dict.fromkeys(("process_id", "show"), between(0, INT32)),
}


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    r"""Texts to embed, the model that embeds them, and the store that keeps the embeddings.

    Example:
      Two poolings of two layers, from one pass through the model:

      >>> config = EmbedConfig("SmolLM2-135M", ("responses.jsonl",), pooling=("mean", "last"), layer=(12, -1))
      >>> len(config.pooling) * len(config.layer)  # stores, each a folder in `config.out`
      4

    Attributes:
      model: folder of a checkpoint as Hugging Face writes it, or an id on its hub.
      input: tables (.jsonl or .parquet), a folder of them, or a dataset of the Hugging Face hub.
      out: folder of the store; with several poolings or layers, a store in it for each.
      pooling: `last` (real token), `mean` or `cls`, or several of them; by default all that a folder of
        sentence-transformers says, pooling and what follows it, else `last` for decoders and `mean` for encoders.
      layer: layer whose output is pooled, or several: 0 is the input of the first, -1 the output of the last.
      normalize: scale embeddings to length 1, as is done in any case where a model of sentence-transformers ends so.
      template: how prompt and response become one text: columns in single braces, `{response}` among them, such as
        '{prompt}\n\n{response}', or `chat`, the model's own; by default the latter where there is one.
      prompt_name: prompt of a model of sentence-transformers that goes before each text, by its name in the folder, or
        `none`; by default the model's default, if it has one.
      max_length: largest number of tokens in a text; by default the model's.
      keep: the end of a longer text that stays, its `start` or its `end`; by default `end` if the last token is pooled.
      dtype: of the model, `float32` or `bfloat16`; by default the former on a CPU, and the latter elsewhere.
      store_dtype: `bfloat16`, `float32`, or `float16`, which some models overflow; by default the model's.
      max_tokens_per_batch: on each device, padding included; a longer text is a batch of its own. By default 2,048 on a
        CPU, whose cache then holds the operands of a layer, and 16,384 elsewhere.
      share_prompts: compute the tokens that responses to one prompt share only once (decoders): "always", "never", or
        "auto", where it saves a tenth.
      prompt_column: column of the prompts, where it is not `prompt`.
      response_columns: columns of the responses, where they have none of the usual names.
      split: split of a dataset of the hub.
      revision: revision of a model of the hub.
      tensor_parallel: devices that a model is spread over, for a model that does not fit on one.
      distributed: join the processes that SLURM, Open MPI, Kubernetes or a TPU pod started, to work on one store.
      coordinator: HOST:PORT of process 0, to join processes that no scheduler introduces.
      processes: number of those processes.
      process_id: number of this process among them, from 0.
      show: print the exact text and the token ids of this many rows, and stop.
    """

    model: str
    input: tuple[str, ...]
    out: pathlib.Path = pathlib.Path("out/embeddings")
    pooling: tuple[str, ...] = ()
    layer: tuple[int, ...] = (-1,)
    normalize: bool = False
    template: str | None = None
    prompt_name: str | None = None
    max_length: int | None = None
    keep: str | None = None
    dtype: str | None = None
    store_dtype: str | None = None
    max_tokens_per_batch: int | None = None
    share_prompts: str = "auto"
    prompt_column: str | None = None
    response_columns: tuple[str, ...] = ()
    split: str | None = None
    revision: str | None = None
    tensor_parallel: int = 1
    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    show: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (
            ("input", (str, pathlib.Path)),
            ("pooling", str),
            ("layer", int),
            ("response_columns", str),
        ):
            if isinstance(getattr(self, name), kinds):
                raise JarmError(f"EmbedConfig({name}=...) takes several: write ({getattr(self, name)!r},).")
        check_fields(self, _CHECKS)
        if self.template is not None and self.template != CHAT:
            check_template(self.template)


@dataclasses.dataclass(frozen=True)
class EmbedSummary:
    """Counts of one run of a job.

    Attributes:
      stores: folders, one for each pooling and layer.
      texts, distinct: texts of the input, and distinct ones among them.
      embedded: distinct texts that this run added; the others were there.
      truncated: distinct texts that were cut, as longer than `max_length`.
      same_texts: distinct texts whose tokens are those of another, so that their embeddings are equal.
      pairs, same_pairs: pairs of distinct texts of one prompt, and those among them that are the same tokens.
      prompts, same_prompts: prompts, and those among them with several distinct texts that are all the same tokens.
      empty_responses: in the input.
      tokens, padded: tokens that this run computed, without and with padding.
      seconds: from the first batch to the last results, compilation included.
    """

    stores: tuple[pathlib.Path, ...] = ()
    texts: int = 0
    distinct: int = 0
    embedded: int = 0
    truncated: int = 0
    same_texts: int = 0
    pairs: int = 0
    same_pairs: int = 0
    prompts: int = 0
    same_prompts: int = 0
    empty_responses: int = 0
    tokens: int = 0
    padded: int = 0
    seconds: float = 0.0

    @property
    def waste(self) -> float:
        """Share of padding among all tokens computed."""
        return 1 - self.tokens / self.padded if self.padded else 0.0
