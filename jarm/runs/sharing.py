"""A folder shared by the processes of a job, and how far its runs are."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jarm.core.distributed import in_step, long_step
from jarm.core.files import claim, write_whole
from jarm.core.status import JarmError
from jarm.runs.records import RENAMED, RecordFolder, renamed

GROWING = ("named", "tables")
"""Settings of a folder that grow with the values of its axes."""


@contextlib.contextmanager
def shared_folder(
    path: pathlib.Path,
    settings: dict[str, Any],
    rounds: int,
    axes: tuple[str, ...],
    finish: Callable[[RecordFolder], None],
) -> Iterator[RecordFolder]:
    """The folder that this process appends to: the first process takes `path`, the others a folder in it meanwhile.

    Args:
      path, settings, rounds, axes: as for `RecordFolder`.
      finish: called by the first process when it has the records of all, before it releases the folder.
    """
    process, working = jax.process_index(), path / ".working"
    with contextlib.ExitStack() as stack:
        with in_step():
            if process == 0:
                folder = stack.enter_context(RecordFolder.open(path, settings, rounds, axes, GROWING))
                _gather(folder)
                if working.exists():  # left behind by a kill
                    shutil.rmtree(working)
        with in_step():
            if process:
                own = path / f"process-{process}"
                folder = stack.enter_context(RecordFolder.open(own, settings, rounds, axes, GROWING))
                records = path / "records.jsonl"
                lines = records.read_text("utf-8").splitlines() if records.exists() else []
                folder.done |= {folder.run_of(json.loads(line)) for line in lines}
        with long_step(working):
            yield folder
            if process:
                folder.close()
        with in_step():
            if process == 0:
                shutil.rmtree(working, ignore_errors=True)
                _gather(folder)
                finish(folder)


def _gather(folder: RecordFolder) -> None:
    """Take over the records of other processes, and remove their folders."""
    for path in _process_folders(folder.path):
        with RecordFolder.open(path, folder.settings, folder.rounds, folder.axes, folder.growing) as other:
            new = [line for line in other.read() if folder.run_of(line) not in folder.done]
            if new:
                folder.append(new)
            folder.done |= other.done
        # The records go first, so that a half-removed folder is recognised.
        (path / "records.jsonl").unlink(missing_ok=True)
        shutil.rmtree(path)


def _process_folders(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(each for each in path.glob("process-*") if re.fullmatch(r"process-\d+", each.name) and each.is_dir())


def write_progress(out: pathlib.Path, progress: dict[str, Any]) -> None:
    """Write the file that `jarm sweep status` reads beside the records.

    Raises:
      JarmError: it cannot be written.
    """
    try:
        write_whole(out / "progress.json", json.dumps(progress) + "\n")
    except OSError as error:
        raise JarmError(f"Cannot write to {out} ({error}): make room, and give the same command.") from error


def sweep_status(out: pathlib.Path) -> dict[str, Any]:
    """Progress of the sweep of a folder; nothing in it is touched.

    Returns:
      `runs` in all; `done`, the failed ones included; `failed`; `failures`, sentence -> count; and whether it is
      `running`.

    Raises:
      JarmError: the folder holds no sweep.
    """
    try:
        total = json.loads((out / "progress.json").read_text("utf-8"))["runs"]
        axes = [RENAMED.get(axis, axis) for axis in json.loads((out / "config.json").read_text("utf-8"))["axes"]]
    except (OSError, ValueError, KeyError) as error:
        raise JarmError(f"{out} holds no sweep ({error}): give the `out` of one that was started.") from None
    missing, failures = dict[tuple[Any, ...], int](), dict[str, int]()  # run -> its missing lines
    for path in (out, *_process_folders(out)):
        records = path / "records.jsonl"
        for number, text in enumerate(_whole_lines(records), 1):
            try:
                line = renamed(json.loads(text))
            except ValueError:
                raise JarmError(
                    f"Line {number} of {records} is not a record: remove that line, and its run is made again."
                ) from None
            run = line["rule"], line.get("seed"), *(line.get(axis) for axis in axes)
            if line["kind"] == "failed" and run not in missing:
                failures[line["message"]] = failures.get(line["message"], 0) + 1
                missing[run] = 0
            if line["kind"] == "run":
                missing[run] = missing.get(run, line["rounds"] + 1) - 1
    try:
        claim(out).close()
        running = False
    except JarmError:
        running = True
    failed = sum(failures.values())
    return {
        "runs": total,
        "done": sum(left <= 0 for left in missing.values()),
        "failed": failed,
        "failures": failures,
        "running": running,
    }


def _whole_lines(path: pathlib.Path) -> list[bytes]:
    """Lines of a file that are written to their end; none if the file is not there, or not there any more."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
