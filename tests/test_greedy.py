"""Exact greedy of every criterion, over every space, under every constraint, against float64 that tries every pair."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jarm.base import Limits, Status
from jarm.data.pairs import exclude, listed_space, pair_space
from jarm.greedy import greedy
from jarm.objectives import BALD, D_OPTIMAL, D_UNWEIGHTED, Objective, a_optimal, epig, v_optimal
from jarm.references import bald64, d_optimal64, epig64, greedy_steps64, v_optimal64
from jarm.testing import SPACES, quick_jit

PROMPTS, WIDTH, F, K, LISTED, FEW, MANY = 4, 4, 3, 6, 50, 2, 7
SIZE = PROMPTS * WIDTH
NAMES = ("d", "unweighted", "a", "v few", "v many", "epig", "bald")
FLOOR = {"bald": 3e-7, "epig": 3e-7}
"""Gains in nats that float32 cannot tell apart: entropies of order 1 are subtracted, or a logarithm is near 0."""


def objectives(targets, margins):
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
    held = [jnp.zeros((0, F)) if each.targets is None else each.targets for each in choices]
    targets = jnp.stack([jnp.pad(each, ((0, width - each.shape[0]), (0, 0))) for each in held])

    def of(pick):
        def call(*args):
            return jax.lax.switch(
                index, [functools.partial(pick, each, len(own)) for each, own in zip(choices, held, strict=True)], *args
            )

        return call

    def worth(each, count, margin, q, c, h):
        return each.worth(margin, q, c[:count], h[:count])

    def tile(each, count, rows, columns, h):
        return each.tile(rows._replace(c=rows.c[:, :count]), columns._replace(c=columns.c[:, :count]), h[:count])

    def ceiling(each, count, rest, z, gone, far, most):
        return jnp.float32(jnp.inf) if each.ceiling is None else each.ceiling(rest, z[:count], gone, far, most)

    return Objective(
        of(worth),
        of(tile),
        of(lambda each, _, worth: each.gain(worth)),
        of(lambda each, _, margin: each.weight(margin)),
        of(ceiling),
        targets[index],
    )


@functools.partial(quick_jit, static_argnames=("k", "shortlist"))
def batch_of(index, targets, margins, features, rewards, space, prior, limits, *, k=K, shortlist=2):
    own = objectives(targets, margins)
    return greedy(
        one_of(index, list(own.values())), features, rewards, space, prior, k, limits=limits, shortlist=shortlist
    )


def problem(rng, kind, *, costs=False, shape="plain", scale=1.0, alive=0.9):
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
    eligible = jnp.asarray(rng.random(SIZE) < alive)
    gone = jnp.asarray(rng.integers(0, SIZE + 2, (8, 2)), jnp.int32)
    price = jnp.asarray(rng.uniform(0.5, 4, LISTED if kind == "listed" else SIZE), jnp.float32)
    if kind == "listed":
        listed = jnp.asarray(rng.integers(0, SIZE + 1, (LISTED, 2)), jnp.int32)
        space = exclude(listed_space(listed, eligible, WIDTH, price if costs else None), gone)
    else:
        space = pair_space(kind, WIDTH, eligible, gone)
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


@pytest.mark.parametrize("costs", [False, True])
@pytest.mark.parametrize("kind", SPACES)
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
