"""`jarm train` and `jarm score`: a planted reward is found, and what is said of it is what pairs say."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from jarm.cli import main
from jarm.core.status import JarmError
from jarm.data.pairs import load_pairs
from jarm.data.store import fill, key_of
from jarm.data.writer import StoreWriter
from jarm.export.model import load_model
from jarm.report.held_out import calibrate, held_out
from jarm.studies.score import ScoreConfig, score
from jarm.studies.train import TrainConfig, drawn_pairs, read_pairs, train

TEMPLATE = "{prompt}\n\n{response}"
D = 6
DIRECTION = np.float32([2, -1, 0, 0, 1, 0])


def embedding(text):
    return np.random.default_rng(list(text.encode())).normal(size=D).astype(np.float32)


def reward(prompt, response):
    return float(embedding(fill(TEMPLATE, {"prompt": prompt, "response": response})) @ DIRECTION)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs in three layouts, scores, and a store of all their texts."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    chosen, voted, scored = [], [], []
    for p in range(120):
        prompt = f"p{p}"
        for _ in range(2):
            a, b = (f"answer {each}" for each in rng.choice(6, 2, replace=False))
            a, b = (a, b) if reward(prompt, a) > reward(prompt, b) else (b, a)
            chosen.append({"prompt": prompt, "chosen": a, "rejected": b})
            votes = {"for_a": 3, "for_b": 1, "tie": 0}
            voted.append({"prompt": prompt, "a": a, "b": b, **votes, "p": 0.75})
        scored += [
            {"prompt": prompt, "response": f"answer {r}", "score": reward(prompt, f"answer {r}")} for r in range(6)
        ]
    for name, rows in {"chosen": chosen, "voted": voted, "scored": scored}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    texts = list(dict.fromkeys(fill(TEMPLATE, row) for row in scored))
    made_by = {"model": "tiny", "template": TEMPLATE, "weights": "ab"}
    with StoreWriter(folder / "store", D, made_by, dtype="float32") as writer:
        writer.append([key_of(text) for text in texts], np.stack([embedding(text) for text in texts]))
    return folder


def config(folder, data, **options):
    return TrainConfig(data=str(folder / f"{data}.jsonl"), embeddings=str(folder / "store"), metric="none", **options)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("chosen", {}),
        ("voted", {"response_columns": ("a", "b"), "votes": ("for_a", "for_b", "tie")}),
        ("voted", {"response_columns": ("a", "b"), "label": "p"}),
        ("scored", {"target": "score", "head": "linear", "members": 1}),
    ],
)
def test_a_planted_reward_is_found(folder, tmp_path, data, options):
    found = train(config(folder, data, out=tmp_path / "model", **options))
    model = load_model(tmp_path / "model")
    texts = [f"p{p}\n\nanswer {r}" for p in range(20) for r in range(6)]
    scores = model.score(np.stack([embedding(text) for text in texts]))
    truth = np.array([embedding(text) @ DIRECTION for text in texts])
    assert np.corrcoef(scores, truth)[0, 1] > 0.95
    assert found["majority"] == (0.75 if data == "voted" else 1)  # of votes, which accuracy counts
    assert found["accuracy"]["low"] < found["accuracy"]["mean"] > 0.85 * found["majority"]
    assert [row["labels"] for row in found["curve"]] == sorted(row["labels"] for row in found["curve"])
    assert model.made_by["template"] == TEMPLATE
    assert model.training == json.loads((tmp_path / "model" / "config.json").read_text())["training"]
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"accuracy on {found['test_pairs']:,} pairs" in card


def test_rewards_are_calibrated_logits_with_mean_zero_over_training_responses(folder, tmp_path):
    options = {"response_columns": ("a", "b"), "label": "p"}
    train(config(folder, "voted", out=tmp_path / "model", **options))
    pairs = load_pairs(folder / "voted.jsonl", folder / "store", responses=("a", "b"), label="p")
    model = load_model(tmp_path / "model")
    rows = pairs.train.table.embeddings().reshape(-1, D)
    used = np.unique([pairs.train.first, pairs.train.second])
    assert abs(model.score(rows[used]).mean()) < 1e-5
    test = pairs.test.table.embeddings().reshape(-1, D)
    margins = np.float64(model.score(test)[pairs.test.first]) - model.score(test)[pairs.test.second]
    # Three of four votes are for the first throughout: no other scale of these margins has a smaller loss.
    losses = [held_out(margins * s, pairs.test.label, pairs.test.prompt)["nll"] for s in (0.8, 1.0, 1.25)]
    assert losses[1] < min(losses[0], losses[2])


def test_each_half_is_scaled_by_the_other():
    rng = np.random.default_rng(0)
    margins, prompts = rng.normal(size=400) * 5, np.repeat(np.arange(100), 4)
    labels = (rng.random(400) < 1 / (1 + np.exp(-margins / 5))).astype(float)
    temperature, scaled = calibrate(margins, labels, prompts)
    assert temperature == pytest.approx(5, rel=0.3)
    ratios = margins / scaled
    by_prompt = ratios.reshape(100, 4)
    assert np.allclose(by_prompt, by_prompt[:, :1])
    assert len(np.unique(np.round(ratios, 6))) == 2


@pytest.mark.parametrize("count", [10, 100])
def test_few_pairs_that_are_all_right_make_no_reward_boundless(count):
    """They tell odds of about 2 count + 1 to 1, and no more."""
    temperature, _ = calibrate(np.full(count, 3.0), np.ones(count), np.arange(count))
    assert 3 / temperature == pytest.approx(np.log(2 * count + 1), rel=0.02)


def test_held_out_numbers_are_their_definitions():
    margins, labels = np.array([2.0, -1.0, 0.0, 3.0]), np.array([1.0, 1.0, 0.0, 0.5])
    found = held_out(margins, labels, np.array([0, 0, 1, 2]))
    assert found["accuracy"]["mean"] == pytest.approx((1 + 0 + 0.5) / 3)
    p = 1 / (1 + np.exp(-margins))
    assert found["nll"] == pytest.approx(-(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean())


def test_pairs_keep_their_rows_and_no_prompt_is_on_both_sides(folder):
    train_side, test_side = load_pairs(folder / "chosen.jsonl", folder / "store")
    rows = [json.loads(line) for line in (folder / "chosen.jsonl").read_text().splitlines()]
    assert sorted([*train_side.row, *test_side.row]) == list(range(len(rows)))
    prompts = [{rows[row]["prompt"] for row in side.row} for side in (train_side, test_side)]
    assert not prompts[0] & prompts[1]
    for side in (train_side, test_side):
        embeddings = side.table.embeddings().reshape(-1, D)
        for at in (0, len(side) - 1):
            row = rows[side.row[at]]
            for end, column in ((side.first, "chosen"), (side.second, "rejected")):
                np.testing.assert_array_equal(embeddings[end[at]], embedding(f"{row['prompt']}\n\n{row[column]}"))


def test_scores_are_split_by_the_column_that_is_named(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    for row in rows:
        row["side"] = "test" if int(row["prompt"][1:]) < 10 else "train"
    (tmp_path / "scored.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"embeddings": str(folder / "store"), "metric": "none", "target": "score", "split": "side"}
    found = train(TrainConfig(str(tmp_path / "scored.jsonl"), **options, out=tmp_path / "model"))
    assert found["prompts"] == {"train": 110, "test": 10}


def test_scores_rank_responses_and_refuse_another_model(folder, tmp_path, capsys):
    train(config(folder, "chosen", out=tmp_path / "model"))
    options = {"model": str(tmp_path / "model"), "data": str(folder / "scored.jsonl")}
    out = tmp_path / "scores.jsonl"
    words = [f"--{name}={value}" for name, value in options.items()]
    assert main(["score", *words, f"--embeddings={folder / 'store'}", f"--out={out}"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["line"] for line in lines] == list(range(1, 721))
    for start in range(0, 720, 6):
        some = lines[start : start + 6]
        best = max(some, key=lambda line: line["reward"])
        assert best["rank"] == 1
        assert sorted(line["rank"] for line in some) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(JarmError, match="stands there already, and stays"):
        score(ScoreConfig(**options, embeddings=str(folder / "store"), out=out))
    with StoreWriter(tmp_path / "other", D, {"model": "tiny", "template": TEMPLATE, "weights": "cd"}) as writer:
        writer.append(["0" * 32], np.zeros((1, D)))
    with pytest.raises(JarmError, match="weights 'cd' and not 'ab'"):
        score(ScoreConfig(**options, embeddings=str(tmp_path / "other"), out=tmp_path / "more.jsonl"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"response_columns": ("a", "b")}, "does not say which of a and b is preferred"),
        ({"response_columns": ("a", "b"), "label": "for_a"}, "for_a is 3 in"),
        ({"response_columns": ("a", "b"), "label": "q"}, "no column 'q'"),
        ({"response_columns": ("a", "b"), "votes": ("for_a",)}, "names 1 columns"),
        ({"response_columns": ("a", "b"), "votes": ("for_a", "for_b"), "label": "p"}, "not both"),
        ({"response_columns": ("a", "b", "prompt"), "label": "p"}, "two columns of responses"),
        ({"response_columns": ("a", "b"), "label": "p", "split": "side"}, "no column 'side'"),
        ({"target": "score", "label": "p"}, "`label` for tables of pairs: leave one"),
        ({"target": "score", "prompt_column": "a"}, "`prompt_column` for tables of pairs: leave one"),
    ],
)
def test_mistakes_get_a_sentence(folder, tmp_path, options, said):
    with pytest.raises(JarmError, match=said):
        train(config(folder, "voted", out=tmp_path / "model", **options))
    assert not (tmp_path / "model").exists()


def test_equal_pairs_teach_nothing_and_are_left_out(tmp_path):
    rows = [{"prompt": f"p{p}", "chosen": "yes", "rejected": "no"} for p in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    embeddings = np.random.default_rng(0).normal(size=(80, 3))
    embeddings[1::4] = embeddings[::4]  # every other pair
    np.save(tmp_path / "pairs.npy", embeddings)
    found = load_pairs(pathlib.Path(tmp_path / "pairs.jsonl"), tmp_path / "pairs.npy")
    assert sorted([*found.train.row, *found.test.row]) == list(range(1, 40, 2))
    assert sum(side.left_out["of equal embeddings"] for side in found) == 20
    np.save(tmp_path / "pairs.npy", np.zeros((80, 3)))
    with pytest.raises(JarmError, match="no train pair left: of 40 pairs 0 have no votes, and 40 have respons"):
        load_pairs(tmp_path / "pairs.jsonl", tmp_path / "pairs.npy")


@pytest.mark.slow
def test_what_was_left_out_is_said(folder, tmp_path, capsys):
    rows = [json.loads(line) for line in (folder / "voted.jsonl").read_text().splitlines()]
    rows = [row | {"b": row["a" if at % 20 == 1 else "b"], "for_a": 3 * (at % 20 != 2)} for at, row in enumerate(rows)]
    rows = [row | {"for_b": (1, 0, 3)[(at % 20 == 2) + 2 * (at % 20 == 3)]} for at, row in enumerate(rows)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["train", f"--data={tmp_path / 'pairs.jsonl'}", f"--embeddings={folder / 'store'}", "--metric=none"]
    words += ["--response-columns", "a", "b", "--votes", "for_a", "for_b", "tie", f"--out={tmp_path / 'model'}"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "Left out: 12 pairs without votes, 12 pairs of equal embeddings.\n" in said
    assert "12 pairs have the label 1/2: they teach, and take no part in accuracy.\n" in said
    assert "(the majority of votes: 0.750)" in said


def test_what_is_left_out_of_drawn_pairs_is_counted(folder):
    for most in (500, 20_000):
        for side in read_pairs(config(folder, "scored", target="score", max_pairs=most)):
            beyond = 15 * len(side.table.rows) - len(side)
            assert side.left_out == {"of equal scores": 0, "of equal embeddings": 0, "beyond --max-pairs": beyond}
    table = dataclasses.replace(side.table, gold=np.zeros_like(side.table.gold))
    assert drawn_pairs(table, 9, np.random.default_rng(0)).left_out["of equal scores"] == 15 * len(table.rows)


def test_what_one_prompt_cannot_tell_is_null_and_the_model_can_be_read(tmp_path, capsys):
    rows = [
        {"prompt": f"p{p}", "chosen": "a", "rejected": "b", "split": "test" if p == 0 else "train"} for p in range(20)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    e = np.random.default_rng(0).normal(size=(40, 3)) + [[2, 0, 0], [0, 0, 0]] * 20
    np.save(tmp_path / "pairs.npy", e)
    words = ["train", "--data", str(tmp_path / "pairs.jsonl"), "--embeddings", str(tmp_path / "pairs.npy")]
    assert main([*words, "--metric", "none", "--out", str(tmp_path / "model")]) == 0
    assert "(no interval: too few)" in capsys.readouterr().out
    assert load_model(tmp_path / "model").training["accuracy"]["low"] is None
    assert "(of too few prompts for an interval)" in (tmp_path / "model" / "README.md").read_text()
