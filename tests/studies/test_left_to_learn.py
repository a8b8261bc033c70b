"""Reference lines and noise-free refits in folders: those of this version, and of earlier ones that go on."""

import dataclasses
import json

import pytest

from jarm import CompareConfig, compare
from jarm.core.files import sealed
from jarm.runs.config import PAPER
from jarm.runs.records import read_records

OPTIONS = {**PAPER, "rules": "random", "head": "linear"}
CONFIG = CompareConfig(**OPTIONS, rounds=1, batch=5, initial=10, seeds=1, candidates=100, members=1, vmap_runs=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("left") / "out"
    return out, compare(dataclasses.replace(CONFIG, out=out))


@pytest.mark.slow
@pytest.mark.nightly
def test_a_folder_has_the_lines_and_the_refit_of_each_run(finished):
    out, summary = finished
    lines = read_records(out)
    by_name = {line["rule"]: line for line in lines if line["kind"] == "reference"}
    assert by_name["oracle"]["spearman"] > by_name["ceiling"]["spearman"] > by_name["first component"]["spearman"]
    assert summary["reference"].keys() == by_name.keys()
    first, last = (line for line in lines if line["kind"] == "run")
    refit = {name.removeprefix("noise_free_"): value for name, value in last.items() if name.startswith("noise_free_")}
    assert {"spearman", "spearman_share", "pair_accuracy", "nll", "best_of_20"} <= refit.keys() <= last.keys()
    assert refit["nll"] < last["nll"]
    assert not any(name.startswith("noise_free_") for name in first)
    assert summary["rules"]["random"]["noise_free"]["mean"] == pytest.approx(refit["spearman"])
    assert summary["left_to_learn"] is None  # one seed shows nothing


@pytest.mark.slow
@pytest.mark.nightly
def test_a_folder_of_an_earlier_version_goes_on(finished, tmp_path):
    """Its runs stay as they are, and the lines that it lacks are added."""
    out, _ = finished
    old = [
        {name: value for name, value in line.items() if not name.startswith("noise_free_")}
        for line in read_records(out)
        if line["rule"] not in ("ceiling", "first component")
    ]
    (tmp_path / "config.json").write_bytes((out / "config.json").read_bytes())
    (tmp_path / "records.jsonl").write_bytes(b"".join(map(sealed, old)))
    summary = compare(dataclasses.replace(CONFIG, seeds=2, out=tmp_path))
    lines = read_records(tmp_path)
    assert lines[: len(old)] == old
    assert {"ceiling", "first component"} == {line["rule"] for line in lines[len(old) :] if line["kind"] == "reference"}
    row = summary["rules"]["random"]
    assert (row["seeds"], row["noise_free"]["seeds"]) == (2, 1)
    assert json.loads((tmp_path / "summary.json").read_text())["reference"].keys() >= {"ceiling"}
