"""Records of experiments: one JSON object a line, appended run by run, never lost and never mixed.

A folder belongs to one configuration, written in `config.json`. What a killed process leaves behind, half a line or
half a run, is dropped when the folder is opened again; whole runs stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax

from jarm.core.distributed import in_step, long_step
from jarm.core.files import claim, plain, replace_text
from jarm.core.status import JarmError


def fingerprint(settings: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for some settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


@functools.cache
def provenance() -> dict[str, Any]:
    """What a number depends on beside its settings: versions, commit of the checkout, device, machine."""
    names = ("jarm", "jax", "flax", "optax", "numpy")
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else f"cpu ({os.cpu_count()} x {platform.machine()})",
        "versions": {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout that jarm is imported from, marked where files differ; None outside a checkout."""
    here = pathlib.Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    try:
        run = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, check=True, timeout=10)
        commit = run(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changed = run(["git", "status", "--porcelain", "--untracked-files=no", "."]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


WRITTEN = ("records.jsonl", "summary.json", "summary.md", "curves.png", "curves.svg")
"""What a comparison or a sweep writes into its folder, beside `config.json` and `.lock`."""
RENAMED = {"pool": "candidates", "prior": "prior_weight"}
"""Settings that older folders have under another name."""


@dataclasses.dataclass
class RecordFolder:
    """The records of one configuration, open for appending by one process; a context manager.

    A run is whole when it has a line for every round, or one of kind `failed`.

    Attributes:
      path: the folder.
      settings: what every record in it was made with.
      rounds: T, so that a run has T + 1 lines; unless a record says `rounds` itself.
      axes: names that tell runs apart beside rule and seed; every record of a run has them.
      growing: settings that are dicts, to which a later command may add keys; those in both have to be the same.
      done: the runs that were whole when it was opened, as (rule, seed, value of each axis).
      others: other versions or commits of jarm that its records were made by, as "jarm 0.1.0, commit 0123456789ab".
    """

    path: pathlib.Path
    settings: dict[str, Any]
    rounds: int
    axes: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()
    done: set[tuple[Any, ...]] = dataclasses.field(default_factory=set, init=False)
    others: list[str] = dataclasses.field(default_factory=list, init=False)
    _lock: IO[str] | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        """Open or make the folder.

        Raises:
          JarmError: it holds another configuration or a line that is not a record, cannot be written, or is being
            written to. The records and the settings in it stay as they are.
        """
        self.settings = json.loads(json.dumps(self.settings, default=str))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = claim(self.path)
            config = self.path / "config.json"
            if config.exists():
                theirs = _read_settings(config)
                self._refuse_other(theirs)
                if self.settings != theirs:
                    replace_text(config, json.dumps(self.settings, indent=2) + "\n")
            elif foreign := [name for name in WRITTEN if (self.path / name).exists()]:
                raise JarmError(
                    f"{self.path / foreign[0]} stands there without a config.json and may be yours: give another --out."
                )
            else:
                replace_text(config, json.dumps(self.settings, indent=2) + "\n")
            self._recover()
        except (OSError, JarmError) as error:
            self.close()
            if isinstance(error, JarmError):
                raise
            raise JarmError(f"The folder {self.path} cannot be used ({error}): give another --out.") from error

    def __enter__(self) -> RecordFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.close()

    @property
    def _file(self) -> pathlib.Path:
        return self.path / "records.jsonl"

    def _refuse_other(self, theirs: dict[str, Any]) -> None:
        """Compare with the settings of the folder, and take over what those that grow have beyond these."""
        other = dict[str, tuple[Any, Any]]()
        for name in sorted(theirs.keys() | self.settings.keys()):
            there, here = theirs.get(name), self.settings.get(name)
            if name in self.growing and isinstance(there, dict) and isinstance(here, dict):
                other |= {key: (there[key], here[key]) for key in there.keys() & here.keys() if there[key] != here[key]}
                self.settings[name] = there | here
            elif there != here:
                other[name] = there, here
        if other:
            shown = ", ".join(
                f"{name} {there!r} there, {here!r} here" for name, (there, here) in list(other.items())[:4]
            )
            raise JarmError(
                f"The folder {self.path} holds runs with other settings ({shown}): "
                "give another --out, or the same settings."
            )

    def _recover(self) -> None:
        """Drop half a line, half a run, and what two commands at once wrote twice; rewrite the file only if needed."""
        if not self._file.exists():
            return
        text = self._file.read_bytes()
        *lines, _ = text.split(b"\n")  # the last, cut short by a kill, has no end
        records: dict[tuple[Any, ...], tuple[bytes, dict[str, Any]]] = {}
        for number, line in enumerate(lines, 1):
            record = self._record(line)
            if record is None:
                raise JarmError(
                    f"Line {number} of {self._file} is not a record: remove that line, and its run is made again."
                )
            where = record["kind"] == "reference", *self.run_of(record), record.get("round")
            records.setdefault(where, (line, record))
        counts: dict[tuple[Any, ...], int] = {}
        for _, record in records.values():
            if record["kind"] != "reference":
                run, last = self.run_of(record), record.get("rounds", self.rounds)
                counts[run] = counts.get(run, -last) + (1 if record["kind"] == "run" else last + 1)
        self.done = {run for run, over in counts.items() if over == 1}
        kept = [
            (line, record)
            for line, record in records.values()
            if record["kind"] != "run" or self.run_of(record) in self.done
        ]
        if (whole := b"".join(line + b"\n" for line, _ in kept)) != text:
            replace_text(self._file, whole.decode())
        made = {_jarm(record) for _, record in kept if isinstance(record.get("versions"), dict)}
        self.others = sorted(made - {_jarm(provenance())})

    def _record(self, line: bytes) -> dict[str, Any] | None:
        """The record of a line; None if it is not one."""
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            return None
        if not isinstance(record, dict) or not isinstance(record.get("rule"), str):
            return None
        seed, t = (value if type(value) is int else None for value in (record.get("seed"), record.get("round")))
        last = record.get("rounds", self.rounds)
        valid = {
            "run": seed is not None and t is not None and type(last) is int and 0 <= t <= last,
            "failed": seed is not None and "round" not in record,
            "reference": "seed" not in record and "round" not in record,
        }
        kind = record.get("kind")
        return record if isinstance(kind, str) and valid.get(kind) else None

    def run_of(self, record: dict[str, Any]) -> tuple[Any, ...]:
        """The run that a record belongs to, as in `done`."""
        return record["rule"], record.get("seed"), *(record.get(axis) for axis in self.axes)

    def refuse_changed(self, sources: Mapping[str, str]) -> None:
        """Refuse rules whose file is not the one that the folder has runs of.

        Args:
          sources: rule -> digits of its file, of rules that come from one.

        Raises:
          JarmError: a file has changed.
        """
        for line in self.read():
            if (digits := sources.get(line["rule"])) and line.get("source", digits) != digits:
                raise JarmError(
                    f"The file of {line['rule']} has changed since {self.path} got runs of it: give another --out, or "
                    "another name to what is another rule."
                )

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add the records of one run at once, on disk when this returns.

        Raises:
          JarmError: they cannot be written; what stood there before still does.
        """
        text = "".join(json.dumps({name: plain(value) for name, value in record.items()}) + "\n" for record in records)
        left = text.encode()
        try:
            # Unbuffered: a buffer would be written once more when the file is closed, after the truncation.
            with self._file.open("ab", buffering=0) as file:
                end = file.tell()
                try:
                    while left:
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self._file, end)
                    raise
        except OSError as error:
            raise JarmError(
                f"Cannot write to {self._file} ({error}): make room, and give the same command to go on."
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """All records."""
        if not self._file.exists():
            return []
        return [json.loads(line) for line in self._file.read_bytes().splitlines()]


def _jarm(record: dict[str, Any]) -> str:
    """The jarm that a record was made by."""
    commit = f", commit {record['commit']}" if record.get("commit") else ""
    return f"jarm {record['versions'].get('jarm')}{commit}"


def _read_settings(config: pathlib.Path) -> dict[str, Any]:
    try:
        settings = json.loads(config.read_bytes().decode())
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise JarmError(f"{config} does not hold the settings of runs: put it right, or give another --out.")
    return {RENAMED.get(str(name), str(name)): value for name, value in settings.items()}


GROWING = ("named", "tables")
"""Settings of the folder to which a value more of an axis adds."""


@contextlib.contextmanager
def _shared_folder(
    path: pathlib.Path, settings: dict[str, Any], rounds: int, axes: tuple[str, ...]
) -> Iterator[RecordFolder]:
    """The folder that this process appends to: the first one's is the sweep's, the others' lie in it meanwhile."""
    process, working = jax.process_index(), path / ".working"
    with contextlib.ExitStack() as stack:
        with in_step():
            if process == 0:
                folder = stack.enter_context(RecordFolder(path, settings, rounds, axes, GROWING))
                _gather(folder)
                if working.exists():  # of a sweep that was killed
                    shutil.rmtree(working)
        with in_step():
            if process:
                own = path / f"process-{process}"
                folder = stack.enter_context(RecordFolder(own, settings, rounds, axes, GROWING))
                records = path / "records.jsonl"
                lines = records.read_text().splitlines() if records.exists() else []
                folder.done |= {folder.run_of(json.loads(line)) for line in lines}
        with long_step(working):
            yield folder
            if process:
                folder.close()
        with in_step():
            if process == 0:
                shutil.rmtree(working, ignore_errors=True)
                _gather(folder)


def _gather(folder: RecordFolder) -> None:
    """Take over what other processes wrote, and remove their folders."""
    for path in _process_folders(folder.path):
        with RecordFolder(path, folder.settings, folder.rounds, folder.axes, folder.growing) as other:
            new = [line for line in other.read() if folder.run_of(line) not in folder.done]
            if new:
                folder.append(new)
            folder.done |= other.done
        # First what says that there are records, so that a folder of which a kill left a part is no riddle.
        (path / "records.jsonl").unlink(missing_ok=True)
        shutil.rmtree(path)


def _process_folders(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(each for each in path.glob("process-*") if re.fullmatch(r"process-\d+", each.name) and each.is_dir())


def _write_progress(out: pathlib.Path, progress: dict[str, Any]) -> None:
    """What `jarm sweep status` reads beside the records."""
    try:
        replace_text(out / "progress.json", json.dumps(progress) + "\n")
    except OSError as error:
        raise JarmError(f"Cannot write to {out} ({error}): make room, and give the same command.") from error


def sweep_status(out: pathlib.Path) -> dict[str, Any]:
    """How far the sweep of a folder is; nothing in it is touched.

    Returns:
      `runs` in all; `done`, of which `failed`, and the sentence of each kind of failure with its count; `running`.

    Raises:
      JarmError: the folder holds no sweep.
    """
    try:
        total = json.loads((out / "progress.json").read_text())["runs"]
        axes = json.loads((out / "config.json").read_text())["axes"]
    except (OSError, ValueError, KeyError) as error:
        raise JarmError(f"{out} holds no sweep ({error}): give the `out` of one that was started.") from None
    lines, failures = dict[tuple[Any, ...], int](), dict[str, int]()
    for path in (out, *_process_folders(out)):
        records = path / "records.jsonl"
        for number, text in enumerate(_whole_lines(records), 1):
            try:
                line = json.loads(text)
            except ValueError:
                raise JarmError(
                    f"Line {number} of {records} is not a record: remove that line, and its run is made again."
                ) from None
            run = line["rule"], line.get("seed"), *(line.get(axis) for axis in axes)
            if line["kind"] == "failed" and run not in lines:
                failures[line["message"]] = failures.get(line["message"], 0) + 1
                lines[run] = 0
            if line["kind"] == "run":  # how many are left of it
                lines[run] = lines.get(run, line["rounds"] + 1) - 1
    try:
        claim(out).close()
        running = False
    except JarmError:
        running = True
    failed = sum(failures.values())
    return {
        "runs": total,
        "done": sum(left <= 0 for left in lines.values()),
        "failed": failed,
        "failures": failures,
        "running": running,
    }


def _whole_lines(path: pathlib.Path) -> list[bytes]:
    """Those that are written to their end; none of a file that is not there, or not there any more."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
