"""A batch replayed in float64: gains and whitening."""

from __future__ import annotations

import numpy as np

from jarm.design.criteria import Criterion
from jarm.selection.worths import gains_of, weights_of

LOST = 2.0**-20
"""Share to which squared lengths may fall before the coordinates are made anew: so many of the digits of float64 are
lost by then."""


def replay(
    criterion: Criterion,
    start: np.ndarray,
    x: np.ndarray,
    margin: np.ndarray,
    costs: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the pairs of a batch again, in float64.

    Pairs and targets are kept in coordinates in which the information is the identity, as in `jarm.design.greedy`:
    lengths keep the digits that differences of large terms lose. Where a length has fallen far, the coordinates are
    made anew from an orthogonal factor of the information.

    Args:
      criterion: the worth of a pair.
      start: `[F, F]` information that the batch starts from.
      x: `[k, F]` feature differences in the order of choice.
      margin: `[k]`.
      costs: `[k]`, or None.

    Returns:
      `[k]` the gain of each pair when it was chosen, and `[k]` the largest gain per cost that a pair chosen later would
      have had then, -inf for the last.
    """
    targets = np.zeros((0, len(start))) if criterion.targets is None else np.asarray(criterion.targets, np.float64)
    weight = weights_of(criterion, margin)
    price = np.ones(len(x)) if costs is None else costs
    both, scaled = np.concatenate([x, targets]), np.sqrt(weight)[:, None] * x
    y = both @ whitener(start).T
    fresh = squares(y)
    gains, later = np.empty(len(x)), np.full(len(x), -np.inf)
    for at in range(len(x)):
        q, h = np.split(squares(y), [len(x)])
        worth = gains_of(criterion, margin, weight, q, y[: len(x)] @ y[len(x) :].T, h)
        gains[at] = worth[at]
        later[at] = np.max((worth / price)[at + 1 :], initial=-np.inf)
        b = np.sqrt(weight[at]) * y[at]
        grown = np.sqrt(1 + b @ b)
        # (1 + b b^T)^-1/2 = 1 - s s^T
        s = b / np.sqrt(grown * (1 + grown))
        y = y - np.outer(y @ s, s)
        left = np.r_[at + 1 : len(y)]
        if (squares(y[left]) < LOST * fresh[left]).any():
            y = solved(root_of(start, scaled[: at + 1]), both)
            fresh = squares(y)
    return gains, later


def squares(y: np.ndarray) -> np.ndarray:
    """|y|^2 of each row."""
    return np.asarray(np.square(y).sum(axis=1))


def root_of(start: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    """Triangular R with R^T R = start + scaled^T scaled, in float64: `[F, F]` of `[F, F]` and `[k, F]`.

    Features may span any range: columns are scaled alike, and large rows come first, so that reflections keep the
    digits of small ones.
    """
    rows = np.concatenate([np.linalg.cholesky(start).T, scaled])
    unit = np.sqrt(squares(rows.T))
    rows = rows / unit
    order = np.argsort(-np.abs(rows).max(axis=1), kind="stable")
    return np.asarray(np.linalg.qr(rows[order], mode="r") * unit)


def solved(root: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Rows R^-T x, whose squared lengths are x^T A^-1 x, of rows x `[m, F]` and A = R^T R."""
    unit = np.sqrt(squares(root.T))
    return np.asarray(np.linalg.solve((root / unit).T, (x / unit).T).T)


def log_det_of(start: np.ndarray, scaled: np.ndarray | None = None) -> float:
    """log det of start + scaled^T scaled, positive definite, in nats: `[F, F]`, and `[k, F]` or None."""
    root = root_of(start, np.zeros((0, len(start))) if scaled is None else scaled)
    return float(2 * np.log(np.abs(np.diagonal(root))).sum())


def whitener(matrix: np.ndarray) -> np.ndarray:
    """W with W^T W the inverse of a positive definite matrix."""
    return np.linalg.inv(np.linalg.cholesky(matrix))


def sigmoid(margin: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-m)), without overflow."""
    return np.exp(-np.logaddexp(0, -margin))
