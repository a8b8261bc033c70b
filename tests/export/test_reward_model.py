"""Reward models: scores against the formula in float64, and folders that are whole or refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
import safetensors.numpy

from jarm.core.status import JarmError
from jarm.export.aggregate import read_aggregate
from jarm.export.model import RewardModel, load_model
from jarm.reward.config import HeadConfig

K, D, R = 3, 5, 4
RNG = np.random.default_rng(0)
GELU = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))


def array(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def make(head, mapped=True):
    sizes = [R if mapped else D, *head.hidden]
    params = {"out": {"kernel": array(K, sizes[-1], 1)}}
    if head.hidden:
        params["hidden"] = {
            at: {"kernel": array(K, sizes[at], sizes[at + 1]), "bias": array(K, sizes[at + 1])}
            for at in range(len(head.hidden))
        }
    maps = {"mean": array(D), "deviation": np.float32([1, 2, np.inf, 0.5, 3]), "metric": array(D, R)} if mapped else {}
    made_by = {"model": "mine/model", "template": "{prompt}\n\n{response}"}
    return RewardModel(head, params, array(K), made_by=made_by, training={"labels": 7}, **maps)


def by_formula(folder, embeddings):
    """Rewards of each member by the formula of docs/models.md, in float64."""
    config = json.loads((folder / "config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "weights.safetensors")
    x = np.float64(embeddings)
    if "mean" in tensors:
        x = (x - tensors["mean"]) / tensors["deviation"]
    if "metric" in tensors:
        x = x @ tensors["metric"]
    rewards = []
    for member in range(config["members"]):
        hidden, at = x, 0
        while f"hidden.{at}.kernel" in tensors:
            hidden = GELU(hidden @ tensors[f"hidden.{at}.kernel"][member] + tensors[f"hidden.{at}.bias"][member])
            at += 1
        rewards.append(hidden @ tensors["out.kernel"][member, :, 0] - tensors["offset"][member])
    return np.array(rewards)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("head", ["linear", "mlp:6", "mlp:6,3"])
@pytest.mark.parametrize("aggregate", ["mean", "worst", "lower:1.5", "quantile:0.25"])
def test_a_saved_model_scores_as_the_formula(tmp_path, head, mapped, aggregate):
    model = dataclasses.replace(make(HeadConfig.parse(head), mapped), aggregate=read_aggregate(aggregate))
    model.save(tmp_path / "model", card="# A card\n")
    loaded, embeddings = load_model(tmp_path / "model"), array(37, D)
    members = by_formula(tmp_path / "model", embeddings)
    wanted = {
        "mean": members.mean(axis=0),
        "worst": members.min(axis=0),
        "lower:1.5": members.mean(axis=0) - 1.5 * members.std(axis=0),
        "quantile:0.25": np.quantile(members, 0.25, axis=0),
    }
    np.testing.assert_allclose(loaded.score(embeddings), wanted[aggregate], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loaded.deviations(embeddings), members.std(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model.member_scores(embeddings), loaded.member_scores(embeddings))
    assert (loaded.made_by, loaded.training, loaded.members, loaded.width) == (model.made_by, {"labels": 7}, K, D)
    assert (tmp_path / "model" / "README.md").read_text() == "# A card\n"


def test_rows_in_chunks_and_one_by_one_are_those_of_all(monkeypatch):
    model, embeddings = make(HeadConfig.parse("mlp:6")), array(21, D)
    whole = model.member_scores(embeddings)
    one_by_one = np.concatenate([model.member_scores(row[None]) for row in embeddings], axis=1)
    np.testing.assert_allclose(one_by_one, whole, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("jarm.export.model.CHUNK", 8)
    np.testing.assert_allclose(model.member_scores(embeddings), whole, rtol=1e-5, atol=1e-5)
    assert model.member_scores(embeddings[:0]).shape == (K, 0)


def test_scaling_scales_all_rewards():
    model, embeddings = make(HeadConfig.parse("mlp:6")), array(9, D)
    np.testing.assert_allclose(model.scaled(0.25).score(embeddings), model.score(embeddings) / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_any_change_of_a_folder_is_found(tmp_path, name):
    folder = tmp_path / "model"
    make(HeadConfig.parse("mlp:6")).save(folder)
    whole = (folder / name).read_bytes()
    for at in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        for changed in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
            (folder / name).write_bytes(changed)
            try:
                found = load_model(folder)
            except JarmError:
                continue
            # White space between the entries of the config means nothing.
            assert name == "config.json"
            assert json.loads(changed) == json.loads(whole)
            assert found.members == K
    (folder / name).write_bytes(whole)
    load_model(folder)
    (folder / name).unlink()
    with pytest.raises(JarmError, match="holds no reward model"):
        load_model(folder)


def test_a_format_of_the_future_is_refused(tmp_path):
    make(HeadConfig(hidden=())).save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(JarmError, match=r"has format 2, and this jarm .* install a newer jarm"):
        load_model(tmp_path / "model")


def test_what_stands_in_a_folder_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(JarmError, match="holds files already"):
        make(HeadConfig(hidden=())).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_embeddings_that_do_not_fit_are_refused():
    model = make(HeadConfig(hidden=()))
    with pytest.raises(JarmError, match=r"shape \(2, 4\), and this model takes \(n, 5\).*with mine/model"):
        model.score(np.zeros((2, 4)))
    with pytest.raises(JarmError, match="Embedding 1 holds a number that is NaN"):
        model.score(np.array([[0.0] * 5, [np.nan] * 5]))


@pytest.mark.parametrize("text", ["", "average", "lower", "mean:1", "quantile:2", "lower:x", "lower:-1"])
def test_unknown_aggregates_are_refused(text):
    with pytest.raises(JarmError):
        read_aggregate(text)
