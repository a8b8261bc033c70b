"""Exact greedy of every criterion, over every space, under every constraint, against float64 that tries every pair."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import nightly, sampled, slow
from references import bald64, d_optimal64, epig64, greedy_steps64, v_optimal64

from jarm.core.base import Limits
from jarm.core.status import Status
from jarm.design.criteria import BALD, D_OPTIMAL, D_UNWEIGHTED, Criterion, a_optimal, epig, v_optimal
from jarm.design.greedy import greedy
from jarm.design.spaces import exclude, listed_space, pair_space
from jarm.testing.conformance import SPACES
from jarm.testing.references import list_pairs
from jarm.testing.tracing import count_compilations, quick_jit

PROMPTS, WIDTH, F, K, LISTED, FEW, MANY = 4, 4, 3, 6, 50, 2, 7
SIZE = PROMPTS * WIDTH
NAMES = ("d", "unweighted", "a", "v few", "v many", "epig", "bald")
FLOOR = {"bald": 3e-7, "epig": 3e-7}
"""Gains in nats that float32 cannot tell apart: entropies of order 1 are subtracted, or a logarithm is near 0."""


def criteria(targets, margins):
    """What is judged; A and V look at as many directions as there are features, or at fewer."""
    few, many = targets[:FEW], targets
    return {
        "d": D_OPTIMAL,
        "unweighted": D_UNWEIGHTED,
        "a": a_optimal(F),
        "v few": v_optimal(jnp.asarray(few)),
        "v many": v_optimal(jnp.asarray(many), jnp.arange(1.0, 1.0 + MANY)),
        "epig": epig(jnp.asarray(few), jnp.asarray(margins[:FEW])),
        "bald": BALD,
    }


def references(targets, margins):
    few, many, axes = targets[:FEW], targets, np.eye(F)
    return {
        "d": d_optimal64(),
        "unweighted": d_optimal64(weighted=False),
        "a": v_optimal64(axes, np.ones(F)),
        "v few": v_optimal64(few, np.full(FEW, 1 / FEW)),
        "v many": v_optimal64(many, np.arange(1.0, 1.0 + MANY)),
        "epig": epig64(few, margins[:FEW]),
        "bald": bald64(),
    }


def one_of(index, choices):
    """One criterion that is any of some, so that a single program serves them all: compiling is what takes the time."""
    width = max(0 if each.targets is None else each.targets.shape[0] for each in choices)
    goals = [jnp.zeros((0, F)) if each.targets is None else each.targets for each in choices]
    targets = jnp.stack([jnp.pad(each, ((0, width - each.shape[0]), (0, 0))) for each in goals])

    def of(pick):
        def call(*args):
            return jax.lax.switch(
                index,
                [functools.partial(pick, each, len(own)) for each, own in zip(choices, goals, strict=True)],
                *args,
            )

        return call

    def worth(each, count, margin, q, c, h):
        return each.worth(margin, q, c[:count], h[:count])

    def tile(each, count, rows, columns, h):
        return each.tile(rows._replace(c=rows.c[:, :count]), columns._replace(c=columns.c[:, :count]), h[:count])

    def ceiling(each, count, rest, z, shrunk, bound, threshold):
        return jnp.float32(jnp.inf) if each.ceiling is None else each.ceiling(rest, z[:count], shrunk, bound, threshold)

    return Criterion(
        of(worth),
        of(tile),
        of(lambda each, _, worth: each.gain(worth)),
        of(lambda each, _, margin: each.weight(margin)),
        of(ceiling),
        targets[index],
    )


@functools.partial(quick_jit, static_argnames=("k", "shortlist"))
def batch_of(index, targets, margins, features, rewards, space, prior, limits, *, k=K, shortlist=2):
    own = criteria(targets, margins)
    return greedy(
        one_of(index, list(own.values())), features, rewards, space, prior, k, limits=limits, shortlist=shortlist
    )


def problem(rng, kind, *, costs=False, shape="plain", scale=1.0, share=0.9):
    features = rng.normal(size=(SIZE, F)).astype(np.float32)
    rewards = (scale * rng.normal(size=SIZE)).astype(np.float32)
    if shape == "copies":
        features[1::2] = features[::2]
        rewards[1::2] = rewards[::2]
    elif shape == "near-copies":
        features[1::2] = features[::2] + np.float32(1e-2) * features[1::2]
    elif shape == "offset":
        features += np.float32(64)
    elif shape == "line":
        features[:, 1:] = features[:, :1]
    elif shape == "equal rewards":
        rewards[:] = rewards[0]
    elif shape == "far rewards":
        rewards += np.float32(200) * (np.arange(SIZE) % 2).astype(np.float32)
    eligible = jnp.asarray(rng.random(SIZE) < share)
    excluded = jnp.asarray(rng.integers(0, SIZE + 2, (8, 2)), jnp.int32)
    price = jnp.asarray(rng.uniform(0.5, 4, LISTED if kind == "listed" else SIZE), jnp.float32)
    if kind == "listed":
        listed = jnp.asarray(rng.integers(0, SIZE + 1, (LISTED, 2)), jnp.int32)
        space = exclude(listed_space(listed, eligible, WIDTH, price if costs else None), excluded)
    else:
        space = pair_space(kind, WIDTH, eligible, excluded)
        space = dataclasses.replace(space, costs=price) if costs else space
    return features, rewards, space


def check_steps(name, batch, reference, features, rewards, space, prior, limits, k=K):
    """Each pick is possible and as good as the best; the gains are the gains; and it ends where nothing is left."""
    picks = np.asarray(batch.pairs)[np.asarray(batch.valid)]
    steps = greedy_steps64(reference, features, rewards, space, prior, k, limits=limits, picks=picks)
    floor = FLOOR.get(name, 1e-7)
    if space.costs is not None:
        floor = floor / float(space.costs.min())
    assert (steps.best - steps.gains <= 1e-6 * steps.gains + floor).all(), (name, steps.best - steps.gains, steps.gains)
    atol = floor + 3e-7 * steps.gains.max(initial=0)  # a variance that fell a millionfold has lost six digits
    np.testing.assert_allclose(np.asarray(batch.gains)[: len(picks)], steps.gains, rtol=1e-4, atol=atol)
    assert np.asarray(batch.valid)[: len(picks)].all()
    assert len(picks) == k or steps.left == 0, (name, len(picks), steps.left)
    return steps


SHAPES = ("plain", "copies", "near-copies", "offset", "line", "equal rewards", "far rewards", "past")
CONSTRAINTS = ("none", "prompt", "response", "guard", "all")


def limits_of(constraint, rng):
    """Limits of one structure, so that they share a program; loose ones are no limits."""
    tight = {name: constraint in (name, "all") for name in ("prompt", "response", "guard")}
    return Limits(
        per_prompt=jnp.int32(rng.integers(1, 5) if tight["prompt"] else 1000),
        per_response=jnp.int32(rng.integers(1, 4) if tight["response"] else 1000),
        similarity=jnp.float32(rng.uniform(0.5, 0.99) if tight["guard"] else 2.0),
    )


@pytest.mark.parametrize(
    ("kind", "costs"),
    [
        ("cross", True),
        *[nightly("cross", False), nightly("within", False), slow("within", True)],
        *[nightly("all", False), nightly("listed", True), nightly("listed", False)],
    ],
)
def test_every_pick_is_the_best_possible(kind, costs):
    """Every criterion and constraint, priors small and large, over pools of every shape."""

    @settings(max_examples=30, deadline=None)
    @given(
        st.integers(0, 2**32 - 1),
        st.sampled_from(NAMES),
        st.sampled_from(CONSTRAINTS),
        st.sampled_from(SHAPES),
        st.floats(-2, 3),
        st.floats(-1, 1),
    )
    def check(seed, name, constraint, shape, prior_power, reward_power):
        rng = np.random.default_rng(seed)
        features, rewards, space = problem(rng, kind, costs=costs, shape=shape, scale=10**reward_power)
        limits = limits_of(constraint, rng)
        targets, margins = rng.normal(size=(MANY, F)).astype(np.float32), rng.normal(size=MANY).astype(np.float32)
        prior = 10**prior_power * np.eye(F)
        if shape == "past":
            root = rng.normal(size=(F, F))
            prior = prior + 10 * root @ root.T
        prior = prior.astype(np.float32)
        index = NAMES.index(name)
        arrays = (jnp.asarray(each) for each in (targets, margins, features, rewards))
        batch, info = batch_of(jnp.int32(index), *arrays, space, jnp.asarray(prior), limits)
        reference = references(targets, margins)[name]
        steps = check_steps(name, batch, reference, features, rewards, space, prior, limits)
        due = {Status.OK} if len(steps.pairs) == K else {Status.EXHAUSTED, Status.LIMITED}
        assert int(batch.status) in due | {Status.UNINFORMATIVE}
        assert 1 <= int(info.passes) <= K + 1

    check()


def simple(kind="all", seed=0, **changes):
    """A problem for `batch_of` whose limits are loose."""
    rng = np.random.default_rng(seed)
    features, rewards, space = problem(rng, kind, share=1.0)
    targets, margins = rng.normal(size=(MANY, F)).astype(np.float32), rng.normal(size=MANY).astype(np.float32)
    limits = dataclasses.replace(limits_of("none", rng), **changes)
    prior = np.eye(F, dtype=np.float32)
    return features, rewards, space, targets, margins, prior, limits


def chosen(name, features, rewards, space, targets, margins, prior, limits, **options):
    arrays = (jnp.asarray(each) for each in (targets, margins, features, rewards))
    return batch_of(jnp.int32(NAMES.index(name)), *arrays, space, jnp.asarray(prior), limits, **options)


@pytest.mark.parametrize("name", sampled(NAMES, "v few"))
def test_limits_that_leave_too_few_pairs_give_those_and_say_so(name):
    features, rewards, space, *rest, _ = simple("within")
    for limits, most in (
        ({"per_prompt": jnp.int32(1)}, PROMPTS),
        ({"per_response": jnp.int32(0)}, 0),
        ({"similarity": jnp.float32(0)}, 1),
    ):
        limits = dataclasses.replace(simple("within")[-1], **limits)
        batch, _ = chosen(name, features, rewards, space, *rest, limits)
        assert batch.status == Status.LIMITED
        assert int(batch.valid.sum()) == min(most, PROMPTS)
        assert (np.asarray(batch.pairs)[~np.asarray(batch.valid)] == 0).all()
        reference = references(rest[0], rest[1])[name]
        check_steps(name, batch, reference, features, rewards, space, rest[2], limits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", sampled(SPACES, "cross"))
def test_what_cannot_be_chosen_from_has_a_status(name, kind):
    features, rewards, space, *rest = simple(kind)
    pairs = list_pairs(space)
    flat, _ = chosen(name, np.ones_like(features), rewards, space, *rest)
    assert flat.status == Status.UNINFORMATIVE
    few = dataclasses.replace(space, eligible=jnp.isin(jnp.arange(SIZE), pairs[0]))
    if kind != "listed":  # a list is made for those that are eligible
        short, _ = chosen(name, features, rewards, few, *rest)
        assert short.status == Status.EXHAUSTED
        np.testing.assert_array_equal(short.pairs[0], pairs[0])
        assert short.valid.tolist() == [True] + [False] * (K - 1)
    for value in (np.nan, np.inf):
        broken = rewards.copy()
        broken[pairs[0, 0]] = value
        assert chosen(name, features, broken, space, *rest)[0].status == Status.NONFINITE
        assert chosen(name, features + np.float32(value), rewards, space, *rest)[0].status == Status.NONFINITE
    targets, margins, _, limits = rest
    for prior in (np.zeros((F, F), np.float32), -np.eye(F, dtype=np.float32)):
        batch, _ = chosen(name, features, rewards, space, targets, margins, prior, limits)
        assert batch.status == Status.SINGULAR


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.nightly
def test_shortlists_batches_of_problems_and_second_calls(name):
    """The same batch from a shortlist of 2 and of all pairs, with others under `vmap`; and nothing compiles again."""
    problems = [simple(seed=seed) for seed in range(3)]
    problems = [each[:2] + problems[0][2:] for each in problems]  # one space, one prior
    alone = [chosen(name, *each) for each in problems]
    whole = [chosen(name, *each, shortlist=200)[0] for each in problems]
    features, rewards = (jnp.asarray(np.stack(each)) for each in list(zip(*problems, strict=True))[:2])
    targets, margins = (jnp.asarray(each) for each in problems[0][3:5])
    index = jnp.int32(NAMES.index(name))
    together, _ = batches_of(index, targets, margins, features, rewards, problems[0][2], jnp.eye(F), problems[0][-1])
    for place, (batch, info) in enumerate(alone):
        for other in (whole[place], jax.tree.map(lambda leaf, place=place: leaf[place], together)):
            np.testing.assert_array_equal(batch.pairs, other.pairs)
            np.testing.assert_allclose(batch.gains, other.gains, rtol=2e-5, atol=2e-7)
        assert int(info.passes) >= 1
    with count_compilations() as compiled:
        jax.block_until_ready(chosen(name, *problems[1]))
    assert not compiled


@quick_jit
def batches_of(index, targets, margins, features, rewards, space, prior, limits):
    def one(features, rewards):
        return batch_of.__wrapped__(index, targets, margins, features, rewards, space, prior, limits)

    return jax.vmap(one)(features, rewards)


@functools.partial(quick_jit, static_argnames="k")
def plain_or_shipped(index, targets, margins, features, rewards, space, prior, *, k=K):
    """A, V and EPIG with their own ceilings, and with the one of gains that never rise."""
    own = criteria(targets, margins)
    shipped = [own["a"], own["v few"], own["epig"]]
    plain = [dataclasses.replace(each, ceiling=D_OPTIMAL.ceiling) for each in shipped]
    return greedy(one_of(index, shipped + plain), features, rewards, space, prior, k, shortlist=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "name", "seeds"),
    # Of A few batches go wrong, 3 % of 1,500; these were found by search.
    [(0, "a", (9, 88, 327, 362, 519, 809, 928, 990)), (1, "v few", range(40)), (2, "epig", range(40))],
)
def test_the_plain_certificate_misses_the_best_pair_where_gains_may_rise(index, name, seeds):
    """Why A, V and EPIG have ceilings of their own: with that of log det, batches are worse than they say."""
    missed = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        features, rewards, space = problem(rng, "all", share=1.0)
        targets, margins = rng.normal(size=(MANY, F)).astype(np.float32), rng.normal(size=MANY).astype(np.float32)
        prior = (10 ** rng.uniform(-1, 1) * np.eye(F)).astype(np.float32)
        features *= (10 ** rng.uniform(-1, 1, F)).astype(np.float32)
        arrays = [jnp.asarray(each) for each in (targets, margins, features, rewards)]
        shipped, plain = (
            plain_or_shipped(jnp.int32(place), *arrays, space, jnp.asarray(prior))[0] for place in (index, index + 3)
        )
        reference = references(targets, margins)[name]
        check_steps(name, shipped, reference, features, rewards, space, prior, None)
        if (shipped.pairs != plain.pairs).any():
            steps = greedy_steps64(reference, features, rewards, space, prior, K, picks=np.asarray(plain.pairs))
            missed += bool(((steps.best - steps.gains) > 1e-3 * steps.best).any())
    assert missed >= 3, missed


def test_ceilings_see_the_targets_in_the_coordinates_of_the_pass():
    """A ceiling bounds worths at the pass, so it must not change with z while choices are made from one shortlist."""
    features, rewards, space, targets, *_ = simple()
    seen = dataclasses.replace(v_optimal(jnp.asarray(targets)), ceiling=lambda rest, z, *_: -jnp.square(z).sum())
    run = quick_jit(functools.partial(greedy, seen, k=K, shortlist=50))
    _, info = run(jnp.asarray(features), jnp.asarray(rewards), space, jnp.eye(F))
    later = ~np.asarray(info.fresh)[1:]
    assert later.any()
    np.testing.assert_array_equal(info.ceilings[1:][later], info.ceilings[:-1][later])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d", "a"])
def test_a_prior_a_hundred_millionth_of_the_information(name):
    """Long batches from next to no prior: an information matrix summed in float32 would not even be positive."""
    size, count = 24, 20
    own, reference = {
        "d": (D_OPTIMAL, d_optimal64()),
        "a": (a_optimal(F), v_optimal64(np.eye(F), np.ones(F))),
    }[name]
    run = quick_jit(greedy, static_argnames=("k", "shortlist"))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        features = (rng.normal(size=(size, F)) * 10 ** rng.uniform(-1, 1, F)).astype(np.float32)
        rewards = rng.normal(size=size).astype(np.float32)
        prior = np.float32(1e-7) * np.eye(F, dtype=np.float32)
        space = pair_space("all", WIDTH, jnp.ones(size, bool))
        batch, _ = run(
            own, jnp.asarray(features), jnp.asarray(rewards), space, jnp.asarray(prior), count, shortlist=300
        )
        assert batch.status == Status.OK
        steps = greedy_steps64(reference, features, rewards, space, prior, count, picks=np.asarray(batch.pairs))
        assert (steps.best - steps.gains <= 2e-5 * steps.gains).all(), (steps.best - steps.gains) / steps.gains
        np.testing.assert_allclose(batch.gains, steps.gains, rtol=1e-4)
        np.testing.assert_allclose(batch.gains[2 * F :], steps.gains[2 * F :], rtol=1e-5)
