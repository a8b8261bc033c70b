import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jarm.reward.losses import bradley_terry, classification, smooth

pytestmark = pytest.mark.core

rewards = st.floats(-200, 200, width=32)
labels = st.floats(0, 1, width=32)


def sigmoid(m):
    m = np.float64(m)
    return np.where(m < 0, np.exp(np.minimum(m, 0)) / (1 + np.exp(np.minimum(m, 0))), 1 / (1 + np.exp(-np.abs(m))))


def reference(m, y):
    m, y = np.float64(m), np.float64(y)
    return y * np.logaddexp(0, -m) + (1 - y) * np.logaddexp(0, m)


@pytest.mark.parametrize("margin", [-200.0, -80.0, -28.0, -17.0, -1.0, 0.0, 1.0, 17.0, 28.0, 80.0, 200.0])
@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_value_and_gradient_are_exact_at_any_margin(margin, label):
    value, gradient = jax.value_and_grad(bradley_terry)(jnp.float32(margin), jnp.float32(label))
    label = float(np.float32(label))
    np.testing.assert_allclose(value, reference(margin, label), rtol=1e-6, atol=1e-37)
    # sigmoid(m) - label without its cancellation, in float64
    exact = sigmoid(margin) if label == 0 else -sigmoid(-margin) if label == 1 else sigmoid(margin) - label
    np.testing.assert_allclose(gradient, exact, rtol=1e-6, atol=1e-37)


@settings(deadline=None)
@given(rewards, rewards, labels)
def test_classification_bounds_bradley_terry(first, second, label):
    first, second, label = jnp.float32(first), jnp.float32(second), jnp.float32(label)
    bound = classification(first, second, label)
    assert bound >= bradley_terry(first - second, label) - 1e-5 * (1 + abs(bound))
    witness = reference(first, label) + reference(second, 1 - np.float64(label))
    np.testing.assert_allclose(bound, witness, rtol=1e-4)


@settings(deadline=None)
@given(rewards, labels)
def test_swapping_the_responses_changes_nothing(margin, label):
    margin, label = jnp.float32(margin), jnp.float32(label)
    np.testing.assert_allclose(bradley_terry(margin, label), bradley_terry(-margin, 1.0 - label), rtol=1e-4, atol=1e-5)


def test_smoothing_keeps_even_odds_and_bounds_the_best_margin():
    np.testing.assert_allclose(smooth(jnp.array([0.0, 0.5, 1.0]), 0.2), [0.1, 0.5, 0.9], rtol=1e-6)
    best = jax.grad(bradley_terry)(jnp.log(jnp.float32(9.0)), smooth(jnp.float32(1.0), 0.2))
    np.testing.assert_allclose(best, 0, atol=1e-6)
