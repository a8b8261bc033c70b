"""Teachers against their kernels, written out in float64."""

import dataclasses

import numpy as np
import pytest

from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable, TrainTest
from jarm.data import teachers
from jarm.data.metric import Within, within_metric
from jarm.data.teachers import SHAPES, Teacher, draw_gold, family, pair_covariance, teacher_space

PROMPTS, WIDTH, D = 12, 4, 5


def make_tables(seed=0, *, length=True):
    """Ragged tables with prompts far apart and directions of unequal spread."""
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(PROMPTS * WIDTH, D)) * np.geomspace(1, 4, D)
    store = own + np.repeat(5 * rng.normal(size=(PROMPTS, D)), WIDTH, axis=0)
    mask = np.ones((PROMPTS, WIDTH), bool)
    mask[2, 3] = mask[10, 2:] = False
    rows = np.arange(PROMPTS * WIDTH).reshape(PROMPTS, WIDTH)
    attributes = {"length": np.where(mask, rng.integers(1, 500, mask.shape), 0).astype(np.float32)} if length else {}
    table = ResponseTable(store.astype(np.float32), rows, mask, attributes=attributes)
    return TrainTest(table.take(np.arange(9)), table.take(np.arange(9, 12)))


def centred(space, values):
    """Less the mean of each prompt, one prompt at a time, of mean squared length 1 in training prompts; float64."""
    values, train = np.array(values, np.float64), space.tables.train.mask.size
    for prompt in range(PROMPTS):
        here = (space.prompt == prompt) & space.mask
        values[here] -= values[here].mean(axis=0)
    values[~space.mask] = 0
    return values / np.sqrt(np.square(values[:train]).sum() / space.mask[:train].sum())


def kernel(space, teacher):
    """`[N, N]` covariance of the rewards of a teacher, in units of the standard deviation of all rewards."""
    features, scales = space.features(teacher.shape)
    z = features.astype(np.float64) * scales
    lengths = np.concatenate([np.log1p(table.attributes["length"].reshape(-1)) for table in space.tables])
    longer = centred(space, lengths[:, None])
    told = (1 - teacher.length) * z @ z.T + teacher.length * longer @ longer.T
    same = space.prompt[:, None] == space.prompt[None, :]
    rest = teacher.unlearnable * np.eye(len(z)) + teacher.offsets**2 * same
    return ((1 - teacher.unlearnable) * told + rest) / (1 + teacher.offsets**2)


@pytest.mark.parametrize("alpha", [1, 2, 6])
def test_a_linear_teacher_is_linear_in_the_metric_of_its_alpha(alpha):
    tables = make_tables()
    space = teacher_space(tables)
    features, scales = space.features(f"linear:{alpha}")
    mapped = [table.embeddings().reshape(-1, table.shape[2]) for table in within_metric(tables, Within(alpha))]
    wanted = centred(space, np.concatenate(mapped))
    z = features * scales
    np.testing.assert_allclose(z @ z.T, wanted @ wanted.T, atol=2e-5)


def test_waves_have_a_squared_exponential_kernel(monkeypatch):
    monkeypatch.setattr(teachers, "WAVES", 20_000)
    tables = make_tables()
    space = teacher_space(tables)
    z, _ = space.features("rbf:1")
    x = space.embeddings.astype(np.float64)
    train = x[: tables.train.mask.size][tables.train.mask.reshape(-1)]
    typical = np.mean(np.square(train[:, None] - train[None]).sum(axis=2))
    exact = np.exp(-np.square(x[:, None] - x[None]).sum(axis=2) / (2 * typical))
    exact[~space.mask], exact[:, ~space.mask] = 0, 0
    for prompt in range(PROMPTS):
        here = np.flatnonzero((space.prompt == prompt) & space.mask)
        exact[here] -= exact[here].mean(axis=0)
        exact[:, here] -= exact[:, here].mean(axis=1, keepdims=True)
    count = tables.train.mask.size
    exact /= np.trace(exact[:count, :count]) / space.mask[:count].sum()
    np.testing.assert_allclose(z @ z.T, exact, atol=0.05)


@pytest.mark.parametrize(
    "teacher",
    [Teacher("linear:2", 0.5, 0.25, 1.0), Teacher("rbf:1", 0.0, 0.75, 0.0), Teacher("linear:6", 0.5, 0.5, 0.5)],
)
def test_the_covariance_of_pairs_is_that_of_the_kernel(teacher):
    space, rng = teacher_space(make_tables()), np.random.default_rng(1)
    first, second = rng.choice(np.flatnonzero(space.mask), (2, 40))
    difference = np.zeros((40, len(space.mask)))
    np.add.at(difference, (np.arange(40), first), 1.0)
    np.add.at(difference, (np.arange(40), second), -1.0)
    wanted = difference @ kernel(space, teacher) @ difference.T
    np.testing.assert_allclose(pair_covariance(space, teacher, first, second), wanted, atol=1e-5)


def test_draws_have_the_covariance_of_the_kernel():
    """In its own unit: no draw is scaled by its own deviation. Sampling noise of 2,000 draws is .022 to .032."""
    space, teacher = teacher_space(make_tables()), Teacher("linear:3", 0.5, 0.5, 1.0)
    real = space.mask
    drawn = [
        np.concatenate([each.reshape(-1) for each in draw_gold(space, teacher, np.random.default_rng(seed))])
        for seed in range(2000)
    ]
    values = np.array(drawn, np.float64)
    assert not values[:, ~real].any()
    wanted = kernel(space, teacher)[np.ix_(real, real)]
    found = values[:, real].T @ values[:, real] / len(values)
    scale = np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)))
    np.testing.assert_allclose(found / scale, wanted / scale, atol=0.13)
    assert np.trace(found) == pytest.approx(np.trace(wanted), rel=0.03)


def test_dimensions_are_participation_ratios_and_fall_with_alpha():
    space = teacher_space(make_tables())
    for shape in SHAPES:
        features, scales = space.features(shape)
        z = (features * scales)[: space.tables.train.mask.size].astype(np.float64)
        values = np.linalg.svd(z, compute_uv=False) ** 2
        assert space.dimension(shape) == pytest.approx(values.sum() ** 2 / np.square(values).sum(), rel=1e-4)
    dimensions = [space.dimension(f"linear:{alpha}") for alpha in (1, 2, 3, 6)]
    assert dimensions == sorted(dimensions, reverse=True)


def test_without_lengths_no_teacher_knows_them():
    space = teacher_space(make_tables(length=False))
    assert space.length is None
    assert {teacher.length for teacher in family(length=False)} == {0.0}
    assert len(set(family(length=True))) == 2 * len(family(length=False))


def test_the_same_seed_draws_the_same_and_gold_is_not_read():
    tables = make_tables()
    golden = TrainTest(*(dataclasses.replace(each, gold=np.ones(each.mask.shape, np.float32)) for each in tables))
    draws = [draw_gold(teacher_space(each, 3), Teacher("rbf:1"), np.random.default_rng(5)) for each in (tables, golden)]
    for one, other in zip(*draws, strict=True):
        np.testing.assert_array_equal(one, other)


def test_wide_embeddings_are_refused(monkeypatch):
    monkeypatch.setattr(teachers, "MAX_WIDTH", D - 1)
    with pytest.raises(JarmError, match=r"Teachers are made of embeddings of up to 4 dimensions, and these have 5"):
        teacher_space(make_tables())
