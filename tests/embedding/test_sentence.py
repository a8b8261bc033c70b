"""What folders of sentence-transformers say, against BERT in NumPy; `test_sentence_witness` has the library."""

import json

import numpy as np
import pytest
from fixtures.tiny import LETTERS, write_checkpoint
from safetensors.numpy import load_file, save_file
from scipy.special import erf

from jarm.core.status import JarmError
from jarm.data.store import EmbeddingStore, key_of
from jarm.embedding.config import EmbedConfig
from jarm.embedding.embed import embed
from jarm.embedding.sentence import read_head, read_sentence_model

TEXTS = ["Abc: d", "the other text.", "no end of it " * 8]
NAMES = ("Transformer", "Pooling", "Dense", "Normalize", "Dense")


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def chain(folder, *kinds, owner="sentence_transformers.models"):
    paths = ["" if kind == "Transformer" else f"{i}_{kind}" for i, kind in enumerate(kinds)]
    each = [{"idx": i, "name": str(i), "path": paths[i], "type": f"{owner}.{kind}"} for i, kind in enumerate(kinds)]
    write(folder / "modules.json", each)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "bert", "bert", eos=True)


@pytest.fixture
def folder(tmp_path, bert):
    """BERT with a chain of modules of which none is described yet."""
    made = tmp_path / "model"
    made.mkdir()
    for path in bert.iterdir():
        (made / path.name).symlink_to(path)
    return chain(made, "Transformer", "Pooling")


def states(folder, ids):
    """Hidden states of BERT, `[T, d]`, as its paper has them."""
    w = {name: tensor.astype(np.float64) for name, tensor in load_file(folder / "model.safetensors").items()}
    heads = json.loads((folder / "config.json").read_text())["num_attention_heads"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(1, keepdims=True)
        return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-12) * w[name + ".weight"] + w[name + ".bias"]

    tables = [w[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")]
    x = norm(tables[0][ids] + tables[1][: len(ids)] + tables[2][0], "embeddings.LayerNorm")
    for layer in range(3):
        at = f"encoder.layer.{layer}."
        parts = (linear(x, f"{at}attention.self.{part}") for part in ("query", "key", "value"))
        q, k, v = (part.reshape(len(ids), heads, -1).swapaxes(0, 1) for part in parts)
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[2]))
        seen = (scores / scores.sum(2, keepdims=True) @ v).swapaxes(0, 1).reshape(len(ids), -1)
        x = norm(x + linear(seen, at + "attention.output.dense"), at + "attention.output.LayerNorm")
        inner = linear(x, at + "intermediate.dense")
        mapped = linear(0.5 * inner * (1 + erf(inner / np.sqrt(2))), at + "output.dense")
        x = norm(x + mapped, at + "output.LayerNorm")
    return x


def ids_of(text, *, prompt="", lower=False, length=64):
    text = prompt + (text.lower() if lower else text)
    found = [4 + LETTERS.index(letter) if letter in LETTERS else 3 for letter in text]
    return [1, *found[: length - 2], 2]


def stored(folder, tmp_path, **options):
    table = tmp_path / "texts.jsonl"
    table.write_text("".join(json.dumps({"prompt": "", "response": text}) + "\n" for text in TEXTS))
    config = EmbedConfig(
        str(folder), (str(table),), tmp_path / "store", template="{response}", dtype="float32", **options
    )
    embed(config)
    store = EmbeddingStore(tmp_path / "store")
    return store.rows([key_of(text) for text in TEXTS]), store.meta.made_by


def expected(folder, *, skip=0, ways=("mean",), **form):
    rows = []
    for text in TEXTS:
        hidden = states(folder, ids_of(text, **form))[skip:]
        rows.append(np.concatenate([hidden[0] if way == "cls" else hidden.mean(0) for way in ways]))
    return np.stack(rows)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def pooling(folder, **said):
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 36, **said})


def dense(folder, at, inputs, outputs, **said):
    rng = np.random.default_rng(outputs)
    kernel, bias = rng.normal(size=(outputs, inputs)) / 6, rng.normal(size=outputs) / 6
    write(folder / f"{at}_Dense" / "config.json", {"in_features": inputs, "out_features": outputs, **said})
    held = {"linear.weight": kernel.astype(np.float32), "linear.bias": bias.astype(np.float32)}
    save_file(
        held if said.get("bias", True) else {"linear.weight": held["linear.weight"]},
        folder / f"{at}_Dense" / "model.safetensors",
    )
    return kernel, bias


def test_texts_have_the_length_case_and_prompt_of_the_folder(folder, tmp_path, capsys):
    pooling(folder, pooling_mode="mean")
    write(folder / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": True})
    prompts = {"prompts": {"query": "ask: ", "plain": ""}, "default_prompt_name": "query"}
    write(folder / "config_sentence_transformers.json", prompts)
    form = {"lower": True, "length": 20}
    rows, made_by = stored(folder, tmp_path)
    close(rows, expected(folder, prompt="ask: ", **form))
    assert (made_by["max_length"], made_by["lowercase"], made_by["model_prompt"]) == (20, True, "ask: ")
    line = "model is a model of sentence-transformers: the prompt 'ask: ' before each text, lower case, up to 20 tokens"
    assert capsys.readouterr().err.startswith(line + ", of longer texts the start; pooling mean.\n")
    for name in ("plain", "none"):
        (tmp_path / name).mkdir()
        rows, made_by = stored(folder, tmp_path / name, prompt_name=name)
        close(rows, expected(folder, **form))
        assert "model_prompt" not in made_by
        assert "(with prompts that --prompt-name may take: query)" in capsys.readouterr().err
    with pytest.raises(JarmError, match=r"made otherwise .*model_prompt 'ask: ' there, None here"):
        stored(folder, tmp_path, prompt_name="none")


def test_a_prompt_may_be_left_out_of_the_pooling(folder, tmp_path):
    pooling(folder, pooling_mode="mean", include_prompt=False)
    write(folder / "config_sentence_transformers.json", {"prompts": {"q": "ask: "}, "default_prompt_name": "q"})
    rows, made_by = stored(folder, tmp_path)
    close(rows, expected(folder, prompt="ask: ", skip=6))
    assert made_by["include_prompt"] is False
    with pytest.raises(JarmError, match="prompt has 6 tokens, and leaves no room for texts of up to 7"):
        stored(folder, tmp_path, max_length=7)
    with pytest.raises(JarmError, match="of long texts it would be cut: give --keep start"):
        stored(folder, tmp_path, keep="end")


def test_poolings_are_joined_and_what_follows_them_is_computed(folder, tmp_path):
    chain(folder, "Transformer", "Pooling", "Dense", "Normalize", "Dense", "Dropout", "Normalize")
    pooling(folder, pooling_mode=["cls", "mean"])
    write(folder / "config_sentence_transformers.json", {"truncate_dim": 9})
    (first, bias), (second, _) = (
        dense(folder, 2, 72, 20),
        dense(folder, 4, 20, 12, bias=False, activation_function="torch.nn.modules.linear.Identity"),
    )
    rows, made_by = stored(folder, tmp_path)
    pooled = expected(folder, ways=("cls", "mean"))
    close(rows, unit(unit(np.tanh(pooled @ first.T + bias)) @ second.T)[:, :9])
    assert made_by["pooling"] == "cls+mean"
    assert [each.partition(",")[0] for each in made_by["modules"]] == [
        "Dense 72 to 20",
        "Normalize",
        "Dense 20 to 12",
        "Normalize",
        "the first 9",
    ]
    with pytest.raises(JarmError, match=r"of its last layer .* and a --layer is another: give a --pooling too"):
        stored(folder, tmp_path, layer=(1,))


def test_normalize_at_the_end_is_honoured_and_a_pooling_asked_for_goes_without(folder, tmp_path, capsys):
    chain(folder, "Transformer", "Pooling", "Normalize")
    pooling(folder, pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)
    rows, made_by = stored(folder, tmp_path)
    close(rows, unit(expected(folder)))
    assert made_by["normalize"] is True
    assert "pooling mean, Normalize.\n" in capsys.readouterr().err
    (tmp_path / "plain").mkdir()
    rows, made_by = stored(folder, tmp_path / "plain", pooling=("mean",))
    close(rows, expected(folder))
    assert made_by["normalize"] is False
    assert "pooling mean, as asked for.\n" in capsys.readouterr().err


def test_a_dense_layer_adds_its_residual(folder):
    chain(folder, "Transformer", "Pooling", "Dense", "Dense")
    pooling(folder, pooling_mode="mean")
    kernel, bias = dense(folder, 2, 36, 36, use_residual=True, activation_function="torch.nn.ReLU")
    other, _ = dense(folder, 3, 36, 8, bias=False, use_residual=True, activation_function="torch.nn.Sigmoid")
    past = np.random.default_rng(1).normal(size=(8, 36)).astype(np.float32)
    save_file(
        {"linear.weight": other.astype(np.float32), "residual.weight": past}, folder / "3_Dense" / "model.safetensors"
    )
    x = np.random.default_rng(2).normal(size=(5, 36))
    y = np.maximum(x @ kernel.T + bias, 0) + x
    close(read_head(read_sentence_model(folder), 36)([x]), 1 / (1 + np.exp(-y @ other.T)) + y @ past.T)


def test_a_transformer_may_have_a_folder_of_its_own(tmp_path):
    write_checkpoint(tmp_path / "m" / "0_Transformer", "llama", bos=False)
    modules = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling")]
    write(
        tmp_path / "m" / "modules.json", [{"path": p, "type": f"sentence_transformers.models.{k}"} for p, k in modules]
    )
    pooling(tmp_path / "m", pooling_mode_lasttoken=True)
    write(tmp_path / "m" / "0_Transformer" / "sentence_roberta_config.json", {"max_seq_length": 9})
    write(tmp_path / "texts.jsonl", {"prompt": "", "response": "abcdefghijkl"})
    config = EmbedConfig(str(tmp_path / "m"), (str(tmp_path / "texts.jsonl"),), tmp_path / "store", show=1)
    embed(config)
    model = read_sentence_model(tmp_path / "m")
    assert (model.transformer.name, model.max_length) == ("0_Transformer", 9)
    assert read_head(model, 32).kinds == ("last",)


def change(path, key, value):
    return lambda folder: write(folder / path, json.loads((folder / path).read_text()) | {key: value})


def put(path, value):
    return lambda folder: write(folder / path, value)


def raw(path, content):
    return lambda folder: (folder / path).write_bytes(content)


def text_of(method):
    return {"text": {"method": method, "method_output_name": "last_hidden_state"}}


LIBRARY, SETTINGS, POOLING = "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"
REFUSED = {
    "weightedmean": (put(POOLING, {"pooling_mode": "weightedmean"}), "trained with weightedmean, which jarm"),
    "an old flag": (put(POOLING, {"pooling_mode_weightedmean_tokens": True}), "pooling_mode_weightedmean_tokens"),
    "one of two": (put(POOLING, {"pooling_mode": ["cls", "max"]}), "with cls and max, which jarm does not compute"),
    "no pooling": (put(POOLING, {}), "no pooling that is known"),
    "a pooling setting": (change(POOLING, "temperature", 2), "1_Pooling/config.json sets 'temperature'"),
    "a pooling of numbers": (put(POOLING, {"pooling_mode": 3}), "pooling_mode is 3, not a list"),
    "a flag in words": (put(POOLING, {"pooling_mode_cls_token": "yes"}), "pooling_mode_cls_token is 'yes', not true"),
    "deep nesting": (raw(POOLING, b"[" * 100_000), "1_Pooling/config.json is not JSON as jarm reads it"),
    "a link to nothing": (lambda folder: (folder / SETTINGS).symlink_to("gone"), f"{SETTINGS} does not exist"),
    "half a file": (raw("modules.json", b'[{"type": '), "modules.json is not JSON"),
    "no list": (put("modules.json", {"0": "Transformer"}), "modules.json: the content is .*, not a list"),
    "an empty list": (put("modules.json", []), "not a list from 1 to 100 values"),
    "no type": (put("modules.json", [{"path": ""}]), r"\[0\] has no 'type'"),
    "code of its own": (
        put("modules.json", [{"path": "", "type": "custom_st.Transformer"}]),
        "begins with a 'custom_st.Transformer'",
    ),
    "another beginning": (lambda folder: chain(folder, "StaticEmbedding"), "begins with a 'StaticEmbedding'"),
    "outside": (
        put("modules.json", [{"path": "../other", "type": "sentence_transformers.models.Transformer"}]),
        r"modules.json names '\.\./other', which is no place in",
    ),
    "absolute": (
        put("modules.json", [{"path": "/etc", "type": "sentence_transformers.models.Transformer"}]),
        "names '/etc'",
    ),
    "a long name": (
        put("modules.json", [{"path": "x" * 400, "type": "sentence_transformers.models.Transformer"}]),
        "no place in",
    ),
    "an unknown module": (lambda folder: chain(folder, "Transformer", "Pooling", "LayerNorm"), "puts a 'LayerNorm'"),
    "weights of words": (lambda folder: chain(folder, "Transformer", "WordWeights", "Pooling"), "puts a 'WordWeights'"),
    "no pooling module": (lambda folder: chain(folder, "Transformer", "Normalize"), "puts a 'Normalize'"),
    "the transformer alone": (lambda folder: chain(folder, "Transformer"), "names no pooling of the model"),
    "another kind": (put(LIBRARY, {"model_type": "SparseEncoder"}), "model_type is 'SparseEncoder', not"),
    "another setting": (put(LIBRARY, {"temperature": 2}), f"{LIBRARY} sets 'temperature', which jarm does not know"),
    "no such prompt": (
        put(LIBRARY, {"prompts": {}, "default_prompt_name": "q"}),
        "has the default prompt 'q', but no prompt of that name",
    ),
    "prompts of numbers": (put(LIBRARY, {"prompts": {"q": 3}}), "prompts.q is 3, not a text"),
    "no vector": (put(LIBRARY, {"truncate_dim": 0}), "truncate_dim is 0, not a whole number"),
    "no length": (put(SETTINGS, {"max_seq_length": 0}), "max_seq_length is 0, not a whole number"),
    "a negative length": (
        put(SETTINGS, {"processor_kwargs": {"model_max_length": -4}}),
        "model_max_length is no whole",
    ),
    "another task": (put(SETTINGS, {"transformer_task": "fill-mask"}), "transformer_task is 'fill-mask', not"),
    "an argument": (put(SETTINGS, {"config_args": {"num_labels": 2}}), "sets 'num_labels' in 'config_args'"),
    "processing": (put(SETTINGS, {"processing_kwargs": {"text": {}}}), "sets 'processing_kwargs'"),
    "another output": (put(SETTINGS, {"modality_config": text_of("pool")}), "otherwise than by the last hidden state"),
    "expansion": (put(SETTINGS, {"query_expansion": {"length": 3}}), "query_expansion is .*, not None"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_what_jarm_does_not_do_is_refused_by_name(folder, spoil, message):
    pooling(folder, pooling_mode="mean")
    spoil(folder)
    with pytest.raises(JarmError, match=message):
        read_head(read_sentence_model(folder), 36)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"activation_function": "torch.nn.GELU"}, "the activation 'torch.nn.GELU', which jarm does not compute"),
        ({"activation_function": "evil.code.Tanh"}, "the activation 'evil.code.Tanh'"),
        ({"in_features": 35}, "in_features is 35, not 36"),
        ({"out_features": -1}, "out_features is -1, not a whole number"),
        ({"out_features": 9}, r"weights in .*2_Dense are .*\(8, 36\).* and its config says .*\(9, 36\)"),
        (
            {"module_input_name": "token_embeddings"},
            "module_input_name is 'token_embeddings', not 'sentence_embedding'",
        ),
        ({"gate": True}, "sets 'gate', which jarm does not know"),
    ],
)
def test_dense_layers_that_jarm_does_not_compute_are_refused(folder, said, message):
    chain(folder, "Transformer", "Pooling", "Dense")
    pooling(folder, pooling_mode="mean")
    dense(folder, 2, 36, 8)
    write(folder / "2_Dense" / "config.json", {"in_features": 36, "out_features": 8, **said})
    with pytest.raises(JarmError, match=message):
        read_head(read_sentence_model(folder), 36)


def test_options_that_a_folder_cannot_have_are_refused(folder, bert, tmp_path):
    pooling(folder, pooling_mode="mean")
    with pytest.raises(JarmError, match="has no prompt 'query': give --prompt-name one of none"):
        stored(folder, tmp_path, prompt_name="query")
    with pytest.raises(JarmError, match="has no prompts, as only models of sentence-transformers do"):
        stored(bert, tmp_path, prompt_name="query")
    with pytest.raises(JarmError, match="a --revision is of a model of the hub: leave it out"):
        stored(folder, tmp_path, revision="main")
    write(folder / SETTINGS, {"modality_config": {"message": {"method": "forward", "format": "flat"}}})
    table = tmp_path / "texts.jsonl"
    with pytest.raises(JarmError, match="puts each text into its chat template"):
        embed(EmbedConfig(str(folder), (str(table),), tmp_path / "store"))
