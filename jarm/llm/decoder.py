"""One decoder for all families of causal language models."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jarm.core.types import Array
from jarm.llm.config import LayerConfig, ModelConfig
from jarm.llm.layers import MLP, Attention, Embedding, KeysValues, Lead, Norm, Past, Stack, Tables, Watch
from jarm.llm.rope import rotary_tables


class DecoderLayer(nnx.Module):
    """x + attention, then + MLP; norms before, after or on both sides; in parallel, both read the same x."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, dtype: Any, lead: Lead):
        self.parallel = config.parallel
        self.attention = Attention(config, layer, dtype, lead)
        self.mlp = MLP(config, dtype, lead)
        self.attention_norm = Norm(config, config.width, lead) if config.pre_norm else None
        self.mlp_norm = Norm(config, config.width, lead) if config.pre_norm else None
        self.attention_out_norm = Norm(config, config.width, lead) if config.post_norm else None
        self.mlp_out_norm = Norm(config, config.width, lead) if config.post_norm else None

    def __call__(self, x: Array, tables: Tables, lengths: Array, past: Past | None) -> tuple[Array, KeysValues]:
        """Hidden states after this layer, and its keys and values."""

        def norm(norm: Norm | None, x: Array) -> Array:
            return x if norm is None else norm(x)

        attended, kept = self.attention(norm(self.attention_norm, x), tables, lengths, past)
        after = x + norm(self.attention_out_norm, attended)
        mixed = self.mlp(norm(self.mlp_norm, x if self.parallel else after))
        return after + norm(self.mlp_out_norm, mixed), kept


class Decoder(nnx.Module):
    """Embedding, layers, final norm; right padding and a causal mask.

    With a `past`, positions continue at the end of each text's prefix, and rotary tables are the same for all texts.
    """

    def __init__(self, config: ModelConfig, dtype: Any):
        self.config = config
        self.embed = Embedding(config.vocab, config.width, dtype)
        self.positions = Embedding(config.max_positions, config.width, dtype) if config.learned_positions else None
        self.stack = Stack(DecoderLayer, config, dtype)
        self.final_norm = Norm(config, config.width, ())

    def __call__(
        self, tokens: Array, lengths: Array, watch: Watch, past: Past | None = None
    ) -> tuple[Array, Array, Any]:
        """Hidden states before the first layer and after the final norm, and the results of `watch` per layer."""
        start = self.embed(tokens)
        start = start * jnp.asarray(self.config.embed_scale, start.dtype)
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        ropes = {layer.rope for layer in self.config.layers if layer.rope is not None}
        if past is None:
            tables = {rope: rotary_tables(rope, lengths, tokens.shape[1]) for rope in ropes}
        else:
            index = past.lengths[:, None] + index
            positions = past.keys.shape[2] + tokens.shape[1]
            whole = {rope: rotary_tables(rope, lengths[:1], positions) for rope in ropes}
            tables = {rope: (cos[0, index], sin[0, index]) for rope, (cos, sin) in whole.items()}
        if self.positions is not None:
            start = start + self.positions(index)
        end, watched = self.stack(start, tables, lengths, watch, past)
        return start, self.final_norm(end), watched
