"""Types of columns: what a value of a table can be, whichever way its writer stored it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_LISTS = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
_BYTES = ("binary", "large_binary", "fixed_size_binary", "binary_view")


def _is(kind: pa.DataType, names: tuple[str, ...]) -> bool:
    return any(getattr(pa.types, f"is_{name}")(kind) for name in names)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column once it is `plain`: text, numbers, lists and records, without categories and views.

    Example:
      >>> plain_type(pa.list_(pa.dictionary(pa.int32(), pa.string())))
      LargeListType(large_list<item: string>)
    """
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_string_view(kind) or _is(kind, _BYTES):
        return pa.large_string()
    if _is(kind, _LISTS):
        inner = plain_type(kind.value_type)
        whole = is_list(kind) and inner == kind.value_type
        return kind if whole else pa.large_list(inner)
    if pa.types.is_struct(kind):
        inner = [(field.name, plain_type(field.type)) for field in kind]
        whole = all(field.type == own for field, (_, own) in zip(kind, inner, strict=True))
        return kind if whole else pa.struct(inner)
    return kind


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as text, numbers, lists and records, which categories, views, lists of one size and bytes become.

    Some writers store text as bytes without saying so; bytes that are no UTF-8 stay as they are.

    Example:
      >>> plain(pa.chunked_array([pa.array([["a", "b"], None], pa.list_(pa.string_view(), 2))])).to_pylist()
      [['a', 'b'], None]
    """
    kind = plain_type(column.type)
    if kind == column.type:
        return column
    try:
        return pa.chunked_array([_plain(chunk, kind) for chunk in column.chunks], kind)
    except pa.ArrowInvalid:  # bytes that are no text
        return column


def _plain(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type == kind:
        return array
    if isinstance(array.type, pa.BaseExtensionType):
        return _plain(array.storage, kind)
    if pa.types.is_dictionary(array.type):
        return _plain(array.dictionary_decode(), kind)
    if _is(array.type, _LISTS):  # by hand, since casts of views of lists are wrong in pyarrow 26
        counts = np.asarray(pc.fill_null(pc.list_value_length(array), 0)).astype(np.int64)
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]))
        return pa.LargeListArray.from_arrays(offsets, _plain(array.flatten(), kind.value_type), mask=array.is_null())
    if pa.types.is_struct(array.type):
        inner = [_plain(array.field(at), field.type) for at, field in enumerate(kind)]
        return pa.StructArray.from_arrays(inner, fields=list(kind), mask=array.is_null())
    return array.cast(kind)


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type can be a score."""
    types = pa.types
    return types.is_floating(kind) or types.is_integer(kind) or types.is_decimal(kind) or types.is_boolean(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def is_messages(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists of messages, or of other records."""
    return is_list(kind) and pa.types.is_struct(kind.value_type)
