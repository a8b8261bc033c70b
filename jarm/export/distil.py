"""A linear reward model that comes close to another, where a program can hold no other: fitted to its rewards."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jarm.core.status import JarmError
from jarm.core.types import Float
from jarm.export.aggregate import MEAN
from jarm.export.model import RewardModel
from jarm.report.clusters import average_ranks
from jarm.reward.config import HeadConfig

SHARES = (0.6, 0.8)
"""Embeddings up to the first share are fitted to, up to the second they choose the penalty, the rest tells the loss."""
RIDGES = 10.0 ** np.arange(-6, 3)
"""Penalties that the fit chooses among, as shares of the mean squared embedding."""


def distilled(model: RewardModel, embeddings: Float[np.ndarray, "n d"], seed: int = 0) -> tuple[RewardModel, float]:
    """The linear model nearest to the rewards of another, by ridge regression on embeddings.

    Args:
      model: the other.
      embeddings: of texts like those that are to be scored; as the model takes them, several times d of them.
      seed: of the choice of those left out.

    Returns:
      The linear model, and the rank correlation (Spearman) of its rewards with the other's, over all embeddings of a
      fifth that neither the fit nor its penalty has seen.

    Raises:
      JarmError: fewer than 50 embeddings, or such as `model` refuses.

    Example:
      >>> params = {"hidden": {0: {"kernel": np.eye(2, dtype=np.float32)[None], "bias": np.zeros((1, 2), np.float32)}},
      ...           "out": {"kernel": np.ones((1, 2, 1), np.float32)}}
      >>> model = RewardModel(HeadConfig.parse("mlp:2:tanh"), params, np.zeros(1, np.float32))
      >>> linear, rank = distilled(model, np.random.default_rng(0).normal(size=(200, 2)))
      >>> str(linear.head), rank > 0.95
      ('linear', True)
    """
    if len(embeddings) < 50:
        raise JarmError(
            f"A linear model cannot be fitted to the rewards of {len(embeddings)} embeddings: give 50 or more, of "
            "texts like those that it is to score."
        )
    wanted = model.score(embeddings).astype(np.float64)
    rows = np.asarray(embeddings, np.float64)
    order = np.random.default_rng(seed).permutation(len(rows))
    fit, choose, rest = np.split(order, [int(share * len(rows)) for share in SHARES])
    mean, deviation = rows[fit].mean(axis=0), rows[fit].std(axis=0)
    deviation[deviation <= 1e-12 * np.abs(mean)] = np.inf  # constant: it tells nothing
    scaled, centre = (rows - mean) / deviation, wanted[fit].mean()
    values, vectors = np.linalg.eigh(scaled[fit].T @ scaled[fit])
    along = vectors.T @ (scaled[fit].T @ (wanted[fit] - centre))
    scale = max(values.mean(), np.finfo(float).tiny)
    fits = [vectors @ (along / (np.maximum(values, 0) + ridge * scale)) for ridge in RIDGES]
    best = min(fits, key=lambda found: float(np.mean((scaled[choose] @ found + centre - wanted[choose]) ** 2)))
    linear = RewardModel(
        HeadConfig(hidden=()),
        {"out": {"kernel": best.astype(np.float32).reshape(1, -1, 1)}},
        np.array([-centre], np.float32),
        mean=mean.astype(np.float32),
        deviation=deviation.astype(np.float32),
        made_by=model.made_by,
        aggregate=MEAN,
    )
    found = rank_correlation(linear.score(embeddings[rest]), wanted[rest])
    if math.isnan(found):
        raise JarmError(
            "The rewards of these embeddings are all equal, so nothing can be fitted to them: give embeddings of texts "
            "that differ."
        )
    kept = {name: model.training[name] for name in ("data", "labels", "labels_by") if name in model.training}
    training = {**kept, "distilled_from": str(model.head), "rank_correlation": found}
    return dataclasses.replace(linear, training=training), found


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's, with the mean rank for ties; NaN where one of the two is constant.

    Example:
      >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([0.0, 5.0, 4.0]))
      0.5
    """
    a, b = (average_ranks(each, np.zeros(len(each), np.int64)) for each in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else float("nan")
