"""A store of embeddings for reading: rows on disk, found by the hash of the text that was embedded.

The layout is in `docs/store.md`. Shards are memory-mapped when they are first needed and never copied whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jarm.core.files import PathLike, write_whole
from jarm.core.status import JarmError
from jarm.data.journal import DTYPES, is_key, look, read_commits, read_meta, shard_bytes, shard_name

_FIELD = re.compile(r"\{(\w+)\}")
_GATHERED = 1024  # rows of an export that are gathered at a time
_SAFETENSORS = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}


def key_of(text: str) -> str:
    """Key of a text: the first 32 hexadecimal digits of the SHA-256 of its exact UTF-8 bytes.

    Example:
      >>> key_of("test")
      '9f86d081884c7d659a2feaa0c55ad015'
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def fields(template: str) -> list[str]:
    """Columns that a template like `{prompt}\\n\\n{response}` names."""
    return list(dict.fromkeys(_FIELD.findall(template)))


def fill(template: str, row: Mapping[str, Any]) -> str:
    """A template with the values of a row in the place of their names; braces in the values mean nothing.

    A str stands unchanged, any other value, such as a list of messages, as `canonical` JSON.

    Example:
      >>> fill("{prompt} -> {response}", {"prompt": "2 {a}", "response": [{"role": "user", "content": "b"}]})
      '2 {a} -> [{"content":"b","role":"user"}]'
    """
    return _FIELD.sub(lambda field: value if isinstance(value := row[field[1]], str) else canonical(value), template)


def canonical(value: Any) -> str:
    """JSON with sorted keys, no spaces and unescaped Unicode; keys whose value is None are left out."""
    return json.dumps(without_none(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def without_none(value: Any) -> Any:
    """A value of JSON without the keys whose value is None, at any depth: Arrow adds them."""
    if isinstance(value, Mapping):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


class Damage(NamedTuple):
    """Rows `first` to `last` of a store, in one shard, at least one of them changed since it was written."""

    shard: str
    first: int
    last: int


class EmbeddingStore:
    """Embeddings `[n, d]` on disk and the keys of their texts, as committed when the store was opened.

    `store[i]`, `store[i:j]` and `store[indices]` read as an array does; only the keys are in memory. Another process
    may add rows meanwhile.

    Example:
      >>> import tempfile
      >>> from jarm.data.writer import StoreWriter
      >>> folder, keys = tempfile.mkdtemp(), [key_of("one"), key_of("two")]
      >>> with StoreWriter(folder, 3, {"model": "mine"}, dtype="float32") as writer:
      ...     writer.append(keys, np.array([[1, 2, 3], [4, 5, 6]]))
      2
      >>> store = EmbeddingStore(folder)
      >>> store.shape, store.rows([key_of("two")])
      ((2, 3), array([[4., 5., 6.]], dtype=float32))

    Attributes:
      path: the folder.
      meta: dtype, width and `made_by`.
      shape: `(n, d)`.
      dtype: of a value.
      uncommitted: bytes in shards behind the committed rows, of an append that was under way or cut short.
    """

    ndim = 2

    def __init__(self, path: PathLike) -> None:
        """Open a store for reading.

        Raises:
          JarmError: no store is there, `meta.json` or the journal is damaged, or the journal lacks rows.
        """
        self.path = Path(path)
        self.meta = read_meta(self.path)
        self._journal, self.uncommitted = look(self.path, self.meta)
        self.shape = (len(self._journal.row_of), self.meta.width)
        self.dtype = DTYPES[self.meta.dtype]
        self._shards: dict[int, np.memmap] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def __contains__(self, key: object) -> bool:
        return key in self._journal.row_of

    def __getitem__(self, index: Any) -> np.ndarray:
        """Rows; a slice within one shard is a view of the file."""
        if not isinstance(index, slice):
            return self.gather(index)
        start, stop, step = index.indices(len(self))
        number = start // self.meta.shard_rows
        if step == 1 and start < stop <= (number + 1) * self.meta.shard_rows:
            return self.shard(number)[start - number * self.meta.shard_rows : stop - number * self.meta.shard_rows]
        return self.gather(np.arange(start, stop, step))

    @property
    def template(self) -> str:
        """Template that makes the texts of the keys from a table's columns.

        Raises:
          JarmError: the store has none.
        """
        template = self.meta.made_by.get("template")
        if not isinstance(template, str) or not fields(template):
            raise JarmError(
                f"{self.path} does not say how its texts are made of a table's columns (template {template!r}): save "
                "`store.rows(keys)`, in the table's order, as an .npy."
            )
        return template

    @property
    def keys(self) -> list[str]:
        """Key of each row."""
        return list(self._journal.row_of)

    @property
    def shards(self) -> int:
        """Number of shards that hold rows."""
        return -(-len(self) // self.meta.shard_rows)

    def shard(self, number: int) -> np.memmap:
        """The committed rows of a shard, memory-mapped; `jax.device_put` of it copies nothing on a CPU.

        Raises:
          JarmError: the file is missing or too short.
        """
        if number not in self._shards:
            path = self.path / shard_name(number)
            size, wanted = path.stat().st_size if path.is_file() else 0, shard_bytes(self.meta, number, len(self))
            if size < wanted:
                raise JarmError(
                    f"{path} holds {size:,} of the {wanted:,} bytes that the journal counts: copy it again from where "
                    "the store was made."
                )
            shape = wanted // self.meta.row_bytes, self.meta.width
            self._shards[number] = np.memmap(path, self.dtype, mode="r", shape=shape)
        return self._shards[number]

    def gather(self, indices: Any) -> np.ndarray:
        """Rows in the order of `indices` (int, any shape), `[..., d]`; each shard is read once, from front to back."""
        indices = np.asarray(indices)
        if indices.size and not np.issubdtype(indices.dtype, np.integer):
            raise IndexError(f"rows of a store are counted by integers, not {indices.dtype}")
        flat = indices.reshape(-1).astype(np.int64)
        flat = np.where(flat < 0, flat + len(self), flat)
        if flat.size and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"a row is out of range for a store of {len(self):,}")
        order = np.argsort(flat, kind="stable")
        number, within = np.divmod(flat[order], self.meta.shard_rows)
        for each in np.unique(number).tolist():
            self.shard(each)  # so that a shard that is not there is what stops a read of many rows
        rows = np.empty((len(flat), self.meta.width), self.dtype)
        ends = np.flatnonzero(np.diff(number, append=-1)) + 1
        for start, end in zip([0, *ends[:-1]], ends, strict=True) if len(flat) else ():
            rows[order[start:end]] = self.shard(int(number[start]))[within[start:end]]
        return rows.reshape(*indices.shape, self.meta.width)

    def indices(self, keys: Iterable[str]) -> np.ndarray:
        """Row of each key, `[k]` int64; -1 where the store lacks it."""
        return np.fromiter((self._journal.row_of.get(key, -1) for key in keys), np.int64)

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Rows of some keys, `[k, d]`.

        Raises:
          JarmError: the store lacks a key.
        """
        return self.gather(self._existing(keys))

    def _existing(self, keys: Sequence[str]) -> np.ndarray:
        """Row of each key; refuses keys that the store lacks."""
        indices = self.indices(keys)
        missing = np.flatnonzero(indices < 0)
        if missing.size:
            raise JarmError(
                f"{self.path} lacks {missing.size:,} of {len(indices):,} keys, the first of them "
                f"{keys[missing[0]]!r}: embed those texts into it."
            )
        return indices

    def fingerprint(self, indices: np.ndarray) -> str:
        """SHA-256, hexadecimal, of some rows, by the journal's checksums; it stays as other rows are added."""
        starts = np.array([commit.start for commit in self._journal.commits])
        commits = np.unique(np.searchsorted(starts, indices.reshape(-1), side="right") - 1)
        checksums = [self._journal.commits[commit] for commit in commits]
        text = json.dumps([self.meta.dtype, self.meta.width, self.meta.made_by, checksums], sort_keys=True)
        return hashlib.sha256(text.encode() + indices.astype("<i8").tobytes()).hexdigest()

    def info(self) -> dict[str, Any]:
        """Sizes, dtype and settings of the store, by name.

        Raises:
          JarmError: a shard is missing or too short.
        """
        for number in range(self.shards):
            self.shard(number)
        return {
            "rows": len(self),
            "width": self.meta.width,
            "dtype": self.meta.dtype,
            "bytes": len(self) * self.meta.row_bytes,
            "shards": self.shards,
            "commits": len(self._journal.commits),
            "jarm": self.meta.jarm,
            **{f"made by {name}": value for name, value in self.meta.made_by.items()},
        }

    def verify(self) -> list[Damage]:
        """Read every committed byte, one commit at a time, and compare it with the journal's checksums."""
        return [
            Damage(shard_name(commit.start // self.meta.shard_rows), commit.start, commit.stop - 1)
            for commit, _, whole in read_commits(self.path, self.meta, self._journal.commits)
            if not whole
        ]

    def export(self, out: PathLike, keys: Sequence[str] | None = None) -> None:
        """Write rows as `.npy` or `.safetensors`, in memory that does not grow with the store.

        Keys go along: one a line in `NAME.keys.txt` beside an `.npy`, and as the tensor `keys`, `[n, 16]` uint8, beside
        `embeddings` in `.safetensors`, whose metadata has `made_by`. NumPy has no bfloat16 and loads such an
        `.npy` as two-byte values; `.view(ml_dtypes.bfloat16)` gives them back their type.

        Args:
          out: the file.
          keys: keys whose rows to write, in this order, with repeats; by default all, in the store's order.

        Raises:
          JarmError: another ending, a key that the store lacks, damage in a shard, or a file that cannot be written.
        """
        out = Path(out)
        if out.suffix not in (".npy", ".safetensors"):
            raise JarmError(f"{out} ends in neither .npy nor .safetensors: give one of the two.")
        rows = self._whole_rows() if keys is None else self._picked_rows(self._existing(keys))
        keys = self.keys if keys is None else keys
        if out.suffix == ".npy":
            _refuse_foreign(out)
            write_whole(out, lambda file: self._write_npy(file, out, keys, rows))
        else:
            write_whole(out, lambda file: self._write_safetensors(file, keys, rows))

    def _whole_rows(self) -> Iterator[bytes]:
        """All rows, checked commit by commit."""
        for commit, data, whole in read_commits(self.path, self.meta, self._journal.commits):
            if not whole:
                path = self.path / shard_name(commit.start // self.meta.shard_rows)
                raise JarmError(
                    f"{path} is damaged in rows {commit.start:,} to {commit.stop - 1:,}: copy it again from where "
                    "the store was made."
                )
            yield data

    def _picked_rows(self, indices: np.ndarray) -> Iterator[bytes]:
        """Rows by index, once no row of the store is damaged."""
        for _ in self._whole_rows():
            pass
        for at in range(0, len(indices), _GATHERED):
            yield self.gather(indices[at : at + _GATHERED]).tobytes()

    def _write_npy(self, file: IO[bytes], out: Path, keys: Sequence[str], rows: Iterable[bytes]) -> None:
        descr = "|V2" if self.meta.dtype == "bfloat16" else self.dtype.str
        header = {"descr": descr, "fortran_order": False, "shape": (len(keys), self.meta.width)}
        np.lib.format.write_array_header_1_0(file, header)
        file.writelines(rows)
        write_whole(out.with_suffix(".keys.txt"), lambda text: text.writelines(f"{key}\n".encode() for key in keys))

    def _write_safetensors(self, file: IO[bytes], keys: Sequence[str], rows: Iterable[bytes]) -> None:
        count, end = len(keys), len(keys) * self.meta.row_bytes
        header = {
            "__metadata__": {"made_by": json.dumps(self.meta.made_by)},
            "embeddings": {
                "dtype": _SAFETENSORS[self.meta.dtype],
                "shape": [count, self.meta.width],
                "data_offsets": [0, end],
            },
            "keys": {"dtype": "U8", "shape": [count, 16], "data_offsets": [end, end + 16 * count]},
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(rows)
        file.writelines(map(bytes.fromhex, keys))


def _refuse_foreign(out: Path) -> None:
    """Refuse to write over a text beside an `.npy` that is not the keys of an export, and was not named by the user."""
    keys = out.with_suffix(".keys.txt")
    if os.path.lexists(keys):
        with keys.open("rb") if keys.is_file() else io.BytesIO() as file:
            start = file.read(33)
        if start and not is_key(start[:32].decode(errors="replace")):
            raise JarmError(f"{keys} stands there and may be yours: move it away, or give another --out.")
