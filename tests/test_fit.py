import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jarm.base import HParams, JarmError, Labelled, Status
from jarm.fit import FitConfig, make_fit
from jarm.heads import linear_head, mlp_head

SMALL = mlp_head((8, 4))
HPARAMS = HParams(learning_rate=jnp.float32(1e-2), weight_decay=jnp.float32(1e-2), ridge=jnp.float32(0.5))


def problem(n=60, capacity=100, responses=120, d=6, seed=0):
    """Embeddings, labels from a linear teacher with noise, and the teacher's rewards."""
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(responses, d)).astype(np.float32)
    gold = embeddings @ rng.normal(size=d)
    first, second = rng.integers(responses, size=(2, capacity))
    label = rng.random(capacity) < 1 / (1 + np.exp(gold[second] - gold[first]))
    mask = np.arange(capacity) < n
    first, second = np.where(mask, first, 0), np.where(mask, second, 0)
    labelled = Labelled(
        jnp.asarray(first, jnp.int32),
        jnp.asarray(second, jnp.int32),
        jnp.asarray(label, jnp.float32),
        jnp.ones(capacity, jnp.float32),
        jnp.asarray(mask),
    )
    return jnp.asarray(embeddings), labelled, gold


def objective64(w, embeddings, labelled, ridge, keep):
    x = np.float64(embeddings)[labelled.first] - np.float64(embeddings)[labelled.second]
    m, y = x @ w, np.float64(labelled.label)
    nll = y * np.logaddexp(0, -m) + (1 - y) * np.logaddexp(0, m)
    return (nll * np.float64(labelled.weight))[keep].sum() + ridge / 2 * w @ w


@pytest.mark.parametrize("d", [6, 40])  # fewer and more dimensions than pairs
@pytest.mark.parametrize("warm", [False, True])
def test_newton_finds_the_minimum(d, warm, key):
    embeddings, labelled, _ = problem(n=25, capacity=32, d=d)
    start = {"out": {"kernel": jax.random.normal(jax.random.fold_in(key, 1), (1, d, 1)) * 5}} if warm else None
    params, info = make_fit(linear_head())(key, HPARAMS, embeddings, labelled, start)
    args = embeddings, labelled, 0.5, np.asarray(labelled.mask)
    best = minimize(objective64, np.zeros(d), args, method="BFGS", options={"gtol": 1e-9, "maxiter": 10_000})
    w = np.asarray(params["out"]["kernel"])[0, :, 0]
    np.testing.assert_allclose(w, best.x, rtol=1e-3, atol=1e-3)
    assert info.status == Status.OK
    assert info.steps[0] < 30
    train = (objective64(np.float64(w), *args) - 0.25 * w @ w) / 25
    np.testing.assert_allclose(info.train_nll[0], train, rtol=1e-5)


@pytest.mark.parametrize("d", [3, 40])
def test_newton_reports_the_leave_one_out_loss(d, key):
    embeddings, labelled, _ = problem(n=25, capacity=32, d=d)
    embeddings = embeddings / np.sqrt(d)
    _, info = make_fit(linear_head())(key, HPARAMS, embeddings, labelled)
    left_out = []
    for i in range(25):
        keep = np.asarray(labelled.mask) & (np.arange(32) != i)
        w = minimize(objective64, np.zeros(d), (embeddings, labelled, 0.5, keep), method="BFGS").x
        only = np.arange(32) == i
        left_out.append(objective64(w, embeddings, labelled, 0.0, only))
    np.testing.assert_allclose(info.valid_nll[0], np.mean(left_out), rtol=0.02)


def test_separable_pairs_without_a_ridge_are_a_status_not_a_number(key):
    embeddings, labelled, gold = problem(n=10, d=20)
    hparams = HParams(ridge=0.0)
    params, info = make_fit(linear_head())(key, hparams, embeddings, labelled)
    assert info.status == Status.SINGULAR
    assert np.isfinite(params["out"]["kernel"]).all()


@pytest.mark.parametrize("batch_size", [None, 16])
def test_an_mlp_learns_and_stops(batch_size, key):
    embeddings, labelled, gold = problem(n=300, capacity=300, responses=200)
    params, info = make_fit(SMALL, FitConfig(batch_size=batch_size))(key, HPARAMS, embeddings, labelled)
    rewards = SMALL.rewards(jax.tree.map(lambda p: p[0], params), embeddings)
    assert np.corrcoef(rewards, gold)[0, 1] > 0.85
    assert info.valid_nll[0] < 0.6
    assert 10 <= info.steps[0] < 1000
    assert info.status == Status.OK
