"""What a run reads: a training table on the device, gold rewards in units of the annotator's scale."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jarm.core.base import JarmError, ResponseTable, record
from jarm.core.types import Array, Bool, Float
from jarm.evaluation.annotators import AnnotatorConfig, reward_scale


@record
class Pool:
    """A training table on the device, as `run` reads it.

    Attributes:
      embeddings: `[P, R, d]` float32.
      mask: `[P, R]` bool.
      gold: `[P, R]` gold rewards divided by the annotator's scale; NaN where people will answer.
      lengths: `[P, R]` response lengths in standard deviations; zeros where unknown.
      spread: mean squared distance of the embeddings of two random responses: the unit of batch diversity.
    """

    embeddings: Float[Array, "P R d"]
    mask: Bool[Array, "P R"]
    gold: Float[Array, "P R"]
    lengths: Float[Array, "P R"]
    spread: Float[Array, ""]


def check_pool(table: ResponseTable, annotator: AnnotatorConfig) -> None:
    """Refuse a table that `make_pool` cannot put on the device.

    Raises:
      JarmError: gold rewards are not finite; or the annotator's length bias needs lengths that the table lacks.
    """
    if table.gold is not None and not np.isfinite(table.gold[table.mask]).all():
        raise JarmError("Gold rewards of the table are NaN or infinite: give every response a finite one, or none.")
    if annotator.length_bias and "length" not in table.rulers:
        raise JarmError("The table knows no response lengths, so there can be no length bias: leave it at 0.")


def make_pool(table: ResponseTable, annotator: AnnotatorConfig) -> tuple[Pool, float]:
    """Put a training table on the device.

    Args:
      table: with gold rewards, unless people will answer.
      annotator: whose scale gold rewards are divided by.

    Returns:
      The pool, and the scale.

    Raises:
      JarmError: as `check_pool`.
    """
    check_pool(table, annotator)
    embeddings = table.embeddings()
    gold = np.full(table.mask.shape, np.nan, np.float32)
    scale = 1.0
    if table.gold is not None:
        scale = reward_scale(annotator, table.gold, table.mask)
        gold = np.where(table.mask, table.gold / scale, 0).astype(np.float32)
    lengths = np.zeros(table.mask.shape, np.float32)
    if "length" in table.rulers:
        length = np.asarray(table.rulers["length"], np.float64)
        deviation = np.std(length[table.mask])
        lengths = np.where(table.mask, (length - length[table.mask].mean()) / (deviation or 1), 0).astype(np.float32)
    # E |a - b|^2 of two random responses is twice the total variance. A prompt at a time: float64 copies are large.
    prompts, count = list(zip(embeddings, table.mask, strict=True)), table.mask.sum()
    mean = sum(e[real].sum(axis=0, dtype=np.float64) for e, real in prompts) / count
    spread = 2 * sum(np.square(e[real] - mean).sum() for e, real in prompts) / count
    pool = Pool(
        embeddings=jnp.asarray(embeddings),
        mask=jnp.asarray(table.mask),
        gold=jnp.asarray(gold),
        lengths=jnp.asarray(lengths),
        spread=jnp.float32(spread or 1),
    )
    return pool, scale
