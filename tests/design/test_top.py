import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import sampled
from references import best_subset64, greedy64, greedy_shortfall, leverages64, log_det64

from jarm.acquisition.check import check_selection
from jarm.core.linalg import inverse_factor
from jarm.core.status import JarmError, Status
from jarm.design.criteria import D_OPTIMAL
from jarm.design.fisher import fisher_weight
from jarm.design.greedy import greedy
from jarm.design.spaces import is_in, listed_space, pair_space
from jarm.design.top import top_pairs
from jarm.testing.conformance import SPACES, check_batch, make_case
from jarm.testing.references import list_pairs
from jarm.testing.tracing import quick_jit

PROMPTS, WIDTH, F, K = 5, 4, 3, 8
SIZE = PROMPTS * WIDTH
chosen = quick_jit(functools.partial(greedy, D_OPTIMAL), static_argnames=("k", "shortlist", "tile"))


def leverage(margin, distance):
    return fisher_weight(margin) * distance


@functools.partial(quick_jit, static_argnames=("k", "tile"))
def best_leverages(rewards, features, space, metric, *, k, tile=1 << 19):
    return top_pairs(leverage, rewards, features, space, k, whiten=inverse_factor(metric)[0], tile=tile)


@functools.partial(quick_jit, static_argnames=("k", "tile"))
def closest(rewards, space, *, k, tile=1 << 19):
    return top_pairs(lambda margin, _: -jnp.abs(margin), rewards, None, space, k, tile=tile)


def problem(rng, kind, *, share=0.85):
    features = rng.normal(size=(SIZE, F)).astype(np.float32)
    rewards = rng.normal(size=SIZE).astype(np.float32)
    eligible = jnp.asarray(rng.random(SIZE) < share)
    if kind == "listed":
        space = listed_space(jnp.asarray(rng.integers(0, SIZE, (60, 2)), jnp.int32), eligible, WIDTH)
    else:
        space = pair_space(kind, WIDTH, eligible, jnp.asarray(rng.integers(0, SIZE + 2, (8, 2)), jnp.int32))
    return features, rewards, space


@pytest.mark.parametrize("kind", sampled(SPACES, "within", "cross"))
@pytest.mark.parametrize(("k", "tile"), [(6, 1 << 19), (200, 37)])
def test_top_pairs_are_those_of_a_full_sort(kind, k, tile):
    """Chunked equals whole, for tiles that do not divide, for k above the tile, and for k above the space."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        features, rewards, space = problem(rng, kind)
        root = rng.normal(size=(F, F))
        metric = (root @ root.T + np.eye(F)).astype(np.float32)
        pairs = list_pairs(space)
        scores = leverages64(features, rewards, pairs, metric)
        best = best_leverages(jnp.asarray(rewards), jnp.asarray(features), space, jnp.asarray(metric), k=k, tile=tile)
        check_batch(best, space, k)
        wanted = min(k, len(pairs))
        np.testing.assert_allclose(best.gains[:wanted], np.sort(scores)[::-1][:wanted], rtol=2e-5, atol=1e-6)
        place = {tuple(pair): score for pair, score in zip(pairs.tolist(), scores, strict=True)}
        own = [place[tuple(pair)] for pair in np.asarray(best.pairs)[:wanted].tolist()]
        np.testing.assert_allclose(best.gains[:wanted], own, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("tile", [37])
def test_equal_scores_come_in_the_order_of_the_space(kind, tile):
    """Where more pairs score as the last than fit, the blocks of large spaces decide which of them are in."""
    _, _, space = problem(np.random.default_rng(0), kind)
    pairs = list_pairs(space)
    for rewards in (np.full(SIZE, 3.0), np.round(np.random.default_rng(1).normal(size=SIZE))):
        best = closest(jnp.asarray(rewards, jnp.float32), space, k=9, tile=tile)
        gaps = np.abs(rewards[pairs[:, 0]] - rewards[pairs[:, 1]])
        order = np.argsort(gaps, kind="stable")
        np.testing.assert_array_equal(-best.gains, gaps[order[:9]])
        check_batch(best, space, 9)
        picks = np.asarray(best.pairs)
        np.testing.assert_array_equal(np.lexsort((picks[:, 1], picks[:, 0], -np.asarray(best.gains))), np.arange(9))
        if kind in ("within", "listed"):
            np.testing.assert_array_equal(best.pairs, pairs[order[:9]])


@pytest.mark.slow
def test_scores_that_overflow_do_not_pass_silently():
    features, rewards, space = problem(np.random.default_rng(0), "all")
    huge = jnp.asarray(features) * 1e25
    best = best_leverages(jnp.asarray(rewards), huge, space, jnp.eye(F), k=6)
    assert best.status != Status.OK
    batch, _ = chosen(huge, jnp.asarray(rewards), space, jnp.eye(F), K, shortlist=1)
    assert batch.status != Status.OK


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(SPACES),
    st.floats(-1.5, 3),
    st.floats(-1, 1.5),
    st.sampled_from(["plain", "copies", "offset", "line", "past"]),
)
def test_greedy_tries_every_pair_at_every_step(seed, kind, prior_power, reward_power, shape):
    """Each choice gains as much as the best of all pairs then left, to a near-tie of 1e-6 relative, in float64."""
    rng = np.random.default_rng(seed)
    features, rewards, space = problem(rng, kind)
    rewards = rewards * np.float32(10**reward_power)
    prior = 10**prior_power * np.eye(F)
    if shape == "copies":
        features[1::2] = features[::2]
        rewards[1::2] = rewards[::2]
    elif shape == "offset":
        features = features + np.float32(64)
    elif shape == "line":
        features[:, 1:] = features[:, :1]
    elif shape == "past":
        root = rng.normal(size=(F, F))
        prior = prior + 10 * root @ root.T
    prior = prior.astype(np.float32)
    pairs = list_pairs(space)
    batch, info = chosen(jnp.asarray(features), jnp.asarray(rewards), space, jnp.asarray(prior), K, shortlist=1)
    check_batch(batch, space, K)
    count = min(K, len(pairs))
    picks = np.asarray(batch.pairs)[:count]
    short, gained = greedy_shortfall(features, rewards, pairs, prior, picks)
    assert (short <= 1e-6 * gained + 1e-7).all(), (short, gained)
    # Its gains are the growth of log det, and never increase.
    np.testing.assert_allclose(batch.gains[:count], gained, rtol=1e-4, atol=2e-6)
    assert (np.diff(gained) <= 1e-6).all()
    total = log_det64(features, rewards, picks, prior) - np.linalg.slogdet(np.float64(prior))[1]
    np.testing.assert_allclose(gained.sum(), total, rtol=1e-6, atol=1e-9)
    assert 1 <= int(info.passes) <= K


@pytest.mark.parametrize("kind", sampled(SPACES, "all"))
def test_shortlists_of_any_size_choose_the_same_batch(kind):
    """A shortlist smaller than needed costs passes, not exactness; without ties the batch is the reference's."""
    rng = np.random.default_rng(2)
    features, rewards, space = problem(rng, kind, share=1.0)
    features[rng.permutation(SIZE)[:4]] *= 6  # a few pairs tower above the rest, then do not
    prior = np.float32(0.3) * np.eye(F, dtype=np.float32)
    pairs = list_pairs(space)
    expected = greedy64(features, rewards, pairs, prior, K)
    passes = []
    for shortlist in (1, 1000):
        batch, info = chosen(
            jnp.asarray(features), jnp.asarray(rewards), space, jnp.asarray(prior), K, shortlist=shortlist
        )
        np.testing.assert_array_equal(batch.pairs, pairs[expected.picks])
        np.testing.assert_allclose(batch.gains, expected.gains, rtol=1e-4)
        passes.append(int(info.passes))
    assert passes[0] > 1


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_never_above_the_best_subset_and_gains_at_least_its_share(seed):
    """log det is monotone submodular: greedy gains at least 1 - 1/e of what the best of all subsets gains."""
    rng = np.random.default_rng(seed)
    features, rewards, _ = problem(rng, "all")
    listed = rng.permutation(np.stack(np.triu_indices(SIZE, 1), axis=1))[:60]
    listed[11:] = SIZE  # 11 pairs, 165 subsets of 8
    space = listed_space(jnp.asarray(listed, jnp.int32), jnp.ones(SIZE, bool), WIDTH)
    prior = np.float32(10 ** rng.uniform(-2, 1)) * np.eye(F, dtype=np.float32)
    batch, _ = chosen(jnp.asarray(features), jnp.asarray(rewards), space, jnp.asarray(prior), K, shortlist=1)
    pairs = list_pairs(space)
    start = np.linalg.slogdet(np.float64(prior))[1]
    for count in (1, 2, 4, K):
        best = best_subset64(features, rewards, pairs, prior, count)
        reached = log_det64(features, rewards, np.asarray(batch.pairs)[:count], prior)
        assert reached <= best + 1e-9
        assert reached - start >= (1 - 1 / np.e) * (best - start)
    first = best_subset64(features, rewards, pairs, prior, 1)
    np.testing.assert_allclose(log_det64(features, rewards, np.asarray(batch.pairs)[:1], prior), first, rtol=1e-9)


@pytest.mark.slow
def test_large_gains_keep_their_digits():
    """A prior a millionth of the information: after F picks gains fall a millionfold, inside a single shortlist."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        features, rewards, space = problem(rng, "within")
        prior = np.float32(1e-4) * np.eye(F, dtype=np.float32)
        batch, info = chosen(jnp.asarray(features), jnp.asarray(rewards), space, jnp.asarray(prior), K, shortlist=1000)
        pairs = list_pairs(space)
        count = min(K, len(pairs))
        short, gained = greedy_shortfall(features, rewards, pairs, prior, np.asarray(batch.pairs)[:count])
        assert (short <= 1e-5 * gained).all(), (short, gained)
        np.testing.assert_allclose(batch.gains[:count], gained, rtol=5e-3)
        assert int(info.passes) > 1


def test_a_prior_that_is_not_positive_definite_is_singular():
    features, rewards, space = problem(np.random.default_rng(0), "all")
    for prior in (np.zeros((F, F)), -np.eye(F), np.full((F, F), np.nan)):
        batch, _ = chosen(
            jnp.asarray(features), jnp.asarray(rewards), space, jnp.asarray(prior, jnp.float32), K, shortlist=1
        )
        assert batch.status == Status.SINGULAR


def test_the_same_pair_twice_is_worth_less_the_second_time():
    """What one-shot scores cannot see: of two directions, greedy picks the second before a copy of the first."""
    features = np.zeros((SIZE, F), np.float32)
    features[[0, 2, 4]] = [3, 0, 0]  # pairs (0, 1), (2, 3), (4, 5): copies of one strong direction
    features[6] = [0, 1, 0]  # (6, 7): a weak one, at right angles
    listed = np.full((60, 2), SIZE)
    listed[:4] = [[0, 1], [2, 3], [4, 5], [6, 7]]
    space = listed_space(jnp.asarray(listed, jnp.int32), jnp.ones(SIZE, bool), WIDTH)
    prior = jnp.eye(F) * 0.1
    batch, _ = chosen(jnp.asarray(features), jnp.zeros(SIZE), space, prior, K, shortlist=1)
    assert np.asarray(batch.pairs)[:2].tolist() == [[0, 1], [6, 7]]
    scores = leverages64(features, np.zeros(SIZE), list_pairs(space), np.asarray(prior))
    assert scores[0] == scores[1] == scores[2] > scores[3]


@pytest.mark.slow
@pytest.mark.nightly
def test_numpy_arrays_are_as_good_as_those_of_jax():
    """In a process of its own: here signatures are checked, and say JAX."""
    code = """
import numpy as np, jax.numpy as jnp
from jarm.design.criteria import D_OPTIMAL
from jarm.design.greedy import greedy
from jarm.design.spaces import pair_space
rng = np.random.default_rng(0)
features, rewards = rng.normal(size=(12, 3)), rng.normal(size=12)
batches = []
for array in (np.asarray, lambda x: jnp.asarray(x, jnp.float32)):
    space = pair_space("all", 3, np.ones(12, bool))
    batches.append(greedy(D_OPTIMAL, array(features), array(rewards), space, array(np.eye(3)), 5)[0].pairs)
assert (batches[0] == batches[1]).all() and len(batches[0]) == 5
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["within", "cross", "all", "listed"])
def test_is_in_says_which_pairs_a_space_holds(kind):
    case = make_case(kind)
    space = case.space
    if kind == "listed":  # in no order, with padding
        pairs = jnp.concatenate([space.pairs[::-1], jnp.full((2, 2), 24, jnp.int32)])
        space = dataclasses.replace(space, pairs=pairs)
    every = np.array([(i, j) for i in range(26) for j in range(26)], np.int32)
    inside = {tuple(pair) for pair in list_pairs(space).tolist()}
    np.testing.assert_array_equal(jax.jit(is_in)(space, every), [tuple(pair) in inside for pair in every.tolist()])


@pytest.mark.parametrize("kind", sampled(SPACES, "listed"))
def test_a_score_that_is_not_a_number_is_never_passed_over(kind):
    """Though there are better pairs enough; but an excluded pair may score what it likes."""
    case = make_case(kind)
    pairs = np.asarray(list_pairs(case.space))
    gaps = np.abs(np.subtract(*np.asarray(case.belief.rewards)[pairs.T]))

    def best(widest, *, k):
        score = lambda margin, _: jnp.log(widest - jnp.abs(margin))  # noqa: E731
        return top_pairs(score, case.belief.rewards, None, space, k)

    second, first = np.argsort(gaps)[-2:]
    between, space = (gaps[second] + gaps[first]) / 2, case.space
    assert best(gaps[first] * 1.001, k=3).status == Status.OK
    assert best(between, k=3).status == Status.NONFINITE
    if kind != "listed":  # whose pairs are all offered
        excluded = np.concatenate([np.asarray(space.excluded), pairs[first : first + 1]])
        space = pair_space(kind, 4, space.eligible, jnp.asarray(excluded, jnp.int32))
        assert best(between, k=3).status == Status.OK


@pytest.mark.slow
def test_a_rule_that_breaks_its_contract_is_named():
    case = make_case("within")
    good = top_pairs(lambda margin, _: jnp.abs(margin), case.belief.rewards, None, case.space, 4)
    assert check_selection(good, case.space, 4, "mine").status == Status.OK
    for changes in (
        {"pairs": good.pairs.at[1].set(good.pairs[0])},
        {"pairs": good.pairs[:, ::-1]},
        {"pairs": good.pairs.at[2].set(jnp.array([0, 1]))},  # labelled
        {"valid": good.valid.at[3].set(False)},  # fewer than there are
        {"valid": good.valid.at[1].set(False)},  # a hole
    ):
        bad = dataclasses.replace(good, **changes)
        assert check_selection(bad, case.space, 4, "mine").status == Status.BROKEN_RULE
    for changes in ({"gains": good.gains.at[3].set(jnp.nan)}, {"weights": jnp.ones(4).at[2].set(-1)}):
        bad = dataclasses.replace(good, **changes)
        assert check_selection(bad, case.space, 4, "mine").status == Status.BROKEN_SCORES
    with pytest.raises(JarmError, match=r"Rule 'mine' returned pairs of shape \[4, 2\] .* return \[5, 2\]"):
        check_selection(good, case.space, 5, "mine")
    with pytest.raises(JarmError, match="Rule 'mine' returned tuple"):
        check_selection((good.pairs,), case.space, 4, "mine")


@pytest.mark.slow
@pytest.mark.nightly
def test_lists_of_fewer_pairs_than_responses_choose_as_others_do():
    """There differences are whitened, not responses; far from the origin, too, and beside responses of no pair."""
    rng = np.random.default_rng(8)
    features, rewards = (rng.normal(size=(60, F)) + 300).astype(np.float32), rng.normal(size=60).astype(np.float32)
    eligible = np.arange(60) != 7
    features[7] = np.nan
    space = listed_space(jnp.asarray(rng.permutation(60)[:50].reshape(25, 2), jnp.int32), jnp.asarray(eligible))
    pairs = list_pairs(space)
    metric = np.diag([1.0, 4.0, 0.5])
    whiten, _ = inverse_factor(jnp.asarray(metric, jnp.float32))
    given = jnp.asarray(features), jnp.asarray(rewards)
    best = top_pairs(lambda m, q: fisher_weight(m) * q, *given[::-1], space, 6, whiten=whiten)
    own = leverages64(features, rewards, pairs, metric)
    np.testing.assert_allclose(best.gains, np.sort(own)[::-1][:6], rtol=1e-4)
    batch, _ = greedy(D_OPTIMAL, *given, space, jnp.asarray(metric, jnp.float32), 6)
    short, gained = greedy_shortfall(np.nan_to_num(features), rewards, pairs, metric, np.asarray(batch.pairs))
    assert (short <= 1e-6 * gained).all()
    np.testing.assert_allclose(batch.gains, gained, rtol=1e-4)
