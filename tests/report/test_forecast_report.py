"""Labels saved from weighted curves, and the sentences of a forecast."""

import numpy as np
import pytest

from jarm.report.forecast import Saved, arm_in_words, forecast_in_words, labels_saved, quantiles
from jarm.report.statistics import (
    Interval,
    LabelSaving,
    area_under_curve,
    label_saving,
    labels_to_reach,
    paired_difference,
    saving_of_means,
    tail,
)

LABELS = np.array([50, 100, 150, 200])


def curves(seed=0, S=30):
    rng = np.random.default_rng(seed)
    shape = np.array([0.2, 0.3, 0.35, 0.38])
    random = shape + 0.02 * rng.normal(size=(S, 4)) + 0.1 * rng.normal(size=(S, 1))
    return random + np.array([0.05, 0.04, 0.02, 0.01]) + 0.01 * rng.normal(size=(S, 4)), random


def made(ratio, gain, ahead, labels=100.0, baseline_labels=200.0):
    return Saved(LabelSaving(labels, baseline_labels, Interval(*ratio, 10), 0.0, 450.0), Interval(*gain, 10), ahead)


def test_equal_weights_are_the_saving_of_a_comparison():
    arm, random = curves()
    saved = labels_saved(LABELS, arm, random)
    assert saved.saving == label_saving(LABELS, arm, LABELS, random, draws=1000)
    areas = [area_under_curve(LABELS, each) for each in (arm, random)]
    assert saved.gain == pytest.approx(paired_difference(*areas, draws=1000))


def test_a_bootstrap_written_out():
    """Campaigns drawn one by one, their weights beside them; the ends at the percentiles of the effective number."""
    arm, random = curves(S=12)
    weights = np.random.default_rng(1).uniform(0.2, 2, 12)
    rng, ratios, gains = np.random.default_rng(0), [], []
    for drawn in rng.integers(0, 12, (1000, 12)):
        own, base = (np.average(each[drawn], axis=0, weights=weights[drawn]) for each in (arm, random))
        needed = [float(labels_to_reach(LABELS, each, base[-1])) for each in (own, base)]
        ratios.append(needed[1] / min(needed[0], 200))
        gains.append(np.trapezoid(own - base, LABELS) / 150)
    saved = labels_saved(LABELS, arm, random, weights)
    cut = tail(round(weights.sum() ** 2 / np.square(weights).sum()))
    assert saved.saving.ratio[1:3] == pytest.approx(np.quantile(ratios, [cut, 1 - cut]))
    assert saved.gain[1:3] == pytest.approx(np.quantile(gains, [cut, 1 - cut]))


def test_weights_count_campaigns():
    """A campaign of weight 2 is as two of them; one of weight 0 as none."""
    arm, random = curves()
    weights = np.array([2.0, 0.0] + [1.0] * 28)
    doubled = labels_saved(
        LABELS, np.concatenate([arm[:1], arm[:1], arm[2:]]), np.concatenate([random[:1], random[:1], random[2:]])
    )
    weighed = labels_saved(LABELS, arm, random, weights)
    assert weighed.saving.ratio.mean == pytest.approx(doubled.saving.ratio.mean)
    assert weighed.gain.mean == pytest.approx(doubled.gain.mean)
    assert weighed.ahead == pytest.approx(doubled.ahead)


def test_a_curve_that_does_not_reach_has_a_bound():
    _, random = curves()
    saved = labels_saved(LABELS, random - 0.1, random)
    assert np.isinf(saved.saving.labels)
    assert saved.saving.bound == "or less"
    assert saved.saving.ratio.mean == labels_to_reach(LABELS, random.mean(0), random.mean(0)[-1]) / 200
    assert saved.verdict == "random"
    said = forecast_in_words({"v_opt+random": saved}, {"v_opt+random": (3.0, 4.0)}, False, 30)
    assert "does not reach within 200 labels what" in said
    assert labels_saved(LABELS, random, random).saving.bound == ""
    at_once = labels_saved(LABELS, random + 1, random)
    assert (at_once.saving.labels, at_once.saving.bound) == (50, "or more")
    said = forecast_in_words({"v_opt+random": at_once}, {"v_opt+random": (3.0, 4.0)}, False, 30)
    assert "times, or more, fewer labels than random pairs" in said


def test_where_both_have_the_value_at_once_neither_saves():
    flat = np.full(4, 0.5)
    found = saving_of_means(LABELS, LABELS, (flat, flat), (flat[None], flat[None]), 1)
    assert (found.ratio.mean, found.bound) == (1, "")


@pytest.mark.parametrize(
    ("ratio", "gain", "verdict"),
    [
        ((1.2, 3.0), (0.02, 0.04), "choose"),
        ((1.2, 3.0), (0.01, 0.04), "choose"),
        ((1.1, 3.0), (0.02, 0.04), "not known"),
        ((1.2, 3.0), (0.009, 0.04), "not known"),
        ((0.9, 1.1), (-0.01, 0.02), "random"),
        ((0.9, 3.0), (-0.01, 0.009), "random"),
        ((np.nan, np.nan), (np.nan, np.nan), "not known"),
    ],
)
def test_a_verdict_takes_the_whole_of_both_intervals(ratio, gain, verdict):
    assert made((2.0, *ratio), (0.02, *gain), 0.8).verdict == verdict


@pytest.mark.parametrize(("campaigns", "verdict"), [(2, "not known"), (4, "not known"), (5, "choose")])
def test_few_campaigns_tell_nothing(campaigns, verdict):
    """Even where they agree; by effective number, so that small weights do not count."""
    random = np.tile([0.2, 0.3, 0.35, 0.38], (campaigns + 1, 1)) + 0.001 * np.arange(campaigns + 1)[:, None]
    weights = np.array([1.0] * campaigns + [1e-6])
    assert labels_saved(LABELS, random + 0.05, random, weights).verdict == verdict


def test_one_campaign_has_no_interval():
    arm, random = curves()
    assert np.isnan(labels_saved(LABELS, arm[:1], random[:1]).saving.ratio[1:3]).all()


def test_weighted_quantiles_are_those_of_repeated_values():
    rng = np.random.default_rng(0)
    values, counts = rng.normal(size=20), rng.integers(1, 5, 20)
    repeated = np.sort(np.repeat(values, counts))
    for share in (0.1, 0.5, 0.9):
        wanted = repeated[int(np.ceil(share * len(repeated) - 1e-9)) - 1]
        assert quantiles(values, counts.astype(float), [share]) == [wanted]


def test_sentences():
    good = made((2.2, 1.8, 2.6), (0.03, 0.02, 0.04), 0.8, 200.0, 440.0)
    half = made((1.1, 1.0, 1.3), (0.015, 0.01, 0.02), 0.6, 400.0, 440.0)
    text = forecast_in_words(
        {"v_opt+random": half, "v_opt+v_opt": good}, {"v_opt+v_opt": [1.2, 3.4]}, weighed=False, campaigns=2000
    )
    assert text.startswith(
        "Expect v_opt throughout: it needs 2.2 times fewer labels than random pairs (1.8 to 2.6), 200 for what 440 "
        "teach; mean Spearman +.030, ahead in 80% of the simulated campaigns."
    )
    assert "The first batch alone gains 50% of that." in text
    assert text.endswith("hold this against `jarm compare` where you have gold rewards.")
    text = forecast_in_words({"v_opt+random": half}, {"v_opt+random": [0.9, 1.2]}, weighed=True, campaigns=2000)
    assert text.startswith("Not known from 2,000 campaigns: v_opt first, then random is expected to gain most, +.015")
    small = half._replace(gain=Interval(0.004, 0.001, 0.008, 10))
    text = forecast_in_words({"v_opt+random": small}, {"v_opt+random": [0.9, 1.2]}, weighed=True, campaigns=2000)
    assert text.startswith("Random pairs are enough on embeddings like these")
    assert arm_in_words("random+greedy_dopt") == "random first, then greedy_dopt"
