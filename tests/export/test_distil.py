"""A linear model fitted to another: exact where that is linear, honest on its card where it is not."""

import dataclasses

import numpy as np
import pytest
from fixtures.tiny import write_checkpoint
from reward_models import model_on

from jarm.cli import main
from jarm.core.status import JarmError
from jarm.export.aggregate import read_aggregate
from jarm.export.distil import distilled, rank_correlation
from jarm.export.model import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


def rows_of(model, count=600):
    rows = np.random.default_rng(1).normal(size=(count, model.width)).astype(np.float32)
    rows[:, 3] = 7  # a constant number tells nothing
    return rows


def test_of_a_linear_model_it_is_that_model(folder):
    model = model_on(folder, members=3, chat=False)
    linear, rank = distilled(model, rows_of(model))
    found, wanted = (each.score(rows_of(model)) for each in (linear, model))
    assert rank > 0.9999
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-3 * np.ptp(wanted))


def test_what_it_loses_is_measured_on_rows_it_has_not_seen(folder):
    model = dataclasses.replace(
        model_on(folder, head="mlp:16:tanh", chat=False),
        training={"data": "a", "labels": 9, "labels_by": "b", "accuracy": {"mean": 0.9}},
        aggregate=read_aggregate("worst"),
    )
    linear, rank = distilled(model, rows_of(model, 3000))
    fresh = np.random.default_rng(5).normal(size=(3000, model.width)).astype(np.float32)
    fresh[:, 3] = 7
    assert rank == pytest.approx(rank_correlation(linear.score(fresh), model.score(fresh)), abs=0.06)
    assert "accuracy" not in linear.training


def test_the_command_says_the_loss_and_the_card_claims_nothing_else(folder, tmp_path, capsys):
    model = dataclasses.replace(model_on(folder, head="mlp:6", chat=False), training={"labels": 9, "labels_by": "b"})
    model.save(tmp_path / "model")
    np.save(tmp_path / "rows.npy", rows_of(model))
    words = ["export", "--model", str(tmp_path / "model"), "--to", "numpy", "--distil", str(tmp_path / "rows.npy")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "to a correlation of" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a linear model fitted to the rewards of a mlp:6:gelu head, which had 9 labels (b)" in card
    assert "how right it is was not measured" in card
    assert load_model(tmp_path / "model").head.hidden


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:20], "cannot be fitted to the rewards of 20 embeddings: give 50 or more"),
        (lambda rows: rows[:, :5], r"shape \(600, 5\), and this model takes"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(folder, change, said):
    model = model_on(folder, head="mlp:6", chat=False)
    with pytest.raises(JarmError, match=said):
        distilled(model, change(rows_of(model)))
