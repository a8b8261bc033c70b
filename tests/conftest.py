"""Strict modes for every test: shapes of signatures are checked, keys are used once, ranks are not guessed."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook("jarm", "beartype.beartype")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def key():
    """A typed key; each test derives its own."""
    return jax.random.key(20250204)
