"""How far the runs of a sweep are: a file beside its records, and what both say."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from jarm.core.files import is_claimed, write_whole
from jarm.core.outside import array, integer, read_json, string, struct
from jarm.core.status import JarmError
from jarm.runs.records import CONFIG, RECORDS, RENAMED, parsed_records


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
    for _, line in parsed_records(_content(out / RECORDS), out / RECORDS, axes, -1):
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
