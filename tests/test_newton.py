import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jarm.base import Status
from jarm.newton import newton


def problem(d, n=25, capacity=32, seed=0):
    """Pair differences, noisy labels of a linear teacher, weights; the last pairs weigh nothing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(capacity, d)) / np.sqrt(d)
    label = rng.random(capacity) < 1 / (1 + np.exp(-2 * x @ rng.normal(size=d)))
    weight = np.where(np.arange(capacity) < n, rng.uniform(0.5, 1.5, capacity), 0)
    return x.astype(np.float32), label.astype(np.float32), weight.astype(np.float32)


def objective(w, x, label, weight, ridge):
    m = np.float64(x) @ w
    nll = label * np.logaddexp(0, -m) + (1 - label) * np.logaddexp(0, m)
    return nll @ np.float64(weight) + ridge / 2 * w @ w


def solve(x, label, weight, ridge, start=None):
    start = jnp.zeros(x.shape[1]) if start is None else start
    return newton(jnp.asarray(x), jnp.asarray(label), jnp.asarray(weight), jnp.float32(ridge), start)


@pytest.mark.parametrize("d", [4, 40])  # the primal form, and the dual
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_finds_the_minimum_that_scipy_finds(d, ridge):
    x, label, weight = problem(d)
    found = solve(x, label, weight, ridge)
    best = minimize(objective, np.zeros(d), (x, label, weight, ridge), method="BFGS", options={"gtol": 1e-8})
    np.testing.assert_allclose(found.weights, best.x, rtol=2e-3, atol=2e-3 * np.abs(best.x).max())
    value = objective(np.float64(found.weights), x, label, weight, ridge)
    np.testing.assert_allclose(value, best.fun, rtol=1e-5)
    np.testing.assert_allclose(found.margin, x @ found.weights, rtol=1e-4, atol=1e-5)
    assert found.status == Status.OK
    assert found.steps < 15


@pytest.mark.parametrize("d", [4, 40])
def test_a_far_start_is_reached_from_by_halving(d, key):
    x, label, weight = problem(d)
    near = solve(x, label, weight, 0.5)
    far = solve(x, label, weight, 0.5, 100 * jax.random.normal(key, (d,)))
    np.testing.assert_allclose(far.weights, near.weights, rtol=1e-3, atol=1e-3)
    assert far.status == Status.OK


@pytest.mark.parametrize("d", [4, 40])
def test_margins_left_out_are_those_of_refits(d):
    x, label, weight = problem(d)
    found = solve(x, label, weight, 0.5)
    refit = jax.vmap(lambda w: newton(jnp.asarray(x), jnp.asarray(label), w, jnp.float32(0.5), jnp.zeros(d)))
    without = refit(jnp.asarray(weight)[None, :] * (1 - jnp.eye(len(x))))
    exact = np.einsum("ld,ld->l", x, without.weights)
    np.testing.assert_allclose(found.margin_left_out, exact, rtol=0.1, atol=0.03)
    assert np.abs(found.margin - exact)[weight > 0].max() > 0.3


def test_primal_and_dual_agree():
    x, label, weight = problem(12, n=10, capacity=12)
    primal = solve(x, label, weight, 0.5).weights
    wider = np.hstack([x, np.zeros((12, 1), np.float32)])  # 12 pairs in 13 dimensions
    np.testing.assert_allclose(solve(wider, label, weight, 0.5).weights[:12], primal, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d", [4, 40])
def test_without_a_ridge_separable_pairs_are_a_status(d):
    x, _, weight = problem(d)
    label = (x[:, 0] > 0).astype(np.float32)
    found = solve(x, label, weight, 0.0)
    assert found.status == Status.SINGULAR
    assert np.isfinite(found.weights).all()


def test_a_start_that_is_not_finite_is_a_status():
    assert solve(*problem(4), 1.0, jnp.full(4, jnp.nan)).status >= Status.SINGULAR


def test_soft_labels_and_no_pairs():
    x, label, weight = problem(4)
    even = solve(x, np.full_like(label, 0.5), weight, 1.0)
    np.testing.assert_allclose(even.weights, 0, atol=1e-6)
    assert even.steps <= 1
    nothing = solve(x, label, np.zeros_like(weight), 1.0)
    np.testing.assert_array_equal(nothing.weights, 0)
    assert nothing.status == Status.OK
