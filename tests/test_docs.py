"""What the documents show runs, and what they promise is so."""

import contextlib
import dataclasses
import io
import pathlib
import re

import jax
import pytest

import jarm
from jarm.testing.conformance import check_rule

ROOT = pathlib.Path(__file__).parents[1]


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


@pytest.mark.slow
def test_readme_examples_run():
    scope, shown = {}, io.StringIO()
    with contextlib.redirect_stdout(shown):
        for block in blocks("README.md", "python"):
            exec(block, scope)
    lines = shown.getvalue().splitlines()
    assert lines[0].startswith("random [")
    assert lines[-1].startswith("(32, 2)")


@pytest.mark.slow
@pytest.mark.nightly
def test_the_loop_of_the_page_on_selection_runs():
    scope, shown = {}, io.StringIO()
    with contextlib.redirect_stdout(shown):
        for block in blocks("docs/selection.md", "python"):
            exec(block, scope)
    assert "log det" in shown.getvalue()


@pytest.mark.slow
def test_contributed_rule_conforms():
    scope = {}
    (block,) = blocks("CONTRIBUTING.md", "python")
    exec(block, scope)
    check_rule(scope["far_ties"])


def test_ci_runs_the_readme_command():
    command = blocks("README.md", "bash")[1].strip()
    assert "pytest" in command
    assert command in (ROOT / ".ci" / "run").read_text()


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/backtest.md",
    "docs/data.md",
    "docs/embedding.md",
    "docs/forecast.md",
    "docs/rules.md",
    "docs/selection.md",
    "docs/store.md",
    "docs/sweeps.md",
    "docs/scaling.md",
    "experiments/README.md",
    "benchmarks/README.md",
]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target


def test_options_of_embedding_exist():
    options = re.findall(r"`?--([a-z][a-z-]+)", (ROOT / "docs/embedding.md").read_text())
    known = {field.name for field in dataclasses.fields(jarm.EmbedConfig)}
    of_others = {"embeddings", "target", "data", "table", "out"}
    assert {option.replace("-", "_") for option in options} <= known | of_others


def test_public_names_exist_and_are_documented():
    assert len(set(jarm.__all__)) == len(jarm.__all__)
    for name in jarm.__all__:
        item = getattr(jarm, name)
        assert getattr(item, "__doc__", None), f"{name} has no docstring"


def test_rules_say_their_gain():
    for name, entry in jarm.RULES.items():
        assert "Gain:" in entry.rule.__doc__, name


def test_records_are_pytrees():
    space = jarm.pair_space("within", 2, jax.numpy.ones(4, bool))
    assert jax.tree.structure(space) == jax.tree.structure(jax.tree.map(lambda leaf: leaf, space))
