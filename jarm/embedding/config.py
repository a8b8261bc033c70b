"""Settings and summary of an embedding job."""

from __future__ import annotations

import dataclasses
import pathlib

import jax

from jarm.core.status import JarmError

SHARE = {"auto": None, "always": True, "never": False}


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """What to embed, with which model, and where to.

    Attributes:
      model: folder of a checkpoint as Hugging Face writes it, or an id on its hub.
      input: tables (.jsonl or .parquet), a folder of them, or a dataset of the Hugging Face hub.
      out: folder of the store; with several poolings or layers, a store in it for each.
      pooling: `last` (real token), `mean` or `cls`, or several of them; by default what the model was trained with:
        what `1_Pooling` in its folder says, else `last` for decoders and `mean` for encoders.
      layer: whose output is pooled, or several: 0 is the input of the first, -1 the output of the last.
      normalize: scale embeddings to length 1.
      template: how prompt and response become one text: columns in braces, such as '{prompt}\\n\\n{response}', or
        `chat`, the model's own; by default the latter where there is one.
      max_length: tokens in a text at most; by default what the model allows.
      keep: of a text that is too long, its `start` or its `end`; by default `end` if the last token is pooled.
      dtype: of the model, `float32` or `bfloat16`; by default the former on a CPU, and the latter elsewhere.
      store_dtype: `bfloat16`, `float32`, or `float16`, which some models overflow; by default the model's.
      max_tokens_per_batch: on each device, padding included; a longer text is a batch of its own. By default 2,048 on a
        CPU, whose cache then holds what a layer works on, and 16,384 elsewhere.
      share_prompts: compute the tokens that responses to one prompt share only once (decoders): "always", "never", or
        "auto", where it saves a tenth.
      prompt_column: of the input, where it is not `prompt`.
      response_columns: of the input, where they are none of the usual.
      split: of a dataset of the hub.
      revision: of a model of the hub.
      tensor_parallel: devices that a model is spread over, for one that does not fit on one.
      distributed: join the processes that SLURM, Open MPI, Kubernetes or a TPU pod started, to work on one store.
      coordinator: HOST:PORT of process 0, to join processes that nobody else introduces.
      processes: how many there are, then.
      process_id: which of them this is, from 0.
      show: print the exact text and the token ids of so many rows, and stop.
    """

    model: str
    input: tuple[str, ...]
    out: pathlib.Path = pathlib.Path("out/embeddings")
    pooling: tuple[str, ...] = ()
    layer: tuple[int, ...] = (-1,)
    normalize: bool = False
    template: str | None = None
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
        for name, kinds in (("input", (str, pathlib.Path)), ("pooling", str), ("layer", int)):
            if isinstance(getattr(self, name), kinds):
                raise JarmError(f"EmbedConfig({name}=...) takes several: write ({getattr(self, name)!r},).")
        object.__setattr__(self, "out", pathlib.Path(self.out))


@dataclasses.dataclass(frozen=True)
class EmbedSummary:
    """What a run did.

    Attributes:
      stores: folders, a pooling and layer each.
      texts: in the input, and how many of them are `distinct`.
      embedded: distinct texts that this run added; the others were there.
      truncated: texts that were longer than `max_length`, of those that this run has looked at.
      empty_responses: in the input.
      tokens, padded: computed by this run, without and with padding.
      seconds: from the first batch to the last results, compilation included.
    """

    stores: tuple[pathlib.Path, ...] = ()
    texts: int = 0
    distinct: int = 0
    embedded: int = 0
    truncated: int = 0
    empty_responses: int = 0
    tokens: int = 0
    padded: int = 0
    seconds: float = 0.0

    @property
    def waste(self) -> float:
        """The part of all tokens computed that was padding."""
        return 1 - self.tokens / self.padded if self.padded else 0.0


def _dtype(config: EmbedConfig) -> str:
    return config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _budget(config: EmbedConfig) -> int:
    return config.max_tokens_per_batch or (2048 if jax.default_backend() == "cpu" else 16384)
