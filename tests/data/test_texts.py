"""Texts in: every layout gives the same prompts and responses, and each fault is one sentence that names the row."""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jarm.core.status import JarmError
from jarm.data.datasets import load
from jarm.data.store import canonical, fill, key_of
from jarm.data.texts import JOINED, TEMPLATE, WHOLE, read_texts
from jarm.data.writer import StoreWriter


def says(role, content, **more):
    return {"role": role, "content": content, **more}


def asked(content):
    return [says("user", content)]


def answered(content):
    return [says("assistant", content)]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(params=["jsonl", "parquet"])
def table(request, tmp_path):
    """Write rows to a table of either kind."""
    return lambda rows, name="t": write(tmp_path / f"{name}.{request.param}", rows)


def complaint(*args, **kwargs):
    """The message of the error that reading raises: one sentence of printable words."""
    with pytest.raises(JarmError) as caught:
        read_texts(*args, **kwargs)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def pairs(texts):
    return list(zip(texts.columns["prompt"], texts.columns["response"], strict=True))


def filled(texts):
    return [fill(texts.template, {"prompt": prompt, "response": response}) for prompt, response in pairs(texts)]


# --- layouts --------------------------------------------------------------------------------------------------

PLAIN = [("p0", "a"), ("p0", "b c"), ("p1", "d"), ("p1", "e")]
TURNS = [(asked(prompt), response) for prompt, response in PLAIN]


def grouped():
    """Prompt and its two responses."""
    return [("p0", "a", "b c"), ("p1", "d", "e")]


@pytest.mark.parametrize(
    ("rows", "expected", "layout"),
    [
        ([{"prompt": p, "response": r} for p, r in PLAIN], PLAIN, "prompt + response"),
        ([{"prompt": p, "completion": r} for p, r in PLAIN], PLAIN, "prompt + completion"),
        ([{"prompt": asked(p), "completion": answered(r)} for p, r in PLAIN], TURNS, "prompt + completion"),
        ([{"prompt": asked(p), "response": r} for p, r in PLAIN], TURNS, "prompt + response"),
        ([{"prompt": p, "responses": r} for p, *r in grouped()], PLAIN, "prompt + responses"),
        ([{"prompt": asked(p), "responses": r} for p, *r in grouped()], TURNS, "prompt + responses"),
        ([{"prompt": p, "chosen": a, "rejected": b} for p, a, b in grouped()], PLAIN, "prompt + chosen + rejected"),
        (
            [{"prompt": asked(p), "chosen": answered(a), "rejected": answered(b)} for p, a, b in grouped()],
            TURNS,
            "prompt + chosen + rejected",
        ),
        (
            [{"prompt": p, "chosen": answered(a), "rejected": answered(b)} for p, a, b in grouped()],
            PLAIN,
            "prompt + chosen + rejected",
        ),
        (
            [{"chosen": asked(p) + answered(a), "rejected": asked(p) + answered(b)} for p, a, b in grouped()],
            TURNS,
            "chosen + rejected, which begin with the prompt",
        ),
        (  # a prompt that the conversations hold besides
            [
                {"prompt": p, "chosen": asked(p) + answered(a), "rejected": asked(p) + answered(b)}
                for p, a, b in grouped()
            ],
            TURNS,
            "chosen + rejected, which begin with the prompt",
        ),
        (
            [{"messages": asked(p) + answered(r)} for p, r in PLAIN],
            TURNS,
            "messages, which begin with the prompt",
        ),
    ],
)
def test_layouts(table, rows, expected, layout):
    path = table(rows)
    texts = read_texts([path])
    assert pairs(texts) == expected
    assert (texts.layout, texts.template) == (layout, TEMPLATE)
    assert len(texts.places) == len(expected)
    first, last = (f"{path}, line 1", f"{path}, line {len(rows)}")
    if path.suffix == ".parquet":
        first, last = (f"{path}, row 0", f"{path}, row {len(rows) - 1}")
    if "responses" in rows[0]:
        assert (texts.places[0], texts.places[-1]) == (f"{first}, response 0", f"{last}, response 1")
    elif "chosen" in rows[0]:
        assert (texts.places[0], texts.places[-1]) == (f"{first}, chosen", f"{last}, rejected")
    else:
        assert (texts.places[0], texts.places[-1]) == (first, last)


def test_precedence(table):
    """With everything there, response; then as what comes first is taken away."""
    row = {
        "prompt": "p",
        "response": "1",
        "responses": ["2"],
        "completion": "3",
        "chosen": "4",
        "rejected": "5",
        "messages": asked("p") + answered("6"),
    }
    for left in (["1"], ["2"], ["3"], ["4", "5"], ["6"]):
        assert read_texts([table([row])]).columns["response"] == left
        for name in {"1": ["response"], "2": ["responses"], "3": ["completion"], "4": ["chosen"]}.get(left[0], []):
            del row[name]
    row = {"response": "1", "chosen": "a b", "rejected": "a c"}  # no prompt for the response
    assert read_texts([table([row])]).columns["response"] == [" b", " c"]


def test_columns_of_other_names(table):
    rows = [{"instruction": "p", "a": "x", "b": "y", "judge": "z", "prompt": "other"}]
    texts = read_texts([table(rows)], prompt="instruction", responses=["a", "b"], extra=["judge"])
    assert texts.columns == {"judge": ["z", "z"], "prompt": ["p", "p"], "response": ["x", "y"]}
    assert texts.layout == "instruction + a + b"
    texts = read_texts([table([{"question": "p", "chosen": "x", "rejected": "y"}])], prompt="question")
    assert pairs(texts) == [("p", "x"), ("p", "y")]
    texts = read_texts([table([{"a": asked("p") + answered("x"), "b": asked("p") + answered("y")}])], responses="ab")
    assert pairs(texts) == [(asked("p"), "x"), (asked("p"), "y")]


def test_lists_in_several_columns_stand_one_behind_the_other(table):
    rows = [
        {"prompt": "p", "chosen": ["a"], "rejected": ["b", "c"]},
        {"prompt": "q", "chosen": ["d", "e"], "rejected": ["f"]},
    ]
    texts = read_texts([table(rows)])
    assert pairs(texts) == [("p", "a"), ("p", "b"), ("p", "c"), ("q", "d"), ("q", "e"), ("q", "f")]
    assert (texts.layout, texts.template) == ("prompt + chosen + rejected", TEMPLATE)
    assert texts.places[4].endswith("response 1")


def test_conversations_that_part_early_keep_their_messages(table):
    start = [says("system", "s"), *asked("p")]
    long = [*answered("a"), *asked("q"), *answered("b")]
    rows = [
        {"chosen": start + long, "rejected": start + answered("c")},
        {"chosen": start + answered("same"), "rejected": start + answered("same")},
        {"chosen": asked("1") + answered("d"), "rejected": asked("2") + answered("d")},
    ]
    assert pairs(read_texts([table(rows)])) == [
        (start, long),
        (start, "c"),
        (start, "same"),
        (start, "same"),
        ([], asked("1") + answered("d")),
        ([], asked("2") + answered("d")),
    ]


def test_keys_that_arrow_adds_are_dropped_again(table):
    rows = [
        {"messages": [says("user", "p", name="u", tool={"x": 1, "y": None}), *answered("a")], "messages2": None},
        {"messages": [says("user", "p"), says("assistant", "b", name="m")]},
    ]
    texts = read_texts([table(rows)])
    assert pairs(texts) == [([says("user", "p", name="u", tool={"x": 1})], "a"), (asked("p"), "b")]


H, A = "\n\nHuman:", "\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (f"{H} hi{A} Hello", f"{H} hi{A} Hey", f"{H} hi{A}"),
        (f"{H} hi{A} Hello", f"{H} hi{A}", f"{H} hi{A}"),
        (f"{H} hi{A} a{H} b{A} c", f"{H} hi{A} a{H} b{A} c", f"{H} hi{A} a{H} b{A}"),
        (f"{H} hi{A} a{H} bad{A} c", f"{H} hi{A} a{H} bed{A} c", f"{H} hi{A}"),
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("one two", "one two three", "one"),
        ("Say it:\n\n yes", "Say it:\n\n no", "Say it:"),
        ("  a b", "  a c", "  a"),
        ("yes", "no", ""),
        ("same words", "same words", "same"),
    ],
)
def test_strings_are_parted_where_the_prompt_ends(tmp_path, chosen, rejected, prompt):
    rows = [{"chosen": chosen, "rejected": rejected}, {"chosen": "x y", "rejected": "x z"}]
    texts = read_texts([write(tmp_path / "t.jsonl", rows)])
    assert texts.columns["prompt"][:2] == [prompt, prompt]
    assert texts.template == JOINED
    assert filled(texts) == [chosen, rejected, "x y", "x z"]


@given(st.lists(st.tuples(*[st.text("ab \n", min_size=1, max_size=9)] * 3), min_size=1, max_size=5))
def test_parting_and_joining_changes_nothing(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("t") / "t.jsonl"
    rows = [{"a": "x " + a, "b": "x " + b, "c": "x " + c} for a, b, c in rows]
    texts = read_texts([write(path, rows)], responses=["a", "b", "c"])
    assert filled(texts) == [text for row in rows for text in row.values()]
    for row, prompt in zip(rows, texts.columns["prompt"][::3], strict=True):
        shared = 0
        while len({text[shared : shared + 1] for text in row.values()}) == 1 and shared < len(row["a"]):
            shared += 1
        words = [e for e in range(1, shared) if row["a"][e].isspace() and not row["a"][e - 1].isspace()]
        assert prompt == row["a"][: words[-1]]


def test_strings_that_hold_their_prompt_are_not_given_it_twice(table):
    rows = [{"prompt": f"{H} {n}{A}", "chosen": f"{H} {n}{A} x", "rejected": f"{H} {n}{A} y"} for n in range(3)]
    rows[1]["prompt"] = None
    texts = read_texts([table(rows)])
    assert texts.layout == "chosen + rejected, which begin with the prompt"
    assert filled(texts) == [row[side] for row in rows for side in ("chosen", "rejected")]


def whole_rows(count=20):
    """Strings that begin with their prompt, a special token or white space before it."""
    lead = ["", "<s>", "\n", "<|begin_of_text|> ", "[CLS] "]
    prompts = [f"What is {n}?" for n in range(count)]
    starts = [lead[n % 5] + prompt for n, prompt in enumerate(prompts)]
    return [
        {"prompt": prompt + "\n" * (n % 2), "a": f"{start} x", "b": f"{start} y"}
        for n, (prompt, start) in enumerate(zip(prompts, starts, strict=True))
    ]


@pytest.mark.parametrize("columns", [("chosen", "rejected"), ("response",), ("completion",), ("responses",)])
@pytest.mark.parametrize("odd", [(), (7,), (2, 5, 11), range(2, 20), range(1, 20), range(20)], ids=len)
def test_strings_that_begin_with_their_prompt_in_some_rows_only(table, columns, odd):
    """All rows: never twice. None, or few: as they are, and said. Else: refused, with the rows."""
    rows = whole_rows()
    for at in odd:
        rows[at] |= {"a": "x", "b": "What is that? y"}
    held = 20 - len(odd)
    given = [
        {"prompt": row["prompt"]}
        | (
            {"responses": [row["a"], row["b"]]}
            if columns == ("responses",)
            else dict(zip(columns, (row["a"], row["b"]), strict=False))
        )
        for row in rows
    ]
    path = table(given)
    strings = [
        text for row in given for name in columns for text in ([row[name]] if isinstance(row[name], str) else row[name])
    ]
    if held == 20:
        texts = read_texts([path])
        assert filled(texts) == strings
        assert texts.template == (JOINED if len(columns) == 2 else WHOLE)
        assert texts.layout.endswith(", which begin with the prompt")
        assert bool(texts.notes) == (len(columns) == 1)
    elif held >= 2:
        few = sorted(odd if held >= 10 else set(range(20)) - set(odd))
        places = ", ".join(
            f"{'line' if path.suffix == '.jsonl' else 'row'} {at + (path.suffix == '.jsonl')}" for at in few[:3]
        )
        words = complaint([path])
        assert f"begins with the prompt in {held} of 20 rows ({'not in ' * (held >= 10)}{places}" in words
        texts = read_texts([path], as_given=True)
        assert (texts.columns["response"], texts.template, len(texts.notes)) == (strings, TEMPLATE, 1)
    else:
        texts = read_texts([path])
        assert (texts.columns["response"], texts.template) == (strings, TEMPLATE)
        assert [f"in {held} of 20 rows" in note for note in texts.notes] == [True] * held


def test_rows_without_a_prompt_do_not_decide(table):
    rows = whole_rows(4)
    for prompt in (None, "", " \n"):
        rows[1] |= {"prompt": prompt, "a": "z u", "b": "z v"}
        texts = read_texts([table(rows)], responses=("a", "b"))
        assert filled(texts) == [row[side] for row in rows for side in "ab"]


def test_conversations_that_begin_with_the_assistants_messages_of_the_prompt(table):
    """Whole conversations by their prompt: all messages of it, or its text."""
    start = answered("welcome")
    for prompt in (start + asked("p"), "p"):
        rows = [
            {"prompt": prompt, "chosen": start + asked("p") + answered(a), "rejected": start + asked("p") + answered(b)}
            for a, b in ("xy", "zu")
        ]
        assert pairs(read_texts([table(rows)])) == [(start + asked("p"), answer) for answer in "xyzu"]
        rows[1]["chosen"] = answered("x")
        assert "chosen begins with a message of 'assistant', and others do not" in complaint([table(rows)])


# --- where from -----------------------------------------------------------------------------------------------


def test_several_files_and_folders_of_shards(tmp_path):
    def rows(start):
        return [{"prompt": f"p{n}", "response": "r", "id": n} for n in range(start, start + 2)]

    folder = tmp_path / "shards"
    folder.mkdir()
    write(folder / "part-1.parquet", rows(2))
    write(folder / "part-0.jsonl", rows(0))
    (folder / "README.md").write_text("not a shard")
    (folder / "._part-0.jsonl").write_text("neither")
    last = tmp_path / "last.jsonl"
    last.write_text("\n" + "".join(json.dumps(row) + "\n\n" for row in rows(4)))
    texts = read_texts([folder, last], extra=["id"])
    assert texts.columns["prompt"] == [f"p{n}" for n in range(6)]
    assert texts.columns["id"] == list(range(6))
    places = ["shards/part-0.jsonl, line 1", "shards/part-0.jsonl, line 2"]
    places += [
        "shards/part-1.parquet, row 0",
        "shards/part-1.parquet, row 1",
        "last.jsonl, line 2",
        "last.jsonl, line 4",
    ]
    assert list(texts.places) == [f"{tmp_path}/{place}" for place in places]
    write(last, [{"prompt": "p", "responses": ["r"]}])
    assert f"is read as prompt + response, and {last} as prompt + responses:" in complaint([folder, last])


ROWS = [{"chosen": asked(p) + answered(a), "rejected": asked(p) + answered(b), "n": 1} for p, a, b in grouped()]


def test_a_dataset_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    texts = read_texts([tmp_path / "one"], extra=["n"])
    assert pairs(texts) == TURNS
    assert texts.places[3] == f"{tmp_path}/one, row 1, rejected"
    assert "is one dataset without splits" in complaint([tmp_path / "one"], split="train")
    parts = datasets.DatasetDict({"train": data.select([1]), "test": data.select([0])})
    parts.save_to_disk(tmp_path / "two")
    assert pairs(read_texts([tmp_path / "two"])) == TURNS[2:]
    assert pairs(read_texts([tmp_path / "two"], split="test")) == TURNS[:2]
    assert "no split 'dev': give `--split` one of train, test" in complaint([tmp_path / "two"], split="dev")
    assert "no column 'm': it has chosen, rejected, n" in complaint([tmp_path / "two"], extra=["m"])
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"")
    assert "cannot be read as a dataset on disk" in complaint([tmp_path / "one"])


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked_for = []

    def load_dataset(name, split):
        asked_for.append((name, split))
        if split == "dev":
            raise ValueError("Unknown split \"dev\". Should be one of ['train'].\nmore")
        return datasets.Dataset.from_list(ROWS if name == "owner/some-data" else [])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert pairs(read_texts(["owner/some-data"])) == TURNS
    assert pairs(read_texts(["owner/some-data"], split="test[:10]")) == TURNS
    assert asked_for == [("owner/some-data", "train"), ("owner/some-data", "test[:10]")]
    assert "holds no rows" in complaint(["owner/empty"])
    message = complaint(["owner/some-data"], split="dev")
    assert "nor as a dataset of the hub (Unknown split \"dev\". Should be one of ['train']): check" in message


def test_without_datasets_one_sentence_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    assert "owner/data is no file or folder here, but may be on the hub: to read it, `pip install 'jarm-jax[hub]'`" in (
        complaint(["owner/data"])
    )
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert "is a dataset that `save_to_disk` wrote: to read it, `pip" in complaint([tmp_path / "saved"])


# --- faults ---------------------------------------------------------------------------------------------------

GOOD = {"prompt": "p", "response": "r"}
PAIR = {"chosen": asked("p") + answered("a"), "rejected": asked("p") + answered("b")}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"promt": "p", "response": "r"}], "has no column 'prompt' (did you mean 'promt'?); of promt, response,"),
        ([{"prompt": "p", "respons": "r"}], "has no column 'response' (did you mean 'respons'?)"),
        ([{"prompt": "p", "chosen": "r"}], "no column 'response'; of prompt, chosen, name"),
        ([GOOD, {**GOOD, "response": None}], "@1: response is missing"),
        ([GOOD, {**GOOD, "prompt": None}], "@1: prompt is missing"),
        ([{**GOOD, "response": None}], "@0: response is missing"),
        ([{**GOOD, "response": 5}], "@0: response holds int64"),
        ([{**GOOD, "prompt": 5}], "@0: prompt holds int64"),
        ([{**GOOD, "prompt": ["a", "b"]}], "@0: prompt holds a list that is not of messages"),
        ([GOOD, GOOD, {"prompt": "", "response": ""}], "@2: prompt and response are both empty"),
        ([{"prompt": asked(""), "response": ""}], "@0: prompt and response are both empty"),
        ([{"prompt": "p", "responses": ["r"]}, {"prompt": "p", "responses": []}], "@1: responses is an empty list"),
        ([{"prompt": "p", "responses": []}], "@0: responses is an empty list"),
        ([{"prompt": "p", "responses": ["r", None]}], "@0: responses has an element that is missing"),
        ([{"prompt": "p", "responses": ["a", "b"]}, {"prompt": "", "responses": ["c", ""]}], "@1: prompt and"),
        ([{"prompt": "p", "responses": None}], "@0: responses is missing"),
        ([{"prompt": "p", "responses": [{"model": "m", "text": "r"}]}], "@0: responses holds list<"),
        ([{"messages": answered("a")}, {"messages": asked("p")}], "@1: messages ends with a message of 'user'"),
        ([{"messages": answered("a")}, {"messages": []}], "@1: messages is an empty list"),
        ([{"messages": [{"role": "user", "value": "p"}]}], "@0: messages holds list<"),
        (
            [{"messages": asked("p") + answered("a")}, {"messages": [{"role": "user"}, *answered("a")]}],
            "@1: a message of messages has no role or no content",
        ),
        ([{"messages": [{"content": "p", "role": None}, *answered("a")]}], "@0: a message of messages has no role"),
        ([PAIR, {**PAIR, "chosen": asked("p")}], "@1: chosen ends with a message of 'user', so there is no response"),
        ([PAIR, {**PAIR, "rejected": None}], "@1: rejected is missing"),
        ([{"chosen": "a", "rejected": answered("b")}], "different things (chosen text, rejected messages)"),
        ([{"chosen": "a", "rejected": "b"}], "have no prompts, and no common beginning in any row"),
        (
            [{"prompt": "p", "chosen": answered("a"), "rejected": answered("b")}, {"prompt": "p", **PAIR}],
            "@1: chosen begins with a message of 'user', and others do not",
        ),
    ],
)
def test_faults(table, rows, words):
    path = table(rows)
    if words.startswith("@"):
        row = int(words[1])
        place = f"line {row + 1}" if path.suffix == ".jsonl" else f"row {row}"
        words = f"{path}, {place}{words[2:]}"
    assert words in complaint([path])


def test_an_empty_response_alone_is_allowed(table):
    assert pairs(read_texts([table([GOOD, {**GOOD, "response": ""}])])) == [("p", "r"), ("p", "")]
    assert pairs(read_texts([table([{"prompt": "", "response": "r"}])])) == [("", "r")]


def test_names_that_are_not_there_or_do_not_fit(table):
    path = table([{**GOOD, "a": ["x"], "b": ["y"], "gap": None, "n": math.nan, "messages": answered("a")}])
    assert "no column 'instruction': it has prompt, response" in complaint([path], prompt="instruction")
    assert "no column 'respons' (did you mean 'response'?)" in complaint([path], responses=["respons"])
    assert "no column 'aa' (did you mean 'a'?)" in complaint([path], extra=["aa"])
    assert "gap is missing" in complaint([path], extra=["gap"])
    assert "n is NaN" in complaint([path], extra=["n"])
    assert "a and b holds lists of responses: name" in complaint(
        [table([{"a": ["x"], "b": ["y"]}])], responses=["a", "b"]
    )
    path = table([{"response": "r", "a": ["x"], "q": "q", "messages": answered("a")}])
    assert "name the column of the prompts" in complaint([path], responses=["response"])
    assert "a holds lists of responses" in complaint([path], responses=["a"])
    assert read_texts([path]).layout.startswith("messages")
    assert "no column 'chosen'" in complaint([path], prompt="q", responses=["chosen"])
    path = table([{"q": "q", "messages": answered("a")}])
    assert "no column 'response'" in complaint([path], prompt="q")  # messages would leave it unread


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "t.jsonl"
    whole = "".join(json.dumps({"prompt": "p", "response": f"r{n}"}) + "\n" for n in range(3))
    path.write_text(whole[:-10])
    assert f"{path}, line 3, is not JSON" in complaint([path])
    path.write_text(whole.replace('"r1"', "5"))
    assert f"{path}, line 2: 'response' mixes types" in complaint([path])
    path.write_text(whole.replace('"r2"', '["r2"]'))
    assert f"{path}, line 3: 'response' mixes types" in complaint([path])
    path.write_text(whole.replace('"r1"', f"{1 << 80}"))
    assert "line 2: 'response' mixes types" in complaint([path])
    path.write_text(whole.replace("r1", "\\ud800"))
    assert "line 2: 'response' mixes types, or is no valid text" in complaint([path])
    path.write_text("\n\n")
    assert "holds no rows" in complaint([path])
    parquet = write(tmp_path / "t.parquet", [GOOD])
    parquet.write_bytes(parquet.read_bytes()[:-9])
    assert "not a whole Parquet file" in complaint([parquet])
    (tmp_path / "t.csv").write_text("prompt,response\n")
    assert "neither .parquet nor .jsonl" in complaint([tmp_path / "t.csv"])
    assert "does not exist" in complaint([tmp_path / "none.jsonl"])
    assert "does not exist" in complaint(["folder/none.parquet"])
    (tmp_path / "folder").mkdir()
    assert "a folder without .parquet or .jsonl files" in complaint([tmp_path / "folder"])
    assert "no dataset that has a split 'test'" in complaint([parquet], split="test")
    assert "There is no input" in complaint([])


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    ends = pa.py_buffer(np.array([0, 2, 4], np.int32))
    text = pa.Array.from_buffers(pa.string(), 2, [None, ends, pa.py_buffer(b"ab\xff\xfe")])
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": text}), tmp_path / "t.parquet")
    assert "t.parquet: response in row 1 holds bytes that are no UTF-8" in complaint([tmp_path / "t.parquet"])


def test_what_is_not_read_may_be_anything(tmp_path):
    rows = [{**GOOD, "messages": 1, "chosen": "x"}, {**GOOD, "messages": ["y"], "chosen": 3}]
    assert len(read_texts([write(tmp_path / "t.jsonl", rows)]).places) == 2


# --- keys, and the way back ------------------------------------------------------------------------------------


def test_a_conversation_has_one_key(table):
    turns = [{"content": 'é "x"', "role": "user", "name": None}, {"role": "assistant", "content": "a"}]
    expected = '[{"content":"é \\"x\\"","role":"user"},{"content":"a","role":"assistant"}]'
    assert canonical(turns) == expected
    assert fill("{p}|{n}|{x}|{s}", {"p": turns, "n": 3, "x": 0.5, "s": '["as it is" ]'}) == (
        expected + '|3|0.5|["as it is" ]'
    )
    rows = [{"prompt": turns[:1], "response": "a"}, {"prompt": [says("user", "q", name="n")], "response": "b"}]
    assert fill("{prompt}", {"prompt": read_texts([table(rows)]).columns["prompt"][0]}) == canonical(turns[:1])


def embed(path, texts):
    """A store of texts, each with numbers of its own."""
    with StoreWriter(path, 3, {"template": texts.template}, dtype="float32") as writer:
        keys = [key_of(text) for text in filled(texts)]
        writer.append(keys, np.array([[int(key[:4], 16), int(key[4:8], 16), 1] for key in keys], np.float32))
    return path


@pytest.mark.parametrize("prompt", [str, asked])
def test_every_layout_with_scores_is_found_in_the_store(table, tmp_path, prompt):
    def read(rows, name):
        path = table(rows, name)
        store = embed(tmp_path / f"{name}.store", read_texts([path]))
        return load(path, embeddings=store, target="score", standardise=False)

    flat = [(f"p{p}", f"{p} {r} {'x' * r}", float(p - r)) for p in range(24) for r in range(1 + p % 3)]
    rows = [{"prompt": prompt(p), "response": r, "score": s} for p, r, s in flat]
    lists = [
        {
            "prompt": prompt(f"p{p}"),
            "responses": [r for q, r, _ in flat if q == f"p{p}"],
            "score": [s for q, _, s in flat if q == f"p{p}"],
        }
        for p in range(24)
    ]
    turns = [{**row, "completion": answered(row["response"])} for row in rows]
    for row in turns:
        del row["response"]
    sides = [read(*given) for given in ((rows, "rows"), (lists, "lists"), (turns, "turns"))]
    for one, *others in zip(*sides, strict=True):
        assert one.mask.sum() > 2
        for other in others:
            np.testing.assert_array_equal(one.embeddings(), other.embeddings())
            np.testing.assert_array_equal(one.gold, other.gold)
            np.testing.assert_array_equal(one.mask, other.mask)
            assert one.shape == other.shape
            for name in one.attributes.keys() & other.attributes.keys():
                np.testing.assert_array_equal(one.attributes[name], other.attributes[name])
    assert sides[0].train.attributes.keys() == sides[1].train.attributes.keys()


def test_lists_of_responses_beside_an_array(table, tmp_path):
    rows = [{"prompt_id": p, "responses": ["a", "bc"], "score": [1, 2], "split": ["train", "test"][p]} for p in (0, 1)]
    np.save(tmp_path / "e.npy", np.arange(8, dtype=np.float32).reshape(4, 2))

    def read(rows):
        return load(table(rows), embeddings=tmp_path / "e.npy", target="score", standardise=False)

    train, test = read(rows)
    np.testing.assert_array_equal(train.embeddings()[0], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(test.gold, [[1, 2]])
    np.testing.assert_array_equal(test.attributes["length"], [[1, 2]])

    for change, words in [
        ({"score": [1.0]}, ": responses has 2 elements and score 1; give"),
        ({"score": [1.0, None]}, ": score has an element that is missing"),
        ({"score": [1.0, float("nan")]}, "infinite in row 1, response 1; score"),
        ({"score": []}, ": score is an empty list"),
        ({"responses": []}, ": responses is an empty list"),
    ]:
        with pytest.raises(JarmError, match=words):
            read([rows[0], {**rows[1], **change}])
    with pytest.raises(JarmError, match=r"responses holds lists, and score (int64|double): give a list of scores"):
        read([{**row, "score": 1} for row in rows])
    with pytest.raises(JarmError, match=r"no column 'scor' \(did you mean 'score'\?\); columns of numbers are"):
        load(table(rows), embeddings=tmp_path / "e.npy", target="scor")
    with pytest.raises(JarmError, match=r"has 6 responses and .* has 4 rows"):
        read([*rows, rows[0]])


def test_a_list_of_responses_that_the_store_lacks_is_named(table, tmp_path):
    rows = [
        {"prompt": f"p{p}", "responses": ["a", "b"], "score": [1, 2], "split": ["train", "test"][p]} for p in (0, 1)
    ]
    path = table(rows)
    store = embed(tmp_path / "store", read_texts([path]))
    path = table([rows[0], {**rows[1], "responses": ["a", "c"]}])
    with pytest.raises(JarmError, match=r"lacks the texts of 1 of the 4 responses of .*, row 1, response 1: embed"):
        load(path, embeddings=store, target="score")


# --- real data, where it is at hand ----------------------------------------------------------------------------

# The data may not be passed on, so they are not in the repository; `.ci/run` names them where they lie beside it.
SHARED = os.environ.get("JARM_SHARED_DATA")


# Needs data that may not be passed on.
@pytest.mark.skipif(
    SHARED is None, reason="JARM_SHARED_DATA does not name a folder with hh_rlhf_harmless_base_test.parquet"
)
def test_real_dialogues():
    path = Path(SHARED) / "hh_rlhf_harmless_base_test.parquet"
    texts = read_texts([path])
    sides = pq.read_table(path, columns=["chosen", "rejected"]).to_pylist()
    assert filled(texts) == [text for row in sides for text in (row["chosen"], row["rejected"])]
    assert all(prompt.endswith(A) for prompt in texts.columns["prompt"])
