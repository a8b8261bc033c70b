"""The rooms of jarm: imports go down and never back up. A room imports what `ALLOWED` says, and all may import core."""

import ast
import doctest
import importlib
import inspect
import pathlib
import subprocess
import sys
import types

import pytest

import jarm

PACKAGE = pathlib.Path(__file__).parents[1] / "jarm"
FLOORS = [
    ["core"],
    ["llm", "data", "reward", "evaluation", "design", "report"],
    ["embedding", "testing", "acquisition", "selection"],
    ["loop", "export"],
    ["runs"],
    ["studies"],
    ["commands"],
    ["cli"],
]
"""From the ground to the roof; rooms of one floor do not know of each other."""
ALLOWED = {
    "core": set(),
    "llm": set(),
    "data": set(),
    "reward": set(),
    "evaluation": set(),
    "design": set(),
    "report": set(),
    "embedding": {"llm", "data"},
    "testing": {"design"},
    "acquisition": {"design"},
    "selection": {"design"},
    "loop": {"acquisition", "reward", "design", "evaluation"},
    "export": {"reward", "embedding", "llm", "data", "report"},
    "runs": {"loop", "acquisition", "reward", "evaluation", "data"},
    "studies": {"runs", "export", "report", "loop", "acquisition", "reward", "evaluation", "data", "design"},
    "commands": {"studies", "runs", "report", "embedding", "testing", "acquisition", "data"},
    "cli": {"commands", "runs"},
}
"""Room -> the rooms that it may import, beside core."""
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def name_of(path: pathlib.Path) -> str:
    """The dotted name of a module, without `jarm`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: pathlib.Path) -> set[str]:
    """Modules of jarm that a file imports, anywhere in it, without `jarm`; "" is the top itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "jarm"}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: a relative import"
            if node.module and node.module.split(".")[0] == "jarm":
                is_room = (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
                found |= {f"{node.module}.{alias.name}" if is_room else node.module for alias in node.names}
    return {name.partition(".")[2] for name in found}


def test_every_module_has_a_room_on_a_floor():
    assert {name_of(path).split(".")[0] for path in MODULES} == set(FLOOR) == set(ALLOWED)


def test_every_room_says_what_it_is_for_and_holds_nothing_else():
    for room in FLOOR:
        if (PACKAGE / room).is_dir():
            tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
            assert ast.get_docstring(tree), f"{room}/__init__.py: say in a sentence what the room is for"
            assert len(tree.body) == 1, f"{room}/__init__.py: a name lives in one module, and is imported from there"


def test_rooms_import_only_downwards():
    for room, others in ALLOWED.items():
        assert all(FLOOR[other] < FLOOR[room] for other in others), room


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_its_room_and_those_it_may(path):
    room = name_of(path).split(".")[0]
    for imported in imports(path):
        assert imported, f"{name_of(path)} imports the top: import from the module that defines a name"
        assert imported.split(".")[0] in ALLOWED[room] | {room, "core"}, f"{name_of(path)} imports {imported}"


def test_no_module_imports_itself_by_a_detour():
    graph = {name_of(path): imports(path) & {name_of(each) for each in MODULES} for path in MODULES}
    while graph:
        free = {name for name, others in graph.items() if not others & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in free}


ASKING = {"default_backend", "devices", "local_devices", "device_count", "local_device_count"}
"""Functions of JAX that say where this process would run a program, which is not where one that it traces will run."""
HOSTS = {
    "embedding.embedder.own_devices",
    "embedding.job.Job.budget",
    "embedding.job.Job.dtype",
    "embedding.job.plan_rows",
    "evaluation.metrics.evaluate",
    "llm.sharding.make_mesh",
    "runs.elsewhere._kept",
    "runs.programs.Program.__init__",
    "runs.programs.default_vmap_runs",
    "runs.programs.default_workers",
    "runs.programs.free_bytes",
    "runs.records.provenance",
    "runs.runner.make_runner",
    "studies.plan.plan",
}
"""What asks, for it is never traced; forms for a platform go through `jax.lax.platform_dependent` or an argument."""


def asking(tree: ast.AST, name: str) -> set[str]:
    """Dotted names of the functions below a node, and of the node itself, that ask JAX where programs run."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found |= asking(node, f"{name}.{node.name}")
        elif isinstance(node, ast.Attribute) and node.attr in ASKING and getattr(node.value, "id", "") == "jax":
            found.add(name)
        else:
            found |= asking(node, name)
    return found


def test_no_code_that_is_traced_asks_where_it_runs():
    found = set().union(*(asking(ast.parse(path.read_text()), name_of(path)) for path in MODULES))
    assert found == HOSTS


def test_no_name_of_a_package_shadows_a_module_of_it():
    for folder in [PACKAGE, *(path for path in PACKAGE.rglob("*") if (path / "__init__.py").exists())]:
        package = importlib.import_module(".".join(folder.relative_to(PACKAGE.parent).parts))
        for module in [path.stem for path in folder.glob("*.py")] + [
            path.parent.name for path in folder.glob("*/*.py")
        ]:
            assert isinstance(vars(package).get(module, package), types.ModuleType), f"{package.__name__}.{module}"


def test_every_function_of_the_top_has_an_example():
    for name in jarm.__all__:
        if inspect.isfunction(function := getattr(jarm, name)):
            assert ">>>" in (function.__doc__ or ""), f"jarm.{name} has no example in its docstring"


LONGEST = ("studies.backtest", "studies.compare", "studies.forecast", "studies.sweep")
"""Modules whose examples make whole comparisons."""
COMPILE = ("bound", "criteria", "exchange", "fisher", "greedy", "passes", "top")
LONG = (*LONGEST, "selection.result", *(f"design.{name}" for name in COMPILE))
"""Modules whose examples compile programs, and those above."""


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            marks=[pytest.mark.slow] * (name_of(path) in LONG) + [pytest.mark.nightly] * (name_of(path) in LONGEST),
            id=name_of(path),
        )
        for path in MODULES
        if ">>>" in path.read_text()
    ],
)
def test_examples_in_docstrings_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"jarm.{name_of(path)}")
    done = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert done.attempted
    assert not done.failed


def test_importing_jarm_loads_nothing_heavy_and_touches_no_device():
    code = """
import sys
import jarm
early = {"jax", "numpy", "flax", "optax", "pyarrow", "tyro"} & set(sys.modules)
assert not early, early
every = [getattr(jarm, name) for name in jarm.__all__]
heavy = {"transformers", "datasets", "matplotlib", "torch", "scipy.stats", "pandas", "pytest"} & set(sys.modules)
assert not heavy, heavy
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a JAX backend was initialised"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
