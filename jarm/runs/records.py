"""Records of experiments: one JSON object per line, appended run by run, never lost and never mixed.

A folder belongs to one configuration, written in `config.json`. Half a line or half a run, which a killed process
leaves behind, is dropped when the folder is opened again; whole runs stay.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import IO, Any

import jax

from jarm.core.files import claim, plain, write_whole
from jarm.core.settings import KEYS
from jarm.core.status import JarmError
from jarm.core.version import __version__


def fingerprint(settings: dict[str, Any]) -> str:
    """Fingerprint of some settings: twelve hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


@functools.cache
def provenance() -> dict[str, Any]:
    """Provenance of a number beside its settings: versions, commit of the checkout, device, machine."""
    names = ("jax", "flax", "optax", "numpy")
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else f"cpu ({os.cpu_count()} x {platform.machine()})",
        "versions": {"jarm": __version__}
        | {name: importlib.metadata.version(name) for name in names}
        | {"python": platform.python_version()},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout that jarm is imported from, marked where files differ; None outside a checkout."""
    package = pathlib.Path(__file__).parents[1]
    if not (package.parent / ".git").exists():
        return None
    try:
        run = functools.partial(subprocess.run, cwd=package, capture_output=True, text=True, check=True, timeout=10)
        commit = run(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changed = run(["git", "status", "--porcelain", "--untracked-files=no", "."]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


WRITTEN = ("records.jsonl", "summary.json", "summary.md", "curves.png", "curves.svg")
"""Files that a comparison or a sweep writes into its folder, beside `config.json` and `.lock`."""
IMPLIED = {"keys": KEYS}
"""Settings that folders of earlier versions leave out, and what they had."""
RENAMED = {"pool": "candidates", "prior": "prior_weight"}
"""Old name -> new name, of options in the folders of earlier versions: their settings, axes and records."""


def renamed(options: dict[str, Any]) -> dict[str, Any]:
    """Options, or a record of a run with its axes, under their new names."""
    return {RENAMED.get(name, name): value for name, value in options.items()}


@dataclasses.dataclass
class RecordFolder:
    """The records of one configuration, open for appending by one process; a context manager made by `open`.

    A run is whole when it has a line for every round, or one of kind `failed`.

    Attributes:
      path: the folder.
      settings: common to all records in it.
      rounds: T, so that a run has T + 1 lines; unless a record says `rounds` itself.
      axes: names that tell runs apart beside rule and seed; every record of a run has them.
      growing: settings that are dicts, to which a later command may add keys; those in both have to be the same.
      done: runs that were whole when it was opened, as (rule, seed, value of each axis).
      others: other versions or commits of jarm that made some of its records, as "jarm 0.1.0, commit 0123456789ab".
      lock: held while the folder is open.
    """

    path: pathlib.Path
    settings: dict[str, Any]
    rounds: int
    axes: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()
    done: set[tuple[Any, ...]] = dataclasses.field(default_factory=set)
    others: list[str] = dataclasses.field(default_factory=list)
    lock: IO[bytes] | None = None

    @classmethod
    def open(
        cls,
        path: pathlib.Path,
        settings: dict[str, Any],
        rounds: int,
        axes: tuple[str, ...] = (),
        growing: tuple[str, ...] = (),
    ) -> RecordFolder:
        """Open or make a folder; options of earlier versions get their new names in its files.

        Args:
          path, settings, rounds, axes, growing: as the attributes.

        Raises:
          JarmError: it holds another configuration or a line that is not a record, cannot be written, or is being
            written to. The records and the settings in it stay as they are.
        """
        folder = cls(path, json.loads(json.dumps(settings, default=str)), rounds, axes, growing)
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder.lock = claim(path)
            outdated = folder._match_settings()
            folder._recover()
            if outdated:  # after all that may refuse the folder
                write_whole(path / "config.json", json.dumps(folder.settings, indent=2) + "\n")
        except (OSError, JarmError) as error:
            folder.close()
            if isinstance(error, JarmError):
                raise
            raise JarmError(f"The folder {path} cannot be used ({error}): give another --out.") from error
        return folder

    def __enter__(self) -> RecordFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder to other processes."""
        if self.lock is not None:
            self.lock.close()

    @property
    def _file(self) -> pathlib.Path:
        return self.path / "records.jsonl"

    def _match_settings(self) -> bool:
        """Compare with `config.json`, and add the keys that growing settings have there; whether they differ now."""
        config = self.path / "config.json"
        if not config.exists():
            if foreign := [name for name in WRITTEN if (self.path / name).exists()]:
                raise JarmError(
                    f"{self.path / foreign[0]} stands there without a config.json and may be yours: give another --out."
                )
            return True
        written = _read_settings(config)
        theirs = {name: value for name, value in IMPLIED.items() if name in self.settings} | renamed(written)
        if "axes" in theirs and "named" in theirs:
            theirs["axes"] = sorted(RENAMED.get(axis, axis) for axis in theirs["axes"])
            theirs["named"] = {name: renamed(options) for name, options in theirs["named"].items()}
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
        return self.settings != written

    def _recover(self) -> None:
        """Drop half a line, half a run, and lines written twice by two commands; rewrite the file only if needed."""
        if not self._file.exists():
            return
        text = self._file.read_bytes()
        *lines, _ = text.split(b"\n")  # after the last end of a line: nothing, or a line cut short by a kill
        records: dict[tuple[Any, ...], tuple[bytes, dict[str, Any]]] = {}
        for number, line in enumerate(lines, 1):
            record = self._record(line)
            if record is None:
                raise JarmError(
                    f"Line {number} of {self._file} is not a record: remove that line, and its run is made again."
                )
            if record.keys() & RENAMED:
                record = renamed(record)
                line = json.dumps(record).encode()
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
            write_whole(self._file, whole.decode())
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
        """The run of a record, as in `done`."""
        return record["rule"], record.get("seed"), *(record.get(axis) for axis in self.axes)

    def refuse_changed(self, sources: Mapping[str, str]) -> None:
        """Refuse rules whose file has changed since the folder got runs of them.

        Args:
          sources: rule -> fingerprint of its file, for rules that come from one.

        Raises:
          JarmError: a file has changed.
        """
        for line in self.read():
            if (source := sources.get(line["rule"])) and line.get("source", source) != source:
                raise JarmError(
                    f"The file of {line['rule']} has changed since {self.path} got runs of it: give another --out, or "
                    "another name to the changed rule."
                )

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add the records of one run at once, on disk when this returns.

        Raises:
          JarmError: they cannot be written; earlier records are kept.
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
    """Version and commit of jarm that made a record."""
    commit = f", commit {record['commit']}" if record.get("commit") else ""
    return f"jarm {record['versions'].get('jarm')}{commit}"


def _read_settings(config: pathlib.Path) -> dict[str, Any]:
    try:
        settings = json.loads(config.read_bytes().decode())
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise JarmError(f"{config} does not hold the settings of runs: put it right, or give another --out.")
    return settings
