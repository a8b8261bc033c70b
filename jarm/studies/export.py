"""`jarm export`: a reward model in the form of another program."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jarm.core.checks import INT32, Check, between, check_fields, one_of
from jarm.core.status import JarmError
from jarm.data.readers import refuse_nonfinite
from jarm.data.rows import open_embeddings
from jarm.data.store import EmbeddingStore
from jarm.export.arrays import write_numpy, write_onnx
from jarm.export.cross_encoder import write_cross_encoder
from jarm.export.distil import distilled
from jarm.export.model import RewardModel, load_model, refuse_taken
from jarm.export.sequence_classification import write_sequence_classification
from jarm.studies.score import refuse_other

FORMS: dict[str, Callable[..., dict[str, Any]]] = {
    "sequence-classification": write_sequence_classification,
    "cross-encoder": write_cross_encoder,
    "onnx": write_onnx,
    "numpy": write_numpy,
}
"""Name of a form -> what writes it."""
WITH_LLM = ("sequence-classification", "cross-encoder")
"""Forms that hold the language model, too."""
MOST = 20_000
"""Largest number of embeddings that a linear model is fitted to."""
_CHECKS: Mapping[str, Check] = {"to": one_of(*FORMS), "seed": between(0, INT32)}


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Settings of `jarm export`.

    Example:
      >>> ExportConfig(model="out/model", to="keras")
      Traceback (most recent call last):
      jarm.core.status.JarmError: `to` is 'keras': choose one of sequence-classification, cross-encoder, onnx, numpy.

    Attributes:
      model: folder of a reward model, as `jarm train` writes it.
      to: "sequence-classification" (transformers, TRL, OpenRLHF, vLLM: linear heads on the last token),
        "cross-encoder" (sentence-transformers: any head), or "onnx" and "numpy", which read embeddings.
      llm: folder of the language model, or its id on the hub; by default the name that the embeddings came with.
      distil: a store or an .npy of embeddings, on which a linear model is fitted to the rewards, and takes the place of
        the model.
      seed: of the embeddings that are left out of that fit.
      out: folder of the export; a new one.
    """

    model: str
    to: str
    llm: str | None = None
    distil: str | None = None
    seed: int = 0
    out: pathlib.Path = pathlib.Path("out/export")

    def __post_init__(self) -> None:
        check_fields(self, _CHECKS)
        if self.llm is not None and self.to not in WITH_LLM:
            raise JarmError(
                f"`llm` is for {' and '.join(WITH_LLM)}; a model for {self.to} reads embeddings: leave --llm out."
            )


def export(config: ExportConfig) -> dict[str, Any]:
    """Write a reward model in the form of another program.

    Args:
      config: the settings.

    Returns:
      What the writer of that form says, and with `distil` the `rank_correlation` of the linear model.

    Raises:
      JarmError: what the form cannot hold, by name, with the ways out; or the folder is taken.

    Example:
      >>> import tempfile
      >>> from jarm.reward.config import HeadConfig
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> params = {"out": {"kernel": np.array([[[1.0], [0.0]]], np.float32)}}
      >>> RewardModel(HeadConfig(hidden=()), params, np.zeros(1, np.float32)).save(folder / "model")
      >>> export(ExportConfig(str(folder / "model"), to="numpy", out=folder / "numpy"))
      {'layers': 1}
      >>> sorted(path.name for path in (folder / "numpy").iterdir())
      ['README.md', 'score.py', 'weights.npz']
    """
    refuse_taken(pathlib.Path(config.out))
    model, found = load_model(config.model), {}
    if config.distil is not None:
        model, rank = distilled(model, _sample(config, model), config.seed)
        found["rank_correlation"] = rank
    options = {"llm": config.llm} if config.to in WITH_LLM else {}
    return {**FORMS[config.to](model, config.out, **options), **found}


def _sample(config: ExportConfig, model: RewardModel) -> np.ndarray:
    """Embeddings of the store or array, a random `MOST` of them at most."""
    assert config.distil is not None
    store = open_embeddings(config.distil)
    if isinstance(store, EmbeddingStore):
        refuse_other(model, store)
    else:
        refuse_nonfinite(store, config.distil)
    rows = np.arange(len(store))
    if len(rows) > MOST:
        rows = np.sort(np.random.default_rng(config.seed).choice(len(rows), MOST, replace=False))
    return np.asarray(store[rows], np.float32)
