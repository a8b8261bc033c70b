"""Model folders that are damaged or lie: each is one sentence, at once, and nothing outside of the folder is read."""

import json
import pathlib
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jarm.core.status import JarmError
from jarm.llm.config import read_config
from jarm.llm.weights import find_checkpoint, load_model, weight_files

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "llm"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def copy(tmp_path):
    def make(case, **changes):
        folder = shutil.copytree(FIXTURES / case, tmp_path / case)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return make


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, not a whole number from 1 to 1,000"),
        ("gpt2", {"n_layer": 10**9}, "n_layer is 1000000000, not"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0, not a whole number from 1"),
        ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers is '2', not"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers is true, not"),
        ("llama", {"vocab_size": -1}, "vocab_size is -1, not"),
        ("llama", {"hidden_size": 1.5}, "hidden_size is 1.5, not"),
        ("llama", {"intermediate_size": -1}, "intermediate_size is -1, not"),
        ("llama", {"head_dim": -1}, "head_dim is -1, not"),
        ("llama", {"num_key_value_heads": -1}, "num_key_value_heads is -1, not"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings is 0, not"),
        ("llama", {"max_position_embeddings": 10**10}, "max_position_embeddings is 10000000000, not"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps is 'small', not a finite number"),
        ("llama", {"rms_norm_eps": float("nan")}, "config.json is not JSON as jarm reads it"),
        ("llama", {"hidden_size": 3, "head_dim": None}, r"hidden size \(3\) is not a multiple of"),
        ("bert", {"hidden_size": 3}, "hidden size of 3 is too small for 4 attention heads"),
        ("llama", {"is_causal": False}, "`is_causal = False` is a variant of llama that jarm does not compute"),
        ("qwen3", {"use_bidirectional_attention": True}, "`use_bidirectional_attention = True` is a variant of qwen3"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "The weights are quantised"),
        ("llama", {"compression_config": {}}, "The weights are quantised"),
        ("gemma3", {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_"),
        ("llama", {"model_type": "x" * 5000}, "Unknown model_type 'x{80}' in"),
        ("llama", {"model_type": ["llama"]}, "it needs a config.json with a `model_type`"),
        ("smollm3", {"no_rope_layers": [1]}, "config.json"),
        ("smollm3", {"layer_types": [[]] * 4}, "config.json"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "config.json"),
    ],
)
def test_configs_of_wrong_types_and_sizes(copy, case, changes, message):
    with pytest.raises(JarmError, match=message) as caught:
        read_config(copy(case, **changes))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff", b'{"a":' * 100_000, b"[" * 900, b'{"model_type": 1e999}']
)
def test_configs_that_are_no_json_object(copy, content):
    folder = copy("llama")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(JarmError, match=r"config\.json"):
        read_config(folder)


def test_sizes_are_compared_with_the_weights_before_anything_is_built(copy, monkeypatch):
    from jarm.llm import weights

    def never(*_):
        raise AssertionError("built a model")

    folder = copy("llama", num_hidden_layers=900)
    monkeypatch.setattr(weights, "abstract_params", never)
    with pytest.raises(JarmError, match="has weights of 2 layers, where its config says 900"):
        load_model(folder)


def test_large_sizes_take_no_memory(copy, monkeypatch):
    from jarm.llm import weights

    monkeypatch.setattr(weights.np, "empty", lambda *_: pytest.fail("reserved memory"))
    with pytest.raises(JarmError, match=r"has the shape \[\d+, 32\], where its config says \[268435456, 32\]"):
        load_model(copy("llama", vocab_size=1 << 28))


def test_adapters_are_refused_by_name(copy):
    folder = copy("llama")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')
    for whole in (True, False):
        if not whole:
            (folder / "config.json").unlink()
        with pytest.raises(
            JarmError, match=r"a LORA adapter \(adapter_config\.json\) of some/base, which jarm does not"
        ):
            load_model(folder)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "../secret.safetensors"}, r"names '\.\./secret\.safetensors', which is no place in"),
        ({"a": "x/../../secret.safetensors"}, "no place in"),
        ({"a": "/out/secret.safetensors"}, "names '/out/secret.safetensors', which is no place"),
        ({"a": "C:\\secret.safetensors"}, "no place in"),
        ({"a": "x" * 5000}, "has no readable `weight_map`: .* weight_map.a is"),
        ({"a": "x" * 300}, "no place in"),
        ({"a": "no\x00name"}, "no place in"),
        ({"a" * 5000: 3}, "has no readable `weight_map`"),
        ({"a": "there.not"}, r"lacks there\.not of the 1 files in its index"),
        (["model.safetensors"], "has no readable `weight_map`"),
        ({}, "lacks the tensors"),
    ],
)
def test_an_index_names_files_of_its_folder(copy, places, message):
    folder = copy("llama")
    (folder / FILE).rename(folder.parent / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(JarmError, match=message) as caught:
        load_model(folder)
    assert len(str(caught.value)) < 1000


def test_a_snapshot_of_the_hub_is_read_through_its_links(tmp_path):
    """Its files are links to `../../blobs`."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    held = load_file(FIXTURES / "llama" / FILE)
    save_file(held, blobs / "aa")
    shutil.copy(FIXTURES / "llama" / "config.json", blobs / "bb")
    (blobs / "cc").write_text(json.dumps({"weight_map": dict.fromkeys(held, "model-1.safetensors")}))
    for name, blob in (("model-1.safetensors", "aa"), ("config.json", "bb"), (INDEX, "cc")):
        (snapshot / name).symlink_to(pathlib.Path("../../blobs") / blob)
    config, params = load_model(snapshot)
    table = params["embed"]["table"]
    np.testing.assert_array_equal(table, held["model.embed_tokens.weight"].astype(np.float32))
    assert config.width == 32


def test_one_file_goes_before_an_index_as_in_transformers(copy):
    folder = copy("llama")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "there.not"}}))
    assert weight_files(folder) == [folder / FILE]


def header(content):
    return struct.pack("<Q", len(content)) + content


TENSOR = '{{"t": {{"dtype": "F32", "shape": {}, "data_offsets": [0, {}]}}}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 4,
        struct.pack("<Q", 1 << 62) + b"{}",
        header(b"{"),
        header(b"[]"),
        header(b'{"t": ' * 100_000),
        header(b'{"t": {"dtype": "F32"}}'),
        header(TENSOR.format([-1, 4], 16).encode()),
        header(TENSOR.format([1 << 32, 1 << 32], 0).encode()),
        header(TENSOR.format([4], 16).encode()),
        header(TENSOR.format('"x"', 16).encode()) + bytes(16),
        header(TENSOR.format([4], 16).replace("F32", "F31").encode()) + bytes(16),
    ],
)
def test_damaged_headers(copy, content):
    folder = copy("llama")
    (folder / FILE).write_bytes(content)
    with pytest.raises(JarmError, match="is not a whole safetensors file") as caught:
        load_model(folder)
    assert len(str(caught.value)) < 1000


def test_names_of_any_length_are_cut_in_sentences(copy, tmp_path):
    folder = copy("llama")
    save_file(load_file(folder / FILE) | {"\x1b[31m" + "x" * 5000: np.zeros(3, np.float32)}, folder / FILE)
    with pytest.raises(JarmError, match=r"has the tensor '\\x1b\[31mx+ \.\.\.', which") as caught:
        load_model(folder)
    assert len(str(caught.value)) < 500
    with pytest.raises(JarmError, match="is neither a folder nor a Hugging Face id"):
        find_checkpoint("x" * 5000)
