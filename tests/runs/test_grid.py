"""The grid of a sweep as a user writes it: files, axes, what shares a program, and a sentence for each mistake."""

import dataclasses
import pathlib

import numpy as np
import pytest

from jarm import CompareConfig, JarmError, SweepConfig, read_sweep
from jarm.runs.config import PAPER
from jarm.runs.grid import OPTIONS, by_program, expand

pytestmark = pytest.mark.core

BASE = CompareConfig(
    **PAPER | {"head": "mlp:8"}, rounds=2, batch=5, initial=10, seeds=2, candidates=200, steps=20, members=1
)


def grid(**axes):
    return SweepConfig(BASE, axes)


def written(folder, text, name="noise.toml"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_toml_file_is_the_options_and_the_axes(tmp_path):
    config = read_sweep(
        written(
            tmp_path,
            """
            rules = ["entropy", "greedy_dopt"]
            seeds = 3
            ridge = 2          # a whole number where a number is wanted
            best_of = [2, 5]
            standardise = false

            [grid]
            noise = [0.5, 1, 2.0]
            head = ["linear", "mlp:8"]
            size = [{name = "small", rounds = 2, batch = 5}, {name = "large", rounds = 4, batch = 10}]
            """,
        )
    )
    base = config.base
    assert (base.rules, base.seeds, base.ridge, base.best_of) == ("entropy,greedy_dopt", 3, 2.0, "2,5")
    assert isinstance(base.ridge, float)
    assert base.standardise is False
    assert config.out == pathlib.Path("out/noise")  # by the name of the file
    settings = expand(config)
    assert [tuple(setting.axes.values()) for setting in settings[:5]] == [
        (0.5, "linear", "small"),
        (0.5, "linear", "large"),
        (0.5, "mlp:8", "small"),
        (0.5, "mlp:8", "large"),
        (1.0, "linear", "small"),
    ]
    assert len(settings) == 12
    assert isinstance(settings[4].axes["noise"], float)  # as JSON will have it
    for setting in settings:
        assert setting.config.noise == setting.axes["noise"]
        assert (setting.config.rounds, setting.config.batch) == {"small": (2, 5), "large": (4, 10)}[
            setting.axes["size"]
        ]
        assert setting.config.seeds == 3
    assert str(settings[0]) == "noise=0.5, head=linear, size=small"


def test_a_python_file_sets_config(tmp_path):
    text = """
        import pathlib
        import numpy as np
        from jarm import CompareConfig, SweepConfig
        config = SweepConfig(
            CompareConfig(seeds=2, out=pathlib.Path("out/mine")),
            {"beta": np.linspace(1, 3, 3), "batch": range(5, 7), "data": (pathlib.Path("a.parquet"),),
             "flip_rate": [None, 0.25], "members": [np.int64(2)]},
        )
    """
    path = written(tmp_path, "\n".join(line[8:] for line in text.splitlines()), "mine.py")
    settings = expand(read_sweep(path))
    values = {name: list(dict.fromkeys(setting.axes[name] for setting in settings)) for name in settings[0].axes}
    assert values == {
        "beta": [1.0, 2.0, 3.0],
        "batch": [5, 6],
        "data": ["a.parquet"],
        "flip_rate": [None, 0.25],
        "members": [2],
    }
    assert [type(value) for value in settings[0].axes.values()] == [float, int, str, type(None), int]


def test_without_axes_there_is_one_setting():
    (setting,) = expand(SweepConfig(BASE))
    assert setting.axes == {}
    assert setting.config == BASE
    assert str(setting) == "the only setting"


@pytest.mark.parametrize("file", ["options.toml", "options.py"])
def test_an_option_of_the_top_level_can_say_where_the_folder_is(file, tmp_path):
    text = 'out = "elsewhere"' if file.endswith("toml") else "import jarm\nconfig = jarm.SweepConfig()"
    out = read_sweep(written(tmp_path, text, file)).out
    assert out == pathlib.Path("elsewhere" if file.endswith("toml") else "out/options")


def test_a_sweep_in_python_does_not_write_where_a_comparison_does():
    assert SweepConfig(CompareConfig(seeds=3)).out == pathlib.Path("out/sweep")
    assert SweepConfig(CompareConfig(out=pathlib.Path("mine"))).out == pathlib.Path("mine")


@pytest.mark.parametrize(
    ("axes", "programs"),
    [
        ({"noise": [0.5, 1.0, 2.0]}, 1),
        ({"noise": [0.5, 1.0], "prior_weight": [0.1, 1.0], "learning_rate": [1e-3, 1e-2]}, 1),
        ({"flip_rate": [0.0, 0.25, None]}, 1),
        ({"flip_rate": [0.1, 0.25], "annotator": ["flip"]}, 2),
        ({"head": ["linear", "mlp:8"]}, 2),
        ({"batch": [5, 6], "noise": [1.0, 2.0]}, 2),
        ({"head": ["linear", "mlp:8"], "batch": [5, 6]}, 4),
        ({"annotator": ["perfect", "bradley_terry"]}, 2),
        ({"data": ["synthetic", "synthetic:outliers"]}, 2),
        ({"standardise": [True, False]}, 2),
        ({"best_of": ["2", "2,5"]}, 2),
        ({"both": [{"name": "a", "prior_weight": 1.0}, {"name": "b", "prior_weight": 2.0, "noise": 1}]}, 1),
        ({"both": [{"name": "a", "prior_weight": 1.0}, {"name": "b", "prior_weight": 2.0, "steps": 5}]}, 2),
    ],
)
def test_settings_that_differ_in_traced_numbers_share_a_program(axes, programs):
    settings = expand(grid(**axes))
    found = by_program(settings)
    assert len(found) == programs
    assert sorted(str(s) for shared in found for s in shared) == sorted(str(s) for s in settings)


def test_programs_on_the_same_data_are_neighbours():
    found = by_program(expand(grid(head=["linear", "mlp:8"], data=["synthetic", "synthetic:outliers"], batch=[5, 6])))
    assert [shared[0].source["data"] for shared in found] == ["synthetic"] * 4 + ["synthetic:outliers"] * 4


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"nois": [1.0]}, r"grid.nois\[0\] names `nois`.* \(did you mean 'noise'\?\)"),
        ({"size": [{"name": "a", "heads": "linear"}]}, r"grid.size\[0\] names `heads`.*did you mean 'head'"),
        ({"noise": []}, "grid.noise is empty"),
        ({"noise": 2.0}, "grid.noise is 2.0: give a list"),
        ({"head": "linear"}, "grid.head is 'linear': give a list"),
        ({"size": {"name": "a"}}, "grid.size is .*: give a list"),
        ({"noise": [1.0, "loud"]}, r"`noise` in grid.noise\[1\] is 'loud': give a number"),
        ({"noise": [True]}, r"grid.noise\[0\] is True: give a number"),
        ({"noise": [1.0, float("nan")]}, r"grid.noise\[1\] is nan: give a finite number"),
        ({"holdout": [float("inf")]}, r"grid.holdout\[0\] is inf: give a finite number"),
        ({"batch": [5.0]}, r"grid.batch\[0\] is 5.0: give a whole number"),
        ({"head": [8]}, r"grid.head\[0\] is 8: give text"),
        ({"standardise": [1]}, r"grid.standardise\[0\] is 1: give true or false"),
        ({"steps": [None]}, r"grid.steps\[0\] is None: give a whole number"),
        ({"noise": [1, 2.0, 1.0]}, "grid.noise holds 1.0 twice"),
        ({"size": [{"name": "a", "batch": 5}, {"name": "a", "batch": 6}]}, "grid.size holds 'a' twice"),
        (
            {"noise": [1.0], "who": [{"name": "a", "noise": 2.0}]},
            "grid.noise and grid.who both set `noise`: leave it to one of them",
        ),
        (
            {"noise": [1.0], "who": [{"name": "a", "beta": 1.0}, {"name": "b", "noise": 2.0}]},
            "grid.noise and grid.who both set `noise`",
        ),
        ({"rules": ["random"]}, r"`rules` belongs to the sweep as a whole: give it above \[grid\]"),
        ({"seeds": [1, 2]}, "`seeds` belongs to the sweep"),
        ({"size": [{"name": "a", "seeds": 2}]}, r"grid.size\[0\] sets `seeds`, which belongs to the sweep"),
        ({"size": [{"batch": 5}]}, r"grid.size\[0\] is {'batch': 5}: give it a name"),
        ({"size": [{"name": 5, "batch": 5}]}, "give it a name"),
        ({"noise": [{"name": "a", "batch": 5}]}, "`noise` is the name of something else"),
        ({"seed": [{"name": "a", "batch": 5}]}, "`seed` is the name of something else"),
        ({"prior": [{"name": "a", "batch": 5}]}, "`prior` is the name of something else"),  # in old folders
        ({"spearman": [{"name": "a", "batch": 5}]}, "`spearman` is the name of something else"),
        ({"best_of_5": [{"name": "a", "batch": 5}]}, "`best_of_5` is the name of something else"),
        ({"batch_mean_gold_gap": [{"name": "a", "batch": 5}]}, "is the name of something else"),
        ({"head": ["linear", "transformer"]}, "In the setting head=transformer: .*transformer"),
        ({"noise": [1.0], "batch": [0]}, "In the setting batch=0: `batch` is 0: give at least 1"),
        ({"gold_scale": ["wide"]}, "In the setting gold_scale=wide: .*neither 'std' nor a number"),
        ({"best_of": ["two"]}, "In the setting best_of=two: "),
    ],
)
def test_mistakes_in_a_grid_get_a_sentence_that_names_the_place(axes, words):
    with pytest.raises(JarmError, match=words) as error:
        by_program(expand(grid(**axes)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "seeds = ", "is not readable TOML"),
        ("a.toml", "noise = 2\n[grid]\nnoise = [1.0]", r"a.toml has `noise` above \[grid\] and in it"),
        ("a.toml", "seed = 3", r"a.toml names `seed`.*did you mean 'seeds'"),
        ("a.toml", 'seeds = "three"', "`seeds` in .*a.toml is 'three': give a whole number"),
        ("a.toml", "grid = 3", "`grid` of .* is 3: write a table"),
        ("a.toml", "[[grid]]\nnoise = [1.0]", "`grid` of .*: write a table"),
        ("a.toml", "[gird]\nnoise = [1.0]", r"has a table \[gird\] \(did you mean 'grid'\?\)"),
        ("a.toml", 'out = ["a"]', "`out` in .*a.toml is .*: give a path"),
        ("a.py", "raise ValueError('one\\ntwo')", r"does not run \(ValueError: one\): repair it"),
        ("a.py", "import nothing_of_that_name", r"does not run \(ModuleNotFoundError"),
        ("a.py", "def f(:", r"does not run \(SyntaxError"),
        ("a.py", "import sys\nsys.exit(3)", r"does not run \(SystemExit"),
        ("a.py", "grid = {}", "sets no `config = SweepConfig"),
        ("a.py", "config = {'grid': {}}", "sets no `config = SweepConfig"),
    ],
)
def test_mistakes_in_a_file_get_a_sentence(name, text, words, tmp_path):
    with pytest.raises(JarmError, match=words) as error:
        read_sweep(written(tmp_path, text, name))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_no_text_gets_a_sentence(tmp_path):
    with pytest.raises(JarmError, match=r"There is no file .*nothing\.toml"):
        read_sweep(tmp_path / "nothing.toml")
    with pytest.raises(JarmError, match="is a folder: give the"):
        read_sweep(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JarmError, match="is not readable TOML"):
        read_sweep(tmp_path / "bytes.toml")


def test_every_option_but_those_of_the_sweep_can_be_an_axis():
    """Each with its default as the only value: what a file may say is what a comparison takes."""
    default = CompareConfig(out=pathlib.Path("mine"))
    for option in OPTIONS:
        value = getattr(default, option)
        if option in ("out", "rules", "seeds", "workers", "vmap_runs", "max_runs"):
            with pytest.raises(JarmError, match="belongs to the sweep"):
                expand(SweepConfig(default, {option: [value]}))
        else:
            (setting,) = expand(SweepConfig(default, {option: [value]}))
            assert setting.config == dataclasses.replace(default, **{option: value})


def test_numpy_numbers_become_numbers():
    (setting,) = expand(grid(noise=np.float32([0.5]), batch=[np.int64(5)], standardise=[np.bool_(True)]))
    assert [type(value) for value in setting.axes.values()] == [float, int, bool]


@pytest.mark.parametrize("base", [{"flip_rate": 0.2}, {"annotator": "perfect"}])
def test_a_noise_that_does_nothing_is_no_axis(base):
    with pytest.raises(JarmError, match=r"grid\.noise sets `noise`, which does nothing where the annotator is"):
        expand(SweepConfig(CompareConfig(**base), {"noise": [1.0, 2.0]}))
    expand(
        SweepConfig(CompareConfig(**base), {"who": [{"name": "as they are"}, {"name": "sure", "annotator": "perfect"}]})
    )


@pytest.mark.parametrize(("old", "new"), [("prior", "prior_weight"), ("pool", "candidates"), ("jobs", "workers")])
def test_an_option_under_its_old_name_gets_the_new_one(old, new, tmp_path):
    path = tmp_path / "old.toml"
    path.write_text(f"{old} = 1\n")
    with pytest.raises(JarmError, match=f"`{old}`, which is `{new}` now"):
        read_sweep(path)
