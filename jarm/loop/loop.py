"""The loop: ask which pairs to label, tell what was answered, fit again. A whole run is one pure function.

`ask` and `tell` are what a campaign with people calls; `run` scans them against a simulated annotator, compiles once,
and never touches the host. Shapes are fixed from the start: the labelled set has room for the whole budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.acquisition.check import check_selection
from jarm.acquisition.registry import RULES, get_rule, needs_ensemble
from jarm.core.base import Belief, FitInfo, HParams, Labelled, PairSpace, Rule, Selection
from jarm.core.pytree import record
from jarm.core.status import JarmError, Status, worst
from jarm.core.types import Array, Bool, Float, Int, Params, PRNGKey
from jarm.design.fisher import fisher_weight, pair_information, pair_variance
from jarm.design.spaces import compact, pair_space, sample_pairs, subset
from jarm.evaluation.annotators import annotate
from jarm.evaluation.batch import batch_report
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import DeviceTable
from jarm.reward.fit import make_fit


@record
class LoopState:
    """What is carried from round to round.

    Attributes:
      key: source of all that is still to be drawn.
      round: how many batches have been told.
      labelled: the pairs labelled so far.
      params: heads of the last fit, with a leading axis K.
      status: worst `Status` so far.
    """

    key: PRNGKey
    round: Int[Array, ""]
    labelled: Labelled
    params: Params
    status: Int[Array, ""]


class RunRecord(NamedTuple):
    """One run, a leading axis T + 1 over rounds: after the initial labels, and after each batch.

    Attributes:
      labels: labels so far.
      wrong: how many of them are wrong.
      params: the heads fitted to them, `[T + 1, K, ...]`.
      fit: what the fit reported.
      selection: the next batch; in the last round nothing is selected and all of it is invalid.
      batch: diversity and informativeness of that batch.
      status: worst `Status` up to then.
    """

    labels: Int[Array, "T"]
    wrong: Int[Array, "T"]
    params: Params
    fit: FitInfo
    selection: Selection
    batch: dict[str, Array]
    status: Int[Array, "T"]


class Loop(NamedTuple):
    """The functions of one configuration. All are pure and may be jitted, vmapped and sharded.

    Attributes:
      init: `(key, table) -> (state, selection)`: an empty state, and the random pairs to label first.
      fit: `(hparams, state, table) -> (state, info)`: fit the heads to what is labelled.
      select: `(hparams, state, table, rule=0) -> selection`: pick the next batch with the heads of the state.
      ask: `(hparams, state, table, rule=0) -> (state, selection)`: `fit`, then `select`.
      tell: `(state, selection, labels) -> state`: add what was answered.
      run: `(key, hparams, table, rule=0) -> (state, records)`: everything, against the simulated annotator.

    `rule` is an index into the `rules` of the configuration, and may be traced.
    """

    init: Callable[[PRNGKey, DeviceTable], tuple[LoopState, Selection]]
    fit: Callable[[HParams, LoopState, DeviceTable], tuple[LoopState, FitInfo]]
    select: Callable[..., Selection]
    ask: Callable[..., tuple[LoopState, Selection]]
    tell: Callable[[LoopState, Selection, Array], LoopState]
    run: Callable[..., tuple[LoopState, RunRecord]]


def make_loop(config: LoopConfig) -> Loop:
    """Build the loop of a configuration: all that is static is decided here.

    Args:
      config: the shape of a run.

    Returns:
      Its functions. Jit `run` once and call it with as many keys, hparams and rules as you like; or `vmap` it.

    Raises:
      JarmError: there is no such rule, or it needs an ensemble and there is one head.
    """
    rules = [get_rule(rule) if isinstance(rule, str) else rule for rule in config.rules]
    for name in config.rules:
        if config.fit.members < 2 and isinstance(name, str) and needs_ensemble(name):
            raise JarmError(
                f"Rule {name!r} looks at how members differ, and there is one: use two or more (`--members`)."
            )
    head = config.head.head()
    fit = make_fit(head, config.fit)
    capacity = config.budget

    def init(key: PRNGKey, table: DeviceTable) -> tuple[LoopState, Selection]:
        key, key_first, key_params = jax.random.split(key, 3)
        heads = jax.vmap(lambda each: head.init(each, table.embeddings.shape[2]))
        nothing = jnp.zeros(capacity, jnp.float32)
        nowhere = jnp.zeros(capacity, jnp.int32)
        state = LoopState(
            key=key,
            round=jnp.int32(0),
            labelled=Labelled(nowhere, nowhere, nothing, nothing, jnp.zeros(capacity, bool)),
            params=heads(jax.random.split(key_params, config.fit.members)),
            status=jnp.int32(Status.OK),
        )
        space = pair_space(config.pairs, table.mask.shape[1], table.mask.reshape(-1))
        pairs, valid = sample_pairs(key_first, space, config.initial)
        short = jnp.where(valid.all(), jnp.int32(Status.OK), jnp.int32(Status.EXHAUSTED))
        return state, Selection(pairs, jnp.zeros(config.initial, jnp.float32), valid, short)

    def refit(hparams: HParams, state: LoopState, table: DeviceTable) -> tuple[LoopState, FitInfo]:
        flat = table.embeddings.reshape(-1, table.embeddings.shape[2])
        key_fit = jax.random.fold_in(state.key, 2 * state.round)
        params, info = fit(key_fit, hparams, flat, state.labelled, state.params if config.warm_start else None)
        return dataclasses.replace(state, params=params, status=worst(state.status, info.status)), info

    def offered(key: PRNGKey, state: LoopState, table: DeviceTable) -> tuple[Int[Array, "n"] | None, PairSpace]:
        """The responses of this round, None for all, and the space of their unlabelled pairs in local indices."""
        count, width = table.mask.shape
        key_prompts, key_candidates = jax.random.split(key)
        if config.prompts is None:
            prompts = jnp.arange(count, dtype=jnp.int32)
        else:
            prompts = jax.random.choice(key_prompts, count, (config.prompts,), replace=False).astype(jnp.int32)
        size = prompts.shape[0] * width
        home = (
            jnp.full(count, prompts.shape[0], jnp.int32).at[prompts].set(jnp.arange(prompts.shape[0], dtype=jnp.int32))
        )
        ends = jnp.stack([state.labelled.first, state.labelled.second], axis=1)
        local = jnp.where(state.labelled.mask[:, None], home[ends // width] * width + ends % width, size)
        space = pair_space(config.pairs, width, table.mask[prompts].reshape(-1), local)
        responses = None
        if config.prompts is not None:
            responses = (prompts[:, None] * width + jnp.arange(width, dtype=jnp.int32)[None, :]).reshape(-1)
        if config.candidates is None:
            return responses, space
        space = subset(key_candidates, space, config.candidates)
        if 2 * config.candidates >= size:
            return responses, space
        # Few pairs of many responses: only those at their ends are looked at.
        used, space = compact(space)
        return (used if responses is None else responses[used]), space

    def believe(state: LoopState, table: DeviceTable, responses: Int[Array, "n"] | None) -> Belief:
        flat, labelled = table.embeddings.reshape(-1, table.embeddings.shape[2]), state.labelled
        # The layer that is learnt about is the first member's: features of different heads have no common mean. How
        # sure a pair is, its margin, is the ensemble's to say.
        first_member = jax.tree.map(lambda leaf: leaf[0], state.params)
        others = jax.tree.map(lambda leaf: leaf[1:], state.params)

        def scored(rows: Float[Array, "n d"]) -> tuple[Float[Array, "n F"], Float[Array, "K n"]]:
            features = head.features(first_member, rows)
            rewards = [(features @ head.weights(first_member))[None]]
            if config.fit.members > 1:
                rewards.append(jax.vmap(head.rewards, in_axes=(0, None))(others, rows))
            return features, jnp.concatenate(rewards)

        features, member_rewards = scored(flat if responses is None else flat[responses])
        rewards = member_rewards.mean(axis=0)

        ends = jnp.stack([labelled.first, labelled.second])
        if responses is None:
            (phi_first, phi_second), (r_first, r_second) = features[ends], rewards[ends]
        else:
            phi, r = scored(flat[ends.reshape(-1)])
            (phi_first, phi_second), (r_first, r_second) = jnp.split(phi, 2), jnp.split(r.mean(axis=0), 2)
        here = labelled.mask[:, None]
        return Belief(
            features=features,
            rewards=rewards,
            member_rewards=member_rewards,
            labelled_information=pair_information(
                phi_first, phi_second, fisher_weight(r_first - r_second) * labelled.mask
            ),
            num_labelled=labelled.mask.sum(dtype=jnp.int32),
            labelled_features=jnp.where(here[:, :, None], jnp.stack([phi_first, phi_second], axis=1), 0),
            labelled_rewards=jnp.where(here, jnp.stack([r_first, r_second], axis=1), 0),
        )

    def pick(rule: int | Array, key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace) -> Selection:
        def branch(one: Rule, given: str | Rule) -> Callable[..., Selection]:
            name = given if isinstance(given, str) else getattr(given, "__name__", repr(given))

            def checked(key: PRNGKey, belief: Belief, space: PairSpace) -> Selection:
                found = check_selection(one(key, hparams, belief, space, config.batch), space, config.batch, name)
                if given in RULES:
                    return found
                # A rule of the user's that was given numbers and made something else of them.
                sound = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(belief)]).all()
                made = sound & (found.status == Status.NONFINITE)
                return dataclasses.replace(found, status=jnp.where(made, jnp.int32(Status.BROKEN_SCORES), found.status))

            return checked

        branches = [branch(*each) for each in zip(rules, config.rules, strict=True)]
        chosen = jax.lax.switch(rule, branches, key, belief, space)
        known = (jnp.asarray(rule) >= 0) & (jnp.asarray(rule) < len(rules))
        status = worst(chosen.status, jnp.where(known, jnp.int32(Status.OK), jnp.int32(Status.NO_RULE)))
        return dataclasses.replace(chosen, status=status)

    def choose(
        hparams: HParams, state: LoopState, table: DeviceTable, rule: int | Array
    ) -> tuple[Selection, Float[Array, "B"], Float[Array, "B"]]:
        """The next batch in global indices; of its pairs, the Fisher weights and the variances over the ensemble."""
        key_space, key_rule = jax.random.split(jax.random.fold_in(state.key, 2 * state.round + 1))
        responses, space = offered(key_space, state, table)
        # On some accelerators a plain product has a third of the digits of its type, too few for differences.
        with jax.default_matmul_precision("highest"):
            belief = believe(state, table, responses)
        chosen = pick(rule, key_rule, hparams, belief, space)
        weight = fisher_weight(belief.rewards[chosen.pairs[:, 0]] - belief.rewards[chosen.pairs[:, 1]])
        variance = pair_variance(belief.member_rewards, chosen.pairs)
        pairs = chosen.pairs if responses is None else jnp.sort(responses[chosen.pairs], axis=1)
        pairs = jnp.where(chosen.valid[:, None], pairs, 0)
        return dataclasses.replace(chosen, pairs=pairs), weight, variance

    def select(hparams: HParams, state: LoopState, table: DeviceTable, rule: int | Array = 0) -> Selection:
        return choose(hparams, state, table, rule)[0]

    def ask(
        hparams: HParams, state: LoopState, table: DeviceTable, rule: int | Array = 0
    ) -> tuple[LoopState, Selection]:
        state, _ = refit(hparams, state, table)
        selection = select(hparams, state, table, rule)
        return dataclasses.replace(state, status=worst(state.status, selection.status)), selection

    def tell(state: LoopState, selection: Selection, labels: Float[Array, "B"]) -> LoopState:
        old, start = state.labelled, state.labelled.mask.sum(dtype=jnp.int32)

        def write(into: Array, values: Array) -> Array:
            # Only answered pairs are stored, one after the other; a place beyond the capacity is dropped.
            place = jnp.where(selection.valid, start + jnp.cumsum(selection.valid) - 1, capacity)
            return into.at[place].set(values.astype(into.dtype), mode="drop")

        labelled = Labelled(
            first=write(old.first, selection.pairs[:, 0]),
            second=write(old.second, selection.pairs[:, 1]),
            label=write(old.label, labels),
            weight=write(old.weight, jnp.ones_like(labels) if selection.weights is None else selection.weights),
            mask=write(old.mask, selection.valid),
        )
        full = start + selection.valid.sum(dtype=jnp.int32) > capacity
        wrong = (selection.valid & ~((labels >= 0) & (labels <= 1))).any()
        status = worst(
            state.status,
            selection.status,
            jnp.where(full, jnp.int32(Status.FULL), jnp.int32(Status.OK)),
            jnp.where(wrong, jnp.int32(Status.NONFINITE), jnp.int32(Status.OK)),
        )
        return dataclasses.replace(state, labelled=labelled, round=state.round + 1, status=status)

    def run(key: PRNGKey, hparams: HParams, table: DeviceTable, rule: int | Array = 0) -> tuple[LoopState, RunRecord]:
        key_loop, key_annotator = jax.random.split(key)
        gold, lengths, noise = (
            table.gold.reshape(-1),
            table.lengths.reshape(-1),
            jnp.asarray(hparams.noise, jnp.float32),
        )
        flat = table.embeddings.reshape(-1, table.embeddings.shape[2])

        def answer(state: LoopState, selection: Selection) -> tuple[LoopState, Int[Array, ""]]:
            labels, wrong = annotate(key_annotator, config.annotator, noise, selection.pairs, gold, lengths)
            known = jnp.where(selection.valid[:, None], jnp.isfinite(gold[selection.pairs]), True)
            labels = jnp.where(known.all(axis=1), labels, jnp.nan)  # nobody can answer, and `tell` says so
            return tell(state, selection, labels), (wrong & selection.valid).sum(dtype=jnp.int32)

        def report(selection: Selection, weight: Float[Array, "B"], variance: Float[Array, "B"]) -> dict[str, Array]:
            first, second = selection.pairs.T
            return batch_report(
                flat[first],
                flat[second],
                selection.pairs,
                selection.valid,
                weight,
                variance,
                jnp.abs(gold[first] - gold[second]),
                width=table.mask.shape[1],
                scale=table.spread,
            )

        def step(
            carry: tuple[LoopState, Int[Array, ""]], last: Bool[Array, ""]
        ) -> tuple[tuple[LoopState, Array], RunRecord]:
            state, wrong = carry
            state, info = refit(hparams, state, table)
            nothing = Selection(
                pairs=jnp.zeros((config.batch, 2), jnp.int32),
                gains=jnp.zeros(config.batch, jnp.float32),
                valid=jnp.zeros(config.batch, bool),
                status=jnp.int32(Status.OK),
                weights=jnp.ones(config.batch, jnp.float32),
            )
            none = jnp.zeros(config.batch, jnp.float32)
            selection, weight, variance = nothing, none, none
            if config.rounds:  # else nothing would be chosen, and need not be compiled
                selection, weight, variance = jax.lax.cond(
                    last, lambda: (nothing, none, none), lambda: choose(hparams, state, table, rule)
                )
            record = RunRecord(
                labels=state.labelled.mask.sum(dtype=jnp.int32),
                wrong=wrong,
                params=state.params,
                fit=info,
                selection=selection,
                batch=report(selection, weight, variance),
                status=worst(state.status, selection.status),
            )
            state, more = answer(state, selection)
            return (state, wrong + more), record

        state, first = init(key_loop, table)
        state, wrong = answer(state, first)
        last = jnp.arange(config.rounds + 1) == config.rounds
        (state, _), records = jax.lax.scan(step, (state, wrong), last)
        return state, records

    return Loop(init, refit, select, ask, tell, run)
