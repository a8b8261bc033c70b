"""The parts that decoders and encoders share: linear maps, norms, attention, MLPs and stacks of layers.

Parameters have the names `kernel` ([out, in], as checkpoints store them), `scale`, `bias` and `table`. Norms, softmax
and rotary tables are in float32 whatever the dtype of the model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jarm.llm.config import LayerConfig, ModelConfig
from jarm.llm.rope import Rope, rotate
from jarm.types import Array, Float, Int

Tables = dict[Rope, tuple[Array, Array]]
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


def flash_applies(platform: str, capability: float, dtype: Any, head_dim: int) -> bool:
    """Whether cuDNN's flash attention takes this: a GPU, half precision, head_dim of 8 n up to 128 (256 on Hopper)."""
    half = dtype in (jnp.bfloat16, jnp.float16)
    return platform == "gpu" and half and head_dim % 8 == 0 and head_dim <= (256 if capability >= 9 else 128)


def _implementation(q: Array) -> Any:
    device = jax.devices()[0]
    capability = float(getattr(device, "compute_capability", None) or 0)
    return "cudnn" if flash_applies(jax.default_backend(), capability, q.dtype, q.shape[-1]) else "xla"


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    lengths: Int[Array, "B"],
    *,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Float[Array, "B T H D"]:
    """Attention of right-padded texts; H heads share K pairs of keys and values.

    If causal, no real token sees padding, so there is no mask for it; a window counts the token itself. Soft-capped
    scores, c tanh(s / c), are computed here, as `jax.nn.dot_product_attention` has no such thing.
    """
    if softcap is None:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=causal,
            key_value_seq_lengths=None if causal else lengths,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=_implementation(q),
        )
    batch, length, heads, size = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, size)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    scores = softcap * jnp.tanh(scores / softcap)
    back = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    seen = (back >= 0) & (back < (window or length))
    weights = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, length, heads, size)


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

    def __call__(self, x: Array, tables: Tables, lengths: Array) -> Array:
        """What each token takes from those it sees."""
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
            k,
            v,
            lengths,
            causal=not config.encoder,
            scale=config.attention_scale,
            window=layer.window,
            softcap=config.softcap,
        )
        return self.out(y.reshape(*x.shape[:-1], -1))


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, config: ModelConfig, dtype: Any, lead: Lead):
        shape = (config.width, config.mlp_width)
        self.activation = config.activation
        self.gate = Linear(*shape, config.mlp_bias, dtype, lead) if config.gated else None
        self.up = Linear(*shape, config.mlp_bias, dtype, lead)
        self.down = Linear(*shape[::-1], config.mlp_bias, dtype, lead)

    def __call__(self, x: Array) -> Array:
        """Map each token by itself."""
        act = ACTIVATIONS[self.activation]
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))


Layer = Callable[[Array, Tables, Array], Array]
"""Hidden states, rotary tables and lengths of texts in, hidden states out."""


def scan_plan(layers: Sequence[Any]) -> tuple[int, int]:
    """The shortest period of kinds of layers, and how often it fits; (0, 0) where a scan would run once."""
    for period in range(1, len(layers) // 2 + 1):
        if all(layer == layers[i % period] for i, layer in enumerate(layers)):
            return period, len(layers) // period
    return 0, 0


class Stack(nnx.Module):
    """All layers: a scan over whole periods, so that depth does not cost compile time, then what is left over.

    Layer i < period * repeats is entry i // period of `cycle[i % period]`; the others follow in `tail`.
    """

    def __init__(self, kind: Callable[[ModelConfig, LayerConfig, Any, Lead], Layer], config: ModelConfig, dtype: Any):
        period, repeats = scan_plan(config.layers)
        self.cycle = nnx.List([kind(config, layer, dtype, (repeats,)) for layer in config.layers[:period]])
        self.tail = nnx.List([kind(config, layer, dtype, ()) for layer in config.layers[period * repeats :]])

    def __call__(self, x: Array, tables: Tables, lengths: Array, watch: Callable[[Array], Any]) -> tuple[Array, Any]:
        """Hidden states after the last layer, and what `watch` said after each, with a leading axis of layers."""
        seen = []
        if self.cycle:
            graphs, states = zip(*(nnx.split(layer) for layer in self.cycle), strict=True)

            def once(x: Array, states: Any) -> tuple[Array, Any]:
                watched = []
                for graph, state in zip(graphs, states, strict=True):
                    x = nnx.merge(graph, state)(x, tables, lengths)
                    watched.append(watch(x))
                return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *watched)

            x, scanned = jax.lax.scan(once, x, states)
            seen.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), scanned))
        for layer in self.tail:
            x = layer(x, tables, lengths)
            seen.append(jax.tree.map(lambda leaf: leaf[None], watch(x)))
        return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *seen)
