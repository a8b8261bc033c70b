import dataclasses

import numpy as np
import pytest

from jarm.core import within
from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable, TrainTest
from jarm.data import metric
from jarm.data.datasets import load
from jarm.data.metric import Within, read_metric, within_metric
from jarm.data.standardise import standardised
from jarm.loop.device_table import make_device_table

PROMPTS, WIDTH, D = 9, 4, 6


def make_tables(seed=0, d=D):
    """Ragged tables, with large offsets of prompts and a constant dimension."""
    rng = np.random.default_rng(seed)
    store = rng.normal(size=(PROMPTS * WIDTH, d)) * np.geomspace(1, 10, d) + np.repeat(
        20 * rng.normal(size=(PROMPTS, d)), WIDTH, axis=0
    )
    store[:, 1] = 3.0
    mask = np.ones((PROMPTS, WIDTH), bool)
    mask[2, 3] = mask[5, 1:] = False
    table = ResponseTable(store.astype(np.float32), np.arange(PROMPTS * WIDTH).reshape(PROMPTS, WIDTH), mask)
    return TrainTest(table.take(np.arange(6)), table.take(np.arange(6, 9)))


def of_prompts(table):
    """`[n, d]` float64 embeddings less the mean of their prompt, one by one, of prompts with two responses or more."""
    prompts = zip(np.float64(table.embeddings()), table.mask, strict=True)
    return np.concatenate([e[real] - e[real].mean(axis=0) for e, real in prompts if real.sum() > 1])


@pytest.mark.parametrize(("alpha", "rank"), [(0.0, 3), (1.0, None), (3.0, 2), (2.5, 100)])
def test_the_metric_is_that_of_an_explicit_decomposition(alpha, rank, monkeypatch):
    """Inner products of embeddings, which do not depend on the signs of directions; by SVD of the differences."""
    tables = standardised(make_tables())
    differences = of_prompts(tables.train)
    _, roots, directions = np.linalg.svd(differences / np.sqrt(len(differences)))
    kept = min(rank or D, D - 1)  # a dimension is constant
    scale = (roots[:kept] ** 2 / roots[0] ** 2) ** ((alpha - 1) / 2)
    along = directions[:kept].T * scale
    along /= np.sqrt(np.square(differences @ along).sum(axis=1).mean())
    for chunk in (1, within.CHUNK):  # one prompt at a time, and all
        monkeypatch.setattr(within, "CHUNK", chunk)
        mapped = within_metric(tables, Within(alpha, rank))
        np.testing.assert_allclose(np.square(of_prompts(mapped.train)).sum(axis=1).mean(), 1, rtol=1e-5)
        for side, plain in zip(mapped, tables, strict=True):  # test responses by the map of the training responses
            assert side.shape == (*plain.shape[:2], kept)
            ours, theirs = side.embeddings()[side.mask], np.float64(plain.embeddings()[plain.mask]) @ along
            np.testing.assert_allclose(
                ours @ ours.T, theirs @ theirs.T, rtol=1e-3, atol=1e-4 * np.abs(theirs).max() ** 2
            )
            assert not side.embeddings()[~side.mask].any()


def test_a_second_metric_is_of_the_first_and_standardising_comes_before():
    tables = make_tables()
    sharp = within_metric(tables, Within(2.0, 3))
    round_again = within_metric(sharp, Within(0.0))
    differences = of_prompts(round_again.train)
    np.testing.assert_allclose(differences.T @ differences / len(differences), np.eye(3) / 3, atol=1e-4)
    with pytest.raises(JarmError, match="standardise them first, then make the metric of that"):
        standardised(sharp)


def test_distances_stay_with_alpha_1_and_whitening_makes_them_round():
    tables = make_tables()
    plain, same = of_prompts(tables.train), of_prompts(within_metric(tables, Within(1.0)).train)
    unit = np.square(plain).sum(axis=1).mean()
    np.testing.assert_allclose(same @ same.T, plain @ plain.T / unit, rtol=1e-3, atol=1e-4)
    white = of_prompts(within_metric(tables, Within(0.0)).train)
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(D - 1) / (D - 1), atol=1e-4)


def test_prompts_of_one_response_change_neither_the_metric_nor_the_unit_of_a_prior():
    """They differ from nothing; before, nine such prompts to each other one made a prior twenty times as wide."""
    rng = np.random.default_rng(0)
    store = rng.normal(size=(120, 4)).astype(np.float32)
    rows = np.arange(120).reshape(60, 2)
    both = np.ones((60, 2), bool)
    both[6:, 1] = False
    few = ResponseTable(store, rows[:6], np.ones((6, 2), bool), gold=np.zeros((6, 2), np.float32))
    many = ResponseTable(store, rows, both, gold=np.zeros((60, 2), np.float32))
    maps = [within_metric(TrainTest(table, table), Within(2.0)).train.metric for table in (few, many)]
    np.testing.assert_allclose(*maps, rtol=1e-6)
    units = [float(make_device_table(table, 1.0).spread_within) for table in (few, many)]
    assert units[0] == pytest.approx(units[1], rel=1e-6)


def test_copies_are_found_before_the_map():
    tables = make_tables()
    tables.train.store[1] = tables.train.store[0]
    mapped = within_metric(tables, Within(3.0, 2)).train
    np.testing.assert_array_equal(mapped.alike, tables.train.alike)
    assert mapped.copies[1] == 1


def test_tables_are_loaded_with_a_metric():
    train, test = load("synthetic", metric="within:2:5")
    assert train.shape == (200, 10, 5)
    assert test.shape == (100, 20, 5)
    assert train.provenance["metric"] == {"alpha": 2.0, "rank": 5}
    np.testing.assert_allclose(np.square(of_prompts(train)).sum(axis=1).mean(), 1, rtol=1e-4)
    assert "metric" not in load("synthetic").train.provenance


def test_what_cannot_be_is_a_sentence(monkeypatch):
    for text in ("within", "within:", "within:a", "within:1:b", "within:1:2:3", "auto", "within:1:2.5"):
        with pytest.raises(JarmError, match=f"Cannot read the metric '{text}': write 'none'"):
            read_metric(text)
    for text, wrong in (
        ("within:-1", "ALPHA"),
        ("within:nan", "ALPHA"),
        ("within:11", "ALPHA"),
        ("within:1:0", "RANK"),
    ):
        with pytest.raises(JarmError, match=f"{wrong} of the metric is"):
            read_metric(text)
    tables = make_tables()
    single = tables._replace(train=dataclasses.replace(tables.train, mask=tables.train.mask & (np.arange(WIDTH) == 0)))
    with pytest.raises(JarmError, match="No prompt has two responses with different embeddings, and a metric"):
        within_metric(single, Within(1.0))
    broken = tables._replace(train=dataclasses.replace(tables.train, store=tables.train.store * np.float32(np.nan)))
    with pytest.raises(JarmError, match="is nan in column 0"):
        within_metric(broken, Within(1.0))
    monkeypatch.setattr(metric, "MAX_WIDTH", 5)
    with pytest.raises(JarmError, match="of up to 5 dimensions, and these have 6: project them to fewer"):
        within_metric(tables, Within(1.0))
