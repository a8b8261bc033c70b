"""Reward heads: small models on frozen embeddings, defined with Flax NNX and split once into pure functions.

Parameters are plain pytrees of arrays; nothing outside this module sees an NNX object.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jarm.core.base import RewardHead
from jarm.core.settings import as_key, make_key
from jarm.core.status import JarmError
from jarm.core.types import AnyKey, Array, Float, Params, PRNGKey


def _gelu(x: Array) -> Array:
    # By erf, as in PyTorch; `jax.nn.gelu` takes erfc, whose precision in the tails costs a tenth of a fit's time.
    return 0.5 * x * (1.0 + jax.lax.erf(math.sqrt(0.5) * x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def _kernels(key: PRNGKey, shapes: Sequence[tuple[int, int]]) -> list[Array]:
    """LeCun-normal kernels, from one draw, since every draw takes a third of a second to compile.

    The output layer starts at a tenth of that scale, so that random features do not pass for knowledge when labels are
    few; at zero in a linear head.
    """
    *hidden, last = [fan_in**-0.5 for fan_in, _ in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    draws = jnp.split(jax.random.normal(key, (sum(sizes),), jnp.float32), np.cumsum(sizes)[:-1])
    scales = [*hidden, 0.1 * last if hidden else 0.0]
    return [scale * draw.reshape(shape) for scale, draw, shape in zip(scales, draws, shapes, strict=True)]


class _MLP(nnx.Module):
    """Hidden layers with bias and an output layer without; no hidden layer makes it linear, starting at zero."""

    def __init__(self, d: int, hidden: tuple[int, ...], activation: str, *, key: PRNGKey):
        shapes = list(itertools.pairwise((d, *hidden)))
        kernels = iter(_kernels(key, [*shapes, ((d, *hidden)[-1], 1)]))
        init, rngs = (lambda *_: next(kernels)), nnx.Rngs(0)
        self.hidden = nnx.List([nnx.Linear(*shape, kernel_init=init, rngs=rngs) for shape in shapes])
        self.out = nnx.Linear((d, *hidden)[-1], 1, use_bias=False, kernel_init=init, rngs=rngs)
        self.activation = activation

    def features(self, embeddings: Array) -> Array:
        for layer in self.hidden:
            embeddings = ACTIVATIONS[self.activation](layer(embeddings))
        return embeddings


@functools.cache
def _head(hidden: tuple[int, ...], activation: str) -> RewardHead:
    # Cached: heads are static arguments of jitted functions, and equal ones should not compile twice.
    def build(key: PRNGKey, d: int) -> _MLP:
        return _MLP(d, hidden, activation, key=key)

    @functools.cache
    def structure(d: int) -> nnx.GraphDef:
        return nnx.graphdef(nnx.eval_shape(lambda: build(make_key(0), d)))

    def init(key: AnyKey, d: int) -> Params:
        return nnx.to_pure_dict(nnx.state(build(as_key(key), d)))

    def features(params: Params, embeddings: Float[Array, "*batch d"]) -> Float[Array, "*batch F"]:
        return nnx.merge(structure(embeddings.shape[-1]), params).features(embeddings)

    def weights(params: Params) -> Float[Array, "F"]:
        return params["out"]["kernel"][:, 0]

    return RewardHead(init=init, features=features, weights=weights, linear=not hidden)


def linear_head() -> RewardHead:
    """A linear head: `reward = w . e`; the features are the embeddings, and w starts at zero."""
    return _head((), "gelu")


@functools.cache
def laplace_head() -> RewardHead:
    """A linear head with a Gaussian prior on w; a fit makes its members draws of the Laplace posterior.

    Its parameters are those of `linear_head`, and `prior_precision`, the precision of each weight under the prior, NaN
    until a fit says it.
    """
    linear = linear_head()

    def init(key: AnyKey, d: int) -> Params:
        return {**linear.init(key, d), "prior_precision": jnp.full((), jnp.nan, jnp.float32)}

    return dataclasses.replace(
        linear,
        init=init,
        features=lambda params, embeddings: embeddings,
        prior_precision=lambda params: params["prior_precision"],
    )


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
