"""One direction, no way back up: a module imports only from those above it."""

import ast
import pathlib
import subprocess
import sys

import pytest

import jarm

ROOT = pathlib.Path(jarm.__file__).parent
# From the bottom of the building to its roof; a line holds modules that do not know of each other.
LAYERS = [
    ["types"],
    ["base"],
    ["linalg", "statistics", "processes"],
    ["data.pairs", "data.files"],
    ["data.journal", "data.sources"],
    ["data.store", "data.writer"],
    ["data.texts"],
    ["data.synthetic", "data.tables", "data.standardise"],
    ["data.datasets"],
    ["llm.rope", "llm.pooling"],
    ["llm.config"],
    ["llm.layers"],
    ["llm.decoder", "llm.encoder"],
    ["llm.model"],
    ["llm.weights"],
    ["llm.sharding", "llm.tokens", "llm.plan", "llm.sentence"],
    ["llm.extract"],
    ["embed_stores"],
    ["embed"],
    ["heads", "losses"],
    ["newton", "sizes", "tasks"],
    ["fit", "fisher"],
    ["tiles"],
    ["objectives"],
    ["greedy", "selection", "reasons"],
    ["design", "exchange", "arguments", "candidates"],
    ["select"],
    ["acquisition.uncertainty", "acquisition.optimal_design", "acquisition.duels"],
    ["acquisition.information", "acquisition.diversity", "acquisition.intervals"],
    ["acquisition.batch_bald", "acquisition.stochastic", "acquisition.coreset"],
    ["acquisition.registry"],
    ["annotators", "ranking"],
    ["batch", "metrics", "pool"],
    ["loop"],
    ["prepare"],
    ["references"],
    ["testing"],
    ["records"],
    ["runner", "peers"],
    ["bench"],
    ["curves"],
    ["markdown"],
    ["report", "figures"],
    ["compare"],
    ["grid"],
    ["programs"],
    ["sweep", "plan"],
    ["cli"],
]
LEVEL = {f"jarm.{module}": level for level, layer in enumerate(LAYERS) for module in layer}


def name_of(path):
    return ".".join(("jarm", *path.relative_to(ROOT).with_suffix("").parts))


def imports(path):
    """Modules of jarm that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "jarm")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import"
            if node.module and node.module.split(".")[0] == "jarm":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield whole if whole in LEVEL else node.module


MODULES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")


def test_every_module_has_its_layer():
    assert sorted(map(name_of, MODULES)) == sorted(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_the_layers_below(path):
    own = LEVEL[name_of(path)]
    for imported in imports(path):
        assert imported in LEVEL, f"{name_of(path)} imports {imported}: import from the module that defines a name"
        assert LEVEL[imported] < own, f"{name_of(path)} imports {imported}, which is not below it"


def test_a_module_of_a_package_is_imported_by_nobody_through_the_top():
    for path in MODULES:
        assert "jarm" not in set(imports(path))


def test_importing_jarm_loads_nothing_heavy_and_touches_no_device():
    code = """
import sys
import jarm
heavy = {"transformers", "datasets", "matplotlib", "torch", "scipy.stats", "pandas", "pytest"} & set(sys.modules)
assert not heavy, heavy
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a JAX backend was initialised"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
