"""Files of sentence-transformers beside a model: its pooling, and modules that jarm does not compute."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from jarm.core.status import JarmError

KINDS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
MODULES = ("Transformer", "Pooling", "Normalize")


def is_sentence_model(folder: pathlib.Path) -> bool:
    """Whether a checkpoint was written by sentence-transformers."""
    return (folder / "modules.json").exists()


def trained_pooling(folder: pathlib.Path) -> str | None:
    """The pooling that a model was trained with, or None where its folder does not say.

    Args:
      folder: the checkpoint.

    Raises:
      JarmError: the model was trained with a pooling or a module that jarm does not compute.
    """
    for module in _read(folder / "modules.json") or []:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind not in MODULES:
            raise JarmError(
                f"{folder / 'modules.json'} puts a '{kind}' behind the model, which jarm does not compute: give a "
                "--pooling to have the hidden states before it."
            )
    config = _read(folder / "1_Pooling" / "config.json")
    if config is None:
        return None
    modes = [mode for mode, on in config.items() if mode.startswith("pooling_mode_") and on is True]
    if len(modes) != 1 or modes[0] not in KINDS:
        said = " and ".join(modes) or "no pooling that is known"
        raise JarmError(f"{folder} was trained with {said}, which jarm does not compute: choose a --pooling.")
    return KINDS[modes[0]]


def _read(path: pathlib.Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise JarmError(f"{path} cannot be read ({error}): download it again, or choose a --pooling.") from error
