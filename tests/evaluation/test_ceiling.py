import dataclasses

import numpy as np
import pytest

from jarm.core import within
from jarm.core.tables import ResponseTable, TrainTest
from jarm.data.metric import Within, within_metric
from jarm.data.standardise import standardised
from jarm.evaluation import ceiling
from jarm.evaluation.ceiling import RIDGES, fit_linear, linear_scores
from jarm.evaluation.metrics import reference_lines

PROMPTS, WIDTH, D = 12, 5, 7


def make_tables(seed=0, d=D):
    """Ragged tables with large offsets of prompts, one prompt of a single response, and gold linear but for noise."""
    rng = np.random.default_rng(seed)
    store = rng.normal(size=(PROMPTS, WIDTH, d)) * np.geomspace(3, 0.3, d) + 20 * rng.normal(size=(PROMPTS, 1, d))
    gold = store @ rng.normal(size=d) + 5 * rng.normal(size=(PROMPTS, 1)) + rng.normal(size=(PROMPTS, WIDTH))
    mask = np.ones((PROMPTS, WIDTH), bool)
    mask[2, 3:] = mask[5, 1:] = mask[10, :2] = False
    rows = np.arange(PROMPTS * WIDTH).reshape(PROMPTS, WIDTH)
    table = ResponseTable(store.reshape(-1, d).astype(np.float32), rows, mask, gold=np.where(mask, gold, 0))
    return TrainTest(table.take(np.arange(9)), table.take(np.arange(9, 12)))


def by_prompt(table):
    """Embeddings and gold less the mean of their prompt, prompt by prompt."""
    prompts = zip(np.float64(table.embeddings()), table.gold, table.mask, strict=True)
    return [(e[real] - e[real].mean(axis=0), y[real] - y[real].mean()) for e, y, real in prompts]


def ridge64(prompts, penalty):
    """Weights by least squares on the rows, and a row for each weight that the ridge draws to 0."""
    rows, gold = (np.concatenate(each) for each in zip(*prompts, strict=True))
    d = rows.shape[1]
    return np.linalg.lstsq(np.vstack([rows, np.sqrt(penalty) * np.eye(d)]), np.append(gold, np.zeros(d)))[0]


@pytest.mark.parametrize("d", [D, 60])  # fewer dimensions than responses, and more
@pytest.mark.parametrize("chunk", [1, within.CHUNK])
def test_the_ceiling_is_the_ridge_regression_that_predicts_prompts_left_out_best(d, chunk, monkeypatch):
    monkeypatch.setattr(within, "CHUNK", chunk)
    train = make_tables(d=d).train
    fits, prompts = fit_linear(train), by_prompt(train)
    rows = np.concatenate([each for each, _ in prompts])
    largest = np.linalg.svd(rows, compute_uv=False)[0] ** 2
    errors = []
    for penalty in RIDGES * largest:
        error = 0.0
        for at, (left_out, gold) in enumerate(prompts):
            error += np.square(gold - left_out @ ridge64(prompts[:at] + prompts[at + 1 :], penalty)).sum()
        errors.append(error)
    np.testing.assert_allclose(fits.errors, errors, rtol=1e-6)
    assert 0 < np.argmin(errors) < len(RIDGES) - 1
    np.testing.assert_allclose(fits.ridge, RIDGES[np.argmin(errors)] * largest, rtol=1e-9)
    np.testing.assert_allclose(fits.ceiling, ridge64(prompts, fits.ridge), rtol=1e-6, atol=1e-9)


def test_the_first_component_is_that_of_an_explicit_decomposition_with_the_sign_of_gold():
    train = make_tables().train
    found, prompts = fit_linear(train).first_component, by_prompt(train)
    rows, gold = (np.concatenate(each) for each in zip(*prompts, strict=True))
    direction = np.linalg.svd(rows)[2][0]
    np.testing.assert_allclose(found, direction * np.sign(gold @ rows @ direction), rtol=1e-9)
    turned = fit_linear(dataclasses.replace(train, gold=-train.gold))
    np.testing.assert_array_equal(turned.first_component, -found)


def test_scores_are_of_standardised_embeddings_whatever_the_metric():
    """A metric may keep less than a ceiling has to know."""
    tables = standardised(make_tables())
    fits, scores = fit_linear(tables.train), linear_scores(within_metric(tables, Within(2.0, 4)))
    for name, weights in (("first component", fits.first_component), ("ceiling", fits.ceiling)):
        np.testing.assert_allclose(scores[name], tables.test.embeddings() @ weights, rtol=1e-9)
    lines = reference_lines(tables.test, scores=scores)
    assert lines.keys() == {"oracle", "mean response", "first component", "ceiling"}
    assert lines["ceiling"]["spearman"] > lines["first component"]["spearman"] > 0
    assert "nll" not in lines["ceiling"]


def test_where_nothing_can_be_fitted_there_are_no_lines(monkeypatch):
    tables = make_tables()
    single = dataclasses.replace(tables.train, mask=tables.train.mask & (np.arange(WIDTH) == 2))
    ties = dataclasses.replace(tables.train, gold=np.full(tables.train.mask.shape, 0.1))
    copies = dataclasses.replace(tables.train, rows=np.repeat(tables.train.rows[:, :1], WIDTH, axis=1))
    for train in (single, ties, copies):
        assert linear_scores(tables._replace(train=train)) == {}
    monkeypatch.setattr(ceiling, "MAX_WIDTH", D - 1)
    assert linear_scores(tables) == {}
