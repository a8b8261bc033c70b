"""Strict modes for every test: shapes in signatures are checked, keys are used once, ranks are not guessed."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

# Records are not checked when they are built: vmap and tree_map rebuild them with batched or abstract leaves.
PACKAGE = pathlib.Path(__file__).parents[1] / "jarm"
CHECKED = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in ("__init__.py", "base.py", "pytree.py", "status.py", "tables.py", "types.py")
]
install_import_hook(CHECKED, "beartype.beartype")

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# The gate draws the same examples every time; a search for new ones is a run with `--hypothesis-profile default`.
hypothesis.settings.register_profile("gate", derandomize=True, deadline=None)
hypothesis.settings.load_profile("gate")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def key():
    """A typed key; each test derives its own."""
    return jax.random.key(20250204)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Each compiled program holds memory maps, of which a process may have 65,530: a module's go when it ends."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def keep_compiled(tmp_path_factory):
    """Programs of a module that are the same are compiled once, as the command does."""
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    compilation_cache.reset_cache()
