"""Compiled programs are kept on disk, so that another process need not compile them again."""

from __future__ import annotations

import functools
import os
import pathlib

import jax

from jarm.core.streams import say


@functools.cache
def keep_compiled() -> None:
    """Keep compiled programs in a cache on disk, where the user has chosen or in the home; without a place, say so.

    Commands call it, and what the library compiles by itself does; only the first call of a process does anything.
    `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing.
    """
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if chosen is not None and "://" in chosen:
        return
    try:
        folder = pathlib.Path(chosen or pathlib.Path.home() / ".cache" / "jarm" / "compiled")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it is read-only")
    except (OSError, RuntimeError) as error:  # there may be no home
        why = getattr(error, "strerror", None) or error
        say(f"jarm: Compiled programs cannot be kept ({why}): set JAX_COMPILATION_CACHE_DIR to keep them elsewhere.")
        jax.config.update("jax_compilation_cache_dir", None)
    else:
        jax.config.update("jax_compilation_cache_dir", str(folder))
