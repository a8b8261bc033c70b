"""An embedder that stays loaded gives the rows of a store, and refuses other models."""

import json

import numpy as np
import pytest
from fixtures.tiny import CHAT, write_checkpoint

from jarm.core.status import JarmError
from jarm.data.store import EmbeddingStore
from jarm.embedding.config import EmbedConfig
from jarm.embedding.embed import embed
from jarm.embedding.embedder import Embedder, texts_of
from jarm.testing.tracing import count_compilations

PROMPTS = ["what now", "a", "a", "tell me a long story about the sea and the wind and the rain"]
RESPONSES = ["nothing", "b", "c", "no"]


def store_of(folder, model, **settings):
    rows = [{"prompt": p, "response": r} for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    table = folder / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    embed(EmbedConfig(str(model), (str(table),), out=folder / "store", store_dtype="float32", **settings))
    return EmbeddingStore(folder / "store")


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("llama", {"template": "chat"}),
        ("llama", {"pooling": ("mean",), "layer": (1,), "normalize": True, "template": "{prompt}{response}"}),
        ("gemma3", {"max_length": 12}),
        ("bert", {}),
    ],
)
def test_its_rows_are_those_of_the_store_it_is_told_of(tmp_path, case, settings):
    model = write_checkpoint(tmp_path / case, case, chat=CHAT if settings.get("template") == "chat" else None)
    store = store_of(tmp_path, model, **settings)
    rows = store.indices(texts_of(PROMPTS, RESPONSES).keys(store.template))
    found = Embedder(store.meta.made_by, str(model))(PROMPTS, RESPONSES)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.asarray(store[rows]), rtol=2e-5, atol=2e-5)


def test_another_model_and_unknown_texts_are_refused(tmp_path):
    model = write_checkpoint(tmp_path / "llama", "llama")
    made = store_of(tmp_path, model).meta.made_by
    other = write_checkpoint(tmp_path / "other", "qwen2")
    with pytest.raises(JarmError, match=r"does not make the embeddings .*weights .* give the model that did, llama"):
        Embedder(made, str(other))
    with pytest.raises(JarmError, match=r"reads embeddings of 'llama', which is no folder here .*--llm"):
        Embedder(made)
    with pytest.raises(JarmError, match="have the column 'topic' beside prompt and response"):
        Embedder({**made, "template": "{topic}{prompt}{response}"}, str(model))
    embedder = Embedder(made, str(model))
    with pytest.raises(JarmError, match=r"2 prompts and 1 responses: give one prompt for each response"):
        embedder(["a", "b"], ["c"])
    with pytest.raises(JarmError, match=r"the texts, row 0: .*list of messages"):
        embedder([[{"role": "user", "content": "a"}] * 2], ["c"])
    np.testing.assert_array_equal(embedder([[{"role": "user", "content": "a"}]], ["c"]), embedder(["a"], ["c"]))
    with pytest.raises(JarmError, match="`prompts` is one text: give a list of texts"):
        embedder("a", ["c"])
    with pytest.raises(JarmError, match=r"The text .*\\ud800.* holds half of a character"):
        embedder(["a"], ["\ud800"])
    assert embedder([], []).shape == (0, embedder.width)
    np.testing.assert_allclose(embedder.whole(["a\n\nb"]), embedder(["a"], ["b"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("odd", [None, 3, ["a"], [{"role": "user"}]])
def test_what_is_no_text_is_named(odd):
    with pytest.raises(JarmError, match=f"response 1 is {type(odd).__name__} of another kind: give a text, or a list"):
        texts_of(["a", "a"], ["b", odd])


@pytest.mark.slow  # compiles all of them
def test_after_all_shapes_are_warm_nothing_compiles(tmp_path):
    model = write_checkpoint(tmp_path / "llama", "llama")
    embedder = Embedder(store_of(tmp_path, model, max_length=24).meta.made_by, str(model))
    embedder(["a"], ["b"])
    with count_compilations() as compiled:
        for shape in embedder.shapes:
            embedder.warm(*shape)
    assert len(compiled) == len(embedder.shapes) - 1  # the first is there
    with count_compilations() as compiled:
        for count in (1, 2, 30, 70, 200):
            embedder(["a", "a b c d e f g h i j k l m n o p q r s t"] * count, ["b", "c"] * count)
    assert not compiled
