"""Frozen dataclasses that are pytrees."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

C = TypeVar("C", bound=type)


def static(**kwargs: Any) -> Any:
    """A field of a `record` that belongs to the program, not to the data: hashable, never traced."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def record(cls: C) -> C:
    """A frozen dataclass that is a pytree; fields made by `static` belong to its structure.

    Example:
      >>> @record
      ... class Line:
      ...     name: str = static()
      ...     slope: float = 1.0
      >>> jax.tree.map(lambda leaf: 2 * leaf, Line("rise", 3.0))
      Line(name='rise', slope=6.0)
    """
    frozen: Any = dataclasses.dataclass(frozen=True)(cls)
    frozen.__no_type_check__ = True  # vmap and tree_map rebuild records with batched or abstract leaves
    return jax.tree_util.register_dataclass(frozen)
