"""The criteria in NumPy and float64: for the host, where a program for a device would take seconds to compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jarm.core.buckets import bucket, padded
from jarm.core.types import Array
from jarm.design.criteria import (
    D_OPTIMAL,
    D_UNWEIGHTED,
    Criterion,
    mean_information,
    sum_of_variances,
)


def _fall_of_variance(v: np.ndarray, q: np.ndarray, c: np.ndarray, h: np.ndarray) -> np.ndarray:
    return np.asarray(v * np.einsum("mg,mg->m", c, c) / (1 + v * q))


def _information_about(v: np.ndarray, q: np.ndarray, c: np.ndarray, h: np.ndarray) -> np.ndarray:
    # Cauchy and Schwarz: c^2 <= q h, whatever rounding says.
    square = np.minimum(np.square(c), q[:, None] * h)
    return np.asarray(-np.log1p(-(v / (1 + v * q))[:, None] * square / (1 + h)).mean(axis=1) / 2)


def _form(criterion: Criterion) -> tuple[Any, ...]:
    """What the worths and gains of pairs follow from, beside the targets."""
    return criterion.worth, criterion.gain, criterion.weight


_V, _E = (make(np.zeros((0, 1), np.float32)) for make in (sum_of_variances, mean_information))
_GAINS: dict[Any, Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    _form(D_OPTIMAL): lambda v, q, c, h: np.log1p(v * q),
    _form(D_UNWEIGHTED): lambda v, q, c, h: np.log1p(q),
    _form(_V): _fall_of_variance,
    _form(_E): _information_about,
}
"""Gains `[m]` of pairs by the form of their criterion: of their weights v `[m]`, q `[m]`, c `[m, G]` and h `[G]`."""


def known(criterion: Criterion) -> bool:
    """Whether nothing has to be compiled for a criterion."""
    return _form(criterion) in _GAINS


def gains_of(
    criterion: Criterion, margin: np.ndarray, v: np.ndarray, q: np.ndarray, c: np.ndarray, h: np.ndarray
) -> np.ndarray:
    """Gains `[m]` of pairs, in the units of the criterion and in float64.

    Args:
      criterion: any; one that is not `known` is compiled.
      margin: `[m]`.
      v: `[m]` weights, of `weights_of`.
      q: `[m]` variances of the margins.
      c: `[m, G]` covariances with the targets.
      h: `[G]` variances of the targets.
    """
    if known(criterion):
        return _GAINS[_form(criterion)](v, q, c, h)
    room = bucket(len(q))
    with jax.enable_x64(True):
        gains = _compiled_gains(criterion, padded(margin, room), padded(q, room), padded(c, room), h)
    return np.asarray(gains)[: len(q)]


@jax.jit
def _compiled_gains(criterion: Criterion, margin: Array, q: Array, c: Array, h: Array) -> Array:
    return criterion.gain(jax.vmap(criterion.worth, in_axes=(0, 0, 0, None))(margin, q, c, h))


def weights_of(criterion: Criterion, margin: np.ndarray) -> np.ndarray:
    """The weights v of the criterion `[m]`, in float64."""
    if criterion.weighted is False:
        return np.ones(len(margin))
    if criterion.weighted:
        decay = np.exp(-np.abs(margin))
        return np.asarray(decay / np.square(1 + decay))
    with jax.enable_x64(True):
        return np.asarray(_compiled_weights(criterion.weight, padded(margin, bucket(len(margin)))))[: len(margin)]


@functools.partial(jax.jit, static_argnums=0)
def _compiled_weights(weight: Callable[[Array], Array], margin: Array) -> Array:
    return weight(margin)
