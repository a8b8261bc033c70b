"""Checkpoints as they come: sharded, wrapped, old, damaged; and configs that ask for what jarm does not have."""

import json
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jarm.core.status import JarmError
from jarm.llm import weights
from jarm.llm.config import FAMILIES, convert_config, read_config
from jarm.llm.model import abstract_params
from jarm.llm.rope import make_rope
from jarm.llm.weights import find_checkpoint, load_model

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "llm"
FILE = "model.safetensors"


@pytest.fixture
def copy(tmp_path):
    """A function that copies a fixture and lets one change its tensors and its config."""

    def make(case, tensors=lambda held: held, config=lambda raw: raw):
        folder = tmp_path / case
        shutil.copytree(FIXTURES / case, folder)
        save_file(tensors(load_file(folder / FILE)), folder / FILE)
        path = folder / "config.json"
        path.write_text(json.dumps(config(json.loads(path.read_text()))))
        return folder

    return make


def same(first, second):
    (config, params), (other, others) = first, second
    assert config.layers == other.layers
    jax.tree.map(np.testing.assert_array_equal, params, others)


def shard(folder):
    held = load_file(folder / FILE)
    (folder / FILE).unlink()
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(held))}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in held.items() if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards_are_the_whole(copy):
    folder = copy("gemma3")
    shard(folder)
    same(load_model(folder), load_model(FIXTURES / "gemma3"))


def test_layers_of_a_scan_are_in_their_places():
    """Gemma 3 with layers s f s f s: a scan over two periods, and one left over."""
    _, params = load_model(FIXTURES / "gemma3")
    held = load_file(FIXTURES / "gemma3" / FILE)
    stack = params["stack"]
    for layer, kernel in enumerate([*zip(*(stack["cycle"][i]["mlp"]["up"]["kernel"] for i in (0, 1)), strict=True)]):
        for place, one in enumerate(kernel):
            np.testing.assert_array_equal(one, held[f"model.layers.{2 * layer + place}.mlp.up_proj.weight"])
    np.testing.assert_array_equal(stack["tail"][0]["mlp"]["up"]["kernel"], held["model.layers.4.mlp.up_proj.weight"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_other_float_dtypes_are_read(copy, dtype):
    folder = copy("qwen3", lambda held: {name: tensor.astype(dtype) for name, tensor in held.items()})
    whole, other = load_model(FIXTURES / "qwen3")[1], load_model(folder)[1]
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=0 if dtype == np.float32 else 1e-6, atol=0 if dtype == np.float32 else 1e-7
        )


def test_gpt2_of_the_hub_with_masks_saved_along(copy):
    def hub(held):
        plain = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
        return plain | {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32)}

    same(load_model(copy("gpt2", hub)), load_model(FIXTURES / "gpt2"))


def test_berts_of_old_with_gamma_and_beta_and_heads(copy):
    def old(held):
        renamed = {}
        for name, tensor in held.items():
            if "LayerNorm" in name:
                name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            renamed["bert." + name] = tensor
        return renamed | {
            "cls.predictions.bias": np.zeros(40, np.float32),
            "bert.embeddings.position_ids": np.arange(64),
        }

    same(load_model(copy("bert", old)), load_model(FIXTURES / "bert"))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_part_of_multimodal_gemma3(copy, prefix):
    def wrap(held):
        inner = {prefix + name.removeprefix("model."): t for name, t in held.items() if name.startswith("model.")}
        outer = "model." if prefix.startswith("model.") else ""
        return inner | {f"{outer}vision_tower.patch.weight": np.ones(3, np.float32)}

    def config(raw):
        return {"model_type": "gemma3", "text_config": raw, "vision_config": {"model_type": "siglip_vision_model"}}

    same(load_model(copy("gemma3", wrap, config)), load_model(FIXTURES / "gemma3"))


def test_heads_are_never_read(monkeypatch):
    read = []
    whole = weights.Checkpoint.read
    monkeypatch.setattr(weights.Checkpoint, "read", lambda self, name: read.append(name) or whole(self, name))
    load_model(FIXTURES / "qwen3")
    held = load_file(FIXTURES / "qwen3" / FILE)
    assert "lm_head.weight" in held
    assert sorted(read) == sorted(set(held) - {"lm_head.weight"})  # each once: no tensor is shared here


def test_put_brings_each_parameter_to_its_place():
    mesh = jax.make_mesh((1,), ("model",))
    places = {}

    def put(path, array):
        axes = (*(None,) * (array.ndim - 2), "model", None) if path.endswith("kernel") else ()
        places[path] = array.shape
        return jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))

    config, params = load_model(FIXTURES / "smollm2", put=put)
    assert places["stack.cycle.0.attention.q.kernel"] == (3, 32, 32)
    assert len(places) == len(jax.tree.leaves(params)) == len(jax.tree.leaves(abstract_params(config)))
    assert params["stack"]["cycle"][0]["mlp"]["up"]["kernel"].sharding.spec == jax.P(None, "model", None)


def without(name):
    return lambda held: {key: tensor for key, tensor in held.items() if key != name}


def with_one(name, tensor):
    return lambda held: held | {name: tensor}


Q = "model.layers.1.self_attn.q_proj.weight"
ZERO = np.zeros((32, 32), ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(Q), f"lacks the tensor '{Q}', which a llama of its config has"),
        (
            with_one("model.layers.1.self_attn.q_proj.bias", ZERO[0]),
            "the tensor 'model.layers.1.self_attn.q_proj.bias'",
        ),
        (with_one("model.layers.3.input_layernorm.weight", ZERO[0]), "does not use"),
        (with_one(Q, ZERO[:16]), rf"'{Q}' in .* has the shape \[16, 32\], where its config says \[32, 32\]"),
        (with_one(Q, ZERO.astype(np.int8)), f"'{Q}' is of dtype I8: jarm reads F32, F16, BF16, no quantised ones"),
        (
            lambda held: {"a.b": ZERO},
            r"lacks the tensors 'embed_tokens.weight', 'layers.0.input_layernorm.weight', .* and \d+ more",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(copy, tensors, message):
    with pytest.raises(JarmError, match=message):
        load_model(copy("smollm2", tensors))


def test_damaged_folders_are_refused(copy, tmp_path):
    folder = copy("smollm2")
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:-100])
    with pytest.raises(JarmError, match=r"model\.safetensors is not a whole safetensors file .*: download it again"):
        load_model(folder)
    (folder / FILE).write_bytes(whole)
    shard(folder)
    index = folder / "model.safetensors.index.json"
    sound = index.read_text()
    index.write_text(sound.replace(Q, Q + "x"))
    with pytest.raises(JarmError, match="do not agree on 'model"):
        load_model(folder)
    index.write_text("{}")
    with pytest.raises(JarmError, match="no readable `weight_map`"):
        load_model(folder)
    index.write_text(sound)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(JarmError, match=r"lacks model-1\.safetensors of the 2 files in its index"):
        load_model(folder)
    index.unlink()
    (folder / "model-0.safetensors").unlink()
    with pytest.raises(JarmError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        JarmError, match=r"only pickled weights \(pytorch_model\.bin\).*convert them to safetensors with"
    ):
        load_model(folder)
    with pytest.raises(JarmError, match=r"is no checkpoint: it needs a config\.json"):
        load_model(tmp_path)


def test_the_same_tensor_under_two_spellings_is_refused(copy):
    name = "embeddings.LayerNorm."
    with pytest.raises(JarmError, match="is there twice"):
        load_model(copy("bert", lambda held: held | {name + "gamma": held[name + "weight"]}))


def test_a_checkpoint_is_a_folder_or_an_id(monkeypatch, tmp_path):
    assert find_checkpoint(tmp_path) == tmp_path
    with pytest.raises(JarmError, match="'nowhere' is neither a folder nor a Hugging Face id"):
        find_checkpoint("nowhere")

    import huggingface_hub

    asked = []

    def download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision, "*.bin" in allow_patterns))
        if name == "some/model":
            return str(tmp_path)
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_checkpoint("some/model", "v1") == tmp_path
    assert asked == [("some/model", "v1", False)]
    with pytest.raises(
        JarmError, match="No folder 'other/model', and it cannot be had from the Hugging Face hub: offline"
    ):
        find_checkpoint("other/model")


YARN = {"rope_type": "yarn", "rope_theta": 10.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("case", "name", "value", "message"),
    [
        ("smollm2", "hidden_act", "mish", "Unknown activation 'mish': jarm knows gelu, "),
        ("smollm2", "quantization_config", {"bits": 4}, "The weights are quantised"),
        ("smollm2", "num_key_value_heads", 3, "4 attention heads cannot share 3 key-value heads"),
        ("smollm2", "rope_parameters", None, "no `rope_parameters` with a `rope_theta`"),
        (
            "smollm2",
            "rope_parameters",
            {"rope_type": "axial", "rope_theta": 1.0},
            "rope_type 'axial': jarm knows default, ",
        ),
        ("smollm2", "rope_parameters", YARN, "rope_type 'yarn' lacks factor"),
        ("smollm2", "rope_parameters", YARN | {"factor": 2, "odd": 1}, "rope_type 'yarn' has unknown odd"),
        ("smollm2", "rope_parameters", {"rope_theta": 1.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("smollm2", "layer_types", ["sliding_attention"] * 3, "does not fit a llama of 3 layers"),
        (
            "smollm3",
            "layer_types",
            ["chunked_attention"] * 4,
            "Unknown layer type 'chunked_attention': jarm knows full_",
        ),
        ("smollm3", "layer_types", ["full_attention"] * 3, "does not fit a smollm3 of 4 layers"),
        ("smollm3", "sliding_window", None, "there is no `sliding_window` in the config"),
        ("gemma2", "use_bidirectional_attention", True, "`use_bidirectional_attention = True` is a variant of gemma2"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True, "a variant of gpt2"),
        ("bert", "is_decoder", True, "a variant of bert"),
        ("bert", "position_embedding_type", "relative_key", "a variant of bert"),
    ],
)
def test_configs_that_ask_for_more_are_refused(case, name, value, message):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(FIXTURES / case)
    if name == "layer_types":
        config.__dict__[name] = value  # past the checks of transformers
    else:
        setattr(config, name, value)
    with pytest.raises(JarmError, match=message):
        convert_config(config)


def test_config_files_that_are_refused(copy):
    with pytest.raises(JarmError, match=f"Unknown model_type 'mamba': jarm knows {', '.join(FAMILIES)}"):
        convert_config(types.SimpleNamespace(model_type="mamba"))
    with pytest.raises(JarmError, match=r"Unknown model_type 'mamba' in .*config\.json: jarm knows llama, "):
        read_config(copy("qwen3", config=lambda raw: raw | {"model_type": "mamba"}))
    with pytest.raises(JarmError, match=r"transformers does not accept .*config\.json"):
        read_config(copy("mistral", config=lambda raw: raw | {"initializer_range": "wide"}))
    with pytest.raises(JarmError, match=r"config\.json: Unknown activation 'mish'"):
        read_config(copy("qwen2", config=lambda raw: raw | {"hidden_act": "mish"}))
    long = {"short_factor": [1.0, 1.0], "long_factor": [1.0] * 3, "original_max_position_embeddings": 8}
    with pytest.raises(JarmError, match="`short_factor` has 2 numbers, but 6 rotary numbers"):
        make_rope({"rope_type": "longrope", "rope_theta": 10.0, **long}, 6, 16, partial=False)


def test_reading_the_code_loads_neither_transformers_nor_torch():
    code = "import sys, jarm.llm.weights; print({'transformers', 'torch', 'safetensors'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_bfloat16_is_read_as_it_is():
    _, params = load_model(FIXTURES / "smollm2", dtype="bfloat16")
    held = load_file(FIXTURES / "smollm2" / FILE)
    table = params["embed"]["table"]
    assert table.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(table), held["model.embed_tokens.weight"])
