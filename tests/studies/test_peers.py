import dataclasses
import json

import numpy as np
import pytest

from jarm.acquisition.registry import RULES
from jarm.studies.bench import BenchConfig, bench
from jarm.studies.peers import PEERS, Peer, installed


def fails(belief, space, k):
    raise MemoryError("it holds too much")


def runs_badly(belief, space, k):
    return lambda: 1 // 0


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part", "numpy.no_such_part", "json.decoder.x"])
def test_what_cannot_be_found_is_not_installed(module):
    assert not installed(Peer("a: b", module, "dopt", fails))


def test_a_package_that_breaks_as_it_is_imported_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("import numpy\nnumpy.no_such_name\n")
    (tmp_path / "broken_package" / "part.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert not installed(Peer("a: b", "broken_package.part", "dopt", fails))


def test_every_peer_has_a_rule_of_jarm_beside_it():
    assert {peer.like for peer in PEERS} <= set(RULES)
    assert all(": " in peer.name for peer in PEERS)


def test_a_peer_that_fails_gets_a_sentence_and_no_row(tmp_path, capsys, monkeypatch):
    works = Peer("a: works", "json", "dopt", lambda belief, space, k: lambda: np.asarray(space.pairs)[:k])
    broken = [dataclasses.replace(works, name=f"a: {make.__name__}", make=make) for make in (fails, runs_badly)]
    monkeypatch.setattr("jarm.studies.bench.PEERS", (*broken, works))
    settings = {"responses": 40, "batch": 8, "width": 4, "members": 3, "labelled": 5, "turns": 2, "sizes": "20"}
    bench(BenchConfig(rules="random", out=tmp_path, **settings))
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [row["rule"] for row in rows] == ["random", "a: works"]
    said = capsys.readouterr().out
    assert "a: fails is left out: MemoryError: it holds too much" in said
    assert "a: runs_badly is left out: ZeroDivisionError" in said
