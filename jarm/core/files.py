"""Files: written whole or not at all, fingerprinted, in claimed folders."""

from __future__ import annotations

import hashlib
import math
import os
import reprlib
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from jarm.core.status import JarmError

try:
    import fcntl
except ImportError:  # not on Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]

PathLike = str | os.PathLike[str]

WHOLE = 1 << 26
"""Largest file, in bytes (64 MiB), that is fingerprinted whole."""

_SAMPLES, _BLOCK = 256, 1 << 16


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
      >>> replace_text(path, "{}")
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


def claim(folder: Path) -> IO[str]:
    """Hold a folder for writing until the returned file is closed or the process ends, for any reason.

    A file system without locks grants every claim.

    Raises:
      JarmError: another process holds it.
    """
    lock = (folder / ".lock").open("a", encoding="utf-8")
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise JarmError(
            f"Another process is writing to {folder}: wait until it has ended, or give another --out."
        ) from None
    except OSError:
        pass  # a file system without locks
    return lock


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a reader, or a crash, sees the old text or the new, never a part."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def existing_file(path: PathLike) -> Path:
    """The path, if a file is there.

    Raises:
      JarmError: a folder is there, or nothing.
    """
    path = Path(path)  # whose own tests raise errors of the system for some names, as one too long
    if os.path.isdir(path):
        raise JarmError(f"{path} is a folder where a file is wanted: name the file in it.")
    if not os.path.isfile(path):
        raise JarmError(f"{path} does not exist: check the path.")
    return path


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
