"""Reward models that read embeddings and need no jarm: a script with its arrays, and ONNX."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from jarm.core.files import PathLike, whole_folder, write_whole
from jarm.core.status import JarmError
from jarm.export.card import model_card
from jarm.export.layers import IDENTITY, Layer, member_layers
from jarm.export.model import CARD, RewardModel, refuse_taken

OPSET = 20
"""Version of ONNX's operators: the first with Gelu."""
SCRIPT = '''"""Rewards of embeddings: `rewards(embeddings)`, or `python score.py embeddings.npy rewards.npy`."""

import math
import pathlib
import sys

import numpy as np

ACTIVATIONS = {
    "identity": lambda x: x,
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * np.exp(-np.logaddexp(0, -x)),
    "tanh": np.tanh,
}


def members(embeddings):
    """Rewards [n, K] of the K members, of embeddings [n, d] as the model was trained on."""
    arrays = np.load(pathlib.Path(__file__).with_name("weights.npz"))
    rows = np.asarray(embeddings, np.float64)
    for at, name in enumerate(arrays["activations"]):
        rows = ACTIVATIONS[str(name)](rows @ arrays[f"kernel.{at}"] + arrays[f"bias.{at}"])
    return rows


def rewards(embeddings):
    """Rewards [n]: AGGREGATE of the members."""
    found = members(embeddings)
    return REDUCED


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("Give the embeddings and where the rewards go: python score.py embeddings.npy rewards.npy")
    np.save(sys.argv[2], rewards(np.load(sys.argv[1])))
'''
_REDUCED = {
    "mean": "found.mean(axis=1)",
    "worst": "found.min(axis=1)",
    "lower": "found.mean(axis=1) - {} * found.std(axis=1)",
    "quantile": "np.quantile(found, {}, axis=1)",
}


def write_numpy(model: RewardModel, folder: PathLike) -> dict[str, Any]:
    """Write `weights.npz` and `score.py`, which needs NumPy alone.

    Args:
      model: any.
      folder: a new or empty one.

    Returns:
      `layers`, the number of dense layers.

    Raises:
      JarmError: something stands there already, or it cannot be written.
    """
    folder = pathlib.Path(folder)
    refuse_taken(folder)
    layers = member_layers(model)
    arrays: dict[str, Any] = {"activations": np.array([layer.activation for layer in layers])}
    for at, layer in enumerate(layers):
        arrays |= {f"kernel.{at}": layer.kernel, f"bias.{at}": layer.bias}
    reduced = _REDUCED[model.aggregate.kind].format(repr(model.aggregate.number))
    script = SCRIPT.replace("AGGREGATE", f"the {model.aggregate}").replace("REDUCED", reduced)
    with whole_folder(folder) as draft:
        card = model_card(model, library="numpy", remarks=["`score.py` computes it with NumPy alone."])
        write_whole(draft / CARD, card)
        np.savez(draft / "weights.npz", **arrays)
        write_whole(draft / "score.py", script)
    return {"layers": len(layers)}


def write_onnx(model: RewardModel, folder: PathLike) -> dict[str, Any]:
    """Write `model.onnx`: `embeddings` `[n, d]` in; `rewards` `[n]` and `members` `[n, K]` out, float32.

    Args:
      model: any whose reward is the mean or the worst of its members.
      folder: a new or empty one.

    Returns:
      `layers`, the number of dense layers.

    Raises:
      JarmError: another aggregate, the package `onnx` is not there, or the folder is taken.
    """
    folder = pathlib.Path(folder)
    refuse_taken(folder)
    try:
        import onnx
    except ImportError as error:
        raise JarmError("An export to ONNX needs the package `onnx`: install `jarm-jax[onnx]`.") from error
    if model.aggregate.kind not in ("mean", "worst"):
        raise JarmError(
            f"The reward of this model is the {model.aggregate} of its members, and the export to ONNX has their mean "
            "or the worst: use `--to numpy`, `jarm serve` or a reward function."
        )
    layers = member_layers(model)
    graph = _graph(onnx, layers, model.aggregate.kind)
    made = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10, producer_name="jarm"
    )
    onnx.checker.check_model(made, full_check=True)
    remark = "`model.onnx` takes `embeddings` `[n, d]` float32 and gives `rewards` `[n]` and `members` `[n, K]`."
    with whole_folder(folder) as draft:
        write_whole(draft / CARD, model_card(model, library="onnx", remarks=[remark]))
        write_whole(draft / "model.onnx", made.SerializeToString())
    return {"layers": len(layers)}


def _graph(onnx: Any, layers: list[Layer], kind: str) -> Any:
    """The layers, one node for a product and one or two for an activation, then the mean or the smallest."""
    helper, nodes, tensors, rows = onnx.helper, [], [], "embeddings"

    def node(name: str, inputs: list[str], output: str, **options: Any) -> str:
        nodes.append(helper.make_node(name, inputs, [output], **options))
        return output

    def tensor(name: str, array: np.ndarray) -> str:
        tensors.append(onnx.numpy_helper.from_array(array, name))
        return name

    for at, (kernel, bias, activation) in enumerate(layers):
        weights = [
            tensor(f"{name}.{at}", np.asarray(array, np.float32))
            for name, array in (("kernel", kernel), ("bias", bias))
        ]
        rows = node("Gemm", [rows, *weights], "members" if layers[at] is layers[-1] else f"linear.{at}")
        if activation in ("gelu", "gelu_tanh"):
            rows = node("Gelu", [rows], f"hidden.{at}", approximate="tanh" if activation == "gelu_tanh" else "none")
        elif activation == "silu":
            rows = node("Mul", [rows, node("Sigmoid", [rows], f"gate.{at}")], f"hidden.{at}")
        elif activation != IDENTITY:
            rows = node({"relu": "Relu", "tanh": "Tanh"}[activation], [rows], f"hidden.{at}")
    axis = tensor("axis", np.array([1], np.int64))
    node("ReduceMean" if kind == "mean" else "ReduceMin", ["members", axis], "rewards", keepdims=0)

    def value(name: str, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    outputs = [value("rewards", "n"), value("members", "n", layers[-1].kernel.shape[1])]
    return helper.make_graph(nodes, "reward", [value("embeddings", "n", layers[0].kernel.shape[0])], outputs, tensors)
