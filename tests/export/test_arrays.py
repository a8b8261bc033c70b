"""Reward models as a script of NumPy and as ONNX: the same rewards there."""

import dataclasses
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from fixtures.tiny import write_checkpoint
from reward_models import model_on

from jarm.core.status import JarmError
from jarm.export.aggregate import read_aggregate
from jarm.export.arrays import write_numpy, write_onnx

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


def model_and_rows(folder, head, aggregate):
    model = model_on(folder, head=head, members=3, chat=False)
    rows = np.random.default_rng(1).normal(size=(5, model.width)).astype(np.float32)
    return dataclasses.replace(model, aggregate=read_aggregate(aggregate)), rows


@pytest.mark.parametrize(
    ("head", "aggregate"),
    [
        ("linear", "lower:1.5"),
        ("linear", "quantile:0.25"),
        ("mlp:4", "worst"),
        *((f"mlp:6,3:{each}", "mean") for each in ACTIVATIONS),
    ],
)
def test_the_script_gives_the_rewards_without_jarm(tmp_path, folder, head, aggregate):
    model, rows = model_and_rows(folder, head, aggregate)
    write_numpy(model, tmp_path / "out")
    np.save(tmp_path / "rows.npy", rows)
    command = [sys.executable, "-I", str(tmp_path / "out" / "score.py"), "rows.npy", "rewards.npy"]
    subprocess.run(command, cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "rewards.npy"), model.score(rows), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("head", "aggregate"), [("linear", "worst"), *((f"mlp:6,3:{each}", "mean") for each in ACTIVATIONS)]
)
def test_onnx_gives_the_rewards(tmp_path, folder, head, aggregate):
    model, rows = model_and_rows(folder, head, aggregate)
    write_onnx(model, tmp_path / "out")
    rewards, members = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx").run(
        ["rewards", "members"], {"embeddings": rows}
    )
    np.testing.assert_allclose(rewards, model.score(rows), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(members.T, model.member_scores(rows), rtol=2e-5, atol=2e-5)


def test_other_aggregates_are_refused_in_onnx(tmp_path, folder):
    model, _ = model_and_rows(folder, "linear", "lower:1")
    with pytest.raises(JarmError, match=r"is the lower:1 of its members, and the export to ONNX has their mean or"):
        write_onnx(model, tmp_path / "out")
