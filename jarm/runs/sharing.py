"""A folder shared by the processes of a job, and how far its runs are."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jarm.core.distributed import in_step, long_step
from jarm.core.files import LOCK, is_claimed, refuse_link, write_whole
from jarm.core.outside import array, integer, read_json, string, struct
from jarm.core.status import JarmError
from jarm.runs.records import CONFIG, RECORDS, RENAMED, RecordFolder, parsed_records

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
    own = path / f"process-{process}"
    with contextlib.ExitStack() as stack:
        with in_step():
            refuse_link(working)
            refuse_link(own)
            if process == 0:
                folder = stack.enter_context(RecordFolder.open(path, settings, rounds, axes, GROWING))
                _gather(folder)
                _remove(working)  # left behind by a kill
        with in_step():
            if process:
                folder = stack.enter_context(RecordFolder.open(own, settings, rounds, axes, GROWING))
                records = path / RECORDS
                content = records.read_bytes() if records.exists() else b""
                folder.done |= {folder.run_of(line) for _, line in parsed_records(content, records, axes, rounds)}
        with long_step(working):
            yield folder
            if process:
                folder.close()
        with in_step():
            if process == 0:
                _remove(working)
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
        _remove(path)


def _remove(folder: pathlib.Path) -> None:
    """Remove a folder that jarm made within its own, once nothing but what jarm put there is in it.

    The records go first, and the settings last, so that a half-removed folder is recognised.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    with contextlib.suppress(OSError):
        for each in folder.iterdir():
            if each.name.isdigit() or each.name == RECORDS:
                each.unlink()
        for name in (LOCK, CONFIG):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _process_folders(path: pathlib.Path) -> list[pathlib.Path]:
    """Folders of other processes, which have settings."""
    return sorted(
        each
        for each in path.glob("process-*")
        if re.fullmatch(r"process-\d+", each.name) and not each.is_symlink() and (each / CONFIG).is_file()
    )


def write_progress(out: pathlib.Path, progress: dict[str, Any]) -> None:
    """Write the file that `jarm sweep status` reads beside the records.

    Raises:
      JarmError: it cannot be written.
    """
    write_whole(out / "progress.json", json.dumps(progress) + "\n")


def sweep_status(out: pathlib.Path) -> dict[str, Any]:
    """Progress of the sweep of a folder; nothing in it is touched.

    Returns:
      `runs` in all; `done`, the failed ones included; `failed`; `failures`, sentence -> count; and whether it is
      `running`, and `summarised`: its summary is of all its records.

    Raises:
      JarmError: the folder holds no sweep.
    """
    if missed := [name for name in ("progress.json", CONFIG) if not os.path.isfile(out / name)]:
        raise JarmError(f"{out} holds no sweep (it has no {missed[0]}): give the `out` of one that was started.")
    cure = "start the sweep again, with the same `out`"
    total = read_json(out / "progress.json", struct({"runs": integer()}), cure=cure)["runs"]
    settings = read_json(out / CONFIG, struct({"axes": array(string())}), cure="put it right, or give another `out`")
    axes = tuple(RENAMED.get(axis, axis) for axis in settings["axes"])
    missing, failures = dict[tuple[Any, ...], int](), dict[str, int]()  # run -> its missing lines
    for path in (out, *_process_folders(out)):
        for _, line in parsed_records(_content(path / RECORDS), path / RECORDS, axes, -1):
            run = line["rule"], line.get("seed"), *(line.get(axis) for axis in axes)
            if line["kind"] == "failed" and run not in missing:
                failures[line["message"]] = failures.get(line["message"], 0) + 1
                missing[run] = 0
            if line["kind"] == "run":
                missing[run] = missing.get(run, line["rounds"] + 1) - 1
    failed = sum(failures.values())
    return {
        "runs": total,
        "done": sum(left <= 0 for left in missing.values()),
        "failed": failed,
        "failures": failures,
        "running": is_claimed(out),
        "summarised": _modified(out / "summary.json") >= _modified(out / RECORDS),
    }


def _modified(path: pathlib.Path) -> int:
    """Time of the last change in nanoseconds; 0 if the file is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


def _content(path: pathlib.Path) -> bytes:
    """Content of a file; none if it is not there, or not there any more."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except FileNotFoundError:
        return b""
