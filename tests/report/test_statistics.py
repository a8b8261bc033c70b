import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from jarm.report.statistics import (
    Interval,
    LabelSaving,
    area_under_curve,
    bootstrap_ci,
    label_saving,
    labels_to_reach,
    number,
    paired_difference,
    seeds_to_see,
    simultaneous_ci,
    t_quantile,
    tail,
    times_fewer,
    verdict,
)
from jarm.report.summary import labels_needed

LABELS = np.array([50, 100, 200, 400])


@pytest.mark.parametrize("seeds", [2, 3, 6, 11, 40])
def test_tail_is_the_expanded_percentile(seeds):
    wide = np.sqrt(seeds / (seeds - 1)) * scipy.stats.t.ppf(0.975, seeds - 1)
    np.testing.assert_allclose(tail(seeds), scipy.stats.norm.cdf(-wide), rtol=1e-6, atol=1e-15)


def test_intervals_are_deterministic_and_follow_the_data():
    values = np.random.default_rng(0).normal(size=20)
    one = bootstrap_ci(values)
    assert one == bootstrap_ci(values)
    assert one.low < one.mean < one.high
    assert one.seeds == 20
    moved = bootstrap_ci(3 * values + 1)
    np.testing.assert_allclose(moved[:3], 3 * np.array(one[:3]) + 1)
    student = scipy.stats.t.interval(0.95, 19, values.mean(), scipy.stats.sem(values))
    np.testing.assert_allclose(one[1:3], student, atol=0.1 * (one.high - one.low))


def test_ten_seeds_cover_what_they_say():
    rng, trials = np.random.default_rng(1), 400
    covered = 0
    for values in rng.normal(size=(trials, 10)):
        one = bootstrap_ci(values, draws=1000)
        covered += one.low <= 0 <= one.high
    # The plain percentile interval covers about .90 here; the standard error of a share of 400 is .011.
    assert covered / trials > 0.95 - 3 * 0.011


def test_pairing_removes_what_seeds_share():
    rng = np.random.default_rng(2)
    shared = rng.normal(size=12)
    rule, base = shared + 0.1 + 0.01 * rng.normal(size=12), shared
    paired, alone = paired_difference(rule, base), bootstrap_ci(rule)
    assert paired.low > 0
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)


def test_one_seed_has_no_interval():
    one = bootstrap_ci(np.array([0.4]))
    assert one.mean == 0.4
    assert math.isnan(one.low)
    assert "one seed" in verdict(one)
    assert "nothing to compare" in verdict(bootstrap_ci(np.array([])))


def test_area_is_the_mean_height():
    assert area_under_curve(LABELS, np.full(4, 0.3)) == pytest.approx(0.3)
    line = np.stack([LABELS / 400, 2 * LABELS / 400])
    np.testing.assert_allclose(area_under_curve(LABELS, line), [225 / 400, 450 / 400])
    assert area_under_curve(np.array([50]), np.array([0.2])) == 0.2


SHARES = st.integers(0, 1000).map(lambda n: n / 1000)  # no two so close that interpolation rounds them together


@given(st.lists(SHARES, min_size=4, max_size=4), SHARES)
def test_labels_to_reach_is_the_first_crossing(curve, target):
    ours = labels_to_reach(LABELS, np.array(curve), target)
    fine = np.linspace(50, 400, 35001)
    there = np.interp(fine, LABELS, curve) >= target
    if max(curve) < target:
        assert np.isinf(ours)
    elif there.any():
        np.testing.assert_allclose(ours, fine[np.argmax(there)], atol=0.011)


def test_label_saving_of_known_curves():
    rng = np.random.default_rng(3)
    noise = 0.001 * rng.normal(size=(8, 1))
    base = 0.1 * np.log(LABELS) + noise
    fast = 0.1 * np.log(4 * LABELS) + noise
    same = label_saving(LABELS, base, LABELS, base)
    assert same.ratio[:3] == (1, 1, 1)
    saved = label_saving(LABELS, fast, LABELS, base)
    assert saved.labels == pytest.approx(100)
    assert saved.ratio[:3] == pytest.approx((4, 4, 4))
    assert saved.unreached == 0
    assert saved.bound == same.bound == ""
    assert label_saving(LABELS, base + 1, LABELS, base).bound == "or more"
    slow = label_saving(LABELS, base - 0.05, LABELS, base)
    assert math.isinf(slow.labels)
    assert slow.bound == "or less"
    assert slow.unreached == 1
    assert slow.ratio.mean == 1


def test_the_verdict_says_what_the_numbers_say():
    saving = LabelSaving(145, 450, Interval(3.1, 2.2, 4.0, 10), 0.0, 450)
    assert verdict(Interval(0.031, 0.02, 0.042, 10), saving) == (
        "beats random by .031 (.020 to .042) in mean Spearman, needs 3.1 times fewer labels (2.2 to 4.0)"
    )
    never = LabelSaving(math.inf, 450, Interval(1.0, 1.0, 1.0, 10), 1.0, 450)
    assert verdict(Interval(-0.031, -0.042, -0.02, 10), never) == (
        "worse than random by .031 (.020 to .042) in mean Spearman, "
        "does not reach random's final value within 450 labels"
    )
    assert verdict(Interval(0.005, -0.01, 0.021, 10)) == (
        "no gain shown: .005 (-.010 to .021) against random in mean Spearman"
    )
    more = LabelSaving(450, 300, Interval(0.667, 0.5, 0.8, 10), 0.1, 450)
    assert "needs 1.5 times more labels (1.2 to 2.0 or beyond)" in verdict(Interval(-0.1, -0.2, -0.05, 10), more)
    assert verdict(Interval(0.005, 0.001, 0.009, 4)).endswith("with 4 seeds the interval is too narrow, run at least 5")
    at_once = LabelSaving(50, 450, Interval(9.0, 5.0, 9.0, 10), 0.0, 450, "or more")
    assert verdict(Interval(0.1, 0.05, 0.2, 10), at_once).endswith(
        "needs 9.0 times, or more, fewer labels (5.0 to 9.0)"
    )
    assert labels_needed(at_once, baseline=False) == "50 or fewer (5.0 to 9.0 times fewer)"
    either = LabelSaving(200, 300, Interval(1.5, 0.8, 3.0, 10), 0.0, 450)
    assert verdict(Interval(0.005, -0.01, 0.021, 10), either) == (
        "no gain shown: .005 (-.010 to .021) against random in mean Spearman, "
        "labels needed: no difference shown (0.8 to 3.0 times fewer)"
    )
    slower = either._replace(ratio=Interval(0.8, 0.5, 1.2, 10))
    assert verdict(Interval(-0.1, -0.2, -0.05, 10), slower).endswith(
        "labels needed: no difference shown (0.5 to 1.2 times fewer)"
    )
    assert verdict(Interval(0.005, -0.01, 0.021, 10), either._replace(unreached=0.1)).endswith(
        "no difference shown (0.8 to 3.0 times fewer), though 10% of resamples never reach random's final value"
    )
    unsure = saving._replace(unreached=0.1)
    assert "10% of resamples never reach" in verdict(Interval(0.031, 0.02, 0.042, 10), unsure)


@pytest.mark.parametrize(
    ("ratio", "unreached", "words"),
    [
        ((3.1, 2.2, 4.0), 0.0, (3.1, "2.2 to 4.0", "fewer")),
        ((0.5, 0.4, 0.8), 0.1, (2.0, "1.2 to 2.5 or beyond", "more")),
        ((0.5, 0.4, 1.0), 0.1, (0.5, "0.4 to 1.0", "fewer")),
        ((0.5, math.nan, math.nan), 0.0, (2.0, "", "more")),
        ((2.0, math.nan, math.nan), 0.0, (2.0, "", "fewer")),
    ],
)
def test_a_ratio_of_labels_in_words(ratio, unreached, words):
    assert times_fewer(LabelSaving(100, 200, Interval(*ratio, 10), unreached, 450)) == words


@pytest.mark.parametrize(
    ("value", "text"), [(0.0312, ".031"), (-0.0312, "-.031"), (1.2345, "1.234"), (-12.34, "-12.3"), (10.04, "10.0")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.slow
@pytest.mark.nightly
def test_simultaneous_intervals_cover_together():
    """20 comparisons of nothing: all 95 % intervals cover in far fewer than 95 % of the cases, the simultaneous do."""
    from scipy import stats

    values = np.random.default_rng(3).normal(size=(120, 20, 12))
    found = np.array([[simultaneous_ci(each, 20)[1:3] for each in case] for case in values])
    together = ((found[..., 0] <= 0) & (found[..., 1] >= 0)).all(axis=1).mean()
    assert 0.9 <= together <= 1
    low, high = stats.t.interval(1 - 0.05 / 20, 11, values[0, 0].mean(), stats.sem(values[0, 0]))
    np.testing.assert_allclose(simultaneous_ci(values[0, 0], 20)[1:3], (low, high), rtol=1e-9)
    assert np.isnan(simultaneous_ci(np.ones(1), 3).low)


def test_that_many_seeds_see_the_difference_that_often():
    """Against the share of simulated comparisons whose t interval leaves out 0."""
    rng = np.random.default_rng(0)
    sample = rng.normal(0, 0.03, 12)
    seeds = int(seeds_to_see(0.02, sample))
    data = 0.02 + sample.std(ddof=1) * rng.standard_normal((20_000, seeds))
    error = data.std(axis=1, ddof=1) / np.sqrt(seeds)
    seen = np.abs(data.mean(axis=1)) > scipy.stats.t.ppf(0.975, seeds - 1) * error
    assert 0.78 <= seen.mean() <= 0.84
    assert np.isnan(seeds_to_see(0.01, np.array([0.1])))
    assert seeds_to_see(0.01, np.array([0.1, 0.1])) == 2
    assert seeds_to_see(1e-9, sample) == math.inf


@pytest.mark.parametrize("df", [1, 2, 30, 1000, 1001, 100_000])
def test_quantiles_of_students_t(df):
    for p in (0.9, 0.975, 0.9999):
        assert t_quantile(p, df) == pytest.approx(scipy.stats.t.ppf(p, df), rel=1e-5)
