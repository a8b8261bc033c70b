"""`jarm compare` as a user meets it: a folder of results, resumed after a kill, and a sentence for each mistake."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from marks import nightly

from jarm import CompareConfig, JarmError, Status, compare
from jarm.cli import main
from jarm.core.files import claim
from jarm.runs import programs
from jarm.runs.config import PAPER
from jarm.runs.driver import settings_of
from jarm.runs.grid import Setting
from jarm.runs.jobs import read_jobs
from jarm.runs.records import read_records

OWN = {**PAPER, "rules": "greedy_dopt", "head": "mlp:8"}
SMALL = CompareConfig(**OWN, rounds=2, batch=5, initial=10, seeds=2, candidates=200, steps=20, members=1)
ARGS = ["compare", *"--rounds 2 --batch 5 --initial 10 --seeds 2 --candidates 200 --steps 20 --members 1".split()]  # noqa: SIM905
ARGS += [f"--{name}={value}" for name, value in OWN.items()]
TIMES = ("seconds",)


def lines(folder):
    return read_records(folder)


def in_order(folder):
    """Records but for what they took and the commit, which may move on meanwhile, by rule, seed, setting and round."""
    kept = [{name: value for name, value in line.items() if name not in (*TIMES, "commit")} for line in lines(folder)]
    options = [field.name for field in dataclasses.fields(CompareConfig)]

    def place(line):
        setting = [str(line.get(option)) for option in options]
        return line["kind"], line["rule"], line.get("seed", 0), setting, line.get("round", 0)

    return sorted(kept, key=place)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole comparison, made once."""
    out = tmp_path_factory.mktemp("compare") / "whole"
    return out, compare(dataclasses.replace(SMALL, out=out))


def test_folder_holds_what_is_promised(finished):
    out, summary = finished
    runs = [line for line in lines(out) if line["kind"] == "run"]
    assert sorted((r["rule"], r["seed"], r["round"]) for r in runs if r["seed"] == 0) == [
        (rule, 0, t) for rule in ("greedy_dopt", "random") for t in range(3)
    ]
    assert [r["labels"] for r in runs[:3]] == [10, 15, 20]
    promised = {"spearman", "best_of_20", "pair_accuracy", "nll", "calibration_error", "label_error", "device"}
    promised |= {"batch_diversity_log_det", "batch_distinct_prompts", "batch_mean_fisher_weight", "batch_mean_gold_gap"}
    promised |= {*TIMES, "versions", "commit", "config"}
    assert promised <= runs[-1].keys()
    assert runs[0]["batch_mean_gold_gap"] is None
    assert runs[1]["batch_mean_gold_gap"] > 0
    assert {line["rule"] for line in lines(out) if line["kind"] == "reference"} >= {"oracle", "length", "mean response"}
    assert summary["rules"].keys() == {"random", "greedy_dopt"}
    assert json.loads((out / "summary.json").read_text())["rules"]["greedy_dopt"]["verdict"]
    for name in ("summary.md", "curves.png", "curves.svg"):
        assert (out / name).stat().st_size > 1000


def test_rules_share_a_seed(finished):
    """The first labels, and so the first fit, belong to the seed and not to the rule."""
    out, _ = finished
    start = {(r["rule"], r["seed"]): r["spearman"] for r in lines(out) if r["kind"] == "run" and r["round"] == 0}
    assert start["random", 0] == start["greedy_dopt", 0] != start["random", 1]


def test_cut_short_anywhere_goes_on_to_the_same_records(finished, tmp_path):
    out, _ = finished
    whole = (out / "records.jsonl").read_bytes()
    for cut in (len(whole) * 2 // 3,):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "config.json").write_bytes((out / "config.json").read_bytes())
        (folder / "records.jsonl").write_bytes(whole[:cut])
        compare(dataclasses.replace(SMALL, out=folder))
        assert in_order(folder) == in_order(out)


def test_finished_folder_is_not_run_again(finished, capsys):
    out, _ = finished
    before = (out / "records.jsonl").stat().st_mtime_ns
    assert main([*ARGS, "--out", str(out)]) == 0
    assert (out / "records.jsonl").stat().st_mtime_ns == before
    assert "greedy_dopt" in capsys.readouterr().out


def test_the_summary_is_written_before_another_command_may_write(finished, monkeypatch):
    out, _ = finished

    def drawn(*_):
        with pytest.raises(JarmError, match="Another process is writing"):
            claim(out)

    monkeypatch.setattr("jarm.studies.compare.learning_curves", drawn)
    compare(dataclasses.replace(SMALL, out=out))
    claim(out).close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rules": "gredy_dopt"}, "did you mean 'greedy_dopt'"),
        ({"pairs": "sideways"}, "choose from within, cross, all"),
        ({"batch": 10_000, "candidates": 0}, "label fewer"),
        ({"batch": 300}, "draw more candidates or label fewer pairs"),
        ({"seeds": 0}, "give at least 1"),
        ({"vmap_runs": -1}, "`vmap_runs` is -1"),
        ({"loss": "hinge"}, "choose one of bradley_terry"),
        ({"best_of": "two"}, "list of numbers"),
        ({"head": "transformer"}, "head"),
        ({"prompts": 1000}, "draw fewer"),
        ({"annotator": "oracle"}, "choose from"),
        ({"annotator": "flip"}, "flip_rate"),
        ({"gold_scale": "wide"}, "neither 'std' nor a number"),
        ({"data": "nowhere.parquet"}, "nowhere.parquet"),
        ({"learning_rate": 1e30}, "learning rate"),
    ],
)
def test_mistakes_get_a_sentence(changes, words, tmp_path):
    with pytest.raises(JarmError, match=words) as error:
        compare(dataclasses.replace(SMALL, out=tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_folder_of_another_configuration_is_refused_and_kept(finished):
    out, _ = finished
    before = (out / "records.jsonl").read_bytes()
    with pytest.raises(JarmError, match=r"batch 5 there, 6 here"):
        compare(dataclasses.replace(SMALL, out=out, batch=6))
    assert (out / "records.jsonl").read_bytes() == before


def test_a_folder_knows_its_data_by_content_and_not_by_path(tmp_path):
    settings = []
    for place, scale in (("here", 1.0), ("there", 1.0), ("changed", 2.0)):
        (tmp_path / place).mkdir()
        rng = np.random.default_rng(0)
        rows = [{"prompt_id": p, "score": scale * float(rng.normal())} for p in range(40) for _ in range(4)]
        (tmp_path / place / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        np.save(tmp_path / place / "e.npy", rng.normal(size=(160, 32)).astype(np.float32))
        data = {"data": str(tmp_path / place / "t.jsonl"), "embeddings": str(tmp_path / place / "e.npy")}
        config = dataclasses.replace(SMALL, **data, target="score", out=tmp_path / "out")
        settings.append(settings_of(read_jobs([Setting({}, config)]), config, None))
    assert settings[0] == settings[1] != settings[2]


@pytest.mark.slow
def test_a_run_that_fails_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    """A rule that cannot go on at seed 1 costs that run, not the comparison; and it is not tried again."""
    call = programs.Program.__call__

    def failing(self, rule, runs, table):
        return [
            dataclasses.replace(result, failure=Status.SINGULAR.message) if (rule, result.seed) == bad else result
            for result in call(self, rule, runs, table)
        ]

    bad = "greedy_dopt", 1
    monkeypatch.setattr(programs.Program, "__call__", failing)
    summary = compare(dataclasses.replace(SMALL, out=tmp_path))
    failed = [line for line in lines(tmp_path) if line["kind"] == "failed"]
    assert [(line["rule"], line["seed"]) for line in failed] == [("greedy_dopt", 1)]
    assert "not positive definite" in failed[0]["message"]
    assert summary["rules"]["greedy_dopt"]["failed_seeds"] == 1
    assert summary["rules"]["random"]["seeds"] == 2
    assert "1 failed: An information matrix" in (tmp_path / "summary.md").read_text()
    before = (tmp_path / "records.jsonl").read_bytes()
    compare(dataclasses.replace(SMALL, out=tmp_path))
    assert (tmp_path / "records.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.nightly
def test_seeds_by_vmap_are_seeds_one_by_one(tmp_path):
    config = dataclasses.replace(SMALL, head="laplace", members=2)
    for runs in (1, 3):
        compare(dataclasses.replace(config, vmap_runs=runs, out=tmp_path / f"{runs}"))
    pairs = list(zip(*(in_order(tmp_path / name) for name in ("1", "3")), strict=True))
    assert len(pairs) > 10
    for one, other in pairs:
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, float):
                assert other[name] == pytest.approx(value, rel=2e-2, abs=2e-2), name
            else:
                assert other[name] == value, name


def test_cli_says_one_sentence(capsys):
    assert main(["compare", "--rules", "nothing"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("jarm: There is no rule 'nothing'")
    assert error.count("\n") == 1


def test_rules_are_listed(capsys):
    assert main(["rules"]) == 0
    shown = capsys.readouterr().out
    assert "greedy_dopt" in shown
    assert "cost" in shown


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGKILL, -signal.SIGKILL), nightly(signal.SIGINT, 130)])
def test_a_stopped_process_goes_on(stop, code, finished, tmp_path):
    """Killed or interrupted after its first run; the same command ends with the records of an unbroken run."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jarm.cli", *ARGS, "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    records = tmp_path / "records.jsonl"
    while process.poll() is None and not (records.exists() and b'"run"' in records.read_bytes()):
        time.sleep(0.005)
    process.send_signal(stop)
    _, said = process.communicate()
    assert process.returncode == code, said
    if stop == signal.SIGINT:
        assert "the same command goes on from what is on disk" in said
        assert sum(line["kind"] == "run" for line in lines(tmp_path)) % (SMALL.rounds + 1) == 0
    compare(dataclasses.replace(SMALL, out=tmp_path))
    assert in_order(tmp_path) == in_order(finished[0])


@pytest.mark.slow
@pytest.mark.nightly
def test_a_rule_of_a_file_is_checked_and_compared(tmp_path, capsys):
    path = tmp_path / "mine.py"
    lines = [
        "import dataclasses",
        "from jarm.acquisition.uncertainty import entropy",
        "def good(*args, **kw):",
        "    return entropy(*args, **kw)",
        "def repeats(*args, **kw):",
        "    best = entropy(*args, **kw)",
        "    return dataclasses.replace(best, pairs=best.pairs.at[1].set(best.pairs[0]))",
    ]
    path.write_text("\n".join(lines))
    assert main(["rules", "--check", f"{path}:repeats"]) == 1
    assert (
        "repeats does not conform: batch on a space of 'within' pairs: a pair was picked twice"
        in capsys.readouterr().err
    )
    rules = ["--rules", f"{path}:good,{path}:repeats", "--seeds=1", "--head=linear", "--out", str(tmp_path / "out")]
    assert main([*ARGS, *rules]) == 1
    assert "mine.py:repeats ran to its end" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert not summary["rules"][f"{path}:good"]["failed_seeds"]
    row = summary["rules"][f"{path}:repeats"]
    assert row["failed_seeds"] == 1
    assert "a pair twice" in row["failure"]
    # Another rule under the same name is not taken for the one that ran. (A process reads a file once.)
    path.write_text("\n".join([*lines, "# changed"]))
    with pytest.raises(JarmError, match=r"has changed since .* got runs of it: give another --out"):
        compare(dataclasses.replace(SMALL, rules=f"{path}:good", seeds=2, head="linear", out=tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.nightly
def test_labels_by_one_column_and_metrics_by_another(tmp_path, capsys):
    """A perfect annotator who likes what gold does not: every label is wrong, and models learn the opposite."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(120, 4)).astype(np.float32)
    np.save(tmp_path / "rows.npy", embeddings)
    rows = [{"prompt_id": at // 4, "gold": float(e[0]), "against": -3 * float(e[0])} for at, e in enumerate(embeddings)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = dataclasses.replace(
        SMALL,
        data=str(tmp_path / "rows.jsonl"),
        embeddings=str(tmp_path / "rows.npy"),
        target="gold",
        attributes="against",
        annotator="perfect",
        annotator_column="against",
        rules="random",
        head="linear",
        candidates=0,
        out=tmp_path / "out",
    )
    compare(config)
    runs = [line for line in lines(config.out) if line["kind"] == "run"]
    assert {line["label_error"] for line in runs} == {1.0}
    assert all(line["spearman"] < -0.5 for line in runs if line["round"] == 2)
    assert not any("nll" in line for line in runs)
    references = {line["rule"]: line for line in lines(config.out) if line["kind"] == "reference"}
    assert references["against"]["spearman"] == pytest.approx(-1)
    assert references["oracle"]["spearman"] == pytest.approx(1)
    with pytest.raises(JarmError, match="annotator_column 'against' there"):
        compare(dataclasses.replace(config, annotator_column="gold"))


def test_options_that_came_later_leave_older_folders_as_they_are(finished):
    out, _ = finished
    assert not {"annotator_column", "attributes"} & json.loads((out / "config.json").read_text()).keys()
    jobs, by_length = read_jobs([Setting({}, SMALL)]), dataclasses.replace(SMALL, annotator_column="length")
    assert "annotator_column" not in settings_of(jobs, SMALL, None)
    assert settings_of(jobs, by_length, None)["annotator_column"] == "length"
