"""`jarm compare`: how fast does each acquisition rule teach a reward model, on these data?

Every rule is run with every seed; a seed fixes the first labels, the candidates drawn and the annotator's opinions,
so rules are compared in pairs. Records are appended run by run, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import pathlib
from typing import Any

from jarm.core.status import JarmError
from jarm.core.streams import say
from jarm.report.curves import by_rule
from jarm.report.figures import learning_curves, require_matplotlib
from jarm.report.summary import write_summary
from jarm.reward.config import unread
from jarm.runs.config import CompareConfig
from jarm.runs.driver import Record, run_jobs
from jarm.runs.grid import Setting
from jarm.runs.jobs import read_jobs
from jarm.studies.backtest import backtest, backtest_of


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run a comparison, or the rest of it, and write its folder.

    Example:
      >>> import pathlib, tempfile
      >>> from jarm import CompareConfig, compare
      >>> sizes = {"rounds": 1, "batch": 5, "initial": 10, "candidates": 100, "head": "linear", "first": "random"}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     summary = compare(CompareConfig(rules="entropy", seeds=1, out=pathlib.Path(folder), **sizes))
      >>> summary["rules"]["entropy"]["labels"]  # random ones, then a batch that entropy chose
      [10.0, 15.0]

    Args:
      config: the settings.

    Returns:
      The summary, as in `summary.json`; of a file of chosen and rejected responses, that of `backtest`.

    Raises:
      JarmError: the settings, the data or the folder are at fault; the message says which and what to do.
    """
    out = pathlib.Path(config.out)
    recorded = backtest_of(config)
    if recorded is not None:
        return backtest(recorded)
    require_matplotlib()  # before the runs, not after them
    jobs = read_jobs([Setting({}, config)])
    if remark := unread(config):
        say(remark)

    def finish(records: list[Record]) -> dict[str, Any]:
        rules = config.rule_names()
        shown = by_rule([line for line in records if line["kind"] == "reference" or line["rule"] in rules], rules)
        try:
            summary = write_summary(shown, out)
            learning_curves(shown, out / "curves")
        except OSError as error:
            raise JarmError(f"Cannot write to {out} ({error}): make room, and give the same command.") from error
        return summary

    return run_jobs(jobs, config, out, finish)
