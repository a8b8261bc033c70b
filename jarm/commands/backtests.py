"""The command on pairs that are labelled already: backtest."""

from __future__ import annotations

from typing import Annotated

import tyro

from jarm.commands.experiments import show_comparison
from jarm.commands.options import built_by
from jarm.core.compiled import keep_compiled
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
    show_comparison(backtest(config), config.out)
