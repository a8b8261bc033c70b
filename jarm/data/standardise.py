"""Embeddings of mean 0 and variance 1 in each dimension, so that one learning rate suits every embedding model."""

from __future__ import annotations

import dataclasses

import numpy as np

from jarm.core.status import JarmError
from jarm.core.tables import TrainTest, check_embeddings

CHUNK = 1 << 24
"""Numbers of the training embeddings that are read at a time."""


def standardised(tables: TrainTest) -> TrainTest:
    """The tables with embeddings `(e - mean) / deviation` in each dimension, measured on the training responses.

    Language models put most of a hidden state into a few dimensions, and sentence embedders give vectors of norm 1: a
    head trained on raw embeddings starts far from where its optimiser works well (`experiments/README.md` has the
    cost). The store stays unchanged; rows are transformed as they are read. Each training row is read once here. A
    constant dimension becomes 0.

    Raises:
      JarmError: a metric maps the embeddings already, a training embedding is not finite or so large that others would
        vanish beside it, or all are equal.
    """
    if tables.train.metric is not None:
        raise JarmError("A metric maps the embeddings already: standardise them first, then make the metric of that.")
    train = dataclasses.replace(tables.train, mean=None, deviation=None)
    prompts, responses, d = train.shape
    step = max(1, CHUNK // (responses * d))
    count, total, squares = int(train.mask.sum()), np.zeros(d), np.zeros(d)
    anchor = train.store[train.rows[train.mask][0]].astype(np.float64)  # sums of differences from it stay small
    for start in range(0, prompts, step):
        some = slice(start, start + step)
        embeddings = train.embeddings(some)
        check_embeddings(embeddings, train.mask[some], start)
        rows = embeddings[train.mask[some]] - anchor
        total += rows.sum(axis=0)
        squares += np.square(rows, out=rows).sum(axis=0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - np.square(mean), 0)).astype(np.float32)
    if not deviation.any():
        raise JarmError("Every dimension of the embeddings is constant over the training responses: embed them again.")
    measured = {
        "mean": (mean + anchor).astype(np.float32),
        "deviation": np.where(deviation > 0, deviation, np.float32(np.inf)),
    }
    return TrainTest(
        *(
            dataclasses.replace(side, **measured, provenance={**side.provenance, "standardised": True})
            for side in tables
        )
    )
