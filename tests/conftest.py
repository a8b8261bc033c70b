"""Strict modes for every test: shapes in signatures are checked, keys are used once, ranks are not guessed."""

import os
import pathlib
import shutil
import tempfile

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

# The gate draws the same examples every time; a search for new ones is a run with `--hypothesis-profile default`.
hypothesis.settings.register_profile("gate", derandomize=True, deadline=None)
hypothesis.settings.load_profile("gate")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


def pytest_configure(config):
    """Programs that are the same are compiled once a run, by whichever process is first."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.compiled = tempfile.mkdtemp(prefix="jarm-tests-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compiled
        jax.config.update("jax_compilation_cache_dir", config.compiled)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_unconfigure(config):
    """The programs go with the run, unless the caller has named a folder that keeps them."""
    if hasattr(config, "compiled"):
        shutil.rmtree(config.compiled, ignore_errors=True)


@pytest.fixture
def key():
    """A typed key; each test derives its own."""
    return jax.random.key(20250204)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Each compiled program holds memory maps, of which a process may have 65,530: all go before they are so many."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
