"""Frozen dataclasses that are pytrees."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

C = TypeVar("C", bound=type)


def static(**kwargs: Any) -> Any:
    """A field of a `record` that is part of the program, not of the data: hashable, never traced."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def record(cls: C) -> C:
    """A frozen dataclass that is a pytree; fields made by `static` belong to its structure."""
    frozen: Any = dataclasses.dataclass(frozen=True)(cls)
    frozen.__no_type_check__ = True  # vmap and tree_map rebuild records with batched or abstract leaves
    return jax.tree_util.register_dataclass(frozen)
