"""Equal rows get one number, whatever their type, in parts as in whole."""

import numpy as np
import pytest

from jarm.core import rows as module
from jarm.core.rows import count_alike, group_rows


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_groups_are_those_of_every_comparison(dtype, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    rows = rng.integers(-1, 2, (60, 3)).astype(dtype)
    rows[rows == 0] *= rng.choice([-1, 1], (rows == 0).sum()).astype(dtype)  # -0 is 0
    groups = group_rows(lambda part: rows[part], *rows.shape)
    equal = (rows[:, None] == rows[None, :]).all(axis=2)
    np.testing.assert_array_equal(groups, equal.argmax(axis=1))
    prompts = rng.integers(0, 7, 60)
    pairs = np.triu(equal, 1)
    assert count_alike(groups, prompts).tolist() == [pairs[np.ix_(prompts == p, prompts == p)].sum() for p in range(7)]


def test_rows_of_equal_hash_are_compared(monkeypatch):
    monkeypatch.setattr(module, "_hashes", lambda rows: np.zeros(len(rows), np.uint64))
    rows = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])
    assert group_rows(lambda part: rows[part], 3, 2).tolist() == [0, 1, 0]
    assert group_rows(lambda part: rows[:2][part], 2, 2) is None
