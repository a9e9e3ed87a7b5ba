"""Bytes between memory and files, past the system's page cache where the file system lets them.

The cache would keep what nobody reads again soon, and costs a copy and fresh memory for every byte, on cores that
training wants. Without it (O_DIRECT) memory, place in the file and length have to be whole blocks. What is not, as a
file's end, and what a file system refuses, goes through the cache: both answer EINVAL, and the flag is taken away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Callable

import numpy as np
import xxhash
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

BLOCK_BYTES = 4096
"""What memory, places and lengths are multiples of."""
PIECE_BYTES = 16 << 20
"""At a time: enough for a disk to be busy, or for several servers of a parallel file system."""
SUM_BYTES = 16
"""Of one checksum."""
_DIRECT: int = getattr(os, "O_DIRECT", 0)


def checksum(content: Bytes) -> bytes:
    """The 128-bit XXH3 of some bytes: as fast as memory, and made against damage, not against forgery."""
    return xxhash.xxh3_128_digest(content.data)


def whole_blocks(num_bytes: int) -> int:
    """So many bytes, or the few more that make whole blocks."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def pages(num_bytes: int, *, for_transfer: bool = False) -> Bytes:
    """Zeroed memory from a page's start, uint8, (num_bytes,), in huge pages where the system has them.

    Small ones cost half of the time that reading a checkpoint takes.

    Args:
        num_bytes: its length.
        for_transfer: it is what files are read into or written from. Child processes do not get it: memory that both
            have must not be read into past the cache.
    """
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for name in ("MADV_HUGEPAGE", *(["MADV_DONTFORK"] if for_transfer else [])):
        with contextlib.suppress(AttributeError, OSError):  # this system has no such thing
            memory.madvise(getattr(mmap, name))
    return np.frombuffer(memory, np.uint8)[:num_bytes]


def go_direct(descriptor: int) -> None:
    """Leave out the page cache from now on, where the file system can."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | _DIRECT)


def _leaves_direct(descriptor: int, error: OSError) -> bool:
    """Whether an error means that this has to go through the cache; then it does from now on."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if error.errno != errno.EINVAL or not flags & _DIRECT:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return True


def write_all(descriptor: int, content: Bytes, beat: Callable[[], None] = lambda: None) -> None:
    """Write bytes at the file's position; one call of the system's may take fewer than it is given.

    Args:
        descriptor: of the file.
        content: uint8.
        beat: called whenever some of it is written.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    while content.size:
        size = min(content.size, PIECE_BYTES)
        try:
            written = os.write(descriptor, content[: size - size % BLOCK_BYTES or size].data)
        except OSError as error:
            if not _leaves_direct(descriptor, error):
                raise
            continue
        content = content[written:]
        beat()


def read_at(descriptor: int, position: int, buffer: Bytes, size: int) -> int:
    """Read `size` bytes from a place of a file into the beginning of a buffer; fewer where the file ends before.

    Args:
        descriptor: of the file.
        position: in the file, bytes.
        buffer: uint8, (at least size,); where it has whole blocks, these are filled.
        size: bytes.

    Returns:
        How many there are.

    Raises:
        OSError: it cannot be read.
    """
    done, buffer = 0, buffer[: whole_blocks(size)]
    while done < size:
        try:
            number = os.preadv(descriptor, [buffer[done:].data], position + done)
        except OSError as error:
            if not _leaves_direct(descriptor, error):
                raise
            continue
        if number == 0:
            break
        done += number
    return min(done, size)
