"""Two reference lines that know gold: the first component with its sign, and the ceiling of a linear head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jarm.core.columns import differ
from jarm.core.tables import ResponseTable, TrainTest
from jarm.core.within import CHUNK, MAX_WIDTH, centred, centred_embeddings

RIDGES = 10.0 ** np.arange(-6, 1.1, 0.5)
"""Ridges that the ceiling chooses from, in units of the largest eigenvalue of `C^T C`."""
NAMES = ("first component", "ceiling")
"""Names of the lines."""


class LinearFits(NamedTuple):
    """Two linear rewards, `[d]` weights each, and how the ridge of the second was chosen.

    Attributes:
      first_component: the direction in which responses to one prompt differ most, of length 1, with the sign by which
        it agrees with gold.
      ceiling: ridge regression on all gold.
      ridge: its ridge, one of `RIDGES` times the largest eigenvalue of `C^T C`.
      errors: `[len(RIDGES)]` leave-one-prompt-out sum of squared errors of each, in squared units of gold.
    """

    first_component: np.ndarray
    ceiling: np.ndarray
    ridge: float
    errors: np.ndarray


def fit_linear(table: ResponseTable) -> LinearFits | None:
    """The first component with its sign and the ridge regression of a table, in float64.

    With C the embeddings and y the gold rewards less the mean of their prompt, the first component is the first
    eigenvector of `C^T C`, turned to `y^T C u >= 0`, one bit of gold; and the ceiling is `(C^T C + ridge I)^-1 C^T y`.
    The ridge is the one of least error on prompts left out: with H_p the block of `C (C^T C + ridge I)^-1 C^T` of a
    prompt and e_p its residuals, those of a fit to all other prompts are `(I - H_p)^-1 e_p`. Embeddings are read twice,
    in chunks.

    Args:
      table: training prompts with gold rewards, d up to 4,096.

    Returns:
      The fits; None where no prompt has two responses that differ in embedding and gold.

    Raises:
      JarmError: an embedding is not finite, or too large.

    Example:
      >>> import jarm
      >>> train, test = jarm.synthetic(seed=0)
      >>> fits = fit_linear(train)
      >>> fits.ceiling.shape, bool(fits.errors.min() < np.square(centred(train.gold, train.mask)).sum())
      ((32,), True)
    """
    width = table.shape[2]
    gram, moment = np.zeros((width, width)), np.zeros(width)
    if not differ(table.column("gold"), table.mask, "within"):
        return None
    gold = centred(table.column("gold"), table.mask)
    for some, rows in centred_embeddings(table):
        flat = rows.reshape(-1, width)
        gram += flat.T @ flat
        moment += flat.T @ gold[some].reshape(-1)
    if not moment.any():
        return None
    values, directions = np.linalg.eigh(gram)
    values, along = values.clip(0), directions.T @ moment
    ridges = RIDGES * values[-1]
    errors = np.zeros(len(ridges))
    for some, rows in centred_embeddings(table):
        turned = rows @ directions
        for at, ridge in enumerate(ridges):
            shrunk = turned / (values + ridge)
            left = np.eye(rows.shape[1]) - shrunk @ turned.swapaxes(1, 2)
            residuals = np.linalg.solve(left, (gold[some] - shrunk @ along)[..., None])
            errors[at] += np.square(residuals).sum()
    ridge = ridges[errors.argmin()]
    first = directions[:, -1]
    return LinearFits(
        first_component=first if along[-1] >= 0 else -first,
        ceiling=directions @ (along / (values + ridge)),
        ridge=float(ridge),
        errors=errors,
    )


def linear_scores(tables: TrainTest) -> dict[str, np.ndarray]:
    """Scores `[P, R]` of the test responses by the two linear rewards of the training prompts.

    A metric of the tables is left out: it may hide from a head what a ceiling has to know.

    Args:
      tables: with gold rewards of the training prompts.

    Returns:
      `first component` and `ceiling` -> scores; nothing where `fit_linear` finds nothing to fit, or for embeddings of
      more than 4,096 dimensions.

    Raises:
      JarmError: a training embedding is not finite, or too large.
    """
    tables = TrainTest(*(dataclasses.replace(table, metric=None) for table in tables))
    fits = fit_linear(tables.train) if tables.train.shape[2] <= MAX_WIDTH else None
    if fits is None:
        return {}
    weights = np.stack([fits.first_component, fits.ceiling], axis=1)
    scores = np.concatenate([rows @ weights for rows in _embeddings(tables.test)])
    return {name: scores[..., at] for at, name in enumerate(NAMES)}


def _embeddings(table: ResponseTable) -> Iterator[np.ndarray]:
    """Embeddings of some prompts after the other, `[p, R, d]`."""
    prompts, responses, width = table.shape
    step = max(1, CHUNK // (responses * width))
    for start in range(0, prompts, step):
        yield table.embeddings(slice(start, start + step))
