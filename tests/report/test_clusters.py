"""Means over clusters and ranks within prompts, against loops and simulation in float64."""

import math

import numpy as np
import pytest
from scipy import stats

from jarm.report.clusters import average_ranks, centred, clustered_mean, spearman_within
from jarm.report.rewardbench import best_is_right, section_scores


def by_loops(values, clusters, counts, strata, shares):
    """The formula of the docstring, term by term."""
    means = [np.average(values[strata == s], weights=counts[strata == s]) for s in range(len(shares))]
    error = 0.0
    names = np.unique(clusters)
    for name in names:
        term = 0.0
        for i in np.flatnonzero(clusters == name):
            s = strata[i]
            term += shares[s] * counts[i] * (values[i] - means[s]) / counts[strata == s].sum()
        error += term**2
    free = len(names) - len(shares)
    reach = stats.t.ppf(0.975, free) * math.sqrt(error * len(names) / free)
    mean = float(np.dot(shares, means))
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


@pytest.mark.parametrize("seed", range(3))
def test_means_of_strata_have_the_interval_of_the_formula(seed):
    rng = np.random.default_rng(seed)
    strata = np.repeat([0, 1, 2], [8, 5, 12])
    values, clusters, counts = rng.normal(size=25), rng.integers(0, 9, 25), rng.integers(1, 4, 25).astype(float)
    shares = np.array([0.5, 0.2, 0.3])
    found = clustered_mean(values, clusters, counts=counts, strata=strata, shares=shares)
    assert found == pytest.approx(by_loops(values, clusters, counts, strata, shares))
    found = clustered_mean(values, clusters)
    assert found == pytest.approx(by_loops(values, clusters, np.ones(25), np.zeros(25, int), np.ones(1)))


def test_the_interval_covers_the_mean_of_correlated_units():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        clusters = np.repeat(np.arange(20), 5)
        found = clustered_mean(rng.normal(size=20)[clusters] + 0.3 * rng.normal(size=100), clusters)
        covered += found["low"] <= 0 <= found["high"]
    assert 0.92 < covered / 400 < 0.98


def test_ends_are_bounded_and_unknown_from_one_cluster():
    values, clusters = np.array([1.0, 1.0, 0.0]), np.array([0, 1, 2])
    found = clustered_mean(values, clusters, bounds=(0.0, 1.0))
    assert (found["low"], found["high"]) == (0.0, 1.0)
    alone = clustered_mean(values, np.zeros(3, int))
    assert alone["mean"] == pytest.approx(2 / 3)
    assert math.isnan(alone["low"])
    strata = np.array([0, 0, 1])  # the second has one cluster
    assert math.isnan(clustered_mean(values, clusters, strata=strata)["high"])
    assert math.isnan(clustered_mean(np.zeros(0), np.zeros(0, int))["mean"])


@pytest.mark.parametrize("seed", range(3))
def test_ranks_and_correlations_within_prompts_are_those_of_each_prompt(seed):
    rng = np.random.default_rng(seed)
    prompts = rng.permutation(np.repeat(np.arange(8), [1, 2, 3, 4, 5, 6, 7, 3]))
    a, b = rng.integers(0, 4, len(prompts)).astype(float), rng.integers(0, 4, len(prompts)).astype(float)
    a[prompts == 7] = 2  # the same for all: no correlation
    ranks, found, middle = average_ranks(a, prompts), spearman_within(a, b, prompts), centred(a, prompts)
    for prompt in range(8):
        own = prompts == prompt
        np.testing.assert_array_equal(ranks[own], stats.rankdata(a[own]))
        np.testing.assert_allclose(middle[own], a[own] - a[own].mean(), atol=1e-15)
        if len(set(a[own])) > 1 and len(set(b[own])) > 1:
            assert found[prompt] == pytest.approx(stats.spearmanr(a[own], b[own])[0])
        else:
            assert math.isnan(found[prompt])


def test_subsets_of_no_section_count_for_none():
    right, prompts = np.array([1.0, 1.0, 0.0, 0.0, 0.0]), np.arange(5)
    found = section_scores(right, ["hep-go", "hep-go", "math-prm", "math-prm", "mine"], prompts)
    assert list(found) == ["Reasoning"]
    assert found["Reasoning"]["mean"] == pytest.approx(164 / (984 + 164))
    assert section_scores(right, ["mine"] * 5, prompts) == {}


def test_several_right_responses_share_the_top():
    rewards, items = np.array([2.0, 2.0, 2.0, 1.0, 1.0, 3.0]), np.array([0, 0, 0, 0, 1, 1])
    correct = np.array([True, True, False, False, True, False])
    assert best_is_right(rewards, correct, items) == pytest.approx([2 / 3, 0])
