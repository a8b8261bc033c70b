"""`jarm compare`: how fast does each acquisition rule teach a reward model, on these data?

Every rule is run with every seed; a seed fixes the first labels, the candidates drawn and the annotator's opinions,
so rules are compared in pairs. Records are appended run by run, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import sys
from typing import Any

from tqdm import tqdm

from jarm.acquisition.registry import source_of
from jarm.core.status import JarmError
from jarm.core.tables import TrainTest
from jarm.data.datasets import load
from jarm.evaluation.metrics import reference_lines
from jarm.loop.device_table import prepare
from jarm.report.curves import by_rule
from jarm.report.figures import learning_curves, require_matplotlib
from jarm.report.summary import write_summary
from jarm.runs.config import FREE, SOURCE, CompareConfig
from jarm.runs.programs import Program, default_vmap_runs, default_workers
from jarm.runs.records import RecordFolder, fingerprint, provenance
from jarm.runs.runner import Runner, judge, side_by_side


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run the comparison, or the rest of it, and write its folder.

    Args:
      config: the settings.

    Returns:
      The summary, as in `summary.json`.

    Raises:
      JarmError: the settings, the data or the folder are at fault; the message says which and what to do.
    """
    for name, least in (("seeds", 1), ("workers", 0), ("vmap_runs", 0)):
        if getattr(config, name) < least:
            raise JarmError(f"`--{name} {getattr(config, name)}` makes no run: give at least {least}.")
    require_matplotlib()  # before the runs, not after them
    rules, sizes, loop_config = config.rule_names(), config.sizes(), config.loop()
    data = load(config.data, **{name: getattr(config, name) for name in SOURCE})
    if data.train.gold is None or data.test.gold is None:
        raise JarmError("The data has no gold rewards, so there is nothing to judge by: give `--target COLUMN`.")
    table, hparams, scale = prepare(loop_config, data.train, config.hparams())
    judged: dict[str, Any] = {"annotator": loop_config.annotator, "scale": scale, "best_of": sizes}
    head = loop_config.head.head()
    together = min(config.vmap_runs or default_vmap_runs(), config.seeds)
    runner = Runner(Program(loop_config, together), table)

    with RecordFolder(config.out, _settings(config, data), config.rounds) as folder:
        if folder.others:
            print(
                f"jarm: {config.out} holds runs by {'; '.join(folder.others)}, which are kept; to have them made anew, "
                "give another --out.",
                file=sys.stderr,
            )
        common = {"config": fingerprint(folder.settings), **provenance()}
        sources = {rule: digits for rule in rules if (digits := source_of(rule))}
        folder.refuse_changed(sources)
        known = {line["rule"] for line in folder.read() if line["kind"] == "reference"}
        references = reference_lines(data.test, noise=float(hparams.noise), **judged)
        lacking = {name: values for name, values in references.items() if name not in known}
        if lacking:
            folder.append([{"kind": "reference", "rule": name, **values, **common} for name, values in lacking.items()])

        def one(rule: str, *seeds: int) -> list[list[dict[str, Any]]]:
            own = common | ({"source": sources[rule]} if rule in sources else {})
            results = runner(rule, [(seed, hparams) for seed in seeds])
            metrics = judge(head, results, data.test, pad=together, **judged)
            return [
                [{**line, **own} for line in result.lines(found)]
                for result, found in zip(results, metrics, strict=True)
            ]

        calls = _calls(rules, config.seeds, folder.done, together)
        # The first call of each rule goes alone, so that what is timed on it has the machine to itself.
        alone = [call for call in calls if call is next(each for each in calls if each[0] == call[0])]
        rest = [call for call in calls if call not in alone]
        runs = itertools.chain(
            side_by_side(one, alone, 1), side_by_side(one, rest, config.workers or default_workers())
        )
        left, tries = sum(len(call) - 1 for call in calls), sum(len(call) - 1 for call in alone)
        held_back: list[list[dict[str, Any]]] = []
        worked, total = bool(folder.done), len(rules) * config.seeds
        with tqdm(total=total, initial=total - left, unit="run", desc="compare") as bar:
            bar.set_postfix_str("compiling first" if left else "")
            for lines in itertools.chain.from_iterable(runs):
                # Until a run has worked, the settings may be at fault, and not a seed: then nothing is written.
                worked |= lines[0]["kind"] == "run"
                held_back.append(lines)
                if worked:
                    folder.append([line for run in held_back for line in run])
                    held_back = []
                elif len(held_back) == tries:
                    raise JarmError(f"No rule ran to its end with its first seed. {lines[0]['message']}")
                bar.set_postfix_str(f"{lines[-1]['rule']}, seed {lines[-1]['seed']}", refresh=False)
                bar.update()
        shown = by_rule([line for line in folder.read() if line["kind"] == "reference" or line["rule"] in rules], rules)
        try:
            summary = write_summary(shown, config.out)
            learning_curves(shown, config.out / "curves")
        except OSError as error:
            raise JarmError(f"Cannot write to {config.out} ({error}): make room, and give the same command.") from error
    return summary


def _calls(rules: list[str], seeds: int, done: set[tuple[str, int]], together: int) -> list[tuple[Any, ...]]:
    """`(rule, *seeds)` of what is left to run, at most `together` seeds each, all rules of a seed near each other."""
    calls = []
    for start in range(0, seeds, together):
        for rule in rules:
            some = [seed for seed in range(start, min(start + together, seeds)) if (rule, seed) not in done]
            if some:
                calls.append((rule, *some))
    return calls


def _settings(config: CompareConfig, data: TrainTest) -> dict[str, Any]:
    """What a record depends on: the options that may not change in a folder, and the data."""
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    options = {name: value for name, value in options.items() if name not in FREE}
    # By name: what the files hold is in their fingerprints, and they may move.
    options |= {name: pathlib.Path(options[name]).name for name in ("data", "embeddings") if options[name]}
    return options | {"train": dict(data.train.provenance), "test": dict(data.test.provenance)}
