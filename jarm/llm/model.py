"""A model as pure functions on a pytree of parameters: NNX is split off here, once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jarm.core.pytree import record, static
from jarm.core.status import JarmError
from jarm.core.types import Array, Float, Int, Params
from jarm.llm.config import ModelConfig
from jarm.llm.decoder import Decoder
from jarm.llm.encoder import Encoder
from jarm.llm.layers import KeysValues, Past
from jarm.llm.pooling import Pooling, follow, pool
from jarm.llm.rope import ROPE_TYPES, Rope

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


@record
class Prefix:
    """Beginnings of texts, which `prefill` computes once for all texts that share them.

    Attributes:
      keys, values: `[layers, G, Tp, K, D]` in the model's dtype, keys after their rotation.
      lengths: `[G]` tokens in each prefix.
      pooled: `[G, d]` for each pooling: embeddings of the prefixes themselves.
      poolings: the poolings of `pooled`.
    """

    keys: Array
    values: Array
    lengths: Array
    pooled: tuple[Array, ...]
    poolings: tuple[Pooling, ...] = static()


def cache_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the keys and values that a `Prefix` holds for each token, padding included."""
    return 2 * len(config.layers) * config.kv_heads * config.head_dim * jnp.dtype(DTYPES[dtype]).itemsize


def can_share(config: ModelConfig, max_length: int = 1 << 30) -> bool:
    """Whether the beginning of a text can be computed before the rest is known.

    In an encoder every token sees the rest. The rope types `dynamic` and `longrope` rotate a whole text by its length,
    once that exceeds the length they were trained for.

    Args:
      config: the model.
      max_length: tokens of the longest prefix and the longest rest together, padding included; by default any number.
    """

    def frequencies(rope: Rope) -> np.ndarray:
        function, _, _ = ROPE_TYPES[rope.kind]
        with jax.ensure_compile_time_eval():
            found, _ = function(rope, jnp.array([1, max_length]), **dict(rope.parameters))
            return np.atleast_2d(np.asarray(found))

    ropes = {layer.rope for layer in config.layers if layer.rope is not None}
    return not config.encoder and all(np.array_equal(rows[0], rows[-1]) for rows in map(frequencies, ropes))


def _check_room(config: ModelConfig, tokens: int) -> None:
    learned = config.encoder or config.learned_positions
    if learned and tokens > config.max_positions:
        raise JarmError(f"{tokens} tokens are more than the {config.max_positions} positions of this model: truncate.")


def _check_sharing(config: ModelConfig, tokens: int, poolings: tuple[Pooling, ...]) -> None:
    if any(pooling.skip for pooling in poolings):
        raise JarmError("Texts cannot share prefixes where poolings leave out their beginning: embed whole texts.")
    if not can_share(config, tokens):
        raise JarmError(
            f"This {config.family} model cannot share prefixes of texts of {tokens} tokens, as the whole text decides "
            "how a prefix is read: embed whole texts (`can_share` tells)."
        )


def _run(
    params: Params,
    tokens: Array,
    lengths: Array,
    config: ModelConfig,
    poolings: tuple[Pooling, ...],
    *,
    keep: bool = False,
    past: Past | None = None,
) -> tuple[tuple[Array, ...], KeysValues | None]:
    """Pooled hidden states of these tokens, and the keys and values of all layers if `keep`."""
    depth = len(config.layers)
    wanted = [((pooling.kind, pooling.skip), pooling.layer_of(depth)) for pooling in poolings]
    inner = sorted({way for way, layer in wanted if 0 < layer < depth})

    def pooled(way: tuple[str, int], hidden: Array) -> Array:
        return pool(way[0], hidden, lengths, way[1])

    def watch(hidden: Array, kept: KeysValues) -> tuple[list[Array], KeysValues | None]:
        return [pooled(way, hidden) for way in inner], kept if keep else None

    exact = params["embed"]["table"].dtype == jnp.float32
    graph = _split(config, "float32")[0]  # the dtype is in the parameters alone
    rest = () if past is None else (past,)
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        start, end, (watched, kept) = nnx.merge(graph, params)(tokens, lengths, watch, *rest)
    ends = {0: start, depth: end}
    values = tuple(
        pooled(way, ends[layer]) if layer in ends else watched[inner.index(way)][layer - 1] for way, layer in wanted
    )
    return values, kept


@functools.partial(jax.jit, static_argnames=("config", "poolings"))
def prefill(
    params: Params,
    tokens: Int[Array, "G Tp"],
    lengths: Int[Array, "G"],
    *,
    config: ModelConfig,
    poolings: tuple[Pooling, ...] = (Pooling(),),
) -> Prefix:
    """Compute beginnings of texts, such as prompts, once; `embed_tokens` continues from them.

    Args:
      params: as for `embed_tokens`.
      tokens: token ids of the prefixes, padded on the right with any id of the vocabulary.
      lengths: tokens in each prefix; 0 for an empty prefix, or padding.
      config: the model.
      poolings: those that `embed_tokens` will be asked for.

    Returns:
      Keys, values and pooled hidden states of the prefixes.

    Raises:
      JarmError: as `embed_tokens`, or a model whose texts cannot share prefixes (`can_share`).
    """
    _check_room(config, tokens.shape[1])
    _check_sharing(config, tokens.shape[1], poolings)
    pooled, kept = _run(params, tokens, lengths, config, poolings, keep=True)
    assert kept is not None
    return Prefix(*kept, lengths, pooled, poolings)


def concatenate(prefixes: Sequence[Prefix]) -> Prefix:
    """Join prefixes of the same padded length and the same poolings, one group after the other.

    Raises:
      JarmError: the prefixes differ in padded length or poolings.
    """
    shapes = {(prefix.keys.shape[2], prefix.poolings) for prefix in prefixes}
    if len(shapes) != 1:
        raise JarmError(
            f"Prefixes of {len(shapes)} padded lengths or poolings cannot be joined: pad and pool them alike."
        )
    keys, values = (jnp.concatenate([getattr(one, name) for one in prefixes], axis=1) for name in ("keys", "values"))
    lengths = jnp.concatenate([one.lengths for one in prefixes])
    pooled = tuple(jnp.concatenate(rows) for rows in zip(*(one.pooled for one in prefixes), strict=True))
    return Prefix(keys, values, lengths, pooled, prefixes[0].poolings)


@functools.partial(jax.jit, static_argnames=("config", "poolings"))
def embed_tokens(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    config: ModelConfig,
    poolings: tuple[Pooling, ...] = (Pooling(),),
    prefix: Prefix | None = None,
    group: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B d"], ...]:
    """Embed texts: one pass through the model, and one vector per text for each pooling.

    In float32, matrix products are in float32 on accelerators too. With a `prefix`, tokens are the rest of each text
    behind its prefix, and the embedding is that of the whole text.

    Args:
      params: as `abstract_params` describes them; `jarm.llm.weights.load_model` reads them.
      tokens: token ids, padded on the right with any id of the vocabulary.
      lengths: tokens in each text or rest, 1 or more.
      config: the model.
      poolings: embeddings to return.
      prefix: result of `prefill` or `concatenate` for the same poolings.
      group: index of each text's prefix.

    Returns:
      Embeddings in float32, in the order of `poolings`.

    Raises:
      JarmError: a layer that the model lacks, more tokens than a model with learned positions has positions, or a
        prefix of other poolings, without `group`, or for a model whose texts cannot share prefixes (`can_share`).
    """
    if prefix is None or group is None:
        if prefix is not None or group is not None:
            raise JarmError("One of `prefix` and `group` is missing: give both, or neither to embed whole texts.")
        _check_room(config, tokens.shape[1])
        return _run(params, tokens, lengths, config, poolings)[0]
    if prefix.poolings != poolings:
        raise JarmError("The prefix was computed for other poolings: give `prefill` those of `embed_tokens`.")
    # Only the padded length of prefix and rest together is known here, and padding may lie beyond the last position.
    _check_room(config, tokens.shape[1])
    _check_sharing(config, prefix.keys.shape[2] + tokens.shape[1], poolings)
    before = prefix.lengths[group]
    past = Past(prefix.keys, prefix.values, before, group)
    pooled, _ = _run(params, tokens, lengths, config, poolings, past=past)
    return tuple(
        follow(pooling.kind, first[group], before, rest, lengths)
        for pooling, first, rest in zip(poolings, prefix.pooled, pooled, strict=True)
    )
