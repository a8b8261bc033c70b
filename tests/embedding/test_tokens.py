"""From prompt and response to ids: templates, special tokens, truncation."""

import json

import numpy as np
import pytest
from fixtures.tiny import CHAT, LETTERS, write_checkpoint

from jarm.core.status import JarmError
from jarm.data.store import fill
from jarm.embedding import chat, tokens
from jarm.embedding.config import EmbedConfig
from jarm.embedding.tokens import CHAT_KEY, Tokenizer

ROW = {"prompt": "ab", "response": "cd"}


def ids_of(text):
    return [4 + LETTERS.index(letter) for letter in text]


def make(folder, *, template=None, max_length=None, keep="end", window=64, **checkpoint):
    if not folder.exists():
        write_checkpoint(folder, **checkpoint)
    return Tokenizer(folder, template=template, max_length=max_length, keep=keep, window=window)


def encoded(tokenizer, text):
    (ids,), (cut,) = tokenizer.encode([text])
    assert ids.dtype == np.int32
    return ids.tolist(), cut


def test_given_template(tmp_path):
    tokenizer = make(tmp_path / "m", template="{prompt}: {response}")
    assert tokenizer.render(ROW) == "ab: cd"
    assert tokenizer.key_template == "{prompt}: {response}"
    assert encoded(tokenizer, "ab: cd") == ([1, *ids_of("ab: cd")], False)


def test_default_template_is_the_models_own_or_two_line_ends(tmp_path):
    assert make(tmp_path / "a").render(ROW) == "ab\n\ncd"
    chat = make(tmp_path / "b", chat=CHAT)
    assert chat.render(ROW) == "<s>u:ab|a:cd|"
    assert make(tmp_path / "b", template="{response}").render(ROW) == "cd"
    assert chat.made_by["chat_template"]
    assert chat.made_by["template"] == CHAT_KEY


@pytest.mark.parametrize("bos", [True, False])
def test_bos_is_never_there_twice(tmp_path, bos):
    chat = make(tmp_path / "m", chat=CHAT, bos=bos)
    assert encoded(chat, chat.render(ROW)) == ([1, *ids_of("u:ab|a:cd|")], False)
    plain = make(tmp_path / "m", template="<s>{response}")
    assert encoded(plain, plain.render(ROW)) == ([1, *ids_of("cd")], False)


def test_messages_go_through_the_chat_template(tmp_path):
    tokenizer = make(tmp_path / "m", chat=CHAT)
    prompt = [{"role": "system", "content": "x"}, {"role": "user", "content": "ab"}]
    assert tokenizer.render({"prompt": prompt, "response": "cd"}) == "<s>s:x|u:ab|a:cd|"
    answer = [{"role": "assistant", "content": "cd"}]
    assert tokenizer.render({"prompt": prompt, "response": answer}) == "<s>s:x|u:ab|a:cd|"


@pytest.mark.parametrize(("keep", "kept"), [("start", [1, *ids_of("abc"), 2]), ("end", [1, *ids_of("def"), 2])])
def test_truncation_keeps_special_tokens_and_one_end(tmp_path, keep, kept):
    tokenizer = make(tmp_path / "m", template="{response}", max_length=5, keep=keep, eos=True)
    assert encoded(tokenizer, "abcdef") == (kept, True)
    assert encoded(tokenizer, "abc") == ([1, *ids_of("abc"), 2], False)


@pytest.mark.parametrize(("keep", "kept"), [("start", "u:ab"), ("end", ":cd|")])
def test_truncation_of_a_chat(tmp_path, keep, kept):
    tokenizer = make(tmp_path / "m", chat=CHAT, max_length=5, keep=keep)
    assert encoded(tokenizer, tokenizer.render(ROW)) == ([1, *ids_of(kept)], True)


def test_keys_of_chats_cannot_be_confused(tmp_path):
    tokenizer = make(tmp_path / "m", chat=CHAT)
    one, other = {"prompt": "a\n\nb", "response": "c"}, {"prompt": "a", "response": "b\n\nc"}
    assert fill(tokenizer.key_template, one) != fill(tokenizer.key_template, other)


def test_the_day_is_not_part_of_a_text(tmp_path):
    dated = make(tmp_path / "m", chat="{{ strftime_now('%d %b %Y') }}: " + CHAT)
    assert dated.render(ROW) == "26 Jul 2024: <s>u:ab|a:cd|"


def test_numbers_are_filled_in_as_the_key_has_them(tmp_path):
    tokenizer = make(tmp_path / "m", template="{n} {response}")
    assert (
        tokenizer.render({"n": 3, "response": "a"}) == "3 a" == fill(tokenizer.key_template, {"n": 3, "response": "a"})
    )


def test_what_decides_the_ids_has_a_fingerprint(tmp_path):
    one, same = make(tmp_path / "a", chat=CHAT).made_by, make(tmp_path / "b", chat=CHAT).made_by
    assert one == same
    assert make(tmp_path / "c", chat=CHAT + " ").made_by["chat_template"] != one["chat_template"]
    assert make(tmp_path / "d", chat=CHAT, eos=True).made_by["tokenizer"] != one["tokenizer"]


def test_settings_in_tokenizer_json_do_not_truncate_or_pad(tmp_path):
    """all-MiniLM-L6-v2 comes with truncation to 128 tokens, and padding."""
    from tokenizers import Tokenizer as Backend

    folder = write_checkpoint(tmp_path / "m")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=30)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = make(folder)
    assert encoded(tokenizer, "abcdef") == ([1, *ids_of("abcdef")], False)
    assert tokenizer.made_by == make(tmp_path / "other").made_by


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "chat"}, "no chat template: give a --template"),
        ({"template": "nothing"}, "names no column"),
        ({"max_length": 65}, "65 tokens: give a --max-length of 2 to 64"),
        ({"max_length": 1}, "1 tokens"),
        ({"keep": "middle"}, "the 'middle'"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, options, message):
    with pytest.raises(JarmError, match=message):
        make(tmp_path / "m", **options)


def test_bad_rows_and_folders(tmp_path):
    with pytest.raises(JarmError, match="cannot hold: use a model with a chat template"):
        make(tmp_path / "m").render({"prompt": [{"role": "user", "content": "a"}], "response": "b"})
    strict = make(tmp_path / "n", chat="{{ raise_exception('no system, please') }}")
    with pytest.raises(JarmError, match="no system, please"):
        strict.render(ROW)
    (tmp_path / "empty").mkdir()
    with pytest.raises(JarmError, match="no tokenizer"):
        Tokenizer(tmp_path / "empty", template=None, max_length=None, keep="end", window=64)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ prompt }} {response}", "braces that are not around"),
        ("{prompt} {{response}}", "braces that are not around"),
        ("{prompt } {response}", "braces that are not around"),
        ("{prompt!r} {response}", "braces that are not around"),
        ("{prompt:>9} {response}", "braces that are not around"),
        ("{messages[0]} {response}", "braces that are not around"),
        ("{% for m in messages %}{response}", "braces that are not around"),
        ("{} {response}", "braces that are not around"),
        ("{prompt} {response", "braces that are not around"),
        ("{prompt}", "leaves the responses out"),
        ("{prompt} {Response}", "leaves the responses out"),
        ("", "`template` is empty|names no column"),
        ("Chat", "names no column"),
    ],
)
def test_templates_that_lose_a_part_of_the_text_are_refused_where_they_are_built(tmp_path, template, message):
    with pytest.raises(JarmError, match=message):
        EmbedConfig("model", ("responses.jsonl",), template=template)
    if template == "":
        with pytest.raises(JarmError, match=message):
            make(tmp_path / "m", template=template)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """Checkpoints whose tokens are of several letters: bytes after a split at spaces, and pieces without any split."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    text = ["the cat sat on the mat and that is the end of that cat", "aaaa aa aaaaaaaa a", "banana bananas anna 1234"]
    folders = []
    for name in ("bytes", "pieces"):
        folder = write_checkpoint(tmp_path_factory.mktemp(name) / "m", chat=CHAT)
        backend = Backend(models.BPE(unk_token="<unk>"))
        if name == "bytes":
            backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        else:
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
        special = ["<pad>", "<s>", "</s>", "<unk>"]
        backend.train_from_iterator(text * 9, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
        backend.save(str(folder / "tokenizer.json"))
        folders.append(folder)
    return folders


def lengths_seen(tokenizer, monkeypatch):
    """Lengths of the texts that are tokenised from now on."""
    seen, ids_of_parts = [], tokenizer._ids
    monkeypatch.setattr(tokenizer, "_ids", lambda given: seen.extend(map(len, given)) or ids_of_parts(given))
    return seen


@pytest.mark.parametrize("keep", ["start", "end"])
@pytest.mark.parametrize("template", ["{response}", "chat"])
def test_long_texts_are_cut_before_they_are_tokenised(bpe, monkeypatch, keep, template):
    """The ids are those of the whole text, cut afterwards."""
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "banana", "annas", "1234", "é", "xyz" * 9, "a" * 7, "\n", " "]
    bodies = [" ".join(rng.choice(words, 400)), "a" * 1003, "banana" * 150, " " * 900 + "the cat " * 60, "the end"]
    for folder in bpe:
        tokenizer = make(folder, template=template, max_length=12, keep=keep)
        texts = [tokenizer.render({"prompt": "that", "response": body}) for body in bodies]
        monkeypatch.setattr(tokenizer, "_whole", 1 << 30)
        whole, cut = tokenizer.encode(texts)
        assert cut == [True, True, True, True, template == "chat"]
        monkeypatch.setattr(tokenizer, "_whole", 96)
        seen = lengths_seen(tokenizer, monkeypatch)
        ids, again = tokenizer.encode(texts)
        assert again == cut
        for one, other in zip(ids, whole, strict=True):
            np.testing.assert_array_equal(one, other)
        assert max(seen[: seen.index(1024) + 4]) < 1100


def test_a_text_beyond_all_bounds_is_cut_and_counted(bpe, monkeypatch):
    """No more than so many characters are read, even where they give few tokens."""
    tokenizer = make(bpe[0], template="{response}", max_length=12)
    monkeypatch.setattr(tokens, "_AT_ONCE", 500)
    monkeypatch.setattr(tokenizer, "_whole", 96)
    parts = lengths_seen(tokenizer, monkeypatch)
    assert tokenizer.encode(["a" * 100_000])[1] == [True]
    assert max(parts) <= 1024


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'ab' * 10 ** 10 }}", "it needs too much memory"),
        ("{{ 'ab' * 10 ** 7 }}", "a text of 20,000,000 characters"),
        ("{{ raise_exception('no') }}", "refuses these messages \\(no\\)"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses these messages"),
        ("{% for i in range(10 ** 8) %}{% endfor %}", "refuses these messages"),
        ("{% for i in range(9 ** 5) %}{% for j in range(9 ** 5) %}{% endfor %}{% endfor %}", "takes more than"),
        pytest.param("{{ 9 ** (9 ** 9) }}", "takes more than", marks=pytest.mark.slow),
        pytest.param("{{ '%99999999999d' % 1 }}", "too much memory", marks=pytest.mark.slow),
    ],
)
def test_chat_templates_are_held_to_limits(template, words, monkeypatch):
    """Loops that never end, and texts of gigabytes, are one sentence; the next template is rendered as ever."""
    if "takes" in words:
        chat._stop()
        monkeypatch.setattr(chat, "SECONDS", 0.5)
    with pytest.raises(JarmError, match=words):
        chat.render(template, {"bos_token": "<s>"}, [{"role": "user", "content": "x"}])
    if "takes" not in words:
        assert chat.render(CHAT, {}, [{"role": "user", "content": "\ud800é\x00"}]) == "<s>u:\ud800é\x00|"


def change(folder, file, value):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | value))


def test_of_several_chat_templates_the_default_is_taken(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ strftime_now('%d') }} " + CHAT}]
    change(folder, "tokenizer_config.json", {"chat_template": named})
    assert make(folder).render(ROW) == "26 Jul 2024 <s>u:ab|a:cd|"
    change(folder, "tokenizer_config.json", {"chat_template": named[:1]})
    with pytest.raises(JarmError, match="has the chat templates tools, and none that is the default"):
        make(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_may_have_a_file_of_its_own(tmp_path, name):
    folder = write_checkpoint(tmp_path / "m")
    (folder / name).write_text(CHAT if name.endswith("jinja") else json.dumps({"chat_template": CHAT}))
    assert make(folder).render(ROW) == "<s>u:ab|a:cd|"


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("tokenizer_config.json", {"model_max_length": 0}, "the `model_max_length` '0', no number of at least 1"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "'long', no number of at least 1"),
        ("tokenizer_config.json", {"unk_token": ""}, "no tokenizer that transformers can read"),
        (
            "tokenizer.json",
            {"model": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "b"}},
            "Missing .UNK. token",
        ),
        (
            "tokenizer.json",
            {"model": {"type": "WordLevel", "vocab": {"a": 10**9}, "unk_token": "a"}},
            "a token of number 1,000,000,000",
        ),
    ],
)
def test_files_of_tokenizers_that_do_not_fit(tmp_path, file, value, message):
    folder = write_checkpoint(tmp_path / "m")
    change(folder, file, value)
    with pytest.raises(JarmError, match=message):
        make(folder).encode(["xyz"])


def test_tokens_beyond_the_embeddings_of_the_model_are_refused(tmp_path):
    """The lookup of the model would take the last embedding for each of them."""
    folder = write_checkpoint(tmp_path / "m")
    options = {"template": "{response}", "max_length": None, "keep": "end", "window": 64}
    assert Tokenizer(folder, vocab=7, **options).encode(["abc"])[0][0].tolist() == [1, *ids_of("abc")]
    with pytest.raises(JarmError, match=r"makes the token 7 \('d'\), but the model has embeddings of 7 tokens only"):
        Tokenizer(folder, vocab=7, **options).encode(["abcd"])
