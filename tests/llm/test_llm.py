"""The decoder and the encoder against hidden states that transformers and PyTorch computed (`fixtures/make_llm.py`)."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_llm
from flax import nnx
from marks import sampled
from scipy.special import erf

from jarm.core.status import JarmError
from jarm.llm import layers, rope
from jarm.llm.config import FAMILIES
from jarm.llm.layers import attend, flash_applies, scan_plan
from jarm.llm.model import abstract_params, embed_tokens
from jarm.llm.pooling import Pooling, pool
from jarm.llm.sharding import suited
from jarm.llm.weights import load_model

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "llm"
TOLERANCE = 2e-5  # a wrong eps already shows as 1e-4


@functools.cache
def loaded(case):
    config, params = load_model(FIXTURES / case)
    return suited(config, jax.devices()[:1]), params


@functools.cache
def reference(case):
    with np.load(FIXTURES / case / "reference.npz") as file:
        return dict(file)


LAST = (Pooling(),)


def embed(case, config=None, *, poolings=LAST, folder=None):
    own, params = loaded(case) if folder is None else load_model(folder)
    data = reference(case) if folder is None else np.load(folder / "reference.npz")
    tokens, lengths = jnp.asarray(data["tokens"]), jnp.asarray(data["lengths"])
    return [np.asarray(out) for out in embed_tokens(params, tokens, lengths, config=config or own, poolings=poolings)]


def error(case, config):
    data = reference(case)
    tokens, lengths = jnp.asarray(data["tokens"]), jnp.asarray(data["lengths"])
    lowered = embed_tokens.lower(loaded(case)[1], tokens, lengths, config=config)
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})  # in half the time
    (out,) = compiled(loaded(case)[1], tokens, lengths)
    return np.abs(out - data["last"][-1]).max()


FAST = ("llama", "gemma3", "gpt_neox", "bert")
"""Cases that hold between them most of what families differ by."""


def test_every_family_has_a_case():
    made = {kind for kind, _ in make_llm.CASES.values()}
    assert made | {"gemma3"} == set(FAMILIES)  # the multimodal wrapper of gemma3_text: see test_llm_weights
    assert sorted(path.name for path in FIXTURES.iterdir()) == sorted(make_llm.CASES)


@pytest.mark.parametrize("case", sampled(make_llm.CASES, *FAST))
def test_every_layer_and_pooling_is_that_of_transformers(case):
    """Rows are padded with tokens like any others; the reference saw each text alone."""
    depth = len(loaded(case)[0].layers)
    wanted = [("last", layer) for layer in range(depth + 1)] + [
        ("mean", 1),
        ("mean", depth),
        ("cls", 0),
        ("cls", depth),
    ]
    before = embed_tokens._cache_size()
    for _ in range(2):
        outs = embed(case, poolings=tuple(Pooling(*one) for one in wanted))
    assert embed_tokens._cache_size() == before + 1
    for (kind, layer), out in zip(wanted, outs, strict=True):
        np.testing.assert_allclose(out, reference(case)[kind][layer], rtol=0, atol=TOLERANCE, err_msg=f"{kind} {layer}")


def change_layers(config, change):
    return dataclasses.replace(config, layers=tuple(change(layer) for layer in config.layers))


def unscaled(config):
    def plain(layer):
        kept = dataclasses.replace(layer.rope, kind="default", parameters=()) if layer.rope else None
        return dataclasses.replace(layer, rope=kept)

    return change_layers(config, plain)


def wider(by):
    return lambda config: change_layers(
        config, lambda layer: dataclasses.replace(layer, window=layer.window and layer.window + by)
    )


def replaced(**changes):
    return lambda config: dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("case", "mutate"),
    {
        "llama3 scaling dropped": ("llama", unscaled),
        "linear scaling dropped": ("gemma3", unscaled),
        "dynamic scaling dropped": ("llama_dynamic", unscaled),
        "yarn scaling dropped": ("qwen2", unscaled),
        "longrope dropped": ("phi3", unscaled),
        "window too wide": ("mistral", wider(1)),
        "window too narrow": ("gemma2", wider(-1)),
        "tanh for the exact GELU": ("gpt_neox", replaced(activation="gelu_tanh")),
        "exact GELU for the tanh": ("gemma", replaced(activation="gelu")),
        "eps of RMSNorm": ("qwen3", replaced(eps=1e-5)),
        "eps of LayerNorm": ("bert", replaced(eps=1e-5)),
        "soft-cap dropped": ("gemma2", replaced(softcap=None)),
        "scale by head_dim": ("gemma3", replaced(attention_scale=12**-0.5)),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mutation_fails_the_tolerance(case, mutate):
    assert error(case, mutate(loaded(case)[0])) > 2 * TOLERANCE


def test_a_text_alone_is_that_text_in_a_batch():
    """Also where the length of a text decides how its positions turn."""
    config, params = loaded("llama_dynamic")
    data = reference("llama_dynamic")
    row, length = data["tokens"][2:, :40], data["lengths"][2:]
    (alone,) = embed_tokens(params, jnp.asarray(row), jnp.asarray(length), config=config)
    np.testing.assert_allclose(np.asarray(alone)[0], embed("llama_dynamic")[0][2], rtol=0, atol=TOLERANCE / 2)


@pytest.mark.slow
def test_bfloat16_keeps_norms_in_float32_and_stays_close():
    config, params = load_model(FIXTURES / "gemma3", dtype="bfloat16")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        norm = "norm" in jax.tree_util.keystr(path)
        assert leaf.dtype == (jnp.float32 if norm else jnp.bfloat16), path
    data = reference("gemma3")
    (out,) = embed_tokens(params, jnp.asarray(data["tokens"]), jnp.asarray(data["lengths"]), config=config)
    assert out.dtype == jnp.float32
    exact = data["last"][-1]
    cosine = np.sum(np.asarray(out) * exact, 1) / np.linalg.norm(out, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosine.min() > 0.99


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize(
    ("causal", "window", "softcap"),
    [(True, None, None), (True, 3, None), (True, None, 1.5), (True, 3, 1.5), (False, None, None)],
)
def test_attention_is_what_its_formula_says(causal, window, softcap, turns, monkeypatch):
    monkeypatch.setattr(layers, "BLOCK", 3)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 7, heads, 5)).astype(np.float32) for heads in (4, 2, 2))
    lengths = np.array([7, 4], np.int32)
    options = {"causal": causal, "window": window, "softcap": softcap, "scale": 0.7, "in_turn": turns}
    out = attend(*map(jnp.asarray, (q, k, v, lengths)), **options)
    for b, t, h in np.ndindex(2, 7, 4):
        first = 0 if window is None else max(0, t - window + 1)
        seen = slice(first, t + 1) if causal else slice(0, lengths[b])
        scores = k[b, seen, h // 2].astype(np.float64) @ q[b, t, h] * 0.7
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        np.testing.assert_allclose(out[b, t, h], weights / weights.sum() @ v[b, seen, h // 2], rtol=0, atol=2e-6)


def test_an_mlp_maps_tokens_in_turn_as_it_does_all_at_once(monkeypatch):
    config, params = loaded("llama")
    stacked = params["stack"]["cycle"][0]["mlp"]
    x = jax.random.normal(jax.random.key(0), (5, 3, config.width))
    monkeypatch.setattr(layers, "TOKENS", 6)
    outs = []
    for turns in (True, False):
        mlp = layers.MLP(dataclasses.replace(config, in_turn=turns), jnp.float32, ())
        nnx.update(mlp, jax.tree.map(lambda leaf: leaf[0], stacked))
        outs.append(mlp(x))
    np.testing.assert_allclose(*outs, rtol=0, atol=1e-6)


def test_activations_are_what_their_formulas_say():
    x = np.linspace(-6, 6, 101)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    exact = 0.5 * x * (1 + erf(x / np.sqrt(2)))
    expected = {"gelu": exact, "gelu_tanh": tanh, "silu": x / (1 + np.exp(-x)), "relu": np.maximum(x, 0)}
    assert set(expected) == set(layers.ACTIVATIONS)
    for name, values in expected.items():
        got = layers.ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(got, values, rtol=0, atol=1e-6, err_msg=name)


def make(kind, **parameters):
    return rope.make_rope({"rope_type": kind, "rope_theta": 100.0, **parameters}, 8, 64, partial=False)


def factor_of(made):
    function, _, _ = rope.ROPE_TYPES[made.kind]
    return function(made, jnp.array([3]), **dict(made.parameters))


def test_optional_rope_parameters_take_effect():
    yarn = {"factor": 4.0, "original_max_position_embeddings": 16}
    assert factor_of(make("yarn", **yarn))[1] == pytest.approx(0.1 * np.log(4) + 1)
    assert factor_of(make("yarn", **yarn, attention_factor=1.5))[1] == 1.5
    ratio = factor_of(make("yarn", **yarn, mscale=2.0, mscale_all_dim=0.5))[1]
    assert ratio == pytest.approx((0.2 * np.log(4) + 1) / (0.05 * np.log(4) + 1))
    plain, finer = (factor_of(make("yarn", **yarn, beta_slow=0.3, truncate=truncate))[0] for truncate in (True, False))
    assert np.abs(plain - finer).max() > 1e-4
    assert np.abs(plain - factor_of(make("yarn", **yarn, beta_fast=0.5, beta_slow=0.1))[0]).max() > 1e-4
    long = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    assert factor_of(make("longrope", **long))[1] == pytest.approx(np.sqrt(1 + np.log(2) / np.log(32)))
    assert factor_of(make("longrope", **long, factor=1.0))[1] == 1
    assert factor_of(make("longrope", **long, attention_factor=1.25))[1] == 1.25


def test_scans_cover_whole_periods():
    assert scan_plan("aaaa") == (1, 4)
    assert scan_plan("ababa") == (2, 2)
    assert scan_plan("abcabca") == (3, 2)
    assert scan_plan("aab") == (0, 0)
    assert scan_plan("a") == (0, 0)


def test_flash_attention_is_asked_for_where_it_applies():
    assert flash_applies(8.0, jnp.bfloat16, 128)
    assert not flash_applies(8.0, jnp.bfloat16, 256)
    assert flash_applies(9.0, jnp.bfloat16, 256)
    assert not flash_applies(9.0, jnp.float32, 64)
    assert not flash_applies(9.0, jnp.bfloat16, 60)
    assert not flash_applies(0.0, jnp.bfloat16, 64)


def test_pooling_counts_real_tokens_only():
    hidden = jnp.arange(24.0).reshape(2, 4, 3).at[1, 2:].set(jnp.nan)
    lengths = jnp.array([4, 2])
    np.testing.assert_array_equal(pool("last", hidden, lengths), [[9, 10, 11], [15, 16, 17]])
    np.testing.assert_array_equal(pool("mean", hidden, lengths), [[4.5, 5.5, 6.5], [13.5, 14.5, 15.5]])
    np.testing.assert_array_equal(pool("cls", hidden, lengths), [[0, 1, 2], [12, 13, 14]])


def test_what_cannot_be_pooled_or_run_is_refused():
    with pytest.raises(JarmError, match="Unknown pooling 'max': choose one of last, mean, cls"):
        Pooling("max")
    with pytest.raises(JarmError, match="no layer 4 in a model of 3: choose from -4 to 3"):
        embed("bert", poolings=(Pooling("cls", 4),))
    with pytest.raises(JarmError, match="Unknown dtype 'float16': choose one of float32, bfloat16"):
        abstract_params(loaded("bert")[0], "float16")
    config, params = loaded("gpt2")
    with pytest.raises(JarmError, match="65 tokens are more than the 64 positions"):
        embed_tokens(params, jnp.zeros((1, 65), int), jnp.array([65]), config=config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", make_llm.CASES)
def test_fixtures_are_what_their_script_makes(case, tmp_path):
    pytest.importorskip("torch")
    make_llm.build(case, tmp_path)
    weights = "model.safetensors"
    assert (tmp_path / weights).read_bytes() == (FIXTURES / case / weights).read_bytes()
    with np.load(tmp_path / "reference.npz") as made:
        for name, values in reference(case).items():
            np.testing.assert_allclose(made[name], values, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", make_llm.CASES)
def test_other_random_checkpoints_agree_with_torch(case, seed, tmp_path):
    pytest.importorskip("torch")
    fixed = "hidden_size" in make_llm.CASES[case][1] or case == "phi3"
    make_llm.build(case, tmp_path, seed=seed, **({} if fixed else {"hidden_size": 64}))
    (out,) = embed(case, folder=tmp_path)
    with np.load(tmp_path / "reference.npz") as made:
        np.testing.assert_allclose(out, made["last"][-1], rtol=0, atol=TOLERANCE)
