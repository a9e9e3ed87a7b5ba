"""The idx format of the MNIST family of data sets, plain or compressed with gzip."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mpidl.data.files import DEFLATE_RATIO, check_file
from mpidl.errors import DataError

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 20


def read_idx(path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Read an idx file: two zero bytes, a type, the number of dimensions, their sizes, the elements.

    Whether the file is compressed is seen from its first bytes. Memory grows with what the file really holds,
    whatever its header says.

    Returns:
        The array, writable, in this machine's byte order; uint8, int8, int16, int32, float32 or float64.

    Raises:
        DataError: the file is missing, is not an idx file, is cut short, or goes on after the last element.

    Source: "The IDX file format", http://yann.lecun.com/exdb/mnist.
    """
    path = Path(path)
    check_file(path)
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == _GZIP_MAGIC
        available = path.stat().st_size * (DEFLATE_RATIO if compressed else 1)
        with path.open("rb") as plain:
            return _read(gzip.open(plain) if compressed else plain, available, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read, or is cut short: {error}; fetch it again") from error


def _read(file: BinaryIO | gzip.GzipFile, available: int, path: Path) -> npt.NDArray[Any]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or not 1 <= magic[3] <= 32:
        raise DataError(
            f"{path} is not an idx file: it begins with {magic.hex(' ') or 'nothing'}; an idx file begins with "
            f"00 00, a type ({', '.join(f'{code:02x}' for code in _TYPES)}) and from 1 to 32 dimensions"
        )
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise DataError(f"{path} is cut short within its header; fetch it again")
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    dtype = np.dtype(_TYPES[magic[2]])
    stated = math.prod(shape) * dtype.itemsize
    content = bytearray()
    if stated <= available:
        while chunk := file.read(min(_CHUNK_BYTES, stated - len(content))):
            content += chunk
    if len(content) < stated:
        raise DataError(f"{path} is cut short: its header states {shape}, {stated} bytes, more than it holds")
    if file.read(1):
        raise DataError(f"{path} goes on after its {shape} elements, {stated} bytes; it is damaged")
    array = np.frombuffer(content, dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)
