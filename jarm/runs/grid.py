"""The grid of a sweep: options of `jarm compare` that vary, and their values.

Numbers that a run takes as arrays, the fields of `HParams` and the flip rate of a Bradley-Terry annotator, are traced
axes: one program runs all their values, as it does all seeds and all rules. Other options are static axes: each
combination of their values compiles a program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import re
import runpy
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jarm.core.checks import distinct, settle
from jarm.core.messages import brief, nearest
from jarm.core.status import JarmError
from jarm.loop.config import LoopConfig
from jarm.runs.arguments import OLD_OPTIONS, RENAMED
from jarm.runs.config import SOURCE, TEXTS, CompareConfig, as_text, refuse_many

OPTIONS = tuple(field.name for field in dataclasses.fields(CompareConfig))
_TYPES = typing.get_type_hints(CompareConfig)
WHOLE = ("out", "rules", "seeds", "workers", "vmap_runs", "max_runs")
"""Options of the sweep as a whole: no axis can have them."""
OUT = pathlib.Path("out/sweep")
RESERVED = re.compile(
    "kind|rule|seed|round|labels|label_error|message|source|device|versions|commit|config|pair_accuracy|nll|brier|"
    f"calibration_error|(spearman|seconds|batch|fit|best_of|noise_free)(_.*)?|{'|'.join(RENAMED)}"
)
"""Column names reserved by the record format."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A grid of comparisons: every combination of the axes' values, with every rule and every seed of the base.

    Example:
      Two axes, one of them with a name of its own for options that go together: 2 x 2 settings.

      >>> sizes = [{"name": "often", "batch": 25, "rounds": 16}, {"name": "seldom", "batch": 100, "rounds": 4}]
      >>> config = SweepConfig(CompareConfig(seeds=16), {"noise": [0.5, 2.0], "size": sizes})
      >>> [str(setting) for setting in expand(config)][:2]
      ['noise=0.5, size=often', 'noise=0.5, size=seldom']

    Attributes:
      base: options that all settings share, among them `rules`, `seeds` and `out`.
      grid: axis -> a sequence of its values. An axis is an option of `jarm compare`; or a name of your own, whose
        values are mappings of several options that go together, each with a `name`.
    """

    base: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.base, CompareConfig):
            raise JarmError(f"SweepConfig.base is {self.base!r}: give a CompareConfig.")
        if not isinstance(self.grid, Mapping):
            raise JarmError(f"SweepConfig.grid is {self.grid!r}: give a dict, axis -> list of its values.")
        lengths = [len(_values_of(axis, values)) for axis, values in self.grid.items()]
        if lengths:
            product = " x ".join(f"{length:,}" for length in lengths)
            what = f"{product} settings, {len(self.base.rule_names())} rules and {self.base.seeds:,} seeds"
            refuse_many(what, math.prod(lengths) * self.base.runs, self.base.max_runs)
        for axis, values in _axes(self).items():
            for value in values:
                with Setting({axis: value.shown}, self.base).named_in_errors():
                    dataclasses.replace(self.base, **value.options)

    @property
    def out(self) -> pathlib.Path:
        """Folder of the sweep: the base's, or `out/sweep` where the base has the default of a comparison."""
        out = pathlib.Path(self.base.out)
        return OUT if out == CompareConfig.out else out


class Setting(NamedTuple):
    """One combination of the axes' values.

    Attributes:
      axes: axis -> value, as in the records.
      config: the options with these values.
    """

    axes: dict[str, Any]
    config: CompareConfig

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.axes.items()) or "the only setting"

    @property
    def source(self) -> dict[str, Any]:
        """Options that choose the data."""
        return {name: getattr(self.config, name) for name in ("data", *SOURCE)}

    @property
    def loop(self) -> LoopConfig:
        """The loop as it is compiled: a Bradley-Terry annotator's flip rate becomes a noise, which is traced."""
        loop = self.config.loop()
        if loop.annotator.kind != "bradley_terry":
            return loop
        return dataclasses.replace(loop, annotator=dataclasses.replace(loop.annotator, flip_rate=None))

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Errors of the block say that they occurred in this setting, if it is one of several."""
        try:
            yield
        except JarmError as error:
            if not self.axes:
                raise
            raise JarmError(f"In the setting {self}: {error}") from error


def read_sweep(path: pathlib.Path) -> SweepConfig:
    """Read the grid of a file: TOML with options of `jarm compare` and a table `[grid]`; or Python that sets `config`.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "noise.toml")
      ...     _ = path.write_text("seeds = 3\\n[grid]\\nnoise = [0.5, 2]")
      ...     config = read_sweep(path)
      >>> config.base.seeds, config.grid, str(config.out)
      (3, {'noise': [0.5, 2]}, 'out/noise')

    Args:
      path: a `.toml` or `.py`; its name decides where the sweep is written, `out/NAME`, if the file does not.

    Raises:
      JarmError: the file is missing or not readable, or an option or a value is wrong.
    """
    if os.path.isdir(path):
        raise JarmError(f"{path} is a folder: give the .toml or .py that describes the sweep.")
    if not os.path.isfile(path):
        raise JarmError(f"There is no file {path}: give a .toml or .py that describes the sweep.")
    if path.suffix == ".py":
        try:
            config = runpy.run_path(str(path)).get("config")
        except (Exception, SystemExit) as error:  # whatever a user's file does
            raise JarmError(f"{path} does not run ({type(error).__name__}: {brief(error)}): repair it.") from error
        if not isinstance(config, SweepConfig):
            raise JarmError(f"{path} sets no `config = SweepConfig(...)`: add that.")
        if config.out != OUT:
            return config
        return dataclasses.replace(config, base=dataclasses.replace(config.base, out=pathlib.Path(f"out/{path.stem}")))
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise JarmError(f"{path} is not readable TOML ({error}): put it right.") from None
    if not table:
        raise JarmError(f"{path} is empty: write options of `jarm compare`, and [grid] with one axis per line.")
    if table.get("grid") == {}:
        raise JarmError(f"[grid] of {path} is empty: write one axis per line, or leave [grid] out.")
    grid = table.pop("grid", {})
    if not isinstance(grid, dict):
        raise JarmError(f"`grid` of {path} is {grid!r}: write a table, [grid], with one axis per line.")
    if other := [name for name, value in table.items() if isinstance(value, dict)]:
        raise JarmError(f"{path} has a table [{other[0]}]{nearest(other[0], ['grid'])}: [grid] is the only table.")
    if both := [name for name in table if name in grid]:
        raise JarmError(f"{path} has `{both[0]}` above [grid] and in it: leave one of them out.")
    base = {"out": f"out/{path.stem}"} | {name: _value(name, value, str(path)) for name, value in table.items()}
    return SweepConfig(CompareConfig(**base | {"out": pathlib.Path(base["out"])}), grid)


class _Value(NamedTuple):
    """A value of an axis: as records have it, and the options that it sets."""

    shown: Any
    options: dict[str, Any]


def expand(config: SweepConfig) -> list[Setting]:
    """All settings of the grid, the last axis fastest.

    Raises:
      JarmError: the axes set a noise where it does nothing.
    """
    axes, settings = _axes(config), []
    for values in itertools.product(*axes.values()):
        options = {option: value for each in values for option, value in each.options.items()}
        here = dataclasses.replace(config.base, **options)
        if "noise" in options and (here.annotator != "bradley_terry" or here.flip_rate is not None):
            (axis,) = {axis for axis, value in zip(axes, values, strict=True) if "noise" in value.options}
            raise JarmError(
                f"grid.{axis} sets `noise`, which does nothing where the annotator is "
                f"{here.annotator!r} with a flip rate of {here.flip_rate}: leave one of them out."
            )
        settings.append(Setting({axis: value.shown for axis, value in zip(axes, values, strict=True)}, here))
    return settings


def _values_of(axis: Any, values: Any) -> Sequence[Any]:
    """The values of an axis, if there are any in a list."""
    if not isinstance(axis, str) or not axis.strip():
        raise JarmError(f"grid has an axis {axis!r}: give it the name of an option, or one of your own.")
    if axis in WHOLE:
        raise JarmError(f"`{axis}` belongs to the sweep as a whole: give it above [grid].")
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
        raise JarmError(f"grid.{axis} is {values!r}: give a list of values.")
    if not values:
        raise JarmError(f"grid.{axis} is empty, so there is nothing to run: give it values, or leave it out.")
    return values


def _axes(config: SweepConfig) -> dict[str, list[_Value]]:
    """The values of every axis.

    Raises:
      JarmError: an axis is no option, is empty or holds a value twice, or a value has the wrong type.
    """
    axes = {
        axis: [_axis_value(axis, value, at) for at, value in enumerate(_values_of(axis, values))]
        for axis, values in config.grid.items()
    }
    setter: dict[str, str] = {}
    for axis, values in axes.items():
        distinct(f"grid.{axis}", [value.shown for value in values])
        for option in {option for value in values for option in value.options}:
            if setter.setdefault(option, axis) != axis:
                raise JarmError(f"grid.{setter[option]} and grid.{axis} both set `{option}`: leave it to one of them.")
    return axes


def _axis_value(axis: str, value: Any, at: int) -> _Value:
    where = f"grid.{axis}[{at}]"
    if not isinstance(value, Mapping):
        value = _value(axis, value, where)
        return _Value(value, {axis: value})
    if axis in OPTIONS or RESERVED.fullmatch(axis):
        raise JarmError(f"{where} sets several options, and `{axis}` is the name of something else: name it otherwise.")
    if not isinstance(value.get("name"), str) or not value["name"].strip():
        raise JarmError(f"{where} is {dict(value)}: give it a name, such as name = 'small'.")
    options = {option: _value(option, each, where) for option, each in value.items() if option != "name"}
    if whole := [option for option in options if option in WHOLE]:
        raise JarmError(f"{where} sets `{whole[0]}`, which belongs to the sweep as a whole: give it above [grid].")
    return _Value(value["name"], options)


def _value(option: str, value: Any, where: str) -> Any:
    """The value of an option, converted to its type."""
    if option in OLD_OPTIONS:
        raise JarmError(f"{where} names `{option}`, which is `{OLD_OPTIONS[option]}` now.")
    if option not in OPTIONS:
        raise JarmError(
            f"{where} names `{option}`, which is no option of `jarm compare`{nearest(option, OPTIONS)}; "
            "`jarm compare --help` lists them."
        )
    value = settle(f"`{option}` in {where}", as_text(option, value) if option in TEXTS else value, _TYPES[option])
    return str(value) if isinstance(value, pathlib.Path) else value


def by_program(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Settings that share program and data, in lists; lists with the same data are neighbours.

    Raises:
      JarmError: a setting cannot be run; the message says which.
    """
    found: dict[Any, dict[Any, list[Setting]]] = {}
    for setting in settings:
        with setting.named_in_errors():
            # "auto" is resolved with the data, and then a program of its own.
            program = setting.loop, setting.config.sizes(), setting.config.per_prompt == "auto"
        found.setdefault(tuple(setting.source.values()), {}).setdefault(program, []).append(setting)
    return [shared for programs in found.values() for shared in programs.values()]
