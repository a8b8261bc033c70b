"""Axis letters and array aliases used in every signature.

P prompts; R responses per prompt; N = P*R responses, prompt-major; d embedding width; F width of a head's last
hidden layer; K ensemble members; M listed pairs; L capacity of the labelled set; B pairs labelled per round; T rounds.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt32

Params: TypeAlias = Any
"""A pytree of arrays: the parameters of one reward head, or of K heads with a leading axis."""

PRNGKey: TypeAlias = Key[Array, ""]
"""A typed key, as `jax.random.key` makes it."""

AnyKey: TypeAlias = Key[Array, ""] | UInt32[Array, "words"]
"""A key of any kind, also one of `jax.random.PRNGKey`; `jarm.core.settings.as_key` makes a `PRNGKey` of it."""

AnyMesh: TypeAlias = Mesh | AbstractMesh
"""A mesh of devices, or the shape of one, for programs that are lowered elsewhere than they run."""

__all__ = ["AnyKey", "AnyMesh", "Array", "Bool", "Float", "Int", "Key", "PRNGKey", "Params", "Shaped"]
