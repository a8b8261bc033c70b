import builtins
import os
import sys

import numpy as np
import pytest
from test_summary import make_records

from jarm.core.status import JarmError
from jarm.report.curves import references_of, runs_of
from jarm.report.figures import draw_curves, learning_curves, require_matplotlib, style_of

RULES = ("random", "entropy", "max_diff", "xtx", "dopt", "pa_dopt", "greedy_dopt")


def test_curves_are_drawn_twice_the_same(tmp_path):
    records = make_records(rules=RULES, gain=0.01)
    png, svg = learning_curves(records, tmp_path / "one" / "curves")
    again = learning_curves(records, tmp_path / "two" / "curves")
    assert [path.name for path in again] == ["curves.png", "curves.svg"]
    assert png.read_bytes() == again[0].read_bytes()
    assert svg.read_bytes() == again[1].read_bytes()
    theirs = tmp_path / "theirs"
    theirs.write_text("mine")
    for path in again:  # a link is replaced, not followed
        path.unlink()
        path.symlink_to(theirs)
    learning_curves(records, tmp_path / "two" / "curves")
    assert [path.read_bytes() for path in again] == [png.read_bytes(), svg.read_bytes()]
    assert theirs.read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["curves.png", "curves.svg"]
    text = svg.read_text()
    for word in (*RULES, "length", "oracle", "mean of 6 seeds", "bands: 95 % bootstrap", "labels"):
        assert word in text


@pytest.mark.parametrize("records", [[], make_records(seeds=1), make_records()[3:7], make_records(rules=("dopt",))])
def test_any_records_can_be_drawn(tmp_path, records):
    for path in learning_curves(records, tmp_path / "curves"):
        assert path.stat().st_size > 1000


def test_a_rule_of_a_file_far_away_leaves_room_for_the_axes(tmp_path):
    rule = f"{'/a/folder/of/many' * 12}/mine.py:good"
    _, svg = learning_curves(make_records(rules=("random", rule)), tmp_path / "curves")
    assert ">...of/many/a/folder/of/many/mine.py:good<" in svg.read_text()
    assert rule not in svg.read_text()


def test_curves_count_prompts_without_a_ranking_as_zero():
    from matplotlib.figure import Figure

    records = make_records()
    for record in records:
        record["spearman_share"] = 0.5
    values = [[r["spearman"] for r in records if r["rule"] == "dopt" and r["round"] == t] for t in range(5)]
    for metric, factor in (("spearman", 0.5), ("best_of_5", 3)):
        axes = Figure().subplots()
        draw_curves(axes, runs_of(records), references_of(records), metric)
        curve = next(line for line in axes.get_lines() if line.get_label() == "dopt")
        np.testing.assert_allclose(curve.get_ydata(), factor * np.mean(values, axis=1))
        if metric == "spearman":
            assert 0.15 in [line.get_ydata()[0] for line in axes.get_lines()[2:]]


def test_no_colours_are_needed_to_tell_rules_apart():
    looks = [style_of(list(RULES), rule, "random") for rule in RULES]
    assert len({(str(look["linestyle"]), look["marker"]) for look in looks}) == len(RULES)
    assert len({look["color"] for look in looks}) == len(RULES)


def test_without_matplotlib_the_cure_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(JarmError, match=r"pip install matplotlib"):
        learning_curves(make_records(), tmp_path / "curves")
    assert not np.any(list(tmp_path.iterdir()))


def test_the_backend_of_a_notebook_does_not_matter(tmp_path, monkeypatch):
    """matplotlib refuses to be imported under a backend that is not installed."""
    (tmp_path / "matplotlib.py").write_text("import os\nassert 'MPLBACKEND' not in os.environ\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "matplotlib")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    require_matplotlib()
    assert os.environ["MPLBACKEND"].startswith("module://")
