"""Intervals over seeds and held-out prompts at once, and the answer of a backtest that rests on them."""

import numpy as np
import pytest

from jarm.report.backtest import two_way_ci, two_way_saving, with_prompts
from jarm.report.curves import ACCURACY
from jarm.report.held_out import by_prompt, pack, pair_metrics, right_of, unpack
from jarm.report.markdown import comparison_text
from jarm.report.statistics import label_saving, simultaneous_ci
from jarm.report.summary import plain_tree, summarise

T, LABELS = 4, (50, 100, 150, 200)


def test_the_interval_is_the_formula_in_plain_loops():
    rng = np.random.default_rng(0)
    values, counts = rng.normal(size=(6, 9)), rng.integers(1, 5, 9)
    found = two_way_ci(values, counts, 3)
    of_seed = [sum(values[s, p] * counts[p] for p in range(9)) / counts.sum() for s in range(6)]
    mean = sum(of_seed) / 6
    seeds = sum((each - mean) ** 2 for each in of_seed) / 5 / 6
    of_prompt = [counts[p] * (sum(values[s, p] for s in range(6)) / 6 - mean) for p in range(9)]
    prompts = sum(each**2 for each in of_prompt) * 9 / 8 / counts.sum() ** 2
    assert found.mean == pytest.approx(mean)
    # Student's upper quantile at 1 - .05 / 6 with 5 degrees of freedom, from a table: 3.534.
    assert found.high - mean == pytest.approx(3.534 * np.sqrt(seeds + prompts), rel=1e-3)
    assert found.low + found.high == pytest.approx(2 * mean)


@pytest.mark.parametrize(("of_seeds", "of_prompts"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.3)])
def test_the_interval_covers_whatever_varies(of_seeds, of_prompts):
    rng, counts, covered = np.random.default_rng(1), np.ones(40, int), 0
    for _ in range(400):
        values = of_seeds * rng.normal(size=(20, 1)) + of_prompts * rng.normal(size=40) + rng.normal(size=(20, 40))
        found = two_way_ci(values, counts)
        covered += found.low <= 0 <= found.high
    assert covered / 400 >= 0.93


def test_without_two_seeds_or_prompts_there_is_no_interval():
    for shape in ((1, 5), (5, 1)):
        found = two_way_ci(np.ones(shape), np.ones(shape[1], int))
        assert found.mean == 1
        assert np.isnan([found.low, found.high]).all()


def test_the_saving_of_many_like_prompts_is_that_of_seeds_alone():
    rng = np.random.default_rng(2)
    base = np.linspace(0.5, 0.8, T) + 0.01 * rng.normal(size=(12, T))
    rule = np.minimum(0.8, np.linspace(0.6, 0.9, T)) + 0.01 * rng.normal(size=(12, T))
    labels = np.array(LABELS, float)
    found = two_way_saving(labels, rule[:, :, None] + np.zeros(30), base[:, :, None] + np.zeros(30), np.ones(30, int))
    alone = label_saving(labels, rule, labels, base)
    assert (found.labels, found.baseline_labels) == pytest.approx((alone.labels, alone.baseline_labels))
    assert found.ratio == pytest.approx(alone.ratio, rel=0.05)


def test_accuracy_by_prompt_adds_up_to_accuracy():
    rng = np.random.default_rng(3)
    margins, labels = rng.normal(size=(2, 50)), rng.choice([0.0, 0.25, 0.5, 1.0], 50)
    margins[0, :5] = 0
    shares, counts = by_prompt(right_of(margins, labels), labels, rng.integers(0, 8, 50))
    packed = np.stack([unpack(pack(each)) for each in shares])
    np.testing.assert_allclose(packed @ counts / counts.sum(), pair_metrics(margins, labels)[ACCURACY], atol=5e-4)
    assert counts.sum() == (labels != 0.5).sum()


def test_no_pair_with_a_majority_has_no_accuracy():
    assert np.isnan(pair_metrics(np.ones((1, 3)), np.full(3, 0.5))[ACCURACY]).all()


def records(gain, spread, seeds=12, prompts=40):
    """Runs of random and of a rule that is better by `gain`, and by `spread` more or less on each prompt, for all."""
    rng, found = np.random.default_rng(4), []
    own = spread * rng.normal(size=prompts)
    for rule in ("random", "dopt"):
        for seed in range(seeds):
            noise = 0.01 * rng.normal()
            for t, labels in enumerate(LABELS):
                right = 0.55 + 0.05 * t + noise + (gain + own if rule == "dopt" else np.zeros(prompts))
                line = {"kind": "run", "rule": rule, "seed": seed, "round": t, "labels": labels}
                found.append({**line, ACCURACY: right.mean(), "nll": 0.6, "right_by_prompt": pack(right)})
    return found


@pytest.mark.parametrize(
    ("gain", "spread", "begins"),
    [
        (0.05, 0.01, "Yes, choose pairs by dopt on data like these. dopt is .05"),
        (0.02, 0.2, "No gain shown: label pairs chosen by random here, or judge by more pairs."),
        (-0.05, 0.01, "No, label pairs chosen by random here."),
    ],
)
def test_a_gain_that_hangs_on_a_few_prompts_is_not_shown(gain, spread, begins):
    lines = records(gain, spread)
    alone = summarise(lines, metric=ACCURACY)
    found = plain_tree(with_prompts(alone, lines, np.ones(40, int), "right_by_prompt"))
    assert found["answer"].startswith(begins)
    assert "in mean accuracy over 50 to 200 labels, a 95 % interval over 12 seeds and 40 held-out" in found["answer"]
    row = found["rules"]["dopt"]
    wide = row["area_gain_together"]["high"] - row["area_gain_together"]["low"]
    assert (
        wide
        > alone["rules"]["dopt"]["area_gain_together"]["high"] - alone["rules"]["dopt"]["area_gain_together"]["low"]
    )
    text = comparison_text(found)
    assert "Intervals take in the choice of held-out prompts" in text
    assert "seeds to see" not in text
    assert "label seeds only" not in text
    if gain == 0.05:
        assert "labels needed" not in row["verdict"]
        assert row["verdict"].startswith("beats random by .05")
        assert 100 < row["saving"]["labels"] < 200


def test_few_seeds_have_no_interval():
    lines = records(0.05, 0.01, seeds=4)
    found = plain_tree(with_prompts(summarise(lines, metric=ACCURACY), lines, np.ones(40, int), "right_by_prompt"))
    row = found["rules"]["dopt"]
    assert "; 4 are too few seeds for an interval, run at least 5" in row["verdict"]
    for gain in (row["area_gain_together"], row["final"], row["area_gain"], row["saving"]["ratio"]):
        assert (gain["low"], gain["high"]) == (None, None)
    assert found["answer"].startswith("Too few seeds to say: 4 of the 5")
    assert comparison_text(found)


@pytest.mark.parametrize("chance", [True, False])
def test_the_answer_says_what_the_baseline_teaches_beside_the_longer_response(chance):
    shift = -0.2 if chance else 0.1  # of an accuracy of .7
    lines = [line | {"right_by_prompt": pack(unpack(line["right_by_prompt"]) + shift)} for line in records(0, 0.01)]
    lines.append({"kind": "reference", "rule": "longer response", ACCURACY: 0.6})
    found = with_prompts(summarise(lines, metric=ACCURACY), lines, np.ones(40, int), "right_by_prompt")["answer"]
    assert "After 200 labels random is right in ." in found
    assert f"of held-out pairs{', which may be chance' * chance}; the longer response is right in .600." in found
    assert ("nothing can be shown to save labels" in found) == chance


def test_intervals_allow_for_the_number_of_rules():
    values = np.random.default_rng(5).normal(size=(20, 1)) + np.zeros(30)
    one, six = (two_way_ci(values, np.ones(30, int), n) for n in (1, 6))
    assert six.high - six.low > one.high - one.low
    assert one == pytest.approx(simultaneous_ci(values[:, 0], 1))
