"""Memory that the ranks of a node share.

Each rank's segment is a file in /dev/shm that never has a name (O_TMPFILE), sized with posix_fallocate, so that a full
file system is an error here and not a SIGBUS later. The other ranks of the node open it through its owner's entry in
/proc and map it; then the owner closes it. Nothing is left behind whatever ends the job and whenever, and the memory of
a dead rank stays readable. A rank that is alone on its node uses private memory.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import pathlib

import numpy as np
from numpy.typing import NDArray

from mpidl.errors import MpidlError
from mpidl.local_folder import DIRECTORY as DIRECTORY
from mpidl.runtime.faults import on_all_ranks
from mpidl.runtime.world import World


class SharedMemoryError(MpidlError):
    """Some node has no room, or no place, for shared memory; raised on every rank."""


def share(world: World, num_bytes: int) -> list[NDArray[np.uint8]]:
    """Give each rank a zeroed segment that all ranks of its node can read and write.

    Collective: every rank must call it; sizes may differ.

    Args:
        world: the ranks and nodes.
        num_bytes: size of this rank's own segment; 0 for none.

    Returns:
        uint8 arrays, one per local rank, aligned to pages; the own one is `[world.local_rank]`.

    Raises:
        SharedMemoryError: on every rank of the world when any node failed.
    """
    if world.local_size == 1:
        segments, failure = [_private(num_bytes)], ""
    else:
        segments, failure = _map_all(world, num_bytes)
    failures = [text for text in world.allgather_object(failure) if text]
    if failures:
        raise on_all_ranks(SharedMemoryError(failures[0]))
    return segments


def forget_names_of_mpi() -> None:
    """Take the names of MPICH's shared memory away; every rank of the machine has to have it mapped by now.

    MPICH 5 does so in MPI_Finalize only: what is aborted or killed leaves some 2 MB in /dev/shm each time. The memory
    stays with those that have it mapped, and MPI_Finalize does not mind (tried with 5.0.2).
    """
    try:
        maps = pathlib.Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return
    for path in {line.partition("/")[2] for line in maps.splitlines() if "/dev/shm/mpich_shm_" in line}:
        with contextlib.suppress(OSError):  # another rank was faster
            pathlib.Path("/", path).unlink()


def _private(num_bytes: int) -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), np.uint8)[:num_bytes]


def _map_all(world: World, num_bytes: int) -> tuple[list[NDArray[np.uint8]], str]:
    """Create, exchange paths, map, close; on failure an explanation instead of an exception."""
    descriptor, failure = None, ""
    try:
        descriptor = _create(num_bytes)
    except OSError as error:
        failure = f"{num_bytes / 2**20:.0f} MiB in {DIRECTORY} on {world.hostname}: {error.strerror}"
    entries = world.node_allgather_object((f"/proc/{os.getpid()}/fd/{descriptor}", num_bytes, failure))
    segments: list[NDArray[np.uint8]] = []
    failure = next((text for _, _, text in entries if text), "")
    try:
        if not failure:
            segments = [_open(path, size) for path, size, _ in entries]
    except OSError as error:
        failure = f"mapping a neighbour's segment in {DIRECTORY} on {world.hostname}: {error.strerror}"
    world.node_barrier()
    if descriptor is not None:
        os.close(descriptor)
    return segments, failure


def _create(num_bytes: int) -> int:
    """The descriptor of a new file without a name."""
    if not hasattr(os, "O_TMPFILE"):
        raise OSError(errno.ENOTSUP, "this system has no files without a name")
    descriptor = os.open(DIRECTORY, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, max(num_bytes, 1))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _open(path: str, num_bytes: int) -> NDArray[np.uint8]:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return np.frombuffer(mmap.mmap(descriptor, max(num_bytes, 1)), np.uint8)[:num_bytes]
    finally:
        os.close(descriptor)
