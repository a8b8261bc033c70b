"""What configs refuse where they are built: one table of odd values for every field of every config."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jarm.core import memory
from jarm.core.base import HParams
from jarm.core.checks import between, check_fields, settle
from jarm.core.memory import refuse_too_large
from jarm.core.status import JarmError
from jarm.data.synthetic import SyntheticConfig
from jarm.embedding.config import EmbedConfig
from jarm.evaluation.annotators import AnnotatorConfig
from jarm.loop.config import LoopConfig
from jarm.reward.config import FitConfig, HeadConfig
from jarm.runs.config import CompareConfig
from jarm.runs.grid import SweepConfig
from jarm.studies.bench import BenchConfig

CONFIGS = {
    CompareConfig: {},
    LoopConfig: {},
    FitConfig: {},
    HeadConfig: {},
    AnnotatorConfig: {},
    SyntheticConfig: {},
    EmbedConfig: {"model": "m", "input": ("a",)},
    BenchConfig: {},
    SweepConfig: {},
}
FIELDS = [(config, field.name) for config in CONFIGS for field in dataclasses.fields(config)]
LISTS = {"rules", "hidden", "input", "pooling", "layer", "response_columns", "attributes", "best_of", "sizes"}


@pytest.fixture(autouse=True)
def unchecked_annotations(monkeypatch):
    """As for a user: the strict mode of the tests would refuse wrong types before jarm can."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def built(config, name, value):
    return config(**CONFIGS[config] | {name: value})


@pytest.mark.parametrize(("config", "name"), FIELDS, ids=lambda each: getattr(each, "__name__", each))
def test_every_field_refuses_what_is_not_of_its_type(config, name):
    default = getattr(
        built(config, *(next(iter(CONFIGS[config].items()), (name, None)))) if CONFIGS[config] else config(), name
    )
    odd = ["", " ", math.nan, math.inf, {"a": 1}, {1}, object(), b"x", 1j, "no such thing at all", -(10**400)]
    if not isinstance(default, bool):
        odd.append(True)
    if not isinstance(default, float) and name not in ("flip_rate", "scale", "gold_scale"):
        odd.append(0.5)
    if name in LISTS:
        odd += [["a b?", ""], [True], [math.nan]]
    else:
        odd += [[], ()]
    if isinstance(default, str) or name in ("data", "embeddings", "target", "attributes", "gen", "emb", "task", "out"):
        odd.remove("no such thing at all")  # a name that only a file or a table can tell
    free = ("template", "split", "revision", "coordinator", "model", "input")
    if name in (*free, "prompt_name", "prompt_column", "response_columns"):
        odd = [each for each in odd if each != "no such thing at all"]
    if name == "grid":
        odd.remove({"a": 1})
    for value in odd:
        with pytest.raises(JarmError) as error:
            pytest.fail(f"accepted {value!r}: {built(config, name, value)}")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(HParams)])
def test_numbers_of_the_host_are_checked_and_those_of_a_device_are_not(name):
    for value in ("", "1", True, math.nan, math.inf, 1e39, [1.0], (), {}, np.array([1.0, math.nan]), np.array(["1"])):
        with pytest.raises(JarmError, match=f"The hyperparameter `{name}` is "):
            HParams(**{name: value})
    assert getattr(HParams(**{name: np.float32(0.5)}), name) == 0.5
    for value in (None, jnp.float32(jnp.nan), jax.ShapeDtypeStruct((), jnp.float32)):
        HParams(**{name: value})


def test_a_record_is_not_checked_where_jax_builds_it_again():
    flags = jax.tree.map(lambda number: number > 1, HParams())
    assert flags.weight_decay is True
    assert jax.tree.map(lambda number: -number, HParams()).ridge == -1.0
    shared = dict.fromkeys(field.name for field in dataclasses.fields(HParams) if field.name != "noise")
    many = jax.vmap(lambda numbers: numbers, in_axes=(HParams(noise=0, **shared),))
    assert many(dataclasses.replace(HParams(), noise=jnp.arange(3.0))).noise.shape == (3,)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(HParams())[0]]
    assert paths[:2] == [".learning_rate", ".weight_decay"]


@pytest.mark.parametrize(
    ("config", "given", "kept"),
    [
        (CompareConfig, {"rules": ("random", "dopt")}, {"rules": "random,dopt"}),
        (CompareConfig, {"metric": "within:3.0:08"}, {"metric": "within:3:8"}),
        (CompareConfig, {"rules": np.array(["dopt", "xtx"])}, {"rules": "dopt,xtx"}),
        (CompareConfig, {"best_of": np.array([2, 5])}, {"best_of": "2,5"}),
        (CompareConfig, {"best_of": [2, 5], "gold_scale": 2}, {"best_of": "2,5", "gold_scale": "2"}),
        (CompareConfig, {"seeds": np.int64(3), "noise": 2}, {"seeds": 3, "noise": 2.0}),
        (CompareConfig, {"out": "here", "data": pathlib.Path("a")}, {"out": pathlib.Path("here"), "data": "a"}),
        (CompareConfig, {"standardise": np.bool_(True)}, {"standardise": True}),
        (LoopConfig, {"rules": ["random", "dopt"]}, {"rules": ("random", "dopt")}),
        (HeadConfig, {"hidden": np.array([8, 4])}, {"hidden": (8, 4)}),
        (FitConfig, {"members": np.int32(2), "holdout": 0}, {"members": 2, "holdout": 0.0}),
        (AnnotatorConfig, {"scale": np.float32(0.5)}, {"scale": 0.5}),
        (EmbedConfig, {"model": "m", "input": ["a"], "layer": [1, -1]}, {"input": ("a",), "layer": (1, -1)}),
    ],
)  # fmt: skip
def test_what_means_the_same_is_settled(config, given, kept):
    made = config(**given)
    assert {name: getattr(made, name) for name in kept} == kept
    assert [type(getattr(made, name)) for name in kept if name != "out"] == [
        type(kept[name]) for name in kept if name != "out"
    ]
    hash(made)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CompareConfig(rules=""), "`rules` is empty"),
        (lambda: CompareConfig(rules=","), "nothing between two commas"),
        (lambda: CompareConfig(rules="dopt, dopt"), "`rules` holds 'dopt' twice"),
        (lambda: CompareConfig(rules="Dopt"), "no rule 'Dopt': did you mean 'dopt'"),
        (lambda: CompareConfig(rules="mine.py"), "is a file and no rule"),
        (lambda: CompareConfig(rules="mine.py:"), "is a file and no rule"),
        (lambda: CompareConfig(head="bayes"), "Cannot read the head 'bayes'"),
        (lambda: CompareConfig(head="mlp:0"), r"HeadConfig.hidden\[0\] is 0: give at least 1"),
        (lambda: CompareConfig(head="mlp:8:rleu"), r"is 'rleu' \(did you mean 'relu'\?\)"),
        (lambda: CompareConfig(loss="Bradley_Terry"), r"did you mean 'bradley_terry'"),
        (lambda: CompareConfig(learning_rate=0), "at which no head learns"),
        (lambda: CompareConfig(ridge=-1.0), "`ridge` is -1.0"),
        (lambda: CompareConfig(best_of="5,5"), "`best_of` holds '5' twice"),
        (lambda: CompareConfig(best_of="0"), "A number in `best_of` is 0"),
        (lambda: CompareConfig(attributes="length,,x"), "nothing between two commas"),
        (lambda: LoopConfig(rules=()), "`rules` is empty"),
        (lambda: LoopConfig(rules=("dopt", "dopt")), "twice"),
        (lambda: LoopConfig(batch=2**30), "The number of labels"),
        (lambda: EmbedConfig("m", ()), "`input` is empty"),
        (lambda: EmbedConfig("m", ("a",), pooling=("mean", "mean")), "`pooling` holds 'mean' twice"),
        (lambda: EmbedConfig("m", ("a",), response_columns="b"), r"takes several: write \('b',\)"),
        (lambda: BenchConfig(sizes="1e4"), "`sizes` is '1e4', not a list of numbers"),
        (lambda: SweepConfig(CompareConfig(), {"noise": []}), "grid.noise is empty"),
        (lambda: SweepConfig(CompareConfig(), {"": [1]}), "grid has an axis ''"),
        (lambda: SweepConfig(CompareConfig(), {"head": ["mlp:8", "bayes"]}), "In the setting head=bayes: "),
    ],
)
def test_odd_values_are_refused_where_they_are_built(make, words):
    with pytest.raises(JarmError, match=words):
        make()


def test_sizes_beyond_all_bounds_are_refused_before_they_are_built():
    for make, words in (
        (lambda: CompareConfig(seeds=10**9), "7 rules are 7,000,000,000 runs, more than the 100,000 of `max_runs`"),
        (
            lambda: SweepConfig(CompareConfig(), dict.fromkeys(("noise", "beta", "ridge"), range(3000))),
            "3,000 x 3,000 x 3,000 settings, 7 rules and 10 seeds are 1,890,000,000,000 runs",
        ),
        (lambda: SweepConfig(CompareConfig(), {"noise": range(10**12)}), "70,000,000,000,000 runs"),
        (lambda: SyntheticConfig(train=10**9), "take fewer prompts"),
        (lambda: CompareConfig(rounds=10**12), "`rounds` is 1000000000000"),
    ):  # fmt: skip
        with pytest.raises(JarmError, match=words):
            make()
    assert CompareConfig(seeds=10**5, rules="random", max_runs=10**6).runs == 10**5
    refuse_too_large("x", 5, "y", room=5)


def test_pages_of_files_are_free_memory(tmp_path, monkeypatch):
    """A container that has read a large file holds its pages until it needs the room."""
    monkeypatch.setattr(memory, "MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    assert memory.host_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   800 kB\n")
    assert memory.host_bytes() == 800 * 1024
    held = "anon 900\ninactive_file 3000\nactive_file 1000\n"
    for name, said in (("max", "5000"), ("current", "4900"), ("stat", held)):
        (tmp_path / f"memory.{name}").write_text(said)
    assert memory.host_bytes() == 4100
    (tmp_path / "memory.max").write_text("max")
    assert memory.host_bytes() == 800 * 1024


def test_settling_is_of_values_and_not_of_their_looks():
    for three in (np.int8(3), np.array(3), jnp.float32(3)):
        assert settle("x", three, float) == 3.0
    assert settle("x", None, int | None) is None
    assert settle("x", "a", str | int) == "a"
    with pytest.raises(JarmError, match=r"x\[1\] is '2': give a whole number"):
        settle("x", [1, "2"], tuple[int, ...])
    with pytest.raises(JarmError, match="give a finite number of at least 0 and at most 1"):
        between(0, 1)("x", np.array([0.5, 1.5]))
    assert check_fields.__doc__
