"""A whole run as one pure function: a scan of ask, annotate and tell that never touches the host."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import FitInfo, HParams, Selection
from jarm.core.columns import difference
from jarm.core.settings import as_key
from jarm.core.status import JarmError, Status, worst
from jarm.core.types import AnyKey, Array, Bool, Int, Params, PRNGKey
from jarm.evaluation.annotators import annotate, chances
from jarm.evaluation.batch import batch_report
from jarm.loop.device_table import DeviceTable
from jarm.loop.recorded import recorded_labels
from jarm.loop.steps import Choice, LoopState, Parts, choose, fit, init, tell


class RunRecord(NamedTuple):
    """One run, with a leading axis T + 1 over rounds: after the initial labels, and after each batch.

    Attributes:
      labels: `[T + 1]` labels so far.
      wrong: `[T + 1]` how many of them are wrong.
      params: the heads fitted to them, `[T + 1, K, ...]`.
      fit: the report of each fit.
      selection: the next batch; the last round selects nothing, so none of its pairs is valid.
      batch: diversity and informativeness of that batch.
      status: `[T + 1]` worst `Status` up to then.
      noise_free, noise_free_status: `[K, ...]` heads and scalar `Status` of the noise-free refit; None without one.
    """

    labels: Int[Array, "T"]
    wrong: Int[Array, "T"]
    params: Params
    fit: FitInfo
    selection: Selection
    batch: dict[str, Array]
    status: Int[Array, "T"]
    noise_free: Params = None
    noise_free_status: Int[Array, ""] | None = None


def run(
    parts: Parts, key: AnyKey, hparams: HParams, table: DeviceTable, rule: int | Array = 0
) -> tuple[LoopState, RunRecord]:
    """Every round of a loop, against the simulated annotator; and the noise-free refit, if the configuration has it.

    Args:
      parts: the static parts of the loop.
      key: one key is one set of first pairs, heads, candidates and opinions of the annotator.
      hparams: numbers of the experiment.
      table: the training table.
      rule: index into the rules of the configuration, may be traced.

    Returns:
      The last state, and the record of every round.

    Raises:
      JarmError: the annotator answers by a column that the table was not prepared for.
    """
    column = parts.config.annotator.column
    if (column != "gold") != (table.answers is not None):
        there = "gold" if table.answers is None else "another column than gold"
        raise JarmError(
            f"The annotator answers by {column!r}, and the table was prepared for {there}: prepare the table with the "
            "config of the loop."
        )
    key_loop, key_annotator = jax.random.split(as_key(key))
    rounds, refits = parts.config.rounds, parts.config.noise_free

    def answer(state: LoopState, selection: Selection) -> tuple[LoopState, Int[Array, ""]]:
        return _answer(parts, key_annotator, hparams, state, selection, table)

    def step(carry: tuple[LoopState, Array], t: Int[Array, ""]) -> tuple[tuple[LoopState, Array], RunRecord]:
        told, wrong = carry
        asked = _without_noise(parts, hparams, told, table, t > rounds) if refits else told
        fitted, info = fit(parts, hparams, asked, table)
        state = dataclasses.replace(told, params=fitted.params, status=fitted.status)
        choice = _no_choice(parts.config.batch)
        if rounds:  # else nothing is ever chosen, and need not be compiled
            choice = jax.lax.cond(t >= rounds, lambda: choice, lambda: choose(parts, hparams, state, table, rule))
        record = RunRecord(
            labels=state.labelled.mask.sum(dtype=jnp.int32),
            wrong=wrong,
            params=state.params,
            fit=info,
            selection=choice.selection,
            batch=_report(choice, table),
            status=worst(state.status, choice.selection.status),
        )
        state, more = answer(state, choice.selection)
        return (state, wrong + more), record

    state, first = init(parts, key_loop, table, hparams, rule)
    state, wrong = answer(state, first)
    # The noise-free refit is one step more, since another fit beside the scan would compile as long again.
    (state, _), records = jax.lax.scan(step, (state, wrong), jnp.arange(rounds + 1 + refits, dtype=jnp.int32))
    if not refits:
        return state, records
    records, refit = (jax.tree.map(lambda leaf, part=part: leaf[part], records) for part in (slice(-1), -1))
    last = jax.tree.map(lambda leaf: leaf[-1], records)
    state = dataclasses.replace(state, round=state.round - 1, params=last.params, status=last.status)
    return state, records._replace(noise_free=refit.params, noise_free_status=refit.fit.status)


def _without_noise(
    parts: Parts, hparams: HParams, state: LoopState, table: DeviceTable, wanted: Bool[Array, ""]
) -> LoopState:
    """If wanted, the state of the last fit but with labels that are probabilities; else the same state."""
    labelled, noise = state.labelled, jnp.asarray(hparams.noise, jnp.float32)
    pairs, lengths = jnp.stack([labelled.first, labelled.second], axis=1), table.lengths.reshape(-1)
    free = chances(parts.config.annotator, noise, pairs, table.exact_gold, lengths, table.exact_answers)
    label = jnp.where(wanted & labelled.mask, free, labelled.label)
    # In the round of the last fit, for the same chance.
    return dataclasses.replace(
        state, round=state.round - wanted.astype(jnp.int32), labelled=dataclasses.replace(labelled, label=label)
    )


def _answer(
    parts: Parts, key: PRNGKey, hparams: HParams, state: LoopState, selection: Selection, table: DeviceTable
) -> tuple[LoopState, Int[Array, ""]]:
    """Label a batch and record it; and how many of its labels are wrong, 0 of those on record."""
    if table.recorded is not None:
        return tell(state, selection, recorded_labels(table.recorded, selection.pairs)), jnp.int32(0)
    gold, answers, noise = table.exact_gold, table.exact_answers, jnp.asarray(hparams.noise, jnp.float32)
    lengths = table.lengths.reshape(-1)
    labels, wrong = annotate(key, parts.config.annotator, noise, selection.pairs, gold, lengths, answers)
    known = jnp.isfinite((table.gold if table.answers is None else table.answers).reshape(-1)[selection.pairs])
    known = jnp.where(selection.valid[:, None], known, True)
    labels = jnp.where(known.all(axis=1), labels, jnp.nan)  # nobody can answer, and `tell` reports it
    return tell(state, selection, labels), (wrong & selection.valid).sum(dtype=jnp.int32)


def _report(choice: Choice, table: DeviceTable) -> dict[str, Array]:
    """Diversity and informativeness of a batch."""
    first, second = choice.selection.pairs.T
    return batch_report(
        table.flat[first],
        table.flat[second],
        choice.selection.pairs,
        choice.selection.valid,
        choice.weight,
        choice.variance,
        jnp.abs(difference(table.exact_gold, first, second)),
        width=table.mask.shape[1],
        scale=table.spread,
    )


def _no_choice(batch: int) -> Choice:
    """The choice of a round that selects nothing."""
    none = jnp.zeros(batch, jnp.float32)
    selection = Selection(
        pairs=jnp.zeros((batch, 2), jnp.int32),
        gains=none,
        valid=jnp.zeros(batch, bool),
        status=jnp.int32(Status.OK),
        weights=jnp.ones(batch, jnp.float32),
    )
    return Choice(selection, none, none)
