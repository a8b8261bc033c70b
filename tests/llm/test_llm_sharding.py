"""Meshes of eight devices and runs of two processes, in child processes of this file: devices are counted once."""

import dataclasses
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import traceback

import jax
import numpy as np
import pytest
from fixtures import make_llm

from jarm.core.distributed import start_processes
from jarm.core.status import JarmError
from jarm.llm.config import read_config
from jarm.llm.model import embed_tokens
from jarm.llm.pooling import Pooling
from jarm.llm.sharding import (
    any_process,
    gather,
    load_sharded,
    make_mesh,
    put_on,
    sharding_of,
    split_config,
    to_mesh,
)

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "llm"
TOLERANCE = 2e-5
POOLINGS = (Pooling(), Pooling("mean"))
# Data alone, then models over 2 and 4 devices: scans and what is left over, one key-value head for four devices, with
# biases or a norm of its own, soft-caps, a parallel block, learned positions, an encoder.
PARITY = [
    ("llama", 1),
    ("llama", 2),
    ("llama", 4),
    ("gemma", 4),
    ("gemma2", 2),
    ("gemma3", 2),
    ("qwen2", 4),
    ("olmo2", 4),
    ("gpt_neox", 4),
    ("gpt2", 2),
    ("bert", 4),
]


def load(case, tensor_parallel):
    mesh = make_mesh(tensor_parallel)
    return mesh, *load_sharded(FIXTURES / case, read_config(FIXTURES / case), mesh)


def batch(case):
    """Eight texts, and their embeddings according to transformers."""
    with np.load(FIXTURES / case / "reference.npz") as data:
        rows = np.arange(8) % len(data["lengths"])
        return data["tokens"][rows], data["lengths"][rows], [data[pooling.kind][-1][rows] for pooling in POOLINGS]


def collectives(compiled):
    """Each kind of communication, once for each array that takes part; a loop's body counts once."""
    found = []
    pattern = r"= (.*?) (all-\w+|collective-\w+|reduce-scatter|ragged-\S+)(?:-start)?\("
    for shapes, kind in re.findall(pattern, compiled.as_text()):
        found += [kind] * len(re.findall(r"\w+\[", shapes))
    return found


def compile_and_compare(case, tensor_parallel):
    mesh, config, params = load(case, tensor_parallel)
    tokens, lengths, wanted = batch(case)
    given = params, to_mesh(mesh, tokens), to_mesh(mesh, lengths)
    lowered = embed_tokens.lower(*given, config=config, poolings=POOLINGS)
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})  # in half the time
    for out, expected in zip(gather(mesh, compiled(*given)), wanted, strict=True):
        assert out.is_fully_replicated
        np.testing.assert_allclose(np.asarray(out), expected, rtol=0, atol=TOLERANCE)
    return params["stack"], config, compiled


# ---- In a process of eight devices


def check_parity(case, tensor_parallel):
    """And what is said between devices: all-reduces after looking tokens up and twice in a layer; nothing else."""
    stack, config, compiled = compile_and_compare(case, tensor_parallel)
    written = sum(len(layers) for layers in stack.values())  # of a scan, one period
    norms = 2 if config.qk_norm == "projection" else 0  # its mean is over all heads, so two numbers a token are summed
    expected = 1 + (2 + norms) * written if tensor_parallel > 1 else 0
    assert collectives(compiled) == ["all-reduce"] * expected


def check_shards():
    """Each device holds a quarter of what can be split, key-value heads with their copies, and nothing else."""
    whole = r".*norm.*|.*\.(out|down)\.bias|positions\.table"
    for case in ("gemma", "qwen2", "gpt2"):
        _, config, params = load(case, 4)
        assert config.kv_heads == 4
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            name = ".".join(str(entry.key) for entry in path)
            share = 1 if re.fullmatch(whole, name) else 4
            assert {shard.data.size * share for shard in leaf.addressable_shards} == {leaf.size}, name


def check_copies_of_heads():
    """Each is its original, beside it."""
    folder = FIXTURES / "qwen2"
    _, original = load_one(folder)
    _, config, params = load("qwen2", 4)
    given = read_config(folder)
    assert (given.kv_heads, config.kv_heads) == (2, 4)
    for name in ("k", "v"):
        for leaf in ("kernel", "bias"):
            ours, theirs = (p["stack"]["tail"][1]["attention"][name][leaf] for p in (params, original))
            heads, wanted = (np.asarray(x).reshape(-1, given.head_dim, *x.shape[1:]) for x in (ours, theirs))
            np.testing.assert_array_equal(heads, wanted[[0, 0, 1, 1]])


def load_one(folder):
    return load_sharded(folder, read_config(folder), make_mesh(devices=jax.devices()[:1]))


def check_places():
    mesh = make_mesh(4)
    assert mesh.shape == {"data": 2, "model": 4}
    assert [device.id for device in mesh.devices[1]] == [4, 5, 6, 7]
    assert sharding_of("embed.table", (50257, 8), mesh).is_fully_replicated
    assert sharding_of("stack.cycle.0.mlp.down.kernel", (2, 8, 16), mesh).shard_shape((2, 8, 16)) == (2, 8, 4)
    tokens = to_mesh(mesh, np.arange(32, dtype=np.int32).reshape(8, 4))
    assert {shard.data.shape for shard in tokens.addressable_shards} == {(4, 4)}
    assert tokens.dtype == np.int32
    for flag in (True, False):
        assert bool(any_process(mesh, flag)) is flag


def check_nothing_compiles_twice():
    mesh, config, params = load("bert", 2)
    tokens, lengths, _ = batch("bert")
    before = embed_tokens._cache_size()
    for _ in range(2):
        out = gather(mesh, embed_tokens(params, to_mesh(mesh, tokens), to_mesh(mesh, lengths), config=config))
    assert embed_tokens._cache_size() == before + 1
    assert out[0].is_fully_replicated


def check_refusals():
    with pytest.raises(JarmError, match="cannot be split over 3 of 8 devices: choose a divisor"):
        make_mesh(3)
    with pytest.raises(JarmError, match="cannot be split over 0 of 8 devices"):
        make_mesh(0)
    config, mesh = read_config(FIXTURES / "llama"), make_mesh(8)
    with pytest.raises(JarmError, match=r"The 4 attention heads of this llama .* 8 devices: .* divides 4\."):
        put_on(mesh, config)
    with pytest.raises(JarmError, match=r"The 20 numbers in each MLP .* 8 devices: .* divides 4\."):
        split_config(dataclasses.replace(config, heads=8, mlp_width=20), mesh)
    with pytest.raises(JarmError, match="7 texts cannot be split over 8 groups of devices: pad it"):
        to_mesh(make_mesh(), np.zeros((7, 3), np.int32))


CHECKS = {
    check.__name__: check
    for check in (
        check_shards,
        check_copies_of_heads,
        check_places,
        check_nothing_compiles_twice,
        check_refusals,
    )
} | {f"{case} {groups}": lambda case=case, groups=groups: check_parity(case, groups) for case, groups in PARITY}
ALL = {
    f"{case} {groups}": lambda case=case, groups=groups: check_parity(case, groups)
    for case in make_llm.CASES
    for groups in (1, 2, 4)
}


def eight_devices(checks):
    problems = {}
    for name, check in checks.items():
        try:
            check()
            problems[name] = None
        except Exception:
            problems[name] = traceback.format_exc()
    print(json.dumps(problems))


# ---- In each of two processes of two devices


def two_processes(coordinator, process_id, folder):
    with pytest.raises(JarmError, match="Nothing here says which processes belong together"):
        start_processes()
    with pytest.raises(JarmError, match=r"Process 0 did not answer at 127\.0\.0\.1:1 within 0 s"):
        start_processes("127.0.0.1:1", 2, 1, timeout=0)
    start_processes(coordinator, 2, process_id, timeout=60)
    with pytest.raises(JarmError, match="joined already"):
        start_processes(coordinator, 2, process_id)

    found = {}
    for groups in (2, 4):
        mesh, config, params = load("llama", groups)
        owners = [{device.process_index for device in group} for group in mesh.devices]
        assert owners == {2: [{0}, {1}], 4: [{0, 1}]}[groups]
        kernel = params["stack"]["cycle"][0]["mlp"]["down"]["kernel"]
        assert {shard.data.size * groups for shard in kernel.addressable_shards} == {kernel.size}
        assert len(kernel.addressable_shards) == 2
        tokens, lengths, _ = batch("llama")
        given = to_mesh(mesh, tokens), to_mesh(mesh, lengths)
        outs = gather(mesh, embed_tokens(params, *given, config=config, poolings=POOLINGS))
        found |= {f"{groups} {pooling.kind}": np.asarray(out) for pooling, out in zip(POOLINGS, outs, strict=True)}
        assert bool(any_process(mesh, process_id == 1))
        assert not any_process(mesh, False)
    np.savez(folder / f"{process_id}.npz", **found)


# ---- Here


def start(devices, *arguments):
    """This file as a program, under the strict modes of every test."""
    detected = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JAX_COORDINATOR", "JAX_NUM", "JAX_PROCESS")
    env = {name: value for name, value in os.environ.items() if not name.startswith(detected)}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(children, timeout):
    try:
        results = [child.communicate(timeout=timeout) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (_, errors) in zip(children, results, strict=True):
        assert child.returncode == 0, errors
    return [out for out, _ in results]


@pytest.fixture(scope="module")
def problems():
    (out,) = finish([start(8, "eight")], 300)
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.slow
def test_eight_devices(problems, check):
    assert problems[check] is None, problems[check]


@pytest.mark.nightly
@pytest.mark.slow
def test_every_family_on_every_mesh():
    (out,) = finish([start(8, "all")], 900)
    assert json.loads(out.splitlines()[-1]) == dict.fromkeys(ALL)


@pytest.mark.slow
@pytest.mark.nightly
def test_two_processes_are_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    finish([start(2, "two", address, process_id, tmp_path) for process_id in (0, 1)], 150)
    _, _, wanted = batch("llama")
    for process_id in (0, 1):
        with np.load(tmp_path / f"{process_id}.npz") as found:
            assert len(found) == 4
            for groups in (2, 4):
                for pooling, expected in zip(POOLINGS, wanted, strict=True):
                    np.testing.assert_allclose(found[f"{groups} {pooling.kind}"], expected, rtol=0, atol=TOLERANCE)


def test_processes_that_cannot_be_joined_are_refused(monkeypatch):
    with pytest.raises(JarmError, match="'localhost' is no address of process 0: write HOST:PORT"):
        start_processes("localhost", 2, 0)
    with pytest.raises(JarmError, match="There is no process 2 of 2: count them from 0 to 1"):
        start_processes("127.0.0.1:1", 2, 2)
    jax.devices()
    with pytest.raises(JarmError, match="A device is in use already: join the processes before any computation"):
        start_processes("127.0.0.1:1", 1, 0)

    def fail(*_, **__):
        raise RuntimeError("UNKNOWN: Failed to start RPC server")

    monkeypatch.setattr(jax.distributed, "initialize", fail)  # jaxlib can do this once in a process
    with pytest.raises(JarmError, match=r"Process 0 did not join at 127\.0\.0\.1:1: is the port free .*RPC server\)\?"):
        start_processes("127.0.0.1:1", 1, 0)


if __name__ == "__main__":
    import conftest  # noqa: F401  # the strict modes

    if sys.argv[1] == "two":
        two_processes(sys.argv[2], int(sys.argv[3]), pathlib.Path(sys.argv[4]))
    else:
        eight_devices(CHECKS if sys.argv[1] == "eight" else ALL)
