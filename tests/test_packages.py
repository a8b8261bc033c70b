import json

import numpy as np
import pytest

from benchmarks.packages import PACKAGES, Package, available, installed
from jarm.acquisition.registry import RULES
from jarm.core.settings import make_key
from jarm.studies.bench import BenchConfig, Peer, bench, make_problem
from jarm.testing.references import list_pairs
from jarm.testing.tracing import quick_jit

SMALL = {"responses": 40, "batch": 8, "width": 4, "members": 3, "labelled": 5, "turns": 2, "sizes": "20"}


def fails(belief, space, k):
    raise MemoryError("it holds too much")


def runs_badly(belief, space, k):
    return lambda: 1 // 0


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part", "numpy.no_such_part", "json.decoder.x"])
def test_what_cannot_be_found_is_not_installed(module):
    assert not installed(Package("a: b", fails, module, "dopt"))


def test_a_package_that_breaks_as_it_is_imported_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("import numpy\nnumpy.no_such_name\n")
    (tmp_path / "broken_package" / "part.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert not installed(Package("a: b", fails, "broken_package.part", "dopt"))


def test_every_package_has_a_rule_of_jarm_beside_it():
    assert {package.like for package in PACKAGES} <= set(RULES)
    assert all(": " in package.name for package in PACKAGES)


@pytest.mark.slow
@pytest.mark.parametrize("package", available(), ids=lambda package: package.name)
def test_a_package_chooses_pairs_of_the_list(package):
    problem = make_problem(BenchConfig(**SMALL), 60)
    pairs = package.make(problem.belief, problem.space, 8)()
    offered = {tuple(pair) for pair in list_pairs(problem.space).tolist()}
    assert len({tuple(sorted(pair)) for pair in np.asarray(pairs).tolist()} & offered) == 8


@pytest.mark.slow
def test_v_opt_chooses_what_numpy_does():
    problem = make_problem(BenchConfig(**SMALL), 60)
    (numpy,) = [package for package in PACKAGES if package.like == "v_opt"]
    wanted = np.sort(numpy.make(problem.belief, problem.space, 8)(), axis=1)
    rule = quick_jit(RULES["v_opt"].rule, static_argnums=4)
    found = rule(make_key(0), problem.hparams, problem.belief, problem.space, 8)
    np.testing.assert_array_equal(found.pairs, wanted)


def test_a_peer_that_fails_gets_a_sentence_and_no_row(tmp_path, capsys):
    works = Peer("a: works", lambda belief, space, k: lambda: np.asarray(space.pairs)[:k])
    broken = [Peer(f"a: {make.__name__}", make) for make in (fails, runs_badly)]
    bench(BenchConfig(rules="random", out=tmp_path, **SMALL), peers=(*broken, works))
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [(row["rule"], row["family"]) for row in rows] == [("random", "baselines"), ("a: works", "other packages")]
    said = capsys.readouterr().err
    assert "a: fails is left out: MemoryError: it holds too much" in said
    assert "a: runs_badly is left out: ZeroDivisionError" in said
