"""Arrays in NumPy's files: .npy memory-mapped, .npz read whole. Nothing is unpickled."""

from __future__ import annotations

import lzma
import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mpidl.errors import MALFORMED, DataError

AnyArray: TypeAlias = npt.NDArray[Any]
ArrayPair: TypeAlias = tuple[AnyArray, AnyArray]

DEFLATE_RATIO = 1032
"""Bytes that one compressed byte can become at most; zlib's "Technical details"."""

_DAMAGED = (
    OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, SyntaxError, tokenize.TokenError,
    *MALFORMED,
)  # fmt: skip
"""What zipfile, its decoders and NumPy raise: an array's header is text of Python's, and so are its errors."""

_PAIRS = (("x", "y"), ("images", "labels"), ("inputs", "targets"), ("x_train", "y_train"))
_VALIDATION_PAIRS = (("x_val", "y_val"), ("x_test", "y_test"))


def open_npy(path: Path) -> AnyArray:
    """Map an .npy file into memory, read only; its contents are read where they are used.

    Raises:
        DataError: the file is missing, not an .npy file, cut short, empty, or of Python objects.
    """
    check_file(path)
    try:
        array: AnyArray = np.load(path, mmap_mode="r", allow_pickle=False)
    except _DAMAGED as error:
        raise DataError(f"{path} is not a whole .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is an .npz file, not an .npy file; give it alone, without a second file")
    return array


def open_npz(path: Path) -> ArrayPair:
    """Read the inputs and targets of an .npz file that holds one data set.

    Raises:
        DataError: as `open_npz_sets`, or the file holds a validation set as well.
    """
    train, validation = open_npz_sets(path)
    if validation is not None:
        raise DataError(f"{path} holds a training and a validation set; load both with mpidl.data.load_named")
    return train


def open_npz_sets(path: Path) -> tuple[ArrayPair, ArrayPair | None]:
    """Read the training set of an .npz file, and its validation set if it has one.

    The arrays are found by name: x and y, images and labels, inputs and targets, or x_train and y_train; the
    validation set's are x_val and y_val, or x_test and y_test. A file of exactly two arrays may have any names:
    the first are the inputs.

    Raises:
        DataError: the file is missing, cut short or not an .npz file, or its arrays are not these, or of
            Python objects.
    """
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {Path(info.filename).stem: info for info in archive.infolist()}
            train: tuple[str, ...] | None = next((pair for pair in _PAIRS if set(pair) <= set(members)), None)
            if train is None and len(members) == 2:
                train = tuple(members)
            if train is None:
                raise DataError(
                    f"{path} holds {', '.join(members) or 'nothing'}; a data set has the arrays x and y, or "
                    "x_train, y_train, x_val and y_val"
                )
            validation = next((pair for pair in _VALIDATION_PAIRS if set(pair) <= set(members)), None)
            arrays = {name: _read_member(archive, members[name]) for name in (*train, *(validation or ()))}
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(f"{path} is not a whole .npz file of numbers: {error}") from error
    pairs = [(arrays[pair[0]], arrays[pair[1]]) for pair in (train, validation) if pair]
    return pairs[0], pairs[1] if validation else None


def check_file(path: Path) -> None:
    """See that the path names a file.

    Raises:
        DataError: there is none, or it is a folder.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; the current directory is {Path.cwd()}")
    if not path.is_file():
        raise DataError(f"{path} is not a file")


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> AnyArray:
    """Read one array after comparing the size its header states with the size of the member.

    NumPy would allocate what the header says before it looks.
    """
    with archive.open(info) as file:
        shape, dtype = _read_header(file)
        stated, present = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
        if dtype.hasobject:
            raise DataError(f"{archive.filename}: {info.filename} holds Python objects; save arrays of numbers")
        if stated != present:
            raise DataError(
                f"{archive.filename}: {info.filename} should hold {stated} bytes, {shape} of {dtype}, and has {present}"
            )
        if stated > DEFLATE_RATIO * Path(archive.filename or "").stat().st_size:
            raise DataError(f"{archive.filename}: {info.filename} states {stated} bytes, more than the file can hold")
    with archive.open(info) as file:
        array: AnyArray = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"a member is in .npy format {version}, which is for structures, not numbers")
    return shape, dtype
