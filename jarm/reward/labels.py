"""A user's labels as arrays for a fit, of a few sizes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jarm.core.base import Labelled
from jarm.core.buckets import bucket, padded
from jarm.core.status import JarmError
from jarm.core.types import Array, Float


def label_pairs(embeddings: Any, pairs: Any, labels: Any, weights: Any = None) -> tuple[Float[Array, "n d"], Labelled]:
    """Labels for a fit that compiles once for many numbers of them, and of responses.

    Args:
      embeddings: `[N, d]` of the responses; only those that are in a pair are read.
      pairs: `[L, 2]` indices of responses.
      labels: `[L]` in [0, 1], the share of answers that prefer the first.
      weights: `[L]` weights in the loss; None for 1.

    Returns:
      Embeddings of the responses in a pair and the labels that index these, both padded to a power of two: the last two
      arguments of the function that `make_fit` makes.

    Raises:
      JarmError: shapes differ, there are no labels, an index is no response, or a number is out of range or not finite.

    Example:
      Three labels, and then a fourth, share one program.

      >>> import jax, numpy as np
      >>> from jarm import HParams
      >>> from jarm.reward.config import FitConfig
      >>> from jarm.reward.fit import make_fit
      >>> from jarm.reward.heads import linear_head
      >>> fit, embeddings = make_fit(linear_head(), FitConfig(members=1)), np.eye(5)
      >>> some = label_pairs(embeddings, [[0, 1], [1, 2], [2, 3]], [1, 1, 0])
      >>> more = label_pairs(embeddings, [[0, 1], [1, 2], [2, 3], [3, 4]], [1, 1, 0, 1])
      >>> [(each.shape, labelled.mask.tolist()) for each, labelled in (some, more)]
      [((8, 5), [True, True, True, False]), ((8, 5), [True, True, True, True])]
      >>> params, info = fit(jax.random.key(0), HParams(), *more)
      >>> rewards = embeddings @ params["out"]["kernel"][0, :, 0]
      >>> [round(reward, 2) for reward in rewards.tolist()]
      [0.39, -0.03, -0.6, 0.54, -0.3]
    """
    embeddings, pairs = np.asarray(embeddings), np.asarray(pairs)
    if embeddings.ndim != 2:
        raise JarmError(f"embeddings have shape {embeddings.shape}: give [N, d].")
    labels = np.asarray(labels, np.float32)
    weights = np.ones(len(labels), np.float32) if weights is None else np.asarray(weights, np.float32)
    count = len(labels)
    if not count:
        raise JarmError("There are no labels: give one or more.")
    if pairs.shape != (count, 2) or pairs.dtype.kind not in "iu" or weights.shape != (count,):
        raise JarmError(
            f"pairs have shape {pairs.shape}, labels {labels.shape} and weights {weights.shape}: give [L, 2] whole "
            "numbers, [L] and [L]."
        )
    outside = ((pairs < 0) | (pairs >= len(embeddings))).any(axis=1) | (pairs[:, 0] == pairs[:, 1])
    if outside.any():
        row = int(outside.argmax())
        raise JarmError(
            f"Row {row} of pairs is {tuple(pairs[row].tolist())}: give two different responses of 0 to "
            f"{len(embeddings) - 1}."
        )
    for name, values, most in (("labels", labels, 1), ("weights", weights, np.finfo(np.float32).max)):
        bad = ~((values >= 0) & (values <= most))
        if bad.any():
            row = int(bad.argmax())
            raise JarmError(f"Row {row} of {name} is {values[row]:g}: give a number of 0 to {most:g}.")
    used, place = np.unique(pairs, return_inverse=True)
    place, room = place.reshape(-1, 2).astype(np.int32), bucket(count)
    rows = embeddings[used].astype(np.float32)
    if not np.isfinite(rows).all():
        row = int(used[~np.isfinite(rows).all(axis=1)][0])
        raise JarmError(f"Row {row} of embeddings is NaN or infinite: repair it, or leave its pairs out.")
    first, second, label, weight, mask = (
        jnp.asarray(padded(each, room)) for each in (place[:, 0], place[:, 1], labels, weights, np.ones(count, bool))
    )
    return jnp.asarray(padded(rows, 2 * room)), Labelled(first, second, label, weight, mask)
