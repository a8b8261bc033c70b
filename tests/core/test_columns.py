"""Columns keep every difference of their float64 values on the way to a device, and say where they have none."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jarm.core.columns import dense_ranks, differ, difference, halves, nearest_zero, refuse_ties, smallest
from jarm.core.status import JarmError

REWARDS = st.floats(-1e12, 1e12) | st.sampled_from([0.0, -0.0, 16777216.0, 16777217.0, -1e9, 0.1, 0.2, 1e30])


@given(st.lists(REWARDS, min_size=2, max_size=9))
def test_differences_of_halves_are_those_of_float64(values):
    values = np.array(values)
    first, second = np.triu_indices(len(values), 1)
    both = jnp.stack([jnp.asarray(half) for half in halves(values)], axis=1)
    ours = np.asarray(difference(both, jnp.asarray(first), jnp.asarray(second)), np.float64)
    exact = values[first] - values[second]
    np.testing.assert_allclose(ours, exact, rtol=3e-7, atol=1e-13 * np.abs(values).max() + 1e-37)
    told = np.abs(exact) > 1e-13 * np.maximum(np.abs(values[first]), np.abs(values[second])) + 1e-37
    np.testing.assert_array_equal(np.sign(ours[told]), np.sign(exact[told]))
    np.testing.assert_array_equal(ours[exact == 0], 0)


@given(st.lists(st.lists(REWARDS, min_size=4, max_size=4), min_size=1, max_size=4))
def test_dense_ranks_count_smaller_values(rows):
    expected = [[len({other for other in row if other < value}) for value in row] for row in rows]
    np.testing.assert_array_equal(dense_ranks(np.array(rows)), expected)


def test_a_missing_score_has_no_rank():
    np.testing.assert_array_equal(dense_ranks(np.array([[2.0, np.nan, 1.0]])), [[1, np.nan, 0]])


def test_float32_where_it_loses_nothing():
    assert smallest(np.array([0.5, np.nan])).dtype == np.float32
    for values in ([0.1], [16777217.0], [1e300]):
        np.testing.assert_array_equal(smallest(np.array(values)), values)
    assert nearest_zero(np.array([-1e9, 3.0, np.nan])) == 3
    assert nearest_zero(np.array([np.nan])) == 0


@pytest.mark.parametrize("pairs", ["within", "cross", "all"])
@given(st.lists(st.lists(st.sampled_from([None, 1.0, 1.0 + 1e-15]), min_size=3, max_size=3), min_size=1, max_size=4))
def test_differences_are_found_as_by_trying_every_pair(pairs, rows):
    mask = np.array([[value is not None for value in row] for row in rows])
    values = np.array([[value or 7.0 for value in row] for row in rows])
    flat = [(p, values[p, r]) for p, r in zip(*np.nonzero(mask), strict=True)]
    space = {"within": lambda p, q: p == q, "cross": lambda p, q: p != q, "all": lambda p, q: True}[pairs]
    expected = any(a != b and space(p, q) for p, a in flat for q, b in flat)
    if mask.any():
        assert differ(values, mask, pairs) == expected


def test_what_is_equal_is_named():
    with pytest.raises(JarmError, match="'help' of the test prompts are equal in every pair across prompts: there is"):
        refuse_ties(np.ones((2, 2)), np.ones((2, 2), bool), "cross", "help", " of the test prompts")
