"""A loop offers no pair of responses with equal embeddings, and a budget counts the others only."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import sampled

from jarm.core.base import Labelled
from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable
from jarm.loop.belief import draw_candidates
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import count_pairs, make_device_table, prepare
from jarm.loop.loop import make_loop
from jarm.reward.config import FitConfig, HeadConfig
from jarm.testing.references import list_pairs

P, R, D = 6, 4, 3


def make_table(distinct=4):
    """Prompts of 2 to 4 responses, of few distinct embeddings that lie in several rows of the store."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(distinct, D)).astype(np.float32)
    store = values[rng.integers(0, distinct, P * R)] if distinct < P * R else rng.normal(size=(P * R, D))
    mask = np.arange(R) < rng.integers(2, R + 1, P)[:, None]
    return ResponseTable(
        store, np.arange(P * R).reshape(P, R), mask, gold=rng.normal(size=(P, R)).astype(np.float32), mean=values[0]
    )


TABLE = make_table()


def offered(table, kind):
    """Pairs by definition, in responses."""
    rows, prompt = table.embeddings().reshape(P * R, D), np.arange(P * R) // R
    inside = {"within": lambda i, j: i == j, "cross": lambda i, j: i != j, "all": lambda i, j: True}[kind]
    every = [
        (i, j)
        for i, j in itertools.combinations(np.flatnonzero(table.mask).tolist(), 2)
        if inside(prompt[i], prompt[j])
    ]
    return {(i, j) for i, j in every if (rows[i] != rows[j]).any()}, len(every)


def config_of(kind, **options):
    small = {"rounds": 0, "batch": 1, "initial": 1, "rules": ("random",)} | options
    return LoopConfig(pairs=kind, head=HeadConfig(hidden=()), fit=FitConfig(members=1), **small)


@pytest.mark.parametrize("kind", sampled(["within", "cross", "all"], "within"))
@pytest.mark.slow
def test_first_pairs_and_candidates_are_those_that_differ(kind):
    wanted, every = offered(TABLE, kind)
    counts = count_pairs(TABLE, kind)
    assert (counts.offered, counts.copies) == (len(wanted), every - len(wanted))
    assert counts.copies > 0
    config = config_of(kind, initial=len(wanted))
    table, _, _ = prepare(config, TABLE)
    _, first = make_loop(config).init(jax.random.key(0), table)
    assert {tuple(pair) for pair in np.asarray(first.pairs).tolist()} == wanted
    nothing = jnp.zeros(1, jnp.int32)
    known = min(wanted)
    labelled = Labelled(nothing + known[0], nothing + known[1], jnp.ones(1), jnp.ones(1), jnp.ones(1, bool))
    for options in ({}, {"prompts": 4, "candidates": 5}):
        drawn = config_of(kind, **options)
        responses, space, _ = draw_candidates(drawn, jax.random.key(1), labelled, table)
        pairs = list_pairs(space)
        pairs = np.sort(pairs if responses is None else np.asarray(responses)[pairs], axis=1)
        found = {tuple(pair) for pair in pairs.tolist()}
        assert found <= wanted - {known}
        assert options or found == wanted - {known}
    with pytest.raises(
        JarmError, match=rf"holds {len(wanted)} pairs .*\({counts.copies} more are of responses with eq"
    ):
        prepare(config_of(kind, initial=len(wanted) + 1), TABLE)


def test_drawn_prompts_may_hold_copies_only():
    with pytest.raises(JarmError, match="1 prompts per round may hold fewer pairs within prompts than a batch of 5"):
        prepare(config_of("within", prompts=1, batch=5), TABLE)


def test_a_table_without_copies_is_what_it_was():
    table = make_table(P * R)
    assert table.alike is None
    assert make_device_table(table, 1.0).alike is None
    assert count_pairs(table, "within").copies == 0
