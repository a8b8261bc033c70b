"""Several processes on one job, usually one per host or per device: how they join, wait for each other and agree."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from jarm.core.status import JarmError

SHUTDOWN_SECONDS = 60
"""Time that a process that ends waits for the others; where one has failed, the others hang this long."""


def start_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Join the other processes of this run, before anything touches a device.

    Options that are not given are detected under SLURM, Open MPI, Kubernetes or on a TPU pod
    (`jax.distributed.initialize`).

    Args:
      coordinator: host and port of process 0, such as `10.0.0.1:1234`, within reach of all processes.
      processes: number of processes.
      process_id: number of this process, from 0.
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
) -> None:
    """`start_processes` with the options of a command, unless none is given or the processes are joined already.

    Args:
      distributed: join the processes that are detected.
      coordinator, processes, process_id: as for `start_processes`.

    Raises:
      JarmError: as `start_processes`; or others are given without `distributed` or `coordinator`.
    """
    if not (coordinator or distributed):
        if (processes, process_id) != (None, None):
            raise JarmError(
                "Which process this is, and of how many, goes with `--coordinator HOST:PORT`: give that too."
            )
    elif not jax.distributed.is_initialized():
        start_processes(coordinator, processes, process_id)


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
