import json

import numpy as np
import pytest

from jarm.report.curves import by_rule
from jarm.report.summary import summarise, write_summary

LABELS = (50, 100, 150, 200, 250)


def make_records(rules=("random", "dopt"), seeds=6, gain=0.05, scatter=0.01):
    records = [
        {"kind": "reference", "rule": "oracle", "spearman": 1.0, "best_of_5": 2.0, "pair_accuracy": 1.0, "nll": 0.3},
        {"kind": "reference", "rule": "mean response", "spearman": None, "best_of_5": 0.0, "pair_accuracy": 0.5},
        {"kind": "reference", "rule": "length", "spearman": 0.3, "best_of_5": 0.4, "pair_accuracy": 0.6},
    ]
    for r, rule in enumerate(rules):
        for seed in range(seeds):
            rng = np.random.default_rng([seed, r])
            for t, labels in enumerate(LABELS):
                height = 0.1 * np.log(labels) + gain * r + 0.02 * np.sin(seed) + scatter * rng.normal()
                records.append(
                    {
                        "kind": "run",
                        "rule": rule,
                        "seed": seed,
                        "round": t,
                        "labels": labels,
                        "label_error": 0.2,
                        "spearman": height,
                        "best_of_5": 3 * height,
                        "best_of_900": None,
                        "batch_diversity_log_det": 7.0 if t else None,
                        "seconds": 0.1,
                        "device": "cpu",
                        "versions": {"jarm": "0"},
                    }
                )
    return records


def test_a_summary_says_who_wins_and_by_how_much():
    summary = summarise(make_records())
    row = summary["rules"]["dopt"]
    assert summary["rules"]["random"]["verdict"] == "the baseline"
    assert row["verdict"].startswith("beats random by .0")
    assert "times fewer labels" in row["verdict"]
    assert row["area_gain"]["low"] < 0.05 < row["area_gain"]["high"]
    assert row["paired_seeds"] == row["seeds"] == 6
    assert summary["best_of"] == "best_of_5"
    assert row["final_best_of_gain"]["mean"] == pytest.approx(3 * row["final_gain"]["mean"])
    assert row["batch_diversity_log_det"] == 7
    assert summary["rules"]["random"]["saving"]["ratio"]["mean"] == 1
    assert summary["reference"]["length"]["spearman"] == 0.3
    assert summary["provenance"]["device"] == ["cpu"]


@pytest.mark.parametrize(
    ("commits", "shown"), [((None,), []), (("abc",), ["abc"]), (("abc", None), ["abc", "unknown"])]
)
def test_runs_of_a_commit_that_is_not_known_are_not_given_to_another(commits, shown):
    records = [record | {"commit": commits[i % len(commits)]} for i, record in enumerate(make_records())]
    assert summarise(records)["provenance"]["commit"] == shown


def test_rules_are_in_the_order_asked_for_whenever_they_ran():
    records = make_records()[::-1]
    for order in (["random", "dopt"], ["dopt", "random"]):
        ran = [line for line in records if line["rule"] in order]
        assert list(summarise(by_rule(ran, order))["rules"]) == order
    assert by_rule(records, ["random", "dopt"])[0]["kind"] == "reference"


def test_only_whole_runs_of_shared_seeds_are_paired():
    lost = {("dopt", 2, 4), *(("random", 0, t) for t in range(5))}
    records = [
        record for record in make_records() if (record["rule"], record.get("seed"), record.get("round")) not in lost
    ]
    row = summarise(records)["rules"]["dopt"]
    assert (row["seeds"], row["paired_seeds"], row["unfinished_seeds"]) == (5, 4, 1)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (make_records(seeds=1), "on one seed"),
        (make_records(rules=("entropy", "dopt")), "nothing to compare"),
        (make_records(gain=-0.05), "worse than random"),
        (make_records(gain=0.0, scatter=0.05), "no gain shown"),
        (make_records()[:10], "1 unfinished left out"),
        ([], None),
    ],
)
def test_every_set_of_records_is_summed_up(tmp_path, records, said):
    (tmp_path / "config.json").write_text(json.dumps({"pairs": "within", "train": {"name": "synthetic"}}))
    summary = write_summary(records, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    text = (tmp_path / "summary.md").read_text()
    assert "pairs: `within`" in text
    if said:
        assert said in text


def test_a_model_that_ranks_all_alike_counts_as_zero():
    records = make_records(seeds=2)
    for record in records:
        if record["rule"] == "dopt":
            record["spearman"] = None
    row = summarise(records)["rules"]["dopt"]
    assert row["area"]["mean"] == 0
    assert row["least_spearman_share"] == 1
    assert "does not reach random's final value within 250 labels" in row["verdict"]


def test_prompts_that_a_model_cannot_rank_count_as_zero(tmp_path):
    records = make_records(gain=0.2)
    full = summarise(records)["rules"]["dopt"]
    assert full["verdict"].startswith("beats random")
    for record in records:
        if record["rule"] == "dopt":
            record["spearman_share"] = 0.1 if record["round"] else 1.0
        if record["rule"] == "length":
            record["spearman_share"] = 0.5
    summary = write_summary(records, tmp_path)
    row, text = summary["rules"]["dopt"], (tmp_path / "summary.md").read_text()
    assert row["verdict"].startswith("worse than random")
    assert row["final"]["mean"] == pytest.approx(0.1 * full["final"]["mean"])
    assert row["spearman"] == pytest.approx([full["spearman"][0], *(0.1 * value for value in full["spearman"][1:])])
    assert "[ranks only 10% of the test prompts in some round, the others count as Spearman 0]" in text
    assert text.count("ranks only") == 1
    assert "of a test prompt undefined (predictions all equal, or not a number), it counts as 0" in text
    assert "| length | .150 |" in text
    assert summary["reference"]["length"]["spearman"] == 0.3


def test_the_table_shows_how_sure_the_labels_are(tmp_path):
    records = make_records(rules=("random", "slower", "faster"), gain=0.0)
    for record in records:
        if record["kind"] == "run" and record["rule"] != "random":
            record["spearman"] += 0.08 if record["rule"] == "faster" else -0.03
    rows = write_summary(records, tmp_path)["rules"]
    text = (tmp_path / "summary.md").read_text()
    low, high = (rows["faster"]["saving"]["ratio"][end] for end in ("low", "high"))
    assert low > 1
    cell = f"{rows['faster']['saving']['labels']:.0f} ({low:.1f} to {high:.1f} times fewer)"
    assert cell in next(line for line in text.splitlines() if line.startswith("| faster |"))
    assert rows["random"]["labels_needed"] == f"{rows['random']['saving']['labels']:.0f}"
    assert rows["slower"]["labels_needed"] == "not within 250"
    assert "Intervals are over label seeds only" in text


@pytest.mark.parametrize(
    ("left", "said"), [(0, None), (1, "leaves out 1 test prompt,"), (3, "leaves out 3 test prompts,")]
)
def test_a_best_of_value_says_what_it_leaves_out(tmp_path, left, said):
    records = [{**record, "best_of_5_undefined": left, "best_of_900_undefined": 50} for record in make_records()]
    summary = write_summary(records, tmp_path)
    assert summary["best_of_left_out"] == left
    text = (tmp_path / "summary.md").read_text()
    assert ("leaves out" in text) == bool(said)
    if said:
        assert f"The best of 5 {said}" in text
