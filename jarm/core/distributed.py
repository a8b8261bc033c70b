"""Several processes on one job, usually one per host or per device: how they join, wait for each other and agree."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import re
import socket
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from jarm.core.status import JarmError, printable

SHUTDOWN_SECONDS = 60
"""Time that a process that ends waits for the others; where one has failed, the others hang this long."""
LOOK_SECONDS = 0.5
"""Time between two looks of a process at whether others still work."""


def start_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device: int | None = None,
    timeout: int = 300,
) -> None:
    """Join the other processes of this run, before anything touches a device.

    Options that are not given are detected under SLURM, Open MPI, Kubernetes or on a TPU pod
    (`jax.distributed.initialize`).

    Args:
      coordinator: host and port of process 0, such as `10.0.0.1:1234`, within reach of all processes.
      processes: number of processes.
      process_id: number of this process, from 0.
      local_device: the only device of its host that this process takes, from 0; by default all, or as SLURM and the
        others say.
      timeout: seconds to wait for the others; after them JAX ends a waiting process 0.

    Raises:
      JarmError: the address is malformed or does not answer, the id is out of range, nothing was detected, or a device
        is in use already.
    """
    if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise JarmError(f"'{coordinator}' is no address of process 0: write HOST:PORT, such as 10.0.0.1:1234.")
    if processes is not None and process_id is not None and not 0 <= process_id < processes:
        raise JarmError(f"There is no process {process_id} of {processes}: count them from 0 to {processes - 1}.")
    if jax.distributed.is_initialized():
        raise JarmError("The processes are joined already: call `start_processes` once.")
    if coordinator is not None and process_id:
        _await(coordinator, timeout)
    # The service would take SIGTERM for itself, by which a run is asked to stop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            local_device_ids=local_device,
            initialization_timeout=timeout,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise JarmError(
            "Nothing here says which processes belong together: give the coordinator's HOST:PORT, the number of "
            "processes and the id of this one, or start under SLURM, Open MPI, Kubernetes or on a TPU pod."
        ) from error
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise JarmError("A device is in use already: join the processes before any computation.") from error
        raise JarmError(
            f"Process {process_id} did not join at {coordinator}: is the port free and the same for all "
            f"({' '.join(str(error).split())})?"
        ) from error


def join_if_asked(
    distributed: bool,
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    local_device: int | None = None,
) -> None:
    """`start_processes` with the options of a command, unless none is given or the processes are joined already.

    Args:
      distributed: join the processes that are detected.
      coordinator, processes, process_id, local_device: as for `start_processes`.

    Raises:
      JarmError: as `start_processes`; or others are given without `distributed` or `coordinator`.
    """
    if not (coordinator or distributed):
        if (processes, process_id, local_device) != (None, None, None):
            raise JarmError(
                "Which process this is, of how many and on which device, goes with `--coordinator HOST:PORT`: give "
                "that too."
            )
    elif not jax.distributed.is_initialized():
        start_processes(coordinator, processes, process_id, local_device=local_device)


def _await(coordinator: str, timeout: int) -> None:
    """Wait until process 0 answers: otherwise JAX would abort this process, with a stack trace of C++."""
    host, port = coordinator.rsplit(":", 1)
    end = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()
        except (OSError, OverflowError) as error:
            if time.monotonic() >= end:
                raise JarmError(
                    f"Process 0 did not answer at {coordinator} within {timeout} s ({error}): start it, and give all "
                    "processes an address that they reach."
                ) from error
            time.sleep(0.2)


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """Wait for all processes at the end of the block; where it failed in one of them, it fails in all.

    Raises:
      JarmError: the block failed in another process.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        fine = np.all(multihost_utils.process_allgather(np.array(failure is None)))
        if failure is None and not fine:
            raise JarmError("Another process stopped, and says why: fix that, and start all of them again.")
    if failure is not None:
        raise failure


@contextlib.contextmanager
def long_step(folder: pathlib.Path) -> Iterator[None]:
    """`in_step` for a block that some processes finish much later than others, too late for a collective operation.

    Each process keeps a file in the folder while it works, and all wait until no file is left. A process that fails
    reports it at once.

    Args:
      folder: a place that all processes see, with no such files yet.

    Raises:
      JarmError: as `in_step`; or the processes see different folders.
    """
    if jax.process_count() == 1:
        yield
        return
    own, failure = folder / str(jax.process_index()), None
    with in_step():
        folder.mkdir(exist_ok=True)
        own.touch()
    with in_step():
        if len(_at_work(folder)) != jax.process_count():
            raise JarmError(
                f"{folder.parent} is not one folder for all processes: give all of them the same, on a disk that they "
                "share."
            )
    with in_step():
        try:
            yield
        except Exception as error:
            failure = error
            print(f"jarm: process {own.name} stopped: {printable(error)}", file=sys.stderr, flush=True)
        finally:
            own.unlink(missing_ok=True)
        while _at_work(folder):
            time.sleep(LOOK_SECONDS)
        if failure is not None:
            raise failure


def _at_work(folder: pathlib.Path) -> list[str]:
    """Numbers of the processes that work in `long_step`."""
    return [each.name for each in folder.iterdir() if each.name.isdigit()]


def agreed(text: str) -> bool:
    """Whether all processes call this with the same text; True for a single process."""
    if jax.process_count() == 1:
        return True
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return bool((np.asarray(multihost_utils.process_allgather(own)) == own).all())
