"""`jarm evaluate`: every number is its definition, in float64 and by loops, on small files of the same form."""

import itertools
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.tiny import write_checkpoint
from reward_models import model_on
from scipy import stats

from jarm.cli import main
from jarm.core.status import JarmError
from jarm.data.store import key_of
from jarm.data.tables import load_table
from jarm.data.texts import read_texts
from jarm.data.writer import StoreWriter
from jarm.export.model import RewardModel, load_model
from jarm.report.held_out import held_out
from jarm.report.rewardbench import SECTIONS
from jarm.reward.config import HeadConfig
from jarm.studies.evaluate import EvaluateConfig, evaluate
from jarm.studies.train import TrainConfig, drawn_pairs, train


@pytest.fixture
def model(tmp_path):
    """A model whose reward is the first number of an embedding."""
    params = {"out": {"kernel": np.array([[[1.0], [0.0]]], np.float32)}}
    RewardModel(HeadConfig(hidden=()), params, np.zeros(1, np.float32)).save(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def judged(tmp_path, model):
    """`judge(rows, rewards, **options) -> (results, lines)`."""
    times = itertools.count()

    def judge(rows, rewards, **options):
        at = next(times)
        data, embeddings = tmp_path / f"rows{at}.jsonl", tmp_path / f"rows{at}.npy"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        np.save(embeddings, np.stack([rewards, np.arange(len(rewards))], axis=1).astype(np.float32))
        out, each = tmp_path / f"out{at}.json", tmp_path / f"each{at}.jsonl"
        found = evaluate(EvaluateConfig(model, str(data), str(embeddings), out=out, each=each, **options))
        assert json.loads(out.read_text()) == found
        return found, [json.loads(line) for line in each.read_text().splitlines()]

    return judge


def same(found, value):
    assert found["mean"] == pytest.approx(value, abs=1e-12)
    assert found["low"] is None or found["low"] <= found["mean"] + 1e-12
    assert found["high"] is None or found["high"] >= found["mean"] - 1e-12


def bench_rows(rng):
    """A few pairs of each subset of RewardBench 1, with rewards that tie now and then."""
    rows, rewards = [], []
    for subset in itertools.chain.from_iterable(SECTIONS.values()):
        for n in range(rng.integers(2, 6)):
            texts = ["x" * size for size in rng.integers(1, 5, 2)]
            rows.append({"prompt": f"{subset} {n // 2}", "chosen": texts[0], "rejected": texts[1], "subset": subset})
            rows[-1]["id"] = len(rows)
            rewards += rng.integers(0, 3, 2).tolist()
    return rows, np.array(rewards, float)


def test_rewardbench_1_has_the_scores_of_its_formula(judged):
    rows, rewards = bench_rows(np.random.default_rng(0))
    found, lines = judged(rows, rewards)
    assert found["layout"] == "rewardbench"
    assert "RewardBench 1" in found["read_as"]
    lengths = [len(row[side]) for row in rows for side in ("chosen", "rejected")]
    for which, scores in (("model", rewards), ("length", lengths)):

        def of(row, which=which):
            return row["length"] if which == "length" else row

        right = {}
        for at, row in enumerate(rows):
            right.setdefault(row["subset"], []).append(float(scores[2 * at] > scores[2 * at + 1]))  # a tie is wrong
        for subset, values in right.items():
            same(of(found["subsets"][subset])["accuracy"], np.mean(values))
        sections = {
            section: sum(size * np.mean(right[subset]) for subset, size in sizes.items()) / sum(sizes.values())
            for section, sizes in SECTIONS.items()
        }
        for section, value in sections.items():
            same(of(found["sections"][section]), value)
        same(of(found["score"]), np.mean(list(sections.values())))
    assert sum(SECTIONS["Reasoning"].values()) == 2 * SECTIONS["Reasoning"]["math-prm"] == 1968
    assert [line["right"] for line in lines] == [float(a > b) for a, b in rewards.reshape(-1, 2)]
    assert lines[3] == {
        "line": 4,
        "subset": rows[3]["subset"],
        "rewards": list(rewards[6:8]),
        "label": 1.0,
        "right": lines[3]["right"],
    }
    assert found["overall"]["ties"] == sum(a == b for a, b in rewards.reshape(-1, 2))


def test_without_a_section_there_is_no_score(judged):
    rows, rewards = bench_rows(np.random.default_rng(1))
    some = [at for at, row in enumerate(rows) if row["subset"] in ("math-prm", "hep-go", "donotanswer")]
    found, _ = judged([rows[at] for at in some], rewards.reshape(-1, 2)[some].reshape(-1))
    assert list(found["sections"]) == ["Safety", "Reasoning"]
    assert found["score"] is None


def second_bench(rng):
    """Items of RewardBench 2, ties among the rewards, and a subset Ties of which one number lacks its `ref`."""
    rows, rewards = [], []

    def item(subset, name, right, wrong, scores):
        texts = ["x" * size for size in rng.integers(1, 9, right + wrong)]
        counts = {"num_correct": right, "total_completions": right + wrong}
        rows.append(
            {
                "id": name,
                "prompt": f"{subset} {name}",
                "chosen": texts[:right],
                "rejected": texts[right:],
                "subset": subset,
            }
        )
        rows[-1] |= counts
        rewards.append(scores)

    for subset in ("Focus", "Math"):
        for n in range(7):
            item(subset, str(n), 1, 3, rng.integers(0, 3, 4).astype(float))
    for n in range(6):
        item("Ties", f"tied:{n}", 3, 2, np.r_[rng.integers(2, 5, 3), rng.integers(0, 3, 2)].astype(float))
        if n:
            item("Ties", f"ref:{n}", 1, 4, np.r_[rng.integers(2, 4, 1), rng.integers(0, 3, 4)].astype(float))
    rewards[14] = np.array([1.0, 1.0, 1.0, 1.0, 0.0])  # 0 / 0 in the last term
    return rows, rewards


def ties_by_loops(rows, scores):
    """The score of the subset Ties, number by number."""
    stats_of = {}
    for row, score in zip(rows, scores, strict=True):
        if row["subset"] == "Ties":
            right, wrong = score[: row["num_correct"]], score[row["num_correct"] :]
            kind, number = row["id"].split(":")
            stats_of[kind, number] = (min(right) - max(wrong), max(right) - min(right))
    tied = [number for kind, number in stats_of if kind == "tied"]
    both = [number for number in tied if ("ref", number) in stats_of]
    accuracy = {
        kind: np.mean([gap > 0 for (of, _), (gap, _) in stats_of.items() if of == kind]) for kind in ("tied", "ref")
    }
    easy = np.mean([stats_of["tied", n][0] > stats_of["tied", n][1] for n in both])
    least = [min(stats_of["tied", n][0], stats_of["ref", n][0]) for n in both]
    spread = [stats_of["tied", n][1] for n in both]
    hard = np.mean([a > b for a, b in zip(least, spread, strict=True)])
    margin = [
        math.tanh(a / b - 1) if b else (0.0 if a == 0 else math.copysign(1.0, a))
        for a, b in zip(least, spread, strict=True)
    ]
    right = 0.3 * accuracy["tied"] + 0.3 * accuracy["ref"]
    return right + 0.2 * easy + 0.2 * hard + 0.01 * np.mean(margin)


@pytest.mark.parametrize("seed", range(3))
def test_rewardbench_2_has_the_scores_of_its_formula(judged, seed):
    rows, rewards = second_bench(np.random.default_rng(seed))
    found, lines = judged(rows, np.concatenate(rewards))
    assert found["layout"] == "rewardbench-2"
    lengths = [[float(len(text)) for text in (*row["chosen"], *row["rejected"])] for row in rows]
    for which, scores in (("model", rewards), ("length", lengths)):
        subsets = {"Ties": ties_by_loops(rows, scores)}
        for subset in ("Focus", "Math"):
            own = [score for row, score in zip(rows, scores, strict=True) if row["subset"] == subset]
            subsets[subset] = np.mean([(s[0] == max(s)) / np.sum(np.array(s) == max(s)) for s in own])
        for subset, value in subsets.items():
            row = found["subsets"][subset]
            same((row["length"] if which == "length" else row)["accuracy"], value)
        same(found["score"]["length"] if which == "length" else found["score"], np.mean(list(subsets.values())))
    assert [line["correct"] for line in lines] == [row["num_correct"] for row in rows]
    assert [line["rewards"] for line in lines] == [list(each) for each in rewards]
    assert lines[14]["right"] == float(min(rewards[14][:3]) > max(rewards[14][3:]))
    assert found["subsets"]["Focus"]["items"] == 7


def test_pairs_have_the_numbers_of_held_out(judged):
    rng = np.random.default_rng(0)
    rows = [{"prompt": f"p{n // 2}", "a": "x" * (n % 3 + 1), "b": "yy", "p": (n % 5) / 4} for n in range(40)]
    rewards = rng.normal(size=80)
    found, lines = judged(rows, rewards, response_columns=("a", "b"), label="p")
    margins = np.float64(np.float32(rewards[::2])) - np.float32(rewards[1::2])
    labels, prompts = np.array([row["p"] for row in rows]), np.arange(40) // 2
    assert found["layout"] == "pairs"
    expected = held_out(margins, labels, prompts)
    same(found["overall"]["accuracy"], expected["accuracy"]["mean"])
    assert found["overall"]["accuracy"] == pytest.approx(expected["accuracy"])
    assert found["overall"]["nll"] == pytest.approx(expected["nll"])
    assert found["overall"]["calibration_error"] == pytest.approx(expected["calibration_error"])
    longer = np.array([np.sign(len(row["a"]) - 2) for row in rows], float)
    same(found["overall"]["length"]["accuracy"], held_out(longer, labels, prompts)["accuracy"]["mean"])
    right = [label if margin > 0 else 1 - label for margin, label in zip(margins, labels, strict=True)]
    right = [None if label == 0.5 else each for label, each in zip(labels, right, strict=True)]
    assert [line["right"] for line in lines] == right
    known = [each for each in right if each is not None]
    assert found["overall"]["accuracy"]["mean"] == pytest.approx(np.mean(known))
    assert found["overall"]["majority"] == pytest.approx(7 / 8)


def test_pairs_without_votes_are_left_out(judged):
    rows = [{"prompt": "p", "a": "x", "b": "y", "for": n, "against": 1 - n and n} for n in (1, 0, 1)]
    found, lines = judged(rows, np.arange(6.0), response_columns=("a", "b"), votes=("for", "against"))
    assert found["overall"]["pairs"] == 2
    assert [line["line"] for line in lines] == [1, 3]


def scored_rows(rng):
    rows = []
    for p in range(12):
        for _ in range(rng.integers(1, 6)):
            rows.append({"prompt": f"p{p}", "response": "x" * int(rng.integers(1, 9)), "subset": f"s{p % 2}"})
            rows[-1]["score"] = float(rng.integers(0, 4))
    rng.shuffle(rows)
    return rows


def test_scored_responses_have_pairs_as_training_draws_them(judged, tmp_path):
    rng = np.random.default_rng(3)
    rows = scored_rows(rng)
    rewards = np.float32(rng.normal(size=len(rows)).round(1)).astype(float)
    found, lines = judged(rows, rewards, target="score")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    own = {p: [at for at, row in enumerate(rows) if row["prompt"] == p] for p in prompts}
    own = {p: at for p, at in own.items() if len(at) > 1}
    lengths = np.array([float(len(row["response"])) for row in rows])
    gold = np.array([row["score"] for row in rows])
    for which, scores in (("model", rewards), ("length", lengths)):
        row = found["overall"]["length"] if which == "length" else found["overall"]
        right = [
            0.5 if scores[i] == scores[j] else float((scores[i] > scores[j]) == (gold[i] > gold[j]))
            for at in own.values()
            for i, j in itertools.combinations(at, 2)
            if gold[i] != gold[j]
        ]
        same(row["accuracy"], np.mean(right))
        with np.errstate(all="ignore"):
            spearman = [
                stats.spearmanr(scores[at], gold[at])[0]
                for at in own.values()
                if len(set(scores[at])) > 1 and len(set(gold[at])) > 1
            ]
        same(row["spearman"], np.mean(spearman))
        same(row["best_of_n"], np.mean([gold[at][scores[at] == scores[at].max()].mean() for at in own.values()]))
    assert found["overall"]["pairs"] == len(right)
    assert found["overall"]["oracle_of_n"] == pytest.approx(np.mean([gold[at].max() for at in own.values()]))
    assert found["overall"]["random_of_n"] == pytest.approx(np.mean([gold[at].mean() for at in own.values()]))
    assert [line["lines"] for line in lines] == [[n + 1 for n in at] for at in own.values()]
    assert [line["scores"] for line in lines] == [gold[at].tolist() for at in own.values()]
    assert f"Prompts with one response, left out: {len(prompts) - len(own)}." in found["read_as"]
    assert found["subsets"]["s0"]["prompts"] + found["subsets"]["s1"]["prompts"] == len(own)


def test_the_test_side_of_training_has_its_accuracy(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"prompt": f"p{n}", "response": f"r{r}", "score": float(rng.normal())} for n in range(60) for r in range(4)]
    data, store = tmp_path / "rows.jsonl", tmp_path / "store"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    e = rng.normal(size=(len(rows), 4)).astype(np.float32)
    e[:, 0] += [row["score"] for row in rows]
    with StoreWriter(store, 4, {"model": "tiny", "template": "{prompt}\n\n{response}", "weights": "ab"}) as writer:
        writer.append([key_of(f"{row['prompt']}\n\n{row['response']}") for row in rows], e)
    options = {"data": str(data), "embeddings": str(store), "target": "score"}
    said = train(TrainConfig(**options, metric="none", out=tmp_path / "model"))
    found = evaluate(EvaluateConfig(str(tmp_path / "model"), **options, side="test", out=tmp_path / "out.json"))
    assert found["overall"]["accuracy"] == pytest.approx(said["accuracy"], abs=1e-6)
    assert found["overall"]["length"]["accuracy"] == pytest.approx(said["length"])
    whole = evaluate(EvaluateConfig(str(tmp_path / "model"), **options, out=tmp_path / "all.json"))
    assert whole["overall"]["prompts"] == 60
    test = load_table(data, store, "score").test
    drawn = drawn_pairs(test, 20_000, np.random.default_rng(0))
    assert found["overall"]["pairs"] == len(drawn)


def test_a_store_and_a_parquet_file_of_lists_give_the_same_as_an_array(judged, tmp_path, model):
    rows, rewards = second_bench(np.random.default_rng(0))
    for row in rows:  # texts of their own, as equal ones share a row of the store
        for side in ("chosen", "rejected"):
            row[side] = [f"{at}{text}" for at, text in enumerate(row[side])]
            row[side] = [side[0] + text for text in row[side]]
    expected, lines = judged(rows, np.concatenate(rewards))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rb.parquet")
    keys = [key_of(f"{row['prompt']}\n\n{text}") for row in rows for text in (*row["chosen"], *row["rejected"])]
    order = np.random.default_rng(0).permutation(len(keys))
    e = np.stack([np.concatenate(rewards), np.arange(len(keys))], axis=1).astype(np.float32)
    made_by = {"model": "tiny", "template": "{prompt}\n\n{response}", "weights": "ab"}
    with StoreWriter(tmp_path / "store", 2, made_by, dtype="float32") as writer:
        writer.append([keys[at] for at in order], e[order])
    each, data = tmp_path / "each", str(tmp_path / "rb.parquet")
    found = evaluate(EvaluateConfig(model, data, str(tmp_path / "store"), each=each, out=tmp_path / "out.json"))
    assert {**found, "settings": 0} == {**expected, "settings": 0}
    again = [json.loads(line) for line in each.read_text().splitlines()]
    assert again == [{"row": line.pop("line") - 1, **line} for line in lines]


def test_blank_lines_and_messages_change_no_number(judged, tmp_path, model):
    user, answer = {"role": "user", "content": "p"}, {"role": "assistant", "content": "yes"}
    long = {"role": "assistant", "content": "no, no"}
    rows = [{"chosen": [user, answer], "rejected": [user, long], "subset": "s"}] * 2
    (tmp_path / "blank.jsonl").write_text(f"{json.dumps(rows[0])}\n\n{json.dumps(rows[1])}\n")
    np.save(tmp_path / "blank.npy", np.array([[1.0, 0], [0, 0], [0, 0], [1, 0]]))
    data, embeddings, each = str(tmp_path / "blank.jsonl"), str(tmp_path / "blank.npy"), tmp_path / "each"
    found = evaluate(EvaluateConfig(model, data, embeddings, each=each, out=tmp_path / "out.json"))
    same(found["subsets"]["s"]["accuracy"], 0.5)
    same(found["overall"]["length"]["accuracy"], 0)
    assert [json.loads(line)["line"] for line in each.read_text().splitlines()] == [1, 3]


def test_the_command_shows_a_table_and_keeps_what_is_there(tmp_path, model, capsys):
    rows, rewards = second_bench(np.random.default_rng(0))
    (tmp_path / "rb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(tmp_path / "rb.npy", np.stack([np.concatenate(rewards)] * 2, axis=1))
    words = [f"--model={model}", f"--data={tmp_path / 'rb.jsonl'}", f"--embeddings={tmp_path / 'rb.npy'}"]
    out = f"--out={tmp_path / 'out.json'}"
    assert main(["evaluate", *words, out]) == 0
    shown = capsys.readouterr().out
    assert "RewardBench 2" in shown
    firsts = [line.split()[0] for line in shown.splitlines() if line]
    assert firsts[1:6] == ["subset", "Focus", "Math", "Ties", "mean"]
    assert main(["evaluate", *words, out]) == 1
    assert "out.json stands there already, and stays: give another --out" in capsys.readouterr().err
    (tmp_path / "each.jsonl").write_text("mine")
    assert main(["evaluate", *words, f"--out={tmp_path / 'new.json'}", f"--each={tmp_path / 'each.jsonl'}"]) == 1
    assert "give another --each" in capsys.readouterr().err
    assert not (tmp_path / "new.json").exists()


PAIR = {"prompt": "p", "chosen": "yes", "rejected": "no"}
ITEM = {"prompt": "p", "chosen": ["yes"], "rejected": ["no", "so"], "subset": "Ties", "id": "ref:1", "num_correct": 1}
TIED = {**ITEM, "id": "tied:1", "chosen": ["a", "b"], "rejected": ["c"], "num_correct": 2}
SCORED = {"prompt": "p", "response": "a", "score": 1.0}


@pytest.mark.parametrize(
    ("rows", "rewards", "options", "said"),
    [
        ([PAIR], [1, 2, 3], {}, r"has shape \(3, 2\), and .* has 2 responses"),
        ([PAIR], [1, np.nan], {}, "is NaN or infinite"),
        ([PAIR], [1, 2], {"subset": "part"}, "no column 'part'"),
        ([{**PAIR, "subset": None}, {**PAIR, "subset": "x"}], [1] * 4, {}, "line 1: subset is missing"),
        ([{**PAIR, "subset": 0.5}], [1, 2], {}, "subset holds double"),
        ([PAIR], [1, 2], {"side": "test", "split": "fold"}, "no column 'fold'"),
        ([{**PAIR, "split": "train"}], [1, 2], {"side": "test"}, "nothing to judge by of the test side"),
        ([PAIR], [1, 2], {"split": "fold"}, "`side` is 'all'"),
        ([PAIR], [1, 2], {"target": "score", "label": "p"}, "leave one of the two out"),
        ([PAIR], [1, 2], {"response_columns": ("chosen",)}, "does not say what is better"),
        ([SCORED], [1], {}, "does not say what is better"),
        ([PAIR], [1, 2], {"aggregate": "best"}, "aggregate"),
        ([ITEM, ITEM], [1] * 6, {}, "'ref:1' is there twice"),
        ([ITEM, {**TIED, "id": "tie:1"}], [1] * 6, {}, "'tie:1' in subset Ties is neither"),
        ([ITEM, {**ITEM, "id": "tied:1"}], [1] * 6, {}, "tied:1 has one right response"),
        ([ITEM], [1] * 3, {}, "no number of subset Ties has both"),
        ([{**ITEM, "num_correct": 3}], [1] * 3, {}, "num_correct is 3, and the row has 3 responses"),
        ([{**ITEM, "rejected": []}], [1], {}, "rejected is an empty list"),
        ([ITEM], [1] * 3, {"label": "num_correct"}, "have no labels"),
        ([SCORED], [1], {"target": "score"}, "nothing to judge by"),
        ([SCORED, SCORED], [1, 2], {"target": "score"}, "no prompt has two responses of different score"),
        ([SCORED, {**SCORED, "score": 2.0}], [1, 2], {"target": "skore"}, "did you mean 'score'"),
        (
            [{**SCORED, "subset": "a"}, {**SCORED, "score": 2.0, "subset": "b"}],
            [1, 2],
            {"target": "score"},
            "in the subsets 'a' and 'b'",
        ),
    ],
)
def test_mistakes_get_a_sentence_of_their_own(judged, tmp_path, rows, rewards, options, said):
    with pytest.raises(JarmError, match=said):
        judged(rows, np.array(rewards, float), **options)
    assert not (tmp_path / "out0.json").exists()


def test_embeddings_of_another_width_and_one_file_for_two_are_refused(tmp_path, model):
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIR))
    np.save(tmp_path / "rows.npy", np.ones((2, 3)))
    config = EvaluateConfig(model, str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.npy"), out=tmp_path / "out.json")
    with pytest.raises(JarmError, match=r"this model takes \(n, 2\)"):
        evaluate(config)
    with pytest.raises(JarmError, match="give two files"):
        EvaluateConfig(model, "rows.jsonl", "rows.npy", out=tmp_path / "a", each=tmp_path / "a")
    assert load_model(model).width == 2


@pytest.mark.slow  # loads a language model
def test_texts_as_they_come_have_the_numbers_of_their_embeddings(tmp_path):
    llm = str(write_checkpoint(tmp_path / "llama", "llama"))
    model = model_on(llm, chat=False)
    model.save(tmp_path / "model")
    pairs = [{"prompt": f"p{n}", "chosen": "x" * (n + 1), "rejected": "yy"} for n in range(3)]
    items = [{"prompt": "a", "chosen": ["x"], "rejected": ["y", "no"], "subset": "s", "id": "1"}]
    scored = [{"prompt": f"p{n // 3}", "response": "z" * (n + 1), "score": n % 3} for n in range(6)]
    for at, (rows, options) in enumerate(((pairs, {}), (items, {}), (scored, {"target": "score"}))):
        data = tmp_path / f"{at}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts = read_texts([data], as_given=True).columns
        np.save(tmp_path / f"{at}.npy", model.embedder(llm)(texts["prompt"], texts["response"]))
        ways = {"embeddings": str(tmp_path / f"{at}.npy")}, {"llm": llm}
        made = [
            evaluate(EvaluateConfig(str(tmp_path / "model"), str(data), **way, **options, out=tmp_path / f"{at}{n}"))
            for n, way in enumerate(ways)
        ]
        assert made[1]["settings"].pop("llm") == llm
        assert made[0] == made[1]
    with pytest.raises(JarmError, match="`llm` embeds the texts now, and `embeddings` names those there are"):
        EvaluateConfig("m", "d", "e", llm=llm)
