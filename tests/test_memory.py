"""Memory is bounded: by XLA's own figure for compiled programs, and by what NumPy allocates on the host."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jarm.core.base import HParams
from jarm.core.tables import ResponseTable
from jarm.evaluation import metrics
from jarm.evaluation.annotators import AnnotatorConfig
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import DeviceTable
from jarm.loop.loop import make_loop
from jarm.reward.heads import mlp_head

# A scaled test set: 60 x 100 x 256 float32 is 6.1 MB; the budget is 1 MiB for a chunk, for any number of heads.
P, R, D = 60, 100, 256
BUDGET = 1 << 20


@pytest.fixture(scope="module")
def stored_table(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "embeddings.npy"
    rng = np.random.default_rng(0)
    store = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(P * R, D))
    store[:] = rng.normal(size=store.shape)
    store.flush()
    rows = np.arange(P * R, dtype=np.int32).reshape(P, R)
    gold = rng.normal(size=(P, R)).astype(np.float32)
    return ResponseTable(np.load(path, mmap_mode="r"), rows, np.ones((P, R), bool), gold)


def stacked(heads):
    head = mlp_head((64, 64))
    params = jax.jit(jax.vmap(jax.vmap(lambda key: head.init(key, D))))(jax.random.split(jax.random.key(0), (heads, 2)))
    return head, params


def test_a_compiled_chunk_of_an_evaluation_fits_its_budget():
    head, params = stacked(16)
    size = metrics.chunk_size((P, R, D), 64, BUDGET)
    assert 1 <= size < P / 5
    cdfs = jnp.zeros((3, R + 1, R + 1))
    arrays = jnp.zeros((size, R, D)), jnp.zeros((size, R)), jnp.ones((size, R), bool)
    constants, noise = metrics.Constants(jnp.float32(1), jnp.float32(1), cdfs), jnp.ones(16)
    kernel = metrics.evaluate_chunk.lower(
        params, noise, constants, *arrays, head=head, annotator=AnnotatorConfig(), batched_heads=False
    )
    memory = kernel.compile().memory_analysis()
    taken = memory.temp_size_in_bytes + memory.output_size_in_bytes + arrays[0].nbytes
    assert taken < BUDGET


def test_the_host_holds_few_chunks_of_a_stored_table(stored_table):
    head, params = stacked(4)
    evaluate = functools.partial(metrics.evaluate, head, params, stored_table, chunk_bytes=BUDGET, best_of=(5,))
    first = evaluate()
    tracemalloc.start()
    try:
        second = evaluate()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < BUDGET
    np.testing.assert_array_equal(first["spearman"], second["spearman"])


@pytest.mark.slow
def test_a_selection_does_not_copy_the_table():
    """A few candidates of a table of 10 MB: what is held beside it is of the size of the candidates."""
    config = LoopConfig(rules=("random", "dopt"), rounds=1, batch=5, initial=5, candidates=100)
    loop = make_loop(config)
    device_table = DeviceTable(
        embeddings=jnp.zeros((1000, 10, D)),
        mask=jnp.ones((1000, 10), bool),
        gold=jnp.zeros((1000, 10)),
        lengths=jnp.zeros((1000, 10)),
        spread=jnp.float32(1),
        spread_within=jnp.float32(1),
    )
    state, _ = jax.eval_shape(loop.init, jax.random.key(0), device_table)
    compiled = jax.jit(loop.select).lower(HParams(), state, device_table, jnp.int32(1)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 << 20
