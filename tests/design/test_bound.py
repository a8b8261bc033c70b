import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import sampled
from references import best_subset64, log_det64

from jarm.core.base import Limits, Selection
from jarm.core.status import JarmError, Status
from jarm.design.bound import design_bound, efficiency, rounded
from jarm.design.criteria import D_OPTIMAL, D_UNWEIGHTED, a_optimal
from jarm.design.greedy import greedy
from jarm.design.spaces import listed_space, pair_space
from jarm.design.top import random_pairs
from jarm.testing.conformance import SPACES, check_batch
from jarm.testing.references import differences64, list_pairs, weights64
from jarm.testing.tracing import count_compilations, quick_jit

PROMPTS, WIDTH, F = 5, 4, 4
SIZE = PROMPTS * WIDTH


@functools.partial(quick_jit, static_argnames=("k", "steps"))
def bound(features, rewards, space, prior, start, k, steps=20, gap=1e-3):
    return design_bound(D_OPTIMAL, features, rewards, space, prior, k, start=start, steps=steps, gap=gap, exchanges=200)


drawn = quick_jit(random_pairs, static_argnames="k")


def problem(rng, kind, *, shape="plain", prior_power=0.0, size=SIZE, width=F):
    features = rng.normal(size=(size, width)).astype(np.float32)
    rewards = rng.normal(size=size).astype(np.float32) * np.float32(10 ** rng.uniform(-1, 1))
    prior = np.eye(width)
    if shape == "copies":
        features[1::2], rewards[1::2] = features[::2], rewards[::2]
    elif shape == "offset":
        features = features + np.float32(64)
    elif shape == "line":
        features[:, 1:] = features[:, :1]
    elif shape == "stretched":  # information of condition about 1e6, along no axis
        basis = np.linalg.qr(rng.normal(size=(width, width)))[0]
        features = (features * np.logspace(0, -3, width) @ basis).astype(np.float32)
        prior = basis.T @ np.diag(np.logspace(0, -5, width)) @ basis
    prior = (10**prior_power * prior).astype(np.float32)
    eligible = jnp.asarray(rng.random(size) < 0.9)
    if kind == "listed":
        space = listed_space(jnp.asarray(rng.integers(0, size, (60, 2)), jnp.int32), eligible, WIDTH)
    else:
        space = pair_space(kind, WIDTH, eligible, jnp.asarray(rng.integers(0, size + 2, (8, 2)), jnp.int32))
    return features, rewards, space, prior


def put(array, place, value):
    array = array.copy()
    array[place] = value
    return array


def swapped_best64(z, prior, k, starts, rng):
    """The best of some batches that no single swap improves, in float64: close to the best of all."""
    best = -np.inf
    for _ in range(starts):
        batch = list(rng.permutation(len(z))[:k])
        value = -np.inf
        while True:
            found = value, batch
            for i in range(k):
                rest = batch[:i] + batch[i + 1 :]
                information = prior + z[rest].T @ z[rest]
                gains = np.log1p((z * np.linalg.solve(information, z.T).T).sum(axis=1))
                gains[rest] = -np.inf
                j = int(gains.argmax())
                reached = np.linalg.slogdet(information)[1] + gains[j]
                if reached > found[0] + 1e-10:
                    found = reached, [*rest[:i], j, *rest[i:]]
            if found[0] <= value + 1e-10:
                break
            value, batch = found
        best = max(best, value)
    return best


def relaxed64(z, prior, k, steps=20_000):
    """The most that weights in [0, 1] summing to k reach, between two bounds: a long Frank-Wolfe run in float64."""
    weights = np.full(len(z), k / len(z))
    upper = np.inf
    for _ in range(steps):
        information = prior + (z.T * weights) @ z
        u = (z * np.linalg.solve(information, z.T).T).sum(axis=1)
        top = np.argsort(-u)[:k]
        lower = np.linalg.slogdet(information)[1]
        upper = min(upper, lower - weights @ u + u[top].sum())
        vertex = np.zeros(len(z))
        vertex[top] = 1
        step = vertex - weights
        if upper - lower < 1e-4:
            break
        eigen = np.linalg.eigvals(np.linalg.solve(information, (z.T * step) @ z)).real
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if (eigen / (1 + middle * eigen)).sum() > 0 else (low, middle)
        weights = weights + low * step
    return lower, upper


@pytest.mark.slow
@pytest.mark.nightly
@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([("within", 6), ("cross", 6), ("all", 6), ("listed", 6), ("all", 2)]),
    st.floats(-4, 2),
    st.sampled_from(["plain", "copies", "offset", "line", "stretched"]),
)
def test_no_batch_is_above_the_bound(seed, kind, prior_power, shape):
    """Neither greedy's, nor random ones, nor the best that exchange in float64 finds; whatever the number of steps."""
    kind, k = kind
    rng = np.random.default_rng(seed)
    features, rewards, space, prior = problem(rng, kind, shape=shape, prior_power=prior_power)
    pairs = list_pairs(space)
    if len(pairs) <= k:
        return
    start = drawn(jax.random.key(seed), space, k)
    design = bound(features, rewards, space, prior, start, k)
    assert design.status == Status.OK
    upper, passes = float(design.upper), int(design.passes)
    z = np.sqrt(weights64(rewards, pairs))[:, None] * differences64(features, pairs)
    best = swapped_best64(z, np.float64(prior), k, 2, rng)
    for reached in (best, log_det64(features, rewards, np.asarray(start.pairs), prior)):
        assert reached <= upper, (reached, upper)
    # A single pass is a bound, too.
    once = bound(features, rewards, space, prior, start, k, gap=1e9)
    assert int(once.passes) == 1
    assert best <= float(once.upper)
    # Weights are those of a design that may be: the bounds are of one problem.
    weights = np.asarray(design.weights)
    assert weights.min() >= 0
    assert weights.max() <= 1
    np.testing.assert_allclose(weights.sum(), k, rtol=1e-4)
    offered = {tuple(pair) for pair in pairs.tolist()}
    weighty = [tuple(pair) for pair in np.asarray(design.pairs)[weights > 0].tolist()]
    assert set(weighty) <= offered
    assert len(set(weighty)) == len(weighty)
    assert float(design.rounding) > 0
    if k >= F:  # nor is what the weights reach, which a batch need not
        chosen, share = np.asarray(design.pairs)[weights > 0], weights[weights > 0].astype(float)
        z = np.sqrt(weights64(rewards, chosen))[:, None] * differences64(features, chosen)
        assert np.linalg.slogdet(np.float64(prior) + (z.T * (share * min(1, k / share.sum()))) @ z)[1] <= upper
    assert (np.asarray(design.gaps)[passes:] == np.inf).all()
    assert float(design.upper - design.lower) >= 0


@pytest.mark.parametrize(("kind", "k"), sampled([("within", 6), ("all", 2)], ("within", 6)))
def test_the_best_of_all_batches_is_below_and_near(kind, k):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        features, rewards, space, prior = problem(rng, kind)
        space = dataclasses.replace(space, eligible=jnp.arange(SIZE) < (8 if kind == "within" else SIZE))
        pairs = list_pairs(space)
        design = bound(features, rewards, space, prior, drawn(jax.random.key(seed), space, k), k)
        best = best_subset64(features, rewards, pairs, prior, k)
        assert best <= float(design.upper)
        assert float(efficiency(jnp.float32(best), design.upper, F)) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", sampled(SPACES, "within", "listed"))
def test_the_bounds_close_in_on_the_best_weights(kind):
    """For k >= F those of the relaxed log det, as a long run in float64 has it."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        features, rewards, space, prior = problem(rng, kind, prior_power=-1)
        pairs = list_pairs(space)
        z = np.sqrt(weights64(rewards, pairs))[:, None] * differences64(features, pairs)
        lower, upper = relaxed64(z, np.float64(prior), 6)
        assert upper - lower < 2e-2
        design = bound(features, rewards, space, prior, drawn(jax.random.key(seed), space, 6), 6, gap=1e-4)
        assert int(design.passes) < 20
        assert float(design.upper) >= lower
        assert float(design.lower) <= upper + 1e-5
        assert float(design.upper - design.lower) <= 1e-4 * F
        # `lower` is the log det with the weights.
        weighty = np.asarray(design.weights) > 0
        chosen = np.asarray(design.pairs)[weighty]
        z = np.sqrt(weights64(rewards, chosen))[:, None] * differences64(features, chosen)
        own = np.linalg.slogdet(np.float64(prior) + (z.T * np.asarray(design.weights)[weighty]) @ z)[1]
        np.testing.assert_allclose(design.lower, own, atol=1e-4)


@pytest.mark.slow
@pytest.mark.nightly
def test_small_batches_have_a_tighter_bound_than_the_relaxed_log_det():
    """k < F: below what weights that spread over all directions reach, and still above the best batch."""
    rng = np.random.default_rng(0)
    features, rewards, space, prior = problem(rng, "all", prior_power=-3)
    pairs = list_pairs(space)
    design = bound(features, rewards, space, prior, drawn(jax.random.key(0), space, 2), 2)
    z = np.sqrt(weights64(rewards, pairs))[:, None] * differences64(features, pairs)
    assert float(design.upper) < relaxed64(z, np.float64(prior), 2)[0] - 1
    assert best_subset64(features, rewards, pairs, prior, 2) <= float(design.upper)


@pytest.mark.slow
def test_limits_and_costs_leave_the_bound_valid():
    rng = np.random.default_rng(1)
    features, rewards, space, prior = problem(rng, "all")
    start = drawn(jax.random.key(0), space, 6)
    upper = float(bound(features, rewards, space, prior, start, 6).upper)
    priced = dataclasses.replace(space, costs=jnp.asarray(rng.uniform(1, 2, SIZE), jnp.float32))
    assert float(bound(features, rewards, priced, prior, start, 6).upper) == upper
    limits = Limits(per_response=1, per_prompt=4)
    limited = quick_jit(functools.partial(greedy, D_OPTIMAL, k=6, limits=limits))(features, rewards, space, prior)[0]
    assert log_det64(features, rewards, np.asarray(limited.pairs), prior) <= upper


@pytest.mark.slow
def test_rounding_gives_a_batch_of_the_space():
    from_design = quick_jit(functools.partial(rounded, D_OPTIMAL, k=6))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        features, rewards, space, prior = problem(rng, "all")
        design = bound(features, rewards, space, prior, drawn(jax.random.key(0), space, 6), 6)
        batch = from_design(features, rewards, space, prior, design=design)
        check_batch(batch, space, 6)
        reached = log_det64(features, rewards, np.asarray(batch.pairs), prior)
        assert reached <= float(design.upper)
        assert float(efficiency(jnp.float32(reached), design.upper, F)) > 0.95


@pytest.mark.slow
def test_spaces_with_no_more_pairs_than_the_batch():
    """All of them is the best that there is, and the bound says so."""
    rng = np.random.default_rng(3)
    features, rewards, space, prior = problem(rng, "all")
    few = dataclasses.replace(space, eligible=jnp.arange(SIZE) < 3, excluded=jnp.full((8, 2), SIZE, jnp.int32))
    design = bound(features, rewards, few, prior, drawn(jax.random.key(0), few, 6), 6)
    every = log_det64(features, rewards, list_pairs(few), prior)
    assert every <= float(design.upper) <= every + 1e-3
    assert int(design.passes) == 1


@pytest.mark.slow
@pytest.mark.nightly
def test_the_unweighted_criterion_and_the_refusal_of_others():
    rng = np.random.default_rng(4)
    features, rewards, space, prior = problem(rng, "all")
    one = quick_jit(functools.partial(design_bound, D_UNWEIGHTED, k=6))(features, rewards, space, prior)
    flat = np.zeros(SIZE, np.float32)
    start = drawn(jax.random.key(0), space, 6)
    quarter = bound(features, flat, space, prior / 4, start, 6)  # v = 1/4 everywhere
    np.testing.assert_allclose(one.upper, quarter.upper + F * np.log(4), atol=2e-3 * F)
    with pytest.raises(JarmError, match="log determinant"):
        design_bound(a_optimal(F), *map(jnp.asarray, (features, rewards)), space, jnp.asarray(prior), 6)


def test_bad_input_is_a_status():
    rng = np.random.default_rng(5)
    features, rewards, space, prior = problem(rng, "all")
    start = drawn(jax.random.key(0), space, 6)
    reachable = int(list_pairs(space)[0, 0])
    assert bound(features, rewards, space, -prior, start, 6).status == Status.SINGULAR
    assert bound(put(features, reachable, np.nan), rewards, space, prior, start, 6).status == Status.NONFINITE
    assert bound(features, put(rewards, reachable, np.inf), space, prior, start, 6).status == Status.NONFINITE
    unreachable = int(np.flatnonzero(~np.asarray(space.eligible))[0])
    spoilt = bound(put(features, unreachable, np.nan), put(rewards, unreachable, np.nan), space, prior, start, 6)
    assert spoilt.status == Status.OK
    np.testing.assert_allclose(spoilt.upper, bound(features, rewards, space, prior, start, 6).upper, atol=2e-3)


@pytest.mark.slow
@pytest.mark.nightly
def test_vmap_gives_what_each_gives_alone_and_nothing_compiles_twice():
    rng = np.random.default_rng(6)
    cases = [problem(rng, "all") for _ in range(2)]
    space = cases[0][2]
    features, rewards, prior = (np.stack([case[place] for case in cases]) for place in (0, 1, 3))
    starts = [drawn(jax.random.key(seed), space, 6) for seed in range(2)]
    alone = [bound(f, r, space, p, s, 6) for f, r, p, s in zip(features, rewards, prior, starts, strict=True)]
    stacked: Selection = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    both = quick_jit(jax.vmap(lambda f, r, p, s: design_bound(D_OPTIMAL, f, r, space, p, 6, start=s)))(
        features, rewards, prior, stacked
    )
    np.testing.assert_allclose(both.upper, [each.upper for each in alone], atol=2e-3 * F)
    other = features[1] + 1
    with count_compilations() as compiled:
        jax.block_until_ready(bound(other, rewards[1], space, prior[1], starts[0], 6))
    assert not compiled
