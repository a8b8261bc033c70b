"""What `jarm evaluate` and `jarm diff` found, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jarm.core.status import printable
from jarm.report.statistics import interval, number


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, the first column on the left and the others on the right; cells show their text as it is.

    Example:
      >>> aligned(["subset", "pairs"], [["Focus", "12"]])
      ['subset  pairs', 'Focus      12']
    """
    cells = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    lines = []
    for first, *others in cells:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *right]))
    return lines


def estimate(found: Mapping[str, float | None] | None) -> str:
    """A number and its interval, `.783 (.756 to .811)`; without the interval where it is not known, `-` for none.

    Args:
      found: as `clustered_mean` returns it, with None for NaN.

    Example:
      >>> estimate({"mean": 0.75, "low": None, "high": None})
      '.750'
    """
    if found is None or found["mean"] is None:
        return "-"
    low, high = found["low"], found["high"]
    return number(found["mean"]) + ("" if low is None or high is None else f" {interval(low, high)}")


MEASURES = {"accuracy": "accuracy", "spearman": "Spearman", "best_of_n": "best of n"}
NUMBERS = {"nll": "loss", "calibration_error": "calibration error", "random_of_n": "any", "oracle_of_n": "the best"}


def evaluation_text(summary: Mapping[str, Any]) -> str:
    """The results of `jarm evaluate`: what was read, then a line for each subset, each section and the whole.

    Args:
      summary: as `evaluate` returns it.
    """
    overall, sections = summary["overall"], dict(summary["sections"])
    rows = {**summary["subsets"], "overall": overall}
    count = next(name for name in ("items", "pairs", "prompts") if name in overall)
    measures = [name for name in MEASURES if name in overall]
    numbers = [name for name in NUMBERS if overall.get(name) is not None]
    head = ["subset", count]
    for name in measures:
        head += [MEASURES[name], "longer response"]
    body = []
    for subset, row in rows.items():
        cells = [subset, f"{row[count]:,}"]
        for name in measures:
            cells += [estimate(row[name]), estimate((row["length"] or {}).get(name))]
        body.append(cells + ["-" if row[name] is None else number(row[name]) for name in numbers])
    lines = [printable(summary["read_as"]), "", *aligned(head + [NUMBERS[name] for name in numbers], body)]
    if summary["score"] is not None:
        sections["score"] = summary["score"]
    if sections:
        scored = [[name, estimate(row), estimate(row["length"])] for name, row in sections.items()]
        lines += ["", *aligned(["section", "accuracy", "longer response"], scored)]
    return "\n".join(lines)
