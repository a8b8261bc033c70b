"""The grid of a sweep: which options of `jarm compare` vary, over which values, and what of that needs a compilation.

Numbers that a run takes as arrays, the fields of `HParams` and the flip rate of a Bradley-Terry annotator, are traced
axes: one program runs them all, as it does all seeds and all rules. Other options are static axes: a program for each
combination of their values.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import re
import runpy
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jarm.core.base import HParams
from jarm.core.messages import brief, nearest
from jarm.core.status import JarmError
from jarm.loop.config import LoopConfig
from jarm.runs.config import SOURCE, CompareConfig

OPTIONS = tuple(field.name for field in dataclasses.fields(CompareConfig))
NUMBERS = tuple(field.name for field in dataclasses.fields(HParams))
WHOLE = ("out", "rules", "seeds", "workers", "vmap_runs")
"""Options of the sweep as a whole: no axis can have them."""
OUT = pathlib.Path("out/sweep")
TAKEN = re.compile(
    "kind|rule|seed|round|labels|label_error|message|source|device|versions|commit|config|pair_accuracy|nll|brier|"
    "calibration_error|(spearman|seconds|batch|fit|best_of)(_.*)?"
)
"""Names that records have for other things."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A grid of comparisons: every combination of the axes' values, with every rule and every seed of the base.

    Attributes:
      base: options that all share, among them `rules`, `seeds` and `out`: `out/sweep` if not given, not that of a
        comparison.
      grid: axis -> a sequence of its values. An axis is an option of `jarm compare`; or a name of your own, whose
        values are mappings of several options that go together, each with a `name`.
    """

    base: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.base.out == CompareConfig().out:
            object.__setattr__(self, "base", dataclasses.replace(self.base, out=OUT))


class Setting(NamedTuple):
    """One point of the grid: its value on each axis, as records have it, and the options that come of them."""

    axes: dict[str, Any]
    config: CompareConfig

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.axes.items()) or "the only setting"


class Group(NamedTuple):
    """Settings that share a program and data: they differ in traced numbers."""

    loop: LoopConfig
    source: dict[str, Any]
    best_of: tuple[int, ...] | None
    settings: list[Setting]


def read_sweep(path: pathlib.Path) -> SweepConfig:
    """The grid of a file: TOML, with options of `jarm compare` and a table `[grid]`; or Python that sets `config`.

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
            raise JarmError(f"{path} does not run ({type(error).__name__}: {brief(error)}): mend it.") from error
        if not isinstance(config, SweepConfig):
            raise JarmError(f"{path} sets no `config = SweepConfig(...)`: add that.")
        out = pathlib.Path(f"out/{path.stem}") if config.base.out == OUT else config.base.out
        return dataclasses.replace(config, base=dataclasses.replace(config.base, out=out))
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise JarmError(f"{path} is not readable TOML ({error}): put it right.") from None
    grid = table.pop("grid", {})
    if not isinstance(grid, dict):
        raise JarmError(f"`grid` of {path} is {grid!r}: write a table, [grid], with an axis a line.")
    if other := [name for name, value in table.items() if isinstance(value, dict)]:
        raise JarmError(
            f"{path} has a table [{other[0]}]{nearest(other[0], ['grid'])}: the only one there is is [grid]."
        )
    if both := [name for name in table if name in grid]:
        raise JarmError(f"{path} has `{both[0]}` above [grid] and in it: leave one of them out.")
    base = {"out": f"out/{path.stem}"} | {name: _value(name, value, str(path)) for name, value in table.items()}
    return SweepConfig(CompareConfig(**base | {"out": pathlib.Path(base["out"])}), grid)


def expand(config: SweepConfig) -> list[Setting]:
    """Every point of the grid, the last axis fastest.

    Raises:
      JarmError: an axis that is no option, is empty or holds a value twice, or a value of the wrong type.
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
        axes.append([_point(name, value, at) for at, value in enumerate(values)])
        shown = [value for _, value, _ in axes[-1]]
        if twice := [value for at, value in enumerate(shown) if value in shown[:at]]:
            raise JarmError(f"grid.{name} holds {twice[0]!r} twice: leave one out.")
    setter: dict[str, str] = {}
    for name, option in ((name, option) for axis in axes for name, _, options in axis for option in options):
        if setter.setdefault(option, name) != name:
            raise JarmError(f"grid.{setter[option]} and grid.{name} both set `{option}`: leave it to one of them.")
    settings = []
    for points in itertools.product(*axes):
        options = {option: value for _, _, given in points for option, value in given.items()}
        shown_values = {name: value for name, value, _ in points}
        config_here = dataclasses.replace(config.base, **options)
        if "noise" in options and (config_here.annotator != "bradley_terry" or config_here.flip_rate is not None):
            raise JarmError(
                f"grid.{setter['noise']} sets `noise`, which does nothing where the annotator is "
                f"{config_here.annotator!r} with a flip rate of {config_here.flip_rate}: leave one of them out."
            )
        settings.append(Setting(shown_values, config_here))
    return settings


def _point(axis: str, value: Any, at: int) -> tuple[str, Any, dict[str, Any]]:
    """The axis, its value as records have it, and the options that it sets."""
    where = f"grid.{axis}[{at}]"
    if not isinstance(value, Mapping):
        value = _value(axis, value, where)
        return axis, value, {axis: value}
    if axis in OPTIONS or TAKEN.fullmatch(axis):
        raise JarmError(f"{where} sets several options, and `{axis}` is the name of something else: name it otherwise.")
    if not isinstance(value.get("name"), str):
        raise JarmError(f"{where} is {dict(value)}: give it a name, such as name = 'small'.")
    options = {option: _value(option, each, where) for option, each in value.items() if option != "name"}
    if whole := [option for option in options if option in WHOLE]:
        raise JarmError(f"{where} sets `{whole[0]}`, which belongs to the sweep as a whole: give it above [grid].")
    return axis, value["name"], options


def _value(option: str, value: Any, where: str) -> Any:
    """A value of an option, of its type."""
    if option not in OPTIONS:
        raise JarmError(
            f"{where} names `{option}`, which is no option of `jarm compare`{nearest(option, OPTIONS)}; "
            "`jarm compare --help` lists them."
        )
    if isinstance(value, np.generic):
        value = value.item()
    if option in ("rules", "best_of") and isinstance(value, Sequence) and not isinstance(value, str):
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


def groups(settings: Iterable[Setting]) -> list[Group]:
    """Settings by the program and the data that they need, those with the same data next to each other.

    Raises:
      JarmError: a setting that cannot be run, and which.
    """
    found: dict[Any, Group] = {}
    for setting in settings:
        try:
            loop, best_of = setting.config.loop(), setting.config.sizes()
        except JarmError as error:
            raise JarmError(f"In the setting {setting}: {error}") from error
        if loop.annotator.kind == "bradley_terry":  # its flip rate becomes a noise, before anything runs
            loop = dataclasses.replace(loop, annotator=dataclasses.replace(loop.annotator, flip_rate=None))
        source = {name: getattr(setting.config, name) for name in ("data", *SOURCE)}
        key = (tuple(source.values()), loop, best_of)
        found.setdefault(key, Group(loop, source, best_of, [])).settings.append(setting)
    order = list(dict.fromkeys(key[0] for key in found))
    return [group for key, group in sorted(found.items(), key=lambda item: order.index(item[0][0]))]
