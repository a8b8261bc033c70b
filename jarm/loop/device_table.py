"""What `run` reads, from a table on the host: `check_run` touches no device, then comes `make_device_table`."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.base import HParams
from jarm.core.columns import SPACES, halves, refuse_ties
from jarm.core.pytree import record
from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable, check_embeddings
from jarm.core.types import Array, Bool, Float, Int
from jarm.evaluation.annotators import reward_scale, solve_noise
from jarm.loop.config import LoopConfig
from jarm.loop.recorded import RecordedPairs


@record
class DeviceTable:
    """A training table on the device, as `run` reads it.

    Attributes:
      embeddings: `[P, R, d]` float32.
      mask: `[P, R]` bool.
      gold: `[P, R]` gold rewards divided by their reward scale; NaN where the table has none.
      lengths: `[P, R]` response lengths in standard deviations; zeros where unknown.
      spread: mean squared distance of the embeddings of two random responses: the unit of batch diversity.
      spread_within: mean squared distance of the embedding of a response from the mean of its prompt: the unit of
        `HParams.prior_variance`.
      answers: `[P, R]` the column that the annotator answers by, divided by its reward scale; None for gold.
      gold_rest, answers_rest: `[P, R]` what float32 leaves out of `gold` and `answers` (`core.columns.halves`), so that
        scores of which float32 makes ties still differ; None counts as zeros.
      alike: `[P, R]` int32, the same number for responses with equal embeddings, which are never paired; None where all
        embeddings differ.
      recorded: the pairs that may be asked about, and their labels; None where the annotator answers all pairs.
    """

    embeddings: Float[Array, "P R d"]
    mask: Bool[Array, "P R"]
    gold: Float[Array, "P R"]
    lengths: Float[Array, "P R"]
    spread: Float[Array, ""]
    spread_within: Float[Array, ""]
    answers: Float[Array, "P R"] | None = None
    gold_rest: Float[Array, "P R"] | None = None
    answers_rest: Float[Array, "P R"] | None = None
    alike: Int[Array, "P R"] | None = None
    recorded: RecordedPairs | None = None

    @property
    def exact_gold(self) -> Float[Array, "N"] | Float[Array, "N 2"]:
        """Gold rewards with one row per response, as `annotate` takes them."""
        return _joined(self.gold, self.gold_rest)

    @property
    def exact_answers(self) -> Float[Array, "N"] | Float[Array, "N 2"] | None:
        """The same of the column that the annotator answers by, if it is not gold."""
        return None if self.answers is None else _joined(self.answers, self.answers_rest)

    @property
    def flat(self) -> Float[Array, "N d"]:
        """Embeddings with one row per response, `[N, d]`."""
        return self.embeddings.reshape(-1, self.embeddings.shape[2])


def _joined(near: Array, rest: Array | None) -> Array:
    return near.reshape(-1) if rest is None else jnp.stack([near.reshape(-1), rest.reshape(-1)], axis=1)


def check_run(config: LoopConfig, table: ResponseTable, hparams: HParams = HParams()) -> tuple[float, HParams]:
    """Refuse a run that cannot be made, before a device is touched.

    Args:
      config: the shape of the run.
      table: training prompts, with gold rewards unless people will answer.
      hparams: numbers to start from.

    Returns:
      The scale, by which the column that the annotator answers by is divided; and the hyperparameters as float32 on the
      host, with the noise solved for where the annotator has a flip rate, and -1 for a perfect annotator.

    Raises:
      JarmError: the table has too few pairs for the budget, no spread within prompts for a prior, values that
        are not finite, or no lengths for a length bias; it lacks the column that the annotator answers by; a number is
        out of its range; or no noise gives the flip rate.
    """
    _check_budget(config, table)
    if config.head.laplace or config.first != "random":
        needs = "a laplace head" if config.head.laplace else f"a first batch by {config.first}"
        if not count_pairs(table, "within").offered:
            raise JarmError(
                "No prompt has two responses with different embeddings, and the spread within prompts is the unit of "
                f"the prior of {needs}: give prompts several responses, or take what needs none (`--head mlp --first "
                "random`)."
            )
    if table.gold is not None and not np.isfinite(table.gold[table.mask]).all():
        raise JarmError("Gold rewards of the table are NaN or infinite: give every response a finite one, or none.")
    if config.annotator.length_bias and "length" not in table.attributes:
        raise JarmError("The table has no response lengths, which a length bias needs: leave the bias at 0.")
    answers, column = table.gold, config.annotator.column
    if column != "gold":
        answers = table.column(column)
        if not np.isfinite(answers[table.mask]).all():
            raise JarmError(f"Values of {column!r} are NaN or infinite: give every response a finite one.")
    scale = 1.0
    if answers is not None:
        scale = reward_scale(config.annotator, answers, table.mask)
        refuse_ties(answers, table.mask, config.pairs, column)
    return scale, _check_hparams(_with_noise(config, answers, table.mask, scale, hparams))


def make_device_table(
    table: ResponseTable, scale: float, column: str = "gold", gold_scale: str | float = "std"
) -> DeviceTable:
    """Put a training table on the device.

    Args:
      table: training prompts that `check_run` has let pass.
      scale: divisor of the column that the annotator answers by, as `check_run` returns it.
      column: name of this column.
      gold_scale: `AnnotatorConfig.scale`, for the divisor of gold where the annotator answers by another column.

    Raises:
      JarmError: an embedding is NaN, infinite or too large.
    """

    def scaled(values: np.ndarray, unit: float) -> tuple[Array, Array]:
        near, rest = halves(np.where(table.mask, np.asarray(values, np.float64) / unit, 0))
        return jnp.asarray(near), jnp.asarray(rest)

    embeddings = table.embeddings()
    gold: tuple[Array, Array | None] = jnp.full(table.mask.shape, jnp.nan, jnp.float32), None
    if table.gold is not None:
        unit = scale
        if column != "gold":  # equal gold rewards, which have no scale, stop nobody who answers by another column
            values = np.asarray(table.gold[table.mask], np.float64)
            spread = np.std(values) if np.ptp(values) else 1.0
            unit = float(spread if isinstance(gold_scale, str) else gold_scale)
        gold = scaled(table.gold, unit)
    answers = (None, None) if column == "gold" else scaled(table.column(column), scale)
    lengths = np.zeros(table.mask.shape, np.float32)
    if "length" in table.attributes:
        length = np.asarray(table.attributes["length"], np.float64)
        deviation = np.std(length[table.mask])
        lengths = np.where(table.mask, (length - length[table.mask].mean()) / (deviation or 1), 0).astype(np.float32)
    check_embeddings(embeddings, table.mask)
    # E |a - b|^2 of two random responses is twice the total variance. One prompt at a time: float64 copies are large.
    prompts, count = list(zip(embeddings, table.mask, strict=True)), table.mask.sum()
    mean = sum(e[real].sum(axis=0, dtype=np.float64) for e, real in prompts) / count
    spread = 2 * sum(np.square(e[real] - mean).sum() for e, real in prompts) / count
    # A prompt of one response has no difference, and is no part of the mean.
    several = [(e[real], real.sum()) for e, real in prompts if real.sum() > 1]
    differing = sum(size for _, size in several)
    within = sum(np.square(rows - rows.mean(axis=0, dtype=np.float64)).sum() for rows, _ in several)
    within /= max(differing, 1)
    return DeviceTable(
        embeddings=jnp.asarray(embeddings),
        mask=jnp.asarray(table.mask),
        gold=gold[0],
        lengths=jnp.asarray(lengths),
        spread=jnp.float32(spread),
        spread_within=jnp.float32(within),
        answers=answers[0],
        gold_rest=gold[1],
        answers_rest=answers[1],
        alike=None if table.alike is None else jnp.asarray(table.alike),
    )


def prepare(
    config: LoopConfig, table: ResponseTable, hparams: HParams = HParams()
) -> tuple[DeviceTable, HParams, float]:
    """Put on the device what `run` reads: `check_run`, then `make_device_table`.

    Args:
      config: the shape of a run; its annotator decides the scale of gold rewards and the noise.
      table: training prompts, `P x R` responses, with gold rewards unless people will answer.
      hparams: numbers to start from.

    Returns:
      The device table; the hyperparameters as float32 arrays; and the scale, by which the column that the annotator
      answers by (gold, by default) was divided, in units of that column.

    Raises:
      JarmError: as `check_run` and `make_device_table`.

    Example:
      >>> import jarm
      >>> config = jarm.LoopConfig(annotator=jarm.AnnotatorConfig(flip_rate=0.25))
      >>> train, test = jarm.synthetic(seed=0)
      >>> device_table, hparams, scale = jarm.prepare(config, train)
      >>> device_table.embeddings.shape  # prompts, responses per prompt, embedding width
      (200, 10, 32)
      >>> print(f"{hparams.noise:.2f}, {scale:.2f}")  # beta at which random pairs get 25 % wrong answers; units of gold
      1.70, 1.31
    """
    scale, hparams = check_run(config, table, hparams)
    device_table = make_device_table(table, scale, config.annotator.column, config.annotator.scale)
    return device_table, jax.tree.map(jnp.asarray, hparams), scale


class PairCounts(NamedTuple):
    """Pairs of a table: those on offer, and those left out because their responses have equal embeddings."""

    offered: int
    copies: int


def count_pairs(table: ResponseTable, kind: str, prompts: int | None = None) -> PairCounts:
    """Number of pairs of a kind.

    Args:
      table: the responses.
      kind: `within`, `cross` or `all`.
      prompts: count in so many prompts only, those that hold the fewest; copies count for `within` only.
    """
    real = table.mask.sum(axis=1).astype(np.int64)
    copies, every_copy = table.copies
    if prompts is not None and kind != "within":
        real, copies, every_copy = np.sort(real)[:prompts], np.zeros(prompts, np.int64), 0
    within = int(np.sort(real * (real - 1) // 2 - copies)[:prompts].sum())
    responses, copies_within = int(real.sum()), int(copies.sum())
    every = responses * (responses - 1) // 2 - every_copy
    return {
        "within": PairCounts(within, copies_within),
        "cross": PairCounts(every - within, every_copy - copies_within),
        "all": PairCounts(every, every_copy),
    }[kind]


def _check_budget(config: LoopConfig, table: ResponseTable) -> None:
    """Refuse a budget that the table cannot meet, or prompts per round that may not fill a batch."""
    if config.prompts is not None and config.prompts > len(table.mask):
        raise JarmError(
            f"{config.prompts} prompts per round are more than the {len(table.mask)} of the table: draw fewer."
        )
    count, copies = count_pairs(table, config.pairs)
    if copies and not count:
        raise JarmError(
            f"The embeddings are equal in every pair {SPACES[config.pairs]}, so no head can tell responses apart: "
            "embed the prompt and its response together, and check that texts differ before they are cut."
        )
    if count < config.budget:
        left_out = f" ({copies:,} more are of responses with equal embeddings)" if copies else ""
        raise JarmError(
            f"The table holds {count} pairs {SPACES[config.pairs]}{left_out}, fewer than the {config.budget} labels of "
            f"{config.initial} + {config.rounds} x {config.batch}: label fewer, or widen the space (`--pairs all`)."
        )
    chosen = {"batch": config.batch} | ({} if config.first == "random" else {"first batch": config.initial})
    largest = max(chosen.values())
    if config.prompts is not None and count_pairs(table, config.pairs, config.prompts).offered < largest:
        raise JarmError(
            f"{config.prompts} prompts per round may hold fewer pairs {SPACES[config.pairs]} than a batch of "
            f"{largest}: draw more prompts, or label fewer."
        )
    if config.per_prompt is None:
        return
    room, at_most = _room(config, table, config.per_prompt), f"{config.per_prompt} per prompt"
    for name, size in chosen.items():
        if room < size:
            raise JarmError(
                f"At most {at_most} are {room} pairs {SPACES[config.pairs]}, fewer than the {name} of {size}: raise "
                "the limit (`--per-prompt`), or label fewer at a time."
            )


def limit_per_prompt(config: LoopConfig, table: ResponseTable, recorded: np.ndarray | None = None) -> int | None:
    """1, the limit of pairs per prompt of a greedy batch, where every batch of a run can be filled under it, else None.

    Earlier labels may use up prompts within which pairs lie, those of the fewest pairs first.

    Example:
      >>> import jarm
      >>> train, test = jarm.synthetic(seed=0)
      >>> limit_per_prompt(jarm.LoopConfig(), train), limit_per_prompt(jarm.LoopConfig(batch=200), train)
      (1, None)

    Args:
      config: the shape of a run.
      table: the training table.
      recorded: `[P]` number of recorded pairs of each prompt, where no others are on offer.
    """
    taken, real = 1 if config.pairs == "within" else 2, table.mask.sum(axis=1)
    # Pairs of equal embeddings are never offered.
    pairs = real * (real - 1) // 2 - table.copies[0] if taken == 1 else real
    pairs = pairs if recorded is None else recorded
    pairs = np.sort(pairs[pairs > 0])
    prompts = len(pairs) if config.prompts is None else min(len(pairs), config.prompts)
    if taken == 1:
        earlier = config.initial + (config.rounds - 1) * config.batch
        prompts -= int((np.cumsum(pairs) <= earlier).sum())
    else:
        prompts -= config.initial
    needed = taken * config.batch
    few = config.candidates is not None and config.candidates < 20 * taken * needed
    return None if few or prompts < needed else 1


def _room(config: LoopConfig, table: ResponseTable, per_prompt: int) -> int:
    """A batch that a limit of pairs per prompt leaves room for, with the prompts that hold the fewest pairs."""
    real = np.sort(table.mask.sum(axis=1).astype(np.int64))[: config.prompts]
    if config.pairs == "within":
        return int(np.minimum(per_prompt, real * (real - 1) // 2).sum())
    return int(per_prompt * (real > 0).sum()) // 2


def _with_noise(
    config: LoopConfig, answers: np.ndarray | None, mask: np.ndarray, scale: float, hparams: HParams
) -> HParams:
    """The noise that the annotator's flip rate asks for; -1 is none."""
    kind, rate, noise = config.annotator.kind, config.annotator.flip_rate, hparams.noise
    if kind == "perfect":
        noise = -1.0
    elif kind == "bradley_terry" and rate is not None and answers is not None:
        column = config.annotator.column
        noise = solve_noise(rate, answers, mask, scale, pairs=config.pairs, column=column) if rate else -1.0
    return dataclasses.replace(hparams, noise=noise)


def _check_hparams(hparams: HParams) -> HParams:
    """The same as float32 arrays of the host; refused where a number is not finite or out of its range."""
    numbers: dict[str, Any] = {
        field.name: np.asarray(getattr(hparams, field.name)) for field in dataclasses.fields(hparams)
    }
    on_host = HParams(**numbers)
    return jax.tree.map(lambda number: np.asarray(number, np.float32), on_host)
