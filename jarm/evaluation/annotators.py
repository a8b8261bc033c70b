"""Simulated annotators: gold rewards in, labels out.

An annotator has a probability P(first preferred) for each pair, and answers 1 where a uniform number, fixed by the key
and the pair, falls below it. So one key is one annotator with one opinion of each pair, whichever rule asks
and whenever: runs of two rules can be compared in pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.checks import Check, check_fields, named
from jarm.core.columns import difference, words_for
from jarm.core.settings import as_key
from jarm.core.status import JarmError
from jarm.core.types import AnyKey, Array, Bool, Float, Int

KINDS = ("bradley_terry", "perfect", "flip")


def _flip_rate(_: str, rate: float) -> None:
    if not 0 <= rate < 0.5:
        raise JarmError(f"A flip rate of {rate} is not in [0, 0.5): at 0.5 an annotator is a coin.")


def _scale(_: str, scale: str | float) -> None:
    if isinstance(scale, str) and scale != "std":
        raise JarmError(f"A reward scale of {scale!r} is neither 'std' nor a positive number.")
    if not isinstance(scale, str) and scale <= 0:
        raise JarmError(f"A reward scale of {scale} is not a positive number: give one, or 'std'.")


ANNOTATOR_CHECKS: Mapping[str, Check] = {"kind": named("annotator", KINDS), "flip_rate": _flip_rate, "scale": _scale}
"""Field of `AnnotatorConfig` -> the check of its values."""


@dataclasses.dataclass(frozen=True)
class AnnotatorConfig:
    """A simulated annotator.

    Attributes:
      kind: `bradley_terry`: P = sigmoid(noise * (gold difference) / scale), where a negative noise is a perfect
        annotator, as in the published code; `perfect`: the response of larger gold; `flip`: the same, flipped with
        probability `flip_rate`.
      scale: `std` (standard deviation of all gold rewards) or a positive number.
      flip_rate: for `flip` the share of wrong answers; for `bradley_terry` the share of random pairs to answer wrongly,
        in [0, 0.5), against the column that the annotator answers by: the noise is solved for, and `HParams.noise` is
        ignored.
      length_bias: bias towards longer responses, in logits per standard deviation of length; without noise it is added
        to the gold difference, in units of the scale.
      column: column of the table that the annotator answers by: `gold`, or an attribute in its place. `scale` and
        `flip_rate` are of this column; whether a label is wrong (`label_error`) is decided by gold all the same.

    Example:
      >>> import jarm
      >>> jarm.AnnotatorConfig("flip", flip_rate=0.25)
      AnnotatorConfig(kind='flip', scale='std', flip_rate=0.25, length_bias=0.0, column='gold')
      >>> jarm.AnnotatorConfig("flip")
      Traceback (most recent call last):
      jarm.core.status.JarmError: The annotator 'flip' needs a share of wrong answers: give `flip_rate`, such as 0.25.
    """

    kind: str = "bradley_terry"
    scale: str | float = "std"
    flip_rate: float | None = None
    length_bias: float = 0.0
    column: str = "gold"

    def __post_init__(self) -> None:
        check_fields(self, ANNOTATOR_CHECKS, "AnnotatorConfig.{}")
        if self.kind == "flip" and self.flip_rate is None:
            raise JarmError("The annotator 'flip' needs a share of wrong answers: give `flip_rate`, such as 0.25.")
        if self.kind == "perfect" and self.flip_rate is not None:
            raise JarmError("The annotator 'perfect' is never wrong: leave `flip_rate` out, or choose 'flip'.")


class RewardScale(float):
    """A unit of reward differences that knows its column, so that `evaluate` cannot take it for the unit of another.

    Example:
      >>> scale = RewardScale(2.5, "length")
      >>> scale, scale.column
      (2.5, 'length')
    """

    column: str

    def __new__(cls, value: float, column: str = "gold") -> RewardScale:
        """A scale of a column."""
        scale = super().__new__(cls, value)
        scale.column = column
        return scale


def reward_scale(config: AnnotatorConfig, gold: np.ndarray, mask: np.ndarray) -> RewardScale:
    """The unit of gold differences: `config.scale`, or the standard deviation of all gold rewards.

    Args:
      config: the annotator.
      gold, mask: `[P, R]`, gold rewards or the column that the annotator answers by.

    Raises:
      JarmError: all of them are equal.
    """
    if not isinstance(config.scale, str):
        return RewardScale(config.scale, config.column)
    values = np.asarray(gold, np.float64)[mask]
    span = np.ptp(values)
    if span == 0:
        raise JarmError(f"All {words_for(config.column)} are equal: there is nothing to prefer; give another column.")
    # The square of a difference below 1e-162 is 0, and so would be the deviation.
    return RewardScale(np.std(values) if span > 1e-100 else span * np.std(values / span), config.column)


def solve_noise(
    flip_rate: float,
    gold: np.ndarray,
    mask: np.ndarray,
    scale: float,
    *,
    pairs: str = "within",
    draws: int = 20000,
    column: str = "gold",
) -> float:
    """The noise beta at which a Bradley-Terry annotator answers random pairs of a space wrongly at a given rate.

    The expected error, the mean of sigmoid(-beta |gold difference| / scale), falls with beta: bisection finds beta.

    Args:
      flip_rate: the wanted rate, in (0, 0.5).
      gold, mask: `[P, R]`, gold rewards or the column that the annotator answers by.
      scale: unit of gold differences.
      pairs: kind of the pair space.
      draws: random pairs that stand for all; gold ties are left out.
      column: name of the column, for errors.

    Returns:
      beta, within 1e-6 relative.

    Raises:
      JarmError: the rate is out of range, or the values are equal in every pair drawn.

    Example:
      >>> import jarm
      >>> train, test = jarm.synthetic(seed=0)
      >>> print(f"{solve_noise(0.25, train.gold, train.mask, scale=1.0):.2f}")
      1.30
    """
    if not 0 < flip_rate < 0.5:
        raise JarmError(f"A flip rate of {flip_rate} cannot be reached by any temperature: give one in (0, 0.5).")
    rng = np.random.default_rng(0)
    prompt, other = rng.integers(0, gold.shape[0], (2, draws))
    first, second = rng.integers(0, gold.shape[1], (2, draws))
    if pairs == "within":
        other = prompt
    real = mask[prompt, first] & mask[other, second]
    if pairs == "cross":
        real &= prompt != other
    gap = np.abs(gold[prompt, first].astype(np.float64) - gold[other, second].astype(np.float64))[real] / scale
    gap = gap[gap > 0]
    if gap.size == 0:
        raise JarmError(
            f"The {words_for(column)} are equal in every pair: there is nothing to prefer; give another column."
        )

    def error(beta: float) -> float:
        return float(np.mean(1 / (1 + np.exp(np.minimum(beta * gap, 700)))))

    low, high = 0.0, 1.0
    while error(high) > flip_rate and high < 1e12:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if error(middle) > flip_rate else (low, middle)
    return (low + high) / 2


def preference(
    config: AnnotatorConfig, noise: Float[Array, ""], gap: Float[Array, "*k"], longer: Float[Array, "*k"]
) -> Float[Array, "*k"]:
    """P(first preferred), elementwise.

    Args:
      config: the annotator.
      noise: beta; negative or infinite for an annotator without noise.
      gap: gold of the first minus gold of the second, in units of the scale.
      longer: length of the first minus length of the second, in standard deviations.
    """
    bias = config.length_bias * longer
    sure = (jnp.sign(gap + bias) + 1) / 2
    if config.kind == "perfect":
        return sure
    if config.kind == "flip":
        return sure + (config.flip_rate or 0) * (1 - 2 * sure)
    noisy = (noise >= 0) & jnp.isfinite(noise)
    return jnp.where(noisy, jax.nn.sigmoid(jnp.where(noisy, noise, 0) * gap + bias), sure)


def chances(
    config: AnnotatorConfig,
    noise: Float[Array, ""],
    pairs: Int[Array, "k 2"],
    gold: Float[Array, "N"] | Float[Array, "N 2"],
    lengths: Float[Array, "N"],
    answers: Float[Array, "N"] | Float[Array, "N 2"] | None = None,
) -> Float[Array, "k"]:
    """Labels without noise: the probability that the annotator prefers the first response of each pair.

    They are the mean of `annotate` over annotators, and the loss is linear in a label: a fit to them is a fit to pairs
    that very many annotators have answered.

    Args:
      config, noise, pairs, gold, lengths, answers: as for `annotate`.
    """
    first, second = pairs[:, 0], pairs[:, 1]
    gap = difference(gold if answers is None else answers, first, second)
    return preference(config, noise, gap, lengths[first] - lengths[second])


def annotate(
    key: AnyKey,
    config: AnnotatorConfig,
    noise: Float[Array, ""],
    pairs: Int[Array, "k 2"],
    gold: Float[Array, "N"] | Float[Array, "N 2"],
    lengths: Float[Array, "N"],
    answers: Float[Array, "N"] | Float[Array, "N 2"] | None = None,
) -> tuple[Float[Array, "k"], Bool[Array, "k"]]:
    """Answers to pairs: 1 where the first response is preferred, 0 where the second is.

    Args:
      key: the annotator; the same key gives the same answer to the same pair.
      config: its kind.
      noise: beta of a Bradley-Terry annotator.
      pairs: `[k, 2]` response indices.
      gold: `[N]` gold rewards, in units of the scale; or `[N, 2]`, their halves (`core.columns.halves`).
      lengths: `[N]` response lengths in standard deviations; read only with a length bias.
      answers: the column that the annotator answers by, in units of the scale, as gold; None for gold.

    Returns:
      Labels `[k]`, and `[k]` whether each is wrong: against the gold order, where a tie is a coin. Without gold rewards
      (NaN) no answer by another column is wrong.
    """
    key, first, second = as_key(key), pairs[:, 0], pairs[:, 1]

    def opinion(low: Array, high: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, low), high), dtype=jnp.float32)

    # The opinion belongs to the pair, not to its order: a mirrored pair gets the mirrored answer.
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    gap, longer = difference(gold, low, high), lengths[low] - lengths[high]
    own_gap = gap if answers is None else difference(answers, low, high)
    low_wins = jax.vmap(opinion)(low, high) < preference(config, noise, own_gap, longer)
    label = jnp.where(first == low, low_wins, ~low_wins)
    wrong = jnp.where(gap == 0, ~low_wins, low_wins != (gap > 0))
    if answers is not None:
        wrong &= ~jnp.isnan(gap)
    return label.astype(jnp.float32), wrong
