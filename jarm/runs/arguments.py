"""Words of a command line, and names of options in earlier versions, before anything else is read."""

from __future__ import annotations

from collections.abc import Sequence

from jarm.core.status import JarmError

RENAMED = {"pool": "candidates", "prior": "prior_weight"}
"""Old name -> new name, of options in the folders of earlier versions: their settings, axes and records."""
OLD_OPTIONS = RENAMED | {"jobs": "workers", "together": "vmap_runs"}
"""Options under the names of earlier versions -> their names now."""


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments of the command line that are empty, or name an option as earlier versions did.

    Raises:
      JarmError: there is one.

    Example:
      >>> check_arguments(["compare", "--pool", "500"])
      Traceback (most recent call last):
      jarm.core.status.JarmError: `--pool` is `--candidates` now.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if not argument.strip() or (option.startswith("--") and equals and not value.strip()):
            where = option if option.strip() else before if before.startswith("--") else ""
            raise JarmError(f"`{where or 'an argument'}` is empty: give it a value, or leave it out.")
        if option.startswith("--") and (old := option[2:].replace("-", "_")) in OLD_OPTIONS:
            raise JarmError(f"`{option}` is `--{OLD_OPTIONS[old].replace('_', '-')}` now.")
