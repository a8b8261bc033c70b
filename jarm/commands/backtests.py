"""The command on pairs that are labelled already: backtest."""

from __future__ import annotations

from typing import Annotated

import tyro

from jarm.commands.options import built_by
from jarm.core.compiled import keep_compiled
from jarm.core.status import JarmError
from jarm.core.streams import show
from jarm.studies.backtest import BacktestConfig, backtest


def backtest_command(
    config: Annotated[
        BacktestConfig, tyro.conf.OmitArgPrefixes, built_by(BacktestConfig, positional={"data": "PAIRS"})
    ],
) -> None:
    """Ask whether choosing by a rule would have saved labels on pairs that people have labelled already.

    PAIRS is a file with columns chosen and rejected, or two responses with --label or --votes. A rule may ask about its
    training pairs only, and gets the recorded label; models are judged by the pairs of other prompts.

    jarm backtest pairs.parquet --embeddings out/embeddings --out out/backtest
    """
    keep_compiled()
    summary = backtest(config)
    left = summary["left_to_learn"] and summary["left_to_learn"]["sentence"]
    show(f"{summary['answer']} {left or ''}".rstrip() + "\n")
    for rule, row in summary["rules"].items():
        failed = f" [{row['failed_seeds']} failed: {row['failure']}]" if row["failed_seeds"] else ""
        show(f"{rule:>18}  {row['verdict']}{failed}")
    show(f"\n{config.out / 'summary.md'}")
    if lost := [rule for rule, row in summary["rules"].items() if row["failed_seeds"] and not row["seeds"]]:
        raise JarmError(f"No run of {', '.join(lost)} ran to its end, for the reason above.")
