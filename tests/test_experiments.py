"""The reproduction suite: its arithmetic and its report on made-up runs; studies themselves at their small size."""

import json
import pathlib
import xml.etree.ElementTree as ElementTree

import label_noise
import numpy as np
import planted
import pytest
import reproduce_all
import run_time
import suite
import three_wells
from hypothesis import given
from hypothesis import strategies as st

from jarm import CompareConfig, JarmError
from jarm.runs.config import PAPER
from jarm.runs.grid import expand
from jarm.runs.progress import sweep_status
from jarm.runs.records import provenance

SWEPT = [study for study in reproduce_all.STUDIES if study.letter not in "efg"]
BATCH = [
    "diversity_log_det",
    "diversity_distance",
    "distinct_responses",
    "distinct_prompts",
    "mean_fisher_weight",
    "mean_member_variance",
    "mean_gold_gap",
]
GAINS = {"dopt": 0.03, "pa_dopt": 0.03, "greedy_dopt": 0.05, "entropy": -0.04}


def made_up(config):
    """What `sweep` would write, with the gains above and little noise."""
    rng, lines = np.random.default_rng(0), []
    for setting in expand(config):
        for rule in config.base.rule_names():
            for seed in range(config.base.seeds):
                for t in range(setting.config.rounds + 1):
                    labels = setting.config.initial + t * setting.config.batch
                    value = 0.3 + labels / 10_000 + (t > 0) * GAINS.get(rule, 0.0) + 0.002 * rng.normal() + 0.01 * seed
                    batch = {f"batch_{name}": value + 10 * GAINS.get(rule, 0) if t else None for name in BATCH}
                    line = {"kind": "run", **setting.axes, "rule": rule, "seed": seed, "round": t, "labels": labels}
                    measured = {
                        "spearman": value,
                        "spearman_share": 1.0,
                        "best_of_5": 2 * value,
                        "best_of_20": 3 * value,
                    }
                    lines.append({**line, "label_error": 0.03, **measured, **batch, **provenance()})
        place = {axis: value for axis, value in setting.axes.items() if axis == "target"}
        lines.append({"kind": "reference", "rule": "length", **place, "spearman": 0.2, "best_of_20": 0.5})
    config.base.out.mkdir(parents=True, exist_ok=True)
    (config.base.out / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def without_runs(monkeypatch):
    """Runs are made up; nothing is compiled."""
    monkeypatch.setattr(suite, "sweep", made_up)

    def picked(seeds, points, batch, initial):
        rng, lines = np.random.default_rng(0), []
        for seed in range(seeds):
            for rule in reproduce_all.strategies.RULES.split(","):
                measured = {f"batch_{name}": float(rng.uniform(1, 2)) for name in BATCH}
                pairs = rng.integers(0, points, (batch, 2)).tolist()
                lines.append(
                    {"kind": "picked", "rule": rule, "seed": seed, "points": points, "pairs": pairs, **measured}
                )
        return lines

    def bench(config):
        times = ("cpu_s", "cpu_low_s", "cpu_high_s")
        return [
            {"rule": rule, "candidates": count, **dict.fromkeys(times, 1e-6 * count), "temp_bytes": 1000 * count}
            | {"compile_s": 1.0, "log_det": 5.0, **provenance()}
            for count in config.counts()
            for rule in config.rule_names()
        ]

    monkeypatch.setattr(three_wells, "_picked", picked)
    monkeypatch.setattr(run_time, "bench", bench)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_report_has_every_study_and_needs_nothing_else(without_runs, tmp_path):
    config = reproduce_all.Config(size="small", seeds=6, targets="one,two", data="made_up.parquet", out=tmp_path)
    found = reproduce_all.run_all(config)
    assert [failure for *_, failure in found] == [""] * 10
    page = ElementTree.fromstring((tmp_path / "report.html").read_text())
    assert [section.get("id") for section in page.iter("section")] == [study.name for study in reproduce_all.STUDIES]
    sources = [image.get("src") for image in page.iter("img")]
    assert len(sources) == 10
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not list(page.iter("script")) + list(page.iter("link"))
    text = (tmp_path / "report.md").read_text()
    for study, outcome, _ in found:
        assert study.said("Claim")
        assert f"python experiments/{study.name}.py" in study.said("Command")
        assert study.said("Time")
        assert study.said("Expected")
        assert {reading.verdict for reading in outcome.readings} <= {suite.HOLDS, suite.FAILS, suite.OPEN}
        assert all(len(row) == len(outcome.rows[0]) for row in outcome.rows)
        assert all(reading.claim in text for reading in outcome.readings)
        assert all("| " + " | ".join(row) + " |" in text for row in outcome.rows)
        for kind in ("svg", "png"):
            assert suite.figure_stem(config, study).with_suffix(f".{kind}").stat().st_size > 5000
    verdicts = {study.letter: [reading.verdict for reading in outcome.readings] for study, outcome, _ in found}
    assert verdicts["a"][2:] == [suite.HOLDS] * 2  # random leads entropy, greedy the released rule
    assert verdicts["c"][:2] == [suite.HOLDS] * 2
    assert verdicts["d"] == [suite.HOLDS] * 3
    assert verdicts["j"] == [suite.HOLDS, suite.FAILS, suite.HOLDS, suite.HOLDS, suite.HOLDS]
    assert verdicts["g"][2] == suite.HOLDS
    assert verdicts["f"] == [suite.HOLDS] * 2


def test_panels_are_named_by_what_tells_their_files_apart():
    assert suite.short_names(["/x/alpaca_minilm_mean.npy", "y/alpaca_gemma_mean.npy"]) == ["minilm", "gemma"]
    assert suite.short_names(["a_b.npy", "a_b_c.npy"]) == ["a_b", "a_b_c"]
    assert suite.short_names(["only.npy"]) == ["only"]
    assert suite.short_names(["stores/gemma-2.5", "stores/gemma-2.0"]) == ["gemma-2.5", "gemma-2.0"]
    assert suite.short_names(["one/x.npy", "two/x.npy"]) == ["one/x.npy", "two/x.npy"]


def test_what_decides_against_a_claim_is_named_first():
    seeds = np.linspace(-0.01, 0.01, 8)
    wide = {f"wide {at}": 100 * seeds - 0.5 for at in range(5)}  # lower on average, but not shown to be
    reading = suite.decide("all above 0", {**wide, "lower": seeds - 0.1})
    assert reading.verdict == suite.FAILS
    assert reading.why.startswith("lower -.100")


def test_a_study_that_fails_does_not_stop_the_others(without_runs, tmp_path, monkeypatch, capsys):
    def failing(config):
        raise JarmError("The wells are dry <today>.")

    study = reproduce_all.dataclasses.replace(three_wells.STUDY, records=failing)
    monkeypatch.setattr(reproduce_all, "STUDIES", (study, label_noise.STUDY))
    monkeypatch.setattr(reproduce_all, "keep_compiled", lambda: None)
    assert reproduce_all.main(reproduce_all.Config(size="small", out=tmp_path)) == 1
    page = ElementTree.fromstring((tmp_path / "report.html").read_text())
    assert "Failed: The wells are dry <today>." in ["".join(p.itertext()) for p in page.iter("p")]
    assert len(list(page.iter("img"))) == 1
    assert "| e | `three_wells.py` | | failed |" in (tmp_path / "report.md").read_text()
    with pytest.raises(JarmError, match="no study 'x'"):
        reproduce_all.Config(only="e,x").studies()


def test_a_command_names_files_and_not_folders(tmp_path):
    config = suite.Config(data="/some/where/a.parquet", embeddings="/x/b.npy,/y/c.npy", targets="gold", seeds=3)
    words = "python experiments/pairs.py --data a.parquet --embeddings b.npy,c.npy --targets gold --seeds 3"
    assert suite.command(config, "pairs") == words
    swept = suite.sweep_of(config, "pairs", 9, {"pairs": ["within"]}, rules="random")
    assert list(swept.grid) == ["embeddings", "pairs"]
    assert swept.base.target == "gold"
    assert swept.base.seeds == 3


def test_the_published_protocol_is_that_of_the_paper():
    base = suite.sweep_of(suite.Config(size="published"), "pairs", 9).base
    assert (base.prompts, base.head, base.steps, base.learning_rate) == (500, "mlp:512,512,512", 1000, 1e-3)
    assert base.loop().budget <= 40_000 * 45
    assert suite.sweep_of(suite.Config(), "pairs", 9).base == CompareConfig(
        **PAPER, seeds=9, out=pathlib.Path("out/suite/pairs")
    )


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=4),
    st.integers(0, 12),
    st.integers(0, 100),
)
def test_a_verdict_has_its_reasons(means, seeds, number):
    rng = np.random.default_rng(number)
    values = {f"case {at}": mean + 0.3 * rng.normal(size=seeds) for at, mean in enumerate(means)}
    reading = suite.decide("It is so", values)
    if seeds < suite.SEEDS:
        assert reading.verdict == suite.OPEN
    elif reading.verdict == suite.HOLDS:
        assert all(each.mean() > 0 for each in values.values())
    elif reading.verdict == suite.FAILS:
        assert any(each.mean() < 0 for each in values.values())


@pytest.mark.slow
@pytest.mark.nightly
def test_chance_alone_seldom_decides():
    rng = np.random.default_rng(0)
    readings = [suite.decide("", {str(i): rng.normal(size=12) for i in range(6)}).verdict for _ in range(100)]
    assert readings.count(suite.FAILS) <= 8
    assert readings.count(suite.HOLDS) == 0
    assert suite.decide("", {}).verdict == suite.OPEN


def write_published(folder):
    """Eight prompts of five responses, and four of six, in the published layout."""
    rng = np.random.default_rng(0)
    for split, shape in (("train", (8, 5, 6)), ("test", (4, 6, 6))):
        embeddings = rng.normal(size=shape).astype(np.float32)
        np.save(folder / f"embd_gemma2b_gemma2b_harmless_{split}.npy", embeddings)
        np.save(folder / f"reward_gemma2b_gemma2b_harmless_{split}.npy", embeddings[..., :1] + embeddings[..., 1:2])


@pytest.mark.slow
@pytest.mark.nightly
def test_published_arrays_are_studied(tmp_path):
    folder = tmp_path / "arrays"
    folder.mkdir()
    write_published(folder)
    config = suite.Config(data=str(folder), task="harmless", size="small", out=tmp_path / "out")
    outcome = suite.examine(label_noise.STUDY, config)
    assert len(outcome.rows) == 1 + len(label_noise.NOISES) * 3
    assert not outcome.failures
    status = sweep_status(config.out / "label_noise")
    assert status["done"] == status["runs"] == len(label_noise.NOISES) * 3 * 2


@pytest.mark.parametrize(
    ("leads", "verdict"),
    [
        ((0.02, 0.021, 0.018), suite.HOLDS),
        ((0.02, 0.08, 0.02), suite.FAILS),
        ((0.02, 0.028, 0.013), suite.FAILS),  # not from the first, but from the second to the last
        ((0.02, 0.02, None), suite.OPEN),  # a rule of which no run is whole
    ],
)
def test_a_lead_is_steady_between_any_two_values(leads, verdict):
    rng = np.random.default_rng(0)
    scores = {}
    for value, lead in enumerate(leads):
        base = {seed: float(rng.normal(0.5, 0.1)) for seed in range(12)}
        scores["", value, "random"] = base
        if lead is not None:
            noise = rng.normal(0, 0.003, 12)
            scores["", value, "dopt"] = {seed: base[seed] + lead + float(noise[seed]) for seed in base}
    assert suite.steady("A claim", scores, "value").verdict == verdict
    few = {place: dict(list(own.items())[:3]) for place, own in scores.items()}
    assert suite.steady("A claim", few, "value").verdict == suite.OPEN


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """All studies on the built-in data."""
    config = reproduce_all.Config(size="small", out=tmp_path_factory.mktemp("suite"))
    return config, reproduce_all.run_all(config)


@pytest.mark.nightly
@pytest.mark.slow
def test_every_study_runs_and_its_records_are_whole(small):
    config, found = small
    assert [failure for *_, failure in found] == [""] * 10
    for study, outcome, _ in found:
        assert not outcome.failures
        assert outcome.provenance["device"]
        assert len(outcome.rows) > 2
        for path in (config.out / study.name).rglob("progress.json"):
            status = sweep_status(path.parent)
            assert status["runs"] == status["done"] > 0
    assert len(list(config.out.rglob("progress.json"))) == len(SWEPT) + 1  # priors and warm starts are two
    ElementTree.fromstring((config.out / "report.html").read_text())


@pytest.mark.nightly
@pytest.mark.slow
def test_what_is_done_is_not_done_again(small):
    config, found = small
    files = {path: path.read_bytes() for path in config.out.rglob("record*.json*")}
    again = reproduce_all.run_all(config)
    assert {path: path.read_bytes() for path in files} == files
    assert [outcome for _, outcome, _ in again] == [outcome for _, outcome, _ in found]


@pytest.mark.parametrize("directions", [1, 3])
def test_a_planted_reward_is_the_scores_of_its_directions(directions):
    """In equal parts: its loadings on standardised scores, by least squares, are +-1 / sqrt(K), and nothing is left."""
    rng = np.random.default_rng(0)
    prompts, train = np.repeat(np.arange(20), 5), np.arange(100) < 75
    features = rng.normal(size=(100, 6)) * np.geomspace(4, 1, 6) + 9 * rng.normal(size=(20, 6))[prompts]
    gold = planted.planted(features, prompts, train, directions)
    within = np.concatenate([rows - rows.mean(axis=0) for rows in np.split(features, 20)])
    scores = within @ np.linalg.eigh(within[train].T @ within[train])[1][:, ::-1][:, :directions]
    loadings, left, *_ = np.linalg.lstsq(scores / scores[train].std(axis=0), gold, rcond=None)
    np.testing.assert_allclose(np.abs(loadings), directions**-0.5)
    np.testing.assert_allclose(left, 0, atol=1e-20)
