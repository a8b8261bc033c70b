"""`jarm forecast` as a user meets it: its folder, its seed, and a sentence for each mistake."""

import dataclasses
import json

import numpy as np
import pytest

from jarm import ForecastConfig, JarmError, forecast
from jarm.cli import main
from jarm.data.teachers import family, teacher_space
from jarm.runs import simulated
from jarm.studies.forecast import read_tables, summarise
from jarm.testing.tracing import count_compilations

PROMPTS, WIDTH, D = 16, 5, 6


def write_table(folder, *, width=WIDTH, split=True, prompts=PROMPTS):
    rng = np.random.default_rng(0)
    rows = [{"prompt_id": p, "response": "x" * int(rng.integers(1, 90))} for p in range(prompts) for _ in range(width)]
    if split:
        rows = [row | {"split": "test" if row["prompt_id"] >= 12 else "train"} for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    np.save(folder / "rows.npy", (rng.normal(size=(len(rows), D)) * np.geomspace(3, 1, D)).astype(np.float32))
    return {"data": str(folder / "rows.jsonl"), "embeddings": str(folder / "rows.npy")}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Ways of choosing that compile fast."""
    folder = tmp_path_factory.mktemp("forecast")
    return ForecastConfig(
        **write_table(folder),
        metric="within:1",
        firsts="random",
        rules="random,dopt",
        rounds=2,
        batch=5,
        initial=5,
        candidates=40,
        campaigns=48,
        workers=1,
        out=folder / "out",
    )


@pytest.fixture(scope="module")
def finished(small):
    return small, forecast(small)


def test_the_folder_holds_the_forecast(finished):
    config, summary = finished
    assert {path.name for path in config.out.iterdir()} - {".lock"} == {
        "config.json", "forecast.json", "forecast.md", "forecast.png", "forecast.svg",
    }  # fmt: skip
    written = json.loads((config.out / "forecast.json").read_text())
    assert written["answer"] == summary["answer"]
    assert (config.out / "forecast.md").read_text().splitlines()[2] == summary["answer"]
    assert summary["draws"] == 24
    assert summary["campaigns"] == 48
    assert summary["labels"] == [5, 10, 15]
    assert [row["budget"] for row in summary["arms"]["random+dopt"]["budgets"]] == [10, 15]
    assert sum(cell["weight"] for cell in summary["cells"]) == pytest.approx(1)
    assert summary["levels"]["noise"] == pytest.approx({"0.5": 0.25, "1.0": 0.25, "2.0": 0.25, "4.0": 0.25})
    assert all(-1 <= value <= 1 for curve in summary["spearman"].values() for value in curve)


def test_the_same_seed_is_the_same_forecast_whatever_the_workers(finished, tmp_path):
    config, summary = finished
    again = forecast(dataclasses.replace(config, out=tmp_path / "again", workers=2))
    assert {**again, "commit": None} == {**summary, "commit": None}


def test_other_settings_do_not_overwrite_a_forecast(finished):
    config, _ = finished
    before = (config.out / "forecast.json").read_bytes()
    with pytest.raises(JarmError, match=r"holds a forecast with other settings \(seed 0 there, 1 here\)"):
        forecast(dataclasses.replace(config, seed=1))
    assert (config.out / "forecast.json").read_bytes() == before


def test_files_of_others_are_not_overwritten(small, tmp_path):
    (tmp_path / "forecast.md").write_text("mine")
    with pytest.raises(JarmError, match=r"forecast\.md stands there without a config\.json and may be yours"):
        forecast(dataclasses.replace(small, out=tmp_path))
    assert (tmp_path / "forecast.md").read_text() == "mine"


@pytest.fixture(scope="module")
def parts(small):
    tables = read_tables(small)
    return tables, teacher_space(tables), {"random": small.loop("random")}


@pytest.mark.slow
def test_a_part_of_the_draws_is_part_of_the_whole_and_teachers_share_a_program(small, parts):
    tables, space, loops = parts
    teachers = family(length=True)[::23][: simulated.BLOCK + 2]
    assert len(teachers) > simulated.BLOCK
    whole = simulated.simulate(loops, small.hparams(), tables, space, teachers, workers=1)
    with count_compilations() as compiled:
        part = simulated.simulate(loops, small.hparams(), tables, space, teachers[:3], workers=1)
    assert not [name for name in compiled if "campaigns" in name]
    for arm, curves in whole.items():
        np.testing.assert_array_equal(part[arm], curves[:3])


def test_arms_share_first_labels(small, parts):
    tables, space, loops = parts
    curves = simulated.simulate(loops, small.hparams(), tables, space, family(length=True)[:2], workers=1)
    np.testing.assert_array_equal(curves["random+random"][:, 0], curves["random+dopt"][:, 0])


def made_up(parts, teachers, per_teacher=3):
    """Arguments of `summarise`: random learning curves of some draws of each teacher, and equal weights."""
    rng, draws = np.random.default_rng(0), per_teacher * len(teachers)
    base = np.array([0.2, 0.3, 0.4]) + 0.02 * rng.normal(size=(draws, 3))
    curves = {"random+random": base, "random+dopt": base + 0.05 + 0.02 * rng.normal(size=(draws, 3))}
    weights, which = np.full(len(teachers), 1 / len(teachers)), np.repeat(np.arange(len(teachers)), per_teacher)
    return parts[1], teachers, weights, which, np.ones(draws), curves


@pytest.mark.parametrize(
    ("failed", "sentence"),
    [
        ({"random+dopt": [0, 1, 2]}, r"with random\+dopt: leave it out of `--rules` or `--firsts`"),
        ({"random+dopt": [0], "random+random": [1, 2]}, r"with every way of choosing: leave it out"),
    ],
)
def test_no_whole_campaign_is_one_sentence(small, parts, failed, sentence):
    *given, curves = made_up(parts, family(length=False)[:1])
    for arm, draws in failed.items():
        curves[arm][draws, -1] = np.nan
    with pytest.raises(JarmError, match=f"No campaign ran to its end {sentence}"):
        summarise(small, *given, curves)


def test_a_draw_that_failed_with_one_way_counts_for_none(small, parts):
    space, teachers, weights, which, importance, curves = made_up(parts, family(length=False)[:2])
    alone = {arm: each[1:] for arm, each in curves.items()}
    curves["random+dopt"][0, 1] = np.nan
    found = summarise(small, space, teachers, weights, which, importance, curves)
    assert (found["failed"], found["draws"]) == (1, 6)
    assert found["arms"] == summarise(small, space, teachers, weights, which[1:], importance[1:], alone)["arms"]


def test_teachers_of_no_weight_are_no_cell_and_no_part_of_the_answer(small, parts):
    """Nor is a cell of which only such teachers were drawn."""
    low, high = (tuple(t for t in family(length=False)[:24] if t.noise == noise) for noise in (0.5, 4.0))
    space, teachers, _, which, _, curves = made_up(parts, low + high)
    weights = np.where(np.arange(len(teachers)) < len(low), 1 / len(low), 0.0)
    found = summarise(small, space, teachers, weights, which, weights[which] * len(teachers), curves)
    assert {cell["noise"] for cell in found["cells"]} == {0.5}
    assert sum(cell["weight"] for cell in found["cells"]) == pytest.approx(1)
    some = which < len(low)
    alone = summarise(
        small,
        space,
        low,
        weights[: len(low)],
        which[some],
        np.ones(some.sum()),
        {a: c[some] for a, c in curves.items()},
    )
    for name in ("ratio", "gain", "ahead", "labels", "bound"):
        assert found["arms"]["random+dopt"][name] == pytest.approx(alone["arms"]["random+dopt"][name]), name
    weights[-1] = 1e-9  # never drawn: its draws are the others'
    drawn = np.where(which == len(teachers) - 1, len(low), which)
    found = summarise(small, space, teachers, weights, drawn, np.where(some, 2.0, 0.0), curves)
    assert {cell["noise"] for cell in found["cells"]} == {0.5}


@pytest.mark.slow
def test_labels_weigh_teachers(finished, tmp_path):
    config, _ = finished
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 12, 30)[:, None] * WIDTH + np.array([rng.permutation(WIDTH)[:2] for _ in range(30)])
    lines = [{"first": int(i), "second": int(j), "label": int(i < j)} for i, j in pairs]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary = forecast(dataclasses.replace(config, labels=str(tmp_path / "labels.jsonl"), out=tmp_path / "out"))
    assert summary["labels_given"] == 30
    assert summary["levels"]["noise"]["4.0"] != pytest.approx(0.25)
    assert "weighed by 30 labels" in (tmp_path / "out" / "forecast.md").read_text()


@pytest.mark.parametrize(
    ("table", "options", "sentence"),
    [
        ({"width": 1}, {}, r"every train prompt has one response"),
        ({"prompts": 12}, {}, r"has no test prompts"),
        ({}, {"rounds": 50}, r"holds 120 pairs within prompts, fewer than the 255 labels"),
        ({}, {"labels": "missing.jsonl"}, r"missing\.jsonl does not exist"),
    ],
)
def test_bad_input_is_one_sentence(small, tmp_path, table, options, sentence):
    config = dataclasses.replace(small, **write_table(tmp_path, **table), out=tmp_path / "out", **options)
    with pytest.raises(JarmError, match=sentence):
        forecast(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"firsts": "random,best"}, r"`firsts` holds 'best': choose from random, d_opt, v_opt"),
        ({"rules": "v_opts"}, r"v_opts"),
        ({"campaigns": 0}, r"`campaigns` is 0: give at least 1"),
        ({"candidates": 10}, r"10 candidate pairs cannot fill a batch of 50"),
    ],
)
def test_options_are_checked_where_they_are_given(options, sentence):
    with pytest.raises(JarmError, match=sentence):
        ForecastConfig(**options)


def test_the_command_says_what_is_wrong(capsys):
    assert main(["forecast", "--firsts", "best"]) == 1
    assert capsys.readouterr().err == "jarm: `firsts` holds 'best': choose from random, d_opt, v_opt.\n"


@pytest.mark.slow
@pytest.mark.nightly
def test_the_default_ways_run(small, tmp_path):
    config = dataclasses.replace(small, firsts="random,v_opt", rules="random,v_opt", campaigns=64, out=tmp_path / "out")
    assert list(forecast(config)["arms"]) == ["random+v_opt", "v_opt+random", "v_opt+v_opt"]
