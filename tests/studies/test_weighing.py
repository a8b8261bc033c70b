"""Teachers weighed by labels: evidence in float64, a planted teacher found again, and labels that cannot be read."""

import json

import numpy as np
import pytest
import scipy.optimize
from numpy.polynomial.hermite_e import hermegauss

from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable, TrainTest
from jarm.data.tables import load_table
from jarm.data.teachers import Teacher, draw_gold, family, pair_covariance, teacher_space
from jarm.studies.weighing import Pairs, allocate, log_evidence, read_labels, teacher_weights

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


def laplace(covariance, label):
    """Log evidence by Laplace's method on the margins, by a general minimiser; float64."""
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))

    def loss(w):
        margin = root @ w
        return np.sum(np.logaddexp(0, margin) - label * margin) + w @ w / 2

    def slope(w):
        return root.T @ (1 / (1 + np.exp(-root @ w)) - label) + w

    found = scipy.optimize.minimize(loss, np.zeros(len(label)), jac=slope, method="BFGS", options={"gtol": 1e-9})
    p = 1 / (1 + np.exp(-root @ found.x))
    hessian = np.eye(len(label)) + (root * (p * (1 - p))[:, None]).T @ root
    return -found.fun - np.linalg.slogdet(hessian)[1] / 2


@pytest.mark.parametrize("teacher", [Teacher("linear:1", noise=4.0), Teacher("rbf:1", unlearnable=0.25, noise=0.5)])
def test_evidence_is_laplace_of_the_margins(space, teacher):
    labels = labelled(space, teacher, 40, 1)
    labels = Pairs(
        *(np.concatenate([each, each[:3]]) for each in labels)
    )  # a pair labelled twice has no root by Cholesky
    covariance = teacher.noise**2 * pair_covariance(space, teacher, labels.first, labels.second)
    assert log_evidence(space, teacher, labels) == pytest.approx(laplace(covariance, labels.label), abs=2e-3)


def test_evidence_of_one_label_is_near_its_integral(space):
    teacher = Teacher("linear:2", noise=1.0)
    pair = Pairs(np.array([0]), np.array([1]), np.array([1.0]))
    deviation = np.sqrt(pair_covariance(space, teacher, pair.first, pair.second)[0, 0])
    nodes, weights = hermegauss(60)
    exact = np.log(np.sum(weights / (1 + np.exp(-deviation * nodes))) / np.sqrt(2 * np.pi))
    assert exact == pytest.approx(np.log(0.5))
    assert log_evidence(space, teacher, pair) == pytest.approx(exact, abs=0.03)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("planted", "name"),
    [
        (Teacher("linear:6", unlearnable=0.25, offsets=0.0, noise=4.0), "shape"),
        (Teacher("linear:1", unlearnable=0.75, offsets=1.0, noise=0.5), "noise"),
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
    far = "linear:1" if name == "shape" else 4.0
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
        ({"first": 3, "second": 4}, r"label is missing or no number in some row"),
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
