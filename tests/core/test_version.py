import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import jarm
from jarm.core.version import DISTRIBUTION, refuse_namesake

ROOT = pathlib.Path(__file__).parents[2]
INSTALL = re.compile(r"pip install (?:-\S+ )*[\"']?jarm(?!-jax)\b|(?<![\w/-])jarm\[")
TEXTS = [
    path
    for folder in ("", "jarm", "docs", "tests", "experiments", "benchmarks")
    for path in ((ROOT / folder).rglob("*") if folder else ROOT.iterdir())
    if path.suffix in (".py", ".md", ".toml") and path.name != "test_version.py"
]


def test_the_distribution_has_the_name_that_the_package_knows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == DISTRIBUTION
    assert importlib.metadata.version(DISTRIBUTION) == jarm.__version__


def test_no_text_tells_anyone_to_install_the_other_distribution():
    assert INSTALL.search("`pip install 'jarm[hub]'`")
    assert INSTALL.search("pip install -U jarm")
    assert not INSTALL.search("pip install 'jarm-jax[hub]'")
    assert not [str(path) for path in TEXTS if INSTALL.search(path.read_text(encoding="utf-8"))]


def other_distribution(folder):
    """What `pip install jarm` leaves: metadata among the packages, and a script `jarm.py` among the commands."""
    packages, commands = folder / "packages", folder / "commands"
    (packages / "jarm-0.1.0.dist-info").mkdir(parents=True)
    (packages / "jarm-0.1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: jarm\nVersion: 0.1.0\n")
    commands.mkdir()
    (commands / "jarm.py").write_text("import a_package_that_is_not_there")
    (commands / "jarm").write_text("import sys, jarm_jax\nsys.exit(jarm_jax.main())")
    return packages, commands


def run(command, *path):
    environment = {"PYTHONPATH": ":".join(map(str, path)), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def test_the_other_distribution_is_refused(tmp_path):
    packages, _ = other_distribution(tmp_path)
    refuse_namesake([str(tmp_path)])
    with pytest.raises(ImportError, match=r"`jarm` 0\.1\.0 .* collides with `jarm-jax`.*`pip uninstall jarm`"):
        refuse_namesake([str(packages)])


def test_the_command_says_so_too_although_a_script_beside_it_has_its_name(tmp_path):
    packages, commands = other_distribution(tmp_path)
    done = run([str(commands / "jarm"), "rules"], ROOT, packages)
    assert done.returncode == 1
    assert re.fullmatch(r"jarm: The distribution `jarm` 0\.1\.0 .*\n", done.stderr)
    left_over = run([str(commands / "jarm"), "rules"], ROOT)
    assert left_over.returncode == 0
    assert "greedy_dopt" in left_over.stdout
