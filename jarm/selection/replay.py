"""A batch replayed in float64: gains, weights and whitening."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from jarm.core.types import Array
from jarm.design.criteria import Criterion


def replay(
    criterion: Criterion,
    start: np.ndarray,
    x: np.ndarray,
    margin: np.ndarray,
    costs: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the pairs of a batch again, in float64.

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
    whiten = whitener(start)
    y, z = x @ whiten.T, targets @ whiten.T
    q, c, h = np.square(y).sum(axis=1), y @ z.T, np.square(z).sum(axis=1)
    inverse, weight = np.eye(len(start)), weights_of(criterion, margin)
    price = np.ones(len(x)) if costs is None else costs
    gains, later = np.empty(len(x)), np.full(len(x), -np.inf)
    with jax.enable_x64(True):
        for at in range(len(x)):
            worth = np.asarray(_gains(criterion, margin, q, c, h))
            gains[at] = worth[at]
            later[at] = np.max((worth / price)[at + 1 :], initial=-np.inf)
            step = inverse @ y[at] * np.sqrt(weight[at] / (1 + weight[at] * q[at]))
            along, of_targets = y @ step, z @ step
            q, c, h = q - np.square(along), c - np.outer(along, of_targets), h - np.square(of_targets)
            inverse -= np.outer(step, step)
    return gains, later


@jax.jit
def _gains(criterion: Criterion, margin: Array, q: Array, c: Array, h: Array) -> Array:
    return criterion.gain(jax.vmap(criterion.worth, in_axes=(0, 0, 0, None))(margin, q, c, h))


def weights_of(criterion: Criterion, margin: np.ndarray) -> np.ndarray:
    """The weights v of the criterion, in float64; padded, so that rounds of a campaign share a program."""
    padded = np.zeros(1 << max(6, (len(margin) - 1).bit_length()))
    padded[: len(margin)] = margin
    with jax.enable_x64(True):
        return np.asarray(_weights(criterion.weight, padded))[: len(margin)]


@functools.partial(jax.jit, static_argnums=0)
def _weights(weight: Callable[[Array], Array], margin: Array) -> Array:
    return weight(margin)


def log_det_of(matrix: np.ndarray) -> float:
    """log det of a positive definite matrix, in nats."""
    return float(np.linalg.slogdet(matrix)[1])


def whitener(matrix: np.ndarray) -> np.ndarray:
    """W with W^T W the inverse of a positive definite matrix."""
    return np.linalg.inv(np.linalg.cholesky(matrix))


def sigmoid(margin: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-m)), without overflow."""
    return np.exp(-np.logaddexp(0, -margin))
