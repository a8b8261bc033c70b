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
import pathlib
import re
import runpy
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jarm.core.messages import brief, nearest
from jarm.core.status import JarmError
from jarm.loop.config import LoopConfig
from jarm.runs.config import SOURCE, CompareConfig
from jarm.runs.records import RENAMED

OPTIONS = tuple(field.name for field in dataclasses.fields(CompareConfig))
WHOLE = ("out", "rules", "seeds", "workers", "vmap_runs")
"""Options of the sweep as a whole: no axis can have them."""
OLD_OPTIONS = RENAMED | {"jobs": "workers", "together": "vmap_runs"}
"""Options under the names of earlier versions -> their names now."""
OUT = pathlib.Path("out/sweep")
RESERVED = re.compile(
    "kind|rule|seed|round|labels|label_error|message|source|device|versions|commit|config|pair_accuracy|nll|brier|"
    f"calibration_error|(spearman|seconds|batch|fit|best_of)(_.*)?|{'|'.join(RENAMED)}"
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
    if path.is_dir():
        raise JarmError(f"{path} is a folder: give the .toml or .py that describes the sweep.")
    if not path.is_file():
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
    grid = table.pop("grid", {})
    if not isinstance(grid, dict):
        raise JarmError(f"`grid` of {path} is {grid!r}: write a table, [grid], with one axis per line.")
    if other := [name for name, value in table.items() if isinstance(value, dict)]:
        raise JarmError(f"{path} has a table [{other[0]}]{nearest(other[0], ['grid'])}: [grid] is the only table.")
    if both := [name for name in table if name in grid]:
        raise JarmError(f"{path} has `{both[0]}` above [grid] and in it: leave one of them out.")
    base = {"out": f"out/{path.stem}"} | {name: _value(name, value, str(path)) for name, value in table.items()}
    return SweepConfig(CompareConfig(**base | {"out": pathlib.Path(base["out"])}), grid)


def expand(config: SweepConfig) -> list[Setting]:
    """All settings of the grid, the last axis fastest.

    Raises:
      JarmError: an axis is no option, is empty or holds a value twice, or a value has the wrong type.
    """
    axes: list[list[tuple[str, Any, dict[str, Any]]]] = []
    for name, values in config.grid.items():
        if name in WHOLE:
            raise JarmError(f"`{name}` belongs to the sweep as a whole: give it above [grid].")
        if isinstance(values, np.ndarray):
            values = values.tolist()
        if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence):
            raise JarmError(f"grid.{name} is {values!r}: give a list of values.")
        if not values:
            raise JarmError(f"grid.{name} is empty, so there is nothing to run: give it values, or leave it out.")
        axes.append([_axis_value(name, value, at) for at, value in enumerate(values)])
        shown = [value for _, value, _ in axes[-1]]
        if twice := [value for at, value in enumerate(shown) if value in shown[:at]]:
            raise JarmError(f"grid.{name} holds {twice[0]!r} twice: leave one out.")
    setter: dict[str, str] = {}
    for name, option in ((name, option) for axis in axes for name, _, options in axis for option in options):
        if setter.setdefault(option, name) != name:
            raise JarmError(f"grid.{setter[option]} and grid.{name} both set `{option}`: leave it to one of them.")
    settings = []
    for values in itertools.product(*axes):
        options = {option: value for _, _, given in values for option, value in given.items()}
        here = dataclasses.replace(config.base, **options)
        if "noise" in options and (here.annotator != "bradley_terry" or here.flip_rate is not None):
            raise JarmError(
                f"grid.{setter['noise']} sets `noise`, which does nothing where the annotator is "
                f"{here.annotator!r} with a flip rate of {here.flip_rate}: leave one of them out."
            )
        settings.append(Setting({name: value for name, value, _ in values}, here))
    return settings


def _axis_value(axis: str, value: Any, at: int) -> tuple[str, Any, dict[str, Any]]:
    """An axis, its value as records have it, and the options that the value sets."""
    where = f"grid.{axis}[{at}]"
    if not isinstance(value, Mapping):
        value = _value(axis, value, where)
        return axis, value, {axis: value}
    if axis in OPTIONS or RESERVED.fullmatch(axis):
        raise JarmError(f"{where} sets several options, and `{axis}` is the name of something else: name it otherwise.")
    if not isinstance(value.get("name"), str):
        raise JarmError(f"{where} is {dict(value)}: give it a name, such as name = 'small'.")
    options = {option: _value(option, each, where) for option, each in value.items() if option != "name"}
    if whole := [option for option in options if option in WHOLE]:
        raise JarmError(f"{where} sets `{whole[0]}`, which belongs to the sweep as a whole: give it above [grid].")
    return axis, value["name"], options


def _value(option: str, value: Any, where: str) -> Any:
    """The value of an option, converted to its type."""
    if option in OLD_OPTIONS:
        raise JarmError(f"{where} names `{option}`, which is `{OLD_OPTIONS[option]}` now.")
    if option not in OPTIONS:
        raise JarmError(
            f"{where} names `{option}`, which is no option of `jarm compare`{nearest(option, OPTIONS)}; "
            "`jarm compare --help` lists them."
        )
    if isinstance(value, np.generic):
        value = value.item()
    if option in ("rules", "best_of", "attributes") and isinstance(value, Sequence) and not isinstance(value, str):
        value = ",".join(map(str, value))
    wanted = typing.get_type_hints(CompareConfig)[option]
    kinds = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    kinds = tuple(str if kind is pathlib.Path else kind for kind in kinds)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, pathlib.Path):
        value = str(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        wants = " or ".join(names[kind] for kind in kinds if kind in names)
        raise JarmError(f"`{option}` in {where} is {value!r}: give {wants}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise JarmError(f"`{option}` in {where} is {value}: give a finite number.")
    return value


def by_program(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Settings that share program and data, in lists; lists with the same data are neighbours.

    Raises:
      JarmError: a setting cannot be run; the message says which.
    """
    found: dict[Any, dict[Any, list[Setting]]] = {}
    for setting in settings:
        with setting.named_in_errors():
            program = setting.loop, setting.config.sizes()
        found.setdefault(tuple(setting.source.values()), {}).setdefault(program, []).append(setting)
    return [shared for programs in found.values() for shared in programs.values()]
