"""Rules of a user's file: FILE.py:FUNCTION."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import pathlib
import sys
import types

from jarm.core.base import Belief, HParams, PairSpace, Rule, Selection
from jarm.core.signature import check_signature
from jarm.core.status import JarmError
from jarm.core.types import PRNGKey


@functools.cache
def rule_of_file(path: pathlib.Path, function: str) -> Rule:
    """A rule from a Python file, which is executed at most once per process.

    Args:
      path: the file.
      function: its function, `(key, hparams, belief, space, k) -> Selection`.

    Returns:
      The rule; whatever the function raises becomes a `JarmError` of one sentence.

    Raises:
      JarmError: no such file or function, its arguments are not those of a rule, or the file does not run.
    """
    module = _module_of(path)
    rule = getattr(module, function, None)
    if not callable(rule):
        own = {key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
        raise JarmError(f"{path} has no function {function!r}; it has {', '.join(sorted(own)) or 'none'}.")
    check_signature(rule, f"{function!r} of {path}")

    def run(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
        try:
            selection = rule(key, hparams, belief, space, k)
        except JarmError:
            raise
        except Exception as error:
            message = str(error).strip().partition("\n")[0]
            raise JarmError(f"Rule {function!r} of {path} raises {type(error).__name__}: {message}") from error
        if not isinstance(selection, Selection):
            raise JarmError(f"Rule {function!r} of {path} returned {type(selection).__name__}, not a jarm.Selection.")
        return selection

    run.__name__, run.__doc__ = function, rule.__doc__
    return run


@functools.cache
def _module_of(path: pathlib.Path) -> types.ModuleType:
    """The executed file; a second rule of the file shares it."""
    if not path.is_file():
        raise JarmError(f"There is no file {path} to take a rule from.")
    name = f"jarm_rules_of_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module while the file runs
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise JarmError(f"{path} does not run: {type(error).__name__}: {error}") from error
    return module
