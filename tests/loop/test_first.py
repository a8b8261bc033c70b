import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import d_optimal64, greedy_steps64, v_optimal64
from test_loop_laplace import LAPLACE, WIDTH, make_table, within64

from jarm.core.base import HParams, Limits
from jarm.core.status import JarmError, Status, check
from jarm.design.spaces import pair_space
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import prepare
from jarm.loop.loop import make_loop
from jarm.reward.config import FitConfig
from jarm.testing.tracing import count_compilations
from jarm.testing.tracing import quick_jit as jit

TABLE = make_table()
ONE = FitConfig(members=1)
CONFIG = LoopConfig(rules=("greedy_dopt",), rounds=1, batch=4, initial=6, head=LAPLACE, fit=ONE, per_prompt=1)


def first_batch(config, hparams, table=TABLE):
    device_table, _, _ = prepare(config, table)
    return jit(make_loop(config).init)(jax.random.key(0), device_table, hparams)[1]


def uses(pairs):
    """Largest number of pairs with a response of any one prompt."""
    return max(collections.Counter(p for pair in np.asarray(pairs) for p in set((pair // WIDTH).tolist())).values())


@pytest.mark.parametrize("first", ["d_opt", "v_opt"])
def test_the_first_batch_is_the_greedy_one_of_brute_force(first):
    """At w = 0, v = 1/4, from the prior alone, with one pair a prompt; V-optimal for rankings within prompts."""
    config, variance = dataclasses.replace(CONFIG, first=first, per_prompt=None), 0.3
    batch = first_batch(config, HParams(prior_variance=jnp.float32(variance)))
    assert batch.status == Status.OK
    assert uses(batch.pairs) == 1
    features, mask = np.float64(TABLE.embeddings()), TABLE.mask
    centred = np.concatenate([e[real] - e[real].mean(axis=0) for e, real in zip(features, mask, strict=True)])
    criterion = d_optimal64() if first == "d_opt" else v_optimal64(centred, np.full(len(centred), 1 / len(centred)))
    space = pair_space("within", WIDTH, jnp.asarray(mask.reshape(-1)))
    prior = within64(TABLE) / variance * np.eye(features.shape[2])
    flat, rewards = features.reshape(-1, features.shape[2]), np.zeros(mask.size)
    # 9 prompts hold one pair each; the limit that is asked for by default is 1.25 x 6 / 9, rounded up.
    best = greedy_steps64(criterion, flat, rewards, space, prior, 6, limits=Limits(per_prompt=1))
    assert set(map(tuple, best.pairs.tolist())) == set(map(tuple, np.asarray(batch.pairs).tolist()))
    np.testing.assert_allclose(batch.gains, np.sort(best.gains)[::-1], rtol=1e-3)


@pytest.mark.parametrize("kind", ["within", pytest.param("cross", marks=pytest.mark.slow)])
def test_no_prompt_is_in_more_pairs_than_the_limit(kind):
    """Of the first and of later batches, whole and among drawn candidates, and a whole run compiles once."""
    config = dataclasses.replace(CONFIG, pairs=kind, first="d_opt", per_prompt=2, candidates=24, initial=7)
    device_table, hparams, _ = prepare(config, TABLE)
    run = jit(make_loop(config).run)
    check(run(jax.random.key(0), hparams, device_table)[1].status)
    keys = [jax.random.key(seed) for seed in (1, 2)]
    with count_compilations() as compiled:
        found = [run(key, hparams, device_table) for key in keys]
    assert not compiled
    for state, records in found:
        check(records.status)
        pairs = np.stack([state.labelled.first, state.labelled.second], axis=1)
        assert uses(pairs[:7]) <= 2
        assert uses(pairs[7:]) <= 2
        assert len(set(map(tuple, pairs.tolist()))) == 11


def test_what_cannot_be_is_a_sentence():
    with pytest.raises(JarmError, match=r"`first` is 'dopt'.*: choose one of random, d_opt, v_opt"):
        LoopConfig(first="dopt")
    with pytest.raises(JarmError, match="5 candidate pairs cannot fill a batch of 6"):
        dataclasses.replace(CONFIG, first="v_opt", candidates=5)
    with pytest.raises(JarmError, match="At most 1 per prompt are 9 pairs within prompts, fewer than the batch of 10"):
        prepare(dataclasses.replace(CONFIG, batch=10), TABLE)
    with pytest.raises(JarmError, match="are 4 pairs across prompts, fewer than the first batch of 6: raise the limit"):
        prepare(dataclasses.replace(CONFIG, pairs="cross", first="d_opt"), TABLE)
    prepare(dataclasses.replace(CONFIG, pairs="cross"), TABLE)
    single = dataclasses.replace(TABLE, mask=TABLE.mask & (np.arange(WIDTH) == 0))
    config = LoopConfig(rules=("random",), pairs="cross", first="v_opt", rounds=1, batch=2, initial=2)
    with pytest.raises(JarmError, match="the unit of the prior of a first batch by v_opt"):
        prepare(config, single)
