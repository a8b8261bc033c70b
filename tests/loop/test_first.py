import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import nightly, sampled, slow
from references import d_optimal64, greedy_steps64, v_optimal64
from test_loop_laplace import LAPLACE, WIDTH, make_table, within64

from jarm.acquisition.registry import RULES
from jarm.core.base import HParams, Limits
from jarm.core.status import JarmError, Status, check
from jarm.design.spaces import listed_space, pair_space
from jarm.loop.belief import draw_candidates
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import prepare
from jarm.loop.loop import make_loop
from jarm.reward.config import FitConfig, HeadConfig
from jarm.testing.references import list_pairs
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


@pytest.mark.parametrize("first", sampled(["d_opt", "v_opt"], "v_opt"))
@pytest.mark.slow
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


@pytest.mark.slow
def test_a_limit_that_leaves_too_few_pairs_is_widened_unless_it_was_asked_for():
    """Eight prompts of two responses and one of four: ten pairs are more than their limit of two leaves."""
    mask = TABLE.mask & (np.arange(WIDTH) < 2) | (np.arange(len(TABLE.mask)) == 0)[:, None]
    uneven, config = dataclasses.replace(TABLE, mask=mask), dataclasses.replace(CONFIG, first="d_opt", initial=10)
    offered = int((mask.sum(axis=1) * (mask.sum(axis=1) - 1) // 2).sum())
    assert offered > 10 > len(mask)
    batch = first_batch(dataclasses.replace(config, per_prompt=None, batch=1), HParams(), uneven)
    assert batch.status == Status.OK
    assert len(set(map(tuple, batch.pairs.tolist()))) == 10


@pytest.mark.slow
@pytest.mark.nightly
def test_the_baseline_is_random_from_its_first_batch_on():
    """A run of `random` is the same whether the others' first batch is chosen or not; `then_random` has the chosen."""
    config = dataclasses.replace(CONFIG, rules=("random", "then_random"), per_prompt=None)
    chosen, drawn = dataclasses.replace(config, first="d_opt"), config
    device_table, hparams, _ = prepare(chosen, TABLE)

    def labelled(config, rule):
        state, _ = jit(make_loop(config).run)(jax.random.key(0), hparams, device_table, rule)
        return np.stack([state.labelled.first, state.labelled.second], axis=1)

    np.testing.assert_array_equal(labelled(chosen, 0), labelled(drawn, 0))
    np.testing.assert_array_equal(labelled(drawn, 1), labelled(drawn, 0))
    assert set(map(tuple, labelled(chosen, 1)[:6])) == set(map(tuple, np.asarray(first_batch(chosen, hparams).pairs)))
    assert set(map(tuple, labelled(chosen, 1)[:6])) != set(map(tuple, labelled(drawn, 1)[:6]))


def covariance64():
    """Mean outer product of the responses less the mean of their prompt, all of the table."""
    rows = [np.float64(e[real] - e[real].mean(axis=0)) for e, real in zip(TABLE.embeddings(), TABLE.mask, strict=True)]
    return sum(row.T @ row for row in rows) / TABLE.mask.sum()


@pytest.mark.parametrize("candidates", [10, nightly(20)])
@pytest.mark.slow
def test_targets_are_all_responses_of_a_round_whichever_pairs_are_on_offer(candidates):
    """A first batch among few pairs, of whose responses alone features are made, is that of brute force."""
    config = dataclasses.replace(CONFIG, first="v_opt", candidates=candidates, per_prompt=None)
    table, hparams, _ = prepare(config, TABLE)
    key = jax.random.split(jax.random.split(jax.random.key(0), 3)[1])[0]
    offer = draw_candidates(config, key, make_loop(CONFIG).init(jax.random.key(0), table)[0].labelled, table)
    assert (offer.everyone is not None) == (2 * candidates < TABLE.mask.size)
    pairs = list_pairs(offer.space) if offer.responses is None else np.asarray(offer.responses)[list_pairs(offer.space)]
    values, vectors = np.linalg.eigh(covariance64())
    criterion = v_optimal64(np.sqrt(np.maximum(values, 0))[:, None] * vectors.T, np.ones(len(values)))
    flat, prior = np.float64(TABLE.embeddings()).reshape(TABLE.mask.size, -1), within64(TABLE) / 0.1 * np.eye(5)
    space = listed_space(jnp.asarray(pairs, jnp.int32), jnp.asarray(TABLE.mask.reshape(-1)), WIDTH)
    limit = max(limit for limit in (1, 2, 4, 6) if limit <= uses(first_batch(config, hparams).pairs))
    best = greedy_steps64(criterion, flat, np.zeros(len(flat)), space, prior, 6, limits=Limits(per_prompt=limit))
    batch = first_batch(config, hparams)
    assert set(map(tuple, best.pairs.tolist())) == set(map(tuple, np.asarray(batch.pairs).tolist()))
    np.testing.assert_allclose(batch.gains, np.sort(best.gains)[::-1], rtol=1e-3)


def chosen(names, candidates=10):
    """Rule -> its second batch, of a loop that compares all of these; few pairs of many responses are on offer."""
    config = dataclasses.replace(CONFIG, rules=tuple(names), candidates=candidates, fit=FitConfig(members=3))
    table, hparams, _ = prepare(config, TABLE)
    loop = make_loop(config)
    state, first = loop.init(jax.random.key(0), table, hparams)
    state = loop.tell(state, first, (first.pairs.sum(axis=1) % 2).astype(jnp.float32))
    ask = jit(loop.ask)
    return {name: ask(hparams, state, table, at)[1] for at, name in enumerate(names)}


@pytest.mark.parametrize(
    ("together", "alone"),
    [
        slow(("power_bald", "v_opt"), ("power_bald",)),
        nightly(tuple(name for name in RULES if name != "then_random"), ("drts", "v_opt", "softmax_dopt", "coreset")),
    ],
)
def test_a_rule_chooses_the_same_whatever_is_compared_with_it(together, alone):
    of_all = chosen(together)
    for name in alone:
        own = chosen((name,))[name]
        np.testing.assert_array_equal(of_all[name].pairs, own.pairs, err_msg=name)
        np.testing.assert_allclose(of_all[name].gains, own.gains, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["within", pytest.param("cross", marks=pytest.mark.nightly)])
@pytest.mark.slow
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
    with pytest.raises(JarmError, match="are 4 pairs"):
        prepare(dataclasses.replace(CONFIG, pairs="all", first="d_opt"), TABLE)
    with pytest.raises(JarmError, match="first batch by v_opt needs a prior variance: give init"):
        make_loop(dataclasses.replace(CONFIG, first="v_opt")).init(jax.random.key(0), prepare(CONFIG, TABLE)[0])
    with pytest.raises(JarmError, match="chooses the prior of a laplace head, and the head is mlp"):
        LoopConfig(head=HeadConfig(), fit=FitConfig(evidence=True))
    prepare(dataclasses.replace(CONFIG, pairs="cross"), TABLE)
    single = dataclasses.replace(TABLE, mask=TABLE.mask & (np.arange(WIDTH) == 0))
    config = LoopConfig(
        rules=("random",), pairs="cross", rounds=1, batch=2, initial=2, first="v_opt", head=HeadConfig()
    )
    with pytest.raises(JarmError, match="the unit of the prior of a first batch by v_opt"):
        prepare(config, single)
