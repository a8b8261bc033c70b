"""Labels of a user as arrays of a few sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jarm.core.base import HParams, Labelled
from jarm.core.status import JarmError
from jarm.reward.config import FitConfig
from jarm.reward.fit import make_fit
from jarm.reward.heads import linear_head
from jarm.reward.labels import label_pairs
from jarm.testing.tracing import count_compilations


@pytest.mark.core
def test_other_numbers_of_labels_and_responses_compile_nothing_and_fit_what_they_say():
    rng = np.random.default_rng(0)
    fit, exact = (make_fit(linear_head(), FitConfig(members=1)) for _ in range(2))
    for size, count in ((30, 9), (40, 16), (31, 12)):
        embeddings = rng.normal(size=(size, 3))
        pairs = (rng.integers(0, 12, (count, 1)) + rng.permuted([[0, 1]] * count, axis=1)) % size
        labels, weights = rng.uniform(size=count), rng.uniform(1, 2, count)
        given = label_pairs(embeddings, pairs, labels, weights)
        with count_compilations() as compiled:
            params, _ = fit(jax.random.key(0), HParams(), *given)
        assert not compiled or size == 30, compiled
    first, second = pairs.T.astype(np.int32)
    plain = Labelled(first, second, np.float32(labels), np.float32(weights), np.ones(count, bool))
    whole, _ = exact(jax.random.key(0), HParams(), jnp.float32(embeddings), jax.tree.map(jnp.asarray, plain))
    np.testing.assert_allclose(params["out"]["kernel"], whole["out"]["kernel"], rtol=1e-4)


@pytest.mark.core
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": [[0, 1]]}, r"pairs have shape \(1, 2\), labels \(2,\)"),
        ({"pairs": [[0, 1], [1, 5]]}, r"Row 1 of pairs is \(1, 5\): .* 0 to 4"),
        ({"pairs": [[0, 1], [2, 2]]}, r"Row 1 of pairs is \(2, 2\)"),
        ({"labels": [0, 1.5]}, "Row 1 of labels is 1.5"),
        ({"labels": [np.nan, 1]}, "Row 0 of labels is nan"),
        ({"weights": [1, -1]}, "Row 1 of weights is -1"),
        ({"labels": [], "pairs": np.zeros((0, 2), int)}, "no labels"),
        ({"embeddings": np.ones(5)}, r"shape \(5,\)"),
        ({"embeddings": np.full((5, 2), np.nan)}, "Row 0 of embeddings"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(JarmError, match=message):
        label_pairs(**{"embeddings": np.eye(5), "pairs": [[0, 1], [1, 2]], "labels": [0, 1]} | change)
