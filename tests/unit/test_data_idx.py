"""The idx format."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mpidl.data import read_idx
from mpidl.errors import DataError

CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx_bytes(array: npt.NDArray[Any]) -> bytes:
    code = CODES[array.dtype.str[1:]]
    header = struct.pack(f">4B{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write(path: Path, content: bytes, compressed: bool) -> Path:
    path.write_bytes(gzip.compress(content, 1) if compressed else content)
    return path


WHOLE = idx_bytes(np.arange(60, dtype=np.int16).reshape(3, 4, 5))


@given(data=st.data(), kind=st.sampled_from(sorted(CODES)), compressed=st.booleans())
def test_what_was_written_is_read(
    data: st.DataObject, kind: str, compressed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape = npst.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)
    array = data.draw(npst.arrays(np.dtype(kind), shape))
    found = read_idx(write(tmp_path_factory.getbasetemp() / "drawn.idx", idx_bytes(array), compressed))
    assert found.dtype == np.dtype(kind)
    assert found.dtype.isnative
    assert found.flags.writeable
    assert np.array_equal(found, array, equal_nan=kind[0] == "f")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, compressed: bool) -> None:
    content = gzip.compress(WHOLE) if compressed else WHOLE
    for size in range(len(content)):
        path = write(tmp_path / "cut", content[:size], compressed=False)
        with pytest.raises(DataError, match="cut"):
            read_idx(path)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WHOLE + b"\0", "goes on after its"),
        (b"\1" + WHOLE[1:], "begins with 01 00 0b 03"),
        (WHOLE[:2] + b"\7" + WHOLE[3:], "begins with 00 00 07 03"),
        (WHOLE[:3] + b"\0" + WHOLE[4:], "from 1 to 32 dimensions"),
        (WHOLE[:3] + b"\xff" + WHOLE[4:], "from 1 to 32 dimensions"),
        (b"", "begins with nothing"),
    ],
)
def test_what_is_not_idx_is_refused(tmp_path: Path, content: bytes, message: str, compressed: bool) -> None:
    with pytest.raises(DataError, match=message):
        read_idx(write(tmp_path / "wrong", content, compressed))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("sizes", [(2**32 - 1, 2**32 - 1, 2**32 - 1), (1000, 1000, 5)])
def test_a_header_that_states_more_than_there_is_allocates_nothing(
    tmp_path: Path, sizes: tuple[int, int, int], compressed: bool
) -> None:
    content = struct.pack(">4B3I", 0, 0, 14, 3, *sizes) + bytes(10_000)
    path = write(tmp_path / "bomb", content, compressed)
    tracemalloc.start()
    with pytest.raises(DataError, match="is cut short: its header states"):
        read_idx(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**20


def test_a_damaged_gzip_file_is_refused(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(WHOLE))
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(DataError, match=r"fetch it again|cut short|not an idx"):
        read_idx(write(tmp_path / "damaged.gz", bytes(content), compressed=False))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing does not exist; the current directory is"):
        read_idx(tmp_path / "missing")
    with pytest.raises(DataError, match="is not a file"):
        read_idx(str(tmp_path))
