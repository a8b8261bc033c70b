"""Layout of an embedding store on disk: its settings, and its committed rows (`docs/store.md`).

A store is `meta.json`, `journal.jsonl`, shards of raw rows, and `rows.json`. A row is committed when the journal has
its line, and a line is written only after its rows are on disk; each carries checksums of the rows and of itself.
Before the rows of an append are written, `rows.json` says how many are committed and how far the append may reach: so
what a kill leaves behind is told from a journal that was cut.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jarm.core.files import is_claimed, is_sealed, sealed, write_whole
from jarm.core.outside import array, checked, enum, integer, mapping, parse_json, string, struct
from jarm.core.status import JarmError

FORMAT, VERSION = "jarm-embeddings", 1
META, JOURNAL, ROWS = "meta.json", "journal.jsonl", "rows.json"
AGAIN = "copy it again from where the store was made"
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype("<f4"), "float16": np.dtype("<f2")}

_KEY, _CRC = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{8}")
_SHARD = re.compile(r"shard-(\d{5,12})\.bin")
_MAX_LINE, _MAX_META = 1 << 20, 1 << 22  # bytes
_COUNT = integer(0, 1 << 48)
_META = struct(
    {
        "format": enum(FORMAT),
        "dtype": enum(*DTYPES),
        "width": integer(1, 1 << 24),
        "shard_rows": integer(1, 1 << 48),
        "made_by": mapping(),
        "jarm": string(100),
    }
)
_LINE = struct({"start": _COUNT, "keys": array(low=1), "crc": string(8)})
_LOOKS, _BETWEEN = 4, 0.02  # looks at a store that a writer may be changing, and seconds between them


class Commit(NamedTuple):
    """Rows `start` to `stop` - 1 of a store, committed together, and the CRC-32 of their bytes."""

    start: int
    stop: int
    crc: int


@dataclasses.dataclass(frozen=True)
class Meta:
    """Properties of a whole store.

    Attributes:
      dtype: `bfloat16`, `float32` or `float16`, little-endian.
      width: d, numbers in a row.
      shard_rows: rows in every shard but the last.
      made_by: settings that decide the values: model, revision, hashes, layer, pooling, template, truncation, ...
      jarm: version that made the store; other versions may add to it.
    """

    dtype: str
    width: int
    shard_rows: int
    made_by: Mapping[str, Any]
    jarm: str

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * DTYPES[self.dtype].itemsize


NAMES = ("model", "revision", "compute_dtype")
"""Entries of `made_by` that may differ where the weights are the same: names, and the precision of the computation."""


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Settings by which embeddings differ, in words; empty where they are of one kind.

    Args:
      theirs, ours: `made_by` of two stores.

    Example:
      >>> differing({"model": "a", "layer": 3}, {"model": "b", "layer": 12})
      'layer 12 and not 3'
    """
    own, other = (json.loads(json.dumps(dict(each), default=str)) for each in (theirs, ours))
    odd = sorted(key for key in own.keys() | other.keys() if key not in NAMES and own.get(key) != other.get(key))
    return ", ".join(f"{key} {other.get(key)!r} and not {own.get(key)!r}" for key in odd[:3])


class Rows(NamedTuple):
    """Content of `rows.json`: rows committed when the last append began, and where that append ends, or ended."""

    committed: int
    writing: int


class Journal(NamedTuple):
    """Commits of a store, key -> row, and the number of bytes of the file that hold whole lines."""

    commits: list[Commit]
    row_of: dict[str, int]
    end: int


def is_store(path: Path) -> bool:
    """Whether a folder holds a store."""
    return os.path.isfile(path / META)


def is_key(key: object) -> bool:
    """Whether something is a key as `key_of` makes it."""
    return isinstance(key, str) and _KEY.fullmatch(key) is not None


def shard_name(number: int) -> str:
    """Name of the file of a shard."""
    return f"shard-{number:05d}.bin"


def write_meta(folder: Path, meta: Meta) -> None:
    """Write `meta.json`, whole or not at all, with a checksum of its other entries."""
    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(meta)}
    write_whole(folder / META, json.dumps({**content, "crc": _crc_of(content)}, indent=2) + "\n")


def read_meta(folder: Path) -> Meta:
    """Read the properties of the store in a folder.

    Raises:
      JarmError: no store is there, `meta.json` is damaged, or its format has another version.
    """
    path = folder / META
    if not is_store(folder):
        raise JarmError(f"{folder} is no embedding store, since it has no {META}: check the path.")
    content, crc = None, None
    if path.stat().st_size <= _MAX_META:
        content, crc = _checksummed(path.read_bytes())
    if isinstance(content, dict) and not crc and not {"format", "width", "shard_rows"} & content.keys():
        raise JarmError(f"{path} is not that of an embedding store: give another folder.")
    if isinstance(content, dict) and content.get("format") == FORMAT and content.get("version") != VERSION:
        raise JarmError(
            f"{folder} has version {content.get('version')!r} of the store's format where this jarm reads {VERSION}: "
            "install another version of jarm."
        )
    if not isinstance(content, dict) or crc != _crc_of(content):
        raise JarmError(f"{path} is damaged, as its checksum shows: copy it from where the store was copied from.")
    checked(content, _META, str(path), AGAIN)
    return Meta(**{field.name: content[field.name] for field in dataclasses.fields(Meta)})


def encode_rows(rows: Rows) -> bytes:
    """Content of `rows.json`, as long whatever the numbers, so that it is written over in place."""
    content = rows._asdict()
    return f"{json.dumps({**content, 'crc': _crc_of(content)}):<90}\n".encode()


def read_rows(folder: Path) -> Rows | None:
    """Read `rows.json`; None where there is none, as in stores of jarm before it had that file.

    Raises:
      JarmError: it is damaged.
    """
    path = folder / ROWS
    if not path.exists():
        return None
    content, crc = _checksummed(path.read_bytes()) if path.is_file() and path.stat().st_size <= _MAX_META else (None, 0)
    if not isinstance(content, dict) or crc != _crc_of(content):
        raise JarmError(
            f"{path} is damaged, as its checksum shows: {AGAIN}, or give up rows that are not in {JOURNAL} with `jarm "
            f"store cut {folder}`."
        )
    checked(content, struct({"committed": _COUNT, "writing": _COUNT}), str(path), AGAIN)
    return Rows(content["committed"], content["writing"])


def own_shards(folder: Path) -> dict[int, int]:
    """Number -> size in bytes, of the files in a folder that have the name of a shard."""
    sizes = {}
    for path in folder.glob("shard-*.bin"):
        found = _SHARD.fullmatch(path.name)
        if found and shard_name(int(found[1])) == path.name and path.is_file():
            sizes[int(found[1])] = path.stat().st_size
    return sizes


def shard_bytes(meta: Meta, number: int, rows: int) -> int:
    """Bytes in a shard of a store that has some rows."""
    return min(max(rows - number * meta.shard_rows, 0), meta.shard_rows) * meta.row_bytes


def refuse_lost(folder: Path, rows: int, written: Rows | None) -> None:
    """Refuse a journal with fewer rows than were committed, by `rows.json` as it was before the journal was read."""
    if written is not None and rows < written.committed:
        raise _lost(folder, rows, f"where {written.committed:,} were committed")


def leftovers(folder: Path, meta: Meta, rows: int, sizes: Mapping[int, int], written: Rows | None) -> dict[int, int]:
    """Number -> size to cut it to, of shards with bytes of an append that was cut short; other files are the user's.

    Args:
      folder, meta: the store.
      rows: committed, as the journal has them.
      sizes: of the shards, see `own_shards`.
      written: `rows.json`, as it was after the sizes were read. Without it, as in stores of earlier versions, bytes
        behind the journal's rows cannot be told from rows that were lost.

    Raises:
      JarmError: shards have bytes of which neither the journal nor `rows.json` knows.
    """
    end = rows if written is None else max(rows, written.writing)
    over = {}
    for number in itertools.count(rows // meta.shard_rows):
        least, most = (shard_bytes(meta, number, count) for count in (rows, end))
        if number not in sizes or not (most or (written is None and sizes[number])):
            break
        if sizes[number] > most:
            raise _lost(folder, rows, f"and {shard_name(number)} has {sizes[number] - most:,} bytes behind them")
        if sizes[number] > least or not least:
            over[number] = least
    return over


def look(folder: Path, meta: Meta) -> tuple[Journal, int]:
    """The journal of a store that another process may be writing to, and the bytes of an append that is not committed.

    Raises:
      JarmError: as `read_journal`, `read_rows`, `refuse_lost` and `leftovers`.
    """
    for left in reversed(range(_LOOKS)):
        try:  # in the order in which a writer goes on, so that it makes no difference where it is
            before = read_rows(folder)
            journal = read_journal(folder, meta)
            refuse_lost(folder, len(journal.row_of), before)
            sizes = own_shards(folder)
            over = leftovers(folder, meta, len(journal.row_of), sizes, read_rows(folder))
            return journal, sum(sizes[number] - least for number, least in over.items())
        except JarmError:
            if left < _LOOKS - 1:  # a writer may have undone an append meanwhile, or be about to
                if not left or not is_claimed(folder):
                    raise
                time.sleep(_BETWEEN)
    raise AssertionError


def _lost(folder: Path, rows: int, why: str) -> JarmError:
    return JarmError(
        f"{folder / JOURNAL} has the lines of {rows:,} rows {why}: {AGAIN}, or give up what it lacks with `jarm store "
        f"cut {folder}`."
    )


def encode_commit(start: int, keys: Sequence[str], crc: int) -> bytes:
    """Line of a commit in the journal, with its own CRC-32 at the end."""
    return sealed({"start": start, "keys": list(keys), "crc": f"{crc:08x}"})


def read_journal(folder: Path, meta: Meta, *, to_damage: bool = False) -> Journal:
    """Read the whole lines of the journal; bytes behind the last newline were never committed.

    Args:
      folder, meta: the store.
      to_damage: end before a damaged line instead of refusing it.

    Raises:
      JarmError: a line is damaged or the journal is missing, which no interrupted write causes.
    """
    commits: list[Commit] = []
    row_of: dict[str, int] = {}
    end = 0
    path = folder / JOURNAL
    if not path.is_file():
        if own_shards(folder) and not to_damage:
            raise JarmError(f"{folder} has shards without their {JOURNAL}: copy that here too.")
        return Journal(commits, row_of, end)
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), 1):
            first, found = len(row_of), _decode_commit(line[:-1], len(row_of), meta)
            if not line.endswith(b"\n") and found is None and len(line) < _MAX_LINE:
                break
            # Without its end, a whole line was changed, not cut.
            commit, keys = found if found is not None and line.endswith(b"\n") else (None, [])
            if commit is None or len(set(keys)) < len(keys) or not row_of.keys().isdisjoint(keys):
                if to_damage:
                    break
                raise JarmError(
                    f"Line {number} of {path} is damaged, as its checksum shows or the lines before it: {AGAIN}, or "
                    f"give up what came after its {first:,} rows with `jarm store cut {folder}`."
                )
            row_of.update(zip(keys, range(first, commit.stop), strict=True))
            commits.append(commit)
            end += len(line)
    return Journal(commits, row_of, end)


def read_commits(folder: Path, meta: Meta, commits: Sequence[Commit]) -> Iterator[tuple[Commit, bytes, bool]]:
    """Each commit, its bytes as far as the shard has them, and whether they are all there and as they were written."""
    file, opened = None, -1
    try:
        for commit in commits:
            number, within = divmod(commit.start, meta.shard_rows)
            if number != opened:
                if file is not None:
                    file.close()
                path = folder / shard_name(number)
                file, opened = path.open("rb") if path.is_file() else None, number
            size, data = (commit.stop - commit.start) * meta.row_bytes, b""
            if file is not None:
                file.seek(within * meta.row_bytes)
                data = file.read(size)
            yield commit, data, len(data) == size and zlib.crc32(data) == commit.crc
    finally:
        if file is not None:
            file.close()


def _decode_commit(line: bytes, start: int, meta: Meta) -> tuple[Commit, list[str]] | None:
    """Commit and keys of a line; None if the line is damaged, or its commit does not begin at this row."""
    if not is_sealed(line):
        return None
    try:
        content = parse_json(line, "", "")
    except JarmError:
        return None
    if _LINE(content, "") or content["start"] != start or not all(map(is_key, content["keys"])):
        return None
    if not _CRC.fullmatch(content["crc"]):
        return None
    commit = Commit(start, start + len(content["keys"]), int(content["crc"], 16))
    same_shard = start // meta.shard_rows == (commit.stop - 1) // meta.shard_rows
    return (commit, content["keys"]) if same_shard else None


def _checksummed(data: bytes) -> tuple[Any, Any]:
    """The content of a small file without its entry `crc`, and that entry; None where there is none."""
    try:
        content = parse_json(data, "", "")
    except JarmError:
        return None, None
    return content, content.pop("crc", None) if isinstance(content, dict) else None


def _crc_of(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
