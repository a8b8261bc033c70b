"""Parts of decoders and encoders: linear maps, norms, attention, MLPs and stacks of layers.

Parameters have the names `kernel` ([out, in], as checkpoints store them), `scale`, `bias` and `table`. Norms, softmax
and rotary tables are in float32 whatever the dtype of the model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jarm.core.types import Array, Bool, Float, Int
from jarm.llm.config import LayerConfig, ModelConfig
from jarm.llm.rope import Rope, rotate

Tables = dict[Rope, tuple[Array, Array]]
KeysValues = tuple[Array, Array]
"""Keys after their rotation, and values, `[B, T, K, D]`."""
Lead = tuple[int, ...]
"""Leading axes of parameters: `(repeats,)` where layers are stacked for a scan."""


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + jax.lax.erf(math.sqrt(0.5) * x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def _row(vector: Array, like: Array) -> Array:
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


def _zeros(shape: tuple[int, ...], dtype: Any = jnp.float32) -> nnx.Param:
    # Models are only built abstractly (`jarm.llm.model`): zeros are never written.
    return nnx.Param(jnp.zeros(shape, dtype))


class Linear(nnx.Module):
    """y = W x + b."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: Any, lead: Lead):
        self.kernel = _zeros((*lead, outputs, inputs), dtype)
        self.bias = _zeros((*lead, outputs), dtype) if bias else None

    def __call__(self, x: Array) -> Array:
        """Map the last axis."""
        y = jax.lax.dot_general(x, self.kernel[...], (((x.ndim - 1,), (1,)), ((), ())))
        return y if self.bias is None else y + _row(self.bias[...], y)


class Norm(nnx.Module):
    """RMSNorm, x / sqrt(mean(x^2) + eps) * (scale + offset), or LayerNorm, of the centred x and with a bias."""

    def __init__(self, config: ModelConfig, width: int, lead: Lead):
        self.centred, self.offset, self.eps = config.norm == "layer", config.norm_offset, config.eps
        self.scale = _zeros((*lead, width))
        self.bias = _zeros((*lead, width)) if self.centred else None

    def __call__(self, x: Array) -> Array:
        """Normalise the last axis, in float32."""
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * _row(self.scale[...] + self.offset, y)
        return (y if self.bias is None else y + _row(self.bias[...], y)).astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of a table."""

    def __init__(self, rows: int, width: int, dtype: Any):
        self.table = _zeros((rows, width), dtype)

    def __call__(self, index: Array) -> Array:
        """Look rows up."""
        return jnp.take(self.table[...], index, axis=0, mode="clip")


def flash_applies(capability: float, dtype: Any, head_dim: int) -> bool:
    """Whether cuDNN's flash attention applies: Ampere, half precision, head_dim of 8 n up to 128 (256 on Hopper)."""
    half = dtype in (jnp.bfloat16, jnp.float16)
    return capability >= 8 and half and head_dim % 8 == 0 and head_dim <= (256 if capability >= 9 else 128)


def visible(
    queries: int, keys: int, window: int | None, prefix: Int[Array, "B"] | None = None
) -> Bool[Array, "rows {queries} {keys}"]:
    """Whether each token sees each key: keys of its own and earlier positions, within the window.

    Args:
      queries, keys: their numbers; the first `keys - queries` keys belong to prefixes.
      window: positions that a token sees, its own included; None for all.
      prefix: tokens in each text's prefix, which is padded on the right.

    Returns:
      One row for each prefix, or one for all texts.
    """
    index = jnp.arange(keys, dtype=jnp.int32)
    back = (jnp.arange(queries, dtype=jnp.int32)[:, None] - index[None])[None]
    if prefix is not None:
        room, start = keys - queries, prefix[:, None]
        real = jnp.where(index[None] < start, start, -keys)  # padding counts as future
        back = back + jnp.where(index[None] < room, real, room)[:, None]
    return (back >= 0) & (back < (window or keys))


BLOCK = 128
"""Queries of a head whose scores are in memory at once, if `in_turn`."""
TOKENS = 2048
"""Tokens that an MLP maps at once, if `in_turn`."""


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    lengths: Int[Array, "B"],
    *,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    prefix: Int[Array, "B"] | None = None,
    in_turn: bool = False,
    capability: float = 0.0,
) -> Float[Array, "B T H D"]:
    """Attention of right-padded texts, softmax(scale q k^T) v; H heads share K pairs of keys and values.

    Args:
      q, k, v: queries, keys and values.
      lengths: tokens in each text.
      causal: whether a token sees only earlier ones; no real token then sees padding, which needs no mask.
      scale: factor of the scores.
      window: positions that a token sees, its own included; None for all.
      softcap: c of soft-capped scores c tanh(s / c), or None.
      prefix: tokens that precede each text among the first S - T keys; None if S = T.
      in_turn, capability: as in `ModelConfig`.

    Returns:
      One vector for each query. Soft caps and `in_turn` are computed here, and the rest by
      `jax.nn.dot_product_attention`, which has neither.
    """
    implementation: Any = "cudnn" if flash_applies(capability, q.dtype, q.shape[-1]) else "xla"
    if softcap is None and not in_turn:
        if prefix is not None:
            seen = visible(q.shape[1], k.shape[1], window, prefix)[:, None]
            return jax.nn.dot_product_attention(q, k, v, scale=scale, mask=seen, implementation=implementation)
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=causal,
            key_value_seq_lengths=None if causal else lengths,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=implementation,
        )
    over = jax.lax.map if in_turn else lambda f, xs: jax.vmap(f)(xs)
    block = BLOCK if in_turn else q.shape[1]
    one: Callable[..., Array] = functools.partial(_attend_one, causal=causal, scale=scale, softcap=softcap, block=block)

    def text(given: tuple[Array, Array, Array, Array, Array | None]) -> Array:
        q, k, v, length, before = given
        if causal:
            seen = visible(len(q), len(k), window, None if before is None else before[None])[0]
        else:
            seen = jnp.broadcast_to(jnp.arange(len(k), dtype=jnp.int32) < length, (len(q), len(k)))
        grouped = q.reshape(len(q), k.shape[1], -1, q.shape[2]).transpose(1, 2, 0, 3)
        y = over(lambda head: one(*head, seen), (grouped, k.swapaxes(0, 1), v.swapaxes(0, 1)))
        return y.transpose(2, 0, 1, 3).reshape(q.shape)

    return over(text, (q, k, v, lengths, prefix))


def _attend_one(
    q: Float[Array, "G T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S D"],
    seen: Bool[Array, "T S"],
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
    block: int,
) -> Float[Array, "G T D"]:
    """Heads of one text that share keys and values, a block of queries at a time."""
    out = []
    for start in range(0, len(seen), block):
        stop = min(start + block, len(seen))
        last = len(k) - len(seen) + stop if causal else len(k)  # later keys are the future of the whole block
        scores = jnp.einsum("gtd,sd->gts", q[:, start:stop], k[:last], preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(seen[None, start:stop, :last], scores, -jnp.inf)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        y = jnp.einsum("gts,sd->gtd", weights.astype(v.dtype), v[:last], preferred_element_type=jnp.float32)
        out.append((y / total).astype(v.dtype))
    return jnp.concatenate(out, axis=1)


class Past(NamedTuple):
    """The G prefixes that B texts continue.

    Attributes:
      keys, values: `[layers, G, Tp, K, D]`, right-padded, keys after their rotation.
      lengths: `[B]` tokens in the prefix of each text.
      group: `[B]` index of the prefix of each text.
      layer: the current layer.
    """

    keys: Array
    values: Array
    lengths: Array
    group: Array
    layer: int | Array = 0

    def before(self, keys: Array, values: Array) -> KeysValues:
        """Keys and values of the prefixes, followed by those of the texts, in this layer."""
        prefix = self.keys[self.layer, self.group], self.values[self.layer, self.group]
        return jnp.concatenate([prefix[0], keys], axis=1), jnp.concatenate([prefix[1], values], axis=1)


class Attention(nnx.Module):
    """Multi-head attention; shared keys and values, rotary positions, query-key norms and windows as configured."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, dtype: Any, lead: Lead):
        self.config, self.layer = config, layer
        size, inner, shared = config.head_dim, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = Linear(config.width, inner, config.qkv_bias, dtype, lead)
        self.k = Linear(config.width, shared, config.qkv_bias, dtype, lead)
        self.v = Linear(config.width, shared, config.qkv_bias, dtype, lead)
        self.out = Linear(inner, config.width, config.out_bias, dtype, lead)
        whole = config.qk_norm == "projection"
        self.q_norm = Norm(config, inner if whole else size, lead) if config.qk_norm else None
        self.k_norm = Norm(config, shared if whole else size, lead) if config.qk_norm else None

    def __call__(self, x: Array, tables: Tables, lengths: Array, past: Past | None = None) -> tuple[Array, KeysValues]:
        """Attention output of each token, and the keys and values of these tokens."""
        config, layer = self.config, self.layer

        def heads(projection: Linear, norm: Norm | None) -> Array:
            y = projection(x)
            if norm is not None and config.qk_norm == "projection":
                y = norm(y)
            y = y.reshape(*x.shape[:-1], -1, config.head_dim)
            return norm(y) if norm is not None and config.qk_norm == "head" else y

        q, k, v = heads(self.q, self.q_norm), heads(self.k, self.k_norm), heads(self.v, None)
        if layer.rope is not None:
            q, k = rotate(q, *tables[layer.rope]), rotate(k, *tables[layer.rope])
        y = attend(
            q,
            *((k, v) if past is None else past.before(k, v)),
            lengths,
            causal=not config.encoder,
            scale=config.attention_scale,
            window=layer.window,
            softcap=config.softcap,
            prefix=None if past is None else past.lengths,
            in_turn=config.in_turn,
            capability=config.capability,
        )
        return self.out(y.reshape(*x.shape[:-1], -1)), (k, v)


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, config: ModelConfig, dtype: Any, lead: Lead):
        shape = (config.width, config.mlp_width)
        self.activation, self.in_turn = config.activation, config.in_turn
        self.gate = Linear(*shape, config.mlp_bias, dtype, lead) if config.gated else None
        self.up = Linear(*shape, config.mlp_bias, dtype, lead)
        self.down = Linear(*shape[::-1], config.mlp_bias, dtype, lead)

    def __call__(self, x: Array) -> Array:
        """Map each token by itself."""
        act, step = ACTIVATIONS[self.activation], max(1, TOKENS // x.shape[1]) if self.in_turn else len(x)

        def some(x: Array) -> Array:
            return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))

        return jnp.concatenate([some(x[start : start + step]) for start in range(0, len(x), step)])


Layer = Callable[[Array, Tables, Array, Past | None], tuple[Array, KeysValues]]
"""Hidden states, rotary tables, lengths of texts and their prefixes in; hidden states, keys and values out."""
Watch = Callable[[Array, KeysValues], Any]
"""Hidden states, keys and values of a layer in; any pytree to keep of them out."""


def scan_plan(layers: Sequence[Any]) -> tuple[int, int]:
    """The shortest period of kinds of layers, and its number of repeats; (0, 0) where a scan would run once."""
    for period in range(1, len(layers) // 2 + 1):
        if all(layer == layers[i % period] for i, layer in enumerate(layers)):
            return period, len(layers) // period
    return 0, 0


class Stack(nnx.Module):
    """All layers: a scan over whole periods, so that depth does not cost compile time, then the remaining layers.

    Layer i < period * repeats is entry i // period of `cycle[i % period]`; the others follow in `tail`.
    """

    def __init__(self, kind: Callable[[ModelConfig, LayerConfig, Any, Lead], Layer], config: ModelConfig, dtype: Any):
        period, repeats = scan_plan(config.layers)
        self.cycle = nnx.List([kind(config, layer, dtype, (repeats,)) for layer in config.layers[:period]])
        self.tail = nnx.List([kind(config, layer, dtype, ()) for layer in config.layers[period * repeats :]])

    def __call__(
        self, x: Array, tables: Tables, lengths: Array, watch: Watch, past: Past | None = None
    ) -> tuple[Array, Any]:
        """Hidden states after the last layer, and the results of `watch` after each, with a leading axis of layers."""
        seen = []

        def at(layer: int | Array) -> Past | None:
            return None if past is None else past._replace(layer=layer)

        period, repeats = len(self.cycle), 0
        if self.cycle:
            graphs, states = zip(*(nnx.split(layer) for layer in self.cycle), strict=True)
            repeats = jax.tree.leaves(states)[0].shape[0]

            def once(x: Array, step: Any) -> tuple[Array, Any]:
                states, first = step
                watched = []
                for i, (graph, state) in enumerate(zip(graphs, states, strict=True)):
                    x, kept = nnx.merge(graph, state)(x, tables, lengths, at(first + i))
                    watched.append(watch(x, kept))
                return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *watched)

            x, scanned = jax.lax.scan(once, x, (states, period * jnp.arange(repeats, dtype=jnp.int32)))
            seen.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), scanned))
        for i, layer in enumerate(self.tail, start=period * repeats):
            x, kept = layer(x, tables, lengths, at(i))
            seen.append(jax.tree.map(lambda leaf: leaf[None], watch(x, kept)))
        return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *seen)
