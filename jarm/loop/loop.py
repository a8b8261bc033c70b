"""The loop: ask which pairs to label, tell the labels, fit again. A whole run is one pure function.

A campaign with people calls `ask` and `tell`; `run` scans them against a simulated annotator and compiles once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from jarm.core.base import Fit, FitInfo, HParams, Selection
from jarm.core.types import Array
from jarm.loop import simulate, steps
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import DeviceTable
from jarm.loop.rules import find_rules
from jarm.loop.simulate import RunRecord
from jarm.loop.steps import LoopState, Parts
from jarm.reward.fit import make_fit


class Loop(NamedTuple):
    """The functions of one configuration. All are pure and may be jitted, vmapped and sharded.

    Attributes:
      init: `(key, table, hparams=None, rule=None) -> (state, selection)`: an empty state, and the pairs to label first,
        for which `hparams` are needed where they are chosen; those of the rule `random` are drawn all the same.
      fit: `(hparams, state, table) -> (state, info)`: fit the heads to the labelled pairs.
      select: `(hparams, state, table, rule=0) -> selection`: pick the next batch with the heads of the state.
      ask: `(hparams, state, table, rule=0) -> (state, selection)`: `fit`, then `select`.
      tell: `(state, selection, labels) -> state`: record the labels of a batch.
      run: `(key, hparams, table, rule=0) -> (state, records)`: every round, against the simulated annotator.

    `rule` is an index into the `rules` of the configuration, and may be traced.
    """

    init: Callable[..., tuple[LoopState, Selection]]
    fit: Callable[[HParams, LoopState, DeviceTable], tuple[LoopState, FitInfo]]
    select: Callable[..., Selection]
    ask: Callable[..., tuple[LoopState, Selection]]
    tell: Callable[[LoopState, Selection, Array], LoopState]
    run: Callable[..., tuple[LoopState, RunRecord]]


def make_loop(config: LoopConfig, fit: Fit | None = None) -> Loop:
    """Build the loop of a configuration: everything static is decided here.

    Args:
      config: the shape of a run.
      fit: fits K heads to the labelled pairs, with the signature of `make_fit(head, config.fit)`, which is the default;
        a fit of one's own may close over `ResponseTable.column(name)`, with which it weighs or changes labels.

    Returns:
      Its functions. Jit `run` once and call it with as many keys, hparams and rules as you like; or `vmap` it.

    Raises:
      JarmError: there is no such rule, or it needs an ensemble and there is one head.

    Example:
      >>> import jax, jarm
      >>> config = jarm.LoopConfig(
      ...     rules=("random", "greedy_dopt"), rounds=2, batch=5, initial=10,
      ...     head=jarm.HeadConfig(hidden=()), fit=jarm.FitConfig(members=1),
      ... )
      >>> train, test = jarm.synthetic(seed=0)
      >>> table, hparams, scale = jarm.prepare(config, train)
      >>> loop = jarm.make_loop(config)
      >>> # Shapes alone, in a second; `jax.jit(loop.run)(key, hparams, table, 1)` compiles and runs.
      >>> state, records = jax.eval_shape(loop.run, jax.random.key(0), hparams, table, rule=1)
      >>> records.selection.pairs.shape  # rounds + 1, pairs per batch, two responses
      (3, 5, 2)
      >>> records.params["out"]["kernel"].shape  # rounds + 1, members, embedding width, 1
      (3, 1, 32, 1)
      >>> state.labelled.first.shape  # 10 + 2 x 5 labels
      (20,)
    """
    rules, head = find_rules(config), config.head.head()
    parts = Parts(config, rules, head, make_fit(head, config.fit) if fit is None else fit)
    return Loop(
        init=functools.partial(steps.init, parts),
        fit=functools.partial(steps.fit, parts),
        select=functools.partial(steps.select, parts),
        ask=functools.partial(steps.ask, parts),
        tell=steps.tell,
        run=functools.partial(simulate.run, parts),
    )
