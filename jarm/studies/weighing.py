"""Teachers weighed by labelled pairs: the evidence of each, and its share of the draws of a forecast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jarm.core.files import PathLike
from jarm.core.messages import listed
from jarm.core.status import JarmError
from jarm.core.tables import TrainTest
from jarm.core.types import Float
from jarm.data.readers import read_columns
from jarm.data.teachers import Teacher, TeacherSpace, pair_covariance

SWEEPS, DAMPING, SETTLED = 300, 0.8, 1e-4
"""Of expectation propagation: largest number of sweeps, share of each update, change in nats that ends it."""
_GRID = np.linspace(-7.5, 7.5, 61)
NODES, NODE_WEIGHTS = _GRID, np.exp(-(_GRID**2) / 2) / np.exp(-(_GRID**2) / 2).sum()
"""Points of a standard normal and their weights: even ones, as sharp likelihoods defeat Gauss's."""


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
    values = column.to_pylist()
    bad = [at for at, value in enumerate(values) if type(value) not in (int, float) or value != value]
    if bad:
        raise JarmError(f"{path}: {name} is {values[bad[0]]!r} in {listed(bad)}: give a number in each.")
    return np.asarray(values, np.float64)


def log_evidence(space: TeacherSpace, teacher: Teacher, labels: Pairs) -> float:
    """Log probability of some labels under a teacher, by expectation propagation, in nats.

    The margins of the pairs are Gaussian, with beta^2 times the covariance of a teacher's differences. Laplace's method
    would not do: the unlearnable part of a reward is one more unknown for every pair, and the posterior of such margins
    is far from Gaussian, by .05 nats per label at beta 2 and more at larger ones.
    """
    return margin_evidence(
        teacher.noise**2 * pair_covariance(space, teacher, labels.first, labels.second), labels.label
    )


def margin_evidence(covariance: Float[np.ndarray, "L L"], label: Float[np.ndarray, "L"]) -> float:
    """Log of the mean of prod_i sigmoid(m_i)^y_i sigmoid(-m_i)^(1 - y_i) over m ~ N(0, K), by expectation propagation.

    Args:
      covariance: K.
      label: y, in [0, 1].

    Raises:
      JarmError: the iteration does not settle.

    Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, sections 3.6 and 3.9; sites are
    updated all at once.

    Example:
      >>> round(margin_evidence(np.array([[16.0]]), np.ones(1)), 3)  # one label is right half the time
      -0.693
    """
    count = len(label)
    precision, shift, before = np.zeros(count), np.zeros(count), -np.inf
    for _ in range(SWEEPS):
        root = np.sqrt(precision)
        factor = np.linalg.cholesky(np.eye(count) + root[:, None] * covariance * root)
        half = np.linalg.solve(factor, root[:, None] * covariance)
        posterior = covariance - half.T @ half
        variance, mean = np.diag(posterior), posterior @ shift
        cavity = 1 / variance - precision
        pull = mean / variance - shift
        log_mass, first, second = _moments(pull / cavity, 1 / cavity, label)
        evidence = (
            log_mass.sum()
            + 0.5 * np.log1p(precision / cavity).sum()
            - np.log(np.diag(factor)).sum()
            + 0.5 * shift @ (posterior @ shift - shift / (cavity + precision))
            + 0.5 * (pull / (precision + cavity) * (precision * pull / cavity - 2 * shift)).sum()
        )
        if abs(evidence - before) < SETTLED:
            return float(evidence)
        before = evidence
        spread = np.maximum(second - first**2, 1e-12)
        precision += DAMPING * (np.maximum(1 / spread - cavity, 1e-12) - precision)
        shift += DAMPING * (first / spread - pull - shift)
    raise JarmError("The evidence of the labels does not settle: leave labels of 1/2 or copies of pairs out.")


def _moments(mean: np.ndarray, variance: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log mass, mean and mean square of the product of a Gaussian and a label's likelihood, by quadrature, `[L]`."""
    at = mean[:, None] + np.sqrt(variance)[:, None] * NODES
    log_likelihood = -label[:, None] * np.logaddexp(0, -at) - (1 - label)[:, None] * np.logaddexp(0, at)
    mass = NODE_WEIGHTS * np.exp(log_likelihood)
    total = mass.sum(axis=1)
    return np.log(total), (mass * at).sum(axis=1) / total, (mass * at**2).sum(axis=1) / total


def teacher_weights(space: TeacherSpace, teachers: Sequence[Teacher], labels: Pairs | None) -> np.ndarray:
    """Probability of each teacher, given labels: equal without any."""
    if labels is None:
        return np.full(len(teachers), 1 / len(teachers))
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
