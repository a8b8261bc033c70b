"""What a run reads: a training table on the device, gold rewards in units of the annotator's scale."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.base import HParams
from jarm.core.pytree import record
from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable
from jarm.core.types import Array, Bool, Float
from jarm.evaluation.annotators import AnnotatorConfig, reward_scale, solve_noise
from jarm.loop.config import LoopConfig


@record
class DeviceTable:
    """A training table on the device, as `run` reads it.

    Attributes:
      embeddings: `[P, R, d]` float32.
      mask: `[P, R]` bool.
      gold: `[P, R]` gold rewards divided by the annotator's scale; NaN where people will answer.
      lengths: `[P, R]` response lengths in standard deviations; zeros where unknown.
      spread: mean squared distance of the embeddings of two random responses: the unit of batch diversity.
    """

    embeddings: Float[Array, "P R d"]
    mask: Bool[Array, "P R"]
    gold: Float[Array, "P R"]
    lengths: Float[Array, "P R"]
    spread: Float[Array, ""]


def check_table(table: ResponseTable, annotator: AnnotatorConfig) -> None:
    """Refuse a table that `make_device_table` cannot put on the device.

    Raises:
      JarmError: gold rewards are not finite; or the annotator's length bias needs lengths that the table lacks.
    """
    if table.gold is not None and not np.isfinite(table.gold[table.mask]).all():
        raise JarmError("Gold rewards of the table are NaN or infinite: give every response a finite one, or none.")
    if annotator.length_bias and "length" not in table.attributes:
        raise JarmError("The table knows no response lengths, so there can be no length bias: leave it at 0.")


def make_device_table(table: ResponseTable, annotator: AnnotatorConfig) -> tuple[DeviceTable, float]:
    """Put a training table on the device.

    Args:
      table: with gold rewards, unless people will answer.
      annotator: whose scale gold rewards are divided by.

    Returns:
      The device table, and the scale.

    Raises:
      JarmError: as `check_table`.
    """
    check_table(table, annotator)
    embeddings = table.embeddings()
    gold = np.full(table.mask.shape, np.nan, np.float32)
    scale = 1.0
    if table.gold is not None:
        scale = reward_scale(annotator, table.gold, table.mask)
        gold = np.where(table.mask, table.gold / scale, 0).astype(np.float32)
    lengths = np.zeros(table.mask.shape, np.float32)
    if "length" in table.attributes:
        length = np.asarray(table.attributes["length"], np.float64)
        deviation = np.std(length[table.mask])
        lengths = np.where(table.mask, (length - length[table.mask].mean()) / (deviation or 1), 0).astype(np.float32)
    # E |a - b|^2 of two random responses is twice the total variance. A prompt at a time: float64 copies are large.
    prompts, count = list(zip(embeddings, table.mask, strict=True)), table.mask.sum()
    mean = sum(e[real].sum(axis=0, dtype=np.float64) for e, real in prompts) / count
    spread = 2 * sum(np.square(e[real] - mean).sum() for e, real in prompts) / count
    device_table = DeviceTable(
        embeddings=jnp.asarray(embeddings),
        mask=jnp.asarray(table.mask),
        gold=jnp.asarray(gold),
        lengths=jnp.asarray(lengths),
        spread=jnp.float32(spread or 1),
    )
    return device_table, scale


# What each hyperparameter may be; the noise may also be negative, for none.
_ANY_SIGN = ("noise",)


_SHARES = ("label_smoothing", "prior_mix", "epsilon")


def make_hparams(config: LoopConfig, table: ResponseTable, scale: float, hparams: HParams = HParams()) -> HParams:
    """HParams as float32 arrays, with the noise solved for where the annotator has a flip rate; -1 if it is perfect."""
    wanted = config.annotator.flip_rate
    if config.annotator.kind == "perfect":
        hparams = dataclasses.replace(hparams, noise=-1.0)
    if config.annotator.kind == "bradley_terry" and wanted is not None and table.gold is not None:
        noise = solve_noise(wanted, table.gold, table.mask, scale, pairs=config.pairs) if wanted > 0 else -1.0
        hparams = dataclasses.replace(hparams, noise=noise)
    for name in (field.name for field in dataclasses.fields(hparams)):
        values, least, most = (
            np.asarray(getattr(hparams, name)),
            -np.inf if name in _ANY_SIGN else 0,
            1 if name in _SHARES else np.inf,
        )
        if not (np.isfinite(values) & (values >= least) & (values <= most)).all():
            within = f" of at least {least}" * (least == 0) + f" and at most {most}" * (most == 1)
            raise JarmError(f"The hyperparameter `{name}` is {values}: give a finite number{within}.")
    return jax.tree.map(lambda number: jnp.asarray(number, jnp.float32), hparams)


def prepare(
    config: LoopConfig, table: ResponseTable, hparams: HParams = HParams()
) -> tuple[DeviceTable, HParams, float]:
    """What `run` reads, made for one configuration.

    Args:
      config: the shape of a run; its annotator says what gold rewards are divided by, and what noise means.
      table: training prompts, with gold rewards unless people will answer.
      hparams: numbers to start from.

    Returns:
      The device table, the hyperparameters as arrays, and the scale that gold rewards were divided by.

    Raises:
      JarmError: the table cannot meet the budget, lacks lengths for a length bias, or a number is out of its range.
    """
    check_budget(config, table)
    device_table, scale = make_device_table(table, config.annotator)
    return device_table, make_hparams(config, table, scale, hparams), scale


def check_budget(config: LoopConfig, table: ResponseTable) -> None:
    """Refuse a budget that the table cannot meet.

    Raises:
      JarmError: the space holds fewer pairs than the budget, or than a batch in the prompts drawn a round.
    """
    real = table.mask.sum(axis=1).astype(np.int64)
    if config.prompts is not None and config.prompts > len(real):
        raise JarmError(f"{config.prompts} prompts a round are more than the {len(real)} of the table: draw fewer.")

    def pairs_in(counts: np.ndarray) -> int:
        within = int((counts * (counts - 1) // 2).sum())
        total = int(counts.sum())
        every = total * (total - 1) // 2
        return {"within": within, "cross": every - within, "all": every}[config.pairs]

    held = pairs_in(real)
    if held < config.budget:
        raise JarmError(
            f"The table holds {held} pairs {_WHERE[config.pairs]}, fewer than the {config.budget} labels of "
            f"{config.initial} + {config.rounds} x {config.batch}: label fewer, or widen the space (`--pairs all`)."
        )
    if config.prompts is not None and pairs_in(np.sort(real)[: config.prompts]) < config.batch:
        raise JarmError(
            f"{config.prompts} prompts a round may hold fewer pairs {_WHERE[config.pairs]} than a batch of "
            f"{config.batch}: draw more prompts, or label fewer."
        )


_WHERE = {"within": "within prompts", "cross": "across prompts", "all": "of responses"}
