"""`jarm backtest`: recorded pairs and nothing else are asked about, their labels are the answers, and NumPy agrees."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from marks import nightly

from jarm.cli import main
from jarm.core.settings import make_key
from jarm.core.status import JarmError
from jarm.data.pairs import load_pairs
from jarm.data.store import fill, key_of
from jarm.data.writer import StoreWriter
from jarm.loop.loop import make_loop
from jarm.runs.config import CompareConfig
from jarm.runs.grid import Setting
from jarm.runs.jobs import read_jobs
from jarm.runs.records import read_records
from jarm.studies.backtest import BacktestConfig, backtest, read_job
from jarm.studies.compare import compare
from jarm.testing.tracing import count_compilations

D, PROMPTS = 4, 30
DIRECTION = np.array([2.0, -1.0, 0.0, 1.0])
TEMPLATE = "{prompt}\n\n{response}"
VOTED = {"response_columns": ("a", "b"), "votes": ("for_a", "for_b", "tie")}
PLAIN = {"metric": "none", "standardise": False, "head": "linear", "members": 1, "first": "random"}
SMALL = {**PLAIN, "rounds": 2, "batch": 6, "initial": 8, "seeds": 2, "rules": "entropy"}


def embedding(text):
    return np.random.default_rng(list(text.encode())).normal(size=D).astype(np.float32)


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def texts_of(row):
    return [fill(TEMPLATE, {"prompt": row["prompt"], "response": row[side]}) for side in ("a", "b")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Voted pairs of 30 prompts, up to three a prompt and some twice; a store of their texts; and one pair a prompt."""
    folder, rng, voted = tmp_path_factory.mktemp("recorded"), np.random.default_rng(0), []
    for p in range(PROMPTS):
        for _ in range(4):
            a, b = (f"answer {each}" for each in rng.choice(3, 2, replace=False))
            gap = sum(sign * embedding(text) @ DIRECTION for sign, text in zip((1, -1), (a, b), strict=True))
            for_a = int(rng.binomial(5, 1 / (1 + np.exp(-gap))))
            votes = {"for_a": for_a, "for_b": 5 - for_a, "tie": int(rng.integers(2))}
            voted.append({"prompt": f"p{p}", "a": a, "b": b, "split": "test" if p % 3 == 0 else "train", **votes})
    write(folder / "voted.jsonl", voted)
    texts = list(dict.fromkeys(text for row in voted for text in texts_of(row)))
    with StoreWriter(folder / "store", D, {"model": "tiny", "template": TEMPLATE}, dtype="float32") as writer:
        writer.append([key_of(text) for text in texts], np.stack([embedding(text) for text in texts]))
    single = [{"prompt": f"p{p}", "chosen": "yes", "rejected": "no"} for p in range(60)]
    write(folder / "single.jsonl", [row | {"split": "train" if p < 40 else "test"} for p, row in enumerate(single)])
    np.save(folder / "single.npy", rng.normal(size=(120, D)) + np.array([DIRECTION / 2, 0 * DIRECTION] * 60))
    return folder


def config(folder, data="voted", **options):
    own = VOTED if data == "voted" else {}
    embeddings = folder / ("store" if data == "voted" else f"{data}.npy")
    return BacktestConfig(**{"data": str(folder / f"{data}.jsonl"), "embeddings": str(embeddings), **own, **options})


def shares(folder, split):
    """From the file: unordered pair of texts -> the mean share of votes for its first text in the alphabet."""
    found = {}
    for row in map(json.loads, (folder / "voted.jsonl").read_text().splitlines()):
        if row["split"] == split:
            a, b = texts_of(row)
            share = (row["for_a"] + row["tie"] / 2) / (row["for_a"] + row["for_b"] + row["tie"])
            found.setdefault((min(a, b), max(a, b)), []).append(share if a < b else 1 - share)
    return {pair: np.mean(each) for pair, each in found.items()}


@functools.cache
def compiled_run(loop):
    return jax.jit(make_loop(loop).run)


def asked_by(job, rule, seed=0):
    """Of a run, the ends of the pairs as rows of the store, their labels, and the heads of all rounds."""
    hparams, rule = jax.tree.map(jnp.asarray, job.hparams[0]), jnp.int32(job.loop.rules.index(rule))
    state, records = compiled_run(job.loop)(make_key(seed), hparams, job.device_table(), rule)
    assert np.asarray(records.status).max() == 0
    labelled, rows = state.labelled, job.data.train.rows.reshape(-1)
    assert bool(labelled.mask.all())
    ends = rows[np.stack([labelled.first, labelled.second], axis=1)]
    return ends, np.asarray(labelled.label, np.float64), np.asarray(records.params["out"]["kernel"][:, 0, :, 0])


@pytest.mark.parametrize(
    ("first", "rules"),
    [
        ("random", ("random", "entropy", "dopt", "greedy_dopt", "drts")),
        nightly("v_opt", ("random", "then_random", "v_opt")),
    ],
)
def test_only_recorded_training_pairs_are_asked_about_once_and_answered_by_their_record(folder, first, rules):
    job = read_job(config(folder, **{**SMALL, "rules": ",".join(rules), "first": first, "members": 2}))
    recorded, store = shares(folder, "train"), np.asarray(job.data.train.store)
    texts = {tuple(embedding(text).tolist()): text for pair in recorded for text in pair}
    for rule in rules:
        ends, labels, _ = asked_by(job, rule)
        pairs = [tuple(texts[tuple(store[row].tolist())] for row in each) for each in ends]
        assert len({frozenset(pair) for pair in pairs}) == len(pairs) == 20, rule
        for (a, b), label in zip(pairs, labels, strict=True):
            share = recorded[min(a, b), max(a, b)]
            assert label == pytest.approx(share if a < b else 1 - share, abs=1e-6), rule


def plain_fit(x, label, ridge=1.0):
    """Ridge Bradley-Terry regression in float64, by Newton's method."""
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        w -= np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(w)), x.T @ (p - label) + ridge * w)
    return w


def held_out_rows(folder):
    rows = [row for row in map(json.loads, (folder / "voted.jsonl").read_text().splitlines()) if row["split"] == "test"]
    x = np.stack([embedding(a).astype(np.float64) - embedding(b) for a, b in map(texts_of, rows)])
    votes = np.array([[row[name] for name in ("for_a", "for_b", "tie")] for row in rows], np.float64)
    return x, (votes[:, 0] + votes[:, 2] / 2) / votes.sum(axis=1), [row["prompt"] for row in rows]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("backtest") / "out"
    return out, backtest(config(folder, **SMALL, out=out))


@pytest.mark.slow
def test_the_curve_of_random_is_that_of_plain_refits_judged_in_numpy(folder, finished):
    out, summary = finished
    job = read_job(config(folder, **SMALL))
    x, share, _ = held_out_rows(folder)
    lines = {(line["seed"], line["round"]): line for line in read_records(out) if line["rule"] == "random"}
    curve = []
    for seed in range(2):
        ends, labels, heads = asked_by(job, "random", seed)
        store = np.asarray(job.data.train.store, np.float64)
        for t, count in enumerate((8, 14, 20)):
            w = plain_fit((store[ends[:, 0]] - store[ends[:, 1]])[:count], labels[:count])
            np.testing.assert_allclose(heads[t], w, atol=2e-4)
            margin = x @ w
            right = np.where(margin > 0, share, 1 - share)[share != 0.5]
            nll = np.log1p(np.exp(margin)) - share * margin
            line = lines[seed, t]
            assert line["labels"] == count
            assert line["pair_accuracy"] == pytest.approx(right.mean(), abs=1e-6)
            assert line["nll"] == pytest.approx(nll.mean(), abs=1e-4)
            curve.append(line["pair_accuracy"])
    assert summary["rules"]["random"]["pair_accuracy"] == pytest.approx(np.reshape(curve, (2, 3)).mean(0))


def test_reference_lines_are_those_of_the_file(folder, finished):
    _, share, _ = held_out_rows(folder)
    reference = finished[1]["reference"]
    assert reference["majority of the labels"]["pair_accuracy"] == pytest.approx(
        np.maximum(share, 1 - share)[share != 0.5].mean(), abs=1e-6
    )
    assert reference["longer response"]["pair_accuracy"] == 0.5  # all are as long


@pytest.mark.slow
def test_more_seeds_are_added_to_a_folder_and_equal_those_of_a_fresh_one(folder, finished, tmp_path):
    few = config(folder, **{**SMALL, "seeds": 1}, out=tmp_path / "out")
    backtest(few)
    records = tmp_path / "out" / "records.jsonl"
    half = records.read_bytes()[:-40]  # as a kill leaves it
    records.write_bytes(half)
    with count_compilations() as compiled:
        backtest(dataclasses.replace(few, seeds=2))
    assert sum("run_all" in name or "margins" in name for name in compiled) <= 1
    kept = ("rule", "seed", "round", "labels", "pair_accuracy", "nll", "right_by_prompt")

    def of(out):
        lines = [line for line in read_records(out) if line["kind"] == "run"]
        return sorted(tuple(line[name] for name in kept) for line in lines)

    assert of(tmp_path / "out") == of(finished[0])


def test_the_folder_holds_curves_a_summary_and_plain_words(folder, finished):
    out, summary = finished
    assert summary["answer"].startswith("Too few seeds to say: 2 of the 5")
    assert "judged by 40 pairs of 10 others." in summary["answer"]
    text = (out / "summary.md").read_text("utf-8")
    assert text.startswith(f"**{summary['answer']}**")
    assert "area under accuracy curve" in text
    for word in ("Spearman", "gold", "wrong labels"):
        assert word not in text
    assert {"curves.png", "curves.svg", "summary.json"} <= {path.name for path in out.iterdir()}


@pytest.mark.slow
@pytest.mark.nightly
def test_where_a_prompt_has_one_pair_it_is_said_that_only_prompts_are_chosen(folder, tmp_path, capsys):
    words = ["backtest", str(folder / "single.jsonl"), "--embeddings", str(folder / "single.npy")]
    words += [
        "--rounds",
        "2",
        "--batch",
        "5",
        "--initial",
        "5",
        "--seeds",
        "5",
        "--rules",
        "dopt",
        "--metric",
        "none",
        "--head",
        "linear",
    ]
    words += ["--members=1", "--first=random", "--per-prompt=1", f"--out={tmp_path / 'out'}"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "Each training prompt has one recorded pair: nothing could be chosen within a prompt" in said
    assert "over 5 seeds and 20 held-out prompts" in said
    assert "jarm compare" not in said


@pytest.mark.slow
def test_a_rule_that_leaves_near_copies_alone_is_shown_to_save_labels(tmp_path):
    """Nine of ten training pairs differ by next to nothing, so random labels hardly teach."""
    rng, rows, embeddings = np.random.default_rng(0), [], []
    for p in range(350):
        for copy in range(10 if p < 50 else 1):
            gap = rng.normal(size=12) * (0.01 if copy else 1)
            sign = 1 if gap.sum() > 0 else -1
            base = rng.normal(size=12)
            embeddings += [base + sign * gap, base - sign * gap]
            rows.append({"prompt": f"p{p}", "chosen": f"yes {copy}", "rejected": f"no {copy}"})
            rows[-1]["split"] = "train" if p < 50 else "test"
    write(tmp_path / "copies.jsonl", rows)
    np.save(tmp_path / "copies.npy", np.array(embeddings))
    sizes = {"rounds": 3, "batch": 10, "initial": 10, "seeds": 12, "rules": "greedy_dopt"}
    found = backtest(config(tmp_path, "copies", **{**PLAIN, **sizes}, out=tmp_path / "out"))
    assert found["answer"].startswith("Yes, choose pairs by greedy_dopt on data like these.")
    row = found["rules"]["greedy_dopt"]
    assert row["saving"]["labels"] < 30
    assert row["saving"]["ratio"]["low"] >= 1
    assert "and is where random ends after" in found["answer"]
    assert "Each training prompt" not in found["answer"]


def test_no_index_tells_which_response_was_preferred(folder):
    label = read_job(config(folder, "single", **SMALL)).pool.label
    assert set(label) == {0.0, 1.0}
    assert 8 < label.sum() < 32


@pytest.mark.slow
@pytest.mark.nightly
def test_the_whole_pool_may_be_asked_about(folder):
    total = len(read_job(config(folder, **SMALL)).pool.label)
    assert total == len(shares(folder, "train"))
    job = read_job(config(folder, **{**SMALL, "rounds": 1, "batch": 6, "initial": total - 6}))
    ends, *_ = asked_by(job, "entropy")
    assert len(ends) == total


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rounds": 50}, "fewer than the 308 labels of 8 \\+ 50 x 6"),
        ({"per_prompt": "1", "batch": 39, "rounds": 1}, "At most 1 per prompt are 20 recorded pairs"),
        ({"rules": "d_opt"}, "There is no rule 'd_opt'"),
        ({"rules": "bald"}, "looks at how members differ"),
        ({"votes": ()}, "does not say which of a and b is preferred"),
        ({"label": "for_a"}, "a label or votes, not both"),
        ({"votes": ("tie", "tie")}, "are 1/2, which prefer nothing"),
        ({"seeds": 0}, "`seeds` is 0"),
        ({"batch": 5001}, "candidate pairs cannot fill a batch"),
    ],
)
def test_mistakes_get_a_sentence(folder, options, says):
    with pytest.raises(JarmError, match=says):
        read_job(config(folder, **{**SMALL, **options}))


def test_one_prompt_is_refused(folder, tmp_path):
    rows = [{"prompt": "p", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(5)]
    write(tmp_path / "one.jsonl", rows)
    np.save(tmp_path / "one.npy", np.random.default_rng(0).normal(size=(10, D)))
    with pytest.raises(JarmError, match="pair left: of 5 pairs 0 have no votes, and 0 have responses of eq"):
        read_job(config(tmp_path, "one", **SMALL))


@pytest.mark.slow
@pytest.mark.nightly
def test_candidates_are_recorded_pairs(folder):
    job = read_job(config(folder, **{**SMALL, "candidates": 9, "rules": "greedy_dopt"}))
    assert job.loop.candidates == 9 < len(job.pool.pairs)
    recorded = {frozenset(pair) for pair in job.data.train.rows.reshape(-1)[job.pool.pairs].tolist()}
    ends, *_ = asked_by(job, "greedy_dopt")
    assert {frozenset(pair) for pair in ends.tolist()} <= recorded
    assert jnp.asarray(job.device_table().recorded.pairs).shape == job.pool.pairs.shape


@pytest.mark.parametrize(
    ("counts", "begins"),
    [
        ([1] * 20, "Each training prompt has one recorded pair: nothing could be chosen within a prompt"),
        ([1] * 19 + [2, 0], "Of 20 training prompts 19 have one recorded pair: hardly anything could be chosen"),
        ([2] * 20, "The pool: "),
    ],
)
def test_the_remark_says_how_much_could_be_chosen_within_prompts(folder, counts, begins):
    job = read_job(config(folder, **SMALL))
    job = dataclasses.replace(job, pool=job.pool._replace(counts=np.array(counts)))
    assert job.remark.startswith(begins)
    assert "judged by 40 pairs of 10 others." in job.remark


def test_a_folder_of_others_is_refused_in_a_short_sentence(folder, finished, tmp_path):
    (tmp_path / "summary.md").write_text("mine")
    with pytest.raises(JarmError, match=r"summary\.md stands there without a config\.json and may be yours"):
        backtest(config(folder, **SMALL, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["summary.md"]
    single = config(folder, "single", **SMALL, out=finished[0])
    with pytest.raises(JarmError, match=r"test table 'voted.* there, .* here, and \d+ more\): give another") as error:
        backtest(single)
    assert len(str(error.value)) < 600


def test_faults_of_pairs_name_lines_of_jsonl_and_rows_of_parquet(tmp_path):
    rows = [{"prompt": "p", "a": "x", "b": "y", "p": p, "n": n} for p, n in ((1.0, 1), (2.0, -1), (0.5, None))]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "pairs.parquet")
    (tmp_path / "pairs.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    np.save(tmp_path / "pairs.npy", np.eye(6))
    for name, places in (("pairs.parquet", ("row 1", "row 2")), ("pairs.jsonl", ("line 3", "line 5"))):
        for options, place in (({"label": "p"}, places[0]), ({"votes": ("n", "n")}, places[1])):
            with pytest.raises(JarmError, match=place):
                load_pairs(tmp_path / name, tmp_path / "pairs.npy", responses=("a", "b"), **options)


def test_a_comparison_on_pairs_is_the_backtest(folder, tmp_path, monkeypatch):
    shared = {**SMALL, "data": str(folder / "single.jsonl"), "embeddings": str(folder / "single.npy"), "out": tmp_path}
    monkeypatch.setattr("jarm.studies.compare.backtest", lambda config: {"of": config})
    assert compare(CompareConfig(**shared))["of"] == BacktestConfig(**shared)


def test_a_comparison_without_scores_says_what_can_be_done(folder, tmp_path):
    pairs = {"data": str(folder / "single.jsonl"), "embeddings": str(folder / "single.npy")}
    with pytest.raises(JarmError, match=r"takes no `noise`: leave it out, as in `jarm backtest .*single\.jsonl"):
        compare(CompareConfig(**pairs, noise=1.0, out=tmp_path))
    with pytest.raises(JarmError, match=r"labelled pairs, and no scores to sweep over: `jarm backtest .*single\.jsonl"):
        read_jobs([Setting({}, CompareConfig(**pairs))])
    write(tmp_path / "plain.jsonl", [{"prompt_id": p // 2} for p in range(8)])
    np.save(tmp_path / "plain.npy", np.eye(8))
    plain = {"data": str(tmp_path / "plain.jsonl"), "embeddings": str(tmp_path / "plain.npy")}
    with pytest.raises(JarmError, match=r"\(`--target`\); columns of numbers are prompt_id; .* `jarm forecast "):
        compare(CompareConfig(**plain, out=tmp_path / "out"))
