"""A BERT-type encoder: every token sees every other, learned positions, norms after the residual sums."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jarm.core.types import Array
from jarm.llm.config import LayerConfig, ModelConfig
from jarm.llm.layers import MLP, Attention, Embedding, KeysValues, Lead, Norm, Past, Stack, Tables, Watch


class EncoderLayer(nnx.Module):
    """x = norm(x + attention(x)), then x = norm(x + MLP(x))."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, dtype: Any, lead: Lead):
        self.attention = Attention(config, layer, dtype, lead)
        self.mlp = MLP(config, dtype, lead)
        self.attention_norm = Norm(config, config.width, lead)
        self.mlp_norm = Norm(config, config.width, lead)

    def __call__(self, x: Array, tables: Tables, lengths: Array, past: Past | None) -> tuple[Array, KeysValues]:
        """Hidden states after this layer, and its keys and values; an encoder's texts have no prefix."""
        attended, kept = self.attention(x, tables, lengths)
        x = self.attention_norm(x + attended)
        return self.mlp_norm(x + self.mlp(x)), kept


class Encoder(nnx.Module):
    """Embedding of tokens, positions and the first token type, norm, layers; padding is masked."""

    def __init__(self, config: ModelConfig, dtype: Any):
        self.embed = Embedding(config.vocab, config.width, dtype)
        self.positions = Embedding(config.max_positions, config.width, dtype)
        self.types = Embedding(config.token_types, config.width, dtype)
        self.embed_norm = Norm(config, config.width, ())
        self.stack = Stack(EncoderLayer, config, dtype)

    def __call__(self, tokens: Array, lengths: Array, watch: Watch) -> tuple[Array, Array, Any]:
        """Hidden states before the first and after the last layer, and the results of `watch` after each."""
        first_type = self.types(jnp.zeros(1, jnp.int32))[None]
        start = self.embed(tokens) + first_type + self.positions(jnp.arange(tokens.shape[1], dtype=jnp.int32))[None]
        start = self.embed_norm(start)
        end, watched = self.stack(start, {}, lengths, watch)
        return start, end, watched
