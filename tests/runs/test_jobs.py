"""Jobs as `read_jobs` makes them: what their settings share, and mistakes of the data."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jarm import CompareConfig, JarmError, ResponseTable, SweepConfig, TrainTest, compare, synthetic
from jarm.cli import main
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import limit_per_prompt
from jarm.runs import jobs
from jarm.runs.config import PAPER
from jarm.runs.grid import Setting, expand
from jarm.runs.jobs import read_jobs

pytestmark = pytest.mark.core

BASE = CompareConfig(
    **PAPER | {"head": "linear"}, rounds=1, batch=5, initial=10, seeds=1, candidates=200, members=1, flip_rate=0.25
)


def test_the_limit_per_prompt_is_1_where_prompts_suffice():
    """Two hundred prompts of ten responses fill 100 places with a pair each, and no batch of 200."""
    base = dataclasses.replace(BASE, rules="random", initial=50, candidates=0)
    found = read_jobs(expand(SweepConfig(base, {"per_prompt": ["auto", 0, 2, "1"], "batch": [100, 200]})))
    limits = {(s.axes["per_prompt"], s.axes["batch"]): job.loop.per_prompt for job in found for s in job.settings}
    assert limits == {
        **{("auto", 100): 1, ("auto", 200): None, ("0", 100): None, ("0", 200): None},
        **{("2", 100): 2, ("2", 200): 2, ("1", 100): 1, ("1", 200): 1},
    }
    # Few pairs per prompt are enough where prompts are many: 450 labels use up at most 75 of 2,000 prompts of four.
    rng, many = np.random.default_rng(0), np.arange(8000).reshape(2000, 4)
    for rows, limit in [(many, 1), (many[:100], None)]:
        plenty = ResponseTable(rng.normal(size=(8000, 2)), rows, np.ones(rows.shape, bool))
        for pairs in ("within", "cross"):
            assert limit_per_prompt(LoopConfig(pairs=pairs), plenty) == limit
    # Across prompts a pair takes two, and few candidates may leave none for the last one.
    across = dataclasses.replace(base, pairs="cross", per_prompt="auto")
    for changes, limit in [({"batch": 75}, 1), ({"batch": 76}, None), ({"batch": 20, "candidates": 1000}, None)]:
        (job,) = read_jobs([Setting({}, dataclasses.replace(across, **changes))])
        assert job.loop.per_prompt == limit
    # Pairs of copies are never offered, so prompts that hold no other fill nothing.
    train = synthetic(seed=0).train
    copied = dataclasses.replace(train, store=np.repeat(train.store[::10], 10, axis=0))
    assert limit_per_prompt(base.loop(), train) == 1
    assert limit_per_prompt(base.loop(), copied) is None


@pytest.mark.parametrize("kinds", [["flip", "bradley_terry"], ["bradley_terry", "flip"]])
def test_only_a_bradley_terry_annotator_has_a_noise_solved_for(kinds):
    """Also where another kind has the same flip rate, and comes first."""
    found = {job.loop.annotator.kind: job for job in read_jobs(expand(SweepConfig(BASE, {"annotator": kinds})))}
    assert float(found["bradley_terry"].hparams[0].noise) == pytest.approx(1.70, abs=0.01)
    assert float(found["flip"].hparams[0].noise) == BASE.noise


def test_a_noise_is_solved_for_once_for_each_column():
    settings = expand(SweepConfig(BASE, {"annotator_column": ["gold", "length"], "ridge": [0.5, 1.0]}))
    gold, length = ([float(hparams.noise) for hparams in job.hparams] for job in read_jobs(settings))
    assert gold[0] == gold[1] != length[0] == length[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": "laplace", "loss": "classification"}, "leave `loss` at 'bradley_terry' and not 'classification', or"),
        ({"head": "laplace", "ensemble": "init"}, "leave `ensemble` at 'auto' and not 'init', or"),
        ({"members": 1, "rules": "variance"}, "use two or more"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_folder_is_begun(changes, said, tmp_path):
    with pytest.raises(JarmError, match=said):
        compare(dataclasses.replace(BASE, out=tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_an_attribute_with_the_name_of_a_rule_is_refused(monkeypatch):
    def load(**_):
        return TrainTest(
            *(
                dataclasses.replace(side, attributes={"entropy": np.ones(side.mask.shape, np.float32)})
                for side in synthetic()
            )
        )

    monkeypatch.setattr(jobs, "load", load)
    with pytest.raises(JarmError, match="attribute 'entropy' has the name of a rule"):
        read_jobs(expand(SweepConfig(BASE, {})))


def test_test_embeddings_without_differences_are_refused(monkeypatch):
    """Every model would rank them alike, and the answer would be that no gain is shown."""
    rng = np.random.default_rng(0)

    def side(store):
        return ResponseTable(store, np.arange(80).reshape(20, 4), np.ones((20, 4), bool), rng.normal(size=(20, 4)))

    flat, varied = side(rng.normal(size=(20, 3)).repeat(4, axis=0)), side(rng.normal(size=(80, 3)))
    base = dataclasses.replace(BASE, flip_rate=None)
    monkeypatch.setattr(jobs, "load", lambda **_: TrainTest(varied, flat))
    with pytest.raises(JarmError, match="embeddings of the test prompts are equal in every pair within prompts"):
        read_jobs(expand(SweepConfig(base, {})))


@pytest.mark.parametrize("annotator", [{}, {"flip_rate": 0.25}, {"annotator": "perfect"}, {"gold_scale": "1"}])
@pytest.mark.parametrize("side", ["train", "test"])
def test_every_command_refuses_a_target_without_differences_alike(tmp_path, capsys, monkeypatch, annotator, side):
    """Scores that are constant within the prompts of a side; nothing is compiled, nothing is written."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt_id": f"{split}{p}", "score": p + 0.1 * r * (split != side), "split": split}
        for split in ("train", "test")
        for p in range(40)
        for r in range(4)
    ]
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save("t.npy", np.random.default_rng(0).normal(size=(len(rows), 3)))
    options = {"data": "t.jsonl", "embeddings": "t.npy", "target": "score", "rounds": 1, **annotator}
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    Path("s.toml").write_text("\n".join([*lines, "[grid]", "ridge = [1.0, 2.0]", ""]))
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    of = "" if side == "train" else " of the test prompts of t.jsonl"
    for command in (["compare", *words], ["sweep", "s.toml"], ["plan", "s.toml"]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert f"The gold rewards{of} are equal in every pair within prompts: there is nothing to prefer" in said
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "changes", [{"head": "mlp:1000000,1000000"}, {"members": 2**31 - 1}, {"candidates": 2**31 - 1, "rounds": 10**6}]
)
def test_a_run_larger_than_memory_is_refused_before_it_begins(changes, monkeypatch):
    monkeypatch.setattr("jarm.loop.device_table._check_budget", lambda *_: None)
    monkeypatch.setattr(jobs, "free_bytes", lambda: 1 << 30)
    with pytest.raises(JarmError, match=r"A run of .* labels, .* takes .* GiB or more, and 1\.0 GiB are free"):
        read_jobs([Setting({}, CompareConfig(seeds=1, **changes))])
    read_jobs([Setting({}, BASE)])
