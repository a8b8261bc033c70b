import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import expit

from jarm.core.base import HParams, Labelled
from jarm.core.status import JarmError, Status
from jarm.reward import laplace
from jarm.reward.config import FitConfig, HeadConfig
from jarm.reward.fit import make_fit
from jarm.reward.heads import laplace_head
from jarm.testing.tracing import count_compilations
from jarm.testing.tracing import quick_jit as jit

VARIANCE = 0.7
WIDTHS = pytest.mark.parametrize("d", [3, 30])  # the primal form, and the dual
draw = jit(jax.vmap(laplace.draw, in_axes=(0, None, None, None, None)))
covariance = jit(laplace.covariance)
solve = jit(laplace.posterior, static_argnames="steps")


def problem(d, n=20, capacity=24, seed=0):
    """Pair differences, labels of a linear teacher, weights; the last pairs weigh nothing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(capacity, d)) / np.sqrt(d)
    label = rng.random(capacity) < expit(3 * x @ rng.normal(size=d))
    weight = np.where(np.arange(capacity) < n, rng.uniform(0.5, 1.5, capacity), 0)
    return [array.astype(np.float32) for array in (x, label, weight)]


def log_joint(w, x, label, weight, variance):
    """Log likelihood and log prior density up to (2 pi s2)^(-d/2)."""
    m = np.float64(x) @ w
    nll = label * np.logaddexp(0, -m) + (1 - label) * np.logaddexp(0, m)
    return -(nll @ np.float64(weight)) - w @ w / (2 * variance)


def precision64(w, x, weight, variance):
    p = expit(np.float64(x) @ w)
    return np.eye(len(w)) / variance + (np.float64(x).T * (weight * p * (1 - p))) @ np.float64(x)


def reference(x, label, weight, variance):
    """Mode by SciPy; covariance and evidence by their formulas in float64."""
    best = minimize(lambda w: -log_joint(w, x, label, weight, variance), np.zeros(x.shape[1]), method="BFGS", tol=1e-9)
    precision = precision64(best.x, x, weight, variance)
    evidence = -best.fun - 0.5 * np.linalg.slogdet(variance * precision)[1]
    return best.x, np.linalg.inv(precision), evidence


@WIDTHS
def test_mode_covariance_and_evidence_are_those_of_scipy(d):
    x, label, weight = problem(d)
    mode, sigma, evidence = reference(x, label, weight, VARIANCE)
    found = solve(x, label, weight, jnp.float32(VARIANCE))
    np.testing.assert_allclose(found.mode, mode, atol=2e-4 * np.abs(mode).max())
    np.testing.assert_allclose(found.log_evidence, evidence, rtol=1e-5)
    np.testing.assert_allclose(
        covariance(x, weight, found.margin, jnp.float32(VARIANCE)), sigma, atol=2e-4 * np.abs(sigma).max()
    )
    assert found.status == Status.OK


def test_evidence_is_near_the_integral():
    """In one dimension the probability of the labels is a quadrature."""
    x, label, weight = problem(1, n=24)
    weight = np.ones_like(weight)
    density = lambda w: np.exp(log_joint(np.array([w]), x, label, weight, VARIANCE)) / np.sqrt(2 * np.pi * VARIANCE)  # noqa: E731
    exact = np.log(quad(density, -8, 8)[0])
    np.testing.assert_allclose(solve(x, label, weight, jnp.float32(VARIANCE)).log_evidence, exact, atol=0.02)


@WIDTHS
def test_margins_left_out_are_those_of_refits(d):
    x, label, weight = problem(d)
    found = solve(x, label, weight, jnp.float32(VARIANCE))
    without = [reference(x, label, np.where(np.arange(24) == out, 0, weight), VARIANCE)[0] for out in range(6)]
    exact = np.einsum("ld,ld->l", x[:6], without)
    np.testing.assert_allclose(found.margin_left_out[:6], exact, atol=0.02)
    assert np.abs(np.asarray(found.margin[:6]) - exact).max() > 0.1


@WIDTHS
def test_draws_have_the_moments_of_the_posterior(d, key):
    x, label, weight = problem(d)
    _, sigma, _ = reference(x, label, weight, VARIANCE)
    margin = solve(x, label, weight, jnp.float32(VARIANCE)).margin
    count = 20_000
    drawn = np.float64(draw(jax.random.split(key, count), x, weight, margin, jnp.float32(VARIANCE)))
    scale = np.sqrt(np.diag(sigma))
    assert np.abs(drawn.mean(axis=0) / scale).max() < 4.5 / np.sqrt(count)
    assert np.abs((np.cov(drawn.T) - sigma) / np.outer(scale, scale)).max() < 5 * np.sqrt(2 / count)
    assert np.abs((drawn**4).mean(axis=0) / (3 * scale**4) - 1).max() < 0.1


def fit_of(head, config):
    return jit(make_fit(head, config))


def labelled_pairs(seed=0, d=4):
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(16, d)).astype(np.float32)
    first, second = (jnp.asarray(rng.permutation(16)[:12], jnp.int32) for _ in range(2))
    ones = jnp.ones(12, jnp.float32)
    label = jnp.asarray(embeddings[first, 0] > embeddings[second, 0] + rng.normal(size=12), jnp.float32)
    return jnp.asarray(embeddings), Labelled(first, second, label, ones, jnp.arange(12) < 9)


@pytest.mark.slow
def test_members_are_draws_around_the_mode(key):
    embeddings, labelled = labelled_pairs()
    x = embeddings[labelled.first] - embeddings[labelled.second]
    weight = labelled.mask.astype(jnp.float32)
    mode, sigma, _ = reference(*map(np.asarray, (x, labelled.label, weight)), VARIANCE)
    hparams = HParams(prior_variance=VARIANCE)
    keys = jax.random.split(key, 2)
    params, info = fit_of(laplace_head(), FitConfig(members=2000))(keys[0], hparams, embeddings, labelled)
    weights = np.float64(jax.vmap(laplace_head().weights)(params))
    np.testing.assert_allclose(weights.mean(axis=0), mode, atol=1e-4)
    np.testing.assert_allclose(np.cov(weights.T), sigma, atol=0.2 * np.abs(sigma).max())
    np.testing.assert_allclose(params["prior_precision"], 1 / VARIANCE, rtol=1e-6)
    assert info.train_nll.shape == info.steps.shape == (2000,)
    assert info.status == Status.OK
    alone, one = fit_of(laplace_head(), FitConfig(members=1))(keys[1], hparams, embeddings, labelled)
    np.testing.assert_allclose(alone["out"]["kernel"][0, :, 0], mode, atol=1e-4)
    nll = np.logaddexp(0, np.where(labelled.label > 0, -1, 1) * np.float64(x @ mode.astype(np.float32)))
    np.testing.assert_allclose([one.train_nll[0], info.train_nll[7]], nll[:9].mean(), rtol=1e-4)


def test_evidence_chooses_the_prior_variance_also_where_fits_are_mapped():
    fit = make_fit(laplace_head(), FitConfig(members=3, evidence=True))
    embeddings, labelled = labelled_pairs()
    seeds, variances = jnp.arange(2, dtype=jnp.int32), jnp.array([0.1, 0.4], jnp.float32)

    def one(seed, variance, embeddings=embeddings, labelled=labelled):
        return fit(jax.random.key(seed), HParams(prior_variance=variance), embeddings, labelled)

    once = jit(one)
    in_turn = [once(*each, embeddings, labelled) for each in zip(seeds, variances, strict=True)]
    other = (jnp.int32(2), jnp.float32(0.5), *labelled_pairs(1))
    with count_compilations() as compiled:
        jax.block_until_ready(once(*other))
    assert not compiled
    mapped = jit(jax.vmap(one))(seeds, variances)
    x = np.asarray(embeddings[labelled.first] - embeddings[labelled.second])
    weight, found = np.asarray(labelled.mask, np.float32), []
    for at, alone in enumerate(in_turn):
        grid = float(variances[at]) * np.array(laplace.EVIDENCE_GRID)
        best = int(np.argmax([reference(x, np.asarray(labelled.label), weight, each)[2] for each in grid]))
        np.testing.assert_allclose(1 / alone[0]["prior_precision"], grid[best], rtol=1e-5)
        found.append(best)
        for leaf, mapped_leaf in zip(jax.tree.leaves(alone[0]), jax.tree.leaves(mapped[0]), strict=True):
            np.testing.assert_allclose(mapped_leaf[at], leaf, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(mapped[1].valid_nll[at], alone[1].valid_nll, rtol=1e-3)
    assert min(found) > 0
    assert max(found) < len(laplace.EVIDENCE_GRID) - 1


def test_what_cannot_be_is_a_sentence():
    assert str(HeadConfig.parse("laplace")) == "laplace"
    assert HeadConfig.parse("laplace").head() is laplace_head()
    with pytest.raises(JarmError, match="no hidden layers: give"):
        HeadConfig((4,), laplace=True)
    with pytest.raises(JarmError, match="Cannot read the head 'laplace:4'"):
        HeadConfig.parse("laplace:4")
    for wrong in ({"ensemble": "bootstrap"}, {"loss": "classification"}):
        with pytest.raises(JarmError, match="draws of its Bradley-Terry posterior"):
            make_fit(laplace_head(), FitConfig(**wrong))
    for variance in (0.0, -1.0, np.array([0.1, 0.0])):
        with pytest.raises(JarmError, match=r"`prior_variance` is .*: give a finite number of at least 1e-06"):
            HParams(prior_variance=variance)
