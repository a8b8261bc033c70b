"""Files written whole or not at all, claimed folders, and fingerprints."""

from __future__ import annotations

import hashlib
import math
import os
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
"""Files up to so many bytes (64 MiB) are fingerprinted whole."""


_SAMPLES, _BLOCK = 256, 1 << 16


def fingerprint(path: PathLike) -> str:
    """A cheap SHA-256 of what a file holds, hexadecimal.

    Over the size in bytes, then the whole content up to 64 MiB, else 256 evenly spaced blocks of 64 KiB, the first
    and the last among them. A change between the sampled blocks goes unseen.
    """
    path = _existing(path)
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
    """Provenance of files: the last part of the path, `name_bytes` and `name_fingerprint` of each."""
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
    """Hold a folder for writing until what is returned is closed or the process ends, however it ends.

    Raises:
      JarmError: another process holds it.
    """
    lock = (folder / ".lock").open("a")
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
    """Write a file whole or not at all."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _existing(path: PathLike) -> Path:
    path = Path(path)
    if path.is_dir():
        raise JarmError(f"{path} is a folder where a file is wanted: name the file in it.")
    if not path.is_file():
        raise JarmError(f"{path} does not exist: check the path.")
    return path


def plain(value: Any) -> Any:
    """A value as JSON has it: NumPy and JAX scalars as Python numbers, what is not finite as None."""
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        value = np.asarray(value).item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
