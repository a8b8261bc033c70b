import json

import numpy as np
import pytest
from marks import sampled
from references import log_det64

from jarm.cli import main
from jarm.core.status import JarmError
from jarm.studies.bench import BenchConfig, Peer, bench, make_problem, quality
from jarm.testing.references import list_pairs

SMALL = {"responses": 40, "batch": 8, "width": 4, "members": 3, "labelled": 5, "turns": 2, "sizes": "20,60"}


@pytest.mark.slow
@pytest.mark.nightly
def test_rows_say_what_was_measured_and_are_appended(tmp_path, capsys):
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    assert main(["bench", "--rules=random,dopt", f"--out={tmp_path}", *options]) == 0
    assert "| dopt |" in capsys.readouterr().out
    bench(BenchConfig(rules="entropy", out=tmp_path, **SMALL))
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [(row["rule"], row["candidates"]) for row in rows] == [
        *[("random", 20), ("dopt", 20), ("random", 60), ("dopt", 60)],
        *[("entropy", 20), ("entropy", 60)],
    ]
    assert all(row["status"] == "OK" and row["chosen"] == 8 and row["cpu_s"] > 0 for row in rows)
    assert rows[3]["log_det"] > rows[2]["log_det"]
    shown = (tmp_path / "bench.md").read_text()  # what other commands measured with the same settings, too
    assert "| dopt |" in shown
    assert "| entropy |" in shown
    assert (tmp_path / "bench.png").exists()

    file = tmp_path / "bench.jsonl"
    file.write_text(file.read_text().replace('"cpu_s": 0', '"cpu_s": 1', 1))
    with pytest.raises(
        JarmError, match=r"Line 1 of .*bench\.jsonl is damaged, as its checksum shows: remove that line"
    ):
        bench(BenchConfig(rules="entropy", out=tmp_path, **SMALL))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("bench.jsonl", "mine\n", r"Line 1 of .*bench\.jsonl is not JSON"),
        ("bench.jsonl", '{"rule": "dopt"}\n', r"Line 1 of .*bench\.jsonl: the object has no 'family'"),
        ("bench.md", "mine", r"bench\.md stands there without a bench\.jsonl and may be yours"),
        ("bench.png", "mine", r"bench\.png stands there without a bench\.jsonl and may be yours"),
    ],
)
def test_files_that_are_not_of_measurements_stay(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(JarmError, match=said):
        bench(BenchConfig(rules="random", out=tmp_path, **SMALL))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: content}


@pytest.mark.parametrize("pairs", sampled(["listed", "within", "cross", "all"], "cross"))
def test_a_problem_has_about_the_pairs_asked_for(pairs):
    config = BenchConfig(pairs=pairs, **SMALL | {"responses": 60})
    problem = make_problem(config, 900)
    held = list_pairs(problem.space)
    assert len(held) == 900 if pairs == "listed" else 600 < len(held) < 1300
    own = held[:8]
    phi, r = np.float64(problem.belief.features), np.float64(problem.belief.rewards)
    expected = log_det64(phi, r, own, problem.information) - np.linalg.slogdet(problem.information)[1]
    np.testing.assert_allclose(quality(problem, own), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rules": "dpot"}, "no rule 'dpot': did you mean"),
        ({"sizes": "many"}, "`sizes` is 'many', not a list of numbers"),
        ({"sizes": "4"}, "cannot fill a batch of 8"),
        ({"sizes": "1000"}, "have no more than 780 pairs"),
        ({"pairs": "inside"}, "no pair space 'inside'"),
        ({"turns": 0}, "`turns` is 0: give at least 1"),
        ({"cores": 10_000}, "`--cores 10000`: give 1 to"),
        ({"cores": -1}, "`cores` is -1: give at least 0"),
        ({"rules": "bald", "members": 1}, "'bald' looks at how members differ: give `--members 2`"),
        ({"rules": "mine.py"}, "'mine.py' is a file and no rule: give FILE.py:FUNCTION"),
    ],
)
def test_mistakes_get_a_sentence(changes, sentence, tmp_path):
    with pytest.raises(JarmError, match=sentence):
        bench(BenchConfig(**SMALL | {"out": tmp_path} | changes))


@pytest.mark.slow
def test_what_was_measured_before_a_stop_is_kept(tmp_path):
    calls = []

    def stop_at_third():
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return np.arange(16).reshape(8, 2)

    stops = Peer("a: stops", lambda *_: stop_at_third)
    with pytest.raises(JarmError, match="Stopped"):
        bench(BenchConfig(rules="random,entropy", out=tmp_path, **SMALL), peers=(stops,))
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [(row["rule"], row["candidates"], row["turns"]) for row in rows] == [
        *[("random", 20, 2), ("entropy", 20, 2)],
        ("a: stops", 20, 1),
    ]
