"""Reward heads: small models on frozen embeddings, defined with Flax NNX and split once into pure functions.

Parameters are plain pytrees of arrays; nothing outside this module sees an NNX object.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
from flax import nnx

from jarm.base import JarmError, RewardHead
from jarm.types import Array, Float, Params, PRNGKey


def _gelu(x: Array) -> Array:
    # With erf, as in PyTorch; `jax.nn.gelu` takes erfc, whose precision far out costs a tenth of a fit's time.
    return 0.5 * x * (1.0 + jax.lax.erf(math.sqrt(0.5) * x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jax.numpy.tanh,
}


class _MLP(nnx.Module):
    """Hidden layers with bias and an output layer without; no hidden layer makes it linear, starting at zero."""

    def __init__(self, d: int, hidden: tuple[int, ...], activation: str, *, rngs: nnx.Rngs):
        widths = (d, *hidden)
        self.hidden = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(widths, hidden, strict=False)])
        # Small, so that what the first hidden layers happen to say is not mistaken for knowledge when labels are few.
        init = nnx.initializers.variance_scaling(0.01, "fan_in", "normal") if hidden else nnx.initializers.zeros
        self.out = nnx.Linear(widths[-1], 1, use_bias=False, kernel_init=init, rngs=rngs)
        self.activation = activation

    def features(self, embeddings: Array) -> Array:
        for layer in self.hidden:
            embeddings = ACTIVATIONS[self.activation](layer(embeddings))
        return embeddings


@functools.cache
def _head(hidden: tuple[int, ...], activation: str) -> RewardHead:
    # Cached: heads are static arguments of jitted functions, and equal ones should not compile twice.
    def build(key: PRNGKey, d: int) -> _MLP:
        return _MLP(d, hidden, activation, rngs=nnx.Rngs(key))

    @functools.cache
    def structure(d: int) -> nnx.GraphDef:
        return nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0), d)))

    def init(key: PRNGKey, d: int) -> Params:
        return nnx.to_pure_dict(nnx.state(build(key, d)))

    def features(params: Params, embeddings: Float[Array, "*batch d"]) -> Float[Array, "*batch F"]:
        return nnx.merge(structure(embeddings.shape[-1]), params).features(embeddings)

    def weights(params: Params) -> Float[Array, "F"]:
        return params["out"]["kernel"][:, 0]

    return RewardHead(init=init, features=features, weights=weights, linear=not hidden)


def linear_head() -> RewardHead:
    """A linear head: `reward = w . e`; the features are the embeddings, and w starts at zero."""
    return _head((), "gelu")


def mlp_head(hidden: tuple[int, ...] = (64, 64, 64), activation: str = "gelu") -> RewardHead:
    """A multi-layer perceptron with a bias-free output: `reward = w . phi(e)`.

    Kernels start LeCun-normal, that of the output at a tenth of it, and biases at zero.

    Args:
      hidden: width of each hidden layer; the last one is F.
      activation: `gelu` (exact, with erf, as PyTorch's default), `gelu_tanh` (its tanh approximation), `relu`,
        `silu` or `tanh`.

    Returns:
      The head; its parameters are `{"hidden": {layer: {"kernel", "bias"}}, "out": {"kernel"}}`.

    Raises:
      JarmError: no or empty layers, or an unknown activation.
    """
    if not hidden or min(hidden) < 1:
        raise JarmError(f"An MLP head needs hidden layers of width 1 or more, got {hidden}: try (64, 64, 64).")
    if activation not in ACTIVATIONS:
        raise JarmError(f"Unknown activation '{activation}': choose one of {', '.join(ACTIVATIONS)}.")
    return _head(tuple(hidden), activation)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """A head in words, for the command line and for records: no hidden layer means linear."""

    hidden: tuple[int, ...] = (64, 64, 64)
    activation: str = "gelu"

    @classmethod
    def parse(cls, text: str) -> HeadConfig:
        """Read `linear`, `mlp`, `mlp:64,64,64` or `mlp:64,64:relu`; `str` of a config gives such a text back."""
        kind, _, rest = text.partition(":")
        if kind == "linear" and not rest:
            return cls(hidden=())
        sizes, _, activation = rest.partition(":")
        try:
            hidden = tuple(int(size) for size in sizes.split(",")) if sizes else cls.hidden
        except ValueError:
            hidden = ()
        if kind != "mlp" or not hidden:
            raise JarmError(f"Cannot read the head '{text}': write 'linear' or, for example, 'mlp:64,64,64'.")
        config = cls(hidden=hidden, activation=activation or cls.activation)
        config.head()
        return config

    def __str__(self) -> str:
        if not self.hidden:
            return "linear"
        return f"mlp:{','.join(map(str, self.hidden))}:{self.activation}"

    def head(self) -> RewardHead:
        """The head itself."""
        return mlp_head(self.hidden, self.activation) if self.hidden else linear_head()
