"""All studies of the suite, and one report of them.

Claim     Every figure and every reading of the suite comes out of one command.
Command   python experiments/reproduce_all.py --data alpaca_eval_200x20.parquet \\
              --embeddings alpaca_eval_200x20_minilm_mean.npy --targets golden_logit,golden_z_lc
Hardware  2 CPU cores.
Time      About an hour and a half for two targets; the same command goes on where it was stopped.
Expected  `report.html`, which opens in a browser without a network, and `report.md`, the readings and the tables.

A study that fails is shown as failed, with its sentence, and the others go on; the exit status is then 1.
"""

from __future__ import annotations

import base64
import dataclasses
import pathlib
import sys
import traceback

import batch_size
import batches
import head_width
import initial_accuracy
import jinja2
import label_noise
import pairs
import prior_and_warm_start
import run_time
import strategies
import suite
import three_wells
import tyro
from suite import Outcome, Study

from jarm import JarmError
from jarm.core.compiled import keep_compiled
from jarm.core.files import write_whole
from jarm.core.messages import clock
from jarm.report.markdown import code, escaped
from jarm.report.markdown import table as markdown_table

STUDIES = (
    strategies.STUDY,
    pairs.STUDY,
    batch_size.STUDY,
    head_width.STUDY,
    three_wells.STUDY,
    run_time.STUDY,
    batches.STUDY,
    initial_accuracy.STUDY,
    prior_and_warm_start.STUDY,
    label_noise.STUDY,
)
TITLE = "Active reward modelling: the suite"
TEMPLATE = pathlib.Path(__file__).with_name("report.html.jinja")


@dataclasses.dataclass(frozen=True)
class Config(suite.Config):
    """Settings. Lists are separated by commas.

    Attributes:
      only: letters of the studies to run, such as a,g; all of them if not given. The report has these alone.
    """

    only: str | None = None

    def studies(self) -> list[Study]:
        """Those to run.

        Raises:
          JarmError: there is no study of such a letter.
        """
        letters = [study.letter for study in STUDIES]
        wanted = letters if self.only is None else [each.strip() for each in self.only.split(",")]
        if unknown := [each for each in wanted if each not in letters]:
            raise JarmError(f"There is no study {unknown[0]!r}: choose from {','.join(letters)}.")
        return [study for study in STUDIES if study.letter in wanted]


def command(config: Config) -> str:
    """The command that makes the report."""
    return suite.command(config, "reproduce_all") + (f" --only {config.only}" if config.only else "")


Found = list[tuple[Study, Outcome | None, str]]
"""Each study with what came of it, or the sentence that it failed with."""


def run_all(config: Config) -> Found:
    """Every study in turn, and the report."""
    found: Found = []
    for study in config.studies():
        print(f"\n({study.letter}) {study.title}", flush=True)
        try:
            found.append((study, suite.examine(study, config), ""))
        except JarmError as error:
            found.append((study, None, str(error)))
        except Exception as error:  # whatever it is, hours of other studies are not lost to it
            traceback.print_exc()
            found.append((study, None, f"{type(error).__name__}: {error}"))
        if found[-1][2]:
            print(f"{study.name}: {found[-1][2]}", file=sys.stderr)
    config.out.mkdir(parents=True, exist_ok=True)
    write_whole(config.out / "report.html", html(config, found))
    write_whole(config.out / "report.md", "\n".join([f"# {TITLE}", "", readings(config, found), *tables(found)]))
    return found


def html(config: Config, found: Found) -> str:
    """The report as one page that needs no other file."""
    figures = {
        study.name: base64.b64encode(suite.figure_stem(config, study).with_suffix(".svg").read_bytes()).decode()
        for study, outcome, _ in found
        if outcome
    }
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        TEMPLATE.read_text("utf-8")
    )
    return template.render(
        studies=found,
        figures=figures,
        commands={study.name: suite.command(config, study.name) for study, *_ in found},
        command=command(config),
        title=TITLE,
        clock=clock,
    )


def readings(config: Config, found: Found) -> str:
    """The readings as a Markdown table."""
    lines = [code(command(config)), ""]
    lines += ["| | study | claim | verdict | numbers | time |", "|---|---|---|---|---|--:|"]
    for study, outcome, failure in found:
        if outcome is None:
            lines.append(f"| {study.letter} | `{study.name}.py` | | failed | {escaped(failure)} | |")
            continue
        for at, reading in enumerate(outcome.readings):
            first = [study.letter, f"`{study.name}.py`"] if at == 0 else ["", ""]
            took = clock(outcome.seconds) if at == 0 else ""
            lines.append(
                f"| {' | '.join([*first, escaped(reading.claim), reading.verdict, escaped(reading.why), took])} |"
            )
    return "\n".join(lines) + "\n"


def tables(found: Found) -> list[str]:
    """Lines of Markdown: the table of each study, and what ran it."""
    lines = []
    for study, outcome, _ in found:
        if outcome:
            lines += [
                f"## {study.title} (`{study.name}.py`)",
                "",
                *markdown_table(outcome.rows[0], outcome.rows[1:]),
                "",
            ]
            lines += [escaped(outcome.made_with()), ""]
    return lines


def main(config: Config) -> int:
    keep_compiled()  # studies share programs
    found = run_all(config)
    print(f"\n{readings(config, found)}\n{config.out / 'report.html'}")
    return int(any(failure for *_, failure in found))


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__)))
    except JarmError as error:
        sys.exit(f"reproduce_all: {error}")
    except KeyboardInterrupt:
        print(f"\nreproduce_all: {suite.STOPPED}", file=sys.stderr)
        sys.exit(130)
