"""Files: written whole or not at all, fingerprinted, in claimed folders."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import reprlib
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from jarm.core.interrupts import was_left
from jarm.core.status import JarmError

try:
    import fcntl
except ImportError:  # not on Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]

PathLike = str | os.PathLike[str]

WHOLE = 1 << 26
"""Largest file, in bytes (64 MiB), that is fingerprinted whole."""

LOCK = ".lock"
"""File in a folder of jarm that is locked by the process that writes there; empty."""

_drafts = set[Path]()
_SAMPLES, _BLOCK = 256, 1 << 16
_SEAL = len(', "line": "01234567"}')


def fingerprint(path: PathLike) -> str:
    """A cheap SHA-256 of a file, 64 hexadecimal digits.

    It covers the size in bytes, then the whole content of a file of up to 64 MiB, or 256 evenly spaced blocks of
    64 KiB, the first and the last included. A change between the sampled blocks goes unseen.

    Raises:
      JarmError: there is no such file.
    """
    path = existing_file(path)
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            while block := file.read(_BLOCK):
                digest.update(block)
        else:
            for k in range(_SAMPLES):
                file.seek(k * (size - _BLOCK) // (_SAMPLES - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def described(**paths: PathLike) -> dict[str, Any]:
    """Provenance of files, as `name`, `name_bytes` and `name_fingerprint` of each.

    Args:
      **paths: name -> path; `name` in the result is the last part of the path.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "answers.jsonl"
      >>> write_whole(path, "{}")
      >>> provenance = described(answers=path)
      >>> provenance["answers"], provenance["answers_bytes"], provenance["answers_fingerprint"][:8]
      ('answers.jsonl', 2, '0e406cbe')
    """
    return {
        key: value
        for name, path in paths.items()
        for key, value in (
            (name, Path(path).name),
            (f"{name}_bytes", Path(path).stat().st_size),
            (f"{name}_fingerprint", fingerprint(path)),
        )
    }


def open_own(path: Path, *, append: bool = False, new: bool = False) -> IO[bytes]:
    """A file of jarm, opened to read and write, and made if missing; unbuffered, so that closing repeats no write.

    Args:
      path: the file, in a folder that is there.
      append: write at its end only.
      new: refuse a file that is there.

    Raises:
      OSError: the system refuses.
      JarmError: a link, a pipe or the like stands there: what jarm writes goes into its own files alone.
    """
    refuse_link(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise JarmError(f"{path} is no plain file, and may be yours: give another --out.")
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND * append | os.O_EXCL * new
    # Not on all systems; in the time since the look above, a link is refused and a pipe does not block.
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return open(os.open(path, flags, 0o666), "a+b" if append else "r+b", buffering=0)


def refuse_link(path: Path) -> None:
    """Refuse a link in the place of a file or a folder that jarm names.

    Raises:
      JarmError: it is one.
    """
    if os.path.islink(path):
        raise JarmError(f"{path} is a link, and jarm writes through none: remove it, or give --out where it leads.")


def claim(folder: Path) -> IO[bytes]:
    """Hold a folder for writing until the returned file is closed or the process ends, for any reason.

    A file system without locks grants every claim.

    Raises:
      JarmError: another process holds it.
    """
    lock = open_own(folder / LOCK, append=True)
    if not _locked(lock):
        lock.close()
        raise JarmError(f"Another process is writing to {folder}: wait until it has ended, or give another --out.")
    return lock


def is_claimed(folder: Path) -> bool:
    """Whether a process holds a folder; nothing in it is made or changed."""
    try:
        with (
            open_own(folder / LOCK, append=True) if os.path.isfile(folder / LOCK) else contextlib.nullcontext() as lock
        ):
            return lock is not None and not _locked(lock)
    except (OSError, JarmError):  # as where one may only read
        return False


def _locked(lock: IO[bytes]) -> bool:
    """Whether this process has the lock of a file now."""
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def write_whole(path: PathLike, content: str | bytes | Callable[[IO[bytes]], None]) -> None:
    """Write a file whole or not at all: a reader, or a crash, sees the old content or the new, never a part.

    A link that stands there is replaced, and what it points to stays.

    Args:
      path: the file, in a folder that is there.
      content: a text, bytes, or a function that writes them into a file.

    Raises:
      JarmError: it cannot be written; or as `content` does.
    """
    path = Path(path)
    draft = path.with_name(f"{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        with open_own(draft, new=True) as raw, io.BufferedWriter(raw) as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise JarmError(
            f"Cannot write {path} ({error.strerror or error}): make room, or give another --out."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def append_whole(path: Path, data: bytes) -> None:
    """Add bytes to a file, on disk when this returns; what was there stays where they cannot be written.

    Raises:
      JarmError: they cannot be written.
    """
    try:
        with open_own(path, append=True) as file:
            end, left = file.seek(0, os.SEEK_END), data
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise JarmError(f"Cannot write to {path} ({error}): make room, and give the same command to go on.") from error


def sealed(content: Mapping[str, Any]) -> bytes:
    """A line of JSON with the CRC-32 of what comes before it as its last entry, `line`.

    Example:
      >>> sealed({"rule": "random"})
      b'{"rule": "random", "line": "98c2149b"}\\n'
    """
    body = json.dumps(content)[:-1].encode()
    return body + _seal(body) + b"\n"


def is_sealed(line: bytes) -> bool | None:
    """Whether a line without its end is as `sealed` wrote it; None where it has no checksum."""
    body, seal = line[:-_SEAL], line[-_SEAL:]
    return seal == _seal(body) if seal.startswith(b', "line": "') and seal.endswith(b'"}') else None


def _seal(body: bytes) -> bytes:
    return f', "line": "{zlib.crc32(body):08x}"}}'.encode()


def existing_file(path: PathLike) -> Path:
    """The path, if a file is there.

    Raises:
      JarmError: a folder, a pipe or a device is there, or nothing.
    """
    path = Path(path)  # whose own tests raise errors of the system for some names, as one too long
    if os.path.isdir(path):
        raise JarmError(f"{path} is a folder where a file is wanted: name the file in it.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise JarmError(f"{path} is a pipe or a device, which cannot be read twice: write its content to a file.")
    if not os.path.isfile(path):
        raise JarmError(f"{path} does not exist: check the path.")
    return path


def there(path: Path) -> bool:
    """Whether a name is taken, if only by a link to nothing: what is half there is read, and refused, not passed over.

    Example:
      >>> there(Path("/")), there(Path("/nowhere"))
      (True, False)
    """
    return os.path.lexists(path)


def make_folder(path: PathLike) -> None:
    """Make a folder, and those above it, where they are missing.

    Raises:
      JarmError: a file, or a link that leads nowhere, has its name or that of a folder above it.
      OSError: as of the system.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        there = error.filename
        if os.path.islink(there) and not os.path.exists(there):
            raise JarmError(
                f"{there} is a link to {os.readlink(there)}, which is not there: make that folder, or give another "
                "--out."
            ) from None
        raise JarmError(f"{there} is a file, where a folder is wanted: give another --out.") from None


@contextlib.contextmanager
def whole_folder(folder: PathLike) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` when the block ends: there is nothing there before, or all.

    Until then it stands beside it as `.NAME.xxxxxxxx.tmp`, or in it where it is there already: then its files move up,
    `config.json` last. Where the block fails it is removed; a kill leaves it.

    Args:
      folder: a new or empty one.

    Raises:
      JarmError: it cannot be written, or is no longer empty.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp()) / "model"
      >>> with whole_folder(folder) as draft:
      ...     write_whole(draft / "config.json", "{}")
      ...     there(folder)
      False
      >>> there(folder / "config.json"), len(list(folder.parent.iterdir()))
      (True, 1)
    """
    folder = Path(os.path.abspath(folder))
    made = not folder.is_dir()
    make_folder(folder.parent)
    place = folder.parent if made else folder
    draft = place / f".{folder.name[:200]}.{secrets.token_hex(4)}.tmp"
    _drafts.add(draft)
    try:
        draft.mkdir()
        yield draft
        if was_left():  # the command has said that it was stopped
            return
        if made:
            draft.rename(folder)
        else:
            _move_up(draft)
    except OSError as error:
        cure = "make room, or give" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "give"
        raise JarmError(f"Cannot write {folder} ({error.strerror or error}): {cure} another --out.") from error
    finally:
        remove_drafts(draft)


def _move_up(draft: Path) -> None:
    """Move the files of a folder into the one that it stands in, which is otherwise empty."""
    if len(os.listdir(draft.parent)) > 1:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    for path in sorted(draft.iterdir(), key=lambda each: each.name == "config.json"):
        path.rename(draft.parent / path.name)


def remove_drafts(*drafts: Path) -> None:
    """Remove folders that `whole_folder` fills; all of this process, where none is named, as it is about to end."""
    for draft in drafts or tuple(_drafts):
        shutil.rmtree(draft, ignore_errors=True)
        _drafts.discard(draft)


def inside(folder: Path, name: str, source: Path) -> Path:
    """The path of a name in a folder; the name cannot lead out of it, but what it names may be a link.

    Args:
      folder: the folder.
      name: a relative path with forward slashes; empty for the folder itself.
      source: the file that says the name.

    Raises:
      JarmError: the name is absolute, has `..` in it or is none that a file can have.

    Example:
      >>> inside(Path("model"), "1_Pooling/config.json", Path("model/modules.json")).as_posix()
      'model/1_Pooling/config.json'
      >>> inside(Path("model"), "../weights", Path("model/modules.json"))
      Traceback (most recent call last):
      jarm.core.status.JarmError: model/modules.json names '../weights', which is no place in model: download it again.
    """
    parts = name.split("/") if name else []
    odd = not name.isprintable() or "\\" in name or ":" in name or len(name) > 1000
    if odd or name.startswith("/") or any(part == ".." or len(part.encode()) > 255 for part in parts):
        raise JarmError(f"{source} names {reprlib.repr(name)}, which is no place in {folder}: download it again.")
    return folder.joinpath(*parts)


def plain(value: Any) -> Any:
    """A value as JSON has it: NumPy and JAX scalars become Python numbers, NaN and infinities None.

    Example:
      >>> [plain(value) for value in (np.float32(0.5), np.int64(3), float("nan"), "greedy_dopt")]
      [0.5, 3, None, 'greedy_dopt']
    """
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        value = np.asarray(value).item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_tree(value: Any) -> Any:
    """Records, dictionaries, lists and arrays of values, each as `plain` has it.

    Example:
      >>> plain_tree({"mean": np.float32(0.5), "ends": (float("nan"), 1)})
      {'mean': 0.5, 'ends': [None, 1]}
    """
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: plain_tree(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
        return [plain_tree(each) for each in value]
    return plain(value)
