"""What the studies of the suite share: their command line, their runs, and how their numbers are read.

A study is a file: a docstring that says Claim, Command, Hardware, Time and Expected, and a `Study`. It can be run by
itself, or by `reproduce_all.py` with all the others.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

from jarm import CompareConfig, JarmError, SweepConfig, sweep
from jarm.core.compiled import keep_compiled
from jarm.core.files import write_whole
from jarm.report.curves import METRIC, area, best_of_names, curves, runs_of
from jarm.report.figures import drawing, short_names, style_of
from jarm.report.markdown import code, escaped
from jarm.report.markdown import table as markdown_table
from jarm.report.statistics import bootstrap_ci, interval, number, simultaneous_ci
from jarm.report.summary import PROVENANCE, summarise
from jarm.runs.config import PAPER
from jarm.runs.grid import expand
from jarm.runs.records import read_records

Records = list[dict[str, Any]]
Rows = list[list[str]]

TRIO = "random,dopt,greedy_dopt"
"""The baseline, the released rule, and what it approximates: where a study varies something else."""
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "rounds": 2,
        "batch": 5,
        "initial": 10,
        "candidates": 200,
        "steps": 20,
        "head": "mlp:8,8,8",
        "members": 2,
        "folds": 1,
    },
    "full": {},
    # The paper's protocol, as far as it is known; rounds, initial labels and noise are settings, and may differ.
    "published": {
        "prompts": 500,
        "candidates": 20_000,
        "batch": 500,
        "initial": 500,
        "rounds": 10,
        "head": "mlp:512,512,512",
        "steps": 1000,
        "holdout": 0.0,
        "weight_decay": 0.0,
    },
}
SOURCES = {"embeddings": "embeddings", "targets": "target", "gen": "gen", "emb": "emb", "task": "task"}
"""Options that say which data -> the option of `jarm compare`; several values of one are panels of a figure."""
STOPPED = "stopped; the same command goes on from here."
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot say"
SEEDS = 5
"""Fewer have intervals that are too narrow, so that nothing is said."""
SAME = 0.01
"""A change in Spearman that is taken for none."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings. Lists are separated by commas.

    Attributes:
      data: "synthetic", a table (Parquet or JSONL), or a folder in the published layout.
      embeddings: of a table: .npy arrays, or stores; each is a panel.
      targets: of a table: columns of gold rewards; each is a panel.
      gen: of a folder: generating models; each is a panel.
      emb: of a folder: embedding models; each is a panel.
      task: of a folder: tasks; each is a panel.
      size: "small" only shows that it runs; "full" suits tables of some hundred prompts, and the built-in data;
        "published" is the paper's protocol, for the authors' arrays.
      seeds: of each run; 0 takes the study's own number.
      out: folder; a folder inside for each study. The same command goes on where it was stopped.
      workers: runs at a time; 0 takes one a core.
    """

    data: str = "synthetic"
    embeddings: str | None = None
    targets: str | None = None
    gen: str | None = None
    emb: str | None = None
    task: str | None = None
    size: Literal["small", "full", "published"] = "full"
    seeds: int = 0
    out: pathlib.Path = pathlib.Path("out/suite")
    workers: int = 0

    def seeds_of(self, own: int) -> int:
        """How many seeds a study runs that would by itself run so many."""
        return self.seeds or {"small": 2, "full": own, "published": SEEDS}[self.size]


class Reading(NamedTuple):
    """What some records say of a claim: `verdict` is HOLDS, FAILS or OPEN, `why` has the numbers."""

    claim: str
    verdict: str
    why: str


@dataclasses.dataclass(frozen=True)
class Study:
    """One question of the suite.

    Attributes:
      letter: its place in the suite.
      name: of its file and its folder.
      title: a few words.
      text: the docstring of its file.
      records: makes the runs, or what is left of them, and returns their records.
      figure: draws the records into a path stem.
      table: rows of text, the first of them the head.
      readings: the records held against claims.
    """

    letter: str
    name: str
    title: str
    text: str
    records: Callable[[Config], Records]
    figure: Callable[[Records, pathlib.Path], object]
    table: Callable[[Records], Rows]
    readings: Callable[[Records], list[Reading]]

    def said(self, heading: str) -> str:
        """What the docstring says under a heading such as Claim."""
        found = re.search(rf"^{heading}\s+(.*?)(?=^\S|\Z)", inspect.cleandoc(self.text), re.DOTALL | re.MULTILINE)
        return " ".join(found[1].split()) if found else ""


class Outcome(NamedTuple):
    """A study that was run.

    Attributes:
      study: which.
      rows: its table.
      readings: its claims.
      seconds: wall time of its runs, of earlier commands that ended too.
      failures: sentence -> how many runs it ended.
      provenance: device, versions, commit -> the values that records have.
    """

    study: Study
    rows: Rows
    readings: list[Reading]
    seconds: float
    failures: dict[str, int]
    provenance: dict[str, list[Any]]

    def made_with(self) -> str:
        """The provenance in words."""

        def words(value: Any) -> str:
            return ", ".join(" ".join(each) for each in value.items()) if isinstance(value, dict) else str(value)

        found = ((name, " / ".join(filter(None, map(words, values)))) for name, values in self.provenance.items())
        return "; ".join(f"{name}: {values}" for name, values in found if values)


def figure_stem(config: Config, study: Study) -> pathlib.Path:
    """Where the figure of a study lies, without its suffix."""
    return config.out / study.name / study.name


# Runs.


def sweep_of(
    config: Config, name: str, seeds: int, grid: Mapping[str, Any] | None = None, **options: Any
) -> SweepConfig:
    """The sweep of a study: its grid over the chosen data, at the chosen size.

    Args:
      config: the command line.
      name: of the folder.
      seeds: how many at full size.
      grid: the axes that the study is about.
      options: of `jarm compare` that differ from those of the size.
    """
    given = {option: getattr(config, field) for field, option in SOURCES.items()}
    lists = {
        option: [each.strip() for each in value.split(",")] for option, value in given.items() if value is not None
    }
    single = {option: values[0] for option, values in lists.items() if len(values) == 1}
    base = {"data": config.data, "out": config.out / name, "workers": config.workers, "seeds": config.seeds_of(seeds)}
    panels = {option: values for option, values in lists.items() if len(values) > 1}
    options = {**PAPER, **SIZES[config.size], **base, **single, **options}
    return SweepConfig(CompareConfig(**options), {**panels, **(grid or {})})


def records_of(config: SweepConfig) -> Records:
    """Run a sweep, or what is left of it, and read what belongs to it, in the order of its grid.

    Its folder may hold more. Files of embeddings are named by what tells them apart.
    """
    sweep(config)
    here = {tuple(setting.axes.values()): place for place, setting in enumerate(expand(config))}
    rules, seeds = config.base.rule_names(), config.base.seeds

    def belongs(line: dict[str, Any]) -> bool:
        if line["kind"] == "reference":  # it has only the axes that choose its table
            return all(line.get(axis, values[0]) in values for axis, values in config.grid.items())
        return line["rule"] in rules and line["seed"] < seeds and tuple(line[axis] for axis in config.grid) in here

    def place(line: dict[str, Any]) -> tuple[int, int]:
        if line["kind"] == "reference":
            return len(here), 0
        return here[tuple(line[axis] for axis in config.grid)], rules.index(line["rule"])

    lines = read_records(config.base.out, tuple(config.grid))
    files = config.grid.get("embeddings", [])
    short = dict(zip(files, short_names(files), strict=True))
    return [
        line | ({"embeddings": short[line["embeddings"]]} if files else {})
        for line in sorted(filter(belongs, lines), key=place)
    ]


def kept(path: pathlib.Path, settings: dict[str, Any], make: Callable[[], Records]) -> Records:
    """Records of a study that is no sweep: made once, and again only if its settings change."""
    if path.is_file():
        there = json.loads(path.read_text("utf-8"))
        if there["settings"] == settings:
            return list(there["records"])
    records = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"settings": settings, "records": records}) + "\n")
    return records


# Numbers.


def panel_of(record: Mapping[str, Any]) -> str:
    """The data of a record of `records_of` in words, as far as there are several."""
    return ", ".join(record[option] for option in SOURCES.values() if record.get(option) is not None)


def panels(records: Records) -> dict[str, Records]:
    """Panel -> its records."""
    found: dict[str, Records] = {}
    for record in records:
        found.setdefault(panel_of(record), []).append(record)
    return found


def settings(records: Records, axis: str | None) -> dict[tuple[str, Any], Records]:
    """(panel, value on the axis) -> its records, but for those of references."""
    found: dict[tuple[str, Any], Records] = {}
    for record in records:
        if record["kind"] != "reference":
            found.setdefault((panel_of(record), record[axis] if axis else None), []).append(record)
    return found


Scores = dict[tuple[str, Any, str], dict[int, float]]
"""(panel, value on the axis, rule) -> seed -> a number."""


def areas(records: Records, axis: str | None = None) -> Scores:
    """Mean Spearman over labels: the height of the learning curve."""
    return _scores(records, axis, lambda run, _: area(run))


def finals(records: Records, axis: str | None = None, metric: str = METRIC) -> Scores:
    """A metric at the end; "best_of" is the one of the most responses."""

    def take(run: Records, best: str | None) -> float:
        name = best if metric == "best_of" else metric
        return float(curves({0: run}, name, [0])[0, -1]) if name else math.nan

    return _scores(records, axis, take)


def _scores(records: Records, axis: str | None, take: Callable[[Records, str | None], float]) -> Scores:
    scores: Scores = {}
    for (panel, value), own in settings(records, axis).items():
        best = (best_of_names(own) or [None])[-1]
        for rule, runs in runs_of(own).items():
            scores[panel, value, rule] = {seed: take(run, best) for seed, run in runs.items()}
    return scores


def differences(
    scores: Mapping[Any, Mapping[int, float]], pairs: Mapping[str, tuple[Any, Any]]
) -> dict[str, np.ndarray]:
    """Name -> the first minus the second of its two keys, on the seeds that both have; empty where one has none."""
    return {
        name: np.array([first[seed] - second[seed] for seed in first if seed in second])
        for name, (one, other) in pairs.items()
        for first, second in [(scores.get(one, {}), scores.get(other, {}))]
    }


def label(panel: str, *words: object) -> str:
    """Words for print, after their panel if there are several."""
    return ": ".join(filter(None, (panel, " ".join(map(str, words)))))


def heading(panel: str, *words: object) -> str:
    """Words for the head of a plot, below their panel if there are several."""
    return "\n".join(filter(None, (panel, " ".join(map(str, words)))))


def decide(claim: str, values: Mapping[str, np.ndarray], bound: float = 0.0) -> Reading:
    """Whether all of some paired differences are above `bound`.

    The claim holds where every 95 % interval lies above the bound: a claim about all differences needs no correction
    for their number. It does not hold where a simultaneous interval (Bonferroni) lies below. Otherwise it is open.

    Args:
      claim: in words.
      values: name -> differences, one a seed.
      bound: the value that the differences have to exceed.
    """
    few = min((len(each) for each in values.values()), default=0)
    if few < SEEDS:
        return Reading(claim, OPEN, f"{few} seeds are too few: run at least {SEEDS}.")
    alone = {name: bootstrap_ci(each) for name, each in values.items()}
    simultaneous = {name: simultaneous_ci(each, len(values)) for name, each in values.items()}
    above = [name for name, found in alone.items() if found.low > bound]
    below = [name for name, found in simultaneous.items() if found.high < bound]
    order = sorted(alone, key=lambda name: (name not in below, alone[name].mean))  # what decides is shown
    shown = order if len(order) <= 4 else [*order[:2], order[-1]]
    words = [f"{name} {signed(alone[name].mean)} {interval(alone[name].low, alone[name].high)}" for name in shown]
    if len(shown) < len(order):
        words[-1] = f"... {words[-1]}"
    bar = f"above {number(bound, 2)}" if bound else "above 0"
    count = f"; {len(above)} of {len(order)} are shown to be {bar}, {len(below)} below" if len(order) > 1 else ""
    verdict = HOLDS if len(above) == len(order) else FAILS if below else OPEN
    return Reading(claim, verdict, f"{', '.join(words)}{count}.")


def signed(value: float) -> str:
    """A difference for print: `+.031`."""
    return f"{'+' if value >= 0 else ''}{number(value)}"


def leads(scores: Scores, words: str, metric: str = "mean Spearman") -> list[Reading]:
    """The lead of the released rule over random, and of the greedy one over it, at every value of an axis;
    whether the first is the same at all.

    Args:
      scores: of every setting, as by `areas`.
      words: what the values of the axis are, such as "batch size".
      metric: what the scores are.
    """
    places = list(dict.fromkeys((panel, value) for panel, value, _ in scores))

    def all_of(rule: str, other: str) -> dict[str, np.ndarray]:
        pairs = {label(place[0], words, place[1]): ((*place, rule), (*place, other)) for place in places}
        return differences(scores, pairs)

    return [
        decide(f"The released D-optimal rule leads random at every {words} ({metric})", all_of("dopt", "random")),
        decide(f"Exact greedy selection leads the released rule at every {words}", all_of("greedy_dopt", "dopt")),
        steady(f"The lead of the released rule over random does not hang on the {words}", scores, words),
    ]


def steady(claim: str, scores: Scores, words: str) -> Reading:
    """Whether the lead of the released rule over random is, to within `SAME`, the same at every value of an axis.

    The claim holds where the 95 % interval of the change between any two values lies within `SAME`; it does not hold
    where a simultaneous interval (Bonferroni) lies outside.
    """
    leads = {
        place: {seed: own[seed] - other[seed] for seed in own if seed in other}
        for place in dict.fromkeys((panel, value) for panel, value, _ in scores)
        for own, other in [(scores.get((*place, "dopt"), {}), scores.get((*place, "random"), {}))]
    }
    pairs = {
        label(first[0], words, first[1], "to", last[1]): (last, first)
        for first, last in itertools.combinations(leads, 2)
        if first[0] == last[0]
    }
    changes = differences(leads, pairs)
    few = min(map(len, changes.values()), default=0)
    if few < SEEDS:
        return Reading(claim, OPEN, f"{few} seeds are too few: run at least {SEEDS}.")
    alone = {name: bootstrap_ci(each) for name, each in changes.items()}
    simultaneous = {name: simultaneous_ci(each, len(changes)) for name, each in changes.items()}
    within = all(each.low > -SAME and each.high < SAME for each in alone.values())
    outside = any(each.low > SAME or each.high < -SAME for each in simultaneous.values())
    largest = max(alone, key=lambda name: abs(alone[name].mean))
    why = f"it changes most from {largest}: {signed(alone[largest].mean)} {interval(*alone[largest][1:3])}"
    return Reading(claim, HOLDS if within else FAILS if outside else OPEN, f"{why}; the bar is {number(SAME, 2)}.")


# Tables and figures.


def table(records: Records, axis: str | None = None, words: str = "") -> Rows:
    """Every rule in every setting, with its difference from random on the same seeds."""
    several = len(panels([line for line in records if line["kind"] != "reference"])) > 1
    head = [*(["data"] * several), *([words or axis] * (axis is not None)), "rule", "seeds", "wrong labels"]
    head += ["mean Spearman", "against random (95 %)", "final 1 - Spearman"]
    best_name = (best_of_names(records) or ["best_of_N"])[-1]
    head += [f"final best of {best_name[8:]}", "against random (95 %)"]
    rows = [head]
    for (panel, value), own in settings(records, axis).items():
        for rule, row in summarise(own)["rules"].items():
            place = [*([panel] * several), *([str(value)] * (axis is not None)), rule, str(row["seeds"])]
            if not row["seeds"]:
                rows.append([*place, *[""] * (len(head) - len(place))])
                continue
            best, error = (row.get("final_best_of") or {}).get("mean"), row["label_error"]
            cells = [f"{error:.1%}", number(row["area"]["mean"]), _gain(row, "area_gain", rule)]
            cells += [number(1 - row["final"]["mean"]), "" if best is None else number(best)]
            rows.append([*place, *cells, _gain(row, "final_best_of_gain", rule)])
    return rows


def _gain(row: dict[str, Any], name: str, rule: str) -> str:
    gain = row.get(name)
    if rule == "random" or gain is None or gain["low"] is None:
        return ""
    return f"{signed(gain['mean'])} {interval(gain['low'], gain['high'])}"


def effect(scores: Scores, stem: pathlib.Path, words: str, metric: str = "mean Spearman over labels") -> None:
    """Draw what an axis does: scores above, their differences from random on the same seeds below; a column a panel.

    Bands and bars are 95 % bootstrap intervals over seeds.
    """
    names = list(dict.fromkeys(panel for panel, _, _ in scores))
    values = list(dict.fromkeys(value for _, value, _ in scores))
    rules = list(dict.fromkeys(rule for _, _, rule in scores))
    with drawing(stem, (4.4 * len(names) + 1.4, 5.6)) as figure:
        grid = figure.subplots(2, len(names), squeeze=False, sharex="col", sharey="row")
        for (top, bottom), panel in zip(grid.T, names, strict=True):
            for shift, rule in enumerate(rules):
                style = style_of(rules, rule)
                found = [np.array(list(scores.get((panel, value, rule), {}).values())) for value in values]
                low, mean, high = np.array([_points(each) for each in found]).T
                top.plot(range(len(values)), mean, label=rule, markersize=4, **style)
                top.fill_between(range(len(values)), low, high, color=style["color"], alpha=0.15, linewidth=0)
                if rule == "random":
                    bottom.axhline(0, color=style["color"], linewidth=style["linewidth"], zorder=2.5)
                    continue
                pairs = {str(value): ((panel, value, rule), (panel, value, "random")) for value in values}
                gains = differences(scores, pairs)
                low, mean, high = np.array([_points(gains.get(str(value), np.array([]))) for value in values]).T
                place = np.arange(len(values)) + 0.12 * (shift - len(rules) / 2)
                bars = np.nan_to_num([mean - low, high - mean])
                style["linestyle"] = ""
                bottom.errorbar(place, mean, bars, label=rule, markersize=5, capsize=2, **style)
            top.set_title(heading(panel, metric), loc="left", fontsize=10)
            bottom.set_title("difference from random, same seeds", loc="left", fontsize=10)
            bottom.set_xticks(range(len(values)), [str(value) for value in values], rotation=20 * (len(values) > 4))
            bottom.set_xlabel(words)
            for axes in (top, bottom):
                axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        figure.legend(handles=grid[0, 0].get_lines(), loc="outside right center", frameon=False, handlelength=3.6)


def _points(values: np.ndarray) -> tuple[float, float, float]:
    """Low, mean and high; nothing but the mean where one seed leaves no interval."""
    if not values.size:
        return math.nan, math.nan, math.nan
    mean, low, high, _ = bootstrap_ci(values)
    return low, mean, high


# Running a study.


def examine(study: Study, config: Config) -> Outcome:
    """Run a study, draw it, and read it.

    Raises:
      JarmError: the data or a setting is at fault.
    """
    folder = config.out / study.name
    seconds, records = _timed(folder / "took.json", lambda: study.records(config))
    study.figure(records, figure_stem(config, study))
    failures: dict[str, int] = {}
    for line in records:
        if line.get("kind") == "failed":
            failures[line["message"]] = failures.get(line["message"], 0) + 1
    known = {name: [line[name] for line in records if line.get(name) is not None] for name in PROVENANCE[:3]}
    distinct = {name: [each for at, each in enumerate(all_) if each not in all_[:at]] for name, all_ in known.items()}
    outcome = Outcome(study, study.table(records), study.readings(records), seconds, failures, distinct)
    write_whole(folder / "study.md", markdown(outcome, command(config, study.name)))
    return outcome


def _timed(path: pathlib.Path, make: Callable[[], Records]) -> tuple[float, Records]:
    """Records and the seconds of the commands that ended; what was interrupted is not counted."""
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {"seconds": 0.0, "records": 0}
    start = time.perf_counter()
    records = make()
    if len(records) > before["records"]:  # else nothing was run
        before = {"seconds": before["seconds"] + time.perf_counter() - start, "records": len(records)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(before) + "\n")
    return before["seconds"], records


def command(config: Config, name: str) -> str:
    """The command that makes this, with files by their names."""
    words = [f"python experiments/{name}.py"]
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if field.name not in ("out", "workers") and value != field.default:
            if field.name in ("data", "embeddings"):
                value = ",".join(pathlib.Path(each).name for each in value.split(","))
            words.append(f"--{field.name} {value}")
    return " ".join(words)


def markdown(outcome: Outcome, shell: str) -> str:
    """A study as text: claims, what is found of them, and the table."""
    lines = [f"# {outcome.study.title}", "", outcome.study.said("Claim"), "", code(shell), ""]
    lines += [
        f"- {escaped(reading.claim)}: **{reading.verdict}**. {escaped(reading.why)}" for reading in outcome.readings
    ]
    lines += [f"- {count} runs failed: {escaped(sentence)}" for sentence, count in outcome.failures.items()]
    return "\n".join([*lines, "", *markdown_table(outcome.rows[0], outcome.rows[1:])]) + "\n"


def main(study: Study) -> None:
    """The command line of one study."""
    try:
        config = tyro.cli(Config, description=study.text)
        keep_compiled()
        outcome = examine(study, config)
        print(markdown(outcome, command(config, study.name)))
        print(f"{config.out / study.name}: study.md, {study.name}.png, {study.name}.svg")
    except JarmError as error:
        sys.exit(f"{study.name}: {error}")
    except KeyboardInterrupt:
        print(f"\n{study.name}: {STOPPED}", file=sys.stderr)
        sys.exit(130)
