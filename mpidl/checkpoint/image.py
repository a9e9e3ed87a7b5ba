"""A shard's file as it stands in memory, from which a thread writes it while training goes on.

The file is in safetensors' format (eight bytes with the length of a JSON header, the header, the numbers), which any
reader of that format takes. It is put together here because the library's own writer copies every vector once more and
keeps Python's interpreter to itself until all is written, so training would stand still. Here the copy of the weights
*is* the file, in a buffer that is kept from one checkpoint to the next; writing and hashing it let the interpreter go.

Behind the vectors stands a table of checksums, one for each chunk of `CHUNK_BYTES` of all that is before it. The
manifest has the sum of the table. So a rank that needs a part of a file reads and checks this part only. The sums are
128-bit XXH3: they find damage, as fast as memory is read; SHA-256 took as long as writing itself. They do not prove who
wrote a file, and neither would another sum that lies in the same folder.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mpidl.checkpoint.transfer import BLOCK_BYTES, PIECE_BYTES, SUM_BYTES, Bytes, checksum, go_direct, pages, write_all

Float32Array = NDArray[np.float32]

CHUNK_BYTES = 4 << 20
"""Bytes of a file that are summed together, and so read together; a piece that is written at a time has several."""
TABLE = "xxh3_128"
"""The name of the table among the file's tensors."""


class ShardImage:
    """The file of one shard.

    Args:
        keys: the names of its vectors.
        size: elements of each of them.
    """

    def __init__(self, keys: Sequence[str], size: int) -> None:
        self.keys = list(keys)
        head = header(self.keys, size)
        self.data_start = len(head)
        """Where the first vector begins in the file."""
        self.data_stop = self.data_start + 4 * size * len(keys)
        """Where the table begins."""
        self._content = pages(self.data_stop + table_bytes(self.data_stop), for_transfer=True)
        self._content[: self.data_start] = np.frombuffer(head, np.uint8)
        vectors = self._content[self.data_start : self.data_stop].view(np.float32).reshape(len(keys), size)
        self.vectors: dict[str, Float32Array] = dict(zip(self.keys, vectors, strict=True))
        """Each vector, float32, (size,), to be written by the owner."""

    def touch(self) -> None:
        """Have the system give the memory now; nothing may stand in the vectors yet. Lets the interpreter go."""
        self._content[self.data_start :] = 0

    @property
    def num_bytes(self) -> int:
        """The length of the file."""
        return self._content.nbytes

    def write(self, path: pathlib.Path, beat: Callable[[], None] = lambda: None) -> str:
        """Write the file and have it on disk. Each piece is summed just before.

        Args:
            path: of the file.
            beat: called whenever some of it is written.

        Returns:
            The checksum of the table of sums, in hexadecimal.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        table = self._content[self.data_stop :]
        with path.open("wb", buffering=0) as file:
            go_direct(file.fileno())
            for start in range(0, self.data_stop, PIECE_BYTES):
                piece = self._content[start : min(start + PIECE_BYTES, self.data_stop)]
                sums = chunk_sums(piece)
                table[table_bytes(start) :][: sums.size] = sums
                write_all(file.fileno(), piece, beat)
            write_all(file.fileno(), table)
            os.fsync(file.fileno())  # by the host that wrote it: on network file systems nobody else can
        return checksum(table).hex()


def header(keys: Sequence[str], size: int) -> bytes:
    """The eight bytes and the JSON in front of the vectors, padded with spaces so that they are aligned."""

    def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}

    length = 4 * size
    entries = {key: entry("F32", [size], i * length, (i + 1) * length) for i, key in enumerate(keys)}
    begin = stop = len(keys) * length
    head = b""
    for _ in range(2):  # the table's length depends on the header's, which is not known before
        num_sums = table_bytes(begin + len(head)) // SUM_BYTES
        stop = begin + num_sums * SUM_BYTES
        text = json.dumps({**entries, TABLE: entry("U8", [num_sums, SUM_BYTES], begin, stop)}).encode()
        padded = -(-(8 + len(text)) // BLOCK_BYTES) * BLOCK_BYTES - 8
        head = padded.to_bytes(8, "little") + text.ljust(padded)
    assert table_bytes(begin + len(head)) == stop - begin, "a header of another length"
    return head


def table_bytes(num_bytes: int) -> int:
    """The length of the table of so many bytes' sums."""
    return SUM_BYTES * -(-num_bytes // CHUNK_BYTES)


def chunk_sums(content: Bytes) -> Bytes:
    """The sums of chunks, uint8, one behind the other."""
    starts = range(0, content.size, CHUNK_BYTES)
    return np.frombuffer(b"".join(checksum(content[start : start + CHUNK_BYTES]) for start in starts), np.uint8)
