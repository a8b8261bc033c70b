"""Simulated campaigns: runs of the loop on gold rewards that were drawn, as learning curves and nothing else."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.base import HParams
from jarm.core.progress import Progress
from jarm.core.settings import make_key
from jarm.core.status import Status, check
from jarm.core.tables import TrainTest
from jarm.core.types import Array, Bool, Float, Int, Params
from jarm.data.teachers import Teacher, TeacherSpace, draw_gold
from jarm.evaluation.ranking import spearman
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import DeviceTable, check_run, make_device_table
from jarm.loop.loop import make_loop
from jarm.runs.programs import default_workers
from jarm.runs.runner import side_by_side

BLOCK = 8
"""Draws per call of a program."""


class Drawn(NamedTuple):
    """Some draws of gold rewards, and the annotator of each.

    Attributes:
      seed: `[D]` uint32, of the first labels, the candidates and the opinions of the annotator.
      noise: `[D]` beta.
      train: `[D, P, R]` gold rewards of training responses, in standard deviations.
      test: `[D, P, R]` gold rewards of test responses, in any unit.
    """

    seed: Int[Array, "D"]
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
            _, records = run(make_key(each.seed), dataclasses.replace(hparams, noise=each.noise), own, rule)

            def measured(members: Params) -> Float[Array, ""]:
                rewards = jax.vmap(head.rewards, in_axes=(0, None))(members, flat).mean(axis=0)
                return jnp.nanmean(jax.vmap(spearman)(rewards.reshape(test.mask.shape), each.test, test.mask))

            return Curves(jax.lax.map(measured, records.params), records.status.max())

        return jax.lax.map(one, drawn)

    return campaigns


def simulate(
    loops: Mapping[str, LoopConfig],
    hparams: HParams,
    tables: TrainTest,
    space: TeacherSpace,
    teachers: Sequence[Teacher],
    *,
    seed: int = 0,
    workers: int = 0,
) -> dict[str, np.ndarray]:
    """Learning curves of several ways to choose pairs, on a draw of gold rewards from each of some teachers.

    Args:
      loops: name of a way to choose the first pairs -> its loop; all have the same rules.
      hparams: numbers of the loops; the noise is the teachers'.
      tables: as the learner sees them; gold rewards are not read.
      space: the features of teachers, for the same tables.
      teachers: the teacher of each of D draws.
      seed: of the draws, the first labels, the candidates and the annotator; a draw is the same whatever draws follow.
      workers: calls at a time; 0 takes one per core on a CPU, else 1.

    Returns:
      FIRST+RULE -> `[D, T + 1]` mean within-prompt Spearman on the test prompts; NaN where a run failed.

    Raises:
      JarmError: the table is too small for the labels; or all runs failed.
    """
    train = dataclasses.replace(tables.train, gold=None)
    for loop in loops.values():
        scale, numbers = check_run(loop, train, hparams)
    table, numbers = make_device_table(train, scale), jax.tree.map(jnp.asarray, numbers)
    test = HeldOut(jnp.asarray(tables.test.embeddings()), jnp.asarray(tables.test.mask))
    arms = {
        f"{first}+{'random' if rule == 'then_random' else rule}": (loop, at)
        for first, loop in loops.items()
        for at, rule in enumerate(loop.rules)
    }

    def call(start: int) -> tuple[int, dict[str, Curves]]:
        drawn = draw_block(seed, space, teachers, start)
        made = {
            arm: make_campaigns(loop)(numbers, table, test, drawn, jnp.int32(rule))
            for arm, (loop, rule) in arms.items()
        }
        return start, jax.tree.map(np.asarray, made)

    starts = [(start,) for start in range(0, len(teachers), BLOCK)]
    # The first call alone, since it compiles.
    calls = itertools.chain(
        side_by_side(call, starts[:1], 1), side_by_side(call, starts[1:], workers or default_workers())
    )
    curves = {arm: np.full((len(teachers), loop.rounds + 1), np.nan) for arm, (loop, _) in arms.items()}
    failure = int(Status.OK)
    for start, made in _shown(calls, len(teachers), len(arms)):
        for arm, found in made.items():
            fine = np.where(found.status[:, None] == Status.OK, found.spearman, np.nan)
            curves[arm][start : start + BLOCK] = fine[: len(teachers) - start]
            failure = max(failure, int(found.status.max()))
    if all(np.isnan(each).all() for each in curves.values()):
        check(failure, "No simulated campaign ran to its end")
    return curves


def draw_block(seed: int, space: TeacherSpace, teachers: Sequence[Teacher], start: int) -> Drawn:
    """Draws `start` to `start + BLOCK`, each the same whatever block it is in; the last one stands for those beyond."""
    at = [min(each, len(teachers) - 1) for each in range(start, start + BLOCK)]
    chance = [np.random.default_rng([seed, each]) for each in at]
    gold = [draw_gold(space, teachers[each], rng) for each, rng in zip(at, chance, strict=True)]
    return Drawn(
        seed=jnp.asarray([rng.integers(1 << 32) for rng in chance], jnp.uint32),
        noise=jnp.asarray([teachers[each].noise for each in at], jnp.float32),
        train=jnp.asarray(np.stack([train for train, _ in gold])),
        test=jnp.asarray(np.stack([test for _, test in gold])),
    )


def _shown(made: Iterator[Any], draws: int, arms: int) -> Iterator[Any]:
    """The same with their progress."""
    total = draws * arms
    with Progress("forecast", total, f"{total:,} campaigns, compiling first") as progress:
        for each in made:
            yield each
            work = min(BLOCK * arms, total - progress.done)
            progress.update(work, f"{progress.done + work:,} of {total:,} campaigns")
