"""A table of the published shape, 40,000 prompts of 10 responses with 2,048 wide embeddings: 3.3 GB, mostly a hole."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jarm
from jarm.core.base import HParams
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import DeviceTable
from jarm.loop.loop import make_loop
from jarm.reward.config import HeadConfig

P, R, D = 40_000, 10, 2048
BYTES = 4 * P * R * D


@pytest.mark.slow
@pytest.mark.nightly
def test_a_table_of_it_is_read_and_standardised_in_a_tenth_of_its_memory(tmp_path):
    embeddings = np.lib.format.open_memmap(tmp_path / "e.npy", mode="w+", dtype=np.float32, shape=(P * R, D))
    embeddings[::40] = np.random.default_rng(0).normal(size=(P * R // 40, D))
    del embeddings
    ids = np.repeat(np.arange(P), R)
    split = np.where(ids < P - 100, "train", "test")
    score = np.random.default_rng(1).normal(size=P * R)
    pq.write_table(pa.table({"prompt_id": ids, "score": score, "split": split}), tmp_path / "t.parquet")
    tracemalloc.start()
    try:
        train, test = jarm.load(tmp_path / "t.parquet", embeddings=tmp_path / "e.npy", target="score")
        some = train.embeddings(slice(0, 4000)).reshape(-1, D)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (train.shape, test.shape) == ((P - 100, R, D), (100, R, D))
    assert peak < BYTES / 10 + 3 * some.nbytes
    np.testing.assert_allclose(np.square(some).mean(), 1, rtol=0.1)  # every fortieth row is not 0, here as anywhere


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("pairs", ["within", "all"])
def test_a_selection_over_every_pair_of_it_holds_a_fraction_of_the_table(pairs):
    """By the compiler's account, without a run: 1.8 million pairs within prompts, 80 thousand million in all."""
    config = LoopConfig(
        head=HeadConfig.parse("mlp:64,64,64"),
        rules=("greedy_dopt",),
        rounds=1,
        batch=500,
        initial=500,
        pairs=pairs,
        candidates=None,
    )
    loop = make_loop(config)
    shape = jax.ShapeDtypeStruct
    table = DeviceTable(
        embeddings=shape((P, R, D), jnp.float32),
        mask=shape((P, R), bool),
        gold=shape((P, R), jnp.float32),
        lengths=shape((P, R), jnp.float32),
        spread=shape((), jnp.float32),
        spread_within=shape((), jnp.float32),
    )
    state, _ = jax.eval_shape(loop.init, jax.random.key(0), table)
    memory = jax.jit(loop.select).lower(HParams(), state, table, jnp.int32(0)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.3 * BYTES
