"""Arguments of the command that are empty, refused by a config or named as earlier versions did: one sentence each."""

import pytest

from jarm.cli import main


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["compare", "--out", ""], "`--out` is empty"),
        (["compare", "--out="], "`--out` is empty"),
        (["compare", "--data", " "], "`--data` is empty"),
        (["sweep", ""], "`an argument` is empty"),
        (["embed", "--model", "m", "--input", "x", "--template", ""], "`--template` is empty"),
        (["compare", "--pool", "500"], "`--pool` is `--candidates` now"),
        (["compare", "--together=4"], "`--together` is `--vmap-runs` now"),
        (["compare", "--seeds", "0"], "`seeds` is 0: give at least 1"),
        (["compare", "--seeds", "1000000000"], "7,000,000,000 runs, more than the 100,000 of `max_runs`"),
        (["compare", "--noise", "nan"], "`noise` is nan: give a finite number"),
        (["compare", "--head", "bayes"], "Cannot read the head 'bayes'"),
        (["embed", "--model", "m", "--input", "x", "--max-length", "0"], "`max_length` is 0: give at least 1"),
        (["bench", "--sizes", "1000000000000"], "is 1000000000000: give at least 1 and at most 2147483647"),
    ],
)
def test_arguments_get_a_sentence(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
