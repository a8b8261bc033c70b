import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import leverages64

from jarm.design.fisher import (
    centred,
    chunked,
    fisher_weight,
    pair_information,
    pair_variance,
    space_information,
    within_covariance,
)
from jarm.design.spaces import listed_space, pair_space
from jarm.testing.conformance import SPACES
from jarm.testing.references import information64, list_pairs
from jarm.testing.tracing import quick_jit

pytestmark = pytest.mark.core

information = quick_jit(space_information, static_argnames="tile")


def problem(seed, kind, prompts=5, width=4, features=6, scale=1.0):
    rng = np.random.default_rng(seed)
    size = prompts * width
    phi = rng.normal(size=(size, features)).astype(np.float32)
    rewards = (scale * rng.normal(size=size)).astype(np.float32)
    eligible = jnp.asarray(rng.random(size) < 0.8)
    if kind == "listed":
        space = listed_space(jnp.asarray(rng.integers(0, size + 1, (50, 2)), jnp.int32), eligible, width)
    else:
        space = pair_space(kind, width, eligible, jnp.asarray(rng.integers(0, size + 1, (9, 2)), jnp.int32))
    return phi, rewards, space


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize(("shape", "tile"), [((5, 4, 6), 1 << 19), ((5, 4, 6), 47), ((7, 3, 2), 1)])
def test_information_of_a_space_is_the_sum_over_its_pairs(kind, shape, tile):
    for seed in range(4):
        phi, rewards, space = problem(seed, kind, *shape)
        pairs = list_pairs(space)
        for given in (rewards, None) if tile == 47 else (rewards,):
            expected = information64(phi, given, pairs)
            total, count = information(
                jnp.asarray(phi), None if given is None else jnp.asarray(given), space, tile=tile
            )
            assert count == len(pairs)
            np.testing.assert_allclose(total, expected, rtol=1e-5, atol=2e-6 * max(np.trace(expected), 1e-6))
            np.testing.assert_array_equal(total, total.T)


@pytest.mark.parametrize("kind", SPACES)
def test_the_covariance_within_prompts_is_of_every_eligible_response(kind):
    """Of those in no pair of a list, too."""
    for seed in range(3):
        phi, _, space = problem(seed, kind)
        prompts = np.float64(phi).reshape(5, 4, -1)
        real = np.asarray(space.eligible).reshape(5, 4)
        rows = [own[some] - own[some].mean(axis=0) for own, some in zip(prompts, real, strict=True) if some.any()]
        wanted = sum(row.T @ row for row in rows) / real.sum()
        np.testing.assert_allclose(within_covariance(jnp.asarray(phi), space), wanted, rtol=1e-4, atol=1e-6)
        if kind == "listed":
            few = listed_space(space.pairs[:3], space.eligible, 4)
            np.testing.assert_allclose(within_covariance(jnp.asarray(phi), few), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", SPACES)
def test_information_of_features_with_a_large_common_part(kind):
    """A thousand times the spread: differences do not see it, and float32 must not either."""
    phi, rewards, space = problem(0, kind)
    phi = phi + np.float32(1024)
    if kind == "within":  # and each prompt has its own
        phi = phi + 512 * np.arange(5, dtype=np.float32).repeat(4)[:, None]
    total, _ = information(jnp.asarray(phi), jnp.asarray(rewards), space)
    expected = information64(phi, rewards, list_pairs(space))
    np.testing.assert_allclose(total, expected, atol=1e-5 * np.trace(expected))


@pytest.mark.parametrize("kind", SPACES)
def test_equal_features_have_no_information_at_all(kind):
    """Exactly none: rounding noise would pass for information and a batch of noise be selected."""
    for seed in range(10):
        _, rewards, space = problem(seed, kind)
        rng = np.random.default_rng(seed)
        phi = np.tile(rng.normal(size=6) * 10 ** rng.uniform(-3, 3), (20, 1))
        if kind == "within":
            phi = phi + rng.normal(size=(5, 1)).repeat(4, axis=0)
        total, _ = information(jnp.float32(phi), jnp.asarray(rewards), space)
        np.testing.assert_array_equal(total, np.zeros((6, 6)))


@pytest.mark.parametrize("kind", SPACES)
def test_responses_that_no_pair_can_reach_may_hold_anything(kind):
    phi, rewards, space = problem(3, kind)
    total, count = information(jnp.asarray(phi), jnp.asarray(rewards), space)
    unreachable = ~np.asarray(space.eligible)
    assert unreachable.any()
    phi[unreachable], rewards[unreachable] = np.nan, np.inf
    again, count_again = information(jnp.asarray(phi), jnp.asarray(rewards), space)
    np.testing.assert_array_equal(again, total)
    assert count_again == count
    assert np.isfinite(centred(jnp.asarray(phi), space)).all()


def test_centred_features_have_the_same_differences_and_no_mean():
    for kind, groups in (("within", 5), ("cross", 1)):
        phi, _, space = problem(1, kind)
        eligible = np.asarray(space.eligible)
        out = np.asarray(centred(jnp.asarray(phi), space))
        for group in np.split(np.arange(20), groups):
            kept = group[eligible[group]]
            if len(kept):
                np.testing.assert_allclose(out[kept] - out[kept[0]], phi[kept] - phi[kept[0]], atol=1e-5)
                np.testing.assert_allclose(out[kept].mean(axis=0), 0, atol=1e-5)
        assert not out[~eligible].any()


def test_fisher_weight_keeps_its_relative_precision():
    margin = np.concatenate([np.linspace(-85, 85, 341), [1e-8, -1e-8]])
    expected = np.exp(-np.logaddexp(0, -margin) - np.logaddexp(0, margin))
    weight = fisher_weight(jnp.float32(margin))
    expected32 = np.exp(-np.logaddexp(0, -np.float64(np.float32(margin))) - np.logaddexp(0, np.float32(margin)))
    np.testing.assert_allclose(weight, expected32, rtol=1e-5)
    np.testing.assert_allclose(expected, expected32, rtol=1e-5)
    np.testing.assert_array_equal(weight, fisher_weight(-jnp.float32(margin)))
    far = fisher_weight(jnp.float32([200, -200, 1e30, np.inf, 0]))
    np.testing.assert_array_equal(far, [0, 0, 0, 0, 0.25])
    assert np.isfinite(jax.vmap(jax.grad(fisher_weight))(jnp.float32([200.0, -200.0, 30.0]))).all()


def test_pair_information():
    phi, rewards, _ = problem(0, "all")
    pairs = np.random.default_rng(0).integers(0, 20, (30, 2))
    weight = fisher_weight(jnp.asarray(rewards[pairs[:, 0]] - rewards[pairs[:, 1]]))
    total = pair_information(jnp.asarray(phi[pairs[:, 0]]), jnp.asarray(phi[pairs[:, 1]]), weight)
    np.testing.assert_allclose(total, information64(phi, rewards, pairs), rtol=1e-5, atol=1e-5)


def log_det_of_weighted_pool(weight, x, v, past):
    return jnp.linalg.slogdet(jnp.einsum("m,mi,mj->ij", weight * v, x, x) + past)[1]


@pytest.mark.parametrize("rule", ["dopt", "pa_dopt", "xtx"])
def test_closed_forms_are_the_gradient_of_log_det(rule):
    """v x^T M^-1 x is d log det(sum_m w_m v_m x_m x_m^T + past) / d w_m at w = 1: by autograd, in float64."""
    phi, rewards, space = problem(4, "cross", prompts=6)
    pairs = list_pairs(space)
    labelled = pairs[::7]
    given = None if rule == "xtx" else rewards
    past = information64(phi, rewards, labelled) if rule == "pa_dopt" else np.zeros((6, 6))
    closed = leverages64(phi, given, pairs, information64(phi, given, pairs) + past)
    with jax.enable_x64(True):
        x = np.float64(phi)[pairs[:, 0]] - np.float64(phi)[pairs[:, 1]]
        v = np.ones(len(pairs))
        if given is not None:
            margin = np.float64(rewards)[pairs[:, 0]] - np.float64(rewards)[pairs[:, 1]]
            v = np.asarray(jax.nn.sigmoid(margin) * jax.nn.sigmoid(-margin))
        gradient = jax.grad(functools.partial(log_det_of_weighted_pool, x=x, v=v, past=past))(np.ones(len(pairs)))
    np.testing.assert_allclose(closed, gradient, rtol=1e-9)
    if rule != "pa_dopt":
        np.testing.assert_allclose(closed.sum(), 6, rtol=1e-9)


@pytest.mark.parametrize(("length", "chunk"), [(10, 3), (10, 10), (10, 100), (1, 1), (0, 4)])
def test_chunks_hold_every_pair_once(length, chunk):
    pairs = jnp.arange(2 * length, dtype=jnp.int32).reshape(length, 2)
    chunks = chunked(pairs, chunk, 99)
    assert chunks.shape[1] <= chunk
    flat = np.asarray(chunks).reshape(-1, 2)
    np.testing.assert_array_equal(flat[:length], pairs)
    assert (flat[length:] == 99).all()


def test_the_variance_of_a_pair_is_that_of_the_difference():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(5, 8)) + 100 * rng.normal(size=(5, 1))  # members disagree on the level, which cancels
    pairs = np.array([[0, 1], [1, 0], [2, 7], [3, 3]])
    expected = np.var(rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]], axis=0, ddof=1)
    variance = pair_variance(jnp.float32(rewards), jnp.asarray(pairs, jnp.int32))
    np.testing.assert_allclose(variance, expected, rtol=1e-3, atol=1e-6)
    assert variance[0] == variance[1]
    assert variance[3] == 0
