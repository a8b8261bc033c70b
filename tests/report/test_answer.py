import numpy as np
import pytest
from test_summary import make_records

from jarm.report.answer import answer, answer_of_sweep
from jarm.report.markdown import code, escaped, table
from jarm.report.statistics import simultaneous_ci
from jarm.report.summary import summarise, write_summary


def records(gains, seeds=6, scatter=0.01):
    """Runs of random, and of a rule for each gain in mean Spearman."""
    made = make_records(rules=("random", *gains), gain=0.0, seeds=seeds, scatter=scatter)
    return [
        line | ({"spearman": line["spearman"] + gains.get(line["rule"], 0)} if line["kind"] == "run" else {})
        for line in made
    ]


@pytest.mark.parametrize(
    ("gains", "begins", "says"),
    [
        ({"dopt": 0.05}, "Yes, choose pairs by dopt on data like these. dopt is .0", ["is where random ends after"]),
        ({"dopt": 0.02, "xtx": 0.05}, "Yes, choose pairs by xtx", [" dopt beats random too.", "comparing 2 rules"]),
        ({"a": 0.02, "b": 0.05, "c": 0.03}, "Yes, choose pairs by b", [" c and a beat random too."]),
        ({"dopt": 0.05, "xtx": -0.05}, "Yes, choose pairs by dopt", ["over 50 to 250 labels", "over 6 seeds"]),
        ({"dopt": 0.0}, "No gain shown: label pairs chosen by random here, or run more seeds.", ["may be chance."]),
        ({"dopt": 0.0, "xtx": -0.1}, "No gain shown", ["The best mean: dopt is", "xtx was worse than random."]),
        ({"dopt": -0.05}, "No, label pairs chosen by random here. The rule was worse", ["dopt is .0", "below random"]),
        ({"dopt": -0.1, "xtx": -0.05}, "No, label pairs chosen by random", ["All 2 rules were worse", "nearest: xtx"]),
        ({}, "Nothing to answer: random alone was run", ["--rules"]),
    ],
)
def test_the_first_line_answers_whether_and_which(gains, begins, says, tmp_path, capsys):
    summary = write_summary(records(gains), tmp_path)
    assert summary["answer"].startswith(begins)
    for each in says:
        assert each in summary["answer"]
    assert (tmp_path / "summary.md").read_text("utf-8").splitlines()[0] == f"**{summary['answer']}**"


@pytest.mark.parametrize(("seeds", "begins"), [(1, "Too few seeds to say: 1 of the 5"), (4, "Too few"), (5, "Yes")])
def test_few_seeds_give_no_answer(seeds, begins):
    assert summarise(records({"dopt": 0.05}, seeds=seeds))["answer"].startswith(begins)


def test_a_rule_without_a_shared_seed_gives_no_answer():
    lines = [line for line in records({"dopt": 0.05}) if line["rule"] != "random"]
    assert "no rule has a whole run beside one of random" in summarise(lines)["answer"]


def test_the_best_of_many_has_to_beat_chance_for_all_of_them():
    """A difference that holds for one rule alone does not make an answer when it is the best of twenty."""
    gain = np.array([0.03, 0.02, 0.01, 0.04, 0.0, 0.02])
    assert simultaneous_ci(gain, 1).low > 0 > simultaneous_ci(gain, 20).low

    def rows(comparisons):
        together = simultaneous_ci(gain, comparisons)._asdict()
        row = {"paired_seeds": 6, "labels": [50.0, 250.0], "area_gain_together": together}
        return {"random": {}, "dopt": row}

    assert answer(rows(1)).startswith("Yes")
    assert answer(rows(20)).startswith("No gain shown")


@pytest.mark.parametrize(
    ("settings", "seeds", "begins"),
    [
        (
            [{"a": 0.05, "b": 0.0}, {"a": 0.05, "b": -0.05}],
            6,
            "Better than random, of 2 settings: a in 2. Worse than random: b in 1.",
        ),
        (
            [{"a": 0.05, "b": 0.05}, {"a": 0.05, "b": 0.0}],
            6,
            "Better than random, of 2 settings: a in 2 and b in 1. Intervals",
        ),
        ([{"a": 0.0}], 6, "No rule is shown to beat random in any of 1 setting: label pairs chosen by random there."),
        ([{"a": 0.05}], 4, "Too few seeds to say: 4 of the 5"),
        ([{}], 6, "Nothing to answer: random alone was run; give `rules`"),
    ],
)
def test_a_sweep_says_how_often_each_rule_is_better(settings, seeds, begins):
    rows = [summarise(records(gains, seeds=seeds), settings=len(settings))["rules"] for gains in settings]
    assert answer_of_sweep(rows).startswith(begins)


def test_a_sweep_counts_settings_that_have_an_answer():
    full, few = (summarise(records({"a": 0.05}, seeds=seeds), settings=2)["rules"] for seeds in (6, 4))
    assert answer_of_sweep([full, few]).startswith(
        "Better than random, of 1 setting with 5 seeds or more (of 2): a in 1."
    )
    lost = {name: row | {"area_gain_together": None} for name, row in full.items()}
    assert answer_of_sweep([lost]).startswith("Nothing to answer: no learning curve has a height")


def test_a_sweep_allows_for_all_its_settings():
    gains = [summarise(records({"dopt": 0.01}), settings=count)["rules"]["dopt"] for count in (1, 50)]
    few, many = (row["area_gain_together"] for row in gains)
    assert few["low"] > 0 > many["low"]


def test_numbers_of_the_answer_are_those_of_the_interval():
    summary = summarise(records({"dopt": 0.05, "xtx": 0.0}))
    gain = summary["rules"]["dopt"]["area_gain_together"]
    mean, low, high = (f"{gain[name]:.3f}"[1:] for name in ("mean", "low", "high"))
    assert f"dopt is {mean} ({low} to {high}) above random in mean Spearman" in summary["answer"]


HOSTILE = "a|b\n<script>alert(1)</script> `x` [y](z) *c* _d_ \x1b[31m\\"


def test_text_of_others_is_text_in_markdown(tmp_path):
    safe = r"a\|b\\n&lt;script&gt;alert(1)&lt;/script&gt; \`x\` \[y\](z) \*c\* \_d\_ \\x1b\[31m\\"
    assert escaped(HOSTILE) == safe
    assert escaped("my_rules.py:best_rule +.031 (-.010 to .050)") == "my_rules.py:best_rule +.031 (-.010 to .050)"
    assert code("plain") == "`plain`"
    assert code("a `b`` c\n") == "``` a `b`` c\\n ```"
    assert table(["x"], [[HOSTILE]]) == ["| x |", "| --- |", f"| {safe} |"]
    lines = [
        line | {"rule": HOSTILE if line["rule"] in ("dopt", "length") else line["rule"], "device": HOSTILE}
        for line in records({"dopt": 0.05})
    ]
    lines += [{"kind": "failed", "rule": HOSTILE, "seed": 9, "message": HOSTILE}]
    write_summary(lines, tmp_path)
    text = (tmp_path / "summary.md").read_text("utf-8")
    assert text.splitlines()[0].startswith(f"**Yes, choose pairs by {safe} on data")
    assert f"- **{safe}**: beats random" in text
    assert f"1 failed: {safe}" in text
    assert f"| {safe} | .150 |" in text or f"| {safe} | .3" in text
    assert "<script>" not in "".join(line for line in text.splitlines() if not line.startswith("- device"))
    assert "\x1b" not in text
    assert len({line.count(" | ") for line in text.splitlines() if line.startswith("|")} - {0}) <= 5
