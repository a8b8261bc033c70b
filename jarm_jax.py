"""The command `jarm`, started from a module that no `jarm.py` beside the command can hide.

The unrelated distribution `jarm` installs such a script; Python looks in a command's own folder first.
"""

import pathlib
import sys


def main() -> int:
    """Run the command with the package `jarm`; 1 with a sentence where the other distribution is installed."""
    sys.path[:] = [folder for folder in sys.path if not pathlib.Path(folder, "jarm.py").is_file()]
    try:
        from jarm.cli import main as command
    except ImportError as error:
        if error.name != "jarm":
            raise
        print(f"jarm: {error}", file=sys.stderr)
        return 1
    return command()


if __name__ == "__main__":
    sys.exit(main())
