import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jarm.core.linalg import cholesky, inverse_factor, jitter, log_det, matmul
from jarm.core.status import Status

pytestmark = pytest.mark.core


def positive(rng, size, spread=1.0):
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return (basis * np.logspace(0, -spread, size)) @ basis.T


@pytest.mark.parametrize("size", [1, 2, 17])
def test_factor_and_log_det_against_float64(size):
    rng = np.random.default_rng(size)
    matrix = positive(rng, size, 2) * 37
    factor, status = inverse_factor(jnp.float32(matrix))
    x = rng.normal(size=(9, size))
    expected = (x * np.linalg.solve(matrix, x.T).T).sum(axis=1)
    np.testing.assert_allclose(np.square(x @ np.float64(factor).T).sum(axis=1), expected, rtol=1e-4)
    assert status == Status.OK
    value, status = log_det(jnp.float32(matrix))
    np.testing.assert_allclose(value, np.linalg.slogdet(matrix)[1], rtol=1e-5, atol=1e-5)
    assert status == Status.OK


@pytest.mark.parametrize(
    "matrix",
    [
        np.diag([1.0, -1.0, -1.0]),  # slogdet calls this log det 0, sign +1
        np.diag([1.0, 0.0, 1.0]),
        np.zeros((3, 3)),
        np.full((3, 3), np.nan),
        np.diag([1.0, np.inf, 1.0]),
    ],
)
def test_a_matrix_that_is_not_positive_definite_has_a_status(matrix):
    for function in (cholesky, inverse_factor, log_det):
        _, status = function(jnp.float32(matrix))
        assert status == Status.SINGULAR
        assert status.dtype == jnp.int32


def test_one_bad_matrix_of_a_batch_leaves_the_others_alone():
    batch = jnp.stack([jnp.eye(3), -jnp.eye(3), 2 * jnp.eye(3)])
    value, status = jax.vmap(log_det)(batch)
    np.testing.assert_array_equal(status, [Status.OK, Status.SINGULAR, Status.OK])
    np.testing.assert_allclose(value[::2], [0, 3 * np.log(2)], atol=1e-6)
    assert np.isnan(value[1])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("rank", [1, 5, 15])
def test_jitter_scales_with_the_matrix_and_makes_any_rank_pass(scale, rank):
    x = np.random.default_rng(rank).normal(size=(rank, 16))
    matrix = jnp.float32(x.T @ x * scale)
    assert cholesky(jitter(matrix))[1] == Status.OK
    np.testing.assert_allclose(jitter(matrix), matrix, atol=5e-7 * np.trace(matrix))
    # It changes nothing where nothing is: zero stays singular.
    assert cholesky(jitter(jnp.zeros((4, 4))))[1] == Status.SINGULAR


def test_matmul():
    a, b = np.random.default_rng(0).normal(size=(2, 30, 30))
    np.testing.assert_allclose(matmul(jnp.float32(a), jnp.float32(b)), a @ b, rtol=1e-4, atol=1e-5)
