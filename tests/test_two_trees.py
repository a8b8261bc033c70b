"""The benchmark of two checkouts: it finds what it measures in this one, and judges times as it says."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import two_trees

ROOT = pathlib.Path(__file__).parents[1]


def repeats(before, after, picks="1f"):
    def side(seconds, picks):
        measured = {"cpu_s": seconds, "wall_s": seconds, "compile_s": 2.0, "outcome": {"picks": picks, "nll": 0.5}}
        return {"measures": {"one pass": measured}, "versions": {}, "device": "cpu", "commit": "abc"}

    return [{"before": side(b, "1f"), "after": side(a, picks)} for b, a in zip(before, after, strict=True)]


def verdict_of(before, after):
    return two_trees.line("one pass", before, after, True).split(" | ")[-2]


def test_finds_every_name_in_this_checkout():
    for names in two_trees.PLACES.values():
        for name in names.split():
            assert two_trees.api(name).__class__.__name__ != "module", name


def test_slower_means_beyond_the_noise_of_both_sides_in_every_repeat():
    assert verdict_of([1.0, 1.02, 1.04], [1.1, 1.12, 1.14]) == "slower"
    assert verdict_of([1.1, 1.12, 1.14], [1.0, 1.02, 1.04]) == "faster"
    assert verdict_of([1.0, 1.02, 1.2], [1.1, 1.12, 1.3]) == "within noise"  # before is 1.2 times itself
    assert verdict_of([1.0, 1.02, 1.04], [1.1, 1.12, 1.03]) == "within noise"  # one repeat was no slower
    assert verdict_of([1.0, 1.0], [2.0, 2.0]) == "too few repeats"


def test_same_results_are_equal_picks_and_close_losses():
    one = {"picks": "1f", "nll": 0.5}
    assert two_trees.same([one, {"picks": "1f", "nll": 0.500001}])
    assert not two_trees.same([one, {"picks": "1f", "nll": 0.5001}])
    assert not two_trees.same([one, {"picks": "2f", "nll": 0.5}])


def test_rows_and_table():
    rows = two_trees.rows_of("one pass", repeats([1.0, 2.0, 4.0], [1.5, 2.0, 8.0], picks="2f"), two_trees.TINY)
    assert [(row["side"], row["cpu_s"], row["compile_s"]) for row in rows] == [("before", 2, 2), ("after", 2, 2)]
    assert [rows[1][f"ratio_{which}"] for which in ("low", "median", "high")] == [1.0, 1.5, 2.0]
    lines = two_trees.table(rows).splitlines()[2:]
    assert lines[0].startswith("| one pass | 2000 | 2000 | 1.500 (1.000 to 2.000) | 4.000 | 5.333 |")
    assert lines[1].startswith("| one pass: compiling | 2000 | 2000 | 1.000 (1.000 to 1.000)")
    assert all(line.endswith("| NO |") for line in lines)


@pytest.mark.slow
@pytest.mark.nightly
def test_every_part_works_on_this_checkout():
    for part in two_trees.PARTS:
        found = two_trees.start_child(part, ROOT, tiny=True)
        for name in found["measures"]:
            rows = two_trees.rows_of(name, [{"before": found, "after": found}], two_trees.TINY)
            assert rows[0]["cpu_s"] > 0
            assert "| 1.000 (1.000 to 1.000) |" in two_trees.table(rows)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_command_writes_rows(tmp_path):
    command = [sys.executable, "-m", "benchmarks.two_trees", "--before", ".", "--tiny", "--repeats", "1"]
    subprocess.run([*command, "--parts", "pass", "--out", tmp_path / "rows.jsonl"], cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["side"] for row in rows] == ["before", "after"]
    assert rows[1]["outcome"]["same"]
