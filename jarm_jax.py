"""The command `jarm`, started from a module that no `jarm.py` beside the command can hide.

The unrelated distribution `jarm` installs such a script; Python looks in a command's own folder first.
"""

import pathlib
import sys


def main() -> None:
    """Run the command line of this process with the package `jarm`; a sentence beside the other distribution."""
    sys.path[:] = [folder for folder in sys.path if not pathlib.Path(folder, "jarm.py").is_file()]
    try:
        from jarm.cli import command
    except ImportError as error:
        if error.name != "jarm":
            raise
        print(f"jarm: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("jarm: stopped before it began.", file=sys.stderr)
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
