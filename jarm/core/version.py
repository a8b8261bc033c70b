"""The version of jarm, and its distribution's name: the index has another `jarm`, so ours installs as `jarm-jax`."""

from __future__ import annotations

import importlib.metadata
import sys

__version__ = "0.1.0"
DISTRIBUTION = "jarm-jax"


def refuse_namesake(path: list[str] | None = None) -> None:
    """Refuse to run in an environment that also holds the unrelated distribution `jarm`, a front end to pip.

    Its script `jarm.py` lies beside our command and would be imported in the place of this package.

    Args:
      path: folders of packages to look at; `sys.path` by default.

    Raises:
      ImportError: it is there.

    Example:
      >>> from jarm.core.version import refuse_namesake
      >>> refuse_namesake()
    """
    for other in importlib.metadata.distributions(name="jarm", path=sys.path if path is None else path):
        raise ImportError(
            f"The distribution `jarm` {other.version} is installed in this environment and collides with"
            f" `{DISTRIBUTION}`, which provides this `jarm`: `pip uninstall jarm`, then"
            f" `pip install --force-reinstall --no-deps {DISTRIBUTION}`.",
            name="jarm",
        )
