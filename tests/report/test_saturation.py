import numpy as np
import pytest
from test_summary import make_records

from jarm.report.saturation import left_in_sweep, left_to_learn, saturation
from jarm.report.summary import summarise, write_summary, write_sweep_summary

LABELS = np.array([50, 100, 150, 200, 250])
SCATTER = 0.001 * np.array([[-2], [-1], [0], [0], [1], [2]])


def runs_of(curve, scatter=SCATTER):
    """Runs of six seeds about a mean curve."""
    return {
        seed: [{"labels": n, "spearman": value} for n, value in zip(LABELS.tolist(), values, strict=True)]
        for seed, values in enumerate((np.array(curve) + scatter).tolist())
    }


def lines(ceiling, first_component):
    return {"ceiling": {"spearman": ceiling}, "first component": {"spearman": first_component}}


CASES = {
    "nothing left": (
        [0.3, 0.6, 0.6, 0.6, 0.6],
        0.604,
        0.4,
        100,
        "Nothing is left to learn after 100 labels: from there",
    ),
    "at once": ([0.6] * 5, 0.6, 0.4, 50, "Nothing is left to learn after 50 labels"),
    "above": (
        [0.61] * 5,
        0.6,
        0.4,
        50,
        "below, or above, the ceiling of a linear head (.600), and rises by less than .01 up to 250",
    ),
    "one bit": (
        [0.6] * 5,
        0.605,
        0.6,
        50,
        ", where the first component with its sign, one bit of gold (.600) is, too,",
    ),
    "late": ([0.3, 0.4, 0.5, 0.6, 0.6], 0.6, 0.4, None, "From 200 labels on random is less than .01 below the ceiling"),
    "rises above": ([0.6, 0.62, 0.64, 0.66, 0.68], 0.6, 0.4, None, "From 50 labels on random is less than .01 below"),
    "flat below": (
        [0.5] * 5,
        0.6,
        0.4,
        None,
        "Labels after the first 50 hardly teach: from there to 250 labels random",
    ),
    "dips and comes back": ([0.6, 0.5, 0.6, 0.6, 0.6], 0.6, 0.4, None, "From 150 labels on"),
    "below the first component": ([0.57] * 5, 0.57, 0.6, None, "ends .030 (.029 to .031) below the first component"),
    "rises": ([0.3, 0.4, 0.5, 0.55, 0.58], 0.6, 0.4, None, None),
    "falls": ([0.5, 0.49, 0.48, 0.47, 0.46], 0.6, 0.4, None, "Labels after the first 50 hardly teach"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_to_learn_of_made_curves(name):
    curve, ceiling, first_component, after, says = CASES[name]
    found = left_to_learn(runs_of(curve), lines(ceiling, first_component))
    assert found["after"] == after
    assert found["sentence"] is says if says is None else says in found["sentence"]


def test_what_is_not_shown_is_not_said():
    """The same mean curve, of few seeds or of seeds far apart."""
    curve = [0.6] * 5
    assert left_to_learn({seed: run for seed, run in runs_of(curve).items() if seed < 4}, lines(0.6, 0.4)) is None
    rng = np.random.default_rng(0)
    found = left_to_learn(runs_of(curve, 0.05 * rng.normal(size=(6, 5))), lines(0.6, 0.4))
    assert found["sentence"] is None
    several = saturation(LABELS, curve + 2.5 * SCATTER, 0.606, comparisons=1000)
    assert saturation(LABELS, curve + 2.5 * SCATTER, 0.606).reached == 50
    assert several.reached is None


@pytest.mark.slow
@pytest.mark.nightly
def test_a_curve_that_rises_slowly_is_seldom_called_flat():
    """By .012 over the last half: flat is wrong, and said of no more than 1 in 40 such comparisons."""
    rng, curve = np.random.default_rng(1), 0.5 + 0.012 * (LABELS - 50) / 200
    found = [saturation(LABELS, curve + 0.005 * rng.normal(size=(10, 5)), 0.6).flat for _ in range(400)]
    assert np.mean([each is not None and each <= 50 for each in found]) < 0.025


def test_folders_of_earlier_versions_have_no_ceiling():
    flat = left_to_learn(runs_of([0.5] * 5), {"oracle": {"spearman": 1.0}})
    assert flat["sentence"].endswith("random rises by less than .01 (95 % intervals over 6 seeds).")
    assert flat["reached"] is flat["below"] is None


def with_lines(records, curve, ceiling=0.6):
    """Records of a comparison with reference lines, and a curve of random without noise."""
    made = [{"kind": "reference", "rule": name, **line} for name, line in lines(ceiling, 0.4).items()]
    for record in records:
        if record.get("rule") == "random":
            record["spearman"] = curve[record["round"]]
    return made + records


def test_the_sentence_stands_below_the_answer(tmp_path):
    summary = write_summary(with_lines(make_records(), [0.6] * 5), tmp_path)
    sentence = summary["left_to_learn"]["sentence"]
    assert sentence.startswith("Nothing is left to learn after 50 labels")
    assert (tmp_path / "summary.md").read_text().splitlines()[2] == sentence
    assert "Ceiling: what all gold rewards" in (tmp_path / "summary.md").read_text()


def test_each_setting_of_a_sweep_has_its_own_ceiling(tmp_path):
    records = []
    for target, ceiling in (("a", 0.6), ("b", 0.8)):
        records += [line | {"target": target} for line in with_lines(make_records(), [0.6] * 5, ceiling)]
    settings = [{"target": "a"}, {"target": "b"}]
    summary = write_sweep_summary(records, settings, tmp_path)
    assert [each["left_to_learn"]["after"] for each in summary["settings"]] == [50, None]
    assert summary["left_to_learn"] == "Nothing is left to learn in 1 of 2 settings, after 50 labels."
    text = (tmp_path / "summary.md").read_text()
    assert summary["left_to_learn"] in text
    assert "- target `b`: Labels after the first 50 hardly teach" in text
    # A line without the axis holds for all its values.
    shared = [{name: value for name, value in line.items() if name != "target"} for line in records[:2]]
    again = write_sweep_summary([*shared, *(r for r in records if r["kind"] == "run")], settings, tmp_path)
    assert [each["left_to_learn"]["after"] for each in again["settings"]] == [50, 50]
    assert left_in_sweep([None, {"after": None}]) is None


def test_noise_free_refits_are_compared_with_the_ends_of_their_runs(tmp_path):
    records = make_records(seeds=6)
    assert "noise_free" not in summarise(records)["rules"]["dopt"]
    for record in records:
        if record["kind"] == "run" and record["round"] == 4 and record["seed"] < 5:
            record |= {"noise_free_spearman": record["spearman"] + 0.1, "noise_free_spearman_share": 1.0}
        elif record["kind"] == "run" and record["round"] == 4:
            record |= {"noise_free_spearman": None, "noise_free_spearman_share": None}  # the refit failed
    summary = write_summary(records, tmp_path)
    row = summary["rules"]["dopt"]
    assert row["noise_free"]["seeds"] == row["noise_free_gain"]["seeds"] == 5
    assert row["noise_free_gain"]["mean"] == pytest.approx(0.1)
    text = (tmp_path / "summary.md").read_text()
    assert "| dopt | " in text.partition("## With noise-free labels")[2]
    assert "| +.100 (.100 to .100) |" in text
