import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jarm.acquisition.optimal_design import prior_information
from jarm.core.base import HParams
from jarm.core.status import JarmError, check
from jarm.core.tables import ResponseTable
from jarm.design.spaces import pair_space
from jarm.loop.belief import Offer, form_belief
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import prepare
from jarm.loop.loop import make_loop
from jarm.reward.config import HeadConfig
from jarm.reward.laplace import covariance
from jarm.testing.tracing import count_compilations
from jarm.testing.tracing import quick_jit as jit

PROMPTS, WIDTH, D = 9, 4, 5
LAPLACE = HeadConfig.parse("laplace")


def make_table(seed=0, scale=1.0):
    """Linear gold; ragged prompts, none with fewer than two responses."""
    rng = np.random.default_rng(seed)
    store = scale * rng.normal(size=(PROMPTS * WIDTH, D))
    mask = np.ones((PROMPTS, WIDTH), bool)
    mask[2, 3] = mask[5, 0] = mask[5, 2] = False
    gold = (store @ rng.normal(size=D)).reshape(PROMPTS, WIDTH) / scale
    rows = np.arange(PROMPTS * WIDTH).reshape(PROMPTS, WIDTH)
    return ResponseTable(store.astype(np.float32), rows, mask, gold=np.where(mask, gold, 0).astype(np.float32))


CONFIG = LoopConfig(rules=("random", "bald_laplace"), rounds=2, batch=4, initial=6, head=LAPLACE)
LOOP = make_loop(CONFIG)
run = jit(LOOP.run)


def within64(table):
    """Mean squared distance of a response from the mean of its prompt."""
    rows = zip(table.embeddings().astype(np.float64), table.mask, strict=True)
    return sum(np.square(e[real] - e[real].mean(axis=0)).sum() for e, real in rows) / table.mask.sum()


@pytest.mark.slow
def test_the_prior_of_a_rule_is_that_of_the_head():
    """A0 is the inverse covariance of the posterior, whatever prior the rule would have."""
    table = make_table()
    device_table, hparams, _ = prepare(CONFIG, table, HParams(prior_variance=0.4))
    np.testing.assert_allclose(device_table.spread_within, within64(table), rtol=1e-6)
    state, _ = run(jax.random.key(0), hparams, device_table, 0)
    labelled, eligible = state.labelled, device_table.mask.reshape(-1)
    offer = Offer(None, pair_space("within", WIDTH, eligible))
    belief = jit(lambda *args: form_belief(CONFIG, LAPLACE.head(), *args))(state.params, labelled, device_table, offer)
    x = device_table.flat[labelled.first] - device_table.flat[labelled.second]
    weight, margin = labelled.mask.astype(jnp.float32), x @ state.params["out"]["kernel"].mean(axis=0)[:, 0]
    sigma = jit(covariance)(x, weight, margin, 0.4 / device_table.spread_within)
    np.testing.assert_allclose(belief.prior_precision, device_table.spread_within / 0.4, rtol=1e-5)
    prior, space = jit(prior_information, static_argnums=3), pair_space("within", WIDTH, eligible)
    for number in (0.1, 3.0):
        found = prior(dataclasses.replace(hparams, prior_weight=jnp.float32(number)), belief, space, 4)
        np.testing.assert_allclose(np.linalg.inv(np.float64(found)), sigma, rtol=1e-3, atol=1e-5 * np.abs(sigma).max())


@pytest.mark.slow
def test_units_of_the_embeddings_do_not_matter():
    """One prior variance serves embeddings of any scale: the same pairs, and the same rewards."""
    found = []
    for scale in (1.0, 1000.0):
        device_table, hparams, _ = prepare(CONFIG, make_table(scale=scale))
        _, records = run(jax.random.key(3), hparams, device_table, 1)
        check(records.status)
        found.append((records.selection.pairs, device_table.flat @ records.params["out"]["kernel"][-1, 0]))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-3)


def test_a_run_compiles_once_for_all_keys_rules_and_priors():
    device_table, hparams, _ = prepare(CONFIG, make_table())
    other = dataclasses.replace(hparams, prior_variance=jnp.float32(1)), prepare(CONFIG, make_table(1))[0]
    check(run(jax.random.key(1), hparams, device_table, 1)[1].status)
    key = jax.random.key(2)
    with count_compilations() as compiled:
        status = run(key, *other, 0)[1].status
    assert not compiled
    check(status)


def test_no_spread_within_prompts_is_a_sentence():
    table = make_table()
    single = dataclasses.replace(table, mask=table.mask & (np.arange(WIDTH) == 0))
    config = dataclasses.replace(CONFIG, pairs="cross", rounds=1, batch=2, initial=2)
    with pytest.raises(JarmError, match="No prompt has two responses with different embeddings"):
        prepare(config, single)
    prepare(dataclasses.replace(config, head=HeadConfig(())), single)
