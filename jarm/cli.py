"""The `jarm` command."""

from __future__ import annotations

import pathlib
import sys
from typing import Annotated

import jax
import tyro

from jarm.acquisition.registry import RULES
from jarm.base import JarmError
from jarm.compare import CompareConfig, compare


def _compare(config: Annotated[CompareConfig, tyro.conf.OmitArgPrefixes]) -> None:
    """Compare acquisition rules: how fast does each teach a reward model, and does it beat random here?

    With no options it runs on built-in data and takes about two minutes. Records are appended run by run: interrupt
    it as you like, and the same command goes on. On your own data:

    jarm compare --data responses.parquet --embeddings embeddings.npy --target score --out out/mine
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        # A comparison that goes on, or differs only in numbers, need not compile again.
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "jarm" / "compiled"))
    summary = compare(config)
    for rule, row in summary["rules"].items():
        print(f"{rule:>18}  {row['verdict']}")
    print(f"\n{config.out / 'summary.md'}\n{config.out / 'curves.png'}")


def _rules() -> None:
    """List the acquisition rules."""
    for name, entry in RULES.items():
        needs = [need for need, has in (("past labels", entry.past), ("a prior", entry.prior)) if has]
        print(
            f"{name:<18} {entry.summary}\n{'':<18} cost {entry.cost}; looks at {', '.join(needs) or 'the pool alone'}"
        )


def main(args: list[str] | None = None) -> int:
    """Entry point: 0 if all went well, 1 with one sentence on standard error if not."""
    try:
        tyro.extras.subcommand_cli_from_dict({"compare": _compare, "rules": _rules}, prog="jarm", args=args)
    except JarmError as error:
        print(f"jarm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\njarm: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
