"""Pairs of responses with equal embeddings are never offered: by definition, against every pair listed."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import sampled

from jarm.acquisition.check import check_selection
from jarm.acquisition.registry import RULES
from jarm.core.base import HParams
from jarm.core.status import Status
from jarm.design.fisher import space_information
from jarm.design.passes import best_pairs
from jarm.design.scorer import Scorer
from jarm.design.spaces import KINDS, get_tile, pair_count, pair_space, sample_pairs, tile_count
from jarm.testing.conformance import make_case
from jarm.testing.references import information64, list_pairs

N, R = 24, 4


def space_of(kind, seed):
    """A space with responses in many, few, one and no groups of equal embeddings."""
    rng = np.random.default_rng(seed)
    alike = rng.integers(100, 100 + (2, 6, 20, 1)[seed], N)  # any numbers, of drawn prompts for example
    excluded = jnp.asarray(rng.integers(0, N + 1, (8, 2)), jnp.int32)
    return pair_space(kind, R, jnp.asarray(rng.random(N) < 0.9), excluded, jnp.asarray(alike))


LONGER = sampled(KINDS, "within")


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1, 3])
@pytest.mark.parametrize("kind", LONGER)
def test_tiles_counts_and_samples_hold_the_pairs_that_differ(kind, seed):
    space = space_of(kind, seed)
    offered = [tuple(pair) for pair in list_pairs(space).tolist()]
    alike, eligible = np.asarray(space.alike), np.asarray(space.eligible)
    assert all(alike[i] != alike[j] and eligible[i] and eligible[j] for i, j in offered)
    assert len(list_pairs(dataclasses.replace(space, alike=None))) > len(offered)
    for tile in (40, 1 << 19):  # in parts, and whole
        seen = []
        for index in range(tile_count(space, tile)):
            rows, columns, mask = map(np.asarray, get_tile(space, index, tile))
            g, r, c = np.nonzero(mask)
            seen += zip(rows[g, r].tolist(), columns[g, c].tolist(), strict=True)
        assert sorted(seen) == offered
    assert float(pair_count(space)) == len(offered)
    pairs, valid = sample_pairs(jax.random.key(seed), space, 300)
    assert sorted(map(tuple, np.asarray(pairs)[np.asarray(valid)].tolist())) == offered


@pytest.mark.parametrize("kind", LONGER)
def test_passes_and_sums_leave_them_out(kind):
    space, rng = space_of(kind, 1), np.random.default_rng(5)
    y = jnp.asarray(rng.normal(size=N), jnp.float32)
    scorer = Scorer(y, lambda a, b: -abs(a - b), lambda rows, columns: -abs(rows[:, None] - columns[None, :]))
    pairs = list_pairs(space)
    best = best_pairs(scorer, space, 300, tile=40)
    count = len(pairs)
    assert sorted(map(tuple, np.asarray(best.pairs[:count]).tolist())) == [tuple(pair) for pair in pairs.tolist()]
    assert (np.asarray(best.scores[count:]) == -np.inf).all()
    total, number = space_information(y[:, None], None, space)
    np.testing.assert_allclose(total, information64(np.asarray(y)[:, None], None, pairs), rtol=1e-5)
    assert float(number) == count


def test_without_equal_rows_a_space_is_what_it_was():
    space = pair_space("all", R, jnp.ones(N, bool))
    assert space.alike is None
    assert len(jax.tree.leaves(space)) == 2


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(("name", "kind"), list(zip(list(RULES)[::6], itertools.cycle(KINDS), strict=False)))
def test_no_rule_picks_them(name, kind):
    case = make_case(kind)
    alike = jnp.asarray(np.random.default_rng(0).integers(0, 3, case.space.size), jnp.int32)
    space = dataclasses.replace(case.space, alike=alike)
    offered = {tuple(pair) for pair in list_pairs(space).tolist()}
    k = min(60, len(offered))
    batch = jax.jit(RULES[name].rule, static_argnames="k")(jax.random.key(0), HParams(), case.belief, space, k=k)
    assert {tuple(pair) for pair in np.asarray(batch.pairs)[np.asarray(batch.valid)].tolist()} <= offered
    assert int(check_selection(batch, space, k, name).status) == Status.OK
