import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import sampled
from references import best_subset64, greedy64, log_det64

from jarm.core.base import Limits, Selection
from jarm.core.status import JarmError, Status
from jarm.design.criteria import D_OPTIMAL, D_UNWEIGHTED, a_optimal
from jarm.design.exchange import exchange
from jarm.design.spaces import listed_space, pair_space
from jarm.design.top import random_pairs
from jarm.testing.references import differences64, information64, list_pairs, weights64
from jarm.testing.tracing import count_compilations, quick_jit

PROMPTS, WIDTH, F, K = 5, 4, 3, 5
SIZE = PROMPTS * WIDTH
CASES = {
    "within": ("within", None),
    "cross, caps": ("cross", Limits(per_prompt=4, per_response=2)),
    "all, caps and guard": ("all", Limits(per_prompt=4, per_response=2, similarity=0.9)),
    "all, costs": ("all", None),
    "listed, costs": ("listed", None),
}


@functools.partial(quick_jit, static_argnames="shortlist")
def improved(features, rewards, space, prior, selection, limits=None, shortlist=6):
    return exchange(D_OPTIMAL, features, rewards, space, prior, selection, limits=limits, shortlist=shortlist)


drawn = quick_jit(random_pairs, static_argnames="k")


def problem(rng, name, prior_power=0.0):
    kind, limits = CASES[name]
    features = rng.normal(size=(SIZE, F)).astype(np.float32)
    rewards = rng.normal(size=SIZE).astype(np.float32) * np.float32(10 ** rng.uniform(-1, 0.5))
    eligible = jnp.asarray(rng.random(SIZE) < 0.9)
    costs = jnp.asarray(rng.uniform(1, 2, 60 if kind == "listed" else SIZE), jnp.float32)
    if kind == "listed":
        space = listed_space(jnp.asarray(rng.integers(0, SIZE, (60, 2)), jnp.int32), eligible, WIDTH, costs)
    else:
        space = pair_space(kind, WIDTH, eligible, jnp.asarray(rng.integers(0, SIZE + 2, (8, 2)), jnp.int32))
        if name.endswith("costs"):
            space = dataclasses.replace(space, costs=costs)
    prior = np.float32(10**prior_power) * np.eye(F, dtype=np.float32)
    return features, rewards, space, prior, limits


def price(space, pair):
    if space.costs is None:
        return 0.0
    costs = np.asarray(space.costs, np.float64)
    if space.pairs is None:
        return costs[list(pair)].sum()
    return costs[np.flatnonzero((np.asarray(space.pairs) == pair).all(axis=1))[0]]


def allowed(features, limits, batch):
    """Whether a batch keeps to the limits."""
    if limits is None:
        return True
    if max(np.bincount(np.ravel(batch), minlength=SIZE)) > limits.per_response:
        return False
    prompts = [set(np.array(pair) // WIDTH) for pair in batch]
    if max(sum(prompt in own for own in prompts) for prompt in range(PROMPTS)) > limits.per_prompt:
        return False
    if limits.similarity is None:
        return True
    x = differences64(features, np.array(batch))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return np.abs(np.triu(x @ x.T, 1)).max() < limits.similarity


def some_batch(rng, features, space, limits):
    """Random pairs, one after the other where the limits leave room."""
    batch = []
    for pair in rng.permutation(list_pairs(space)).tolist():
        if len(batch) < K and allowed(features, limits, [*batch, pair]):
            batch.append(pair)
    valid = np.arange(K) < len(batch)
    pairs = np.array(batch + [[0, 0]] * (K - len(batch)), np.int32)
    return Selection(jnp.asarray(pairs), jnp.zeros(K), jnp.asarray(valid), jnp.int32(Status.OK))


def best_swap64(features, rewards, space, prior, limits, batch):
    """The most that a single swap gains, in nats: every member for every pair outside, costs and limits kept."""
    pairs, best = list_pairs(space), -np.inf
    z = np.sqrt(weights64(rewards, pairs))[:, None] * differences64(features, pairs)
    squares = z[:, :, None] * z[:, None, :]
    now = log_det64(features, rewards, np.array(batch), prior)
    for place in range(len(batch)):
        others = batch[:place] + batch[place + 1 :]
        rest = prior + information64(features, rewards, np.array(others))
        gains = np.linalg.slogdet(rest + squares)[1] - now
        for index in np.argsort(-gains):
            pair = pairs[index].tolist()
            if gains[index] <= best:
                break
            if pair in batch or price(space, pair) > price(space, batch[place]):
                continue
            if allowed(features, limits, [*others, pair]):
                best = gains[index]
    return best


@pytest.mark.slow
@pytest.mark.nightly
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(CASES)), st.floats(-4, 1))
def test_a_batch_only_becomes_better_until_no_swap_helps(seed, name, prior_power):
    rng = np.random.default_rng(seed)
    features, rewards, space, prior, limits = problem(rng, name, prior_power)
    given = some_batch(rng, features, space, limits)
    count = int(given.valid.sum())
    batch, info = improved(features, rewards, space, prior, given, limits)
    assert batch.status == Status.OK
    before, after = (np.asarray(each.pairs)[:count].tolist() for each in (given, batch))
    assert np.asarray(batch.valid).tolist() == (np.arange(K) < count).tolist()
    reached, start = (log_det64(features, rewards, np.array(each), prior) for each in (after, before))
    assert reached >= start
    np.testing.assert_allclose(info.gained, reached - start, atol=1e-4)
    if int(info.swaps):
        # In greedy order, with the gains of that order.
        root = np.linalg.slogdet(np.float64(prior))[1]
        np.testing.assert_allclose(batch.gains.sum(), reached - root, rtol=1e-4, atol=1e-5)
        assert (np.diff(np.asarray(batch.gains)[:count]) <= 1e-4).all()
    else:
        assert after == before
    assert {tuple(pair) for pair in after} <= {tuple(pair) for pair in list_pairs(space).tolist()}
    assert len({tuple(pair) for pair in after}) == count
    assert allowed(features, limits, after)
    assert sum(price(space, pair) for pair in after) <= sum(price(space, pair) for pair in before) + 1e-6
    if info.optimal:
        assert best_swap64(features, rewards, space, prior, limits, after) <= 2e-4
    else:
        # A pass cannot see copies nor the costs of a list, so a shortlist may hold nothing that may be had.
        assert name in ("all, caps and guard", "listed, costs")


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(["all, caps and guard", "listed, costs"], "all, caps and guard"))
def test_a_long_shortlist_is_always_enough(name):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        features, rewards, space, prior, limits = problem(rng, name)
        given = some_batch(rng, features, space, limits)
        batch, info = improved(features, rewards, space, prior, given, limits, shortlist=200)
        assert info.optimal
        after = np.asarray(batch.pairs)[np.asarray(batch.valid)].tolist()
        assert best_swap64(features, rewards, space, prior, limits, after) <= 2e-4


def test_greedy_is_beaten_where_its_first_choice_is_wrong():
    """The longest difference is a diagonal; the best two are the axes."""
    features = np.zeros((SIZE, F), np.float32)
    features[0], features[2], features[4] = [1.1, 1.1, 0], [1.5, 0, 0], [0, 1.5, 0]
    listed = listed_space(jnp.array([[0, 1], [2, 3], [4, 5]] + [[SIZE, SIZE]] * 57, jnp.int32), jnp.ones(SIZE, bool), 4)
    rewards, prior, pairs = np.zeros(SIZE, np.float32), np.eye(F, dtype=np.float32) * 0.01, list_pairs(listed)
    picks = pairs[greedy64(features, rewards, pairs, prior, 2).picks]
    start = Selection(jnp.asarray(picks, jnp.int32), jnp.zeros(2), jnp.ones(2, bool), jnp.int32(0))
    batch, info = improved(features, rewards, listed, prior, start)
    assert picks.tolist()[0] == [0, 1]
    assert sorted(np.asarray(batch.pairs).tolist()) == [[2, 3], [4, 5]]
    reached = log_det64(features, rewards, np.asarray(batch.pairs), prior)
    np.testing.assert_allclose(reached, best_subset64(features, rewards, pairs, prior, 2), rtol=1e-6)
    assert int(info.swaps) == 1
    assert info.optimal


@pytest.mark.slow
@pytest.mark.nightly
def test_swaps_can_be_limited():
    rng = np.random.default_rng(3)
    features, rewards, space, prior, _ = problem(rng, "within")
    given = some_batch(rng, features, space, None)
    program = quick_jit(functools.partial(exchange, D_OPTIMAL))
    values = []
    for swaps in range(3):
        batch, info = program(features, rewards, space, prior, given, swaps=swaps)
        assert int(info.swaps) == swaps
        assert not info.optimal
        values.append(log_det64(features, rewards, np.asarray(batch.pairs), prior))
    assert values == sorted(values)
    assert values[0] < values[2]


@pytest.mark.slow
@pytest.mark.nightly
def test_the_unweighted_criterion_and_the_refusal_of_others():
    rng = np.random.default_rng(4)
    features, rewards, space, prior, _ = problem(rng, "within")
    given = some_batch(rng, features, space, None)
    batch, info = quick_jit(functools.partial(exchange, D_UNWEIGHTED))(features, rewards, space, prior, given)
    assert info.optimal
    quarter, _ = improved(
        features, np.zeros(SIZE, np.float32), space, prior / 4, given, shortlist=1024
    )  # v = 1/4 everywhere
    assert sorted(np.asarray(batch.pairs).tolist()) == sorted(np.asarray(quarter.pairs).tolist())
    with pytest.raises(JarmError, match="log determinant"):
        exchange(a_optimal(F), *map(jnp.asarray, (features, rewards)), space, jnp.asarray(prior), given)


def test_bad_input_is_a_status_and_leaves_the_batch():
    rng = np.random.default_rng(5)
    features, rewards, space, prior, _ = problem(rng, "within")
    given = some_batch(rng, features, space, None)
    reachable, unreachable = int(list_pairs(space)[0, 0]), int(np.flatnonzero(~np.asarray(space.eligible))[0])
    for value in (np.nan, np.inf):
        for place, status in ((reachable, Status.NONFINITE), (unreachable, Status.OK)):
            spoilt = features.copy(), rewards.copy()
            spoilt[0][place], spoilt[1][place] = value, value
            batch, info = improved(*spoilt, space, prior, given)
            assert batch.status == status
            assert bool((batch.pairs == given.pairs).all()) == (status != Status.OK)
            assert bool(info.optimal) == (status == Status.OK)
    batch, _ = improved(features, rewards, space, -prior, given)
    assert batch.status == Status.SINGULAR
    assert (batch.pairs == given.pairs).all()
    # What was wrong with the batch before is still said.
    short = dataclasses.replace(given, status=jnp.int32(Status.LIMITED))
    assert improved(features, rewards, space, prior, short)[0].status == Status.LIMITED


@pytest.mark.slow
@pytest.mark.nightly
def test_vmap_gives_what_each_gives_alone_and_nothing_compiles_twice():
    rng = np.random.default_rng(6)
    features, rewards, space, prior, _ = problem(rng, "within")
    keys = jax.random.split(jax.random.key(0), 3)
    starts = [drawn(key, space, K) for key in keys]
    stacked: Selection = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    both, _ = quick_jit(
        jax.vmap(
            lambda start: exchange(
                D_OPTIMAL, *map(jnp.asarray, (features, rewards)), space, jnp.asarray(prior), start, shortlist=6
            )
        )
    )(stacked)
    alone = [improved(features, rewards, space, prior, start)[0] for start in starts]
    for place, each in enumerate(alone):
        assert (both.pairs[place] == each.pairs).all()
    other = features + 1
    with count_compilations() as compiled:
        jax.block_until_ready(improved(other, rewards, space, prior, starts[0]))
    assert not compiled


def test_by_hand_the_factor_of_a_swap():
    """(1 + u_j) (1 - u_i) + u_ij^2 is det after / det before, and at most 1 + u_j - u_i."""
    rng = np.random.default_rng(7)
    for _ in range(50):
        features, rewards, space, prior, _ = problem(rng, "within")
        pairs = list_pairs(space)
        batch = rng.permutation(len(pairs))[: K + 1]
        z = np.sqrt(weights64(rewards, pairs))[:, None] * differences64(features, pairs)
        information = prior + z[batch[:K]].T @ z[batch[:K]]
        u = z @ np.linalg.solve(information, z.T)
        i, j = batch[0], batch[K]
        factor = (1 + u[j, j]) * (1 - u[i, i]) + u[i, j] ** 2
        new = information + np.outer(z[j], z[j]) - np.outer(z[i], z[i])
        np.testing.assert_allclose(factor, np.linalg.det(new) / np.linalg.det(information), rtol=1e-9)
        assert factor <= 1 + u[j, j] - u[i, i] + 1e-12
