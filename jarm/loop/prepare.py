"""What a run reads, made of a table for one configuration; what cannot work is refused here, before anything runs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.base import HParams, JarmError, ResponseTable
from jarm.evaluation.annotators import solve_noise
from jarm.loop.device_table import Pool, make_pool
from jarm.loop.loop import LoopConfig

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


def prepare(config: LoopConfig, table: ResponseTable, hparams: HParams = HParams()) -> tuple[Pool, HParams, float]:
    """What `run` reads, made for one configuration.

    Args:
      config: the shape of a run; its annotator says what gold rewards are divided by, and what noise means.
      table: training prompts, with gold rewards unless people will answer.
      hparams: numbers to start from.

    Returns:
      The pool, the hyperparameters as arrays, and the scale that gold rewards were divided by.

    Raises:
      JarmError: the table cannot meet the budget, lacks lengths for a length bias, or a number is out of its range.
    """
    check_budget(config, table)
    pool, scale = make_pool(table, config.annotator)
    return pool, make_hparams(config, table, scale, hparams), scale


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
            f"{config.initial} + {config.rounds} x {config.batch}: buy fewer, or widen the space (`--pairs all`)."
        )
    if config.prompts is not None and pairs_in(np.sort(real)[: config.prompts]) < config.batch:
        raise JarmError(
            f"{config.prompts} prompts a round may hold fewer pairs {_WHERE[config.pairs]} than a batch of "
            f"{config.batch}: draw more prompts, or buy fewer."
        )


_WHERE = {"within": "within prompts", "cross": "across prompts", "all": "of responses"}
