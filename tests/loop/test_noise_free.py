import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from marks import sampled

from jarm.core.base import HParams
from jarm.core.status import check
from jarm.core.tables import ResponseTable
from jarm.evaluation.annotators import AnnotatorConfig, annotate, chances
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import prepare
from jarm.loop.loop import make_loop
from jarm.reward.config import FitConfig, HeadConfig
from jarm.testing.tracing import quick_jit as jit

PROMPTS, WIDTH, D = 9, 4, 5


def make_table(seed=0):
    rng = np.random.default_rng(seed)
    store = rng.normal(size=(PROMPTS * WIDTH, D)).astype(np.float32)
    gold = (store @ rng.normal(size=D)).reshape(PROMPTS, WIDTH)
    length = rng.integers(1, 90, gold.shape).astype(np.float32)
    rows = np.arange(PROMPTS * WIDTH).reshape(PROMPTS, WIDTH)
    return ResponseTable(store, rows, np.ones(gold.shape, bool), gold=gold, attributes={"length": length})


def make_config(head="linear", **given):
    fit = FitConfig(members=1, steps=30)
    return LoopConfig(
        ("random",), rounds=2, batch=4, initial=6, head=HeadConfig.parse(head), fit=fit, noise_free=True, **given
    )


@pytest.mark.slow
def test_the_refit_is_a_direct_fit_to_the_chances_of_the_same_pairs():
    """Chances from the formula and the minimum by SciPy, both in float64."""
    config, table = make_config(annotator=AnnotatorConfig(length_bias=0.5)), make_table()
    device_table, hparams, scale = prepare(config, table, HParams(noise=3.0))
    state, records = jit(make_loop(config).run)(jax.random.key(0), hparams, device_table)
    check(records.status)
    check(records.noise_free_status)
    gold, length, e = table.gold.reshape(-1), table.attributes["length"].reshape(-1), np.float64(table.store)
    i, j = np.asarray(state.labelled.first), np.asarray(state.labelled.second)
    assert state.labelled.mask.all()
    chance = scipy.special.expit(3 * (gold[i] - gold[j]) / scale + 0.5 * (length[i] - length[j]) / length.std())

    def loss(w, label):
        margin = (e[i] - e[j]) @ w
        return (np.logaddexp(0, -margin) * label + np.logaddexp(0, margin) * (1 - label)).sum() + w @ w / 2

    for params, label in ((records.noise_free, chance), (state.params, np.asarray(state.labelled.label))):
        best = scipy.optimize.minimize(loss, np.zeros(D), label, tol=1e-10).x
        np.testing.assert_allclose(params["out"]["kernel"][0, :, 0], best, atol=1e-4)
    assert set(np.asarray(state.labelled.label)) == {0, 1}
    jax.tree.map(lambda last, each: np.testing.assert_array_equal(last, each[-1]), state.params, records.params)
    assert int(state.round) == 4
    assert len(records.labels) == 3


@pytest.mark.parametrize("head", sampled(["laplace", "mlp:8"], "laplace"))
def test_of_labels_without_noise_the_refit_is_the_last_fit(head):
    """In every number, so that it differs in nothing but the labels."""
    config = make_config(head, annotator=AnnotatorConfig("perfect"))
    device_table, hparams, _ = prepare(config, make_table())
    state, records = jit(make_loop(config).run)(jax.random.key(0), hparams, device_table)
    check(records.status)
    jax.tree.map(np.testing.assert_array_equal, records.noise_free, state.params)


@pytest.mark.parametrize("kind", ["bradley_terry", "flip", "perfect"])
def test_chances_are_means_of_labels(kind):
    config = AnnotatorConfig(kind, flip_rate=0.2 if kind == "flip" else None, length_bias=0.3)
    rng = np.random.default_rng(0)
    gold, lengths = (jnp.asarray(rng.normal(size=6), jnp.float32) for _ in range(2))
    given = config, jnp.float32(2), jnp.asarray([[0, 1], [3, 2], [5, 4], [1, 0]]), gold, lengths, -gold
    keys = jax.random.split(jax.random.key(0), 4000)
    labels = jit(jax.vmap(lambda key: annotate(key, *given)[0]))(keys)
    expected = chances(*given)
    np.testing.assert_allclose(labels.mean(axis=0), expected, atol=0.03)
    np.testing.assert_allclose(expected[0] + expected[3], 1, rtol=1e-6)
