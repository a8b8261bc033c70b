"""Metrics of one prompt under one head, and their sums over a chunk of prompts: the compiled part of `metrics`."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.base import RewardHead
from jarm.core.types import Array, Bool, Float, Params
from jarm.evaluation.annotators import AnnotatorConfig, preference
from jarm.evaluation.ranking import centred_ranks, correlation, expected_best, ranking

BINS = 15
"""Bins of the calibration error."""
OFFSETS = 16
"""Partners of a response in the test pairs, where it has more than 32 others."""


def pair_offsets(width: int) -> tuple[np.ndarray, np.ndarray]:
    """The within-prompt test pairs (i, i + o mod R): every pair if R <= 33, else those of 16 evenly spread offsets o.

    Returns:
      `[J, R]` int32 partner of each response under each offset; and `[J, R]` bool, false on the half of the offset R/2
      that repeats the other half.
    """
    half = width // 2
    offsets = np.arange(1, half + 1)
    if half > OFFSETS:
        offsets = np.round(np.linspace(1, (width - 1) // 2, OFFSETS)).astype(int)
    here = np.arange(width)
    once = (2 * offsets[:, None] != width) | (here < half)
    return ((here + offsets[:, None]) % width).astype(np.int32), once


class _Truth(NamedTuple):
    """One prompt's part of the metrics that no head changes; computed once for all heads."""

    gold: Float[Array, "R"]
    mask: Bool[Array, "R"]
    ranks: Float[Array, "R"]
    real: Bool[Array, "J R"]
    gap: Float[Array, "J R"]


class Constants(NamedTuple):
    """The annotator's noise, the scale of gold, and the order statistics of best-of-n."""

    noise: Float[Array, ""]
    scale: Float[Array, ""]
    cdfs: Float[Array, "n size k"]


@jax.vmap
def _truths(
    gold: Float[Array, "R"], mask: Bool[Array, "R"], rest: Float[Array, "R"] | None, order: Float[Array, "R"] | None
) -> _Truth:
    partner, once = pair_offsets(gold.shape[0])
    real = jnp.asarray(once) & mask[None, :] & mask[partner]
    ranks = centred_ranks(ranking(gold if order is None else order, mask), mask)
    gap = gold[None, :] - gold[partner]
    return _Truth(gold, mask, ranks, real, gap if rest is None else gap + (rest[None, :] - rest[partner]))


def _score(
    annotator: AnnotatorConfig, constants: Constants, pred: Float[Array, "R"], truth: _Truth
) -> dict[str, Array]:
    """The metrics of one prompt under one head: values that may be NaN, and sums over pairs."""
    ranks = ranking(pred, truth.mask)
    wins = preference(annotator, constants.noise, truth.gap / constants.scale, jnp.zeros_like(truth.gap))
    partner, _ = pair_offsets(pred.shape[0])
    margin = pred[None, :] - pred[partner]
    # One exponential serves all metrics: confidence is the larger of p and 1 - p.
    decay = jnp.exp(-jnp.abs(margin))
    confidence = 1 / (1 + decay)
    agree = jnp.where(margin > 0, wins, jnp.where(margin < 0, 1 - wins, 0.5))
    over = jnp.where(truth.real, confidence - agree, 0)
    place = jnp.clip(jnp.floor((confidence - 0.5) * (2 * BINS)), 0, BINS - 1).astype(jnp.int32)
    untied = truth.real & (truth.gap != 0)
    right = (1 + jnp.sign(margin) * jnp.sign(truth.gap)) / 2
    loss = jnp.log1p(decay) + jnp.maximum(margin, 0) - wins * margin
    p = jnp.where(margin > 0, confidence, 1 - confidence)
    brier = (p - wins) ** 2 + wins * (1 - wins)
    total = functools.partial(jnp.sum, dtype=jnp.float32)
    return {
        "spearman": correlation(centred_ranks(ranks, truth.mask), truth.ranks),
        "rankable": (truth.ranks != 0).any().astype(jnp.int32),
        "best": jax.vmap(lambda cdf: expected_best(ranks, truth.gold, truth.mask, cdf))(constants.cdfs),
        "pairs": total(truth.real),
        "untied": total(untied),
        "right": total(jnp.where(untied, right, 0)),
        "nll": total(jnp.where(truth.real, loss, 0)),
        "brier": total(jnp.where(truth.real, brier, 0)),
        # One pass per bin: a scatter is faster, but adds in no fixed order on an accelerator.
        "over": jax.lax.map(lambda b: jnp.where(place == b, over, 0).sum(), jnp.arange(BINS, dtype=jnp.int32)),
    }


def _sums(annotator: AnnotatorConfig, constants: Constants, pred: Array, truth: _Truth) -> dict[str, Array]:
    """Sums over the prompts of a chunk; of values that may be NaN, also how many are not."""
    each = jax.vmap(functools.partial(_score, annotator, constants))(pred, truth)
    sums = {}
    for name in ("spearman", "best"):
        values = each.pop(name)
        defined = ~jnp.isnan(values)
        sums[name] = jnp.where(defined, values, 0).sum(0)
        sums[name + "_defined"] = defined.sum(0, dtype=jnp.int32)
    return sums | {name: values.sum(0) for name, values in each.items()}


@functools.partial(jax.jit, static_argnames=("head", "annotator", "batched_heads"))
def evaluate_chunk(
    params: Params,
    noise: Float[Array, "H"],
    constants: Constants,
    embeddings: Float[Array, "p R d"],
    gold: Float[Array, "p R"],
    mask: Bool[Array, "p R"],
    rest: Float[Array, "p R"] | None = None,
    order: Float[Array, "p R"] | None = None,
    *,
    head: RewardHead,
    annotator: AnnotatorConfig,
    batched_heads: bool,
) -> dict[str, Array]:
    """Sums of the metrics over a chunk of p prompts, under H models in turn: the compiled part of `evaluate`.

    `rest` is what float32 leaves out of `gold`, and `order` its ranks within each prompt (`core.columns`); None where
    float32 is enough.
    """
    flat, truth = embeddings.reshape(-1, embeddings.shape[2]), _truths(gold, mask, rest, order)

    def one(xs: tuple[Params, Float[Array, ""]]) -> dict[str, Array]:
        members, own = xs

        def rewards(member: Params) -> Array:
            return head.rewards(member, flat)

        each = jax.vmap(rewards)(members) if batched_heads else jax.lax.map(rewards, members)
        return _sums(annotator, constants._replace(noise=own), each.mean(0).reshape(mask.shape), truth)

    # Heads one after the other, so that memory does not grow with their number.
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(one, (params, noise))


@functools.partial(jax.jit, static_argnames=("annotator",))
def score_chunk(
    constants: Constants,
    scores: Float[Array, "p R"],
    gold: Float[Array, "p R"],
    mask: Bool[Array, "p R"],
    rest: Float[Array, "p R"],
    order: Float[Array, "p R"],
    *,
    annotator: AnnotatorConfig,
) -> dict[str, Array]:
    """The same of given scores: the compiled part of `evaluate_scores`."""
    sums = _sums(annotator, constants, scores, _truths(gold, mask, rest, order))
    return {name: value[None] for name, value in sums.items()}
