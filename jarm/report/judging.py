"""What `jarm evaluate` and `jarm diff` found, as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


class Measure(NamedTuple):
    """How a measure stands in tables.

    Attributes:
      title: its name in words.
      units: counts that may stand before it; the first that is known does.
      numbers: key -> title of numbers that stand behind it, where they are known.
    """

    title: str
    units: tuple[str, ...]
    numbers: Mapping[str, str]


MEASURES = {
    "accuracy": Measure(
        "accuracy",
        ("items", "pairs"),
        {"majority": "majority", "nll": "loss", "calibration_error": "calibration error"},
    ),
    "spearman": Measure("Spearman", ("prompts",), {}),
    "best_of_n": Measure("best of n", ("prompts",), {"random_of_n": "any", "oracle_of_n": "the best"}),
}


def evaluation_text(summary: Mapping[str, Any]) -> str:
    """The results of `jarm evaluate`: what was read, then for each measure a table with a line per subset.

    Args:
      summary: as `evaluate` returns it.
    """
    whole = "mean of subsets" if summary["score"] is not None and not summary["sections"] else "all"
    rows = {**summary["subsets"], whole: summary["overall"]}
    lines = [printable(summary["read_as"])]
    for name, measure in MEASURES.items():
        if name in summary["overall"]:
            lines += ["", *_measured(name, measure, rows)]
    if summary["sections"]:
        scored = dict(summary["sections"]) | ({} if summary["score"] is None else {"mean": summary["score"]})
        body = [[section, estimate(row), estimate(row["length"])] for section, row in scored.items()]
        lines += ["", *aligned(["section", "accuracy", "longer response"], body)]
    return "\n".join(lines)


def _measured(name: str, measure: Measure, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of a measure."""
    first = next(iter(rows.values()))
    unit = next(unit for unit in measure.units if unit in first)
    numbers = {key: title for key, title in measure.numbers.items() if key in first}
    body = []
    for subset, row in rows.items():
        cells = [subset, f"{row[unit]:,}", estimate(row[name]), estimate((row["length"] or {}).get(name))]
        body.append([*cells, *("-" if row[key] is None else number(row[key]) for key in numbers)])
    return aligned(["subset", unit, measure.title, "longer response", *numbers.values()], body)


def _distance(value: float | None) -> str:
    return "not known" if value is None or math.isnan(value) else f"{value:.3f}"


def diff_text(summary: Mapping[str, Any]) -> str:
    """The results of `jarm diff`, in sentences, and the pairs that differ most.

    Args:
      summary: as `diff` returns it.
    """
    tied = summary["tied"]
    lines = [
        f"A is {printable(summary['a'])}, B is {printable(summary['b'])}; {summary['responses']:,} responses to "
        f"{summary['prompts']:,} prompts of {printable(summary['data'])}.",
        "",
        f"distance {_distance(summary['distance'])}, from 0 (the same but for a factor and offsets per prompt) to 1 "
        "(reverse)",
        f"pairs within prompts ordered alike {estimate(summary['agreement'])}, of {summary['pairs']:,} less those tied "
        f"by A {tied['a']:,}, by B {tied['b']:,}, by both {tied['both']:,}",
        f"Spearman within prompts {estimate(summary['spearman'])}",
    ]
    for each in summary["differ"]:
        first, second = each["first"], each["second"]
        sides = [
            [f"  {name}", *(f"{side[key]:.2f}" for key in ("a", "b")), side["place"]]
            for name, side in (("1", first), ("2", second))
        ]
        lines += ["", f"{each['width']:.1f} standard deviations apart; prompt: {each['prompt']}"]
        lines += aligned(["  ", "A", "B", "place"], sides)
        lines += [f"  1: {first['text']}", f"  2: {second['text']}"]
    return "\n".join(lines)
