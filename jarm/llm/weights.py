"""Safetensors in: every tensor of a checkpoint used exactly once, or refused by name."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jarm.core.files import inside, there
from jarm.core.messages import brief
from jarm.core.outside import mapping, read_json, string, struct
from jarm.core.status import JarmError, printable
from jarm.core.types import Params
from jarm.llm.config import FAMILIES, ModelConfig, read_config
from jarm.llm.layers import scan_plan
from jarm.llm.model import abstract_params

Put = Callable[[str, np.ndarray], Any]
"""Path of a parameter and its array on the host in, the array on its devices out."""

PREFIXES = ("", "model.", "transformer.", "gpt_neox.", "bert.", "model.language_model.", "language_model.model.")
# Output heads, which embedding text does not need, and tables that old versions saved as well.
IGNORED = (r"(language_model\.)?lm_head\.(weight|bias)", r".*\.rotary_emb\.inv_freq")
LEAVES = {"kernel": "weight", "scale": "weight", "table": "weight", "bias": "bias"}
OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def find_checkpoint(model: str | pathlib.Path, revision: str | None = None) -> pathlib.Path:
    """The folder of a checkpoint: `model` itself, or the local copy of a Hugging Face id, downloaded if need be.

    Args:
      model: a folder, or an id such as `HuggingFaceTB/SmolLM2-135M`.
      revision: of the id: a branch, a tag or a commit.

    Raises:
      JarmError: neither a folder nor an id that can be downloaded.
    """
    folder = pathlib.Path(model)
    if os.path.isdir(folder):  # which, unlike pathlib's, bears any name
        if revision is not None:
            raise JarmError(f"{folder} is a folder, and a --revision is of a model of the hub: leave it out.")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) or str(model).startswith("."):
        raise JarmError(
            f"'{_short(str(model))}' is neither a folder nor a Hugging Face id such as 'HuggingFaceTB/SmolLM2-135M'."
        )
    from huggingface_hub import snapshot_download  # heavy, and only needed here

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return pathlib.Path(
            snapshot_download(str(model), revision=revision, allow_patterns=wanted, ignore_patterns=["consolidated*"])
        )
    except Exception as error:  # each library below has its own kinds
        reason = " ".join(str(error).split())[:200]
        raise JarmError(f"No folder '{model}', and it cannot be had from the Hugging Face hub: {reason}") from error


class Checkpoint:
    """All tensors of a folder, memory-mapped; headers are read and compared at once, data on demand."""

    def __init__(self, folder: pathlib.Path):
        from safetensors import SafetensorError, safe_open

        self.tensors: dict[str, tuple[Any, str]] = {}  # our spelling -> the file, and its spelling
        for path, expected in _files(folder):
            try:
                file = safe_open(path, framework="numpy")
            except (OSError, SafetensorError) as error:
                reason = printable(brief(error))[:300]
                raise JarmError(f"{path} is not a whole safetensors file ({reason}): download it again.") from error
            names = set(file.keys())
            if expected is not None and names != expected:
                odd = sorted(names ^ expected)[0]
                raise JarmError(
                    f"{path.name} and model.safetensors.index.json do not agree on '{_short(odd)}': download both "
                    "again."
                )
            for name in names:
                ours = next((name.removesuffix(a) + b for a, b in OLD_ENDINGS.items() if name.endswith(a)), name)
                if ours in self.tensors:
                    raise JarmError(
                        f"The tensor '{_short(name)}' of {path} is there twice: leave one set of weights in the folder."
                    )
                self.tensors[ours] = file, name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header; refuses dtypes other than plain floating point."""
        file, theirs = self.tensors[name]
        header = file.get_slice(theirs)
        if header.get_dtype() not in DTYPES:
            known, kind = ", ".join(DTYPES), header.get_dtype()
            raise JarmError(f"The tensor '{_short(theirs)}' is of dtype {kind}: jarm reads {known}, no quantised ones.")
        return tuple(header.get_shape())

    def read(self, name: str) -> np.ndarray:
        """The tensor itself."""
        file, theirs = self.tensors[name]
        return file.get_tensor(theirs)


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Files with the weights of a checkpoint.

    Raises:
      JarmError: the files are missing, or pickled.
    """
    return [path for path, _ in _files(folder)]


def _files(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, set[str] | None]]:
    index = folder / "model.safetensors.index.json"
    if there(folder / "model.safetensors"):  # the first choice of transformers, too
        yield folder / "model.safetensors", None
    elif there(index):
        try:
            places = read_json(index, struct({"weight_map": mapping(string(1000))}))["weight_map"]
        except JarmError as error:
            raise JarmError(f"{index} has no readable `weight_map`: {error}") from error
        files: dict[str, set[str]] = {}
        for tensor, file in places.items():
            files.setdefault(file, set()).add(tensor)
        paths = {file: inside(folder, file, index) for file in sorted(files)}
        if missing := [file for file, path in paths.items() if not os.path.isfile(path)]:
            shown = ", ".join(_short(file) for file in missing[:3]) + (" and more" if len(missing) > 3 else "")
            raise JarmError(f"{folder} lacks {shown} of the {len(files)} files in its index: download again.")
        yield from ((paths[file], files[file]) for file in paths)
    elif pickled := sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind)):
        raise JarmError(
            f"{folder} has only pickled weights ({pickled[0]}), and unpickling runs whatever code is in them: take a "
            "revision with model.safetensors, or, where you trust them, convert them to safetensors with "
            "`AutoModel.from_pretrained(...).save_pretrained(...)`."
        )
    else:
        raise JarmError(
            f"{folder} has no model.safetensors and no model.safetensors.index.json: is the download complete?"
        )


def load_model(
    model: str | pathlib.Path, *, dtype: str = "float32", revision: str | None = None, put: Put | None = None
) -> tuple[ModelConfig, Params]:
    """Read a checkpoint: its config, and its parameters as `embed_tokens` takes them.

    Besides the model, one parameter of all its layers is in memory at a time.

    Args:
      model: a folder, or a Hugging Face id.
      dtype: `float32` or `bfloat16`; norms are in float32 in both.
      revision: of the id.
      put: called with a parameter's path, such as `stack.cycle.0.attention.q.kernel`, and its array, to bring it to
        devices; kernels are [..., out, in]. By default to the default device.

    Raises:
      JarmError: a tensor that is unknown, missing, left over or of another shape, or a file that is pickled or damaged,
        by name.
    """
    folder = find_checkpoint(model, revision)
    config = read_config(folder)
    return config, load_params(folder, config, dtype=dtype, put=put)


def load_params(folder: pathlib.Path, config: ModelConfig, *, dtype: str = "float32", put: Put | None = None) -> Params:
    """Read the parameters of a checkpoint whose config is known; see `load_model`."""
    checkpoint = Checkpoint(folder)
    _check_depth(folder, config, checkpoint)
    abstract = abstract_params(config, dtype)
    plan = _plan(folder, config, abstract, checkpoint)
    put = put or (lambda path, array: jax.device_put(array))

    def load(path: Any, leaf: jax.ShapeDtypeStruct) -> Any:
        name = _dotted(path)
        out = np.empty(leaf.shape, leaf.dtype)
        sources = plan[name]
        slots = out if _stacked(name) else out[None]
        for slot, (tensor, take) in zip(slots, sources, strict=True):
            slot[...] = take(checkpoint.read(tensor))
        return put(name, out)

    return jax.tree_util.tree_map_with_path(load, abstract)


def used_tensors(folder: pathlib.Path, config: ModelConfig) -> tuple[Checkpoint, dict[str, str]]:
    """A checkpoint, and its tensors that a model has a use for -> their names within the model.

    Raises:
      JarmError: as `load_model`.
    """
    checkpoint = Checkpoint(folder)
    _check_depth(folder, config, checkpoint)
    plan = _plan(folder, config, abstract_params(config), checkpoint)
    prefix = _prefix(config, checkpoint)
    used = sorted({tensor for slots in plan.values() for tensor, _ in slots})
    return checkpoint, {name: name.removeprefix(prefix) for name in used}


def _prefix(config: ModelConfig, checkpoint: Checkpoint) -> str:
    """What the names of a checkpoint begin with."""
    embed = FAMILIES[config.family].names["embed"]
    return next((p for p in PREFIXES if f"{p}{embed}.weight" in checkpoint.tensors), "")


def _check_depth(folder: pathlib.Path, config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Refuse a config of more layers than there are weights of, before anything is built of its size."""
    before, after = FAMILIES[config.family].layer_prefix.split("{}")
    layer = re.compile(rf"(?:{'|'.join(map(re.escape, PREFIXES))}){re.escape(before)}(\d{{1,9}}){re.escape(after)}.*")
    found = [int(match[1]) for name in checkpoint.tensors if (match := layer.fullmatch(name))]
    if found and max(found) + 1 < len(config.layers):
        stored = max(found) + 1
        raise JarmError(
            f"{folder} has weights of {stored} layers, where its config says {len(config.layers)}: is it complete?"
        )


def _dotted(path: Any) -> str:
    return ".".join(str(entry.key) for entry in path)


def _stacked(name: str) -> bool:
    return name.startswith("stack.cycle.")


Source = tuple[str, Callable[[np.ndarray], np.ndarray]]


def _plan(
    folder: pathlib.Path, config: ModelConfig, abstract: Params, checkpoint: Checkpoint
) -> dict[str, list[Source]]:
    """Tensor and its part for each layer of each parameter; all are checked before any is read."""
    family = FAMILIES[config.family]
    prefix = _prefix(config, checkpoint)
    period, repeats = scan_plan(config.layers)

    # Tensor -> its parts: parameter, layer within the parameter, and shape of one layer.
    wanted: dict[str, list[tuple[str, int, tuple[int, ...]]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name = _dotted(path)
        if name.startswith("stack."):
            _, _, index, *rest = name.split(".")
            if _stacked(name):
                layers, shape = [int(index) + period * i for i in range(repeats)], leaf.shape[1:]
            else:
                layers, shape = [period * repeats + int(index)], leaf.shape
            module, ending = ".".join(rest[:-1]), rest[-1]
            starts = [family.layer_prefix.format(layer) for layer in layers]
        else:
            module, ending = name.rsplit(".", 1)
            starts, shape = [""], leaf.shape
        for slot, start in enumerate(starts):
            tensor = f"{prefix}{start}{family.names[module]}.{LEAVES[ending]}"
            wanted.setdefault(tensor, []).append((name, slot, shape))

    if missing := sorted(set(wanted) - set(checkpoint.tensors)):
        raise JarmError(f"{folder} lacks {_some(missing)}, which a {config.family} of its config has: is it complete?")
    ignored = re.compile("|".join((*IGNORED, *family.ignored)))
    left = [
        name for name in checkpoint.tensors if name not in wanted and not ignored.fullmatch(name.removeprefix(prefix))
    ]
    if left := [name for name in left if not ignored.fullmatch(name)]:
        raise JarmError(f"{folder} has {_some(sorted(left))}, which a {config.family} of its config does not use.")

    plan: dict[str, dict[int, Source]] = {}
    order = list(family.names)
    for tensor, parts in wanted.items():
        parts.sort(key=lambda part: order.index(_module(part[0])))
        kernel = parts[0][0].endswith(".kernel")
        flip = family.transposed and kernel
        rows = [shape[0] for _, _, shape in parts]
        whole = (sum(rows), *parts[0][2][1:])
        stored = checkpoint.shape(tensor)
        if stored != (whole[::-1] if flip else whole):
            raise JarmError(
                f"The tensor '{_short(tensor)}' in {folder} has the shape {list(stored)}, where its config says "
                f"{list(whole[::-1] if flip else whole)}."
            )
        groups = config.heads if family.interleaved and len(parts) > 1 else 1
        ends = np.cumsum(rows)
        for (name, slot, _), end, count in zip(parts, ends, rows, strict=True):
            plan.setdefault(name, {})[slot] = tensor, _taker(flip, groups, int(end) - count, int(end))
    return {name: [slots[i] for i in range(len(slots))] for name, slots in plan.items()}


def _module(name: str) -> str:
    return ".".join(name.split(".")[3:-1]) if name.startswith("stack.") else name.rsplit(".", 1)[0]


def _taker(flip: bool, groups: int, start: int, end: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function that takes rows `start` to `end` of a tensor, or their share of each of its groups (heads)."""

    def take(tensor: np.ndarray) -> np.ndarray:
        tensor = tensor.T if flip else tensor
        grouped = tensor.reshape(groups, -1, *tensor.shape[1:])
        return grouped[:, start // groups : end // groups].reshape(end - start, *tensor.shape[1:])

    return take


def _short(name: str) -> str:
    """A name from a file, fit for a sentence."""
    shown = printable(name)
    return shown if len(shown) <= 100 else f"{shown[:80]} ..."


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{_short(name)}'" for name in names[:3])
    kind = "the tensor" if len(names) == 1 else "the tensors"
    return f"{kind} {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
