"""Settings of JAX that a process may have, and that change no answer of jarm: kinds of keys, widths of numbers.

Keys are of one named implementation, whatever `JAX_DEFAULT_PRNG_IMPL` says: others draw other numbers for a seed, and
some of them (`rbg`, `unsafe_rbg`) draw for a pair what depends on the other pairs of a batch. Arrays have their types
written out, so that `JAX_ENABLE_X64` and `JAX_NUMPY_DTYPE_PROMOTION=strict` find nothing to change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jarm.core.status import JarmError
from jarm.core.types import Array, PRNGKey

KEYS = "threefry2x32"
"""The implementation of all keys."""
_NO_KEY = "give one made by `jax.random.key(seed)`, or an array of them under `jax.vmap`"


def make_key(seed: int | Array) -> PRNGKey:
    """The key of a seed, the same whatever implementation is the default.

    Example:
      >>> with jax.default_prng_impl("rbg"):
      ...     key = make_key(7)
      >>> jax.random.key_data(key).tolist()
      [0, 7]
    """
    return jax.random.key(seed, impl=KEYS)


def as_key(key: Any) -> PRNGKey:
    """A key of any kind as one of `KEYS`: typed keys, and the `uint32` arrays of `jax.random.PRNGKey`.

    A key that `rbg` or `unsafe_rbg` makes of a seed holds that of `KEYS` twice; so the same seed gives the same
    answers. Where its halves differ, both count.

    Args:
      key: one key; under `jax.vmap`, one of many.

    Returns:
      The key; it is the same object where nothing is to be done.

    Raises:
      JarmError: it is no key, or several; or `jax_threefry_partitionable` is off, which changes what a key draws.

    Example:
      >>> jax.random.key_data(as_key(jax.random.key(7, impl="rbg"))).tolist()
      [0, 7]
      >>> as_key(jax.random.PRNGKey(7)) == jax.random.key(7)
      Array(True, dtype=bool)
      >>> as_key(7)
      Traceback (most recent call last):
      jarm.core.status.JarmError: `key` is an int, not a key: give one made by ...
    """
    if not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
        raise JarmError(
            "`jax_threefry_partitionable` is off, and keys draw other numbers: leave it on (JAX's default) around jarm."
        )
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and getattr(key, "dtype", None) != jnp.uint32:
        raise JarmError(f"`key` is {_named(key)}, not a key: {_NO_KEY}.")
    if typed and key.shape:
        raise JarmError(f"`key` holds keys of shape {key.shape}, not one: {_NO_KEY}.")
    if typed and str(jax.random.key_impl(key)) == KEYS:
        return key
    words = jax.random.key_data(key) if typed else jnp.asarray(key)
    if words.shape not in ((2,), (4,)):
        raise JarmError(f"`key` has {words.shape} words, not those of one key: {_NO_KEY}.")
    if words.shape == (4,):
        first = jax.random.wrap_key_data(words[:2], impl=KEYS)
        both = jax.random.fold_in(jax.random.fold_in(first, words[2]), words[3])
        words = jnp.where((words[:2] == words[2:]).all(), words[:2], jax.random.key_data(both))
    return jax.random.wrap_key_data(words, impl=KEYS)


def _named(value: Any) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def narrowed(tree: Any) -> Any:
    """A pytree with its 64-bit numbers as 32-bit ones: the results of users' functions under `JAX_ENABLE_X64`.

    Example:
      >>> with jax.enable_x64(True):
      ...     narrowed({"pairs": jnp.arange(2), "valid": jnp.ones(2, bool)})
      {'pairs': Array([0, 1], dtype=int32), 'valid': Array([ True,  True], dtype=bool)}
    """
    narrow = {"float64": jnp.float32, "int64": jnp.int32}

    def one(leaf: Any) -> Any:
        name = str(getattr(leaf, "dtype", None))
        return jnp.asarray(leaf, narrow[name]) if name in narrow else leaf

    return jax.tree.map(one, tree)


def set_process() -> None:
    """Settings of a process that belongs to jarm, such as that of its command.

    Keys draw what they draw by default; and NaN is a status of jarm or a value that is missing, not an error where it
    arises, as `JAX_DEBUG_NANS` has it.
    """
    jax.config.update("jax_threefry_partitionable", True)
    jax.config.update("jax_debug_nans", False)
    jax.config.update("jax_debug_infs", False)


@contextlib.contextmanager
def plain_types() -> Iterator[None]:
    """Types as they are by default, for code of other packages that leaves them to the settings."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield
