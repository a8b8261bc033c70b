"""`jarm embed`: text to store, interrupted and resumed, in all its settings."""

import collections
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.tiny import CHAT, write_checkpoint
from marks import nightly, sampled
from safetensors.numpy import load_file

from jarm.cli import main
from jarm.core.status import JarmError
from jarm.data.datasets import load
from jarm.data.journal import ROWS, Rows, encode_rows
from jarm.data.store import EmbeddingStore, key_of
from jarm.data.writer import StoreWriter
from jarm.embedding import embed as embed_module
from jarm.embedding import extract as extract_module
from jarm.embedding import sink
from jarm.embedding.config import EmbedConfig
from jarm.embedding.embed import embed
from jarm.embedding.tokens import Tokenizer
from jarm.llm.model import embed_tokens
from jarm.llm.pooling import Pooling
from jarm.llm.weights import load_model

LETTERS = np.array(list("abcdefghij ."))


def random_rows(count, per_prompt=4, seed=0, prompt=12):
    rng = np.random.default_rng(seed)
    rows = []
    for at in range(count):
        if at % per_prompt == 0:
            asked = "".join(rng.choice(LETTERS, rng.integers(1, prompt)))
        rows.append({"prompt": asked, "response": "".join(rng.choice(LETTERS, rng.integers(0, 30)))})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "bert", "bert", eos=True)


def settings(model, path, out, **options):
    defaults = {"dtype": "float32", "max_tokens_per_batch": 256}
    return EmbedConfig(model=str(model), input=(str(path),), out=out, **(defaults | options))


def directly(folder, texts, pooling, max_length=None, keep="end"):
    """Each text alone."""
    config, params = load_model(folder)
    tokenizer = Tokenizer(folder, template="{response}", max_length=max_length, keep=keep, window=config.max_positions)
    out = []
    for ids in tokenizer.encode(texts)[0]:
        tokens, lengths = jnp.zeros((1, 64), jnp.int32).at[0, : len(ids)].set(ids), jnp.asarray([len(ids)])
        out.append(np.asarray(embed_tokens(params, tokens, lengths, config=config, poolings=(pooling,))[0][0]))
    return np.stack(out)


@pytest.mark.slow
@pytest.mark.parametrize("share", ["always", "never"])
def test_values_are_those_of_each_text_alone(tmp_path, folder, share):
    rows = random_rows(24)
    table = write_rows(tmp_path / "r.jsonl", rows)
    summary = embed(settings(folder, table, tmp_path / "store", share_prompts=share))
    store = EmbeddingStore(tmp_path / "store")
    texts = [f"{row['prompt']}\n\n{row['response']}" for row in rows]
    expected = directly(folder, texts, Pooling())
    np.testing.assert_allclose(store.rows([key_of(text) for text in texts]), expected, rtol=0, atol=2e-5)
    assert summary.texts == 24
    assert summary.embedded == summary.distinct == len(store) == len(set(texts))
    assert store.verify() == []


@pytest.mark.slow
def test_shared_prompts_may_fill_the_last_position(tmp_path):
    """With their padding, a prefix and the rest are longer than the model has positions."""
    folder = write_checkpoint(tmp_path / "gpt2", "gpt2")
    rows = [{"prompt": "abcdefghi " * 3, "response": letter * count} for letter in "xyz" for count in (5, 30, 60)]
    table = write_rows(tmp_path / "r.jsonl", rows)
    for share in ("always", "never"):
        summary = embed(settings(folder, table, tmp_path / share, share_prompts=share))
        assert summary.truncated == 3
    shared, plain = EmbeddingStore(tmp_path / "always"), EmbeddingStore(tmp_path / "never")
    np.testing.assert_allclose(shared.rows(plain.keys), plain[:], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.nightly
def test_an_encoder_pools_means_and_keeps_the_start(tmp_path, bert):
    rows = [{"prompt": "", "response": "abc def " * 20}, {"prompt": "a", "response": "b"}]
    table = write_rows(tmp_path / "r.jsonl", rows)
    summary = embed(settings(bert, table, tmp_path / "store", normalize=True))
    store = EmbeddingStore(tmp_path / "store")
    texts = [f"{row['prompt']}\n\n{row['response']}" for row in rows]
    expected = directly(bert, texts, Pooling("mean"), keep="start")
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(store.rows([key_of(text) for text in texts]), expected, rtol=0, atol=2e-5)
    assert summary.truncated == 1
    assert store.meta.made_by["keep"] == "start"
    assert store.meta.made_by["pooling"] == "mean"


@pytest.mark.slow
def test_several_poolings_and_layers_from_one_pass(tmp_path, folder):
    table = write_rows(tmp_path / "r.jsonl", random_rows(6))
    summary = embed(settings(folder, table, tmp_path / "all", pooling=("last", "mean"), layer=(1, -1)))
    assert [path.name for path in summary.stores] == ["last-1", "last-2", "mean-1", "mean-2"]
    embed(settings(folder, table, tmp_path / "one", pooling=("mean",), layer=(1,)))
    one, same = EmbeddingStore(tmp_path / "one"), EmbeddingStore(tmp_path / "all" / "mean-1")
    assert one.keys == same.keys
    np.testing.assert_array_equal(one[:], same[:])


def test_sentence_transformers_pooling_is_found(tmp_path):
    folder = write_checkpoint(tmp_path / "bert", "bert", eos=True)
    (folder / "1_Pooling").mkdir()
    said = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
    table = write_rows(tmp_path / "r.jsonl", random_rows(2))
    embed(settings(folder, table, tmp_path / "store"))
    assert EmbeddingStore(tmp_path / "store").meta.made_by["pooling"] == "cls"
    said |= {"pooling_mode_max_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
    with pytest.raises(JarmError, match="pooling_mode_cls_token and pooling_mode_max_tokens, which jarm"):
        embed(settings(folder, table, tmp_path / "other"))


def test_a_table_finds_its_rows_in_the_store(tmp_path, folder):
    rows = random_rows(40)
    scored = [{**row, "score": float(at % 7)} for at, row in enumerate(rows)]
    table = write_rows(tmp_path / "r.jsonl", scored)
    embed(settings(folder, table, tmp_path / "store"))
    tables = load(table, embeddings=tmp_path / "store", target="score", standardise=False)
    store = EmbeddingStore(tmp_path / "store")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    found = set()
    for side in tables:
        for places, mask, gold in zip(side.rows, side.mask, side.gold, strict=True):
            found |= {(int(place), float(score)) for place, score in zip(places[mask], gold[mask], strict=True)}
    keys = [key_of(f"{row['prompt']}\n\n{row['response']}") for row in rows]
    assert found == set(zip(store.indices(keys).tolist(), [row["score"] for row in scored], strict=True))
    assert sum(len(side.rows) for side in tables) == len(prompts)


def test_distinct_texts_that_are_the_same_tokens(tmp_path, folder, capsys):
    """Cut texts, unknown tokens: counted, said, embedded once, and equal to the bit, however often it is run."""
    rows = [
        *({"prompt": "abcdefghij", "response": text} for text in ("a", "b", "c")),  # the prompt fills all 8 tokens
        *({"prompt": "a", "response": text} for text in ("Ä", "Ö", "b")),  # two are unknown
        *({"prompt": "b", "response": text} for text in ("c", "d", "d")),  # a text twice is no pair
        {"prompt": "abcdefg", "response": "z"},  # as the first prompt, by its cut
    ]
    table = write_rows(tmp_path / "r.jsonl", rows)
    config = settings(folder, table, tmp_path / "store", max_length=8, keep="start")
    keys = [key_of(f"{row['prompt']}\n\n{row['response']}") for row in rows]
    for embedded in (9, 0):
        summary = embed(config)
        counts = (summary.texts, summary.distinct, summary.embedded, summary.truncated)
        assert counts == (10, 9, embedded, 4)
        assert (summary.same_texts, summary.pairs, summary.same_pairs) == (6, 7, 4)
        assert (summary.prompts, summary.same_prompts) == (4, 1)
        values = EmbeddingStore(tmp_path / "store").rows(keys)
        numbers = np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)
        assert [numbers.tolist().index(number) for number in numbers] == [0, 0, 0, 3, 3, 5, 6, 7, 7, 0]
    capsys.readouterr()
    embed(dataclasses.replace(config, show=10))
    shown = capsys.readouterr().out
    assert "line 1: 8 tokens, the first '<s>', the last 'g'; the text was cut\n" in shown
    assert f"; the same tokens as {table}, line 4\n" in shown
    assert shown.count("the same tokens as") == 4


@pytest.mark.parametrize("ending", ["npy", "safetensors"])
def test_rows_are_exported_in_the_order_of_a_table(tmp_path, folder, ending):
    rows = random_rows(20)
    rows += rows[3:6]
    table = write_rows(tmp_path / "r.jsonl", rows)
    embed(settings(folder, table, tmp_path / "store"))
    out = tmp_path / f"x.{ending}"
    assert main(["store", "export", str(tmp_path / "store"), "--out", str(out), "--table", str(table)]) == 0
    keys = [key_of(f"{row['prompt']}\n\n{row['response']}") for row in rows]
    exported = np.load(out) if ending == "npy" else load_file(out)["embeddings"]
    np.testing.assert_array_equal(exported, EmbeddingStore(tmp_path / "store").rows(keys))


def test_chats_of_every_shape(tmp_path):
    folder = write_checkpoint(tmp_path / "m", "qwen3", chat=CHAT)
    said = [{"role": "user", "content": "ab"}]
    rows = [{"messages": [*said, {"role": "assistant", "content": text}]} for text in ("cd", "ef", "cd")]
    table = write_rows(tmp_path / "r.jsonl", rows)
    summary = embed(settings(folder, table, tmp_path / "store"))
    assert (summary.texts, summary.distinct) == (3, 2)
    assert EmbeddingStore(tmp_path / "store").meta.made_by["chat_template"]


class Died(Exception):
    """Stands for a process that was killed."""


@pytest.fixture
def dies_after(monkeypatch):
    """Every batch is a commit, and after so many of them the process dies."""
    monkeypatch.setattr(sink, "COMMIT_BYTES", 1)
    append = StoreWriter.append

    def set_up(commits):
        left = iter(range(commits))

        def dying(self, keys, rows):
            if next(left, None) is None:
                raise Died
            return append(self, keys, rows)

        monkeypatch.setattr(StoreWriter, "append", dying)

    return set_up


@pytest.mark.parametrize("share", sampled(["always", "never"], "always"))
@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bits(tmp_path, folder, dies_after, share):
    table = write_rows(tmp_path / "r.jsonl", random_rows(120))
    whole = settings(folder, table, tmp_path / "whole", share_prompts=share)
    dies_after(10**6)
    embed(whole)
    cut = dataclasses.replace(whole, out=tmp_path / "cut")
    deaths = 0
    while True:
        dies_after(2)
        try:
            embed(cut)
        except Died:
            deaths += 1
            rows = len(EmbeddingStore(tmp_path / "cut"))
            (tmp_path / "cut" / ROWS).write_bytes(encode_rows(Rows(rows, rows + 1)))  # as an append begins
            with (tmp_path / "cut" / "shard-00000.bin").open("ab") as file:
                file.write(b"half a row")
            with (tmp_path / "cut" / "journal.jsonl").open("ab") as file:
                file.write(b'{"start": 1')
        else:
            break
    assert deaths >= 3
    store, reference = EmbeddingStore(tmp_path / "cut"), EmbeddingStore(tmp_path / "whole")
    assert store.keys == reference.keys
    assert np.asarray(store[:]).tobytes() == np.asarray(reference[:]).tobytes()
    assert store.verify() == []


def test_a_second_input_adds_what_is_new(tmp_path, folder, dies_after):
    """What was there when a job began is no part of it, even after an interruption."""
    rows = random_rows(60)
    first, both = write_rows(tmp_path / "a.jsonl", rows[:20]), write_rows(tmp_path / "b.jsonl", rows)
    whole, cut = (settings(folder, first, tmp_path / name) for name in ("whole", "cut"))
    for config in (whole, cut):
        embed(config)
    there = EmbeddingStore(tmp_path / "whole").keys
    added = embed(dataclasses.replace(whole, input=(str(both),)))
    assert added.distinct - added.embedded == len(there)
    dies_after(3)
    with pytest.raises(Died):
        embed(dataclasses.replace(cut, input=(str(both),)))
    dies_after(10**6)
    embed(dataclasses.replace(cut, input=(str(both),)))
    store, reference = EmbeddingStore(tmp_path / "cut"), EmbeddingStore(tmp_path / "whole")
    assert store.keys == reference.keys
    assert np.asarray(store[:]).tobytes() == np.asarray(reference[:]).tobytes()
    again = embed(dataclasses.replace(cut, input=(str(first),)))
    assert again.embedded == again.tokens == 0


SLOW_COMMAND = """
import sys, jarm.cli, jarm.embedding.sink
jarm.embedding.sink.COMMIT_BYTES = 1
sys.exit(jarm.cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [nightly(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_signal_loses_nothing_that_was_committed(tmp_path, folder, number, code):
    table = write_rows(tmp_path / "r.jsonl", random_rows(3000))
    options = ["--dtype", "float32", "--max-tokens-per-batch", "64", "--share-prompts", "never"]
    names = ["embed", "--model", str(folder), "--input", str(table), "--out", str(tmp_path / "store"), *options]
    process = subprocess.Popen([sys.executable, "-c", SLOW_COMMAND, *names], stderr=subprocess.PIPE)
    held, deadline = 0, time.monotonic() + 120
    while held < 30 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        with contextlib.suppress(JarmError):
            held = len(EmbeddingStore(tmp_path / "store"))
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == code, errors
    assert number == signal.SIGKILL or "the same command goes on" in errors
    kept = EmbeddingStore(tmp_path / "store").keys
    assert held <= len(kept) < 3000
    summary = embed(settings(folder, table, tmp_path / "store", max_tokens_per_batch=64, share_prompts="never"))
    store = EmbeddingStore(tmp_path / "store")
    assert store.keys[: len(kept)] == kept
    assert summary.embedded == summary.distinct - len(kept)
    assert store.verify() == []


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("share", ["always", "never"])
def test_the_number_of_shapes_does_not_grow_with_the_input(tmp_path, folder, share):
    """Whole batches have few shapes; what is left over at the end brings a few more."""
    compiled = []
    for at, count in enumerate((400, 1600)):
        before = embed_tokens._cache_size()
        table = write_rows(tmp_path / f"{at}.jsonl", random_rows(count, seed=at))
        embed(settings(folder, table, tmp_path / f"{at}", share_prompts=share))
        compiled.append(embed_tokens._cache_size() - before)
    assert compiled[1] <= 8


def test_a_text_is_tokenised_once_while_there_is_room(tmp_path, folder, monkeypatch):
    table = write_rows(tmp_path / "r.jsonl", random_rows(40))
    real, times = Tokenizer.encode, collections.Counter()

    def counted(self, texts):
        times.update(texts)
        return real(self, texts)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    for place, room in (("kept", extract_module.KEPT_TOKENS), ("again", 0)):
        monkeypatch.setattr(extract_module, "KEPT_TOKENS", room)
        times.clear()
        embed(settings(folder, table, tmp_path / place))
        assert (max(times.values()) == 1) == (place == "kept")
    stores = [EmbeddingStore(tmp_path / place) for place in ("kept", "again")]
    assert stores[0].keys == stores[1].keys
    np.testing.assert_array_equal(*(store.rows(store.keys) for store in stores))


def test_a_text_that_comes_out_infinite_is_named_and_the_others_stay(tmp_path, folder, monkeypatch):
    rows = random_rows(12)
    table = write_rows(tmp_path / "r.jsonl", rows)
    real = embed_module.extract

    def spoiled(*args, **options):
        for result in real(*args, **options):
            yield result._replace(values=[np.where((result.rows == 7)[:, None], np.inf, v) for v in result.values])

    monkeypatch.setattr(embed_module, "extract", spoiled)
    with pytest.raises(JarmError, match=r"r\.jsonl, line 8: the embedding is NaN or infinite"):
        embed(settings(folder, table, tmp_path / "store"))
    assert len(EmbeddingStore(tmp_path / "store"))
    monkeypatch.undo()
    embed(settings(folder, table, tmp_path / "store"))
    assert EmbeddingStore(tmp_path / "store").verify() == []


def test_show_prints_the_exact_text_and_ids_and_writes_nothing(tmp_path, folder, capsys):
    table = write_rows(tmp_path / "r.jsonl", [{"prompt": "ab", "response": "cd"}] * 3)
    config = settings(folder, table, tmp_path / "store", show=1)
    assert embed(config).stores == ()
    out = capsys.readouterr().out
    assert repr("ab\n\ncd") in out
    assert "1 4 5 31 31 6 7" in out
    assert not (tmp_path / "store").exists()


def test_another_model_or_setting_is_refused(tmp_path, folder, bert):
    table = write_rows(tmp_path / "r.jsonl", random_rows(4))
    config = settings(folder, table, tmp_path / "store")
    embed(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    for changed, named in [
        ({"template": "{prompt} {response}"}, "template"),
        ({"max_length": 20}, "max_length 64 there, 20 here"),
        ({"normalize": True}, "normalize False there, True here"),
        ({"layer": (1,)}, "layer 2 there, 1 here"),
        ({"model": str(bert)}, "weights"),
        ({"store_dtype": "bfloat16"}, "dtype 'float32' there, 'bfloat16' here"),
    ]:
        with pytest.raises(JarmError, match="made otherwise") as caught:
            embed(dataclasses.replace(config, **changed))
        assert named in str(caught.value)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}


def test_a_renamed_folder_is_the_same_model(tmp_path, folder):
    table = write_rows(tmp_path / "r.jsonl", random_rows(4))
    config = settings(folder, table, tmp_path / "store")
    embed(config)
    shutil.copytree(folder, tmp_path / "renamed")
    assert embed(dataclasses.replace(config, model=str(tmp_path / "renamed"))).embedded == 0


def test_a_journal_that_lost_rows_is_seen(tmp_path, folder, capsys):
    table = write_rows(tmp_path / "r.jsonl", random_rows(4))
    embed(settings(folder, table, tmp_path / "store"))
    journal = tmp_path / "store" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    assert main(["store", "verify", str(tmp_path / "store")]) == 1
    assert "journal.jsonl has the lines of 0 rows where 4 were committed" in capsys.readouterr().err


def test_two_writers_at_once_are_refused(tmp_path, folder):
    table = write_rows(tmp_path / "r.jsonl", random_rows(4))
    config = settings(folder, table, tmp_path / "store")
    embed(config)
    meta = EmbeddingStore(config.out).meta
    with (
        StoreWriter(config.out, meta.width, meta.made_by, dtype=meta.dtype),
        pytest.raises(JarmError, match="Another process is writing"),
    ):
        embed(config)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "", "response": ""}], {}, "r.jsonl, line 1"),
        ([{"prompt": "a"}], {}, "response"),
        ([{"prompt": "a", "response": "b"}], {"layer": (9,)}, "no layer 9"),
        ([{"prompt": "a", "response": "b"}], {"layer": ()}, "`layer` is empty"),
        ([{"prompt": "a", "response": "b"}], {"pooling": ("max",)}, "pooling 'max'"),
        ([{"prompt": "a", "response": "b"}], {"dtype": "int8"}, "`dtype` is 'int8'"),
        ([{"prompt": "a", "response": "b"}], {"tensor_parallel": 3}, "3 of 1 devices"),
        ([{"prompt": "a", "response": "b"}], {"dtype": "float16"}, "`dtype` is 'float16'"),
        (
            [{"prompt": "a", "response": "b"}],
            {"max_tokens_per_batch": 0},
            "`max_tokens_per_batch` is 0: give at least 1",
        ),
        ([{"prompt": "a", "response": "b"}], {"model": "no-such-folder"}, "neither a folder nor"),
        ([{"prompt": "a", "response": "b"}], {"template": "{prompt} {nothing}"}, "nothing"),
        ([{"prompt": "a", "response": "b"}], {"store_dtype": "int8"}, "int8"),
        (
            [{"prompt": "a", "response": "b"}],
            {"share_prompts": "yes"},
            "`share_prompts` is 'yes': choose one of auto, always, never",
        ),
        ([{"prompt": "a", "response": "b"}], {"process_id": 1}, "goes with `--coordinator HOST:PORT`"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, folder, rows, options, message):
    table = write_rows(tmp_path / "r.jsonl", rows)
    options = {"model": folder} | options
    with pytest.raises(JarmError, match=message) as caught:
        embed(settings(path=table, out=tmp_path / "store", **options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_no_space_left_is_one_sentence_and_keeps_what_was_there(tmp_path, folder, monkeypatch):
    rows = random_rows(30)
    embed(settings(folder, write_rows(tmp_path / "a.jsonl", rows[:8]), tmp_path / "store"))
    kept = EmbeddingStore(tmp_path / "store").keys

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JarmError, match="No space left"):
        embed(settings(folder, write_rows(tmp_path / "b.jsonl", rows), tmp_path / "store"))
    monkeypatch.undo()
    assert EmbeddingStore(tmp_path / "store").keys == kept
    embed(settings(folder, tmp_path / "b.jsonl", tmp_path / "store"))
    assert EmbeddingStore(tmp_path / "store").verify() == []


def test_the_command(tmp_path, folder, capsys):
    table = write_rows(tmp_path / "r.jsonl", random_rows(6))
    names = ["embed", "--model", str(folder), "--input", str(table), "--out", str(tmp_path / "store")]
    assert main([*names, "--pooling", "last", "--layer", "-1", "--template", r"{prompt}\n\n{response}"]) == 0
    assert "6 embedded now, 0 were there" in capsys.readouterr().out
    assert main([*names, "--template", r"{prompt}\n\n{response}"]) == 0
    assert "0 embedded now, 6 were there" in capsys.readouterr().out
    assert main([*names, "--max-length", "9"]) == 1
    assert "made otherwise" in capsys.readouterr().err
