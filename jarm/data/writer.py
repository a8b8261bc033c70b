"""Writing to a store of embeddings: rows survive any death of the process once `append` has returned."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from jarm.core.files import PathLike, claim, make_folder, open_own, write_whole
from jarm.core.messages import listed, nearest
from jarm.core.status import JarmError
from jarm.core.version import __version__
from jarm.data.journal import (
    DTYPES,
    JOURNAL,
    META,
    ROWS,
    Commit,
    Meta,
    Rows,
    encode_commit,
    encode_rows,
    is_key,
    leftovers,
    own_shards,
    read_commits,
    read_journal,
    read_meta,
    read_rows,
    refuse_lost,
    shard_bytes,
    shard_name,
    write_meta,
)

JOBS = "jobs.json"
"""File in a store's folder, for `jarm embed`: the number of rows that the store had when each of its jobs began."""

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
            make_folder(self.path)
            stack.enter_context(claim(self.path))
            self.meta = self._made_or_refused(meta)
            written = read_rows(self.path)
            journal = read_journal(self.path, self.meta)
            self._row_of, self._end = journal.row_of, journal.end
            refuse_lost(self.path, len(self), written)
            self._drop_leftovers(written)
            self._file = stack.enter_context(open_own(self.path / JOURNAL))
            self._file.truncate(self._end)
            write_whole(self.path / ROWS, encode_rows(Rows(len(self), len(self))))
            self._written = Rows(len(self), len(self))
            self._rows_file = stack.enter_context(open_own(self.path / ROWS))
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
        stop = start + len(keys)
        self._refuse_in_the_way(stop)
        try:
            with explained(self.path):
                self._note(Rows(start, max(stop, self._written.writing)), durably=True)
                for commit in self._pieces(rows):
                    within = slice(commit.start - start, commit.stop - start)
                    lines += encode_commit(commit.start, keys[within], commit.crc)
                self._file.truncate(end)
                write_at(self._file, end, lines)
                os.fsync(self._file.fileno())
            self._row_of.update(zip(keys, range(start, stop), strict=True))
            self._end = end + len(lines)
        except BaseException:
            if self._end == end:
                for key in keys:
                    self._row_of.pop(key, None)
                with contextlib.suppress(OSError, JarmError):
                    self._file.truncate(end)
                    self._drop_leftovers(self._written)
                    self._note(Rows(start, start))
            raise
        with contextlib.suppress(OSError):
            self._note(Rows(stop, stop))

    def _note(self, written: Rows, *, durably: bool = False) -> None:
        """Write `rows.json`: durably before an append; afterwards it may come late, since the journal has the rows."""
        write_at(self._rows_file, 0, encode_rows(written))
        if durably:
            os.fsync(self._rows_file.fileno())
        self._written = written

    def _refuse_in_the_way(self, stop: int) -> None:
        """Refuse to write rows up to `stop` into a file that no append of this store made."""
        ours = max(len(self), self._written.writing)
        for number in range(len(self) // self.meta.shard_rows, -(-stop // self.meta.shard_rows)):
            path = self.path / shard_name(number)
            if not shard_bytes(self.meta, number, ours) and os.path.lexists(path):
                raise JarmError(f"{path} is no part of the store, and stands where its next rows go: move it away.")

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
            with open_own(path) as file:
                write_at(file, within * row_bytes, data)
                os.fsync(file.fileno())
            if new:
                _sync_folder(self.path)
            yield Commit(start, start + count, zlib.crc32(data))
            start += count

    def _made_or_refused(self, meta: Meta) -> Meta:
        """Properties of the folder's store, if they fit those given; a new store gets those given."""
        shards = own_shards(self.path)
        if os.path.lexists(self.path / META):
            old = read_meta(self.path)
            theirs, ours = ({"dtype": m.dtype, "width": m.width, **m.made_by} for m in (old, meta))
            # Where the weights have a fingerprint, names are for people only: folders are renamed.
            names = {"model", "revision"} if "weights" in ours else set()
            other = [n for n in dict.fromkeys([*theirs, *ours]) if theirs.get(n) != ours.get(n) and n not in names]
            written = read_rows(self.path)
            if other and (_size(self.path / JOURNAL) or shards or (written is not None and any(written))):
                shown = ", ".join(f"{name} {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in other[:4])
                raise JarmError(
                    f"The store {self.path} was made otherwise ({shown}): give another --out, or the same settings."
                )
            if not other:
                return old
        elif shards or any(os.path.lexists(self.path / name) for name in (JOURNAL, ROWS, JOBS)):
            raise JarmError(f"{self.path} holds parts of a store without its {META}: give another --out.")
        write_meta(self.path, meta)
        _sync_folder(self.path)
        return meta

    def _drop_leftovers(self, written: Rows | None) -> None:
        """Drop rows that were never committed; refuse, and touch nothing, where committed rows are missing."""
        sizes = own_shards(self.path)
        for number in range(-(-len(self) // self.meta.shard_rows)):
            if (size := sizes.get(number, 0)) < (wanted := shard_bytes(self.meta, number, len(self))):
                raise JarmError(
                    f"{self.path / shard_name(number)} holds {size:,} of the {wanted:,} bytes that the journal counts: "
                    "copy it again from where the store was made."
                )
        for number, size in leftovers(self.path, self.meta, len(self), sizes, written).items():
            cut_shard(self.path / shard_name(number), size)


def cut(path: PathLike) -> tuple[int, int]:
    """Keep the rows of a store before its first damage, and give up what came after, so that it is written to again.

    Args:
      path: the folder; its `meta.json` has to be whole.

    Returns:
      Number of rows that are kept, and of bytes of shards that are given up.

    Raises:
      JarmError: no store is there, another process writes to it, or it cannot be written.

    Example:
      >>> import tempfile
      >>> from jarm.data.store import key_of
      >>> folder = Path(tempfile.mkdtemp())
      >>> with StoreWriter(folder, 2, {"model": "mine"}, dtype="float32") as writer:
      ...     writer.append([key_of("one")], np.ones((1, 2)))
      ...     writer.append([key_of("two")], np.ones((1, 2)))
      1
      1
      >>> damaged = (folder / "journal.jsonl").read_bytes()[:-1]
      >>> _ = (folder / "journal.jsonl").write_bytes(damaged)
      >>> cut(folder)
      (1, 8)
    """
    path = Path(path)
    meta = read_meta(path)
    with explained(path), claim(path):
        journal = read_journal(path, meta, to_damage=True)
        whole = list(itertools.takewhile(lambda each: each[2], read_commits(path, meta, journal.commits)))
        rows = whole[-1][0].stop if whole else 0
        lines = (path / JOURNAL).read_bytes().splitlines(keepends=True)[: len(whole)] if whole else []
        sizes = own_shards(path)
        last = next(number for number in itertools.count() if number not in sizes)
        write_whole(path / ROWS, encode_rows(Rows(rows, rows)))
        write_whole(path / JOURNAL, b"".join(lines))
        given_up = 0
        for number in range(last):
            size = shard_bytes(meta, number, rows)
            given_up += max(sizes[number] - size, 0)
            cut_shard(path / shard_name(number), size)
        _sync_folder(path)
    return rows, given_up


def cut_shard(path: Path, size: int) -> None:
    """Drop the bytes of a shard behind a size, or the file where that is 0."""
    if size:
        with open_own(path) as file:
            file.truncate(size)
    else:
        path.unlink()


def _finite(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Whether each row is finite; for bfloat16 by its bits, which is ten times as fast as its `isfinite`."""
    if dtype == "bfloat16":
        return np.all((rows.view(np.uint16) & 0x7FFF) < 0x7F80, axis=1)
    return np.all(np.isfinite(rows), axis=1)


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
