"""The records that `jarm.select` returns, and how they print."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np

from jarm.core.status import printable

SHOWN_ROWS = 10
"""Pairs that `print` shows of a batch."""


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a pair was chosen. A0 is the information that the batch starts from: prior and labelled pairs.

    Attributes:
      first, second: the pair, as in `SelectedBatch.pairs`.
      prompts: its prompt, or both; empty where no prompts were given.
      gain: its gain when it was chosen, in the units of the criterion, not divided by its cost.
      cost: its cost, or None.
      margin: m = reward of the first less reward of the second, in logits.
      margin_sd: sqrt(x^T A0^-1 x), x the difference of features.
      p: sigmoid(m), the probability that the first is preferred.
      p_sd: p (1 - p) margin_sd, the delta method.
      p_low, p_high: sigmoid(m -+ 1.96 margin_sd).
      nearest: row of `labelled` with the most similar question, or None without labelled pairs.
      cosine: |x^T A0^-1 x'| / (margin_sd margin_sd') with that pair: how far an error of one margin is an error of the
        other; 1 for the same question.
    """

    first: int
    second: int
    prompts: tuple[Hashable, ...]
    gain: float
    cost: float | None
    margin: float
    margin_sd: float
    p: float
    p_sd: float
    p_low: float
    p_high: float
    nearest: int | None
    cosine: float | None


@dataclasses.dataclass(frozen=True)
class Certificate:
    """How exact the greedy choices are. docs/selection.md says what that proves and what not.

    Attributes:
      gap: the largest shortfall of any choice, relative to its own gain, that is not ruled out: against the pairs
        outside the shortlist at the time, and the pairs chosen after it. Gains per cost, in float64.
      uncovered: number of choices without a bound on the pairs outside: each was the best of a pass over every pair
        in float32, and nothing more is shown of it.
      passes: number of full passes over the space.
    """

    gap: float
    uncovered: int
    passes: int


@dataclasses.dataclass(frozen=True)
class Swaps:
    """The swaps that exchange made in a greedy batch.

    Attributes:
      made: number of swaps.
      passes: number of full passes over the space that found them.
      gained: gain in log det, in nats.
      optimal: whether no swap of one pair is left that gains more than 1e-4 nats.
    """

    made: int
    passes: int
    gained: float
    optimal: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """The batch as a whole, in float64 from the features as they were given.

    Attributes:
      criterion, space: their names.
      held: number of pairs on offer.
      copies: number of pairs of the space that are not offered, because their responses have equal features.
      log_det_before, log_det_after: log det of the information A, in nats, without and with the batch.
      upper: upper bound on the log det of every batch of as many pairs of the space, in nats; None where it was not
        computed.
      efficiency: D-efficiency exp((log_det_after - upper) / F): at least the share of labels with which the best batch
        could do as well; or None.
      certificate: how exact the greedy choices are; None where swaps have changed them.
      swaps: swaps made, or None where none were asked for.
      per_prompt: prompt -> number of pairs with a response of it, largest first; empty without prompts.
      per_response: response -> number of pairs with it, largest first.
      cost: cost of the whole batch, or None.
      status: the outcome in words; "Complete." where there are as many pairs as were asked for.
    """

    criterion: str
    space: str
    held: int
    copies: int
    log_det_before: float
    log_det_after: float
    upper: float | None
    efficiency: float | None
    certificate: Certificate | None
    swaps: Swaps | None
    per_prompt: dict[Hashable, int]
    per_response: dict[int, int]
    cost: float | None
    status: str


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SelectedBatch:
    """Pairs to label, in the order of choice; `print` shows them.

    Attributes:
      pairs: `[k, 2]` int64, indices of responses as the caller numbers them, smaller first.
      gains: `[k]` float64, the gain of each pair when it was chosen, in the units of the criterion: nats of log det for
        `d`.
      why: the reason for each pair.
      report: the batch as a whole.

    Example:
      >>> import jarm, numpy as np
      >>> features = np.array([[0, 0], [1, 0], [3, 0], [0, 0], [0, 1], [0, 2]])
      >>> prompts = list("aaabbb")
      >>> print(jarm.select(features, space="within", prompts=prompts, k=2, prior_precision=1))
         first  second   gain     p          95 %  prompt
      1      0       2   1.18  0.50  0.00 to 1.00  a
      2      3       5  0.693  0.50  0.02 to 0.98  b
      2 of 6 pairs (within), criterion d: log det 0.00 to 1.87 (+1.87 nats).
      Greedy choices certified to a relative gap of 0.0e+00; 1 pass over every pair.
      2 prompts, at most 1 pair with one (a); 4 responses, at most 1 pair with one (0).
    """

    pairs: np.ndarray
    gains: np.ndarray
    why: tuple[Reason, ...]
    report: Report

    def to_rows(self) -> list[dict[str, Any]]:
        """One dictionary per pair, of values that JSON can hold; strings and numbers as prompts stay as they are."""
        return [
            {"rank": rank, **vars(reason), "prompts": [_plain(name) for name in reason.prompts]}
            for rank, reason in enumerate(self.why, start=1)
        ]

    def __repr__(self) -> str:
        return _table(self)


def _plain(name: Any) -> Any:
    return name.item() if isinstance(name, np.generic) else name


def _table(batch: SelectedBatch) -> str:
    """The first rows, then a summary; at most 100 columns wide without the names of prompts."""
    report = batch.report
    head = ["", "first", "second", "gain", "p", "95 %"]
    head += ["cost"] if report.cost is not None else []
    head += ["nearest label"] if any(reason.nearest is not None for reason in batch.why) else []
    head += ["prompt"] if report.per_prompt else []
    rows = [head]
    for rank, reason in enumerate(batch.why[:SHOWN_ROWS], start=1):
        row = [str(rank), str(reason.first), str(reason.second), f"{reason.gain:.3g}", f"{reason.p:.2f}"]
        row.append(f"{reason.p_low:.2f} to {reason.p_high:.2f}")
        row += [f"{reason.cost:.3g}"] if reason.cost is not None else []
        row += [f"{reason.nearest} ({reason.cosine:.2f})"] if reason.nearest is not None else []
        row += [" | ".join(_short(name) for name in reason.prompts)] if report.per_prompt else []
        rows.append(row)
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    left = head.index("prompt") if report.per_prompt else len(head)
    lines = [
        "  ".join(
            cell.ljust(width) if place == left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if len(batch.why) > SHOWN_ROWS:
        lines.append(f"... and {len(batch.why) - SHOWN_ROWS:,} more")
    return "\n".join([*lines, *_summary(batch)])


def _short(name: object) -> str:
    shown = printable(str(name).replace("\n", " "))
    return shown if len(shown) <= 20 else shown[:17] + "..."


def _pairs(count: int) -> str:
    return f"{count:,} pair{'s' if count > 1 else ''}"


def _summary(batch: SelectedBatch) -> list[str]:
    report, certificate = batch.report, batch.report.certificate
    grown = report.log_det_after - report.log_det_before
    lines = [
        f"{len(batch.pairs):,} of {report.held:,} pairs ({report.space}), criterion {report.criterion}: log det "
        f"{report.log_det_before:.2f} to {report.log_det_after:.2f} ({grown:+.2f} nats)."
    ]
    if report.copies:
        lines.append(f"Not offered: {_pairs(report.copies)} of responses with equal features.")
    if report.efficiency is not None:
        lines.append(f"No batch has more than {report.upper:.2f}: D-efficiency at least {report.efficiency:.1%}.")
    if certificate is not None:
        exact = f"Greedy choices certified to a relative gap of {certificate.gap:.1e}"
        if certificate.uncovered:
            exact += f", {certificate.uncovered:,} of them only as the best of a pass in float32"
        lines.append(f"{exact}; {certificate.passes:,} pass{'es' if certificate.passes > 1 else ''} over every pair.")
    if report.swaps is not None:
        best = "; no swap of one pair gains more" if report.swaps.optimal else ""
        lines.append(f"{report.swaps.made:,} swaps gained {report.swaps.gained:.3g} nats{best}.")
    response, times = next(iter(report.per_response.items()))
    used = f"{len(report.per_response):,} responses, at most {_pairs(times)} with one ({response})"
    if report.per_prompt:
        prompt, often = next(iter(report.per_prompt.items()))
        used = f"{len(report.per_prompt):,} prompts, at most {_pairs(often)} with one ({_short(prompt)}); " + used
    lines.append(used + (f"; cost {report.cost:.6g}." if report.cost is not None else "."))
    return lines if report.status == "Complete." else [*lines, report.status]
