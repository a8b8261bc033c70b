"""Teachers weighed by labelled pairs: the evidence of each, and its share of the draws of a forecast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.files import PathLike
from jarm.core.status import JarmError, check
from jarm.core.tables import TrainTest
from jarm.data.readers import read_columns
from jarm.data.teachers import Teacher, TeacherSpace, pair_covariance
from jarm.reward.laplace import posterior


class Pairs(NamedTuple):
    """Labelled pairs: `[L]` responses `first` and `second`, as indices into N, and `label`, P(first preferred)."""

    first: np.ndarray
    second: np.ndarray
    label: np.ndarray


def read_labels(path: PathLike, tables: TrainTest) -> Pairs:
    """The labelled pairs of a file: columns `first` and `second`, numbers of responses of a table, and `label`.

    Args:
      path: Parquet or JSONL.
      tables: of a table beside an `.npy` in its order.

    Raises:
      JarmError: the file is missing or damaged, lacks a column, or names responses that the table does not have; or
        the embeddings are not an array in the order of a table.
    """
    made = tables.train.provenance
    if made.get("source") != "table" or "embedded_by" in made:
        raise JarmError(
            f"{path} numbers the responses of a table beside an .npy in its order, and there is none: write one with "
            "`jarm store export`, or leave `--labels` out."
        )
    columns = read_columns(path, Pairs._fields)
    if missing := [name for name in Pairs._fields if name not in columns.names]:
        raise JarmError(f"{path} has no column {missing[0]!r}: give first, second and label.")
    first, second, label = (_numbers(path, name, columns.table[name]) for name in Pairs._fields)
    place = np.full(1 + max(int(table.rows.max()) for table in tables), -1)
    start = 0
    for table in tables:
        place[table.rows[table.mask]] = start + np.flatnonzero(table.mask.reshape(-1))
        start += table.mask.size
    for name, ends in (("first", first), ("second", second)):
        known = (ends == np.floor(ends)) & (ends >= 0) & (ends < len(place))
        if not known.all():
            at = int(np.argmin(known))
            raise JarmError(
                f"{path}, row {at}: {name} is {ends[at]:g}, and the responses of the table are numbered 0 to "
                f"{len(place) - 1}: give the row of the response in it."
            )
    if (bad := (first == second) | ~((label >= 0) & (label <= 1))).any():
        at = int(np.argmax(bad))
        raise JarmError(
            f"{path}, row {at}: label {label[at]:g} of the pair {first[at]:g}, {second[at]:g}: give two responses, and "
            "a probability from 0 to 1 that the first is preferred."
        )
    return Pairs(place[first.astype(int)], place[second.astype(int)], label)


def _numbers(path: PathLike, name: str, column: Any) -> np.ndarray:
    try:
        values = np.asarray(column.to_pylist(), np.float64)
    except (TypeError, ValueError):
        values = np.array([np.nan])
    if np.isnan(values).any():
        raise JarmError(f"{path}: {name} is missing or no number in some row: give a number in each.")
    return values


def log_evidence(space: TeacherSpace, teacher: Teacher, labels: Pairs) -> float:
    """Log probability of some labels under a teacher, by Laplace's method, in nats.

    The margins of the pairs are Gaussian, with the covariance K of a teacher's differences times beta^2: as those of a
    linear head whose weights are N(0, I) and whose inputs are the rows of a root of K.
    """
    values, vectors = np.linalg.eigh(pair_covariance(space, teacher, labels.first, labels.second))
    root = teacher.noise * vectors * np.sqrt(np.maximum(values, 0))
    arrays = (jnp.asarray(each, jnp.float32) for each in (root, labels.label, np.ones(len(root))))
    found = _posterior(*arrays, jnp.float32(1.0))
    check(found.status, f"The evidence of {teacher}")
    return float(found.log_evidence)


_posterior = jax.jit(posterior)


def teacher_weights(space: TeacherSpace, teachers: Sequence[Teacher], labels: Pairs | None) -> np.ndarray:
    """Probability of each teacher, given labels: equal without any."""
    if labels is None:
        return np.full(len(teachers), 1 / len(teachers))
    with jax.default_matmul_precision("highest"):
        evidence = np.array([log_evidence(space, teacher, labels) for teacher in teachers])
    weights = np.exp(evidence - evidence.max())
    return np.asarray(weights / weights.sum())


def allocate(teachers: Sequence[Teacher], weights: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Teachers for some draws: half of the draws go to all alike, half by their weights.

    Each teacher gets its expected number of draws, rounded up or down, and so does each shape with each noise.

    Args:
      teachers: the C teachers.
      weights: `[C]` probabilities of the teachers.
      draws: number of draws D.
      seed: of the order of teachers of one shape and noise.

    Returns:
      `[D]` a teacher for each draw, and `[D]` the weight of the draw, so that sums over draws stand for the teachers.
    """
    rng = np.random.default_rng(seed)
    keys = [(teacher.shape, teacher.noise, rng.uniform()) for teacher in teachers]
    order = np.array(sorted(range(len(teachers)), key=keys.__getitem__))
    share = (0.5 * weights + 0.5 / len(weights))[order]
    # Systematic sampling: a step of one draw along the cumulated shares.
    places = (np.arange(draws) + rng.uniform()) / draws * share.sum()
    which = order[np.minimum(np.searchsorted(np.cumsum(share), places), len(order) - 1)]
    return which, weights[which] / (0.5 * weights[which] + 0.5 / len(weights))
