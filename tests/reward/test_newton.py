import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from scipy.optimize import minimize

from jarm.core.status import Status
from jarm.reward.newton import newton

fit = jax.jit(newton, static_argnames="steps")


def problem(d, n=25, capacity=32, seed=0):
    """Pair differences, noisy labels of a linear teacher, weights; the last pairs weigh nothing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(capacity, d)) / np.sqrt(d)
    label = rng.random(capacity) < 1 / (1 + np.exp(-2 * x @ rng.normal(size=d)))
    weight = np.where(np.arange(capacity) < n, rng.uniform(0.5, 1.5, capacity), 0)
    return x.astype(np.float32), label.astype(np.float32), weight.astype(np.float32)


def criterion(w, x, label, weight, ridge):
    m = np.float64(x) @ w
    nll = label * np.logaddexp(0, -m) + (1 - label) * np.logaddexp(0, m)
    return nll @ np.float64(weight) + ridge / 2 * w @ w


def solve(x, label, weight, ridge, start=None, steps=30):
    start = jnp.zeros(x.shape[1]) if start is None else start
    return fit(jnp.asarray(x), jnp.asarray(label), jnp.asarray(weight), jnp.float32(ridge), start, steps=steps)


@pytest.mark.parametrize("d", [4, 40])  # the primal form, and the dual
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_finds_the_minimum_that_scipy_finds(d, ridge):
    x, label, weight = problem(d)
    found = solve(x, label, weight, ridge)
    best = minimize(criterion, np.zeros(d), (x, label, weight, ridge), method="BFGS", options={"gtol": 1e-8})
    np.testing.assert_allclose(found.weights, best.x, rtol=2e-3, atol=2e-3 * np.abs(best.x).max())
    value = criterion(np.float64(found.weights), x, label, weight, ridge)
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


def least(x, label, weight, ridge):
    """The least criterion, by damped Newton steps from zero in float64."""
    x, w = np.float64(x), np.zeros(x.shape[1])
    for _ in range(500):
        p, q = scipy.special.expit(x @ w), scipy.special.expit(-x @ w)
        gradient = x.T @ (weight * ((1 - label) * p - label * q)) + ridge * w
        direction = -np.linalg.solve((x.T * (weight * p * q)) @ x + ridge * np.eye(len(w)), gradient)
        now, decrease = criterion(w, x, label, weight, ridge), -gradient @ direction
        if decrease <= 1e-12 * now:
            return now
        t = 1.0
        while criterion(w + t * direction, x, label, weight, ridge) > now - 1e-4 * t * decrease:
            t /= 2
        w = w + t * direction
    raise AssertionError("no minimum")


@pytest.mark.parametrize("d", [24, 80])  # the primal form, and the dual
@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("ridge", [1.0, 1e-2, 1e-4, 1e-6])
def test_ok_is_a_minimum_from_any_start(d, scale, ridge):
    """Saturated margins have no curvature: a whole step is too long by many orders of magnitude."""
    rng = np.random.default_rng(0)
    x = (scale * rng.normal(size=(64, d))).astype(np.float32)
    label = (rng.random(64) < 1 / (1 + np.exp(-x @ rng.normal(size=d) / scale))).astype(np.float32)
    weight, half = np.ones(64, np.float32), (np.arange(64) < 32).astype(np.float32)
    flipped = np.where(rng.random(64) < 0.1, 1 - label, label)
    wrong = np.linalg.lstsq(np.float64(x), 2 * flipped - 1, rcond=None)[0]  # all margins -1 or 1, or nearly
    best = least(x, label, weight, ridge)
    starts = {"zero": np.zeros(d), "random": rng.normal(size=d), "far": 100 * rng.normal(size=d)}
    starts |= {"warm": solve(x, label, half, ridge, steps=60).weights}
    starts |= {f"margins of {margin}": margin * wrong for margin in (5, 20, 100)}
    for name, start in starts.items():
        found = solve(x, label, weight, ridge, jnp.asarray(start, jnp.float32), steps=60)
        value = criterion(np.float64(found.weights), x, label, weight, ridge)
        assert found.status == Status.OK, name
        np.testing.assert_allclose(value, best, rtol=1e-5, err_msg=name)
        assert found.steps < 60


def test_too_few_steps_are_a_status():
    x, label, weight = problem(4)
    assert solve(x, label, weight, 0.01, steps=1).status == Status.SINGULAR


@pytest.mark.parametrize("d", [4, 40])
@pytest.mark.slow
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
    for far in (0, 1, 10, 100, 1e4):
        found = solve(x, label, weight, 0.0, far * jnp.eye(d)[0])
        assert found.status == Status.SINGULAR
        assert np.isfinite(found.weights).all()


def test_a_start_that_is_not_finite_is_a_status():
    assert solve(*problem(4), 1.0, jnp.full(4, jnp.nan)).status == Status.DIVERGED


def test_soft_labels_and_no_pairs():
    x, label, weight = problem(4)
    even = solve(x, np.full_like(label, 0.5), weight, 1.0)
    np.testing.assert_allclose(even.weights, 0, atol=1e-6)
    assert even.steps <= 1
    nothing = solve(x, label, np.zeros_like(weight), 1.0)
    np.testing.assert_array_equal(nothing.weights, 0)
    assert nothing.status == Status.OK
