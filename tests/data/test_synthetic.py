"""The synthetic tables: deterministic, shaped as stated, with the mechanisms it claims and no help to any rule."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import spearmanr

from jarm.core.status import JarmError
from jarm.data.synthetic import VARIANTS, SyntheticConfig, synthetic

SMALL = SyntheticConfig(train=30, test=20, responses=6, test_responses=8, width=12)
LARGE = SyntheticConfig(train=3000, test=2, responses=10)


def centred(table):
    values = table.embeddings().astype(np.float64)
    return values - values.mean(axis=1, keepdims=True)


def within_spearman(gold, scores):
    return np.mean([spearmanr(*pair).statistic for pair in zip(gold, scores, strict=True)])


def test_shapes_and_dtypes():
    train, test = synthetic(3, SMALL)
    assert train.shape == (30, 6, 12)
    assert test.shape == (20, 8, 12)
    for table in (train, test):
        assert table.store.dtype == table.gold.dtype == np.float32
        assert table.mask.all()
        assert np.isfinite(table.store).all()
        assert np.isfinite(table.gold).all()
        assert set(table.attributes) == {"length", "position", "prompt_cosine"}
        assert all(each.dtype == np.float32 and each.shape == table.gold.shape for each in table.attributes.values())
    assert train.provenance["seed"] == 3
    assert train.provenance["width"] == 12
    assert (train.provenance["split"], test.provenance["split"]) == ("train", "test")


def test_the_seed_decides_everything():
    one, same, other = synthetic(1, SMALL), synthetic(1, SMALL), synthetic(2, SMALL)
    for a, b, c in zip(one, same, other, strict=True):
        np.testing.assert_array_equal(a.store, b.store)
        np.testing.assert_array_equal(a.gold, b.gold)
        assert not np.isclose(a.gold, c.gold).any()


def test_default_is_the_default_variant():
    np.testing.assert_array_equal(synthetic().train.gold, synthetic(0, VARIANTS["default"]).train.gold)


def test_spectrum_falls_as_the_power_says():
    centre_free = centred(synthetic(0, dataclasses.replace(LARGE, copies=0.0)).train).reshape(-1, LARGE.width)
    values = np.sort(np.linalg.eigvalsh(np.cov(centre_free.T)))[::-1]
    slope = np.polyfit(np.log(np.arange(1, LARGE.width + 1)), np.log(values), 1)[0]
    assert slope == pytest.approx(-LARGE.power, abs=0.05)


def test_scales_of_embeddings_and_gold():
    train = synthetic(0, dataclasses.replace(LARGE, copies=0.0, spread=0.0, topics=2000)).train
    within = centred(train).var(axis=1, ddof=1).mean()
    assert within == pytest.approx(1 - LARGE.between, rel=0.05)
    assert train.store.var(axis=0).mean() == pytest.approx(1, rel=0.15)
    assert np.sqrt(train.gold.var(axis=1).mean()) == pytest.approx(1, rel=1e-5)


def test_gold_has_the_shares_it_says():
    """A regression on the teacher's parts leaves `unseen` unexplained; the first direction alone explains `lead`."""
    config = SyntheticConfig(
        train=3000, test=2, width=8, copies=0.0, frequency=0.0, products=0.0, lead=0.3, unseen=0.7 - 1e-9
    )
    train = synthetic(0, config).train
    x, gold = centred(train).reshape(-1, 8), (train.gold - train.gold.mean(axis=1, keepdims=True)).reshape(-1)
    explained = gold @ x @ np.linalg.solve(x.T @ x, x.T @ gold) / (gold @ gold)
    assert explained == pytest.approx(0.3, abs=0.02)
    directions = np.linalg.eigh(x.T @ x)[1]
    assert np.corrcoef(x @ directions[:, -1], gold)[0, 1] ** 2 == pytest.approx(0.3, abs=0.02)


def test_huge_coordinates_are_only_larger():
    plain, huge = (synthetic(0, dataclasses.replace(SMALL, huge=huge)).train for huge in (0, 2))
    np.testing.assert_allclose(huge.store[:, :2], 30 + 10 * plain.store[:, :2], rtol=1e-6)
    np.testing.assert_array_equal(huge.store[:, 2:], plain.store[:, 2:])
    np.testing.assert_array_equal(huge.gold, plain.gold)


def test_the_variant_of_hidden_states_resembles_them():
    train = synthetic(0, VARIANTS["hidden"]).train
    second_moment = np.square(train.store.astype(np.float64)).mean(axis=0)
    assert second_moment[:3].sum() > 0.9 * second_moment.sum()  # raw, as hidden states of decoders
    scaled = dataclasses.replace(train, store=(train.store - train.store.mean(axis=0)) / train.store.std(axis=0))
    values = np.linalg.eigvalsh(np.cov(centred(scaled).reshape(-1, 128).T))
    assert 20 < values.sum() ** 2 / np.square(values).sum() < 80  # Gemma 3 270M has 41 and 47
    assert 0.15 < values.sum() / 128 < 0.45  # and .17 and .44


def test_offsets_move_whole_prompts_only():
    alike = [synthetic(0, dataclasses.replace(SMALL, offset=offset)).train.gold for offset in (0.0, 2.0)]
    moved = alike[1] - alike[0]
    np.testing.assert_allclose(moved, np.broadcast_to(moved[:, :1], moved.shape), atol=1e-5)
    assert moved[:, 0].std() > 1


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_stated_share_of_near_copies(share):
    table = synthetic(0, dataclasses.replace(SMALL, responses=10, copies=share, copy_noise=1e-3)).train
    e = table.embeddings().astype(np.float64)
    distance = np.linalg.norm(e[:, :, None] - e[:, None], axis=-1)
    near = np.triu(distance < 0.01, k=1)
    for prompt in near:
        distinct = 10
        seen = np.zeros(10, bool)
        for first, second in np.argwhere(prompt):
            distinct -= not seen[second]
            seen[second] = True
            assert first < second
        assert 10 - distinct == round(share * 10)


def test_a_copy_is_worth_about_what_its_source_is_worth():
    table = synthetic(0, dataclasses.replace(SMALL, copies=0.5, copy_noise=1e-3)).train
    e = table.embeddings().astype(np.float64)
    distance = np.linalg.norm(e[:, :, None] - e[:, None], axis=-1)
    prompt, first, second = np.argwhere((distance < 0.01) & (distance > 0)).T
    assert np.abs(table.gold[prompt, first] - table.gold[prompt, second]).max() < 0.05


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_attributes_are_weak(variant):
    test = synthetic(0, VARIANTS[variant]).test
    values = {name: within_spearman(test.gold, scores) for name, scores in test.attributes.items()}
    assert 0.2 < values["length"] < 0.4
    assert abs(values["position"]) < 0.1
    assert abs(values["prompt_cosine"]) < 0.3


def test_gold_is_not_linear_in_the_embedding():
    """A least-squares fit of within-prompt differences, on plentiful noiseless data, leaves a share unexplained."""
    train = synthetic(0, LARGE).train
    x, y = centred(train).reshape(-1, LARGE.width), train.gold - train.gold.mean(axis=1, keepdims=True)
    residual = np.linalg.lstsq(x, y.reshape(-1).astype(np.float64), rcond=None)[1][0] / np.sum(
        y.astype(np.float64) ** 2
    )
    assert 0.2 < residual < 0.7


def test_outliers_say_nothing_of_their_gold():
    config = dataclasses.replace(VARIANTS["outliers"], train=3000, test=2, products=0.0, outliers=0.5, far=4.0)
    x = centred(synthetic(0, config).train)
    train = synthetic(0, config).train
    y = (train.gold - train.gold.mean(axis=1, keepdims=True)).astype(np.float64)
    far = np.linalg.norm(x, axis=-1) > 2.5 * np.sqrt(config.width * (1 - config.between))
    assert far.mean() == pytest.approx(0.5, abs=0.05)

    def explained(rows):
        solution = np.linalg.lstsq(x[rows], y[rows], rcond=None)[0]
        return 1 - np.sum((x[rows] @ solution - y[rows]) ** 2) / np.sum(y[rows] ** 2)

    assert explained(far) < 0.03
    assert explained(~far) > 0.3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"responses": 1}, "SyntheticConfig.responses is 1"),
        ({"test": 0}, "SyntheticConfig.test is 0"),
        ({"copies": 1.5}, "SyntheticConfig.copies is 1.5"),
        ({"copies": 1.0}, "leaves no original"),
        ({"spread": -1.0}, "SyntheticConfig.spread is -1.0"),
        ({"lead": 0.5, "unseen": 0.5}, "leave nothing of gold to the teacher"),
    ],
)
def test_impossible_settings_are_refused(change, words):
    with pytest.raises(JarmError, match=words):
        synthetic(0, dataclasses.replace(SMALL, **change))
