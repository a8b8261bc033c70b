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

    A record with a `__post_init__` is checked where it is built by name, and not where JAX builds it again, with
    tracers, shapes or the results of any function for its leaves.

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
    return _rebuilt_unchecked(frozen) if hasattr(frozen, "__post_init__") else jax.tree_util.register_dataclass(frozen)


def _rebuilt_unchecked(cls: C) -> C:
    """Register a dataclass all of whose fields are leaves, to be built again without its `__post_init__`."""
    names = tuple(field.name for field in dataclasses.fields(cls))
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in names)

    def flatten(record: Any) -> tuple[tuple[Any, ...], None]:
        return tuple(getattr(record, name) for name in names), None

    def flatten_with_keys(record: Any) -> tuple[tuple[Any, ...], None]:
        return tuple(zip(keys, flatten(record)[0], strict=True)), None

    def unflatten(_: None, leaves: Any) -> Any:
        rebuilt: Any = object.__new__(cls)
        rebuilt.__dict__.update(zip(names, leaves, strict=True))
        return rebuilt

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
