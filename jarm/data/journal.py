"""Layout of an embedding store on disk: its settings, and its committed rows (`docs/store.md`).

A store is `meta.json`, `journal.jsonl`, and shards of raw rows. A row is committed when the journal has its line, and a
line is written only after its rows are on disk; each carries checksums of the rows and of itself.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jarm.core.files import write_whole
from jarm.core.status import JarmError

FORMAT, VERSION = "jarm-embeddings", 1
META, JOURNAL = "meta.json", "journal.jsonl"
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype("<f4"), "float16": np.dtype("<f2")}

_KEY = re.compile(r"[0-9a-f]{32}")
_TAIL = len(', "line": "01234567"}')


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


class Journal(NamedTuple):
    """Commits of a store, key -> row, and the number of bytes of the file that hold whole lines."""

    commits: list[Commit]
    row_of: dict[str, int]
    end: int


def is_store(path: Path) -> bool:
    """Whether a folder holds a store."""
    return (path / META).is_file()


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
    if not path.is_file():
        raise JarmError(f"{folder} is no embedding store, since it has no {META}: check the path.")
    try:
        content = json.loads(path.read_bytes().decode())
        crc = content.pop("crc")
        if content["format"] == FORMAT and content["version"] != VERSION:
            raise JarmError(
                f"{folder} has version {content['version']} of the store's format where this jarm reads {VERSION}: "
                "install another version of jarm."
            )
        meta = Meta(**{field.name: content[field.name] for field in dataclasses.fields(Meta)})
        valid = crc == _crc_of(content) and content["format"] == FORMAT and meta.dtype in DTYPES
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, JarmError):
            raise
        valid = False
    if not valid:
        raise JarmError(f"{path} is damaged, as its checksum shows: copy it from where the store was copied from.")
    return meta


def encode_commit(start: int, keys: Sequence[str], crc: int) -> bytes:
    """Line of a commit in the journal, with its own CRC-32 at the end."""
    body = json.dumps({"start": start, "keys": list(keys), "crc": f"{crc:08x}"})[:-1]
    return f'{body}, "line": "{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def read_journal(folder: Path, meta: Meta) -> Journal:
    """Read the whole lines of the journal; bytes behind the last newline were never committed.

    Raises:
      JarmError: a line is damaged or the journal is missing, which no interrupted write causes.
    """
    commits: list[Commit] = []
    row_of: dict[str, int] = {}
    end = 0
    path = folder / JOURNAL
    if not path.exists():
        if any(folder.glob("shard-*.bin")):
            raise JarmError(f"{folder} has shards without their {JOURNAL}: copy that here too.")
        return Journal(commits, row_of, end)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            decoded = _decode_commit(line[:-1], len(row_of), meta)
            if not line.endswith(b"\n"):
                if decoded is None:
                    break
                decoded = None  # the line is whole, so its newline was changed, not cut
            commit, keys = decoded or (None, [])
            first = len(row_of)
            row_of.update(zip(keys, range(first, first + len(keys)), strict=True))
            if commit is None or len(row_of) != commit.stop:
                raise JarmError(
                    f"Line {number} of {path} is damaged, as its checksum shows: copy the journal again from where the "
                    f"store was made, or cut it before that line and embed again what came after its {first:,} rows."
                )
            commits.append(commit)
            end += len(line)
    return Journal(commits, row_of, end)


def _decode_commit(line: bytes, start: int, meta: Meta) -> tuple[Commit, list[str]] | None:
    """Commit and keys of a line; None if the line is damaged, or its commit does not begin at this row."""
    body, tail = line[:-_TAIL], line[-_TAIL:]
    if tail != f', "line": "{zlib.crc32(body):08x}"}}'.encode():
        return None
    try:
        record = json.loads(line)
        keys, commit = record["keys"], Commit(record["start"], start + len(record["keys"]), int(record["crc"], 16))
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    same_shard = commit.start // meta.shard_rows == (commit.stop - 1) // meta.shard_rows
    return (commit, keys) if keys and commit.start == start and same_shard and all(map(is_key, keys)) else None


def _crc_of(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
