"""The numerical traps of the released rules, one test each.

Traps 4 and 5 (tied ranks, best-of-N by random subset) are in test_metrics; 9 (right padding) is in the tests of llm.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jarm.acquisition.registry import get_rule
from jarm.core.linalg import cholesky, jitter, log_det
from jarm.core.status import Status
from jarm.design.criteria import D_OPTIMAL
from jarm.design.fisher import fisher_weight, space_information
from jarm.design.greedy import greedy
from jarm.design.spaces import exclude, listed_space, pair_space, subset
from jarm.design.top import top_pairs
from jarm.reward.losses import bradley_terry
from jarm.testing.conformance import make_case
from jarm.testing.references import information64, list_pairs
from jarm.testing.tracing import quick_jit


def test_trap_1_fisher_weight_of_a_confident_head_does_not_underflow():
    """s (1 - s) with s = sigmoid(m) is 0 in float32 from m = 17, where v is 4e-8."""
    margin = jnp.float32([17, 30, 80])
    s = jax.nn.sigmoid(margin)
    assert (s * (1 - s))[1] == 0
    np.testing.assert_allclose(fisher_weight(margin), np.exp(-np.float64(margin)), rtol=1e-6)
    np.testing.assert_array_equal(fisher_weight(margin), fisher_weight(-margin))


def test_trap_2_the_loss_on_logits_keeps_its_gradient():
    """Cross-entropy after a sigmoid: the gradient of a surely wrong pair is 0 or NaN."""
    margin, label = jnp.float32([18, 28, 200]), jnp.float32(0)
    after_sigmoid = jax.vmap(jax.grad(lambda m: -jnp.log(1 - jax.nn.sigmoid(m))))(margin)
    assert not (np.abs(after_sigmoid - 1) < 0.5).any()
    loss = jax.vmap(jax.grad(lambda m: bradley_terry(m, label)))
    np.testing.assert_allclose(loss(margin), 1, rtol=1e-6)
    np.testing.assert_allclose(loss(-margin[:2]), np.exp(-np.float64(margin[:2])), rtol=1e-5)
    np.testing.assert_allclose(bradley_terry(margin, jnp.zeros(3)), margin, rtol=1e-6)


def test_trap_3_jitter_scales_and_indefinite_is_a_status():
    """An absolute 1e-6 is lost beside a trace of 1e3, and slogdet of an indefinite matrix is a finite number."""
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32) * 60
    matrix = jnp.asarray(x.T @ x)
    assert matrix.trace() > 1e3
    np.testing.assert_array_equal(matrix + 1e-6 * jnp.eye(8), matrix)
    assert cholesky(matrix)[1] == Status.SINGULAR
    assert cholesky(jitter(matrix))[1] == Status.OK
    indefinite = jnp.diag(jnp.float32([1, -2, -3]))
    sign, value = jnp.linalg.slogdet(indefinite)
    assert (sign, bool(jnp.isfinite(value))) == (1, True)
    assert log_det(indefinite)[1] == Status.SINGULAR


@pytest.mark.parametrize("name", ["random", "entropy", "pa_dopt", "greedy_dopt"])
def test_trap_6_no_pair_twice_no_labelled_pair_no_mirror_no_self(name):
    """A list with every pair three times, mirrored and with itself, and labelled pairs. Conformance has all rules."""
    case = make_case("listed")
    labelled = {(0, 1), (4, 7), (3, 22)}
    every = np.array([(i, j) for i in range(0, 24, 3) for j in range(0, 24, 4)] * 3)
    offered = np.concatenate([every, every[:, ::-1], sorted(labelled)])
    space = listed_space(jnp.asarray(offered, jnp.int32), jnp.ones(24, bool))
    space = exclude(space, jnp.asarray([(1, 0), (7, 4), (22, 3)], jnp.int32))
    rule = quick_jit(get_rule(name), static_argnames="k")
    batch = rule(jax.random.key(0), case.hparams, case.belief, space, k=12)
    pairs = [tuple(pair) for pair in batch.pairs.tolist()]
    assert batch.status == Status.OK
    assert len(set(pairs)) == 12
    assert all(i < j for i, j in pairs)
    assert not set(pairs) & labelled


@pytest.mark.parametrize("kind", ["within", "listed"])
@pytest.mark.slow
def test_trap_7_the_chunked_path_runs_and_equals_the_whole(kind):
    """The released past-aware rule crashes with a batch size: here past-aware greedy runs in chunks of every size."""
    case = make_case(kind)
    belief, space = case.belief, case.space
    prior = belief.labelled_information + jnp.eye(5)
    results = [
        quick_jit(functools.partial(greedy, D_OPTIMAL), static_argnames=("k", "tile", "shortlist"))(
            belief.features, belief.rewards, space, prior, k=6, tile=tile, shortlist=1
        )[0]
        for tile in (33, 1 << 19)
    ]
    totals = [space_information(belief.features, belief.rewards, space, tile=tile)[0] for tile in (33, 1 << 19)]
    for result, total in zip(results[:-1], totals[:-1], strict=True):
        np.testing.assert_array_equal(result.pairs, results[-1].pairs)
        np.testing.assert_allclose(result.gains, results[-1].gains, rtol=1e-4)
        np.testing.assert_allclose(total, totals[-1], rtol=1e-4, atol=1e-4)


def test_trap_8_drawing_20_000_of_12_497_500_pairs_lists_none():
    """Two int32 for every pair would be 95 MiB."""
    space = pair_space("all", 10, jnp.ones(5000, bool), jnp.zeros((1, 2), jnp.int32))
    draw = jax.jit(subset, static_argnames="count")
    memory = draw.lower(jax.random.key(0), space, count=20_000).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 8 << 20
    pairs = np.asarray(draw(jax.random.key(0), space, count=20_000).pairs)
    assert len(np.unique(pairs, axis=0)) == 20_000
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert pairs.max() < 5000
    # Uniform: prompts apart as often as there are such pairs, 22,500 of the 12,497,500 within one.
    same = (pairs[:, 0] // 10 == pairs[:, 1] // 10).sum()
    assert abs(same - 20_000 * 22_500 / 12_497_500) < 4 * 6


@pytest.mark.slow
def test_huge_margins_are_not_nan_in_sums_over_a_space():
    """v = 1 / (a b + a b + 2) with a = exp(r) is inf * 0 from |r| = 88: here margins of 400 are weights of 0."""
    case = make_case("all")
    rewards = jnp.where(jnp.arange(24) % 2 == 0, 200.0, -200.0) + case.belief.rewards
    total, _ = space_information(case.belief.features, rewards, case.space)
    expected = information64(np.asarray(case.belief.features), np.asarray(rewards), list_pairs(case.space))
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-5 * np.trace(expected))
    score = lambda margin, distance: fisher_weight(margin) * distance  # noqa: E731
    assert top_pairs(score, rewards, case.belief.features, case.space, 6).status == Status.OK
