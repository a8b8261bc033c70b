"""Teachers: gold rewards drawn for embeddings that have none, from a family of Gaussian processes over responses.

A teacher's rewards are `sqrt(1 - u) f + sqrt(u) e + tau o`: f what embeddings can tell of the order within a prompt, e
what they cannot, drawn for each response, and o an offset of each prompt. f has mean variance 1 within prompts, and so
has e but for the mean of its prompt; a share of f may be log length. An annotator answers with
P = sigmoid(beta x difference of rewards / sqrt(1 + tau^2)), their standard deviation over all draws.

That deviation is the expected one, not that of each draw, which `jarm compare` divides its gold rewards by: margins are
then Gaussian, and evidence (`jarm.studies.weighing`) is the probability of labels under the very draws of a forecast.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import NamedTuple

import numpy as np

from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable, TrainTest
from jarm.core.within import MAX_WIDTH, centred
from jarm.data.metric import Within, within_metric

WAVES = 512
"""Random Fourier features of a nonlinear teacher."""
SHAPES = ("linear:1", "linear:2", "linear:3", "linear:6", "rbf:1")
LENGTHS = (0.0, 0.5)
UNLEARNABLE = (0.25, 0.5, 0.75)
OFFSETS = (0.0, 1.0)
NOISES = (0.5, 1.0, 2.0, 4.0)


class Teacher(NamedTuple):
    """One cell of the family.

    Attributes:
      shape: the Gaussian process of f: `linear:ALPHA`, linear in the metric `within:ALPHA`, with fewer effective
        dimensions the larger ALPHA; or `rbf:SCALE`, a squared exponential kernel of the embeddings in the metric
        `within:1`, of a length scale in root mean squared distances of two responses.
      length: share of the variance of f that is linear in log length.
      unlearnable: u, share of the variance within prompts that no embedding tells.
      offsets: tau, standard deviation of prompts' offsets where that of rewards within prompts is 1.
      noise: beta of the annotator.
    """

    shape: str
    length: float = 0.0
    unlearnable: float = 0.5
    offsets: float = 1.0
    noise: float = 2.0

    @property
    def variance(self) -> float:
        """Variance of all rewards, within and between prompts."""
        return 1 + self.offsets**2


def family(*, length: bool) -> tuple[Teacher, ...]:
    """The teachers of a forecast: every combination of the levels here, of log length only where it is known.

    Example:
      >>> len(family(length=True)), len(family(length=False))
      (240, 120)
    """
    levels = SHAPES, LENGTHS if length else (0.0,), UNLEARNABLE, OFFSETS, NOISES
    return tuple(Teacher(*each) for each in itertools.product(*levels))


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherSpace:
    """What teachers are functions of: features of the N responses, those of training prompts first.

    Attributes:
      tables: the tables, for their shapes and masks.
      embeddings: `[N, d]` float32 in the metric `within:1`.
      length: `[N]` log length less its mean in the prompt, of mean square 1 over training responses; None where lengths
        are not known or equal.
      seed: of the random features.
    """

    tables: TrainTest
    embeddings: np.ndarray
    length: np.ndarray | None
    seed: int = 0

    @functools.cached_property
    def prompt(self) -> np.ndarray:
        """`[N]` the prompt of each response, test prompts after training prompts."""
        counts = [table.mask.shape for table in self.tables]
        return np.repeat(np.arange(counts[0][0] + counts[1][0]), [r for p, r in counts for _ in range(p)])

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """`[N]` whether the response exists."""
        return np.concatenate([table.mask.reshape(-1) for table in self.tables])

    @functools.cached_property
    def _linear(self) -> np.ndarray:
        return self.centred(self.embeddings)

    @functools.cached_property
    def _waves(self) -> dict[float, np.ndarray]:
        return {}

    def _wave(self, scale: float) -> np.ndarray:
        """Random Fourier features of a length scale, made once."""
        if scale in self._waves:
            return self._waves[scale]
        rng, width = np.random.default_rng(self.seed), self.embeddings.shape[1]
        train = self.embeddings[: self.tables.train.mask.size][self.tables.train.mask.reshape(-1)]
        distance = np.sqrt(2 * train.var(axis=0, dtype=np.float64).sum())
        frequencies = rng.standard_normal((width, WAVES)) / (scale * distance)
        phases = rng.uniform(0, 2 * np.pi, WAVES)
        turned = self.embeddings @ frequencies.astype(np.float32) + phases.astype(np.float32)
        return self._waves.setdefault(scale, self.centred(np.cos(turned)))

    def centred(self, values: np.ndarray) -> np.ndarray:
        """Values `[N, k]` less the mean of their prompt, of mean squared length 1 over training responses."""
        grids, rows = list[np.ndarray](), np.where(self.mask[:, None], values, 0)
        for table in self.tables:
            own, rows = rows[: table.mask.size], rows[table.mask.size :]
            grids.append(centred(own.reshape(*table.mask.shape, -1), table.mask).reshape(own.shape))
        values = np.concatenate(grids)
        count = self.tables.train.mask.sum()
        size = np.square(values[: self.tables.train.mask.size]).sum() / count
        return (values / np.sqrt(size)).astype(np.float32) if size > 0 else values.astype(np.float32)

    def features(self, shape: str) -> tuple[np.ndarray, np.ndarray]:
        """Features `[N, F]` float32 and their scales `[F]`: a teacher's f is (features * scales) @ w, w ~ N(0, I)."""
        kind, _, number = shape.partition(":")
        if kind == "rbf":
            return self._wave(float(number)), np.ones(WAVES, np.float32)
        variances = np.square(self._linear[: self.tables.train.mask.size], dtype=np.float64).mean(axis=0)
        scales = (variances / variances.max()) ** ((float(number) - 1) / 2)
        return self._linear, (scales / np.sqrt((variances * scales**2).sum() / variances.sum())).astype(np.float32)

    def dimension(self, shape: str) -> float:
        """Effective dimension of a shape: the participation ratio (tr C)^2 / tr C^2 of its features within prompts."""
        features, scales = self.features(shape)
        train = features[: self.tables.train.mask.size] * scales
        covariance = (train.T @ train).astype(np.float64)
        return float(np.trace(covariance) ** 2 / np.square(covariance).sum())


def teacher_space(tables: TrainTest, seed: int = 0) -> TeacherSpace:
    """The features of teachers for some tables, before any metric; gold rewards are not read.

    Args:
      tables: standardised or not.
      seed: of the random features.

    Raises:
      JarmError: embeddings are too wide, or differ within no prompt.

    Example:
      >>> from jarm.data.synthetic import synthetic
      >>> space = teacher_space(synthetic(seed=0))
      >>> [round(space.dimension(shape)) for shape in ("linear:1", "linear:6")]
      [10, 1]
    """
    if (width := tables.train.shape[2]) > MAX_WIDTH:
        raise JarmError(
            f"Teachers are made of embeddings of up to {MAX_WIDTH:,} dimensions, and these have {width:,}: project "
            "them to fewer first."
        )
    mapped = within_metric(tables, Within(1.0))
    embeddings = np.concatenate([table.embeddings().reshape(-1, table.shape[2]) for table in mapped])
    space = TeacherSpace(tables, embeddings, None, seed)
    if not all("length" in table.attributes for table in tables):
        return space
    lengths = np.concatenate([np.log1p(_column(table, "length")) for table in tables])
    length = space.centred(lengths[:, None])[:, 0]
    return dataclasses.replace(space, length=length) if length.any() else space


def _column(table: ResponseTable, name: str) -> np.ndarray:
    return np.asarray(table.attributes[name], np.float64).reshape(-1)


def draw_gold(space: TeacherSpace, teacher: Teacher, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Gold rewards of a teacher for all responses, in standard deviations over all draws: `sqrt(teacher.variance)`.

    Args:
      space: the responses.
      teacher: the cell of the family.
      rng: chance of the draw.

    Returns:
      `[P, R]` of the training prompts, and `[P, R]` of the test prompts; float32, 0 where no response exists.

    Example:
      >>> from jarm.data.synthetic import synthetic
      >>> space = teacher_space(synthetic(seed=0))
      >>> train, test = draw_gold(space, Teacher("linear:3"), np.random.default_rng(0))
      >>> train.shape, test.shape, round(float(train.std()), 2)
      ((200, 10), (100, 20), 1.03)
    """
    features, scales = space.features(teacher.shape)
    size, share = len(features), teacher.length if space.length is not None else 0.0
    weights = rng.standard_normal(len(scales), np.float32) * scales
    told = np.sqrt(1 - share) * (features @ weights).astype(np.float64)
    if share:
        told += np.sqrt(share) * rng.standard_normal() * np.asarray(space.length)
    rest = np.sqrt(teacher.unlearnable) * rng.standard_normal(size)
    offsets = teacher.offsets * rng.standard_normal(space.prompt[-1] + 1)[space.prompt]
    gold = np.where(space.mask, np.sqrt(1 - teacher.unlearnable) * told + rest + offsets, 0)
    gold = (gold / np.sqrt(teacher.variance)).astype(np.float32)
    train, test = (table.mask for table in space.tables)
    return gold[: train.size].reshape(train.shape), gold[train.size :].reshape(test.shape)


def pair_covariance(space: TeacherSpace, teacher: Teacher, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Covariance `[L, L]` float64 of the differences of rewards of L pairs, in the unit of `draw_gold`.

    Args:
      space: the responses.
      teacher: the cell of the family.
      first, second: `[L]` responses, as indices into N.
    """
    features, scales = space.features(teacher.shape)
    share = teacher.length if space.length is not None else 0.0
    x = (features[first] - features[second]).astype(np.float64) * scales
    told = (1 - share) * x @ x.T
    if share and space.length is not None:
        longer = (space.length[first] - space.length[second]).astype(np.float64)
        told += share * np.outer(longer, longer)
    rest = teacher.unlearnable * _shared(first, second)
    offsets = teacher.offsets**2 * _shared(space.prompt[first], space.prompt[second])
    return np.asarray(((1 - teacher.unlearnable) * told + rest + offsets) / teacher.variance)


def _shared(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Covariance of differences of values of variance 1 that are drawn apart for each number."""

    def equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a[:, None] == b[None, :]).astype(np.float64)

    return equal(first, first) - equal(first, second) - equal(second, first) + equal(second, second)
