"""Random batches by any score: Gumbel noise that turns the k best into a draw, and mixtures with random pairs.

The k largest of scores plus T times standard Gumbel noise are k draws without replacement with probabilities
proportional to exp(score / T) (Kool et al. 2019). The noise of a pair is a hash of its two indices and the key: a pass
computes it on the fly, and no pair is ever stored.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jarm.acquisition.information import bald_scorer
from jarm.core.base import Belief, HParams, PairSpace, Rule, Selection
from jarm.core.status import worst
from jarm.core.types import Array, Float, Int, PRNGKey, Shaped
from jarm.design.scorer import Scorer
from jarm.design.spaces import contains
from jarm.design.top import random_pairs, top_scores


def _mixed_bits(bits: Shaped[Array, "*b"]) -> Shaped[Array, "*b"]:
    """The finaliser of MurmurHash3: a bijection of 32 bits in which each bit depends on all."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def pair_noise(seed: Shaped[Array, "2"], i: Int[Array, "*#b"], j: Int[Array, "*#b"]) -> Float[Array, "*#b"]:
    """Standard Gumbel noise of pairs, the same for (i, j) and (j, i), one of 2^32 values up to 22.9."""
    low, high = jnp.minimum(i, j).astype(jnp.uint32), jnp.maximum(i, j).astype(jnp.uint32)
    bits = _mixed_bits(_mixed_bits(low ^ seed[0]) + high * jnp.uint32(0x9E3779B9) ^ seed[1])
    # By 1 - u, u uniform, so that large noise, which decides, has full precision.
    rest = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-rest))


def perturbed(scorer: Scorer, key: PRNGKey, temperature: Array | float, *, log: bool = False) -> Scorer:
    """A score, or its logarithm, plus `temperature` times the Gumbel noise of the pair."""
    seed = jax.random.bits(key, (2,), jnp.uint32)
    size = jax.tree.leaves(scorer.stats)[0].shape[0]

    def drawn(score: Array, i: Array, j: Array) -> Array:
        score = jnp.log(jnp.maximum(score, jnp.finfo(score.dtype).tiny)) if log else score
        return score + temperature * pair_noise(seed, i, j)

    def pair(a: tuple[Any, Array], b: tuple[Any, Array]) -> Array:
        return drawn(scorer.pair(a[0], b[0]), a[1], b[1])

    def tile(rows: tuple[Any, Array], columns: tuple[Any, Array]) -> Array:
        return drawn(scorer.tile(rows[0], columns[0]), rows[1][:, None], columns[1][None, :])

    return Scorer((scorer.stats, jnp.arange(size, dtype=jnp.int32)), pair, tile)


def _draw_bald(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int, *, log: bool) -> Selection:
    scorer = perturbed(bald_scorer(belief, space), key, hparams.temperature, log=log)
    return top_scores(scorer, jnp.isfinite(belief.member_rewards).all(axis=0), space, k)


def power_bald(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs drawn with chances proportional to a power of their BALD score: score^(1 / temperature).

    Gain: log(score) + temperature g, g the Gumbel noise of the pair. Temperature 0 is `bald`, 1 as published.
    Source: Kirsch et al. (arXiv 2106.12059).
    """
    return _draw_bald(key, hparams, belief, space, k, log=True)


def softmax_bald(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs drawn with chances proportional to exp(BALD score / temperature).

    Gain: score + temperature g nats, g the Gumbel noise of the pair. Temperature 0 is `bald`; scores are at most
    log 2, so 1 is close to `random`: try 0.01. Source: Kirsch et al. (arXiv 2106.12059).
    """
    return _draw_bald(key, hparams, belief, space, k, log=False)


def mixed(rule: Rule) -> Rule:
    """A rule that draws a share `hparams.epsilon` of its batch at random and takes the rest from `rule`.

    Of k pairs, epsilon k are random, rounded up or down at random so that this is their mean number. The others are the
    first of the rule's own batch; no pair comes twice. Random pairs come last; their gain is the smallest gain of the
    others, at most 0.
    """

    def mixture(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
        key_rule, key_pairs, key_share = jax.random.split(key, 3)
        best, drawn = rule(key_rule, hparams, belief, space, k), random_pairs(key_pairs, space, k)
        place, size = jnp.arange(k, dtype=jnp.int32), space.eligible.shape[0]
        chosen = jnp.floor(
            k * (1 - jnp.asarray(hparams.epsilon, jnp.float32)) + jax.random.uniform(key_share, dtype=jnp.float32)
        )
        head = best.valid & (place < chosen.astype(jnp.int32))
        # At least as many of the k drawn pairs are outside the head as the head is short of k.
        taken = jax.lax.sort(tuple(jnp.where(head[:, None], best.pairs, size).T), num_keys=2)
        fresh = drawn.valid & ~contains(jnp.stack(taken, axis=1), drawn.pairs)
        smallest = jnp.minimum(jnp.where(head, best.gains, jnp.inf).min(), 0)
        # The head in its order, then fresh pairs in theirs, then the rest.
        order = jnp.argsort(jnp.concatenate([jnp.where(head, 0, 2), jnp.where(fresh, 1, 2)]), stable=True)[:k]
        valid = jnp.concatenate([head, fresh])[order]
        pairs = jnp.concatenate([best.pairs, drawn.pairs])[order]
        gains = jnp.concatenate([best.gains, jnp.full(k, smallest, jnp.float32)])[order]
        status = worst(best.status, drawn.status)
        return Selection(jnp.where(valid[:, None], pairs, 0), jnp.where(valid, gains, 0), valid, status)

    return mixture
