"""Exact selection on one device and on eight: the same batch, each device with its own part of the blocks."""

import os
import subprocess
import sys

import pytest

CODE = """
import functools
import jax, jax.numpy as jnp, numpy as np
import jarm
from jarm.design.criteria import D_OPTIMAL
from jarm.design.greedy import greedy

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("data",))
rng = np.random.default_rng(0)
size, width, k = 1300, 8, 24
features = jnp.asarray(rng.normal(size=(size, width)), jnp.float32)
rewards = features @ jnp.asarray(rng.normal(size=width), jnp.float32)
labelled = jnp.asarray(rng.integers(0, size, (40, 2)), jnp.int32)
for kind in ("cross", "all"):
    space = jarm.pair_space(kind, 10, jnp.asarray(rng.random(size) < 0.9), labelled)
    runs = {}
    for name, given in (("one", None), ("eight", mesh)):
        run = jax.jit(functools.partial(greedy, k=k, shortlist=32, mesh=given, limits=jarm.Limits(per_prompt=3)))
        runs[name], info = run(D_OPTIMAL, features, rewards, space, jnp.eye(width))
        assert runs[name].status == 0 and info.passes > 2, (runs[name].status, info.passes)
    assert (runs["one"].pairs == runs["eight"].pairs).all(), kind
    assert (runs["one"].gains == runs["eight"].gains).all(), kind
    program = run.lower(D_OPTIMAL, features, rewards, space, jnp.eye(width)).compile().as_text()
    assert "all-gather" in program
"""


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("devices", [8])
def test_eight_devices_choose_what_one_does(devices):
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
