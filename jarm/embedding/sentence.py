"""Folders of sentence-transformers: what they say of texts and vectors is honoured, or refused by name.

The library's own defaults are in its `Transformer`, `Pooling`, `Dense` and `Normalize`, and in `modules.json`, which
chains them. `read_sentence_model` reads what concerns texts, and `read_head` what follows the transformer.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jarm.core.files import fingerprint, inside, there
from jarm.core.messages import nearest
from jarm.core.outside import anything, array, boolean, either, enum, integer, mapping, maybe, read_json, string, struct
from jarm.core.status import JarmError, printable
from jarm.embedding.head import ACTIVATIONS, Dense, Head, Normalize, Step, Truncate
from jarm.llm.weights import Checkpoint, weight_files

POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
"""Name of a pooling in the library -> its name in jarm."""
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Flags of poolings before version 5.4, in the order in which their results are joined -> the name since."""
NO_PROMPT = "none"
"""Prompt name that stands for no prompt."""

_MODULES, _LIBRARY, _POOLING = "modules.json", "config_sentence_transformers.json", "1_Pooling"
_TRANSFORMERS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_CURE = "embed with sentence-transformers itself, or, where it changes nothing, take it out of that file"


_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
_PLACES = ("module_input_name", "module_output_name")


class Module(NamedTuple):
    """A module behind the transformer: its kind, such as `Pooling`, and its folder."""

    kind: str
    folder: pathlib.Path


@dataclasses.dataclass(frozen=True)
class SentenceModel:
    """A folder of sentence-transformers.

    Attributes:
      folder: the whole.
      transformer: folder with the transformer and its tokenizer.
      modules: modules behind the transformer; empty where the folder does not say.
      prompts: name of a prompt -> text that goes before each text.
      default_prompt: name of the prompt that is used unless another is asked for, or None.
      max_length: largest number of tokens in a text, or None for the tokenizer's.
      lowercase: whether texts are put in lower case.
      messages: whether texts go through the chat template, which jarm does only where it is asked to.
      truncate: numbers of a vector that are kept, or None for all.
    """

    folder: pathlib.Path
    transformer: pathlib.Path
    modules: tuple[Module, ...] = ()
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None
    max_length: int | None = None
    lowercase: bool = False
    messages: bool = False
    truncate: int | None = None

    def prompt(self, name: str | None) -> str:
        """The text of a prompt: of the default one for None, and empty for `none`.

        Raises:
          JarmError: there is no such prompt.
        """
        name = self.default_prompt if name is None else name
        if name is None or (name == NO_PROMPT and name not in self.prompts):
            return ""
        if name not in self.prompts:
            known = ", ".join([*self.prompts, NO_PROMPT])
            raise JarmError(
                f"{self.folder} has no prompt {name!r}{nearest(name, self.prompts)}: give --prompt-name one of {known}."
            )
        return self.prompts[name]


def read_sentence_model(folder: pathlib.Path) -> SentenceModel | None:
    """What a folder says of its texts and modules, or None where sentence-transformers did not write it.

    Args:
      folder: the checkpoint.

    Raises:
      JarmError: a file that is damaged, or asks for what jarm does not do, by name.
    """
    marks = (_MODULES, _LIBRARY, *_TRANSFORMERS, f"{_POOLING}/config.json")
    if not any(there(folder / mark) for mark in marks):
        return None
    transformer, modules = _read_modules(folder)
    return SentenceModel(folder, transformer, modules, **_read_library(folder), **_read_transformer(transformer))


def read_head(model: SentenceModel, width: int) -> Head | None:
    """The pooling of a model and what follows it, or None where the folder does not say.

    Args:
      model: of `read_sentence_model`.
      width: numbers in a hidden state.

    Raises:
      JarmError: a module, a pooling or an activation that jarm does not compute, by name.
    """
    if not model.modules:
        if there(model.folder / _MODULES) or model.truncate is not None:
            raise JarmError(f"{model.folder} names no pooling of the model: choose a --pooling.")
        return None
    first, *rest = model.modules
    if first.kind != "Pooling":
        raise _unknown_module(model, first)
    kinds, include_prompt = _read_pooling(model, first.folder)
    size, steps = len(kinds) * width, list[Step]()
    for module in rest:
        if module.kind == "Dense":
            dense = _read_dense(module.folder, size)
            size, steps = len(dense.kernel), [*steps, dense]
        elif module.kind == "Normalize":
            path = module.folder / "config.json"
            if there(path):
                _read(path, {}, {name: maybe(enum("sentence_embedding")) for name in _PLACES})
            steps.append(Normalize())
        elif module.kind != "Dropout":  # which only trains
            raise _unknown_module(model, module)
    if model.truncate is not None and model.truncate < size:
        size, steps = model.truncate, [*steps, Truncate(model.truncate)]
    normalize = bool(steps) and isinstance(steps[-1], Normalize)
    return Head(kinds, include_prompt, tuple(steps[: len(steps) - normalize]), normalize, size)


def _unknown_module(model: SentenceModel, module: Module) -> JarmError:
    return JarmError(
        f"{model.folder / _MODULES} puts a {module.kind[:80]!r} behind the model, which jarm does not compute: "
        "give a --pooling to have the hidden states before it."
    )


def _read(path: pathlib.Path, needed: Mapping[str, Any], optional: Mapping[str, Any]) -> dict[str, Any]:
    """An object of JSON; a key that is neither needed nor optional is refused by name."""
    said = read_json(path, struct(needed, optional))
    if odd := [name for name in said if name not in needed and name not in optional]:
        raise JarmError(f"{path} sets {odd[0][:80]!r}, which jarm does not know: {_CURE}.")
    return said


def _read_modules(folder: pathlib.Path) -> tuple[pathlib.Path, tuple[Module, ...]]:
    """Folder of the transformer, and the modules behind it."""
    path = folder / _MODULES
    if not there(path):
        pooling = folder / _POOLING
        return folder, (Module("Pooling", pooling),) if there(pooling / "config.json") else ()
    said = read_json(path, array(struct({"type": string(500), "path": string(500)}), 1, 100))
    modules = []
    for each in said:
        owner, _, kind = each["type"].rpartition(".")
        own = owner.partition(".")[0] == "sentence_transformers"  # or code of the folder, which jarm does not run
        modules.append(Module(kind if own else each["type"], inside(folder, each["path"], path)))
    if modules[0].kind != "Transformer":
        raise JarmError(
            f"{path} begins with a {modules[0].kind[:80]!r}: jarm reads models that begin with the Transformer of "
            "sentence-transformers, so take another model."
        )
    return modules[0].folder, tuple(modules[1:])


def _read_library(folder: pathlib.Path) -> dict[str, Any]:
    """Prompts, and the size of vectors."""
    path = folder / _LIBRARY
    if not there(path):
        return {}
    fields = {
        "model_type": enum("SentenceTransformer"),
        "prompts": maybe(mapping(maybe(string()))),
        "default_prompt_name": maybe(string()),
        "truncate_dim": maybe(integer(1)),
        "similarity_fn_name": anything,
        "requirements": anything,
        "__version__": anything,
    }
    said = _read(path, {}, fields)
    prompts = {name: prompt or "" for name, prompt in (said.get("prompts") or {}).items()}
    default = said.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise JarmError(
            f"{path} has the default prompt {default[:80]!r}, but no prompt of that name: download it again."
        )
    return {"prompts": prompts, "default_prompt": default, "truncate": said.get("truncate_dim")}


_ARGUMENTS = {
    **dict.fromkeys(("model_args", "model_kwargs"), ("torch_dtype", "dtype", "attn_implementation", "device_map")),
    **dict.fromkeys(("tokenizer_args", "processor_kwargs"), ("model_max_length", "padding_side", "use_fast")),
    **dict.fromkeys(("config_args", "config_kwargs"), ("use_cache",)),
}
"""Arguments that a Transformer passes on -> those among them that jarm honours, or that change no value."""


def _read_transformer(folder: pathlib.Path) -> dict[str, Any]:
    """Length and case of texts, and whether they are messages."""
    path = next((folder / name for name in _TRANSFORMERS if there(folder / name)), None)
    if path is None:
        return {}
    fields = {
        "max_seq_length": maybe(integer(1)),
        "do_lower_case": maybe(boolean),
        "transformer_task": enum("feature-extraction"),
        "module_output_name": enum("token_embeddings"),
        "modality_config": mapping(mapping()),
        "processing_kwargs": maybe(mapping()),
        **dict.fromkeys(_ARGUMENTS, maybe(mapping())),
        **dict.fromkeys(("unpad_inputs", "query_length", "document_length"), anything),
        "query_expansion": enum(None),
    }
    said = _read(path, {}, fields)
    if said.get("processing_kwargs"):
        raise JarmError(f"{path} sets 'processing_kwargs', which jarm does not know: {_CURE}.")
    length = said.get("max_seq_length")
    for name, known in _ARGUMENTS.items():
        given = dict(said.get(name) or {})
        given.pop("trust_remote_code", None)  # as the library does
        if odd := [each for each in given if each not in known]:
            raise JarmError(f"{path} sets {odd[0][:80]!r} in {name!r}, which jarm does not know: {_CURE}.")
        if "model_max_length" in given:
            length = given["model_max_length"]
            if type(length) is not int or length < 1:
                raise JarmError(f"{path}: {name}.model_max_length is no whole number of at least 1: download it again.")
    modalities = said.get("modality_config", {"text": _FORWARD})
    if "message" not in modalities and {**modalities.get("text", {})} != _FORWARD:
        raise JarmError(f"{path} takes texts otherwise than by the last hidden state ('modality_config'): {_CURE}.")
    return {
        "max_length": length,
        "lowercase": bool(said.get("do_lower_case")),
        "messages": "message" in modalities,
    }


def _read_pooling(model: SentenceModel, folder: pathlib.Path) -> tuple[tuple[str, ...], bool]:
    """Poolings whose results are joined, and whether the prompt is pooled."""
    path = folder / "config.json"
    fields = {
        **dict.fromkeys(("word_embedding_dimension", "embedding_dimension"), anything),
        "pooling_mode": either(string(), array(string(), 1)),
        **dict.fromkeys(FLAGS, boolean),
        "include_prompt": boolean,
    }
    said = _read(path, {}, fields)
    named = said.get("pooling_mode", [flag for flag in FLAGS if said.get(flag)])
    named = [named] if isinstance(named, str) else named
    modes = [FLAGS.get(name, name) for name in named]
    if not modes or any(mode not in POOLINGS for mode in modes):
        shown = " and ".join(name[:80] for name in named) or "no pooling that is known"
        raise JarmError(f"{model.folder} was trained with {shown}, which jarm does not compute: choose a --pooling.")
    return tuple(POOLINGS[mode] for mode in modes), said.get("include_prompt", True)


def _read_dense(folder: pathlib.Path, width: int) -> Dense:
    """A dense layer, with its weights."""
    path = folder / "config.json"
    place = maybe(enum("sentence_embedding"))
    said = _read(
        path,
        {"in_features": enum(width), "out_features": integer(1)},
        {"bias": boolean, "activation_function": string(), "use_residual": boolean, **dict.fromkeys(_PLACES, place)},
    )
    given = said.get("activation_function", "torch.nn.Tanh")
    activation = given.rpartition(".")[2]
    if not given.startswith("torch.nn.") or activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise JarmError(
            f"{path} has the activation {given[:80]!r}, which jarm does not compute ({known}): give a --pooling to "
            "have the hidden states before it."
        )
    outputs, residual = said["out_features"], said.get("use_residual", False)
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (outputs, width)}
    if said.get("bias", True):
        shapes["linear.bias"] = (outputs,)
    if residual and outputs != width:
        shapes["residual.weight"] = (outputs, width)
    held = Checkpoint(folder)
    found = {name: held.shape(name) for name in held.tensors}
    if found != shapes:
        raise JarmError(
            f"The weights in {folder} are {printable(found)[:300]}, and its config says {shapes}: download both again."
        )
    arrays = {name: np.asarray(held.read(name), np.float32) for name in shapes}
    return Dense(
        arrays["linear.weight"],
        arrays.get("linear.bias", np.zeros(outputs, np.float32)),
        activation,
        arrays.get("residual.weight", residual),
        f"Dense {width} to {outputs}, {activation}{', residual' * residual}, "
        + " ".join(fingerprint(file)[:16] for file in weight_files(folder)),
    )
