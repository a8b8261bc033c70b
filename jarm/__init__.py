"""jarm: active reward modelling in JAX. Decide which pairs of responses to label next.

Names are those of `__init__.pyi`, and imported when first asked for: `import jarm` alone loads no JAX.
"""

import ast as _ast
import importlib as _importlib
import pathlib as _pathlib
import typing as _typing

from jarm.core.version import __version__ as __version__
from jarm.core.version import refuse_namesake as _refuse_namesake

_refuse_namesake()

_PLACES = {
    alias.name: node.module
    for node in _ast.parse(_pathlib.Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, _ast.ImportFrom) and node.module
    for alias in node.names
}
"""Name -> the module that defines it."""

__all__ = sorted(_PLACES.keys() - {"__version__"})


def __getattr__(name: str) -> _typing.Any:
    if name in _PLACES:
        found = globals()[name] = getattr(_importlib.import_module(_PLACES[name]), name)
        return found
    if _pathlib.Path(__file__).with_name(name).joinpath("__init__.py").is_file():  # a room
        return _importlib.import_module(f"{__name__}.{name}")
    from jarm.core.messages import nearest

    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{nearest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
