"""Records of experiments: one JSON object per line, appended run by run, never lost and never mixed.

A folder belongs to one configuration, written in `config.json`. Half a line or half a run, which a killed process
leaves behind, is dropped when the folder is opened again; whole runs stay. Each line ends with a checksum of itself
(`jarm.core.files.sealed`); lines of earlier versions have none.
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
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax

from jarm.core.files import append_whole, claim, is_sealed, make_folder, plain, refuse_link, sealed, write_whole
from jarm.core.outside import (
    array,
    boolean,
    checked,
    either,
    mapping,
    maybe,
    number,
    parse_json,
    string,
    struct,
)
from jarm.core.settings import KEYS
from jarm.core.status import JarmError
from jarm.core.version import __version__
from jarm.runs.arguments import RENAMED


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


RECORDS, CONFIG = "records.jsonl", "config.json"
WRITTEN = (RECORDS, "summary.json", "summary.md", "curves.png", "curves.svg", "progress.json")
"""Files that a comparison or a sweep writes into its folder, beside `config.json` and `.lock`."""
GROWING = ("named", "tables")
"""Settings of a folder that grow with the values of its axes."""
IMPLIED = {"keys": KEYS}
"""Settings that folders of earlier versions leave out, and what they had."""
BY_PROMPT = "right_by_prompt"
"""Field of records on recorded pairs: shares of right orders, prompt by prompt, packed (`jarm.report.held_out`)."""
AGAIN = "remove that line, and its run is made again"
_SETTINGS = struct({}, {"axes": array(string()), "named": mapping(mapping())})
_NUMBER = maybe(either(boolean, number()))
_AXIS = either(string(), _NUMBER)
_FIELDS = {
    name: maybe(string()) for name in ("kind", "rule", "message", "device", "commit", "config", "source", BY_PROMPT)
}
"""Fields of a record that are no numbers, beside its axes."""
_FIELDS["versions"] = mapping(maybe(string()))


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
      broken: runs that lacked some of their lines though others follow, and whose lines were dropped.
      others: other versions or commits of jarm that made some of its records, as "jarm 0.1.0, commit 0123456789ab".
      lock: held while the folder is open.
    """

    path: pathlib.Path
    settings: dict[str, Any]
    rounds: int
    axes: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()
    done: set[tuple[Any, ...]] = dataclasses.field(default_factory=set)
    broken: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
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
            make_folder(path)
            folder.lock = claim(path)
            for own in (path / RECORDS, path / CONFIG):
                refuse_link(own)
                if own.exists() and not own.is_file():
                    raise JarmError(f"{own} is no plain file, and may be yours: give another --out.")
            outdated = folder._match_settings()
            folder._recover()
            if outdated:  # after all that may refuse the folder
                write_whole(path / CONFIG, json.dumps(folder.settings, indent=2) + "\n")
        except (OSError, ValueError) as error:  # a ValueError of the system is a name that no file can have
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
        return self.path / RECORDS

    def _match_settings(self) -> bool:
        """Compare with `config.json`, and add the keys that growing settings have there; whether they differ now."""
        config = self.path / CONFIG
        if not config.exists():
            if foreign := [name for name in WRITTEN if os.path.lexists(self.path / name)]:
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
            else:
                other |= _differing(name, there, here)
        if other:
            shown = ", ".join(
                f"{name} {_short(there)} there, {_short(here)} here" for name, (there, here) in list(other.items())[:4]
            )
            shown += f", and {len(other) - 4:,} more" if len(other) > 4 else ""
            raise JarmError(
                f"The folder {self.path} holds runs with other settings ({shown}): "
                "give another --out, or the same settings."
            )
        return self.settings != written

    def _recover(self) -> None:
        """Drop half a line, half a run, and lines written twice by two commands; rewrite the file only if needed."""
        before = self._file.read_bytes() if self._file.exists() else b""
        if not before and (self.path / "summary.json").exists():
            raise JarmError(
                f"{self._file} is empty or not there, and summary.json tells of its runs: copy it here again, or "
                "remove summary.json, and they are made again."
            )
        records: dict[tuple[Any, ...], tuple[bytes, dict[str, Any]]] = {}
        for line, each in parsed_records(before, self._file, self.axes, self.rounds):
            where = each["kind"] == "reference", *self.run_of(each), each.get("round")
            records.setdefault(where, (line, each))
        counts: dict[tuple[Any, ...], int] = {}
        for _, each in records.values():
            if each["kind"] != "reference":
                run, last = self.run_of(each), each.get("rounds", self.rounds)
                counts[run] = counts.get(run, -last) + (1 if each["kind"] == "run" else last + 1)
        self.done = {run for run, over in counts.items() if over == 1}
        self.broken = [run for run in list(counts)[:-1] if run not in self.done]  # a kill breaks the last one alone
        kept = [pair for pair in records.values() if pair[1]["kind"] != "run" or self.run_of(pair[1]) in self.done]
        if before and b"".join(line + b"\n" for line, _ in kept) != before:
            write_whole(self._file, b"".join(sealed(each) for _, each in kept))
        made = {_jarm(each) for _, each in kept if isinstance(each.get("versions"), dict)}
        self.others = sorted(made - {_jarm(provenance())})

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
        append_whole(
            self._file, b"".join(sealed({name: plain(value) for name, value in each.items()}) for each in records)
        )

    def read(self) -> list[dict[str, Any]]:
        """All records."""
        if not self._file.exists():
            return []
        content = self._file.read_bytes()
        return [each for _, each in parsed_records(content, self._file, self.axes, self.rounds)]


def read_records(folder: pathlib.Path, axes: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    """All whole records of a folder of a comparison or a sweep; nothing in it is touched.

    Args:
      folder: with `records.jsonl`.
      axes: of the sweep; by default those of its settings.

    Raises:
      JarmError: its settings or a line are damaged.
    """
    config = folder / CONFIG
    if axes is None:
        axes = tuple(_read_settings(config).get("axes", ())) if config.is_file() else ()
    file = folder / RECORDS
    return [each for _, each in parsed_records(file.read_bytes() if file.is_file() else b"", file, axes)]


def parsed_records(
    content: bytes, file: pathlib.Path, axes: tuple[str, ...], rounds: int | None = None
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a file and their records, with the new names of options, and without checksums in these.

    Args:
      content: of the file.
      file: for errors.
      axes: fields that tell runs apart beside rule and seed.
      rounds: T of records that do not say it; None where it is not known, and -1 where each has to say it.

    Raises:
      JarmError: a line is damaged, or not a record.
    """
    has_seals = False
    for line_number, line in enumerate(content.split(b"\n")[:-1], 1):  # behind the last end: nothing, or a cut line
        where, seal = f"Line {line_number} of {file}", is_sealed(line)
        try:
            found = parse_json(line, where, AGAIN)
        except JarmError:
            found = None
        if not _is_record(found, rounds):
            raise JarmError(f"{where} is not a record: {AGAIN}.")
        if seal is False or (seal is None and has_seals):
            raise JarmError(f"{where} is damaged, as its checksum shows: {AGAIN}.")
        if has_seals := seal is not None:
            del found["line"]
        for name, value in found.items():
            check = _FIELDS.get(name, _AXIS if name in axes else _NUMBER)
            if type(value) is not float and (fault := check(value, name)):  # floats are finite here
                raise JarmError(f"{where}: {fault}: {AGAIN}.")
        if found.keys() & RENAMED:
            found = renamed(found)
            line = sealed(found)[:-1]
        yield line, found


def _is_record(found: Any, rounds: int | None) -> bool:
    """Whether a value has what every record has."""
    if not isinstance(found, dict) or not isinstance(found.get("rule"), str):
        return False
    seed, t = (value if type(value) is int else None for value in (found.get("seed"), found.get("round")))
    last = found.get("rounds", rounds)
    valid = {
        "run": seed is not None and t is not None and t >= 0 and (last is None or (type(last) is int and t <= last)),
        "failed": seed is not None and "round" not in found,
        "reference": "seed" not in found and "round" not in found,
    }
    kind = found.get("kind")
    return isinstance(kind, str) and valid.get(kind, False)


def _differing(name: str, there: Any, here: Any) -> dict[str, tuple[Any, Any]]:
    """Entries that differ, those of records of provenance by their names behind that of the record.

    Example:
      >>> _differing("train", {"table": "a.jsonl", "prompts": 9}, {"table": "b.jsonl", "prompts": 9})
      {'train table': ('a.jsonl', 'b.jsonl')}
    """
    if isinstance(there, dict) and isinstance(here, dict):
        found = dict[str, tuple[Any, Any]]()
        for key in dict.fromkeys([*there, *here]):
            found |= _differing(f"{name} {key}", there.get(key), here.get(key))
        return found
    return {} if there == here else {name: (there, here)}


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _jarm(record: dict[str, Any]) -> str:
    """Version and commit of jarm that made a record."""
    commit = f", commit {record['commit']}" if record.get("commit") else ""
    return f"jarm {record['versions'].get('jarm')}{commit}"


def _read_settings(config: pathlib.Path) -> dict[str, Any]:
    cure = "put it right, or give another --out"
    try:
        settings = parse_json(config.read_bytes(), str(config), cure)
    except JarmError:
        settings = None
    if not isinstance(settings, dict):
        raise JarmError(f"{config} does not hold the settings of runs: {cure}.")
    return checked(settings, _SETTINGS, str(config), cure)
