"""Writing to a store of embeddings: rows survive any death of the process once `append` has returned."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from jarm.core.files import PathLike, claim
from jarm.core.messages import listed, nearest
from jarm.core.status import JarmError
from jarm.core.version import __version__
from jarm.data.journal import (
    DTYPES,
    JOURNAL,
    META,
    Commit,
    Meta,
    encode_commit,
    is_key,
    read_journal,
    read_meta,
    shard_name,
    write_meta,
)

COMMIT_ROWS, COMMIT_BYTES = 4096, 1 << 24
"""Largest numbers of rows and bytes that share a line of the journal: `verify` finds damage line by line."""


class StoreWriter:
    """A store of embeddings, open for appending by one process; a context manager.

    Each text has one row: a row whose key the store has, or that repeats a key of the same call, is left out.

    Example:
      >>> import tempfile
      >>> from jarm.data.store import key_of
      >>> with StoreWriter(tempfile.mkdtemp(), 2, {"model": "mine"}, dtype="float32") as writer:
      ...     writer.append([key_of("one"), key_of("two")], np.eye(2))
      ...     writer.append([key_of("one")], np.ones((1, 2)))
      2
      0

    Attributes:
      path: the folder.
      meta: dtype, width and `made_by`.
    """

    def __init__(
        self,
        path: PathLike,
        width: int,
        made_by: Mapping[str, Any],
        *,
        dtype: str = "bfloat16",
        shard_bytes: int = 1 << 30,
    ) -> None:
        """Open or make a store. Rows that a killed writer left uncommitted are dropped; committed rows stay.

        Args:
          path: the folder.
          width: d, numbers in a row.
          made_by: all settings that decide the values, as JSON; a store with other settings is refused. With a
            `template` that names the columns of a table, such as `{prompt}\\n\\n{response}`, `load_table` finds the
            rows by itself.
          dtype: `bfloat16`, `float32`, or `float16`, which hidden states of some models overflow.
          shard_bytes: size of a new store's shards, rounded down to whole rows; an existing store keeps its own.

        Raises:
          JarmError: the folder holds a store with other settings, damage, or a part of a store; it cannot be written;
            or another process writes to it. Its files stay unchanged.
        """
        if dtype not in DTYPES:
            raise JarmError(f"A store has no dtype {dtype!r}{nearest(dtype, DTYPES)}: use {', '.join(DTYPES)}.")
        if width < 1:
            raise JarmError(f"A store of rows {width} wide holds nothing: give the width of the embeddings.")
        self.path = Path(path)
        rows = max(1, shard_bytes // (width * DTYPES[dtype].itemsize))
        meta = Meta(dtype, width, rows, json.loads(json.dumps(made_by)), __version__)
        with contextlib.ExitStack() as stack, explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(claim(self.path))
            self.meta = self._made_or_refused(meta)
            journal = read_journal(self.path, self.meta)
            self._row_of, self._end = journal.row_of, journal.end
            self._cut_shards()
            self._file = stack.enter_context(_opened(self.path / JOURNAL))
            self._file.truncate(self._end)
            _sync_folder(self.path)
            _sync_folder(self.path.parent)
            self._open = stack.pop_all()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write."""
        self._open.close()

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, key: object) -> bool:
        return key in self._row_of

    @property
    def keys(self) -> list[str]:
        """Key of each committed row."""
        return list(self._row_of)

    def append(self, keys: Sequence[str], rows: Any) -> int:
        """Add rows, on disk and committed when this returns. A call takes two syncs, so a few MB at once are best.

        Args:
          keys: `key_of` the text of each row.
          rows: `[k, d]`, of any float type; rounded to the store's.

        Returns:
          Number of rows that were new.

        Raises:
          JarmError: keys and rows do not fit, a value is not finite or overflows the store's dtype, or the disk is
            full. Earlier rows stay committed, and another `append` may follow.
        """
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape != (len(keys), self.meta.width):
            wanted = (len(keys), self.meta.width)
            raise JarmError(
                f"{self.path} got {len(keys):,} keys and rows of shape {rows.shape}: give it rows of shape {wanted}."
            )
        for key in keys:
            if not is_key(key):
                raise JarmError(f"{key!r} is no key of a store: make it with key_of(text).")
        first: dict[str, int] = {}
        for at, key in enumerate(keys):
            if key not in self._row_of:
                first.setdefault(key, at)
        fresh = list(first.values())
        if len(fresh) < len(keys):
            keys, rows = [keys[at] for at in fresh], rows[fresh]
        if not keys:
            return 0
        self._commit(keys, self._converted(rows))
        return len(keys)

    def _converted(self, rows: np.ndarray) -> np.ndarray:
        """The rows in the store's dtype, contiguous and finite."""
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(rows, DTYPES[self.meta.dtype])
        bad = np.flatnonzero(~_finite(stored, self.meta.dtype))
        if bad.size:
            if np.isfinite(rows[bad[0]]).all():
                raise JarmError(
                    f"Embeddings overflow {self.meta.dtype} in {listed(bad)} of a batch: make a store of bfloat16 or "
                    "float32."
                )
            raise JarmError(
                f"Embeddings are NaN or infinite in {listed(bad)} of a batch: run the model in bfloat16 or float32, or "
                "leave those texts out."
            )
        return stored

    def _commit(self, keys: Sequence[str], rows: np.ndarray) -> None:
        """Write rows to disk, then their lines; a failure or an interruption leaves the store as it was."""
        start, end, lines = len(self), self._end, b""
        try:
            with explained(self.path):
                for commit in self._pieces(rows):
                    within = slice(commit.start - start, commit.stop - start)
                    lines += encode_commit(commit.start, keys[within], commit.crc)
                self._file.truncate(end)
                write_at(self._file, end, lines)
                os.fsync(self._file.fileno())
            self._row_of.update(zip(keys, range(start, start + len(keys)), strict=True))
            self._end = end + len(lines)
        except BaseException:
            if self._end == end:
                for key in keys:
                    self._row_of.pop(key, None)
                with contextlib.suppress(OSError):
                    self._file.truncate(end)
            raise

    def _pieces(self, rows: np.ndarray) -> Iterator[Commit]:
        """Write rows to their shards and sync them, in pieces that lie within one shard."""
        row_bytes, per_shard = self.meta.row_bytes, self.meta.shard_rows
        first = start = len(self)
        while start < first + len(rows):
            number, within = divmod(start, per_shard)
            count = min(COMMIT_ROWS, max(1, COMMIT_BYTES // row_bytes), per_shard - within, first + len(rows) - start)
            data = rows[start - first : start - first + count].reshape(-1).view(np.uint8).data
            path = self.path / shard_name(number)
            new = not path.exists()
            with _opened(path) as file:
                write_at(file, within * row_bytes, data)
                os.fsync(file.fileno())
            if new:
                _sync_folder(self.path)
            yield Commit(start, start + count, zlib.crc32(data))
            start += count

    def _made_or_refused(self, meta: Meta) -> Meta:
        """Properties of the folder's store, if they fit those given; a new store gets those given."""
        if (self.path / META).exists():
            old = read_meta(self.path)
            theirs, ours = ({"dtype": m.dtype, "width": m.width, **m.made_by} for m in (old, meta))
            # Where the weights have a fingerprint, names are for people only: folders are renamed.
            names = {"model", "revision"} if "weights" in ours else set()
            other = [n for n in dict.fromkeys([*theirs, *ours]) if theirs.get(n) != ours.get(n) and n not in names]
            if other and (_size(self.path / JOURNAL) or any(self.path.glob("shard-*.bin"))):
                shown = ", ".join(f"{name} {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in other[:4])
                raise JarmError(
                    f"The store {self.path} was made otherwise ({shown}): give another --out, or the same settings."
                )
            if not other:
                return old
        elif (self.path / JOURNAL).exists() or any(self.path.glob("shard-*.bin")):
            raise JarmError(f"{self.path} holds parts of a store without its {META}: give another --out.")
        write_meta(self.path, meta)
        _sync_folder(self.path)
        return meta

    def _cut_shards(self) -> None:
        """Drop rows that were never committed; refuse, and touch nothing, where committed rows are missing."""
        found = {path: path.stat().st_size for path in self.path.glob("shard-*.bin")}
        full, rest = divmod(len(self), self.meta.shard_rows)
        wanted = {number: self.meta.shard_rows for number in range(full)} | ({full: rest} if rest else {})
        sizes = {self.path / shard_name(number): rows * self.meta.row_bytes for number, rows in wanted.items()}
        for path, size in sizes.items():
            if found.get(path, 0) < size:
                raise JarmError(
                    f"{path} holds {found.get(path, 0):,} of the {size:,} bytes that the journal counts: copy it again "
                    "from where the store was made."
                )
        for path, size in found.items():
            if path not in sizes:
                path.unlink()
            elif size > sizes[path]:
                os.truncate(path, sizes[path])


def _finite(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Whether each row is finite; for bfloat16 by its bits, which is ten times as fast as its `isfinite`."""
    if dtype == "bfloat16":
        return np.all((rows.view(np.uint16) & 0x7FFF) < 0x7F80, axis=1)
    return np.all(np.isfinite(rows), axis=1)


def _opened(path: Path) -> IO[bytes]:
    """A file for reading and writing, created if missing; unbuffered, so that closing repeats no failed write."""
    return path.open("r+b", buffering=0) if path.exists() else path.open("x+b", buffering=0)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def write_at(file: IO[bytes], offset: int, data: Any) -> None:
    """Write all bytes at an offset of an unbuffered file."""
    file.seek(offset)
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _sync_folder(path: Path) -> None:
    """Make the names of new files durable, where the system can."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of the system into one sentence with its cure."""
    try:
        yield
    except OSError as error:
        raise JarmError(
            f"Cannot write to the store {path} ({error}): make room or give another --out, and go on with the same "
            "command."
        ) from error
