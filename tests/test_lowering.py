"""The main programs lower for GPUs and TPUs; and the TPU's compiler takes them, on a machine without a TPU.

pip install libtpu==0.0.42.1          # what `pip install 'jax[tpu]'` chooses for jaxlib 0.10.2
pytest -m "tpu and not nightly"       # a short list, as .ci/run compiles it
pytest -m tpu                         # every program, and those of a mesh also for a larger topology: most of an hour
"""

import fnmatch
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
from jax import export
from jax.sharding import AbstractMesh, AxisType
from marks import nightly, slow

from benchmarks import programs

PLATFORMS = ("cuda", "tpu")


def abstract_mesh(shape, names):
    """Of four devices, as `programs.table` asks for it."""
    left = 4 // -math.prod(shape) if -1 in shape else 1
    sizes = tuple(left if size < 0 else size for size in shape)
    return AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


TABLE = programs.table(abstract_mesh)
LARGE = tuple(name for name in TABLE if name.endswith(("5,000", "100,000")) or "default" in name)
"""Sizes of programs that the table has small, too."""
OFTEN = (
    "run: few rules",
    "fit: laplace",
    "evaluate: laplace",
    "greedy: within, 600",
    "greedy: all, mesh",
    "model: bert",
    "model: gemma2",
    "model: both split",
    "rule: badge",
)


def when(name):
    """Rules share their parts with the runs."""
    return name if name in OFTEN else nightly(name) if name.startswith("rule: ") else slow(name)


@pytest.mark.parametrize("name", [when(name) for name in TABLE if name not in LARGE])
def test_a_program_lowers_for_gpus_and_tpus(name):
    program = TABLE[name]()
    assert export.export(program.function, platforms=PLATFORMS)(*program.args).platforms == PLATFORMS


def test_heads_are_fitted_in_the_form_of_the_platform_that_a_program_is_lowered_for():
    loops = {}
    for batching in ("auto", "map", "vmap"):
        program = programs.fit("linear", members=2, labels=20, batching=batching)
        traced = program.function.trace(*program.args)
        for platform in ("cpu", "tpu"):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            loops[batching, platform] = text.count("stablehlo.while")
    for platform, form, other in (("cpu", "map", "vmap"), ("tpu", "vmap", "map")):
        assert loops["auto", platform] == loops[form, platform] != loops[other, platform]


# ---- By the TPU's compiler, in a process of its own, which a failed check of it would end

GROUPS = ("run: *", "fit: *", "evaluate: *", "bound: *", "exchange: *", "greedy: *", "decoder*", "model: *", "rule: *")
"""Patterns of names that match every program."""


def compiled(topology, *patterns):
    """Rows of `benchmarks.aot`, of the programs whose names match."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "XLA_FLAGS"))}
    command = [sys.executable, "-m", "benchmarks.aot", "--list", "all", "--topology", topology, "--only", *patterns]
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    return rows


def tpu(function):
    """A test that needs the compiler, which `pip install libtpu` brings."""
    # 200 MB that only .ci/run and these tests need: no part of an extra.
    missing = importlib.util.find_spec("libtpu") is None
    return pytest.mark.tpu(pytest.mark.skipif(missing, reason="there is no libtpu: pip install libtpu")(function))


@tpu
@pytest.mark.parametrize("name", programs.SHORT)
def test_the_compiler_takes_the_short_list(name):
    """The default run once ended the compiler: a scatter of what is an identity."""
    (row,) = compiled("v5e:2x2", name)
    assert row["temp_bytes"] < 1 << 30
    assert not row["collectives"]


@tpu
@pytest.mark.nightly
@pytest.mark.parametrize("pattern", GROUPS)
def test_the_compiler_takes_every_program(pattern):
    compiled("v5e:2x2", pattern)


@tpu
@pytest.mark.nightly
def test_the_compiler_takes_meshes_of_sixteen():
    rows = compiled("v5e:4x4", "*mesh", "* split")
    alone = {"run: small, mesh", "model: texts split"}  # of a run or a text no device needs what another has
    assert {row["name"] for row in rows if not row["collectives"]} == alone


def test_groups_match_every_program():
    assert {*OFTEN, *programs.SHORT} <= set(TABLE)
    assert all(any(fnmatch.fnmatchcase(name, pattern) for pattern in GROUPS) for name in TABLE)
