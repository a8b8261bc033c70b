"""A linear map of embeddings, made of the differences between responses to one prompt: no label or reward is read."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from jarm.core.checks import INT32, between
from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable, TrainTest
from jarm.core.within import MAX_WIDTH, centred_embeddings

SMALLEST = 1e-6
"""Share of the largest variance below which a direction is left out, since rounding makes it."""


class Within(NamedTuple):
    """A metric in numbers: how sharp, and how many directions at most, None for all."""

    alpha: float
    rank: int | None = None

    def __str__(self) -> str:
        return f"within:{self.alpha:g}" + (f":{self.rank}" if self.rank else "")


def read_metric(text: str) -> Within | None:
    """Read `none`, `within:ALPHA` or `within:ALPHA:RANK`.

    Raises:
      JarmError: the text is none of these, or a number is out of its range.

    Example:
      >>> read_metric("within:3:64")
      Within(alpha=3.0, rank=64)
      >>> read_metric("within")
      Traceback (most recent call last):
      jarm.core.status.JarmError: Cannot read the metric 'within': write 'none', 'within:ALPHA' or 'within:ALPHA:RANK'.
    """
    if text == "none":
        return None
    kind, *numbers = text.split(":")
    try:
        alpha, rank = float(numbers[0]), int(numbers[1]) if len(numbers) > 1 else None
    except (IndexError, ValueError):
        kind = ""
    if kind != "within" or len(numbers) > 2:
        raise JarmError(f"Cannot read the metric '{text}': write 'none', 'within:ALPHA' or 'within:ALPHA:RANK'.")
    between(0, 10)("ALPHA of the metric", alpha)
    if rank is not None:
        between(1, INT32)("RANK of the metric", rank)
    return Within(alpha, rank)


def within_metric(tables: TrainTest, metric: Within) -> TrainTest:
    """The tables with embeddings `c (l / l_1)^((alpha - 1) / 2) U^T e`, of mean squared size 1 within prompts.

    U diag(l) U^T is the covariance of the training embeddings less the mean of their prompt, largest first, and c makes
    the mean squared length of these differences 1. alpha 1 keeps distances within prompts up to c where no
    direction is left out, larger sharpens the directions in
    which responses differ most, 0 whitens. Each training row is read once here; rows are mapped as they are read.

    Args:
      tables: standardised or not.
      metric: alpha, and the number of directions kept: at most those whose variance rounding does not make.

    Raises:
      JarmError: no prompt has two responses with different embeddings, or embeddings are too wide or not finite.

    Example:
      Two responses to one prompt, which differ four times as much in one direction as in the other.

      >>> rows, mask = np.arange(2)[None], np.ones((1, 2), bool)
      >>> table = ResponseTable(np.array([[4.0, 1.0], [-4.0, -1.0]]), rows, mask)
      >>> within_metric(TrainTest(table, table), Within(alpha=2.0)).train.embeddings().shape
      (1, 2, 1)
    """
    train = tables.train
    width = train.shape[2]
    if width > MAX_WIDTH:
        raise JarmError(
            f"A metric is made of embeddings of up to {MAX_WIDTH:,} dimensions, and these have {width:,}: project "
            "them to fewer first, or give `--metric none`."
        )
    covariance = _covariance(train)
    variances, directions = np.linalg.eigh(covariance)
    variances, directions = variances[::-1], directions[:, ::-1]
    if not variances[0] > 0:
        raise JarmError(
            "No prompt has two responses with different embeddings, and a metric is made of their differences: give "
            "prompts several responses, or take what needs none: `--metric none --head mlp --first random`."
        )
    kept = min(int((variances > SMALLEST * variances[0]).sum()), metric.rank or width)
    shares = variances[:kept] / variances[0]
    scale = shares ** ((metric.alpha - 1) / 2)
    scale /= np.sqrt((variances[:kept] * scale**2).sum())
    mapped = (directions[:, :kept] * scale).astype(np.float32)
    made = {"alpha": metric.alpha, "rank": kept}

    def mapped_again(table: ResponseTable) -> ResponseTable:
        whole = mapped if table.metric is None else table.metric @ mapped
        return dataclasses.replace(table, metric=whole, provenance={**table.provenance, "metric": made})

    return TrainTest(*map(mapped_again, tables))


def _covariance(table: ResponseTable) -> np.ndarray:
    """`[d, d]` float64, mean outer product of the embeddings less the mean of their prompt, over prompts of several."""
    width = table.shape[2]
    total = np.zeros((width, width))
    for _, rows in centred_embeddings(table):
        flat = rows.reshape(-1, width)
        total += flat.T @ flat
    return total / np.maximum(table.mask[table.mask.sum(axis=1) > 1].sum(), 1)
