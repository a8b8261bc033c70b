"""The text of `summary.md`: a comparison or a sweep in words and tables."""

from __future__ import annotations

import math
import re
from typing import Any

from jarm.core.files import plain
from jarm.core.status import printable
from jarm.report.curves import ACCURACY, METRIC, WORDS, valued
from jarm.report.statistics import interval, number

EFFECT = 0.01
"""Difference in mean Spearman for which the number of seeds is planned."""
BATCH_COLUMNS = {
    "batch_diversity_log_det": "log det",
    "batch_diversity_distance": "mean distance",
    "batch_distinct_responses": "responses",
    "batch_distinct_prompts": "prompts",
    "batch_mean_fisher_weight": "Fisher weight",
    "batch_mean_member_variance": "variance",
    "batch_mean_gold_gap": "gold gap",
    "label_error": "wrong labels",
    "seconds": "s per run",
}
"""Record field -> column of the table of what each rule selects."""
OF_GOLD = ("batch_mean_gold_gap", "label_error")
"""Those that need gold rewards."""
# Signs that Markdown obeys, underscores inside a word excepted.
_MARKS = re.compile(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def comparison_text(summary: dict[str, Any]) -> str:
    """`summary.md` of a comparison.

    Args:
      summary: the result of `jarm.report.summary.summarise`, and its `settings` if any.
    """
    rules, baseline, best, metric = (summary[name] for name in ("rules", "baseline", "best_of", "metric"))
    best_name = f"best of {best[8:]}" if best else "best of n"
    settings = summary.get("settings", {})
    lines = [
        f"**{escaped(summary['answer'])}**",
        "",
        *_left(summary["left_to_learn"] and summary["left_to_learn"]["sentence"]),
        *_verdicts(rules, baseline),
        *_learning(rules, baseline, best_name, summary["best_of_left_out"], metric),
        *_selected(rules),
        *_noise_free(rules),
        *_reference_lines(summary["reference"], {best: best_name} if best else {}, metric),
        *_provenance({**settings, **summary["provenance"]}),
    ]
    return "\n".join(lines) + "\n"


def _verdicts(rules: dict[str, Any], baseline: str) -> list[str]:
    """The title, and a line for each rule."""
    counts = sorted({row["seeds"] for row in rules.values()})
    seeds = " to ".join(str(count) for count in ([counts[0], counts[-1]] if len(counts) > 1 else counts)) or "no"
    title = f"# {len(rules)} acquisition rules, {seeds} seed{'s' * (counts != [1])}"
    return [
        title,
        "",
        *(f"- **{escaped(rule)}**: {row['verdict']}{_notes(row, baseline)}" for rule, row in rules.items()),
    ]


def _learning(rules: dict[str, Any], baseline: str, best_name: str, left_out: int, metric: str) -> list[str]:
    """The table of learning curves, and how to read it."""
    word, two_way = WORDS[metric], any("test_prompts" in row for row in rules.values())
    names = ("area", "final") if two_way else ("area", "final", "final_best_of")
    head = [
        "rule",
        f"area under {word} curve",
        f"final {word}",
        f"final {best_name}",
        f"labels to {baseline}'s final value",
        "all rules together",
        f"seeds to see {number(EFFECT, 2)}",
    ]
    rows = [
        [
            rule,
            *(_cell(row, name, rule == baseline) for name in names),
            row.get("labels_needed", "-"),
            *_simultaneous(row),
        ]
        for rule, row in rules.items()
    ]
    if two_way:
        head, rows = [*head[:3], *head[4:6]], [row[:5] for row in rows]
    legend = _legend(baseline, two_way)
    if metric == METRIC:
        legend += (
            " Where a model leaves the Spearman correlation of a test prompt undefined (predictions all equal, "
            "or not a number), it counts as 0."
        )
    lines = ["", "## How fast each rule teaches", "", *table(head, rows), "", legend]
    if left_out:
        prompts = f"{left_out} test prompt{'s' * (left_out > 1)}"
        note = f"The {best_name} leaves out {prompts}, with fewer responses or predictions that are not a number."
        lines += ["", note]
    return lines


def _legend(baseline: str, two_way: bool) -> str:
    """How to read the table of learning curves, whose intervals are over seeds, or over seeds and test prompts."""
    over = "over seeds and held-out prompts" if two_way else "bootstrap interval over seeds"
    said = (
        f"{baseline}: mean over seeds (95 % interval). Others: mean, then the difference from {baseline} on the same "
        f"seeds (95 % {over}, of that rule alone). The area is the mean height of the learning "
        "curve over label counts. Labels are read off the curve averaged over seeds, where it first reaches the value "
        f"that {baseline} ends with; in brackets, the interval of how many times fewer than {baseline} needs, or more. "
        "All rules together: the difference in area, with intervals that all hold at once with 95 % (Bonferroni's, by "
        "Student's t)."
    )
    if two_way:
        return (
            f"{said} Intervals take in the choice of held-out prompts beside that of seeds, and those of labels allow "
            "for all rules; training prompts are fixed."
        )
    return (
        f"{said} Seeds: how many would see a difference in area of {number(EFFECT, 2)} with a chance of 80 % at "
        "the 5 % level, by the spread of these. Intervals are over label seeds only: training and test prompts are "
        "fixed."
    )


def _selected(rules: dict[str, Any]) -> list[str]:
    """The table of the batches that each rule selects."""
    has_gold = any(row.get("batch_mean_gold_gap") is not None for row in rules.values())
    columns = {name: word for name, word in BATCH_COLUMNS.items() if has_gold or name not in OF_GOLD}
    rows = [[rule, *(_number(row.get(name)) for name in columns)] for rule, row in rules.items()]
    legend = (
        "Means over rounds and seeds. log det and mean distance: diversity of a batch in embedding space; responses "
        "and prompts: how many distinct ones a batch holds; Fisher weight: p (1 - p) under the model that chose; "
        "variance: of a pair's reward difference over the members of the ensemble"
    )
    gold = (
        "; gold gap: between the two responses, in units of the scale of gold; wrong labels: share of all labels that "
        "go against the gold order"
    )
    legend += f"{gold * has_gold}. s per run: wall time of a whole run, other runs beside it."
    return ["", "## What each rule selects", "", *table(["rule", *columns.values()], rows), "", legend]


def _left(sentence: str | None) -> list[str]:
    """A paragraph on what is left to learn, if there is something to say."""
    return [escaped(sentence), ""] if sentence else []


def _noise_free(rules: dict[str, Any]) -> list[str]:
    """The table of noise-free refits; nothing where runs of earlier versions have none."""
    rows = [
        [rule, *(_cell(row, name, baseline=True) for name in ("final", "noise_free")), _gain(row, "noise_free_gain")]
        for rule, row in rules.items()
        if "noise_free" in row
    ]
    legend = (
        "Noise-free refit: the last fit once more, to the same pairs, each with the annotator's probability to prefer "
        "its first response as its label, as if very many annotators had answered it. What it gains, noise of the "
        "labels had cost (variance). What it still lacks, pairs and head cost (bias): a rule whose refit is below that "
        "of another has chosen pairs that teach less."
    )
    head = ["rule", "final Spearman", "with noise-free labels", "difference"]
    return ["", "## With noise-free labels", "", *table(head, rows), "", legend] if rows else []


def _reference_lines(references: dict[str, Any], best: dict[str, str], metric: str) -> list[str]:
    """The table of scores without labels."""
    columns = {metric: WORDS[metric], **best, ACCURACY: "pair accuracy", "nll": "nll"}
    rows = [[name, *(_number(plain(valued(line, key))) for key in columns)] for name, line in references.items()]
    legend = (
        "First component: the direction in which embeddings of responses to one prompt differ most, with the sign by "
        "which it agrees with gold on training prompts: one bit of gold. Ceiling: what all gold rewards of training "
        "prompts teach a linear head, by ridge regression, with the ridge that best predicts training prompts left out."
    )
    lines = ["", "## Reference lines", "", *table(["line", *columns.values()], rows)]
    return [*lines, "", legend] if "ceiling" in references else lines


def _provenance(settings: dict[str, Any]) -> list[str]:
    return [
        "",
        "## Settings and provenance",
        "",
        *(f"- {escaped(name)}: {_inline(value)}" for name, value in settings.items()),
    ]


def sweep_text(summary: dict[str, Any]) -> str:
    """`summary.md` of a sweep.

    Args:
      summary: the result of `jarm.report.summary.write_sweep_summary`.
    """
    axes = list(summary["settings"][0]["axes"]) if summary["settings"] else []
    baseline, settings, failures = summary["baseline"], summary["settings"], summary["failures"]
    runs = sum(row["seeds"] for setting in settings for row in setting["rules"].values())
    lines = [
        f"**{escaped(summary['answer'])}**",
        "",
        *_left(summary["left_to_learn"]),
        f"# {_count(len(settings), 'setting')}, {_count(runs, 'whole run')}",
        "",
    ]
    said = [(each["axes"], each["left_to_learn"]) for each in settings]
    said = [(axes, left["sentence"]) for axes, left in said if left and left["sentence"]]
    if said:
        lines += [*(f"- {_inline(axes)}: {escaped(sentence)}" for axes, sentence in said), ""]
    if failures:
        lines += [*(f"- {_count(count, 'run')} failed: {escaped(failure)}" for failure, count in failures.items()), ""]
    last = ["area under Spearman curve", "final Spearman", "noise-free refit", f"labels to {baseline}'s end"]
    rows = [
        [
            *(str(value) for value in setting["axes"].values()),
            rule,
            str(row["seeds"]),
            str(row["failed_seeds"] or ""),
            *(_cell(row, name, rule == baseline) for name in ("area", "final")),
            _number(row["noise_free"]["mean"]) if "noise_free" in row else "-",
            row.get("labels_needed", "-"),
        ]
        for setting in settings
        for rule, row in setting["rules"].items()
    ]
    legend = (
        f"{baseline}: mean over seeds (95 % interval). Others: mean, then the difference from {baseline} in the same "
        "setting on the same seeds (95 % bootstrap interval over seeds; not corrected for comparing many). The area is "
        "the mean height of the learning curve over label counts."
    )
    lines += [*table([*axes, "rule", "seeds", "failed", *last], rows), "", legend]
    return "\n".join([*lines, *_provenance({**summary["config"], **summary["provenance"]})]) + "\n"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _notes(row: dict[str, Any], baseline: str) -> str:
    notes = []
    if row["paired_seeds"] < row["seeds"]:
        notes.append(f"compared on the {row['paired_seeds']} of its {row['seeds']} seeds that {baseline} has too")
    if row["unfinished_seeds"]:
        notes.append(f"{row['unfinished_seeds']} unfinished left out")
    if row["failed_seeds"]:
        notes.append(f"{row['failed_seeds']} failed: {escaped(row['failure'])}")
    if row.get("least_spearman_share", 1) < 1:
        share = math.floor(100 * row["least_spearman_share"])
        notes.append(f"ranks only {share}% of the test prompts in some round, the others count as Spearman 0")
    return f" [{'; '.join(notes)}]" if notes else ""


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _cell(row: dict[str, Any], name: str, baseline: bool) -> str:
    if row.get(name) is None:
        return "-"
    if baseline or f"{name}_gain" not in row:
        mean, low, high = (_float(row[name][key]) for key in ("mean", "low", "high"))
        return f"{number(mean)} {interval(low, high)}" if row["seeds"] > 1 else number(mean)
    return f"{_number(row[name]['mean'])}, {_gain(row, f'{name}_gain')}"


def _gain(row: dict[str, Any], name: str) -> str:
    mean, low, high = (_float(row[name][key]) for key in ("mean", "low", "high"))
    ends = f" {interval(low, high)}" if row["paired_seeds"] > 1 else ""
    return f"{'+' if mean >= 0 else ''}{number(mean)}{ends}"


def _simultaneous(row: dict[str, Any]) -> list[str]:
    """Two cells: the gain with its simultaneous interval, and the number of seeds that would see `EFFECT`."""
    if row.get("area_gain_together") is None:
        return ["-", "-"]
    seeds = row["seeds_to_see"]
    return [_gain(row, "area_gain_together"), "-" if seeds is None else f"{seeds:,.0f}"]


def _inline(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(_inline(each) for each in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{escaped(name)} {_inline(each)}" for name, each in value.items()) or "-"
    return "-" if value is None else code(value)


def escaped(text: object) -> str:
    r"""A text of others as one line of Markdown, in a table or elsewhere, that shows it as it is.

    Example:
      >>> print(escaped("a|b <script> *c* my_rules.py:best_rule"))
      a\|b &lt;script&gt; \*c\* my_rules.py:best_rule
    """
    line = _MARKS.sub(r"\\\g<0>", printable(text).replace("&", "&amp;"))
    return line.replace("<", "&lt;").replace(">", "&gt;")


def code(text: object) -> str:
    """A text of others as code in a line of Markdown, fenced by more backticks than it has in a row."""
    line = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    room = " " if len(fence) > 1 else ""
    return f"{fence}{room}{line}{room}{fence}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table in Markdown, whose cells show their text as it is."""
    lines = [[escaped(cell) for cell in row] for row in (head, *rows)]
    return ["| " + " | ".join(row) + " |" for row in (lines[0], ["---"] * len(head), *lines[1:])]
