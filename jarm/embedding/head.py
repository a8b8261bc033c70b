"""What follows the pooling in a model of sentence-transformers: computed on the host, in float32, row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jarm.core.types import Float

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: np.exp(-np.logaddexp(0, -x)),
    "SiLU": lambda x: x * np.exp(-np.logaddexp(0, -x)),
}
"""Name of a class of `torch.nn` -> what it computes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """x -> act(W x + b), and R x added to it where there is a residual.

    Attributes:
      kernel: `[o, i]`.
      bias: `[o]`; zeros for none.
      activation: name in `ACTIVATIONS`.
      residual: `[o, i]`; True for the identity, False for none.
      said: name, sizes and fingerprint of the weights.
    """

    kernel: np.ndarray
    bias: np.ndarray
    activation: str
    residual: np.ndarray | bool
    said: str

    def __call__(self, rows: Float[np.ndarray, "k i"]) -> Float[np.ndarray, "k o"]:
        """Map each row."""
        out = ACTIVATIONS[self.activation](rows @ self.kernel.T + self.bias)
        if isinstance(self.residual, bool):
            return out + rows if self.residual else out
        return out + rows @ self.residual.T


class Normalize:
    """x -> x / |x|."""

    said = "Normalize"

    def __call__(self, rows: Float[np.ndarray, "k d"]) -> Float[np.ndarray, "k d"]:
        """Scale each row to length 1."""
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Truncate:
    """x -> its first numbers (`truncate_dim`)."""

    size: int

    @property
    def said(self) -> str:
        """Name and size."""
        return f"the first {self.size}"

    def __call__(self, rows: Float[np.ndarray, "k d"]) -> Float[np.ndarray, "k size"]:
        """Cut each row."""
        return rows[:, : self.size]


Step = Dense | Normalize | Truncate


@dataclasses.dataclass(frozen=True)
class Head:
    """The pooling that a model was trained with, and what follows it.

    Attributes:
      kinds: poolings, whose results stand one behind the other.
      include_prompt: whether the tokens of the model's prompt are pooled.
      steps: what follows, in order, without a `Normalize` at the end.
      normalize: whether rows are scaled to length 1 at the end.
      width: d, numbers in a row.
    """

    kinds: tuple[str, ...]
    include_prompt: bool
    steps: tuple[Step, ...]
    normalize: bool
    width: int

    def __call__(self, pooled: Sequence[Float[np.ndarray, "k width"]]) -> Float[np.ndarray, "k d"]:
        """Rows of the store but for their length, from the results of each pooling.

        Example:
          >>> head = Head(("cls", "mean"), True, (Truncate(3),), False, 3)
          >>> head([np.ones((1, 2)), np.zeros((1, 2))])
          array([[1., 1., 0.]])
        """
        rows = np.concatenate(pooled, axis=1) if len(pooled) > 1 else pooled[0]
        for step in self.steps:
            rows = step(rows)
        return rows

    @property
    def joins(self) -> bool:
        """Whether rows are another thing than one pooling, but for their length."""
        return bool(self.steps) or len(self.kinds) > 1

    @property
    def said(self) -> str:
        """Pooling and steps in words."""
        steps = [step.said for step in self.steps] + ["Normalize"] * self.normalize
        return ", ".join([f"pooling {'+'.join(self.kinds)}", *steps])
