"""A model as pure functions on a pytree of parameters: NNX is split off here, once."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jarm.base import JarmError
from jarm.llm.config import ModelConfig
from jarm.llm.decoder import Decoder
from jarm.llm.encoder import Encoder
from jarm.llm.pooling import Pooling, pool
from jarm.types import Array, Float, Int, Params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@functools.cache
def _split(config: ModelConfig, dtype: str) -> tuple[nnx.GraphDef, Any]:
    kind = Encoder if config.encoder else Decoder
    return nnx.split(nnx.eval_shape(lambda: kind(config, DTYPES[dtype])))


def abstract_params(config: ModelConfig, dtype: str = "float32") -> Params:
    """Shapes and dtypes of all parameters, without any array.

    Args:
      config: the model.
      dtype: `float32` or `bfloat16`; norms are in float32 in both.

    Returns:
      Nested dictionaries of `jax.ShapeDtypeStruct`; scanned layers have a leading axis (`jarm.llm.layers.Stack`).
    """
    if dtype not in DTYPES:
        raise JarmError(f"Unknown dtype '{dtype}': choose one of {', '.join(DTYPES)}.")
    return nnx.to_pure_dict(_split(config, dtype)[1])


@functools.partial(jax.jit, static_argnames=("config", "poolings"))
def embed_tokens(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    config: ModelConfig,
    poolings: tuple[Pooling, ...] = (Pooling(),),
) -> tuple[Float[Array, "B d"], ...]:
    """Embed texts: one pass through the model, and one vector a text for each pooling.

    In float32, products are in float32 on accelerators too.

    Args:
      params: as `abstract_params` describes them; `jarm.llm.weights.load_model` reads them.
      tokens: token ids, padded on the right with any id of the vocabulary.
      lengths: tokens in each text, 1 or more.
      config: the model.
      poolings: what to return.

    Returns:
      Embeddings in float32, in the order of `poolings`.

    Raises:
      JarmError: a layer that is not there, or more tokens than a model with learned positions has positions.
    """
    learned = config.encoder or config.learned_positions
    if learned and tokens.shape[1] > config.max_positions:
        raise JarmError(
            f"{tokens.shape[1]} tokens are more than the {config.max_positions} positions of this model: truncate."
        )
    depth = len(config.layers)
    wanted = [(pooling.kind, pooling.layer_of(depth)) for pooling in poolings]
    inner = sorted({kind for kind, layer in wanted if 0 < layer < depth})

    def watch(hidden: Array) -> dict[str, Array]:
        return {kind: pool(kind, hidden, lengths) for kind in inner}

    exact = params["embed"]["table"].dtype == jnp.float32
    graph = _split(config, "float32")[0]  # the dtype is in the parameters alone
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        start, end, watched = nnx.merge(graph, params)(tokens, lengths, watch)
    ends = {0: start, depth: end}
    return tuple(
        pool(kind, ends[layer], lengths) if layer in ends else watched[kind][layer - 1] for kind, layer in wanted
    )
