"""A reward model as plain dense layers, which is what other programs can hold.

Standardisation and the feature map are folded into the first layer, and members lie side by side: of K members the
first kernel is their kernels joined, and later ones have a block for each member.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jarm.core.status import JarmError
from jarm.core.types import Float
from jarm.export.model import RewardModel

IDENTITY = "identity"


class Layer(NamedTuple):
    """x -> activation(x @ kernel + bias).

    Attributes:
      kernel: `[i, o]` float64.
      bias: `[o]` float64.
      activation: a name in `jarm.reward.heads.ACTIVATIONS`, or `identity`.
    """

    kernel: np.ndarray
    bias: np.ndarray
    activation: str = IDENTITY


def member_layers(model: RewardModel) -> list[Layer]:
    """Layers from an embedding `[d]` to the rewards of the members `[K]`.

    Example:
      >>> from jarm.reward.config import HeadConfig
      >>> params = {"out": {"kernel": np.array([[[1.0], [2.0]], [[3.0], [4.0]]], np.float32)}}  # two members, d = 2
      >>> layers = member_layers(RewardModel(HeadConfig(hidden=()), params, offset=np.ones(2, np.float32)))
      >>> rewards_of(layers, np.array([[1.0, 0.0]]))
      array([[0., 2.]])
    """
    out = np.asarray(model.params["out"]["kernel"], np.float64)
    hidden = [model.params["hidden"][at] for at in range(len(model.head.hidden))]
    kernels = [*(np.asarray(each["kernel"], np.float64) for each in hidden), out]
    offset = -np.asarray(model.offset, np.float64)
    biases = [*(np.asarray(each["bias"], np.float64).reshape(-1) for each in hidden), offset]
    joined = [np.concatenate(list(kernels[0]), axis=1), *(_blocks(kernel) for kernel in kernels[1:])]
    joined[0], biases[0] = _folded(model, joined[0], biases[0])
    names = [*[model.head.activation] * len(hidden), IDENTITY]
    return [Layer(*each) for each in zip(joined, biases, names, strict=True)]


def reward_layers(model: RewardModel) -> list[Layer]:
    """Layers from an embedding `[d]` to the reward `[1]`, the mean over members.

    Raises:
      JarmError: the model makes its reward of several members otherwise.
    """
    if model.members > 1 and model.aggregate.kind != "mean":
        raise JarmError(
            f"The reward of this model is the {model.aggregate} of {model.members} members, and layers can only "
            "average them: train with --aggregate mean, or use `jarm serve` or a reward function, which do as it says."
        )
    *hidden, last = member_layers(model)
    return [*hidden, Layer(last.kernel.mean(axis=1, keepdims=True), last.bias.mean(keepdims=True))]


NUMPY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    IDENTITY: lambda x: x,
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * np.exp(-np.logaddexp(0, -x)),
    "tanh": np.tanh,
}
"""Activation -> what it computes, in NumPy."""


def rewards_of(layers: Sequence[Layer], embeddings: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n o"]:
    """What layers make of embeddings, in float64."""
    rows = np.asarray(embeddings, np.float64)
    for layer in layers:
        rows = NUMPY[layer.activation](rows @ layer.kernel + layer.bias)
    return rows


def _folded(model: RewardModel, kernel: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first layer on embeddings as they are stored."""
    if model.metric is not None:
        kernel = np.asarray(model.metric, np.float64) @ kernel
    if model.deviation is not None:
        kernel = kernel / np.asarray(model.deviation, np.float64)[:, None]
    if model.mean is not None:
        bias = bias - np.asarray(model.mean, np.float64) @ kernel
    return kernel, bias


def _blocks(kernels: np.ndarray) -> np.ndarray:
    """`[K, i, o]` kernels as the blocks of one, `[K i, K o]`."""
    count, inputs, outputs = kernels.shape
    out = np.zeros((count, inputs, count, outputs))
    out[np.arange(count), :, np.arange(count)] = kernels
    return out.reshape(count * inputs, count * outputs)
