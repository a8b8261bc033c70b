"""`jarm diff`: distances, orders and the widest pairs are their definitions, by loops in float64."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from jarm.cli import main
from jarm.core.status import JarmError
from jarm.data.store import key_of
from jarm.data.writer import StoreWriter
from jarm.export.model import RewardModel
from jarm.report.disagreement import agreement, reward_distance, widest
from jarm.reward.config import HeadConfig
from jarm.studies.diff import DiffConfig, diff, shortened


def scores(seed, sizes=(1, 2, 3, 5, 5, 9)):
    """Two rewards with ties, and prompts whose responses stand anywhere."""
    rng = np.random.default_rng(seed)
    prompts = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    a, b = rng.integers(0, 5, (2, len(prompts))).astype(float)
    return a, a + b, prompts


def canonical_by_loops(rewards, prompts):
    middle = np.array(
        [reward - rewards[prompts == prompt].mean() for reward, prompt in zip(rewards, prompts, strict=True)]
    )
    return middle / math.sqrt(sum(each**2 for each in middle))


@pytest.mark.parametrize("seed", range(3))
def test_the_distance_is_half_that_of_the_normalised_rewards(seed):
    a, b, prompts = scores(seed)
    found = reward_distance(a, b, prompts)
    s, t = canonical_by_loops(a, prompts), canonical_by_loops(b, prompts)
    assert found.distance == pytest.approx(math.sqrt(sum((s - t) ** 2)) / 2)
    assert found.distance == pytest.approx(math.sqrt((1 - s @ t) / 2))
    assert found.correlation == pytest.approx(s @ t)
    assert found.a == pytest.approx(s * math.sqrt(len(s)))
    assert found.distance == pytest.approx(reward_distance(b, a, prompts).distance)


def test_the_distance_knows_no_offsets_of_prompts_and_no_factor():
    a, b, prompts = scores(0)
    offsets = np.random.default_rng(1).normal(size=prompts.max() + 1)
    found = reward_distance(2 * a + offsets[prompts], 0.1 * b - 3 * offsets[prompts], prompts).distance
    assert found == pytest.approx(reward_distance(a, b, prompts).distance)
    assert reward_distance(a, a, prompts).distance == pytest.approx(0, abs=1e-15)
    assert reward_distance(a, 1 - a, prompts).distance == pytest.approx(1)
    c = a[::-1].copy()  # any three obey the triangle's inequality
    assert reward_distance(a, c, prompts).distance <= found + reward_distance(b, c, prompts).distance + 1e-12


def test_a_reward_that_is_the_same_within_prompts_is_half_way():
    a, _, prompts = scores(0)
    found = reward_distance(a, 0.1 * prompts, prompts)
    assert found.distance == pytest.approx(0.5)
    assert math.isnan(found.correlation)
    assert math.isnan(reward_distance(0.1 * prompts, np.ones(len(a)) / 3, prompts).distance)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_within_prompts_are_counted_one_by_one(seed):
    a, b, prompts = scores(seed)
    found = agreement(a, b, prompts)
    alike, tied, pairs = [], {"a": 0, "b": 0, "both": 0}, 0
    for i, j in itertools.combinations(range(len(a)), 2):
        if prompts[i] == prompts[j]:
            pairs += 1
            if a[i] != a[j] and b[i] != b[j]:
                alike.append((a[i] > a[j]) == (b[i] > b[j]))
            else:
                tied["both" if a[i] == a[j] and b[i] == b[j] else "a" if a[i] == a[j] else "b"] += 1
    assert found["agreement"]["mean"] == pytest.approx(np.mean(alike))
    assert found["agreement"]["low"] < np.mean(alike) < found["agreement"]["high"]
    assert (found["pairs"], found["tied"]) == (pairs, tied)


def test_without_an_ordered_pair_there_is_no_agreement():
    found = agreement(np.ones(4), np.arange(4.0), np.array([0, 0, 1, 1]))
    assert math.isnan(found["agreement"]["mean"])
    assert found["tied"] == {"a": 2, "b": 0, "both": 0}


@pytest.mark.parametrize("seed", range(3))
def test_the_widest_pair_of_each_prompt_is_found(seed):
    a, b, prompts = scores(seed)
    pairs, widths = widest(a, b, prompts, 100)
    by_loops = {}
    for i, j in itertools.permutations(range(len(a)), 2):
        if prompts[i] == prompts[j]:
            width = (a[i] - a[j]) - (b[i] - b[j])
            by_loops[prompts[i]] = max(width, by_loops.get(prompts[i], 0))
    expected = sorted((width for width in by_loops.values() if width > 0), reverse=True)
    assert widths.tolist() == expected
    for (i, j), width in zip(pairs, widths, strict=True):
        assert prompts[i] == prompts[j]
        assert (a[i] - a[j]) - (b[i] - b[j]) == width == by_loops[prompts[i]]
    assert len(widest(a, b, prompts, 2)[0]) == 2
    assert len(widest(a, a, prompts, 2)[0]) == 0


def save(folder, kernel):
    params = {"out": {"kernel": np.array([[[each] for each in kernel]], np.float32)}}
    RewardModel(HeadConfig(hidden=()), params, np.zeros(1, np.float32)).save(folder)
    return str(folder)


@pytest.fixture
def files(tmp_path):
    """Two models, responses, their embeddings, and options for all of them."""
    a, b, prompts = scores(0)
    rows = [{"prompt": f"p{p}", "response": f"r{n}"} for n, p in enumerate(prompts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(tmp_path / "rows.npy", np.stack([a, b], axis=1))
    models = {"a": save(tmp_path / "a", [1, 0]), "b": save(tmp_path / "b", [0, 2])}
    return {**models, "data": str(tmp_path / "rows.jsonl"), "embeddings": str(tmp_path / "rows.npy")}


def test_two_models_on_a_file(files, tmp_path):
    found = diff(DiffConfig(**files, show=2, out=tmp_path / "diff.json"))
    assert json.loads((tmp_path / "diff.json").read_text()) == found
    a, b, prompts = scores(0)
    own = np.bincount(prompts)[prompts] > 1
    assert (found["responses"], found["prompts"], found["prompts_of_one"]) == (24, 5, 1)
    # The prompt of one response is centred to 0, so that it adds nothing.
    assert found["distance"] == pytest.approx(reward_distance(a, b, prompts).distance)
    assert found["pairs"] == agreement(a, b, prompts)["pairs"]
    values = [stats.spearmanr(a[prompts == p], b[prompts == p])[0] for p in set(prompts[own].tolist())]
    assert found["spearman"]["mean"] == pytest.approx(np.mean([value for value in values if not math.isnan(value)]))
    first, second = found["differ"]
    assert first["width"] >= second["width"] > 0
    at = int(first["first"]["place"].removeprefix("line ")) - 1
    assert first["first"] == {"place": f"line {at + 1}", "text": f"r{at}", "a": a[at], "b": 2 * b[at]}
    assert first["prompt"] == f"p{prompts[at]}"


def test_a_second_model_may_read_other_embeddings(files, tmp_path):
    a, b, prompts = scores(0)
    save(tmp_path / "wide", [0, 0, 1])
    other = {"model": "tiny", "template": "{prompt}\n\n{response}", "weights": "ab"}
    with StoreWriter(tmp_path / "store", 3, other, dtype="float32") as writer:
        keys = [key_of(f"p{p}\n\nr{n}") for n, p in enumerate(prompts)]
        writer.append(keys, np.stack([0 * a, 0 * a, b], axis=1).astype(np.float32))
    options = {**files, "b": str(tmp_path / "wide")}
    with pytest.raises(JarmError, match=r"this model takes \(n, 3\)"):
        diff(DiffConfig(**options, out=tmp_path / "diff.json"))
    found = diff(DiffConfig(**options, embeddings_b=str(tmp_path / "store"), out=tmp_path / "diff.json"))
    assert found["distance"] == pytest.approx(reward_distance(a, b, prompts).distance)


def test_the_command_shows_texts_and_obeys_none(files, tmp_path, capsys):
    rows = [{"prompt": "p\x1b[31m", "response": f"{'long ' * 200}{n}\n\x07"} for n in range(3)]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(tmp_path / "odd.npy", np.array([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]]))
    options = {
        **files,
        "data": tmp_path / "odd.jsonl",
        "embeddings": tmp_path / "odd.npy",
        "out": tmp_path / "diff.json",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    assert main(["diff", *words]) == 0
    shown = capsys.readouterr().out
    assert "distance 1.000" in shown
    assert "\x1b" not in shown
    assert r"prompt: p\x1b[31m" in shown
    assert all(len(line) < 400 for line in shown.splitlines())
    assert main(["diff", *words]) == 1
    assert "diff.json stands there already, and stays: give another --out" in capsys.readouterr().err


def test_texts_are_shortened_in_the_middle():
    assert shortened("x" * 300) == "x" * 300
    assert len(shortened("x" * 500)) <= 301
    assert shortened([{"role": "user", "content": "a"}]) == '[{"content":"a","role":"user"}]'


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"embeddings": "nan.npy"}, "nan.npy is NaN or infinite"),
        ({"embeddings": "short.npy"}, r"has shape \(2, 2\), and .* has 25 responses"),
        ({"data": "single.jsonl", "embeddings": "short.npy"}, "every prompt has one response"),
        ({"a": "nowhere"}, "holds no reward model"),
        ({"aggregate": "best"}, "aggregate"),
        ({"show": -1}, "`show` is -1"),
    ],
)
def test_mistakes_of_two_models_get_a_sentence(files, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    np.save("nan.npy", np.full((25, 2), np.nan))
    np.save("short.npy", np.ones((2, 2)))
    (tmp_path / "single.jsonl").write_text('{"prompt": "p", "response": "a"}\n{"prompt": "q", "response": "b"}\n')
    with pytest.raises(JarmError, match=said):
        diff(DiffConfig(**{**files, **options}, out=tmp_path / "diff.json"))
    assert not (tmp_path / "diff.json").exists()
