import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable
from jarm.evaluation import batch as labelled_batch
from jarm.evaluation import metrics, scoring
from jarm.evaluation import ranking as order
from jarm.evaluation.annotators import AnnotatorConfig, reward_scale
from jarm.reward.heads import linear_head, mlp_head
from jarm.testing.tracing import count_compilations

CONSTANTS = {"noise": 2.0, "scale": 1.5}


spearman = jax.jit(order.spearman)
best_of_n = jax.jit(order.best_of_n, static_argnames="n")
ranking = jax.jit(order.ranking, static_argnames="compare_up_to")
batch_report = jax.jit(labelled_batch.batch_report, static_argnames="width")


def make_table(P, R, d, seed=0, ragged=True, ties=True):
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=(P, R)).astype(np.float32)
    gold = np.round(gold, 1) if ties else gold
    mask = np.ones((P, R), bool)
    if ragged:
        mask = np.arange(R) < rng.integers(0, R + 1, P)[:, None]
        mask[0] = True
    return ResponseTable(
        store=rng.normal(size=(P * R, d)).astype(np.float16),
        rows=np.arange(P * R).reshape(P, R),
        mask=mask,
        gold=np.where(mask, gold, 0),
        attributes={"length": rng.integers(1, 9, (P, R)).astype(np.float32)},
    )


def lists(scores, mask):
    return [row[real] for row, real in zip(scores, mask, strict=True)]


def expected_best(pred, gold, n):
    """By enumeration of every subset; ties for the best are shared."""
    best = []
    for subset in itertools.combinations(range(len(pred)), n):
        inside = np.array(subset)
        best.append(np.mean(gold[inside][pred[inside] == pred[inside].max()], dtype=np.float64))
    return np.mean(best) if best else np.nan


def pair_metrics(preds, golds, noise, scale):
    """Float64, every pair of every prompt, from the formulas."""
    nll, brier, right, over = [], [], [], np.zeros(scoring.BINS)
    for pred, gold in zip(preds, golds, strict=True):
        for i, j in itertools.combinations(range(len(pred)), 2):
            margin, gap = float(pred[i]) - float(pred[j]), float(gold[i]) - float(gold[j])
            perfect = not 0 <= noise < math.inf
            wins = (np.sign(gap) + 1) / 2 if perfect else 1 / (1 + math.exp(-noise * gap / scale))
            p = 1 / (1 + math.exp(-margin))
            nll.append(-wins * math.log(p) - (1 - wins) * math.log(1 - p))
            brier.append(wins * (1 - p) ** 2 + (1 - wins) * p**2)
            if gap:
                right.append(0.5 if margin == 0 else float((margin > 0) == (gap > 0)))
            confidence, agree = max(p, 1 - p), wins if margin > 0 else 1 - wins if margin < 0 else 0.5
            over[min(int((confidence - 0.5) * 30), 14)] += confidence - agree
    return {
        "nll": np.mean(nll),
        "brier": np.mean(brier),
        "pair_accuracy": np.mean(right),
        "calibration_error": np.abs(over).sum() / len(nll),
    }


scores = st.lists(st.sampled_from([-np.inf, -2.0, -1e-3, -0.0, 0.0, 1e-3, 1.0, 3.0, np.inf]), min_size=1, max_size=12)


@given(scores, st.data())
@settings(deadline=None, max_examples=40)
def test_both_ways_of_ranking_count_the_same(values, data):
    x = np.array(values + [0.0] * (12 - len(values)), np.float32)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=12, max_size=12)))
    compared = ranking(jnp.array(x), jnp.array(mask), compare_up_to=12)
    ordered = ranking(jnp.array(x), jnp.array(mask), compare_up_to=0)
    real = x[mask]
    for ranks in (compared, ordered):
        assert int(ranks.size) == mask.sum()
        np.testing.assert_array_equal(np.asarray(ranks.below)[mask], (real[None, :] < real[:, None]).sum(1))
        np.testing.assert_array_equal(np.asarray(ranks.upto)[mask], (real[None, :] <= real[:, None]).sum(1))


@pytest.mark.parametrize("R", [2, 7, 20, 60])
def test_spearman_is_scipys_with_ties(R):
    rng = np.random.default_rng(R)
    pred = np.round(rng.normal(size=(30, R)), 1).astype(np.float32)
    gold = np.round(rng.normal(size=(30, R)) + pred, 0).astype(np.float32)
    mask = np.arange(R) < rng.integers(2, R + 1, 30)[:, None]
    ours = jax.vmap(order.spearman)(jnp.array(pred), jnp.array(gold), jnp.array(mask))
    for rho, p, g in zip(ours, lists(pred, mask), lists(gold, mask), strict=True):
        if np.ptp(p) == 0 or np.ptp(g) == 0:
            assert np.isnan(rho)
        else:
            np.testing.assert_allclose(rho, scipy.stats.spearmanr(p, g).statistic, atol=2e-6)


@pytest.mark.parametrize("R", [1, 6, 50])
def test_a_constant_or_nan_predictor_has_no_spearman(R):
    gold, mask = jnp.arange(R, dtype=jnp.float32), jnp.ones(R, bool)
    assert np.isnan(spearman(jnp.full(R, 0.3), gold, mask))
    assert np.isnan(spearman(gold, jnp.full(R, 0.3), mask))
    assert np.isnan(spearman(gold.at[0].set(jnp.nan), gold, mask))
    assert np.isnan(best_of_n(gold.at[0].set(jnp.nan), gold, mask, 1))
    np.testing.assert_allclose(best_of_n(jnp.full(R, 0.3), gold, mask, 1), gold.mean(), rtol=1e-6)


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(-2, 2), st.integers(-9, 9)), min_size=7, max_size=7),
    st.lists(st.booleans(), min_size=7, max_size=7),
)
@settings(deadline=None, max_examples=30)
def test_best_of_n_is_the_mean_over_all_subsets(n, responses, real):
    pred, gold = np.array(responses, np.float32).T
    mask = np.array(real)
    ours = best_of_n(jnp.array(pred), jnp.array(gold), jnp.array(mask), n)
    np.testing.assert_allclose(ours, expected_best(pred[mask], gold[mask], n), atol=2e-5)


def test_best_of_n_at_full_size():
    rng = np.random.default_rng(0)
    pred, gold = rng.normal(size=(2, 500)).astype(np.float32)
    ordered = gold[np.argsort(pred)].astype(np.float64)
    for n in (1, 5, 30, 500):
        weights = [math.comb(i - 1, n - 1) / math.comb(500, n) for i in range(1, 501)]
        ours = best_of_n(jnp.array(pred), jnp.array(gold), jnp.ones(500, bool), n)
        np.testing.assert_allclose(ours, np.dot(weights, ordered), atol=1e-5)


@pytest.mark.parametrize("R", [1, 2, 3, 20, 33])
def test_every_pair_is_met_once(R):
    partner, once = scoring.pair_offsets(R)
    met = [
        tuple(sorted((i, int(j))))
        for row, real in zip(partner, once, strict=True)
        for i, j in enumerate(row)
        if real[i]
    ]
    assert sorted(met) == sorted(itertools.combinations(range(R), 2))


@pytest.mark.parametrize("R", [34, 54, 501])
def test_many_responses_meet_sixteen_partners_each_way_at_most_once(R):
    partner, once = scoring.pair_offsets(R)
    assert partner.shape == (16, R)
    assert once.all()
    met = {tuple(sorted((i, int(j)))) for row in partner for i, j in enumerate(row)}
    assert len(met) == 16 * R


@pytest.mark.parametrize("noise", [2.0, 0.0, np.inf, -1.0])
def test_scores_are_measured_as_the_formulas_say(noise):
    table = make_table(9, 8, 2)
    pred = np.round(np.random.default_rng(1).normal(size=(9, 8)), 1).astype(np.float32)
    ours = metrics.evaluate_scores(pred, table, noise=noise, scale=1.5, best_of=(1, 3, 8))
    preds, golds = lists(pred, table.mask), lists(table.gold, table.mask)
    rho = np.array([float(spearman(*map(jnp.array, row))) for row in zip(pred, table.gold, table.mask, strict=True)])
    np.testing.assert_allclose(ours["spearman"], np.nanmean(rho), rtol=1e-5)
    assert ours["spearman_undefined"] == np.isnan(rho).sum() > 0
    rankable = [len(set(g)) > 1 for g in golds]
    np.testing.assert_allclose(ours["spearman_share"], np.mean(~np.isnan(rho[rankable])), rtol=1e-6)
    for n in (1, 3, 8):
        best = np.array([expected_best(p, g, n) for p, g in zip(preds, golds, strict=True)])
        np.testing.assert_allclose(ours[f"best_of_{n}"], np.nanmean(best), atol=1e-5)
        assert ours[f"best_of_{n}_undefined"] == np.isnan(best).sum()
    for name, value in pair_metrics(preds, golds, noise, 1.5).items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_nothing_overflows_for_a_confident_head():
    table = make_table(3, 5, 2, ragged=False)
    ours = metrics.evaluate_scores(-200 * table.gold, table, noise=np.inf, scale=1.0)
    assert ours["pair_accuracy"] == 0
    gaps = np.abs(table.gold[:, :, None] - table.gold[:, None, :])[:, *np.triu_indices(5, 1)].astype(np.float64)
    np.testing.assert_allclose(ours["nll"], np.where(gaps > 0, 200 * gaps, np.log(2)).mean(), rtol=1e-5)


@pytest.mark.parametrize(("batched_heads", "prompts"), [(False, 3), (True, 7)])
@pytest.mark.slow
def test_chunks_of_many_heads_equal_each_head_on_the_whole(key, batched_heads, prompts):
    H, K, table = 3, 2, make_table(7, 6, 5)
    head = mlp_head((8,))
    params = jax.jit(jax.vmap(jax.vmap(lambda each: head.init(each, 5))))(jax.random.split(key, (H, K)))
    rewards = jax.vmap(jax.vmap(head.rewards, (0, None)), (0, None))(params, jnp.array(table.embeddings())).mean(1)
    chunk_bytes = prompts * 6 * 4 * (4 * 5 + 4 * 8 * (K if batched_heads else 1) + 30)
    ours = metrics.evaluate(head, params, table, **CONSTANTS, chunk_bytes=chunk_bytes, batched_heads=batched_heads)
    for h in range(H):
        single = metrics.evaluate_scores(np.asarray(rewards[h]), table, **CONSTANTS)
        assert single.keys() == ours.keys()
        for name, value in single.items():
            assert ours[name].shape == (H,)
            np.testing.assert_allclose(ours[name][h], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_second_evaluation_compiles_nothing(key):
    table, head = make_table(5, 4, 3), linear_head()
    params = jax.tree.map(lambda leaf: jnp.ones((2, 1, *leaf.shape)), head.init(key, 3))
    metrics.evaluate(head, params, table, chunk_bytes=2000)
    with count_compilations() as compiled:
        metrics.evaluate(head, params, table, chunk_bytes=2000, noise=3.0, scale=2.0)
    assert not compiled


def test_reference_lines_bound_what_a_model_can_do():
    table = make_table(20, 9, 2, ties=False, ragged=False)
    lines = metrics.reference_lines(table, **CONSTANTS)
    assert lines.keys() == {"oracle", "mean response", "length"}
    oracle, mean, length = lines["oracle"], lines["mean response"], lines["length"]
    assert oracle["spearman"] == pytest.approx(1)
    assert oracle["pair_accuracy"] == 1
    assert oracle["calibration_error"] < 1e-6
    np.testing.assert_allclose(oracle["best_of_9"], table.gold.max(1).mean(), rtol=1e-6)
    assert np.isnan(mean["spearman"])
    assert mean["spearman_undefined"] == 20
    assert mean["pair_accuracy"] == 0.5
    np.testing.assert_allclose([mean["best_of_5"], mean["best_of_9"]], table.gold.mean(), rtol=1e-5)
    np.testing.assert_allclose(mean["nll"], np.log(2), rtol=1e-6)
    assert oracle["nll"] < mean["nll"]
    assert abs(length["spearman"]) < 0.5
    assert "nll" not in length


@pytest.mark.parametrize("annotator", [AnnotatorConfig(), AnnotatorConfig(flip_rate=0.2, length_bias=1.0)])
@pytest.mark.parametrize("known", [{}, {"noise": 2.0}, {"scale": 1.5}])
def test_without_the_annotators_odds_nothing_is_calibrated(key, annotator, known):
    table, head = make_table(5, 4, 3), linear_head()
    params = jax.tree.map(lambda leaf: jnp.ones((1, 1, *leaf.shape)), head.init(key, 3))
    full = metrics.evaluate(head, params, table, annotator=annotator, **CONSTANTS)
    ours = metrics.evaluate(head, params, table, annotator=annotator, **known)
    assert full.keys() - ours.keys() == set(metrics.CALIBRATED)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, full[name])
    lines = metrics.reference_lines(table, annotator=annotator, **known)
    complete = metrics.reference_lines(table, annotator=annotator, **CONSTANTS)
    for name, line in lines.items():
        assert line.keys() == complete[name].keys() - set(metrics.CALIBRATED)


@pytest.mark.parametrize(
    "settings",
    [
        {"annotator": AnnotatorConfig("perfect")},
        {"annotator": AnnotatorConfig("perfect"), **CONSTANTS},
        {"noise": np.inf, "scale": 1e-3},
        {"noise": -1.0, "scale": 1e3},
    ],
)
def test_the_oracle_of_a_perfect_annotator_is_sure(settings):
    table = make_table(20, 9, 2, ragged=False)
    table.gold[0, :2] = 0.1, np.nextafter(np.float32(0.1), np.float32(1))
    oracle = metrics.reference_lines(table, **settings)["oracle"]
    first, second = np.triu_indices(9, 1)
    ties = np.mean(table.gold[:, first] == table.gold[:, second])
    assert 0 < ties < 0.1
    np.testing.assert_allclose(oracle["nll"], ties * np.log(2), rtol=1e-5)
    np.testing.assert_allclose(oracle["brier"], ties / 4, rtol=1e-5)
    assert oracle["calibration_error"] < 1e-6


def test_a_model_that_ranks_few_prompts_says_how_few():
    table = make_table(50, 6, 2, ties=False, ragged=False)
    table.gold[:4] = 0.3  # nothing to rank: no fault of the model
    pred = np.where(np.arange(50)[:, None] % 10 == 9, table.gold, 0).astype(np.float32)
    pred[49, 0] = np.nan
    ours = metrics.evaluate_scores(pred, table)
    assert ours["spearman"] == pytest.approx(1)
    assert ours["spearman_undefined"] == 46
    assert ours["spearman_share"] == pytest.approx(4 / 46)
    table.gold[:] = 0.3
    assert np.isnan(metrics.evaluate_scores(pred, table)["spearman_share"])


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ([20] * 9 + [500], (5, 10, 20)),
        ([3] + [20] * 9, (5, 10, 20)),
        ([3, 4] + [20] * 8, (4,)),
        ([0, 1, 1, 1, 30, 30], (5, 10, 30)),
        ([5] * 3, (5,)),
        ([1, 1, 0], (1,)),
    ],
)
def test_best_of_sizes_are_within_the_reach_of_nine_prompts_in_ten(counts, sizes):
    mask = np.arange(max(counts)) < np.array(counts)[:, None]
    table = ResponseTable(np.zeros((1, 2), np.float32), np.zeros(mask.shape, int), mask)
    assert metrics.best_of_sizes(table) == sizes
    several = [count for count in counts if count > 1] or counts
    reach = [np.mean([count >= n for count in several]) for n in range(1, max(counts) + 1)]
    if max(several) > 1:
        assert sizes[-1] in counts
        assert reach[sizes[-1] - 1] >= 0.9


def test_more_than_there_are_is_undefined():
    table = make_table(3, 4, 2)
    ours = metrics.evaluate_scores(table.gold, table, best_of=(5, 90))
    assert np.isnan(ours["best_of_5"])
    assert ours["best_of_90_undefined"] == 3


def test_bad_input_is_named():
    table = make_table(3, 4, 2)
    with pytest.raises(JarmError, match="best_of"):
        metrics.evaluate_scores(table.gold, table, best_of=(0,))
    with pytest.raises(JarmError, match="no gold rewards"):
        metrics.reference_lines(ResponseTable(table.store, table.rows, table.mask))
    with pytest.raises(JarmError, match="no responses"):
        metrics.evaluate_scores(table.gold[:0], table.take(np.arange(0)))


def batch(B, d, seed=0):
    rng = np.random.default_rng(seed)
    pairs = np.sort(rng.integers(0, 12, (B, 2)), axis=1).astype(np.int32)
    embeddings = rng.normal(size=(12, d)).astype(np.float32)
    return pairs, embeddings[pairs[:, 0]], embeddings[pairs[:, 1]], rng.random(B).astype(np.float32)


@pytest.mark.parametrize("flip_rate", [0.0, 0.3])
def test_an_annotator_who_flips_is_judged_by_its_own_odds(flip_rate):
    table = make_table(6, 5, 3)
    pred = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    annotator = AnnotatorConfig("flip", flip_rate=flip_rate)
    losses = []
    for p, (i, j) in itertools.product(range(6), itertools.combinations(range(5), 2)):
        if table.mask[p, i] and table.mask[p, j]:
            gap = float(table.gold[p, i]) - float(table.gold[p, j])
            wins = 0.5 if gap == 0 else flip_rate + (1 - 2 * flip_rate) * (gap > 0)
            margin = float(pred[p, i]) - float(pred[p, j])
            losses.append(wins * np.logaddexp(0, -margin) + (1 - wins) * np.logaddexp(0, margin))
    ours = metrics.evaluate_scores(pred, table, annotator=annotator)
    np.testing.assert_allclose(ours["nll"], np.mean(losses), rtol=1e-5)
    lines = metrics.reference_lines(table, annotator=annotator)
    assert "nll" not in lines["oracle"]
    assert lines["oracle"]["spearman"] == pytest.approx(1)


def test_a_batch_is_reported_as_the_formulas_say():
    pairs, first, second, weight = batch(9, 4)
    valid = np.arange(9) < 7
    gap = weight - 0.5
    ours = batch_report(*map(jnp.array, (first, second, pairs, valid, weight, 2 * weight, gap)), width=4, scale=8.0)
    z = (first - second)[:7].astype(np.float64)
    np.testing.assert_allclose(ours["diversity_log_det"], np.linalg.slogdet(np.eye(7) + z @ z.T / 8)[1], rtol=1e-5)
    apart = [min(np.linalg.norm(a - b), np.linalg.norm(a + b)) / np.sqrt(8) for a, b in itertools.combinations(z, 2)]
    np.testing.assert_allclose(ours["diversity_distance"], np.mean(apart), rtol=1e-4)
    assert ours["distinct_responses"] == len(set(pairs[:7].ravel()))
    assert ours["distinct_prompts"] == len(set(pairs[:7].ravel() // 4))
    np.testing.assert_allclose(ours["mean_fisher_weight"], weight[:7].mean(), rtol=1e-6)
    np.testing.assert_allclose(ours["mean_member_variance"], 2 * weight[:7].mean(), rtol=1e-6)
    np.testing.assert_allclose(ours["mean_gold_gap"], np.abs(gap[:7]).mean(), rtol=1e-6)


def test_an_empty_batch_is_zero_and_a_mirrored_one_the_same():
    pairs, first, second, weight = map(jnp.array, batch(5, 3))
    empty = batch_report(first, second, pairs, jnp.zeros(5, bool), weight, weight, weight, width=4, scale=1.0)
    assert all(value == 0 for value in empty.values())
    valid, flip = jnp.ones(5, bool), jnp.array([True, False, True, False, False])[:, None]
    one = batch_report(first, second, pairs, valid, weight, weight, weight, width=4, scale=1.0)
    mirrored = (jnp.where(flip, second, first), jnp.where(flip, first, second), jnp.where(flip, pairs[:, ::-1], pairs))
    other = batch_report(*mirrored, valid, weight, weight, -weight, width=4, scale=1.0)
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-5, err_msg=name)


def test_an_attribute_can_take_the_place_of_gold(key):
    table, head = make_table(8, 5, 3), linear_head()
    params = jax.tree.map(lambda leaf: jnp.ones((2, 1, *leaf.shape)), head.init(key, 3))
    lengths = AnnotatorConfig(column="length")
    as_gold = ResponseTable(table.store, table.rows, table.mask, table.attributes["length"])
    ours = metrics.evaluate(head, params, table, column="length", annotator=lengths, **CONSTANTS)
    theirs = metrics.evaluate(head, params, as_gold, **CONSTANTS)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    lines = metrics.reference_lines(table, column="length", annotator=lengths, **CONSTANTS)
    assert lines["oracle"] == pytest.approx(metrics.reference_lines(as_gold, **CONSTANTS)["oracle"])
    # The odds of labels by one column are unknown as a function of another.
    crossed = metrics.evaluate(head, params, table, annotator=lengths, **CONSTANTS)
    assert theirs.keys() - crossed.keys() == set(metrics.CALIBRATED)
    plain = metrics.evaluate(head, params, table, **CONSTANTS)
    for name, value in crossed.items():
        np.testing.assert_array_equal(value, plain[name])
    with pytest.raises(JarmError, match="'help'"):
        metrics.evaluate(head, params, table, column="help")


@pytest.mark.parametrize("low", [16777216.0, 1e6, -1e9])
def test_metrics_are_those_of_the_differences_however_large_the_scores(key, low):
    """Against the same differences around 0: gold of float64 keeps them, and only best-of-n moves along."""
    near, head = make_table(8, 6, 3), linear_head()
    near.gold[0, :3] = -1e9, -1e9, -1e9  # as where scoring failed: the others keep their digits
    near = dataclasses.replace(near, gold=np.where(near.mask, np.round(near.gold * 1024) / 1024, 0))
    far = dataclasses.replace(near, gold=np.where(near.mask, np.float64(near.gold) + low, 0))
    params = jax.tree.map(lambda leaf: jnp.ones((1, 1, *leaf.shape)), head.init(key, 3))
    ours, theirs = (
        metrics.evaluate(head, params, table, noise=2.0, scale=0.1, best_of=(1, 3)) for table in (far, near)
    )
    for name, value in theirs.items():
        moved = low if name in ("best_of_1", "best_of_3") else 0.0
        np.testing.assert_allclose(ours[name], value + moved, rtol=1e-6, err_msg=name)
    lines = metrics.reference_lines(far, noise=2.0, scale=0.1, best_of=(3,))
    same = metrics.reference_lines(near, noise=2.0, scale=0.1, best_of=(3,))
    for name in ("spearman", "pair_accuracy", "nll"):
        assert lines["oracle"][name] == pytest.approx(same["oracle"][name], rel=1e-5)
    assert lines["oracle"]["spearman"] == pytest.approx(1)
    scores = metrics.evaluate_scores(np.float64(far.gold), near)
    assert scores["pair_accuracy"] == 1


def test_the_scale_of_another_column_is_refused(key):
    table, head = make_table(5, 4, 3), linear_head()
    params = jax.tree.map(lambda leaf: jnp.ones((1, 1, *leaf.shape)), head.init(key, 3))
    by_length = AnnotatorConfig(column="length")
    scale = reward_scale(by_length, table.attributes["length"], table.mask)
    for measure in (
        functools.partial(metrics.evaluate, head, params),
        functools.partial(metrics.evaluate_scores, table.gold),
        metrics.reference_lines,
    ):
        with pytest.raises(JarmError, match=r"unit of 'length', .*`annotator=config.annotator`"):
            measure(table, noise=2.0, scale=scale)
        measure(table, noise=2.0, scale=scale, annotator=by_length, column="length")


@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_a_test_embedding_that_no_head_can_read_is_named_and_a_failed_head_is_not_blamed_on_it(key, value):
    table, head = make_table(5, 4, 3, ragged=False), linear_head()
    params = jax.tree.map(lambda leaf: jnp.full((1, 1, *leaf.shape), 1e20), head.init(key, 3))
    store = np.float32(table.store)
    failed = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    assert np.isnan(metrics.evaluate(head, failed, table, chunk_bytes=2000)["spearman"])
    store[9, 1] = value
    with pytest.raises(JarmError, match=r"response 1 of prompt 2 is .* in column 1"):
        metrics.evaluate(head, params, dataclasses.replace(table, store=store), chunk_bytes=2000)
