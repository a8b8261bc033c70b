import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from marks import sampled, slow

from jarm.core.base import HParams, Labelled
from jarm.core.status import JarmError, Status
from jarm.reward import training
from jarm.reward.config import FitConfig
from jarm.reward.fit import make_fit
from jarm.reward.heads import linear_head, mlp_head
from jarm.reward.losses import classification


def two_halves(**changes):
    """A fit of one head, stopped by two that hold out a half each."""
    return FitConfig(**{"members": 1, "holdout": 0.5, "folds": 2} | changes)


SMALL = mlp_head((8, 4))
TWO_HALVES = two_halves()
HPARAMS = HParams(learning_rate=jnp.float32(1e-2), weight_decay=jnp.float32(1e-2), ridge=jnp.float32(0.5))
FEW = two_halves(holdout=0.0, steps=7)
OWN_PARTS = two_halves(members=2, folds=1, holdout=0.5)
HEADS = [SMALL, linear_head()]


@functools.cache
def fit_of(head=SMALL, config=TWO_HALVES):
    """The same function for all tests, so that what one has compiled serves the others."""
    return make_fit(head, config)


def problem(n=30, capacity=40, responses=80, d=6, seed=0):
    """Embeddings, noisy labels of a linear teacher, and the teacher's rewards."""
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(responses, d)).astype(np.float32)
    gold = 2 * embeddings @ rng.normal(size=d)
    first = rng.integers(responses, size=capacity)
    second = (first + rng.integers(1, responses, size=capacity)) % responses
    label = rng.random(capacity) < 1 / (1 + np.exp(gold[second] - gold[first]))
    return jnp.asarray(embeddings), labelled(first, second, label, n), gold


def labelled(first, second, label, n, weight=None):
    return Labelled(
        jnp.asarray(first, jnp.int32),
        jnp.asarray(second, jnp.int32),
        jnp.asarray(label, jnp.float32),
        jnp.ones(len(first), jnp.float32) if weight is None else jnp.asarray(weight, jnp.float32),
        jnp.arange(len(first)) < n,
    )


def adamw64(params, e, pairs, lr, decay, steps):
    """AdamW on the mean loss of a one-layer tanh head, by hand, both ends of every pair scored."""
    W, b, w = (
        np.float64(p) for p in (params["hidden"][0]["kernel"], params["hidden"][0]["bias"], params["out"]["kernel"])
    )
    theta = [W, b, w]
    m, v = [np.zeros_like(p) for p in theta], [np.zeros_like(p) for p in theta]
    e, (n,) = np.float64(e), np.shape(np.flatnonzero(pairs.mask))
    x = [e[np.asarray(end)[:n]] for end in (pairs.first, pairs.second)]
    y, c = np.float64(pairs.label)[:n], np.float64(pairs.weight)[:n]
    for t in range(1, steps + 1):
        h = [np.tanh(end @ theta[0] + theta[1]) for end in x]
        margin = ((h[0] - h[1]) @ theta[2])[:, 0]
        g = (c * (1 / (1 + np.exp(-margin)) - y) / c.sum())[:, None]
        back = [sign * g * theta[2].T * (1 - z**2) for sign, z in ((1, h[0]), (-1, h[1]))]
        grads = [sum(a.T @ z for a, z in zip(x, back, strict=True)), sum(z.sum(0) for z in back), (h[0] - h[1]).T @ g]
        for i, grad in enumerate(grads):
            m[i], v[i] = 0.9 * m[i] + 0.1 * grad, 0.999 * v[i] + 0.001 * grad**2
            update = m[i] / (1 - 0.9**t) / (np.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
            theta[i] = theta[i] - lr * (update + decay * theta[i])
    return theta


@pytest.mark.parametrize("batching", ["map", "vmap"])
def test_steps_are_those_of_adamw_by_hand(batching, key):
    head = mlp_head((5,), "tanh")
    e, pairs, _ = problem()
    pairs = dataclasses.replace(pairs, weight=jnp.linspace(0.5, 2, 40))
    start = jax.vmap(lambda k: head.init(k, 6))(jax.random.split(jax.random.fold_in(key, 1), 1))
    params, info = fit_of(head, dataclasses.replace(FEW, batching=batching))(key, HPARAMS, e, pairs, start)
    expected = adamw64(jax.tree.map(lambda p: p[0], start), e, pairs, 1e-2, 1e-2, 7)
    got = params["hidden"][0]["kernel"][0], params["hidden"][0]["bias"][0], params["out"]["kernel"][0]
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    assert info.steps[0] == 7
    assert np.isnan(info.valid_nll[0])


@pytest.mark.parametrize(
    "config", [slow(two_halves()), two_halves(folds=1, holdout=0.2), slow(two_halves(batch_size=16))]
)
def test_an_mlp_learns_and_stops(config, key):
    e, pairs, gold = problem(n=100, capacity=100)
    params, info = fit_of(SMALL, config)(key, HPARAMS, e, pairs)
    rewards = SMALL.rewards(jax.tree.map(lambda p: p[0], params), e)
    assert np.corrcoef(rewards, gold)[0, 1] > 0.75
    assert info.train_nll[0] < info.valid_nll[0] < 0.6
    assert 10 <= info.steps[0] < 500
    assert info.steps[0] % config.check_every == 0
    assert info.status == Status.OK


@pytest.mark.parametrize(
    ("head", "config"),
    [
        slow(SMALL, two_halves(members=2)),
        slow(SMALL, two_halves(members=3, folds=1, holdout=0.2, ensemble="bootstrap")),
        slow(SMALL, two_halves(members=2, batch_size=8, folds=1)),
        (HEADS[1], two_halves(members=3, ensemble="bootstrap")),
    ],
)
@pytest.mark.slow
@pytest.mark.nightly
def test_members_in_turn_and_together_are_the_same(head, config, key):
    e, pairs, _ = problem()
    fits = [fit_of(head, dataclasses.replace(config, batching=batching)) for batching in ("map", "vmap")]
    one, other = (fit(jax.random.clone(key), HPARAMS, e, pairs) for fit in fits)
    chex.assert_trees_all_close(one, other, rtol=2e-3, atol=2e-4)
    members = np.asarray(jax.vmap(head.rewards, (0, None))(one[0], e))
    assert np.linalg.matrix_rank(members - members.mean(1, keepdims=True)) == config.members


CASES = [problem(n=n, capacity=103, responses=400) for n in (1, 40, 103)]


@pytest.mark.slow
@pytest.mark.parametrize("config", [slow(two_halves(holdout=0.2)), two_halves(holdout=0.2, folds=1, members=6)])
@pytest.mark.nightly
def test_small_sizes_are_branched_to_without_a_trace_of_it(config, monkeypatch):
    fit = make_fit(SMALL, config)
    branching = [fit(jax.random.key(0), HPARAMS, e, pairs) for e, pairs, _ in CASES]
    monkeypatch.setattr(training, "MAX_CAPACITIES", 1)
    fit = make_fit(SMALL, config)
    for (e, pairs, _), found in zip(CASES, branching, strict=True):
        chex.assert_trees_all_close(found, fit(jax.random.key(0), HPARAMS, e, pairs), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.nightly
def test_under_vmap_all_take_the_size_of_the_largest():
    fit, (e, *_) = make_fit(SMALL, two_halves(holdout=0.2)), CASES[0]
    labelled = [pairs for _, pairs, _ in CASES]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *labelled)
    together = jax.jit(jax.vmap(lambda pairs: fit(jax.random.key(0), HPARAMS, e, pairs)))
    compiled = together.lower(stacked).compile()
    assert "conditional" in compiled.as_text()  # not all branches and a choice
    for at, pairs in enumerate(labelled):
        found = jax.tree.map(lambda leaf: leaf[at], compiled(stacked))  # noqa: B023
        chex.assert_trees_all_close(found, fit(jax.random.key(0), HPARAMS, e, pairs), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("batching", sampled(["map", "vmap"], "vmap"))
def test_what_is_not_labelled_is_not_looked_at(head, batching, key):
    e, pairs, _ = problem()
    junk = jnp.where(pairs.mask, 0, 7)
    changed = Labelled(pairs.first + junk, pairs.second + junk, pairs.label + junk, pairs.weight + junk, pairs.mask)
    config = two_halves() if head.linear else OWN_PARTS
    fit = fit_of(head, dataclasses.replace(config, batching=batching))
    chex.assert_trees_all_equal(
        fit(key, HPARAMS, e, pairs), fit(jax.random.clone(key), HPARAMS, e, jax.tree.map(jnp.asarray, changed))
    )


def test_each_member_trains_without_its_own_part(key):
    """Which labels a member's parameters depend on, by flipping them one at a time."""
    e, pairs, _ = problem(n=20, capacity=24)
    config = two_halves(members=5, folds=1, holdout=0.2, steps=3, check_every=3)  # one step of Adam sees signs only
    fit = make_fit(SMALL, config)

    def weights(label):
        return fit(jax.random.clone(key), HPARAMS, e, dataclasses.replace(pairs, label=label))[0]["hidden"][1]["kernel"]

    flips = jnp.where(jnp.eye(25, 24, -1, dtype=bool), 1 - pairs.label[None, :], pairs.label[None, :])
    found = jax.lax.map(weights, flips)
    changes = (found[1:] != found[:1]).any(axis=(2, 3))
    without = ~np.asarray(changes)[:20]
    np.testing.assert_array_equal(without.sum(axis=0), 4)
    np.testing.assert_array_equal(without.sum(axis=1), 1)
    assert not changes[20:].any()


@pytest.mark.slow
def test_held_out_loss_is_of_all_that_is_held_out(key):
    """With as many members as parts, every pair is judged once, by the member that did not see it."""
    e, pairs, _ = problem(n=20)
    params, info = fit_of(SMALL, OWN_PARTS)(key, HPARAMS, e, pairs)
    rewards = np.float64(jax.vmap(SMALL.rewards, (0, None))(params, e))
    margin = rewards[:, np.asarray(pairs.first)[:20]] - rewards[:, np.asarray(pairs.second)[:20]]
    losses = np.logaddexp(0, np.where(np.asarray(pairs.label)[:20] > 0, -margin, margin))
    train, valid = np.float64(info.train_nll), np.float64(info.valid_nll)
    # Both members' losses over all pairs are their training halves and, together, what each held out.
    np.testing.assert_allclose(losses.sum(), 10 * train.sum() + 20 * valid[0], rtol=1e-5)
    assert valid[0] == valid[1]


def test_weights_count_only_relative_to_one_another(key):
    e, pairs, _ = problem()
    pairs = dataclasses.replace(pairs, weight=jnp.linspace(0, 2, 40))
    fit = fit_of(SMALL, FEW)
    heavier = fit(jax.random.clone(key), HPARAMS, e, dataclasses.replace(pairs, weight=4 * pairs.weight))
    chex.assert_trees_all_close(fit(key, HPARAMS, e, pairs), heavier, rtol=1e-5)


@pytest.mark.slow
def test_a_warm_start_is_where_it_starts(key):
    e, pairs, _ = problem()
    start = jax.vmap(lambda k: SMALL.init(k, 6))(jax.random.split(jax.random.fold_in(key, 1), 2))
    still = HParams(learning_rate=0.0, weight_decay=0.0)
    params, _ = make_fit(SMALL, two_halves(members=2))(key, still, e, pairs, start)
    chex.assert_trees_all_equal(params, start)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("head", [SMALL, HEADS[1]])
def test_one_program_for_all_rounds_and_seeds(head, key):
    """Scanned over a growing set, seeds mapped or batched: the same fits, compiled once, with strong types."""
    e, pairs, _ = problem(n=40)
    fit = fit_of(head, two_halves() if head.linear else OWN_PARTS)

    def rounds(key):
        def step(_, n):
            grown = dataclasses.replace(pairs, mask=jnp.arange(40) < n)
            return None, fit(jax.random.fold_in(key, n), HPARAMS, e, grown)

        return jax.lax.scan(step, None, jnp.array([0, 10, 40]))[1]

    keys = jax.random.split(key, 3)
    mapped, batched = jax.jit(lambda k: jax.lax.map(rounds, k))(keys), jax.jit(jax.vmap(rounds))(keys)
    # A Newton step more or less, where the decrement rounds to either side of its bound, moves nothing else.
    np.testing.assert_allclose(mapped[1].steps, batched[1].steps, atol=1 if head.linear else 0)
    mapped, batched = ((params, info._replace(steps=0)) for params, info in (mapped, batched))
    chex.assert_trees_all_close(mapped, batched, rtol=2e-3, atol=2e-4)
    assert (mapped[1].status == Status.OK).all()
    leaves = jax.tree.leaves(jax.eval_shape(fit, key, HPARAMS, e, pairs))
    assert not any(leaf.weak_type for leaf in leaves)
    assert {leaf.dtype.name for leaf in leaves} == {"float32", "int32"}

    fit(jax.random.fold_in(key, 1), HPARAMS, e, pairs)  # may be what another test has compiled
    compiled = fit._cache_size()
    fit(jax.random.fold_in(key, 2), dataclasses.replace(HPARAMS, learning_rate=jnp.float32(0.1)), e, pairs)
    assert fit._cache_size() == compiled


def test_a_fit_that_blows_up_is_a_status(key):
    e, pairs, _ = problem()
    for config in (OWN_PARTS, FEW):
        params, info = fit_of(SMALL, config)(
            jax.random.clone(key), dataclasses.replace(HPARAMS, learning_rate=jnp.float32(1e30)), e, pairs
        )
        assert info.status == Status.DIVERGED
        if config.holdout:  # what was best was the start
            assert (info.steps == 0).all()
            chex.assert_tree_all_finite(params)


@pytest.mark.slow
def test_linear_ensembles_need_a_bootstrap(key):
    with pytest.raises(JarmError, match="bootstrap"):
        make_fit(linear_head(), two_halves(members=2, ensemble="init"))
    e, pairs, _ = problem()
    params, _ = make_fit(linear_head(), FitConfig(members=2))(key, HPARAMS, e, pairs)
    first, second = params["out"]["kernel"]
    assert (first != second).all()


@pytest.mark.slow
def test_smoothed_labels_are_labels_moved_towards_even_odds(key):
    e, pairs, _ = problem()
    smoothed = fit_of(SMALL, FEW)(key, dataclasses.replace(HPARAMS, label_smoothing=jnp.float32(0.3)), e, pairs)
    moved = dataclasses.replace(pairs, label=0.7 * pairs.label + 0.15)
    chex.assert_trees_all_close(smoothed, fit_of(SMALL, FEW)(jax.random.clone(key), HPARAMS, e, moved), rtol=1e-4)


def test_linear_classification_is_logistic_regression_of_responses(key):
    e, pairs, _ = problem()
    params, info = make_fit(linear_head(), FitConfig(members=1, loss="classification"))(key, HPARAMS, e, pairs)
    x = np.float64(e)[np.concatenate([pairs.first, pairs.second])]
    y, real = np.concatenate([pairs.label, 1 - pairs.label]), np.tile(pairs.mask, 2)

    def criterion(w):
        return np.logaddexp(0, np.where(y > 0, -1, 1) * (x @ w))[real].sum() + 0.25 * w @ w  # ridge / 2 = 0.25

    best = scipy.optimize.minimize(criterion, np.zeros(6), tol=1e-10).x
    np.testing.assert_allclose(params["out"]["kernel"][0, :, 0], best, rtol=1e-3, atol=1e-4)
    loss = (criterion(best) - 0.25 * best @ best) / np.sum(pairs.mask)
    np.testing.assert_allclose(info.train_nll[0], loss, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["map", "vmap"])
def test_classification_descends_on_its_own_loss(batching, key):
    """One step of Adam moves every parameter against the sign of the gradient, here taken by autograd."""
    e, pairs, _ = problem(n=40)
    config = two_halves(holdout=0.0, steps=1, loss="classification", batching=batching)
    start = jax.vmap(lambda k: SMALL.init(k, 6))(jax.random.split(jax.random.fold_in(key, 1), 1))
    params, info = make_fit(SMALL, config)(key, HPARAMS, e, pairs, start)

    def loss(one):
        return classification(*(SMALL.rewards(one, e[end]) for end in (pairs.first, pairs.second)), pairs.label).mean()

    before, after = (jax.tree.map(lambda p: p[0], tree) for tree in (start, params))
    moved = jax.tree.map(lambda p, q: (q - 0.9999 * p) / 1e-2, before, after)  # learning rate x decay = 1e-4
    chex.assert_trees_all_close(moved, jax.tree.map(lambda g: -jnp.sign(g), jax.grad(loss)(before)), atol=1e-2)
    np.testing.assert_allclose(info.train_nll[0], loss(after), rtol=1e-4)


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"members": 0}, "members"),
        ({"patience": 0}, "patience"),
        ({"holdout": 0.6}, "holdout"),
        ({"folds": 6}, "folds"),
        ({"batch_size": 0}, "batch_size"),
        ({"ensemble": "bagging"}, "init, bootstrap"),
        ({"loss": "hinge"}, "bradley_terry, classification"),
        ({"batching": "scan"}, "auto, vmap, map"),
    ],
)
def test_settings_without_sense_are_named(setting, word):
    with pytest.raises(JarmError, match=word):
        FitConfig(**setting)
