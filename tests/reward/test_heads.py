import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jarm.core.status import JarmError
from jarm.reward.config import HeadConfig
from jarm.reward.heads import ACTIVATIONS, linear_head, mlp_head

pytestmark = pytest.mark.core


def test_mlp_follows_its_formula(key):
    head = mlp_head((5, 4))
    params = head.init(key, 3)
    params = jax.tree.map(lambda p: p + 0.1, params)
    e = np.random.default_rng(0).normal(size=(2, 7, 3))
    phi = e
    for layer in (0, 1):
        z = phi @ np.float64(params["hidden"][layer]["kernel"]) + np.float64(params["hidden"][layer]["bias"])
        phi = 0.5 * z * (1 + erf(z / np.sqrt(2)))
    np.testing.assert_allclose(head.features(params, jnp.float32(e)), phi, rtol=2e-5, atol=1e-6)
    w = np.float64(params["out"]["kernel"])[:, 0]
    np.testing.assert_allclose(head.weights(params), w, rtol=1e-6)
    np.testing.assert_allclose(head.rewards(params, jnp.float32(e)), phi @ w, rtol=2e-5, atol=1e-6)


def test_linear_head_starts_at_zero_and_its_features_are_the_embeddings(key):
    head = linear_head()
    params = head.init(key, 3)
    e = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    assert head.linear
    np.testing.assert_array_equal(head.features(params, e), e)
    np.testing.assert_array_equal(head.rewards(params, e), [0, 0])


@pytest.mark.parametrize("head", [linear_head(), mlp_head((4, 3))])
def test_parameters_are_plain_float32_arrays_and_heads_are_pure(head, key):
    params = head.init(key, 3)
    assert all(type(p).__module__.startswith("jax") and p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    assert not any(p.weak_type for p in jax.tree.leaves(params))
    chex.assert_trees_all_equal(params, head.init(jax.random.clone(key), 3))
    e = jnp.ones((2, 3))
    members = jax.vmap(lambda k: head.init(k, 3))(jax.random.split(jax.random.clone(key), 5))
    together = jax.jit(jax.vmap(head.rewards, (0, None)))(members, e)
    assert together.shape == (5, 2)
    first = head.rewards(jax.tree.map(lambda p: p[0], members), e)
    np.testing.assert_allclose(together[0], first, rtol=1e-6)
    assert jax.eval_shape(head.features, params, e).shape == (2, head.weights(params).shape[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_runs_and_keeps_the_scale(activation, key):
    head = mlp_head((256,), activation)
    e = jax.random.normal(key, (64, 128))
    phi = head.features(head.init(jax.random.fold_in(key, 1), 128), e)
    assert 0.3 < float(jnp.sqrt((phi**2).mean())) < 1.0


@pytest.mark.parametrize("text", ["linear", "mlp:64,64,64:gelu", "mlp:8:relu"])
def test_head_config_round_trip(text):
    assert str(HeadConfig.parse(text)) == text
    assert hash(HeadConfig.parse(text)) == hash(HeadConfig.parse(text))


def test_head_config_short_forms(key):
    assert HeadConfig.parse("mlp") == HeadConfig()
    assert HeadConfig.parse("mlp:8,4") == HeadConfig((8, 4), "gelu")
    assert HeadConfig.parse("linear").head().linear
    assert HeadConfig((8, 4)).head().weights(mlp_head((8, 4)).init(key, 3)).shape == (4,)


@pytest.mark.parametrize(
    "text", ["", "mpl:64", "mlp:a", "mlp:0", "mlp:-3,4", "linear:3", "mlp:8:selu", "mlp:8,,8", "mlp:", "mlp::relu"]
)
def test_bad_heads_are_named(text):
    with pytest.raises(JarmError, match=r"."):
        HeadConfig.parse(text)


def test_bad_layers_are_named():
    with pytest.raises(JarmError, match="hidden layers"):
        mlp_head(())
    with pytest.raises(JarmError, match="activation 'selu'"):
        mlp_head(activation="selu")
