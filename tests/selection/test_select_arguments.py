"""Odd arguments are named in one sentence, whichever library they come from."""

import numpy as np
import pytest

from jarm.core.status import JarmError
from jarm.selection.arguments import as_array, finite, index_pairs, read_costs, read_limits, read_prior, truth, whole


class Truth:
    """A truth value of another library, which may be an index."""

    dtype = "torch.bool"

    def __index__(self):
        return 1


@pytest.mark.parametrize("value", [True, np.True_, Truth(), 2.0, np.float32(2), "2", None, [2], np.array([2]), 2j])
def test_a_number_of_pairs_is_whole(value):
    with pytest.raises(JarmError, match=r"^k is .*: give a whole number, 1 or more"):
        whole("k", value)


def test_whole_numbers_of_arrays_are_read():
    assert [whole("k", value) for value in (3, np.int8(3), np.array(3))] == [3, 3, 3]


@pytest.mark.parametrize("value", ["yes", 1, None, np.array([True, False])])
def test_truth_is_true_or_false(value):
    with pytest.raises(JarmError, match=r"^allow_fewer is .*: give True or False"):
        truth("allow_fewer", value)


@pytest.mark.parametrize("value", ["high", True, np.nan, [0.5, 0.9], 0, 2])
def test_similarity_is_a_cosine(value):
    with pytest.raises(JarmError, match=r"^similarity "):
        read_limits(None, None, value, prompts=False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([[1, None]], object), "features holds object"),
        (np.zeros(2, [("a", float), ("b", float)]), "features holds"),
        (np.ones((2, 2)) * 1j, "features holds complex128"),
        (np.zeros((0, 3)), r"features has shape \(0, 3\)"),
        (np.float64(3), r"features has shape \(\)"),
        ([[0, 1], [2, np.inf]], r"Row 1 of features is NaN or infinite, the first of 1 \(column 1\)"),
        ({"a": [1]}, "features holds object"),
    ],
)
def test_arrays_are_numbers_with_axes(value, message):
    with pytest.raises(JarmError, match=message):
        finite("features", value, ("N", "F"))


def test_other_arrays():
    assert as_array("features", np.arange(3)).tolist() == [0, 1, 2]
    for nothing in (None, [], (), np.zeros(0), np.zeros((0, 2))):
        assert index_pairs("labelled", nothing, 5).shape == (0, 2)
    for value in ([[True, False]], [[0.0, 1.0]], [0, 1], "ab", {(0, 1)}):
        with pytest.raises(JarmError, match=r"^labelled "):
            index_pairs("labelled", value, 5)
    for value in (True, "1", np.nan, -1, [1, 2]):
        with pytest.raises(JarmError, match="prior_precision "):
            read_prior(value, 3)
    with pytest.raises(JarmError, match="Entry 1 of costs is 1e-60, beyond float32"):
        read_costs([1, 1e-60], 2, None)
