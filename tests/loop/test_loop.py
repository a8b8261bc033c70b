import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import nightly, sampled, slow

from jarm.core.base import HParams
from jarm.core.columns import difference
from jarm.core.status import JarmError, Status
from jarm.core.tables import ResponseTable
from jarm.design.spaces import pair_space, subset
from jarm.design.top import top_pairs
from jarm.evaluation.annotators import AnnotatorConfig, annotate
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import check_run, make_device_table, prepare
from jarm.loop.loop import make_loop
from jarm.reward.config import FitConfig, HeadConfig
from jarm.reward.fit import make_fit
from jarm.testing.tracing import count_compilations, count_traces
from jarm.testing.tracing import quick_jit as jit

PROMPTS, WIDTH, D = 9, 4, 5
LINEAR = HeadConfig(())
MLP = HeadConfig((6, 4))
ONE = FitConfig(members=1)


def make_table(seed=0, ragged=True):
    """Linear gold plus a prompt offset; ragged prompts, none with fewer than two responses."""
    rng = np.random.default_rng(seed)
    store = rng.normal(size=(PROMPTS * WIDTH, D)).astype(np.float32)
    mask = np.ones((PROMPTS, WIDTH), bool)
    if ragged:
        mask[2, 3] = mask[5, 0] = mask[5, 2] = False
    gold = (store @ rng.normal(size=D)).reshape(PROMPTS, WIDTH) + 3 * rng.normal(size=(PROMPTS, 1))
    return ResponseTable(
        store=store,
        rows=np.arange(PROMPTS * WIDTH).reshape(PROMPTS, WIDTH),
        mask=mask,
        gold=np.where(mask, gold, 0).astype(np.float32),
        attributes={"length": rng.integers(5, 50, (PROMPTS, WIDTH)).astype(np.float32)},
    )


TABLE = make_table()
NO_LENGTHS = dataclasses.replace(TABLE, attributes={})
SHORT = LoopConfig(rounds=1, batch=5, initial=5)
DEVICE_TABLE, _, SCALE = prepare(SHORT, TABLE)


def in_order(key, hparams, belief, space, k):
    """A rule of one's own: the first pairs of the space."""
    return top_pairs(lambda margin, _: jnp.zeros_like(margin), belief.rewards, None, space, k)


CONFIGS = {
    "within": LoopConfig(
        rules=("random", "pa_dopt", "greedy_dopt"), rounds=3, batch=5, initial=6, head=LINEAR, fit=ONE
    ),
    "within prompts": LoopConfig(
        rules=("entropy", in_order), rounds=4, batch=6, initial=6, prompts=7, head=LINEAR, fit=ONE
    ),
    "cross prompts drawn": LoopConfig(
        rules=("greedy_dopt",),
        pairs="cross",
        rounds=3,
        batch=4,
        initial=5,
        prompts=5,
        candidates=40,
        head=MLP,
        fit=FitConfig(members=2, steps=15),
        warm_start=True,
    ),
    "all prompts drawn": LoopConfig(
        rules=("dopt",),
        pairs="all",
        rounds=3,
        batch=7,
        initial=7,
        prompts=7,
        candidates=30,
        head=LINEAR,
        fit=FitConfig(members=2),
        warm_start=True,
    ),
}
FAST = ("within",)
NAMED = sampled(CONFIGS, *FAST)
RULES = [
    (name, rule) if name in FAST else nightly(name, rule)
    for name, config in CONFIGS.items()
    for rule in range(len(config.rules))
]


@functools.cache
def loop_of(name):
    """The jitted functions of a configuration, and how often `run` was traced."""
    loop = make_loop(CONFIGS[name])
    run, traces = count_traces(loop.run)
    jitted = {field: jit(getattr(loop, field)) for field in ("init", "ask", "tell")}
    return loop._replace(run=jit(run), **jitted), traces


def hparams_of(name, **changes):
    return prepare(CONFIGS[name], TABLE, HParams(**changes))[1]


@functools.cache
def run_of(name, rule, seed=0):
    return jax.device_get(loop_of(name)[0].run(jax.random.key(seed), hparams_of(name), DEVICE_TABLE, jnp.int32(rule)))


def recorded(state):
    labelled = state.labelled
    keep = np.asarray(labelled.mask)
    return np.stack([labelled.first, labelled.second], axis=1)[keep], np.asarray(labelled.label)[keep]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule"), RULES)
def test_a_run_labels_its_budget_and_no_pair_twice(name, rule):
    config = CONFIGS[name]
    state, records = run_of(name, rule)
    assert (records.status == Status.OK).all()
    assert state.status == Status.OK
    np.testing.assert_array_equal(records.labels, config.initial + config.batch * np.arange(config.rounds + 1))
    pairs, labels = recorded(state)
    assert len(pairs) == config.budget
    assert len({tuple(pair) for pair in pairs.tolist()}) == config.budget, "a pair was labelled twice"
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert TABLE.mask.reshape(-1)[pairs].all()
    same = pairs[:, 0] // WIDTH == pairs[:, 1] // WIDTH
    assert {"within": same.all(), "cross": not same.any(), "all": True}[config.pairs]
    # The records tell the same story: batch after batch, the last round selects nothing.
    acquired = records.selection.pairs[:-1].reshape(-1, 2)
    np.testing.assert_array_equal(pairs[config.initial :], acquired)
    assert records.selection.valid[:-1].all()
    assert not records.selection.valid[-1].any()
    gold = np.float64(TABLE.gold).reshape(-1)
    wrong = labels != (gold[pairs[:, 0]] > gold[pairs[:, 1]])
    counts = [wrong[:count].sum() for count in records.labels]
    np.testing.assert_array_equal(records.wrong, counts)
    if config.prompts is not None:
        for batch in records.selection.pairs[:-1]:
            assert len(np.unique(batch // WIDTH)) <= config.prompts


@pytest.mark.slow
def test_all_pairs_uses_both_kinds_of_pair():
    pairs, _ = recorded(run_of("all prompts drawn", 0)[0])
    same = pairs[:, 0] // WIDTH == pairs[:, 1] // WIDTH
    assert 0 < same.sum() < len(pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_one_trace_for_every_seed_rule_and_number(name):
    """A sweep compiles once: seeds, rules, noise, prior, learning rate and the data are all traced."""
    run_of(name, 0)
    loop, traces = loop_of(name)
    assert len(traces) == 1
    hparams = hparams_of(
        name, noise=5.0, prior_weight=3.0, prior_mix=0.5, learning_rate=0.1, weight_decay=0.0, ridge=2.0
    )
    other, *_ = prepare(CONFIGS[name], make_table(seed=1, ragged=False))
    key, rule = jax.random.key(7), jnp.int32(len(CONFIGS[name].rules) - 1)
    with count_compilations() as compiled:
        jax.block_until_ready(loop.run(key, hparams, other, rule))
    assert not compiled
    assert len(traces) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["within", nightly("cross prompts drawn")])
def test_the_same_key_gives_the_same_run_and_another_another(name):
    loop, _ = loop_of(name)
    for rule in range(len(CONFIGS[name].rules)):
        again = jax.device_get(loop.run(jax.random.key(0), hparams_of(name), DEVICE_TABLE, jnp.int32(rule)))
        jax.tree.map(np.testing.assert_array_equal, without_keys(again), without_keys(run_of(name, rule)))
        first, other = run_of(name, rule)[1], run_of(name, rule, seed=1)[1]
        assert (first.selection.pairs != other.selection.pairs).any()


def without_keys(run):
    state, records = run
    return dataclasses.replace(state, key=0), records


def test_rules_of_one_seed_share_their_start_and_their_annotator():
    """Rules are compared in pairs: same first labels, same answers to the pairs they share, same first fit."""
    states, records = zip(*[run_of("within", rule) for rule in range(3)], strict=True)
    answers = {}
    shared = 0
    for state, record in zip(states, records, strict=True):
        pairs, labels = recorded(state)
        np.testing.assert_array_equal(pairs[:6], recorded(states[0])[0][:6])
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), record.params, records[0].params)
        for pair, label in zip(map(tuple, pairs.tolist()), labels, strict=True):
            shared += pair in answers
            assert answers.setdefault(pair, label) == label
    assert shared > 12  # the six first ones twice, and more
    batches = {record.selection.pairs[:-1].tobytes() for record in records}
    assert len(batches) == 3


@pytest.mark.core
@pytest.mark.slow
def test_ask_and_tell_by_hand_are_run():
    """What a campaign with people calls, answered by the annotator of the run, is the run."""
    name, rule = "all prompts drawn", jnp.int32(0)
    config, (loop, _), hparams = CONFIGS[name], loop_of(name), hparams_of(name)
    expected, records = run_of(name, 0)
    key_loop, key_annotator = jax.random.split(jax.random.key(0))
    gold, lengths = DEVICE_TABLE.gold.reshape(-1), DEVICE_TABLE.lengths.reshape(-1)
    answer = jit(annotate, static_argnums=1)
    state, selection = loop.init(key_loop, DEVICE_TABLE)
    for round in range(config.rounds + 1):
        key = jax.random.clone(key_annotator)
        labels, _ = answer(key, config.annotator, hparams.noise, selection.pairs, gold, lengths)
        state = loop.tell(state, selection, labels)
        if round == config.rounds:
            break
        state, selection = loop.ask(hparams, state, DEVICE_TABLE, rule)
        np.testing.assert_array_equal(selection.pairs, records.selection.pairs[round])
        np.testing.assert_allclose(selection.gains, records.selection.gains[round], rtol=1e-4, atol=1e-6)
        jax.tree.map(
            lambda mine, theirs: np.testing.assert_allclose(mine, theirs[round], rtol=1e-3, atol=1e-5),  # noqa: B023
            state.params,
            records.params,
        )
    np.testing.assert_array_equal(recorded(state)[0], recorded(expected)[0])
    np.testing.assert_array_equal(recorded(state)[1], recorded(expected)[1])


@pytest.mark.slow
def test_seeds_and_numbers_under_vmap_are_the_runs_one_by_one():
    loop, _ = loop_of("all prompts drawn")
    hparams = [hparams_of("all prompts drawn", noise=noise, ridge=ridge) for noise, ridge in ((2.0, 1.0), (0.5, 3.0))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *hparams)
    run = jit(jax.vmap(make_loop(CONFIGS["all prompts drawn"]).run, in_axes=(0, 0, None, None)))
    _, together = run(jax.random.split(jax.random.key(3)), stacked, DEVICE_TABLE, jnp.int32(0))
    for place in range(2):
        _, alone = loop.run(jax.random.split(jax.random.key(3))[place], hparams[place], DEVICE_TABLE, jnp.int32(0))
        np.testing.assert_array_equal(together.selection.pairs[place], alone.selection.pairs)
        np.testing.assert_array_equal(together.wrong[place], alone.wrong)
        np.testing.assert_allclose(
            together.params["out"]["kernel"][place], alone.params["out"]["kernel"], rtol=1e-3, atol=1e-4
        )


def test_a_run_that_runs_out_of_pairs_says_so_and_stays_distinct():
    """Nine pairs within three prompts of three, budget 12: all nine labelled, once each, and EXHAUSTED."""
    mask = np.zeros((PROMPTS, WIDTH), bool)
    mask[:3, :3] = True
    table = dataclasses.replace(TABLE, mask=mask)
    loop, _ = loop_of("within")
    device_table = make_device_table(table, SCALE)
    for rule in (0, 2):
        state, records = loop.run(jax.random.key(0), hparams_of("within"), device_table, jnp.int32(rule))
        pairs, _ = recorded(state)
        assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs) == 9
        np.testing.assert_array_equal(records.status, [1, 1, 1, 1])
        np.testing.assert_array_equal(records.labels, [6, 9, 9, 9])
    with pytest.raises(JarmError, match="holds 9 pairs within prompts, fewer than the 21 labels"):
        check_run(CONFIGS["within"], table)


def test_a_batch_of_nans_reaches_the_edge_as_a_status():
    loop, _ = loop_of("within")
    broken = dataclasses.replace(DEVICE_TABLE, embeddings=DEVICE_TABLE.embeddings.at[0, 0, 0].set(jnp.nan))
    _, records = loop.run(jax.random.key(0), hparams_of("within"), broken, jnp.int32(2))
    assert (records.status[:-1] >= Status.DIVERGED).all()


@pytest.mark.slow
def test_a_warm_start_continues_from_the_last_heads():
    """Rounds differ by a few steps of Adam, each `rate * (1 + decay * weight)` or so; fresh heads by far more."""
    name = "cross prompts drawn"
    assert CONFIGS[name].warm_start
    records, hparams = run_of(name, 0)[1], hparams_of(name)
    kernels = records.params["hidden"][0]["kernel"]
    step = float(hparams.learning_rate * (2 + hparams.weight_decay * np.abs(kernels).max()))
    most = records.fit.steps[1:].max() * step
    assert 0 < np.abs(np.diff(kernels, axis=0)).max() < most
    fresh = loop_of(name)[0].init(jax.random.key(0), DEVICE_TABLE)[0].params["hidden"][0]["kernel"]
    assert np.abs(fresh[0] - fresh[1]).max() > 4 * most


@pytest.mark.core
def test_tell_stores_only_answered_pairs_and_never_beyond_the_budget():
    config = CONFIGS["within"]
    loop, _ = loop_of("within")
    state, first = loop.init(jax.random.key(0), DEVICE_TABLE)
    some = dataclasses.replace(first, valid=jnp.array([1, 0, 1, 1, 0, 1], bool))
    state = loop.tell(state, some, jnp.array([1.0, 9, 0, 1, 9, 0.25]))
    pairs, labels = recorded(state)
    np.testing.assert_array_equal(pairs, np.asarray(first.pairs)[[0, 2, 3, 5]])
    np.testing.assert_array_equal(labels, [1, 0, 1, 0.25])
    for _ in range(10):
        state = loop.tell(state, first, jnp.ones(6))
    assert state.labelled.mask.all()
    np.testing.assert_array_equal(np.stack([state.labelled.first, state.labelled.second], axis=1)[:4], pairs)
    assert len(state.labelled.mask) == config.budget


@pytest.mark.slow
def test_labels_weigh_what_the_rule_says():
    loop, _ = loop_of("within")
    state, first = loop.init(jax.random.key(0), DEVICE_TABLE)
    weights = jnp.arange(1.0, 7.0)
    some = dataclasses.replace(first, weights=weights, valid=jnp.array([1, 0, 1, 1, 0, 1], bool))
    state = loop.tell(state, some, jnp.ones(6))
    np.testing.assert_array_equal(state.labelled.weight[:5], [1, 3, 4, 6, 0])
    np.testing.assert_array_equal(loop.tell(state, first, jnp.ones(6)).labelled.weight[4:10], 1)


def test_a_rule_of_your_own_takes_the_place_of_a_name():
    _, records = run_of("within prompts", 1)
    own = CONFIGS["within prompts"].rules.index(in_order)
    assert own == 1
    for batch in records.selection.pairs[:-1]:
        # The first prompts drawn, all pairs of each in order, but for what is labelled.
        assert len(np.unique(batch // WIDTH)) <= 4


@pytest.mark.slow
def no_number(key, hparams, belief, space, k):
    """A rule of one's own that takes a logarithm of what may be negative."""
    return top_pairs(lambda margin, _: jnp.log(margin), belief.rewards, None, space, k)


def test_a_score_that_is_not_a_number_is_blamed_on_whose_it_is():
    config = dataclasses.replace(CONFIGS["within"], rules=(no_number, "random"))
    loop = make_loop(config)
    device_table, hparams, _ = prepare(config, TABLE)
    state, first = jit(loop.init)(jax.random.key(0), device_table)
    ask = jit(loop.ask)
    for wrong, status in ((0.0, Status.BROKEN_SCORES), (np.nan, Status.NONFINITE)):
        spoilt = dataclasses.replace(device_table, embeddings=device_table.embeddings + np.float32(wrong))
        told = loop.tell(state, first, jnp.ones(6))
        assert ask(hparams, told, spoilt, jnp.int32(0))[1].status == status


@pytest.mark.slow
def test_a_rule_that_is_not_there_is_a_status():
    for name, count in (("within", 3), ("all prompts drawn", 1)):
        loop, _ = loop_of(name)
        for rule in (-1, count):
            _, records = loop.run(jax.random.key(0), hparams_of(name), DEVICE_TABLE, jnp.int32(rule))
            assert (records.status[:-1] == Status.NO_RULE).all()


@pytest.mark.core
def test_what_is_prepared_is_for_the_annotator_of_the_configuration():
    config = dataclasses.replace(CONFIGS["within"], annotator=AnnotatorConfig(scale=0.5, flip_rate=0.4))
    device_table, hparams, scale = prepare(config, TABLE)
    assert scale == 0.5
    np.testing.assert_allclose(np.asarray(device_table.gold) * 0.5, TABLE.gold, rtol=1e-6)
    assert 0 < hparams.noise < 1
    with pytest.raises(JarmError, match="no response lengths"):
        prepare(dataclasses.replace(config, annotator=AnnotatorConfig("perfect", length_bias=1.0)), NO_LENGTHS)
    with pytest.raises(JarmError, match="holds 46 pairs"):
        prepare(dataclasses.replace(config, initial=1000), TABLE)


@pytest.mark.slow
@pytest.mark.nightly
def test_few_candidates_of_many_responses_are_chosen_as_among_all():
    """Only the responses at the ends of the candidates are scored; the batch is that of a belief about all."""
    config = LoopConfig(
        rules=("entropy",), pairs="cross", rounds=3, batch=4, initial=5, candidates=8, head=LINEAR, fit=ONE
    )
    loop = make_loop(config)
    state, first = jit(loop.init)(jax.random.key(0), DEVICE_TABLE)
    weights = jax.random.normal(jax.random.key(1), (1, D, 1))
    state = dataclasses.replace(
        jit(loop.tell)(state, first, jnp.ones(5)), params={"hidden": {}, "out": {"kernel": weights}}
    )
    selection = jit(loop.select)(HParams(), state, DEVICE_TABLE)
    key_space, _ = jax.random.split(jax.random.fold_in(state.key, 2 * state.round + 1))
    _, key_candidates = jax.random.split(key_space)
    past = jnp.stack([state.labelled.first, state.labelled.second], axis=1)[:5]
    space = subset(key_candidates, pair_space("cross", WIDTH, DEVICE_TABLE.mask.reshape(-1), past), 8)
    ends = np.asarray(space.pairs)
    rewards = np.asarray(DEVICE_TABLE.embeddings.reshape(-1, D) @ weights[0, :, 0], np.float64)
    margins = np.abs(rewards[ends[:, 0]] - rewards[ends[:, 1]])
    np.testing.assert_array_equal(selection.pairs, ends[np.argsort(margins)[:4]])
    np.testing.assert_allclose(selection.gains, -np.sort(margins)[:4], rtol=1e-4)


@pytest.mark.parametrize(
    ("head", "members", "candidates"), [slow(LINEAR, 1, None), (MLP, 3, 8), slow(LINEAR, 1, 8), slow(MLP, 3, None)]
)
def test_a_belief_is_what_the_heads_say(head, members, candidates):
    """Of every response, or of the ends of a few candidates; and of the ends of what is labelled."""
    seen = []

    def listening(key, hparams, belief, space, k):
        jax.debug.callback(lambda *each: seen.append(each), belief, space.pairs)
        return in_order(key, hparams, belief, space, k)

    fit = FitConfig(members=members, steps=5)
    loop = make_loop(LoopConfig(rules=(listening,), batch=4, initial=5, candidates=candidates, head=head, fit=fit))
    state, first = jit(loop.init)(jax.random.key(0), DEVICE_TABLE)
    state = jit(loop.tell)(state, first, jnp.ones(5))
    jit(loop.select)(HParams(), state, DEVICE_TABLE)
    jax.effects_barrier()
    [(belief, pairs)] = seen
    flat, model = DEVICE_TABLE.embeddings.reshape(-1, D), head.head()
    rewards = jax.vmap(model.rewards, (0, None))(state.params, flat)
    features = model.features(jax.tree.map(lambda leaf: leaf[0], state.params), flat)
    ends = np.stack([state.labelled.first, state.labelled.second], axis=1)[:5]
    np.testing.assert_allclose(belief.labelled_features[:5], features[ends], atol=1e-5)
    np.testing.assert_allclose(belief.labelled_rewards[:5], rewards.mean(axis=0)[ends], atol=1e-5)
    assert not np.any(belief.labelled_features[5:])
    assert (pairs is None) == (candidates is None)
    if candidates is None:
        np.testing.assert_allclose(belief.features, features, atol=1e-5)
        np.testing.assert_allclose(belief.member_rewards, rewards, atol=1e-5)
    np.testing.assert_allclose(belief.rewards, np.mean(belief.member_rewards, axis=0), atol=1e-5)


OTHERS = {
    "flip": {"annotator": AnnotatorConfig("flip", flip_rate=0.3), "fit": FitConfig(members=1, loss="classification")},
    "biased": {"annotator": AnnotatorConfig(scale=2.0, length_bias=3.0), "fit": FitConfig(members=2)},
    "perfect": {
        "annotator": AnnotatorConfig("perfect", length_bias=0.5),
        "head": MLP,
        "fit": FitConfig(members=1, steps=10, batch_size=4, ensemble="bootstrap"),
    },
}


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", ["perfect", slow("flip"), slow("biased")])
def test_other_annotators_and_fits_run(name):
    config = dataclasses.replace(CONFIGS["within"], rules=("random",), rounds=2, **OTHERS[name])
    device_table, hparams, _ = prepare(config, TABLE, HParams(label_smoothing=0.1))
    state, records = jit(make_loop(config).run)(jax.random.key(0), hparams, device_table)
    assert (records.status == Status.OK).all()
    assert state.labelled.mask.sum() == 16


@pytest.mark.core
def test_gold_on_the_device_is_in_units_of_the_scale():
    np.testing.assert_allclose(np.asarray(DEVICE_TABLE.gold) * SCALE, TABLE.gold, rtol=1e-6)
    real = TABLE.mask
    assert np.std(np.asarray(DEVICE_TABLE.gold)[real]) == pytest.approx(1, rel=1e-5)
    assert np.asarray(DEVICE_TABLE.lengths)[real].mean() == pytest.approx(0, abs=1e-5)
    assert np.asarray(DEVICE_TABLE.lengths)[real].std() == pytest.approx(1, rel=1e-5)
    assert not np.asarray(DEVICE_TABLE.embeddings)[~real].any()
    x = np.float64(TABLE.embeddings())[real]
    mean_square = np.square(x[:, None] - x[None]).sum(axis=2).mean()
    assert float(DEVICE_TABLE.spread) == pytest.approx(mean_square, rel=1e-5)


@pytest.mark.core
def test_the_noise_is_solved_for_a_flip_rate():
    config = dataclasses.replace(SHORT, annotator=AnnotatorConfig(flip_rate=0.2))
    low = check_run(config, TABLE)[1].noise
    high = check_run(dataclasses.replace(config, annotator=AnnotatorConfig(flip_rate=0.4)), TABLE)[1].noise
    assert low > high > 0
    perfect = dataclasses.replace(config, annotator=AnnotatorConfig(flip_rate=0.0))
    assert check_run(perfect, TABLE)[1].noise < 0
    for leaf in jax.tree.leaves(prepare(config, TABLE)[1]):
        assert leaf.dtype == jnp.float32
        assert not leaf.weak_type


@pytest.mark.core
def test_bad_settings_are_named():
    with pytest.raises(JarmError, match="no pair space 'listed'"):
        LoopConfig(pairs="listed")
    with pytest.raises(JarmError, match="`batch` is 0"):
        LoopConfig(batch=0)
    with pytest.raises(JarmError, match="10 candidate pairs"):
        LoopConfig(candidates=10)
    with pytest.raises(JarmError, match="'dpot'"):
        make_loop(LoopConfig(rules=("dpot",)))
    with pytest.raises(JarmError, match=r"order is \(key, hparams, belief, space, k\)"):
        make_loop(LoopConfig(rules=(lambda key, belief, space, k, hparams: None,)))
    with pytest.raises(JarmError, match="no response lengths"):
        check_run(dataclasses.replace(SHORT, annotator=AnnotatorConfig(length_bias=1.0)), NO_LENGTHS)
    for name, value in (
        ("noise", float("nan")),
        ("label_smoothing", 3.0),
        ("learning_rate", -1e-3),
        ("weight_decay", -1.0),
        ("ridge", -1.0),
        ("prior_weight", float("nan")),
        ("prior_mix", 2.0),
        ("beta", -1.0),
        ("temperature", float("inf")),
        ("epsilon", 1.5),
    ):
        with pytest.raises(JarmError, match=f"`{name}` is"):
            check_run(CONFIGS["within"], TABLE, HParams(**{name: value}))


@pytest.mark.parametrize("pairs", ["within", "cross", "all"])
def test_the_budget_is_checked_to_the_pair(pairs):
    real = TABLE.mask.reshape(-1)
    first, second = np.triu_indices(PROMPTS * WIDTH, 1)
    same = first // WIDTH == second // WIDTH
    both = real[first] & real[second] & {"within": same, "cross": ~same, "all": True}[pairs]
    config = LoopConfig(pairs=pairs, rounds=1, batch=1, initial=int(both.sum()) - 1)
    check_run(config, TABLE)
    with pytest.raises(JarmError, match=f"holds {both.sum()} pairs"):
        check_run(dataclasses.replace(config, batch=2), TABLE)


@pytest.mark.slow
def test_too_few_prompts_are_named():
    with pytest.raises(JarmError, match="10 prompts per round are more than the 9"):
        check_run(dataclasses.replace(CONFIGS["within prompts"], prompts=10), TABLE)
    # The smallest two prompts hold one pair and three.
    check_run(dataclasses.replace(CONFIGS["within prompts"], prompts=2, batch=4, rounds=1), TABLE)
    with pytest.raises(JarmError, match="2 prompts per round may hold fewer pairs within prompts than a batch of 5"):
        check_run(dataclasses.replace(CONFIGS["within prompts"], prompts=2, batch=5, rounds=1), TABLE)


@pytest.mark.slow
@pytest.mark.nightly
def test_without_gold_rewards_nobody_answers():
    device_table, hparams, _ = prepare(CONFIGS["within"], dataclasses.replace(TABLE, gold=None))
    loop, _ = loop_of("within")
    _, records = loop.run(jax.random.key(0), hparams, device_table, jnp.int32(0))
    assert (records.status == Status.NONFINITE).all()
    broken = TABLE.gold.copy()
    broken[0, 0] = np.nan
    with pytest.raises(JarmError, match="Gold rewards of the table are NaN"):
        prepare(CONFIGS["within"], dataclasses.replace(TABLE, gold=broken))


@pytest.mark.slow
@pytest.mark.nightly
def test_an_annotator_answers_by_the_column_that_it_is_given():
    """Labels follow the attribute, in units of its own deviation; whether they are wrong is still said by gold."""
    attributes = {"length": TABLE.attributes["length"], "negated": np.where(TABLE.mask, -2 * TABLE.gold, 0)}
    table = dataclasses.replace(TABLE, attributes=attributes)
    config = dataclasses.replace(SHORT, rules=("random",), head=LINEAR, fit=ONE)
    config = dataclasses.replace(config, annotator=AnnotatorConfig("perfect", column="negated"))
    device_table, hparams, scale = prepare(config, table)
    assert scale == pytest.approx(2 * SCALE)
    np.testing.assert_allclose(device_table.answers, -DEVICE_TABLE.gold, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(device_table.gold, DEVICE_TABLE.gold, rtol=1e-5, atol=1e-6)
    state, records = jit(make_loop(config).run)(jax.random.key(0), hparams, device_table)
    pairs, labels = recorded(state)
    gold = TABLE.gold.reshape(-1)
    np.testing.assert_array_equal(labels, gold[pairs[:, 0]] < gold[pairs[:, 1]])
    np.testing.assert_array_equal(records.wrong, records.labels)
    assert (records.status == Status.OK).all()
    # Without gold rewards the attribute is enough to answer, and nothing says that an answer is wrong.
    device_table, hparams, _ = prepare(config, dataclasses.replace(table, gold=None))
    _, without = jit(make_loop(config).run)(jax.random.key(0), hparams, device_table)
    np.testing.assert_array_equal(without.selection.pairs, records.selection.pairs)
    assert not without.wrong.any()


def test_a_flip_rate_is_that_of_the_column_answered_by():
    annotator = AnnotatorConfig(flip_rate=0.3, column="length")
    by_length = check_run(dataclasses.replace(SHORT, annotator=annotator), TABLE)
    as_gold = dataclasses.replace(TABLE, gold=TABLE.attributes["length"])
    assert by_length == check_run(dataclasses.replace(SHORT, annotator=AnnotatorConfig(flip_rate=0.3)), as_gold)


def test_a_column_that_no_annotator_can_answer_by_is_named():
    def config(column):
        return dataclasses.replace(SHORT, annotator=AnnotatorConfig(column=column))

    with pytest.raises(JarmError, match="no column 'help': choose from gold, length; other"):
        check_run(config("help"), TABLE)
    for values, words in ((np.nan, "'help' are NaN"), (1.0, "'help' are equal")):
        table = dataclasses.replace(TABLE, attributes={"help": np.full(TABLE.mask.shape, values, np.float32)})
        with pytest.raises(JarmError, match=words):
            check_run(config("help"), table)
    # A prompt's responses are alike, though the column has a scale.
    table = dataclasses.replace(TABLE, attributes={"help": np.tile(np.arange(PROMPTS)[:, None], (1, WIDTH))})
    with pytest.raises(JarmError, match="values of 'help' are equal in every pair"):
        check_run(dataclasses.replace(SHORT, annotator=AnnotatorConfig(flip_rate=0.3, column="help")), table)


@pytest.mark.parametrize("scale", ["std", 3.0])
def test_gold_and_answers_are_each_divided_by_their_own_scale(scale):
    """So that the gold gaps of a batch have one unit, whichever column the annotator answers by."""
    config = dataclasses.replace(SHORT, annotator=AnnotatorConfig(scale=scale, column="length"))
    device_table, _, unit = prepare(config, TABLE)
    length = np.where(TABLE.mask, TABLE.attributes["length"], 0)
    divisors = (SCALE, length[TABLE.mask].std()) if scale == "std" else (3.0, 3.0)
    assert unit == pytest.approx(divisors[1])
    for ours, column, divisor in zip(
        (device_table.gold, device_table.answers), (TABLE.gold, length), divisors, strict=True
    ):
        np.testing.assert_allclose(ours, column / divisor, rtol=1e-5)
    # Equal gold rewards have no scale, and need none where another column answers.
    equal, _, _ = prepare(config, dataclasses.replace(TABLE, gold=np.where(TABLE.mask, 2, 0).astype(np.float32)))
    assert np.ptp(np.asarray(equal.gold)[TABLE.mask]) == 0


@pytest.mark.parametrize(("prepared", "run"), [("gold", "length"), ("length", "gold")])
def test_a_table_that_was_prepared_for_another_column_is_refused(prepared, run):
    def config(column):
        return dataclasses.replace(SHORT, annotator=AnnotatorConfig(column=column))

    table, hparams, _ = prepare(config(prepared), TABLE)
    with pytest.raises(JarmError, match=f"answers by '{run}', .*: prepare the table"):
        jax.eval_shape(make_loop(config(run)).run, jax.random.key(0), hparams, table)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_fit_of_ones_own_may_weigh_labels_by_an_attribute():
    config = dataclasses.replace(SHORT, rules=("random",), head=LINEAR, fit=ONE)
    length, fit = jnp.asarray(TABLE.column("length")).reshape(-1), make_fit(LINEAR.head(), ONE)

    def weighed(labelled):
        return dataclasses.replace(labelled, weight=labelled.weight * length[labelled.first] / length.mean())

    def own(key, hparams, embeddings, labelled, warm=None):
        return fit(key, hparams, embeddings, weighed(labelled), warm)

    _, hparams, _ = prepare(config, TABLE)
    loop, default = make_loop(config, own), make_loop(config)
    state, records = jit(loop.run)(jax.random.key(0), hparams, DEVICE_TABLE)
    _, without = jit(default.run)(jax.random.key(0), hparams, DEVICE_TABLE)
    kernel, other = (each.params["out"]["kernel"] for each in (records, without))
    assert np.abs(kernel - other).max() > 0.01
    found, _ = loop.fit(hparams, state, DEVICE_TABLE)
    wanted, _ = default.fit(hparams, dataclasses.replace(state, labelled=weighed(state.labelled)), DEVICE_TABLE)
    np.testing.assert_array_equal(found.params["out"]["kernel"], wanted.params["out"]["kernel"])


def test_a_text_in_the_place_of_a_config_gets_a_sentence():
    """In a process of its own, where types are not checked at run time."""
    code = """
import jarm
texts = (jarm.LoopConfig, "rules"), (jarm.LoopConfig, "head"), (jarm.HeadConfig, "hidden")
for make, name in texts:
    try:
        make(**{name: "linear"})
    except jarm.JarmError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("is a text: give") == 3


ANNOTATORS = {
    "noisy": AnnotatorConfig(),
    "solved": AnnotatorConfig(flip_rate=0.25),
    "perfect": AnnotatorConfig("perfect"),
    "flip": AnnotatorConfig("flip", flip_rate=0.1),
    "own unit": AnnotatorConfig(scale=2.0),
    "biased": AnnotatorConfig(length_bias=1.0),
    "by length": AnnotatorConfig(column="length"),
}


@pytest.mark.parametrize("name", ANNOTATORS)
def test_a_column_without_differences_is_refused_whoever_answers(name):
    annotator = ANNOTATORS[name]
    config = dataclasses.replace(SHORT, annotator=annotator)
    words = "gold rewards" if annotator.column == "gold" else "values of 'length'"

    def with_answers(values):
        length = np.where(TABLE.mask, values, 0) if annotator.column == "length" else TABLE.attributes["length"]
        gold = np.where(TABLE.mask, values, 0) if annotator.column == "gold" else TABLE.gold
        return dataclasses.replace(TABLE, gold=gold, attributes={"length": length})

    by_prompt = with_answers(np.arange(PROMPTS)[:, None] + np.full(TABLE.mask.shape, 0.1))
    for call in (check_run, prepare):
        with pytest.raises(JarmError, match=f"{words} are equal in every pair within prompts: there is nothing to"):
            call(config, by_prompt)
        with pytest.raises(JarmError, match=f"(All|The) {words} are equal"):
            call(config, with_answers(np.full(TABLE.mask.shape, 0.1)))
    for pairs in ("cross", "all"):
        check_run(dataclasses.replace(config, pairs=pairs), by_prompt)
    check_run(config, with_answers(1e9 + 1e-6 * np.arange(WIDTH) + np.arange(PROMPTS)[:, None]))


@pytest.mark.parametrize("column", ["gold", "help"])
@pytest.mark.parametrize("low", [16777216.0, 1e6, 1e9])
def test_an_annotator_sees_the_differences_of_large_scores(column, low):
    """Differences of 2**-10 beside a million, and offsets of prompts that are larger still: against float64."""
    steps = np.random.default_rng(0).permuted(np.tile(np.arange(WIDTH), (PROMPTS, 1)), axis=1) * 2.0**-10
    values = np.where(TABLE.mask, low * (1 + np.arange(PROMPTS)[:, None]) + steps, 0)
    table = dataclasses.replace(TABLE, **({"gold": values} if column == "gold" else {"attributes": {"help": values}}))
    config = dataclasses.replace(SHORT, annotator=AnnotatorConfig("perfect", scale=2.0**-10, column=column))
    device_table, _, _ = prepare(config, table)
    pairs = np.array([(p * WIDTH + i, p * WIDTH + j) for p in range(PROMPTS) for j in range(WIDTH) for i in range(j)])
    pairs = pairs[TABLE.mask.reshape(-1)[pairs].all(axis=1)]
    gold, answers, lengths = device_table.exact_gold, device_table.exact_answers, device_table.lengths.reshape(-1)
    noise, ends = jnp.float32(-1), jnp.asarray(pairs)
    labels, _ = annotate(jax.random.key(0), config.annotator, noise, ends, gold, lengths, answers)
    flat = values.reshape(-1)
    np.testing.assert_array_equal(labels, flat[pairs[:, 0]] > flat[pairs[:, 1]])
    gaps = difference(gold if answers is None else answers, *ends.T)
    np.testing.assert_allclose(gaps, (flat[pairs[:, 0]] - flat[pairs[:, 1]]) * 1024, rtol=1e-6)


def test_embeddings_that_teach_nothing_are_refused_before_a_fit():
    embeddings = TABLE.embeddings()

    def with_embeddings(rows):
        return dataclasses.replace(
            TABLE,
            store=rows.reshape(-1, rows.shape[2]),
            rows=np.arange(rows[..., 0].size).reshape(rows.shape[:2]),
            mean=None,
            deviation=None,
        )

    for value, words in ((np.nan, "is nan in column 0"), (1e30, "is 1e\\+30 in column 0, .*divide the embeddings")):
        rows = embeddings.copy()
        rows[0, 0, 0] = value
        with pytest.raises(JarmError, match="response 0 of prompt 0 " + words):
            prepare(SHORT, with_embeddings(rows))
    with pytest.raises(JarmError, match="embeddings are equal in every pair within prompts"):
        prepare(SHORT, with_embeddings(np.repeat(embeddings[:, :1], WIDTH, axis=1)))
    with pytest.raises(JarmError, match="embeddings are equal in every pair across prompts"):
        prepare(dataclasses.replace(SHORT, pairs="cross"), with_embeddings(np.ones_like(embeddings)))
    across = dataclasses.replace(SHORT, pairs="cross", head=HeadConfig())
    prepare(across, with_embeddings(np.repeat(embeddings[:, :1], WIDTH, axis=1)))
