"""Prompts computed once: the rest of each text behind its prefix must embed as the whole text does."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_llm
from marks import sampled

from jarm.core.status import JarmError
from jarm.llm import layers
from jarm.llm.layers import attend, visible
from jarm.llm.model import cache_bytes, can_share, concatenate, embed_tokens, prefill
from jarm.llm.pooling import Pooling, follow, pool
from jarm.llm.sharding import suited
from jarm.llm.weights import load_model

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "llm"
TOLERANCE = 2e-5
LAST = (Pooling(),)
# Without those that differ from another case in nothing that a prefix touches.
DECODERS = [case for case in make_llm.CASES if case not in ("bert", "smollm2", "gpt_neox_sequential")]
FAST = ("llama_dynamic",)
"""The case with most that prefixes may get wrong: rotations by length."""
# 13 + 11 tokens are more than any window, and as many as `llama_dynamic` was trained for.
BEFORE, GROUP, AFTER = np.array([13, 0, 6, 1]), np.array([2, 0, 3, 1, 0, 2, 0]), np.array([11, 3, 1, 10, 11, 7, 1])


@functools.cache
def loaded(case, dtype="float32"):
    config, params = load_model(FIXTURES / case, dtype=dtype)
    return suited(config, jax.devices()[:1]), params


def texts():
    """Prefixes, rests and whole texts, each with its lengths; padding is tokens like any others."""
    rng = np.random.default_rng(7)
    prefixes, rests = rng.integers(3, 40, (4, 13)), rng.integers(3, 40, (7, 11))
    whole = rng.integers(3, 40, (7, 24))
    for row, (g, n) in enumerate(zip(GROUP, AFTER, strict=True)):
        joined = np.concatenate([prefixes[g, : BEFORE[g]], rests[row, :n]])
        whole[row, : len(joined)] = joined
    pairs = (prefixes, BEFORE), (rests, AFTER), (whole, BEFORE[GROUP] + AFTER)
    return [tuple(jnp.asarray(one, jnp.int32) for one in pair) for pair in pairs]


def run(function, params, pair, **options):
    lowered = function.lower(params, *pair, **options)
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})  # in half the time
    return compiled(params, *pair, **{name: options[name] for name in ("prefix", "group") if name in options})


def both(case, poolings, dtype="float32"):
    """Embeddings of whole texts, and of rests behind their prefixes."""
    config, params = loaded(case, dtype)
    first, rest, whole = texts()
    prefix = run(prefill, params, first, config=config, poolings=poolings)
    shared = {"prefix": prefix, "group": jnp.asarray(GROUP, jnp.int32)}
    expected = run(embed_tokens, params, whole, config=config, poolings=poolings)
    return expected, run(embed_tokens, params, rest, config=config, poolings=poolings, **shared), prefix


@pytest.mark.parametrize("case", sampled(DECODERS, *FAST))
def test_texts_behind_shared_prefixes_embed_as_whole_texts(case):
    """Every family; prefixes that are empty, short and longer than a window; groups shared, lone and out of order."""
    config, _ = loaded(case)
    depth = len(config.layers)
    poolings = tuple(Pooling("last", layer) for layer in range(depth + 1))
    poolings += tuple(Pooling(kind, layer) for kind in ("mean", "cls") for layer in (0, 1, depth))
    expected, got, prefix = both(case, poolings)
    assert prefix.keys.shape == prefix.values.shape == (depth, 4, 13, config.kv_heads, config.head_dim)
    assert 2 * prefix.keys.nbytes == 4 * 13 * cache_bytes(config, "float32")
    for pooling, one, other in zip(poolings, expected, got, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=TOLERANCE, err_msg=str(pooling))


@pytest.mark.slow
def test_bfloat16_stays_close():
    case = "mistral"
    expected, got, prefix = both(case, (Pooling(), Pooling("mean", 1)), "bfloat16")
    assert prefix.keys.dtype == prefix.values.dtype == jnp.bfloat16
    assert 2 * prefix.keys.nbytes == 4 * 13 * cache_bytes(loaded(case)[0], "bfloat16")
    for one, other in zip(expected, got, strict=True):
        assert other.dtype == jnp.float32
        cosine = np.sum(one * other, axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
        assert cosine.min() > 0.999


@pytest.mark.slow
def test_joined_prefixes_are_those_of_one_batch_and_nothing_recompiles():
    config, params = loaded("smollm2")
    (tokens, before), rest, _ = texts()
    poolings = (Pooling(), Pooling("mean", 1), Pooling("cls"))
    options = {"config": config, "poolings": poolings}
    whole = prefill(params, tokens, before, **options)
    sizes = prefill._cache_size(), embed_tokens._cache_size()
    outs = []
    for reverse in (False, True):
        order = jnp.array([2, 3, 0, 1]) if reverse else jnp.arange(4)
        halves = [prefill(params, tokens[rows], before[rows], **options) for rows in (order[:2], order[2:])]
        joined = concatenate(halves)
        assert joined.poolings == poolings
        for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(joined), strict=True):
            rows = jnp.take(one, order, axis=1 if one.ndim == 5 else 0)
            np.testing.assert_allclose(other, rows, rtol=0, atol=TOLERANCE / 10)
        group = jnp.argsort(order)[jnp.asarray(GROUP)]
        outs.append(embed_tokens(params, *rest, **options, prefix=joined, group=group))
    assert prefill._cache_size() == sizes[0] + 1
    assert embed_tokens._cache_size() == sizes[1] + 1
    for one, other in zip(*outs, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=TOLERANCE / 10)


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (4, 1.5)])
def test_attention_behind_a_prefix_is_that_of_the_whole(window, softcap, turns, monkeypatch):
    """Keys and values that must not be seen are enormous."""
    monkeypatch.setattr(layers, "BLOCK", 4)
    rng = np.random.default_rng(3)
    prefix, room, length = np.array([0, 3, 6]), 6, 5
    q, k, v = (rng.normal(size=(3, room + length, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    total = jnp.full(3, room + length, jnp.int32)
    options = {"causal": True, "scale": 0.4, "window": window, "softcap": softcap, "in_turn": turns}
    attention = jax.jit(functools.partial(attend, **options))
    whole = np.asarray(attention(*map(jnp.asarray, (q, k, v)), total))

    def padded(x):
        out = np.full_like(x, 1e9)
        for b, n in enumerate(prefix):
            out[b, :n], out[b, room:] = x[b, :n], x[b, n : n + length]
        return jnp.asarray(out)

    rest = jnp.asarray(np.stack([q[b, n : n + length] for b, n in enumerate(prefix)]))
    start = jnp.asarray(prefix, jnp.int32)
    got = np.asarray(attention(rest, padded(k), padded(v), total, prefix=start))
    for b, n in enumerate(prefix):
        np.testing.assert_allclose(got[b], whole[b, n : n + length], rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [None, 1, 3, 8])
def test_what_is_visible_is_what_its_definition_says(window):
    seen = np.asarray(visible(4, 9, window, jnp.array([0, 2, 5])))
    for b, n in enumerate((0, 2, 5)):
        for t, s in np.ndindex(4, 9):
            place = s if s < n else None if s < 5 else n + s - 5
            expected = place is not None and place <= n + t and (window is None or n + t - place < window)
            assert seen[b, t, s] == expected, (b, t, s)


def test_pooled_parts_make_the_pooled_whole():
    hidden = np.random.default_rng(5).normal(size=(7, 3)).astype(np.float32)
    before = np.array([0, 1, 4])
    first = jnp.asarray(np.stack([hidden] * 3))
    rest = jnp.asarray(np.stack([np.roll(hidden, -n, axis=0) for n in before]))
    n, m = jnp.asarray(before), jnp.asarray(7 - before)
    for kind, whole in {"last": hidden[6], "mean": hidden.mean(axis=0), "cls": hidden[0]}.items():
        got = np.asarray(follow(kind, pool(kind, first, n), n, pool(kind, rest, m), m))
        np.testing.assert_allclose(got, np.stack([whole] * 3), rtol=0, atol=1e-6)


def test_which_models_can_share():
    for case in make_llm.CASES:
        config, _ = loaded(case)
        assert can_share(config) == (case not in ("bert", "llama_dynamic", "phi3")), case
    for case, longest in (("llama_dynamic", 24), ("phi3", 32)):
        config, _ = loaded(case)
        assert can_share(config, longest)
        assert not can_share(config, longest + 1)
    assert not can_share(loaded("bert")[0], 1)
    assert cache_bytes(loaded("gemma2")[0], "bfloat16") == 2 * 4 * 2 * 12 * 2


@pytest.mark.slow
def test_what_cannot_be_shared_is_refused():
    """While tracing, before anything is compiled."""

    def trace(function, case, length, poolings=LAST, **shared):
        config, params = loaded(case)
        tokens, lengths = jnp.zeros((1, length), jnp.int32), jnp.array([length])
        traced = functools.partial(function, config=config, poolings=poolings)
        return jax.eval_shape(traced, params, tokens, lengths, **shared)

    for case in ("bert", "llama_dynamic"):
        with pytest.raises(JarmError, match="cannot share prefixes of texts of 25 tokens, as the whole text decides"):
            trace(prefill, case, 25)
    prefix, group = trace(prefill, "llama_dynamic", 20), jnp.array([0])
    with pytest.raises(JarmError, match="This llama model cannot share prefixes of texts of 25 tokens"):
        trace(embed_tokens, "llama_dynamic", 5, prefix=prefix, group=group)
    for given in ({"prefix": prefix}, {"group": group}):
        with pytest.raises(JarmError, match="One of `prefix` and `group` is missing: give both"):
            trace(embed_tokens, "llama_dynamic", 4, **given)
    with pytest.raises(JarmError, match="computed for other poolings"):
        trace(embed_tokens, "llama_dynamic", 4, (Pooling("cls"),), prefix=prefix, group=group)
    with pytest.raises(JarmError, match="2 padded lengths or poolings cannot be joined"):
        concatenate([prefix, trace(prefill, "llama_dynamic", 9)])
    prefix = trace(prefill, "gpt2", 20)
    with pytest.raises(JarmError, match="65 tokens are more than the 64 positions"):
        trace(embed_tokens, "gpt2", 65, prefix=prefix, group=group)
