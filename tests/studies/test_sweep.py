"""`jarm sweep` as someone meets it who wants to break it: killed, extended, out of memory, failing, misled."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from test_compare import SMALL, in_order, lines
from test_sweep_elsewhere import Workers

from jarm import JarmError, SweepConfig, compare, plan, sweep
from jarm.cli import main
from jarm.core.files import claim
from jarm.loop.device_table import make_device_table
from jarm.report.figures import axis_curves
from jarm.report.summary import write_sweep_summary
from jarm.runs import elsewhere, jobs, programs, runner
from jarm.runs.driver import settings_of
from jarm.runs.grid import expand
from jarm.runs.jobs import read_jobs
from jarm.runs.progress import sweep_status
from jarm.runs.records import GROWING, RecordFolder
from jarm.runs.runner import make_runner
from jarm.studies import plan as plan_module
from jarm.studies.plan import plan_text
from jarm.testing.tracing import count_compilations

NOISE = [0.5, 2.0]
TOML = """
data = "synthetic"
metric = "none"
first = "random"
per_prompt = 0
rules = "greedy_dopt"
rounds = 2
batch = 5
initial = 10
seeds = 2
candidates = 200
steps = 20
head = "mlp:8"
members = 1

[grid]
noise = [0.5, 2]
"""


def small(out, grid, **changes):
    return SweepConfig(dataclasses.replace(SMALL, out=out, **changes), grid)


def runs(folder, *axes):
    """(rule, seed, axes) -> its records, without what differs from one time to the next."""
    found = {}
    for line in in_order(folder):
        if line["kind"] != "reference":
            run = line["rule"], line["seed"], *(line[axis] for axis in axes)
            found.setdefault(run, []).append(line)
    return found


def copied(folder, to):
    """A copy to go on with."""
    to.mkdir()
    for name in ("config.json", "records.jsonl"):
        (to / name).write_bytes((folder / name).read_bytes())
    return to


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole sweep of 2 rules x 2 values of the noise x 2 seeds, and the programs that it compiled."""
    out = tmp_path_factory.mktemp("sweep") / "whole"
    with count_compilations() as compiled:
        summary = sweep(small(out, {"noise": NOISE}))
    return out, summary, list(compiled)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Two runs at a time, one of which fails: a learning rate of 1e30."""
    out = tmp_path_factory.mktemp("sweep") / "failing"
    sweep(small(out, {"learning_rate": [1e-3, 1e30]}, vmap_runs=2))
    return out


def test_folder_holds_every_run_with_its_place(finished):
    out, summary, compiled = finished
    found = runs(out, "noise")
    assert found.keys() == {
        (rule, seed, noise) for rule in ("random", "greedy_dopt") for seed in (0, 1) for noise in NOISE
    }
    assert all([line["round"] for line in run] == [0, 1, 2] for run in found.values())
    assert len({line["config"] for line in lines(out)}) == 1
    references = [line for line in lines(out) if line["kind"] == "reference"]
    assert {line["rule"] for line in references} >= {"oracle", "mean response"}
    assert all("noise" not in line for line in references)  # one table, whatever the noise
    assert compiled.count("jit(run_all)") == 1, compiled  # one program for rules, seeds and values
    assert [row["axes"] for row in summary["settings"]] == [{"noise": 0.5}, {"noise": 2.0}]
    assert all(row["rules"]["greedy_dopt"]["seeds"] == 2 for row in summary["settings"])
    saved = json.loads((out / "summary.json").read_text())
    assert saved["settings"][1]["rules"]["random"]["area"] == summary["settings"][1]["rules"]["random"]["area"]
    text = (out / "summary.md").read_text()
    assert text.startswith("**Too few seeds to say: 2 of the 5 or more that an answer needs; raise \\`seeds\\`.**\n")
    assert "\n# 2 settings, 8 whole runs\n" in text
    assert len(re.findall(r"^\| (0\.5|2\.0) \| (random|greedy_dopt) \| 2 \|", text, re.M)) == 4
    for name in ("curves.png", "curves.svg"):
        assert (out / name).stat().st_size > 1000
    status = {"runs": 8, "done": 8, "failed": 0, "failures": {}, "running": False}
    assert sweep_status(out) == {**status, "summarised": True}
    os.utime(out / "summary.json", (0, 0))  # as where records came after it
    assert sweep_status(out) == {**status, "summarised": False}
    os.utime(out / "summary.json")


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("noise", NOISE)
def test_a_setting_of_a_sweep_is_a_comparison(noise, finished, tmp_path):
    out, _, _ = finished
    compare(dataclasses.replace(SMALL, noise=noise, out=tmp_path))
    alone, here = runs(tmp_path), runs(out, "noise")
    for (rule, seed), run in alone.items():
        for line, other in zip(run, here[rule, seed, noise], strict=True):
            assert line.keys() | {"noise", "rounds"} == other.keys()
            for name in line.keys() - {"config"}:
                if isinstance(line[name], float):
                    assert other[name] == pytest.approx(line[name], rel=1e-5, abs=1e-6), name
                else:
                    assert other[name] == line[name], name


def command(out, *more):
    file = out.parent / "noise.toml"
    file.write_text(TOML)
    return subprocess.Popen(
        [sys.executable, "-m", "jarm.cli", "sweep", str(file), "--out", str(out), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.nightly
def test_a_stopped_sweep_goes_on_to_the_same_records(stop, finished, tmp_path):
    out = tmp_path / "killed"
    process = command(out, "--workers", "1")
    records, seen = out / "records.jsonl", []
    while process.poll() is None and not (records.exists() and b'"run"' in records.read_bytes()):
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # so that it makes no runs while it is looked at
    if process.poll() is None:
        seen = sweep_status(out)
    process.send_signal(stop)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate()
    assert process.returncode == (130 if stop == signal.SIGINT else -stop), said
    assert seen["running"]
    assert 0 < sweep_status(out)["done"] < seen["runs"] == 8
    assert not sweep_status(out)["running"]
    sweep(small(out, {"noise": NOISE}))
    assert in_order(out) == in_order(finished[0])


@pytest.mark.slow
def test_a_file_cut_short_anywhere_goes_on_to_the_same_records(finished, tmp_path):
    out = copied(finished[0], tmp_path / "cut")
    whole = (out / "records.jsonl").read_bytes()
    (out / "records.jsonl").write_bytes(whole[: len(whole) * 3 // 5])
    sweep(small(out, {"noise": NOISE}))
    assert in_order(out) == in_order(finished[0])


def test_a_finished_sweep_is_not_run_again_and_one_of_less_shows_less(finished, tmp_path):
    out = copied(finished[0], tmp_path / "again")
    before = (out / "records.jsonl").read_bytes()
    with count_compilations() as compiled:
        summary = sweep(small(out, {"noise": [2.0]}, seeds=1))
    assert not [name for name in compiled if "run_all" in name]
    assert (out / "records.jsonl").read_bytes() == before
    assert [row["axes"] for row in summary["settings"]] == [{"noise": 2.0}]
    assert sweep_status(out)["runs"] == sweep_status(out)["done"] == 8


def made(monkeypatch):
    """The runs that are made from now on."""
    calls, call = [], programs.Program.__call__

    def counted(self, rule, runs, table):
        calls.extend((rule, seed, float(hparams.noise)) for seed, hparams in runs)
        return call(self, rule, runs, table)

    monkeypatch.setattr(programs.Program, "__call__", counted)
    return calls


@pytest.mark.parametrize(
    ("noise", "changes", "new"),
    [
        ([2.0, 1.0, 0.5], {}, {(rule, seed, 1.0) for rule in ("random", "greedy_dopt") for seed in (0, 1)}),
        pytest.param(
            NOISE,
            {"seeds": 3},
            {(rule, 2, noise) for rule in ("random", "greedy_dopt") for noise in NOISE},
            marks=[pytest.mark.slow, pytest.mark.nightly],
        ),
        pytest.param(
            NOISE,
            {"rules": "greedy_dopt,entropy"},
            {("entropy", seed, noise) for seed in (0, 1) for noise in NOISE},
            marks=[pytest.mark.slow, pytest.mark.nightly],
        ),
    ],
    ids=["value", "seed", "rule"],
)
@pytest.mark.slow
def test_an_extended_sweep_runs_what_is_missing(noise, changes, new, finished, tmp_path, monkeypatch):
    out = copied(finished[0], tmp_path / "more")
    calls = made(monkeypatch)
    summary = sweep(small(out, {"noise": noise}, **changes))
    assert set(calls) == new
    assert len(calls) == len(new)
    there = runs(finished[0], "noise")
    assert {run: found for run, found in runs(out, "noise").items() if run in there} == there
    assert runs(out, "noise").keys() == there.keys() | new
    assert len([line for line in lines(out) if line["rule"] == "oracle"]) == 1
    assert [row["axes"]["noise"] for row in summary["settings"]] == noise
    assert len({line["config"] for line in lines(out)}) == 1


@pytest.mark.parametrize(
    ("grid", "changes", "words"),
    [
        ({"noise": NOISE}, {"batch": 6}, "batch 5 there, 6 here"),
        ({"prior_weight": [1.0]}, {}, r"axes \['noise'\] there, \['prior_weight'\] here, noise None there, 2.0 here"),
        ({"noise": NOISE, "prior_weight": [0.1]}, {}, r"axes \['noise'\] there, \['noise', 'prior_weight'\] here"),
        ({}, {}, r"axes \['noise'\] there, \[\] here"),
        ({"noise": NOISE}, {"data": "synthetic:outliers"}, "data 'synthetic' there, 'synthetic:outliers' here"),
    ],
)
def test_a_folder_of_another_grid_is_refused_and_kept(grid, changes, words, finished):
    out = finished[0]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(JarmError, match=words) as error:
        sweep(small(out, grid, **changes))
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_of_a_comparison_is_no_folder_of_a_sweep(tmp_path):
    (tmp_path / "summary.md").write_text("mine")
    with pytest.raises(JarmError, match=r"summary.md stands there without a config.json and may be yours"):
        sweep(small(tmp_path, {"noise": NOISE}))
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["summary.md"]


def settings_in(grid, tmp_path, **changes):
    """Settings of the folder of a sweep, as in `config.json`."""
    config = small(tmp_path, grid, **changes)
    return settings_of(read_jobs(expand(config)), config.base, config.grid)


def test_what_a_name_or_a_table_stands_for_may_not_change_but_grow(tmp_path):
    """Records have a name and not what it stands for: the folder knows."""
    folder = lambda settings: RecordFolder.open(tmp_path / "f", settings, 2, (), GROWING)  # noqa: E731
    sizes = [{"name": "one", "batch": 5}, {"name": "two", "batch": 6, "rounds": 3}]
    first = settings_in({"size": sizes, "data": ["synthetic"]}, tmp_path)
    with folder(first) as opened:
        assert opened.settings["named"] == {"size=one": {"batch": 5}, "size=two": {"batch": 6, "rounds": 3}}
        assert list(opened.settings["tables"]) == ["data=synthetic"]
        assert opened.settings["batch"] == 5
        assert "data" not in opened.settings
    grown = [{"name": "three", "steps": 5}, sizes[0]]
    with folder(settings_in({"size": grown, "data": ["synthetic:outliers"]}, tmp_path)) as opened:
        assert list(opened.settings["named"]) == ["size=one", "size=two", "size=three"]
        assert len(opened.settings["tables"]) == 2
    with folder(first) as opened:  # less is in it still
        assert len(opened.settings["named"]) == 3
    kept = (tmp_path / "f" / "config.json").read_bytes()
    changed = [{"name": "one", "batch": 6}]
    with pytest.raises(JarmError, match=r"size=one {'batch': 5} there, {'batch': 6} here"):
        folder(settings_in({"size": changed, "data": ["synthetic"]}, tmp_path))
    with pytest.raises(JarmError, match="rounds 2 there, 4 here"):  # `one` leaves it to the base
        folder(settings_in({"size": sizes, "data": ["synthetic"]}, tmp_path, rounds=4))
    moved = first | {"tables": {"data=synthetic": {"train": {"seed": 7}, "test": {}}}}
    with pytest.raises(JarmError, match=r"data=synthetic {.* there, {'train': {'seed': 7}, 'test': {}} here"):
        folder(moved)
    assert (tmp_path / "f" / "config.json").read_bytes() == kept


def test_an_axis_may_have_the_name_of_a_method(tmp_path):
    grid = {"sizes": [{"name": "a", "data": "synthetic"}, {"name": "b", "data": "synthetic:outliers"}]}
    assert list(settings_in(grid, tmp_path)["tables"]) == ["sizes=a", "sizes=b"]


@pytest.mark.slow
@pytest.mark.nightly
def test_tables_of_one_shape_share_a_program_and_know_their_references(finished, tmp_path):
    out = tmp_path / "two"
    config = small(out, {"data": ["synthetic", "synthetic:outliers"]}, noise=2.0, seeds=1)
    assert plan(config, measure=False).compilations == 1
    assert "1 rules" not in plan_text(plan(config, measure=False))
    with count_compilations() as compiled:
        sweep(config)
    assert compiled.count("jit(run_all)") == 1
    oracle = {line["data"]: line for line in lines(out) if line["rule"] == "oracle"}
    assert oracle.keys() == {"synthetic", "synthetic:outliers"}
    assert oracle["synthetic"]["best_of_5"] != oracle["synthetic:outliers"]["best_of_5"]
    found, there = runs(out, "data"), runs(finished[0], "noise")
    ours, theirs = found["random", 0, "synthetic"][-1], there["random", 0, 2.0][-1]
    assert ours["spearman"] == pytest.approx(theirs["spearman"], abs=1e-6)
    assert found["random", 0, "synthetic:outliers"][-1]["spearman"] != ours["spearman"]


def table(folder, prompts=40, width=4, dim=32):
    rng = np.random.default_rng(0)
    rows = [{"prompt_id": p, "score": float(rng.normal())} for p in range(prompts) for _ in range(width)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(folder / "e.npy", rng.normal(size=(prompts * width, dim)).astype(np.float32))
    return {"data": str(folder / "t.jsonl"), "embeddings": str(folder / "e.npy"), "target": "score"}


@pytest.mark.slow
@pytest.mark.nightly
def test_an_axis_of_tables_of_two_kinds_and_of_rounds_goes_on(tmp_path):
    """Rounds that a name sets are those of its runs when the folder is opened again."""
    grid = {
        "table": [{"name": "built in", "data": "synthetic", "rounds": 1}, {"name": "mine", **table(tmp_path)}],
        "beta": [1.0, 2.0],
    }
    config = small(tmp_path / "out", grid, seeds=1, head="linear")
    with count_compilations() as compiled:
        sweep(config)
    assert compiled.count("jit(run_all)") == 2
    found = runs(tmp_path / "out", "table", "beta")
    assert {key[2]: len(run) for key, run in found.items()} == {"built in": 2, "mine": 3}
    assert len(found) == 8
    before = (tmp_path / "out" / "records.jsonl").read_bytes()
    sweep(config)
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == before
    assert {line.get("table") for line in lines(tmp_path / "out")} == {"built in", "mine"}


@pytest.mark.slow
@pytest.mark.nightly
def test_an_axis_of_rounds_goes_on_with_another_base(tmp_path):
    config = small(tmp_path, {"rounds": [1, 2]}, seeds=1)
    sweep(config)
    before = (tmp_path / "records.jsonl").read_bytes()
    sweep(small(tmp_path, {"rounds": [2, 1]}, seeds=1, rounds=5))
    assert (tmp_path / "records.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_run_that_fails_is_recorded_and_the_others_go_on(finished, tmp_path, capsys):
    out, config = tmp_path / "failing", small(tmp_path / "failing", {"learning_rate": [1e-3, 1e30]})
    summary = sweep(config)
    failed = [line for line in lines(out) if line["kind"] == "failed"]
    assert {(line["rule"], line["seed"], line["learning_rate"]) for line in failed} == {
        (rule, seed, 1e30) for rule in ("random", "greedy_dopt") for seed in (0, 1)
    }
    assert len(failed) == 4
    assert all("learning rate" in line["message"] for line in failed)
    row = summary["settings"][1]["rules"]["random"]
    assert (row["seeds"], row["failed_seeds"]) == (0, 2)
    assert "4 runs failed: " in (out / "summary.md").read_text()
    status = sweep_status(out)
    assert (status["done"], status["failed"], list(status["failures"].values())) == (8, 4, [4])
    assert main(["sweep", "status", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("8 of 8 runs, done\n4 failed: ")
    before = (out / "records.jsonl").read_bytes()  # what failed is not tried again
    sweep(config)
    assert (out / "records.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_that_fails_leaves_its_neighbours_under_vmap_as_they_are(together, tmp_path):
    sweep(small(tmp_path, {"learning_rate": [1e-3, 2e-3]}, vmap_runs=2))
    healthy, found = runs(tmp_path, "learning_rate"), runs(together, "learning_rate")
    assert {len(found[rule, seed, 1e30]) for rule, seed, _ in found} == {1}
    fine = [run for run in found if run[2] == 1e-3]
    assert len(fine) == 4
    assert [found[run] for run in fine] == [healthy[run] for run in fine]


def test_a_rule_that_fails_at_one_value_is_drawn_and_told_at_the_others(finished, tmp_path):
    """Half a sweep, as after failures or a stop, has its summary and figure all the same."""
    whole = [line for line in lines(finished[0]) if line["kind"] == "run"]
    half = [line for line in whole if (line["rule"], line["noise"]) != ("greedy_dopt", 0.5)]
    for files in (
        axis_curves(half, ("noise",), tmp_path / "half"),
        axis_curves(half[:9], ("noise",), tmp_path / "few"),
    ):
        assert [path.suffix for path in files] == [".png", ".svg"]
    lost = {"kind": "failed", "rule": "greedy_dopt", "seed": 0, "noise": 0.5, "message": "It failed."}
    summary = write_sweep_summary([*half, lost], [{"noise": 0.5}, {"noise": 2.0}], tmp_path)
    assert [row["rules"]["greedy_dopt"]["seeds"] for row in summary["settings"]] == [0, 2]
    assert "- 1 run failed: It failed." in (tmp_path / "summary.md").read_text()


def test_a_sweep_of_nothing_but_failures_says_so(tmp_path, capsys):
    with pytest.raises(JarmError, match=r"No run of the sweep ran to its end\. .*learning rate") as error:
        sweep(small(tmp_path / "out", {"noise": [2.0]}, learning_rate=1e30, seeds=1))
    assert "\n" not in str(error.value)
    assert sweep_status(tmp_path / "out")["failed"] == 2


def limited(monkeypatch, most, error="RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."):
    """A device that takes `most` runs at a time."""
    compiled = programs.Program.compiled

    class Tight(jax.stages.Compiled):
        __slots__ = ("whole",)

        def __init__(self, whole):
            self.whole = whole

        def __call__(self, keys, *rest):
            if len(keys) > most:
                raise jax.errors.JaxRuntimeError(error)
            return self.whole(keys, *rest)

    def tight(self, table):
        whole, capacity = compiled(self, table)
        return Tight(whole), capacity

    monkeypatch.setattr(programs.Program, "compiled", tight)


def close(folder, other, axis):
    pairs = zip(runs(folder, axis).items(), runs(other, axis).items(), strict=True)
    for (run, found), (same, there) in pairs:
        assert run == same
        assert [line["kind"] for line in found] == [line["kind"] for line in there]
        for one, two in zip(found, there, strict=True):
            assert one.get("spearman") == pytest.approx(two.get("spearman"), abs=2e-2)


def test_threads_that_run_out_of_memory_at_once_halve_once(monkeypatch, capsys):
    """Also where some had not begun; a program that is asked for is one that fits."""
    monkeypatch.setattr(programs, "jit_runs", lambda *_: jax.jit(lambda *arguments: arguments[0]))
    program, (job,) = programs.Program(SMALL.loop(), 8), read_jobs(expand(small(pathlib.Path("out"), {})))
    device_table = make_device_table(job.data.train, job.scale)
    barrier = threading.Barrier(6, timeout=60)

    def one():
        while True:
            _, capacity = program.compiled(device_table)
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait(0.2)  # all at the same time, as long as all are there
            if capacity <= 2:
                return capacity
            program.halve(capacity, "memory ran out")

    assert list(runner.side_by_side(one, [()] * 6, 6)) == [2] * 6
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in said] == [
        "4 runs at a time instead of 8.",
        "2 runs at a time instead of 4.",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "jobs"), [(2, 1), *(pytest.param(*each, marks=pytest.mark.nightly) for each in [(4, 1), (4, 3)])]
)
@pytest.mark.nightly
def test_a_device_whose_memory_runs_out_takes_fewer_runs_at_a_time(
    runs, jobs, together, finished, tmp_path, monkeypatch, capsys
):
    """Said once, however many calls were under way, and nothing is lost."""
    limited(monkeypatch, runs // 2)
    sweep(small(tmp_path, {"learning_rate": [1e-3, 1e30]}, vmap_runs=runs, workers=jobs))
    said = f"jarm: memory ran out: {runs // 2} runs at a time instead of {runs}."
    assert capsys.readouterr().err.count(said) == 1
    close(tmp_path, together, "learning_rate")


@pytest.mark.slow
@pytest.mark.nightly
def test_a_program_that_would_not_fit_is_halved_before_it_runs(together, finished, tmp_path, monkeypatch, capsys):
    # XLA's own figures of programs as small as these do not grow with the number of runs.
    sizes = iter([3 << 20, 1 << 19])
    monkeypatch.setattr(programs, "program_bytes", lambda compiled: next(sizes))
    monkeypatch.setattr(programs, "free_bytes", lambda: 2 << 20)
    sweep(small(tmp_path, {"learning_rate": [1e-3, 1e30]}, vmap_runs=2))
    assert next(sizes, None) is None
    said = capsys.readouterr().err
    assert re.search(r"jarm: \d+ MiB are needed and 2 MiB are free: 1 runs at a time instead of 2\.", said)
    close(tmp_path, together, "learning_rate")


@pytest.mark.slow
@pytest.mark.nightly
def test_where_not_even_one_run_fits_there_is_a_sentence(finished, tmp_path, monkeypatch):
    limited(monkeypatch, 0)
    with pytest.raises(JarmError, match=r"Not even one run at a time fits into memory \(memory ran out\): take fewer"):
        sweep(small(tmp_path, {"noise": NOISE}))
    assert sweep_status(tmp_path)["done"] == 0


def test_memory_may_run_out_while_compiling_or_for_the_table(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")

    config = small(tmp_path, {"noise": NOISE}, vmap_runs=4)
    with monkeypatch.context() as patch:
        patch.setattr(programs, "jit_runs", full)
        with pytest.raises(JarmError, match=r"Not even one run at a time fits into memory .*while it was compiled"):
            sweep(config)
    assert "2 runs at a time instead of 4" in capsys.readouterr().err
    monkeypatch.setattr(jobs, "make_device_table", full)
    with pytest.raises(JarmError, match=r"In the setting noise=0.5: .*training table does not fit into memory"):
        sweep(config)


def test_other_errors_of_a_device_are_not_taken_for_memory(finished, tmp_path, monkeypatch):
    limited(monkeypatch, 0, "INTERNAL: a bug")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        sweep(small(tmp_path, {"noise": NOISE}))


def test_a_program_is_no_larger_than_what_shares_it(tmp_path):
    """Four values of a static axis with two seeds: two runs of a program, and not eight."""
    config = small(tmp_path, {"batch": [2, 3, 4, 5]}, vmap_runs=8)
    assert make_runner(read_jobs(expand(config)), config.base).capacity == 2


def test_calls_whose_worker_dies_are_made_by_another(finished, tmp_path):
    """Some die, one twice: the records are those of this process alone."""

    broken = concurrent.futures.BrokenExecutor("A process died.")
    fates = {(("random", 1), 1): broken, (("random", 1), 3): "lost", (("greedy_dopt", 0), 1): "lost"}
    workers = Workers(lambda run, number: fates.get((run, number)))
    sweep(small(tmp_path, {"noise": NOISE}), executor=workers)
    assert in_order(tmp_path) == in_order(finished[0])
    assert workers.tries == {("random", 0): 2, ("random", 1): 4, ("greedy_dopt", 0): 3, ("greedy_dopt", 1): 2}


def nothing_here(**_):
    raise OSError("There is no such file.")


def test_a_call_that_three_workers_die_of_has_failed(finished, tmp_path, monkeypatch):
    """And tables that workers cannot read are scattered once, as Dask does it."""
    elsewhere._kept.cache_clear()
    monkeypatch.setattr(elsewhere, "load", nothing_here)
    broken = concurrent.futures.BrokenExecutor("A process died.\nOr so.")
    workers = Workers(lambda run, number: broken if run == ("greedy_dopt", 1) else None)
    config, scattered = small(tmp_path, {"noise": [0.5]}), []
    with pytest.raises(JarmError, match=r"A worker cannot read the data, .* on a disk that all workers see"):
        sweep(config, executor=workers)
    workers.tries.clear()
    scatter = lambda tables, broadcast: scattered.append(tables) or tables  # noqa: E731
    workers._client = types.SimpleNamespace(scatter=scatter)
    summary = sweep(config, executor=workers)
    assert workers.tries["greedy_dopt", 1] == 3
    assert len(scattered) == 1
    (failed,) = (line for line in lines(tmp_path) if line["kind"] == "failed")
    assert failed["message"] == "3 workers died while they made this run: A process died"
    assert (failed["rule"], failed["seed"], failed["noise"], failed["rounds"]) == ("greedy_dopt", 1, 0.5, 2)
    assert summary["settings"][0]["rules"]["greedy_dopt"]["failed_seeds"] == 1
    status = sweep_status(tmp_path)
    assert (status["done"], status["failed"]) == (4, 1)
    whole = [line for line in in_order(finished[0]) if line.get("noise") == 0.5 or line["kind"] == "reference"]
    there = [line for line in in_order(tmp_path) if line["kind"] != "failed"]
    assert there == [line for line in whole if (line["rule"], line.get("seed")) != ("greedy_dopt", 1)]


def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path):
    for grid, changes, words in [
        ({"length_bias": [0.0, 0.5]}, table(tmp_path), r"In the setting length_bias=0\.5: .*length bias"),
        (
            {"noise": NOISE, "batch": [5, 10_000]},
            {"candidates": 0},
            "In the setting noise=0.5, batch=10000: .*label fewer",
        ),
        ({"beta": [1.0, -1.0]}, {}, "In the setting beta=-1.0: The hyperparameter `beta`"),
        ({"data": ["nowhere.parquet"]}, {}, "In the setting data=nowhere.parquet: "),
        ({}, {"seeds": 0}, "`seeds` is 0"),
        ({}, {"vmap_runs": -1}, "`vmap_runs` is -1"),
        ({}, {"rules": "gredy"}, "no rule 'gredy'"),
    ]:  # fmt: skip
        with pytest.raises(JarmError, match=words) as error:
            sweep(small(tmp_path / "out", grid, **changes))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_status_of_what_is_no_sweep_is_a_sentence(finished, tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nothing"):
        assert main(["sweep", "status", str(folder)]) == 1
        said = capsys.readouterr().err
        assert "holds no sweep" in said
        assert said.count("\n") == 1
    (tmp_path / "noise.toml").write_text(f'out = "{finished[0]}"')
    lock = claim(finished[0])
    assert main(["sweep", "status", str(tmp_path / "noise.toml")]) == 0
    assert capsys.readouterr().out == "8 of 8 runs, running\n"
    lock.close()
    broken = copied(finished[0], tmp_path / "broken")
    records = (broken / "records.jsonl").read_text().splitlines()
    (broken / "records.jsonl").write_text("\n".join([records[0], "rubbish {", *records[1:], ""]))
    (broken / "progress.json").write_text('{"runs": 8}')
    assert main(["sweep", "status", str(broken)]) == 1
    assert "Line 2 of" in capsys.readouterr().err


def test_plan_counts_and_writes_nothing(tmp_path, capsys):
    file = tmp_path / "noise.toml"
    axes = 'head = ["mlp:8", "mlp:9"]\nprior_weight = [0.1, 1]\n'
    file.write_text(TOML.replace('head = "mlp:8"\n', "") + axes)
    assert main(["plan", str(file), "--no-measure"]) == 0
    said = capsys.readouterr().out
    assert "8 settings x 2 rules x 2 seeds = 32 runs, 2 programs" in said
    assert "axes that share a program: seeds, rules, noise, prior_weight\n" in said
    assert "axes that compile: head\n" in said
    assert "head=mlp:8: 16 runs, 1 per call" in said
    assert [path.name for path in tmp_path.iterdir()] == ["noise.toml"]


@pytest.mark.slow
@pytest.mark.nightly
def test_a_dry_run_is_a_plan(finished, tmp_path, capsys, monkeypatch):
    file = tmp_path / "noise.toml"
    file.write_text(TOML)
    assert main(["sweep", str(file), "--dry-run", "--workers", "1", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "2 settings x 2 rules x 2 seeds = 8 runs, one program" in said
    assert re.search(
        r"compiled in \d+\.\d s\n  random +\d+\.\d{3} s per run\n  greedy_dopt +\d+\.\d{3} s per run\n", said
    )
    assert "on this machine, one call at a time" in said
    assert [path.name for path in tmp_path.iterdir()] == ["noise.toml"]

    monkeypatch.setattr(plan_module, "free_bytes", lambda: 10_000)
    assert main(["plan", str(file)]) == 1
    said = capsys.readouterr().err
    assert "In the setting noise=0.5: The training table takes" in said
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.nightly
def test_a_plan_refuses_more_calls_at_a_time_than_fit(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "program_bytes", lambda _: 1 << 40)
    with pytest.raises(JarmError, match=r"1 runs at a time take 1024\.0 GiB, and .* are free: give fewer `workers`"):
        plan(small(tmp_path, {"noise": NOISE}, workers=1, seeds=1))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere.toml"], "There is no file nowhere.toml"),
        (["FILE", "--workers", "-1"], "`workers` is -1"),
    ],
)
def test_bad_arguments_get_a_sentence(args, words, tmp_path, capsys):
    file = tmp_path / "noise.toml"
    file.write_text(TOML)
    assert main(["sweep", *(str(file) if arg == "FILE" else arg for arg in args)]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["noise.toml"]
