"""A model over many devices: texts are split along one axis of a mesh, parameters along the other.

Parameters and batches are placed, and `embed_tokens` is called as ever: the compiler adds the communication, an
all-reduce after the tokens are looked up and two in each layer. Several processes, usually one a host, all run the
same program on the same batches, and each holds only its own part of the arrays.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jarm.core.status import JarmError
from jarm.core.types import AnyMesh, Array, Params
from jarm.llm.config import ModelConfig
from jarm.llm.model import Prefix
from jarm.llm.weights import Put, load_params

DATA, MODEL = "data", "model"
# The last axes of a parameter, by its name; all other axes are whole on every device. Kernels split by outputs feed
# kernels split by inputs, whose partial sums meet in one all-reduce; biases of the latter are added after it. A table
# split by width would leave hidden states split by width: one more all-gather before each attention and MLP.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed\.table", (MODEL, None)),
    (r".*\.(q|k|v|gate|up)\.kernel", (MODEL, None)),
    (r".*\.(q|k|v|gate|up)\.bias", (MODEL,)),
    (r".*\.(out|down)\.kernel", (None, MODEL)),
)


def make_mesh(tensor_parallel: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data` and `model` over all devices of all processes.

    The devices that share one model are neighbours: in one process wherever its devices are enough.

    Args:
      tensor_parallel: number of devices that a model is split over.
      devices: devices to take; by default all.

    Raises:
      JarmError: the devices cannot be divided into such groups.
    """
    ordered = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    if tensor_parallel < 1 or len(ordered) % tensor_parallel:
        raise JarmError(
            f"A model cannot be split over {tensor_parallel} of {len(ordered)} devices: choose a divisor of their "
            "number."
        )
    return Mesh(np.array(ordered).reshape(-1, tensor_parallel), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def split_config(config: ModelConfig, mesh: AnyMesh) -> ModelConfig:
    """The config of a model as `put_on` places it: with copies of key-value heads where they are too few to split.

    Query head h of H reads key-value head floor(h K / H) of K. With each of the K repeated r times in a row it reads
    floor(h K r / H), a copy of the same head; r is the smallest number for which the model axis divides K r. Each
    device then has exactly the heads that its queries read: attention needs no communication, as cuDNN's requires.

    Args:
      config: the model.
      mesh: of `make_mesh`.

    Raises:
      JarmError: attention heads or the width of MLPs that the model axis does not divide.
    """
    groups = mesh.shape[MODEL]
    for count, unit in ((config.heads, "attention heads"), (config.mlp_width, "numbers in each MLP")):
        if count % groups:
            raise JarmError(
                f"The {count} {unit} of this {config.family} cannot be split over {groups} devices: choose a "
                f"`tensor_parallel` that divides {math.gcd(config.heads, config.mlp_width)}."
            )
    return dataclasses.replace(config, kv_heads=math.lcm(config.kv_heads, groups))


def suited(config: ModelConfig, devices: Sequence[jax.Device]) -> ModelConfig:
    """The config of a model that computes in the form that suits some devices, all of one kind.

    On a lone CPU texts and heads are computed in turn, so that operands stay in its cache; a loop would gather arrays
    that are split over devices. On NVIDIA's devices attention is cuDNN's where that applies.

    Args:
      config: the model.
      devices: where it will run; programs for other devices need another config.
    """
    try:
        capability = float(getattr(devices[0], "compute_capability", 0))
    except ValueError:  # "gfx942": not NVIDIA's
        capability = 0.0
    in_turn = len(devices) == 1 and devices[0].platform == "cpu"
    return dataclasses.replace(config, in_turn=in_turn, capability=capability)


def put_on(mesh: Mesh, config: ModelConfig) -> Put:
    """A `put` for `load_model` that gives each device its part of a parameter, by `RULES`.

    A vocabulary that the model axis does not divide (GPT-2's 50257) stays whole on every device. Each array is on its
    devices before the next is read, so a process has its part of the model and one parameter in memory.

    Args:
      mesh: of `make_mesh`.
      config: of the checkpoint; the model computes with `split_config(config, mesh)`.

    Raises:
      JarmError: as `split_config`.
    """
    copies = split_config(config, mesh).kv_heads // config.kv_heads

    def put(name: str, array: np.ndarray) -> Array:
        if copies > 1:
            array = _repeat_heads(name, array, config, copies)
        placed = jax.make_array_from_callback(
            array.shape, sharding_of(name, array.shape, mesh), lambda part: array[part]
        )
        return jax.block_until_ready(placed)

    return put


def sharding_of(name: str, shape: tuple[int, ...], mesh: AnyMesh) -> NamedSharding:
    """Sharding of a parameter, by its name; whole on every device if a table's rows cannot be divided."""
    split = next((axes for pattern, axes in RULES if re.fullmatch(pattern, name)), ())
    if name.endswith(".table") and shape[0] % mesh.shape[MODEL]:
        split = ()
    return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - len(split)), *split))


def _repeat_heads(name: str, array: np.ndarray, config: ModelConfig, copies: int) -> np.ndarray:
    module, leaf = name.split(".")[-2:]
    if not (module in ("k", "v") or (module == "k_norm" and config.qk_norm == "projection")):
        return array
    axis = array.ndim - (2 if leaf == "kernel" else 1)
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    heads = array.reshape(*before, config.kv_heads, config.head_dim, *after)
    return np.repeat(heads, copies, axis=axis).reshape(*before, -1, *after)


def load_sharded(
    folder: pathlib.Path, config: ModelConfig, mesh: Mesh, *, dtype: str = "float32"
) -> tuple[ModelConfig, Params]:
    """Read a checkpoint onto a mesh: the config to compute with, and the parameters.

    Args:
      folder: a checkpoint.
      config: config of the checkpoint, of `read_config`.
      mesh: of `make_mesh`.
      dtype: `float32` or `bfloat16`.

    Raises:
      JarmError: as `load_model` and `split_config`.
    """
    split = suited(split_config(config, mesh), list(mesh.devices.flat))
    return split, load_params(folder, config, dtype=dtype, put=put_on(mesh, config))


def to_mesh(mesh: Mesh, batch: np.ndarray) -> Array:
    """A batch that every process has whole, as one array split over the data axis.

    Raises:
      JarmError: the data axis does not divide the number of rows.
    """
    if len(batch) % mesh.shape[DATA]:
        raise JarmError(
            f"A batch of {len(batch)} texts cannot be split over {mesh.shape[DATA]} groups of devices: pad it to a "
            "multiple."
        )
    return jax.make_array_from_callback(batch.shape, NamedSharding(mesh, PartitionSpec(DATA)), lambda part: batch[part])


def gather(mesh: Mesh, arrays: Any) -> Any:
    """A pytree of arrays on a mesh, whole on every device, so that `np.asarray` reads them in every process.

    All processes call this in the same order; it returns at once, as every computation does.
    """
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))


def share_prefix(mesh: Mesh, prefix: Prefix) -> Prefix:
    """Prefixes that any text can continue: all on every device, each with the heads that the device computes."""
    heads, whole = NamedSharding(mesh, PartitionSpec(None, None, None, MODEL)), NamedSharding(mesh, PartitionSpec())
    return jax.device_put(prefix, dataclasses.replace(jax.tree.map(lambda _: whole, prefix), keys=heads, values=heads))


def any_process(mesh: Mesh, flag: bool) -> Array:
    """Whether the flag is true in any process: one value, the same everywhere, computed without waiting.

    A process that left the loop over batches alone, for a signal or an error, would leave the others waiting for it.
    Called after each batch and read with its results, this lets all processes leave after the same batch.
    """
    every = NamedSharding(mesh, PartitionSpec((DATA, MODEL)))
    return gather(mesh, jnp.any(jax.make_array_from_callback((mesh.size,), every, lambda part: np.array([flag]))))
