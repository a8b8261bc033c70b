"""Simulated campaigns: runs of the loop on gold rewards that were drawn, as learning curves and nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import HParams
from jarm.core.types import Array, Bool, Float, Int, PRNGKey
from jarm.evaluation.ranking import spearman
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import DeviceTable
from jarm.loop.loop import make_loop


class Drawn(NamedTuple):
    """Some draws of gold rewards, and the annotator of each.

    Attributes:
      key: `[D]` keys: first labels, candidates and opinions of the annotator.
      noise: `[D]` beta.
      train: `[D, P, R]` gold rewards of training responses, in standard deviations.
      test: `[D, P, R]` gold rewards of test responses, in any unit.
    """

    key: PRNGKey
    noise: Float[Array, "D"]
    train: Float[Array, "D P R"]
    test: Float[Array, "D P R"]


class Curves(NamedTuple):
    """Learning curves of one rule on some draws.

    Attributes:
      spearman: `[D, T + 1]` mean within-prompt Spearman with the drawn gold rewards of test prompts.
      status: `[D]` int32, worst `Status` of the run.
    """

    spearman: Float[Array, "D T"]
    status: Int[Array, "D"]


class HeldOut(NamedTuple):
    """Test responses on the device: `embeddings [P, R, d]` and `mask [P, R]`."""

    embeddings: Float[Array, "P R d"]
    mask: Bool[Array, "P R"]


@functools.lru_cache(maxsize=8)
def make_campaigns(config: LoopConfig) -> Callable[[HParams, DeviceTable, HeldOut, Drawn, Int[Array, ""]], Curves]:
    """A compiled function that makes one run for each draw, one after the other; the same for equal configurations.

    Args:
      config: the loop.

    Returns:
      `(hparams, table, test, drawn, rule) -> curves`: `rule` is an index into `config.rules`; gold rewards of `table`
      and the noise of `hparams` are not read. One program for all teachers, noises and rules.
    """
    run, head = make_loop(config).run, config.head.head()

    @jax.jit
    def campaigns(hparams: HParams, table: DeviceTable, test: HeldOut, drawn: Drawn, rule: Int[Array, ""]) -> Curves:
        flat = test.embeddings.reshape(-1, test.embeddings.shape[2])

        def one(each: Drawn) -> Curves:
            own = dataclasses.replace(table, gold=each.train, gold_rest=None)
            _, records = run(each.key, dataclasses.replace(hparams, noise=each.noise), own, rule)

            def measured(members: Array) -> Float[Array, ""]:
                rewards = jax.vmap(head.rewards, in_axes=(0, None))(members, flat).mean(axis=0)
                return jnp.nanmean(jax.vmap(spearman)(rewards.reshape(test.mask.shape), each.test, test.mask))

            return Curves(jax.lax.map(measured, records.params), records.status.max())

        return jax.lax.map(one, drawn)

    return campaigns
