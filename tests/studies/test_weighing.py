"""Teachers weighed by labels: evidence against its integral, planted teachers found again, unreadable labels."""

import json

import numpy as np
import pytest

from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable, TrainTest
from jarm.data.tables import load_table
from jarm.data.teachers import Teacher, draw_gold, family, pair_covariance, teacher_space
from jarm.studies.weighing import Pairs, allocate, log_evidence, margin_evidence, read_labels, teacher_weights

PROMPTS, WIDTH, D = 60, 6, 12


@pytest.fixture(scope="module")
def space():
    rng = np.random.default_rng(0)
    store = (rng.normal(size=(PROMPTS * WIDTH, D)) * np.geomspace(3, 1, D)).astype(np.float32)
    rows = np.arange(PROMPTS * WIDTH).reshape(PROMPTS, WIDTH)
    table = ResponseTable(store, rows, np.ones(rows.shape, bool))
    return teacher_space(TrainTest(table.take(np.arange(50)), table.take(np.arange(50, 60))))


def some_pairs(count, seed=0):
    """Pairs within prompts, some of them labelled twice."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 50, count) * WIDTH
    first = rng.integers(0, WIDTH, count)
    second = (first + rng.integers(1, WIDTH, count)) % WIDTH
    return prompt + first, prompt + second


def labelled(space, teacher, count, seed):
    """Labels of pairs by a draw of a teacher."""
    rng = np.random.default_rng([7, seed])
    first, second = some_pairs(count, seed)
    gold = np.concatenate([each.reshape(-1) for each in draw_gold(space, teacher, rng)])
    chance = 1 / (1 + np.exp(-teacher.noise * (gold[first] - gold[second]).astype(np.float64)))
    return Pairs(first, second, (rng.uniform(size=count) < chance).astype(np.float64))


@pytest.mark.parametrize("noise", [0.5, 4.0])
def test_evidence_is_the_integral_over_three_margins(space, noise):
    """By quadrature over a grid; a pair labelled twice, both ways, is one margin less."""
    teacher = Teacher("linear:2", unlearnable=0.75, noise=noise)
    labels = labelled(space, teacher, 3, 1)
    covariance = noise**2 * pair_covariance(space, teacher, labels.first, labels.second)
    grid = np.linspace(-7, 7, 121)
    z = np.stack(np.meshgrid(grid, grid, grid, indexing="ij"), axis=-1).reshape(-1, 3)
    weights = np.exp(-(z**2).sum(axis=1) / 2)
    margins = z @ np.linalg.cholesky(covariance).T

    def exact(label):
        likelihood = 1 / (1 + np.exp(np.where(label == 1, -1, 1) * margins))
        return np.log(weights @ likelihood.prod(axis=1) / weights.sum())

    for label in ([1, 1, 1], [1, 0, 1], [0, 0, 1]):
        found = log_evidence(space, teacher, labels._replace(label=np.array(label, float)))
        assert found == pytest.approx(exact(np.array(label)), abs=3e-3), label
    twice = np.kron(np.ones((2, 2)), covariance[:1, :1])
    p = 1 / (1 + np.exp(-np.sqrt(covariance[0, 0]) * grid))
    one = np.exp(-(grid**2) / 2)
    assert margin_evidence(twice, np.array([1.0, 0.0])) == pytest.approx(
        np.log(one @ (p * (1 - p)) / one.sum()), abs=3e-3
    )


@pytest.mark.parametrize("noise", [0.5, 4.0])
def test_evidence_is_that_of_the_draws_of_a_forecast(space, noise):
    """Its margins have the variance of the draws', and it is their mean likelihood: no draw has a scale of its own."""
    teacher = Teacher("linear:6", unlearnable=0.25, offsets=0.0, noise=noise)
    first, second = some_pairs(4)
    draws = [draw_gold(space, teacher, np.random.default_rng(seed))[0].reshape(-1) for seed in range(3000)]
    margins = noise * (np.array(draws, np.float64)[:, first] - np.array(draws, np.float64)[:, second])
    variance = noise**2 * np.diag(pair_covariance(space, teacher, first, second))
    np.testing.assert_allclose(np.square(margins).mean(axis=0), variance, rtol=0.1)  # noise: .026
    for label in (np.array([1.0, 1, 1, 1]), np.array([0.0, 0, 1, 1])):
        likelihood = (1 / (1 + np.exp(np.where(label == 1, -1, 1) * margins))).prod(axis=1)
        error = likelihood.std() / np.sqrt(len(likelihood))
        assert np.exp(log_evidence(space, teacher, Pairs(first, second, label))) == pytest.approx(
            likelihood.mean(), abs=4 * error
        )


def test_evidence_of_one_label_is_that_of_a_coin(space):
    for noise in (0.5, 4.0):
        pair = Pairs(np.array([0]), np.array([1]), np.array([1.0]))
        assert log_evidence(space, Teacher("linear:2", noise=noise), pair) == pytest.approx(np.log(0.5), abs=1e-6)


@pytest.mark.parametrize("planted", [0.5, 4.0])
def test_the_noise_that_made_labels_has_the_most_evidence(space, planted):
    """On average over draws of the model itself; Laplace's method loses 3 nats here and more."""
    rng = np.random.default_rng(0)
    labels = labelled(space, Teacher("linear:3", noise=planted), 60, 0)
    levels = {noise: Teacher("linear:3", unlearnable=0.75, noise=noise) for noise in (0.5, 1.0, 2.0, 4.0)}
    unit = pair_covariance(space, levels[1.0], labels.first, labels.second)
    root = np.linalg.cholesky(unit + 1e-9 * np.eye(len(unit)))
    found = dict.fromkeys(levels, 0.0)
    for _ in range(12):
        margins = planted * root @ rng.normal(size=len(unit))
        label = (rng.random(len(unit)) < 1 / (1 + np.exp(-margins))).astype(float)
        for noise in levels:
            found[noise] += margin_evidence(noise**2 * unit, label)
    assert max(found, key=found.get) == planted, found


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("planted", "name"),
    [
        (Teacher("linear:6", unlearnable=0.25, offsets=0.0, noise=4.0), "shape"),
        (Teacher("linear:1", unlearnable=0.75, offsets=1.0, noise=0.5), "noise"),
        (Teacher("linear:3", unlearnable=0.25, offsets=0.0, noise=4.0), "noise"),
    ],
)
def test_labels_find_the_family_that_made_them(space, planted, name):
    """The level of the planted teacher gets more weight than before, on average over draws, and far levels less."""
    teachers = family(length=False)
    weights = np.mean(
        [teacher_weights(space, teachers, labelled(space, planted, 120, seed)) for seed in range(2)], axis=0
    )
    levels = list(dict.fromkeys(getattr(teacher, name) for teacher in teachers))
    share = {
        level: sum(w for w, t in zip(weights, teachers, strict=True) if getattr(t, name) == level) for level in levels
    }
    assert weights.sum() == pytest.approx(1)
    assert share[getattr(planted, name)] > 1.3 / len(levels), share
    far = "linear:1" if name == "shape" else 4.5 - planted.noise  # the other end
    assert share[far] < 0.6 / len(levels), share


def test_without_labels_all_teachers_are_as_likely(space):
    assert set(teacher_weights(space, family(length=False), None)) == {1 / 120}


@pytest.mark.parametrize("draws", [7, 40, 400])
def test_draws_stand_for_the_weights(draws):
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(40, 0.3))
    which, importance = allocate(family(length=False)[:40], weights, draws, seed=1)
    assert which.shape == importance.shape == (draws,)
    counts, expected = np.bincount(which, minlength=40), draws * (0.5 * weights + 0.5 / 40)
    assert (np.abs(counts - expected) < 1).all()
    if draws == 400:
        np.testing.assert_allclose(np.bincount(which, importance, 40) / draws, weights, atol=2.5 / 400)


def test_equal_weights_share_draws_evenly():
    """So many draws for each teacher; of few draws, as many for each shape with each noise."""
    teachers = family(length=False)
    weights = np.full(len(teachers), 1 / len(teachers))
    which, importance = allocate(teachers, weights, 3 * len(teachers), seed=0)
    assert (np.bincount(which) == 3).all()
    np.testing.assert_allclose(importance, 1)
    some, _ = allocate(teachers, weights, 20, seed=0)
    assert len({(teachers[at].shape, teachers[at].noise) for at in some}) == 20


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    rows = [{"prompt_id": p % 8, "split": "test" if p % 8 > 5 else "train"} for p in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    np.save(folder / "rows.npy", np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32))
    return folder, load_table(folder / "rows.jsonl", folder / "rows.npy", None)


def write(folder, *lines):
    path = folder / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_labels_name_rows_of_the_table(table):
    folder, tables = table
    labels = read_labels(
        write(folder, {"first": 9, "second": 1, "label": 1}, {"first": 6, "second": 22, "label": 0.25}), tables
    )
    # Rows 1, 9 and 17 are prompt 1 of the training side; 6, 14, 22 the first prompt of the test side, after 6 x 3.
    np.testing.assert_array_equal(labels.first, [4, 18])
    np.testing.assert_array_equal(labels.second, [3, 20])
    np.testing.assert_array_equal(labels.label, [1, 0.25])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            {"first": 24, "second": 1, "label": 1},
            r"row 1: first is 24, and the responses of the table are numbered 0 to 23",
        ),
        ({"first": 0, "second": 1.5, "label": 1}, r"row 1: second is 1\.5"),
        ({"first": 3, "second": 3, "label": 1}, r"row 1: label 1 of the pair 3, 3: give two responses"),
        ({"first": 3, "second": 4, "label": 2}, r"row 1: label 2 of the pair 3, 4: give two responses, and a probab"),
        ({"first": 3, "second": 4}, r"label is None in row 1: give a number"),
    ],
)
def test_labels_that_cannot_be_read_are_one_sentence(table, line, sentence):
    folder, tables = table
    with pytest.raises(JarmError, match=sentence):
        read_labels(write(folder, {"first": 0, "second": 8, "label": 1}, line), tables)


def test_labels_need_their_columns_and_a_table(table, space):
    folder, tables = table
    path = write(folder, {"chosen": 0, "rejected": 8})
    with pytest.raises(JarmError, match=r"has no column 'first': give first, second and label"):
        read_labels(path, tables)
    with pytest.raises(JarmError, match=r"numbers the responses of a table beside an \.npy"):
        read_labels(path, space.tables)
