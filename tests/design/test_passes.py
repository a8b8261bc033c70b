"""The best pairs of spaces in many blocks against a full sort in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow

import jarm.design.blocks
from jarm.core.linalg import distances
from jarm.design.passes import best_pairs
from jarm.design.scorer import Scorer
from jarm.design.spaces import pair_space, two_blocks
from jarm.testing.references import list_pairs
from jarm.testing.tracing import quick_jit

WIDTH, F = 5, 3


def scorer_of(y):
    return Scorer(y, lambda a, b: jnp.square(a - b).sum(), distances)


def blocks_of_size(monkeypatch, block, group):
    monkeypatch.setattr(jarm.design.blocks, "BLOCK", block)
    monkeypatch.setattr(jarm.design.blocks, "GROUP", group)
    return quick_jit(lambda y, space, k: best_pairs(scorer_of(y), space, k), static_argnames="k")


def check_best(best, y, space, k):
    """The k largest scores, each that of its pair, distinct, in falling order, and none left out above `rest`."""
    pairs = list_pairs(space)
    scores = ((y[pairs[:, 0]] - y[pairs[:, 1]]).astype(np.float64) ** 2).sum(axis=1)
    if space.costs is not None:
        scores = scores / np.asarray(space.costs, np.float64)[pairs].sum(axis=1)
    wanted = min(k, len(pairs))
    found = np.asarray(best.pairs)
    assert (np.asarray(best.scores)[wanted:] == -np.inf).all()
    assert (found[wanted:] == len(y)).all()
    place = {tuple(pair): score for pair, score in zip(pairs.tolist(), scores, strict=True)}
    own = np.array([place[tuple(pair)] for pair in found[:wanted].tolist()])
    assert len({tuple(pair) for pair in found[:wanted].tolist()}) == wanted
    falling = np.sort(scores)[::-1]
    np.testing.assert_allclose(np.asarray(best.scores)[:wanted], falling[:wanted], rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(np.asarray(best.scores)[:wanted], own, rtol=2e-6, atol=1e-6)
    if wanted < len(pairs):
        assert float(best.rest) >= falling[wanted] * (1 - 2e-6) - 1e-6
        assert float(best.rest) <= falling[wanted - 1] * (1 + 2e-6) + 1e-6
    else:
        assert best.rest == -np.inf
    if space.costs is not None:
        np.testing.assert_allclose(best.costs[:wanted], np.asarray(space.costs)[found[:wanted]].sum(axis=1), rtol=1e-6)


@pytest.mark.parametrize("kind", ["cross", "all"])
@pytest.mark.parametrize(("block", "group", "prompts"), [slow(16, 1, 5), (16, 3, 15), slow(32, 4, 23)])
@pytest.mark.slow
@pytest.mark.nightly
def test_many_blocks_are_as_good_as_a_full_sort(monkeypatch, kind, block, group, prompts):
    """Exclusions among the best, ineligible responses, costs, copies, equal scores, and k above the space."""
    size = prompts * WIDTH
    run = blocks_of_size(monkeypatch, block, group)
    for case in range(6):
        rng = np.random.default_rng(case)
        y = rng.normal(size=(size, F)).astype(np.float32)
        eligible = rng.random(size) < (0.8 if case % 2 else 1.0)
        if case == 2:
            y[:] = 1.0  # all scores equal
        if case == 3:
            y = np.round(y)  # many ties
        if case == 4:
            y[:: size // 5] *= 30  # a few responses are in all the best pairs
        space = pair_space(kind, WIDTH, jnp.asarray(eligible), jnp.zeros((40, 2), jnp.int32))
        if case in (1, 4):  # the very best are excluded
            pairs = list_pairs(space)
            order = np.argsort(-((y[pairs[:, 0]] - y[pairs[:, 1]]) ** 2).sum(axis=1))
            space = pair_space(kind, WIDTH, jnp.asarray(eligible), jnp.asarray(pairs[order[:40]], jnp.int32))
        check_best(run(jnp.asarray(y), space, 20), y, space, 20)
    costs = jnp.asarray(rng.uniform(0.5, 4, size), jnp.float32)
    priced = dataclasses.replace(space, costs=costs)
    check_best(run(jnp.asarray(y), priced, 20), y, priced, 20)
    whole = size * size // 2 + 10
    if size < 50:
        check_best(run(jnp.asarray(y), space, whole), y, space, whole)


@pytest.mark.parametrize("platform", ["cpu", slow("tpu")])
def test_blocks_of_their_shipped_size(platform, monkeypatch):
    """1,200 responses, 719,400 pairs, three blocks of 400; one on a TPU."""
    blocks = jarm.design.blocks
    if platform == "tpu":
        monkeypatch.setattr(blocks, "BLOCK", blocks.TPU_BLOCK)
        monkeypatch.setattr(blocks, "GROUP", blocks.TPU_GROUP)
    rng = np.random.default_rng(0)
    size = 1200
    y = rng.normal(size=(size, F)).astype(np.float32)
    excluded = jnp.asarray(rng.integers(0, size, (30, 2)), jnp.int32)
    space = pair_space("cross", WIDTH, jnp.asarray(rng.random(size) < 0.95), excluded)
    best = jax.jit(lambda y: best_pairs(scorer_of(y), space, 500))(jnp.asarray(y))
    first, second = np.triu_indices(size, 1)
    eligible = np.asarray(space.eligible)
    keep = eligible[first] & eligible[second] & (first // WIDTH != second // WIDTH)
    removed = {tuple(pair) for pair in np.asarray(space.excluded).tolist()}
    first, second = first[keep], second[keep]
    scores = ((y[first] - y[second]).astype(np.float64) ** 2).sum(axis=1)
    order = [i for i in np.argsort(-scores)[:600] if (first[i], second[i]) not in removed][:501]
    np.testing.assert_allclose(best.scores, scores[order[:500]], rtol=2e-6)
    expected = set(zip(first[order].tolist(), second[order].tolist(), strict=True))
    assert len({tuple(pair) for pair in np.asarray(best.pairs).tolist()} - expected) == 0
    assert abs(float(best.rest) / scores[order[500]] - 1) <= 2e-6


@pytest.mark.parametrize("numbers", [range(1, 61), [1954], [5000]], ids=["small", "a million", "2.5 million"])
@pytest.mark.slow
def test_every_two_blocks_meet_once(numbers):
    """Also where the root of float32 is off: a million responses are 1954 blocks."""
    tiles = jnp.arange(max(numbers) * (max(numbers) + 1) // 2, dtype=jnp.int32)
    for number in numbers:
        count = number * (number + 1) // 2
        low, high = (np.asarray(each)[:count] for each in two_blocks(tiles, number))
        assert low.min() >= 0
        assert (low <= high).all()
        assert high.max() < number
        # As many as there are, and none twice: diagonal by diagonal, each from its start.
        assert (np.diff((high - low).astype(np.int64) * number + low) > 0).all()
