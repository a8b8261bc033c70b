import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from jarm.core.status import JarmError
from jarm.design.spaces import (
    as_list,
    compact,
    contains,
    exclude,
    get_tile,
    is_in,
    listed_space,
    may_pair,
    pair_count,
    pair_space,
    sample_pairs,
    subset,
)
from jarm.design.spaces import tile_count as count_tiles
from jarm.testing.references import list_pairs
from jarm.testing.tracing import quick_jit

KINDS = ("within", "cross", "all")
draw = quick_jit(sample_pairs, static_argnames="k")
K = 25  # more than some of the random spaces below hold, fewer than others


def random_space(kind, prompts, width, seed, capacity=12):
    """Ragged prompts; exclusions of every sort: mirrored, repeated, ineligible, of the wrong kind, padding."""
    rng = np.random.default_rng(seed)
    size = prompts * width
    if kind == "listed":
        return listed_space(
            jnp.asarray(rng.integers(0, size + 1, (40 if seed % 2 else 20, 2)), jnp.int32), jnp.ones(size, bool)
        )
    eligible = rng.random(size) < rng.choice([0.4, 0.8, 1.0])
    excluded = rng.integers(0, size + 2, (capacity, 2))
    excluded[1] = excluded[0][::-1]
    return pair_space(kind, width, jnp.asarray(eligible), jnp.asarray(excluded, jnp.int32))


@functools.partial(quick_jit, static_argnames="tile")
def times_seen(space, *, tile):
    """How often each ordered pair is unmasked over all tiles, [N, N]."""
    size = space.eligible.shape[0]

    def add(seen, index):
        rows, columns, mask = get_tile(space, index, tile)
        first, second = jnp.broadcast_arrays(rows[:, :, None], columns[:, None, :])
        return seen.at[first, second].add(mask.astype(jnp.int32)), None

    tiles = jnp.arange(count_tiles(space, tile), dtype=jnp.int32)
    return jax.lax.scan(add, jnp.zeros((size, size), jnp.int32), tiles)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompts", "width", "tile"), [(5, 4, 1 << 19), (5, 4, 37), (7, 3, 1)])
def test_tiles_hold_each_pair_once_and_no_other(kind, prompts, width, tile):
    for seed in range(8):
        space = random_space(kind, prompts, width, seed)
        expected = np.zeros((prompts * width, prompts * width), int)
        expected[tuple(list_pairs(space).T)] = 1
        np.testing.assert_array_equal(times_seen(space, tile=tile), expected)


@pytest.mark.parametrize("kind", [*KINDS, "listed"])
def test_pair_count(kind):
    for seed in range(10):
        space = random_space(kind, 5, 4, seed)
        assert pair_count(space) == len(list_pairs(space))


@pytest.mark.parametrize("kind", [*KINDS, "listed"])
def test_membership(kind):
    """Of every pair of indices, padding and mirrors among them; pairs that are excluded may pair all the same."""
    asked = np.stack(np.meshgrid(np.arange(22), np.arange(22)), axis=-1).reshape(-1, 2)
    for seed in range(4):
        space = random_space(kind, 5, 4, seed)
        held = {tuple(pair) for pair in list_pairs(space).tolist()}
        found = is_in(space, jnp.asarray(asked, jnp.int32))
        np.testing.assert_array_equal(found, [tuple(pair) in held for pair in asked.tolist()])
        if kind != "listed":
            every = {tuple(pair) for pair in list_pairs(pair_space(kind, 4, space.eligible)).tolist()}
            found = may_pair(space, jnp.asarray(asked, jnp.int32))
            np.testing.assert_array_equal(found, [tuple(pair) in every for pair in asked.tolist()])


@pytest.mark.parametrize("kind", KINDS)
def test_some_pairs_of_a_space_as_a_list(kind):
    space = random_space(kind, 5, 4, 1)
    space = dataclasses.replace(space, costs=jnp.ones(20))
    some = list_pairs(space)[::3]
    part = as_list(space, jnp.asarray([*some, (20, 20)], jnp.int32))
    np.testing.assert_array_equal(list_pairs(part), some)
    assert part.costs is None
    np.testing.assert_array_equal(part.prompt_of, space.prompt_of)
    assert pair_count(part) == len(some)


def test_prompts_are_numbered_by_width_or_by_name():
    space = pair_space("cross", 4, jnp.ones(20, bool))
    np.testing.assert_array_equal(space.prompt_of, np.arange(20) // 4)
    assert (space.size, space.num_prompts) == (20, 5)
    named = dataclasses.replace(space, width=1, prompt=jnp.arange(20, dtype=jnp.int32) % 3)
    np.testing.assert_array_equal(named.prompt_of, np.arange(20) % 3)
    assert named.num_prompts == 20
    assert listed_space(jnp.zeros((0, 2), jnp.int32), jnp.ones(7, bool), width=3).num_prompts == 3


@pytest.mark.parametrize("kind", ["cross", "all"])
@pytest.mark.slow
def test_prompts_of_unequal_size_need_no_padding(kind):
    for seed in range(4):
        space = random_space(kind, 5, 4, seed)
        prompt = jnp.asarray(np.random.default_rng(seed).integers(0, 7, 20), jnp.int32)
        space = dataclasses.replace(space, width=1, prompt=prompt)
        listed = list_pairs(space)
        expected = np.zeros((20, 20), int)
        expected[tuple(listed.T)] = 1
        np.testing.assert_array_equal(times_seen(space, tile=37), expected)
        assert pair_count(space) == len(listed)
        pairs, valid = draw(jax.random.key(seed), space, k=K)
        assert {tuple(pair) for pair in np.asarray(pairs)[np.asarray(valid)].tolist()} <= set(
            map(tuple, listed.tolist())
        )
        assert valid.sum() == min(K, len(listed))


def test_pair_count_is_exact_where_the_pairs_that_are_not_there_outnumber_a_float32():
    # 9,999 pairs across prompts, beside 5e7 within them: a difference of float32 totals says 10,000, and a draw of
    # 10,000 would then look for the last one for ever.
    eligible = jnp.arange(2 * 9999) < 10_000
    assert pair_count(pair_space("cross", 9999, eligible)) == 9999


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=12, max_size=12), st.integers(0, 12))
def test_contains_is_set_membership(some, keep):
    base = pair_space("all", 1, jnp.ones(10, bool))
    kept = np.array([pair if place < keep else (10, 10) for place, pair in enumerate(some)])
    sorted_pairs = exclude(base, jnp.asarray(kept, jnp.int32)).excluded
    members = {tuple(sorted(pair)) for pair in some[:keep] if pair[0] != pair[1]}
    asked = np.stack(np.triu_indices(10, 1), axis=1)
    found = contains(sorted_pairs, jnp.asarray(asked, jnp.int32))
    np.testing.assert_array_equal(found, [tuple(pair) in members for pair in asked.tolist()])


def test_contains_of_nothing():
    assert not contains(jnp.zeros((0, 2), jnp.int32), jnp.array([[0, 1]], jnp.int32)).any()


def test_a_list_is_cleaned():
    given_pairs = [[3, 1], [1, 3], [2, 2], [0, 5], [0, 9], [9, 9], [0, 4], [0, 1], [-1, 2]]
    eligible = jnp.arange(6) != 4
    space = listed_space(jnp.asarray(given_pairs, jnp.int32), eligible)
    padding = [[6, 6]] * 6
    np.testing.assert_array_equal(space.pairs, [[0, 1], [0, 5], [1, 3], *padding])
    fewer = exclude(space, jnp.asarray([[5, 0], [0, 3], [6, 6]], jnp.int32))
    assert {tuple(pair) for pair in list_pairs(fewer)} == {(0, 1), (1, 3)}
    assert pair_count(fewer) == 2


def test_exclusions_add_up():
    space = pair_space("all", 2, jnp.ones(4, bool), jnp.array([[1, 0]], jnp.int32))
    space = exclude(space, jnp.array([[0, 1], [3, 2], [4, 4]], jnp.int32))
    assert {tuple(pair) for pair in list_pairs(space)} == {(0, 2), (0, 3), (1, 2), (1, 3)}
    assert times_seen(space, tile=64).sum() == pair_count(space) == 4


@pytest.mark.parametrize("kind", [*KINDS, "listed"])
def test_a_draw_is_distinct_complete_and_in_the_space(kind):
    full = set()
    for seed in range(8):
        space = random_space(kind, 5, 4, seed)
        offered = {tuple(pair) for pair in list_pairs(space).tolist()}
        pairs, valid = draw(jax.random.key(seed), space, k=K)
        assert (pairs.shape, pairs.dtype, valid.shape) == ((K, 2), jnp.int32, (K,))
        chosen = [tuple(pair) for pair in np.asarray(pairs)[np.asarray(valid)].tolist()]
        assert len(chosen) == len(set(chosen)) == min(K, len(offered))
        assert set(chosen) <= offered
        np.testing.assert_array_equal(valid, np.arange(K) < len(chosen))
        assert not np.asarray(pairs)[len(chosen) :].any()
        full.add(len(chosen) == K)
    assert full == {True, False}


@pytest.mark.parametrize("kind", [*KINDS, "listed"])
def test_draws_are_uniform(kind):
    """Every pair as often as every other, in a ragged space with exclusions; first in the draw, or anywhere in it."""
    eligible = jnp.array([1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0], bool)
    space = pair_space(kind if kind != "listed" else "all", 4, eligible, jnp.array([[0, 1], [8, 0]], jnp.int32))
    if kind == "listed":
        space = listed_space(jnp.asarray(list_pairs(space)[::2], jnp.int32), eligible, 4)
    offered = list_pairs(space)
    place = np.full((12, 12), -1)
    place[tuple(offered.T)] = np.arange(len(offered))
    keys = jax.random.split(jax.random.key(7), 4000)
    drawn, valid = quick_jit(jax.vmap(lambda key: sample_pairs(key, space, 3)))(keys)
    assert valid.all()
    where = place[drawn[..., 0], drawn[..., 1]]
    for draws in (where[:, 0], where[:, 2], where.reshape(-1)):
        assert chisquare(np.bincount(draws, minlength=len(offered))).pvalue > 1e-3


@pytest.mark.parametrize("size", [(1 << 16) - 1, 1 << 16])
def test_all_pairs_are_drawn_on_both_sides_of_what_fits_a_number(size):
    eligible = jnp.zeros(size, bool).at[:4].set(True).at[-4:].set(True)
    space = pair_space("all", 1, eligible)
    drawn, valid = draw(jax.random.key(3), space, k=30)
    ends = np.flatnonzero(eligible)
    assert valid.sum() == 28
    assert set(map(tuple, drawn[valid].tolist())) == {(i, j) for i in ends for j in ends if i < j}


def test_an_empty_space_has_no_pair_and_does_not_hang():
    for kind in KINDS:
        space = random_space(kind, 5, 4, seed=0)
        space = pair_space(kind, 4, jnp.zeros(20, bool), space.excluded)
        assert pair_count(space) == 0
        assert not draw(jax.random.key(0), space, k=K)[1].any()


def test_a_subset_is_a_list_of_distinct_pairs():
    sizes = set()
    for seed in range(4):
        space = random_space("within", 5, 4, seed)
        part = quick_jit(subset, static_argnames="count")(jax.random.key(0), space, count=K)
        assert part.kind == "listed"
        assert part.pairs.shape == (K, 2)
        listed, offered = list_pairs(part), list_pairs(space)
        assert len(listed) == min(K, len(offered)) == pair_count(part)
        assert {tuple(pair) for pair in listed} <= {tuple(pair) for pair in offered}
        sizes.add(len(listed))
    assert min(sizes) < K


def test_bad_spaces_are_named():
    with pytest.raises(JarmError, match="no pair space 'inside': choose from within, cross, all"):
        pair_space("inside", 2, jnp.ones(4, bool))
    with pytest.raises(JarmError, match="5 responses do not form whole prompts of 2"):
        pair_space("all", 2, jnp.ones(5, bool))


@pytest.mark.slow
def test_a_compacted_list_is_the_same_pairs_on_fewer_responses():
    space = listed_space(jnp.array([[3, 9], [3, 5], [20, 20], [0, 9]], jnp.int32), jnp.ones(20, bool))
    responses, local = jax.jit(compact)(space)
    np.testing.assert_array_equal(responses[:4], [0, 3, 5, 9])
    assert local.eligible.sum() == 4
    assert local.pairs.shape == (4, 2)
    np.testing.assert_array_equal(local.prompt[:4], [0, 1, 2, 3])
    inside = np.asarray(local.pairs) < len(responses)
    found = np.where(inside, np.asarray(responses)[np.minimum(local.pairs, 7)], 20)
    np.testing.assert_array_equal(found, space.pairs)

    prompts = jnp.array([7, 7, 7, 7, 2, 2, 2, 2, 2, 2] + 10 * [19], jnp.int32)
    _, local = jax.jit(compact)(dataclasses.replace(space, prompt=prompts))
    np.testing.assert_array_equal(local.prompt[:4], [1, 1, 0, 0])
