"""Data sets that mpidl reads, with contents that are good and hostile: see `fuzzing.py`."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mpidl.data import as_source, load_named
from mpidl.data.sources import SampleError
from mpidl.errors import DataError
from tests.fuzzing import Target


def idx(*shape: int) -> bytes:
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + bytes(int(np.prod(shape)))


def npy_that_states(num_elements: int) -> bytes:
    """A header without as much behind it."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (num_elements,)})
    return file.getvalue() + bytes(16)


def npz_that_states(num_elements: int) -> bytes:
    """So does its directory."""
    content = npy_that_states(num_elements)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("x.npy", "y.npy"):
            archive.writestr(name, content)
    small, large = len(content), len(content) - 16 + 4 * num_elements
    return file.getvalue().replace(struct.pack("<LL", small, small), struct.pack("<LL", small, large))


def array_file(array: Any, **named: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **named) if named else np.save(file, array, allow_pickle=True)
    return file.getvalue()


def read_set(name: str, folder: Path, **args: Any) -> None:
    """Load a data set, and read what a batch reads."""
    found = load_named(name, str(folder), args)
    for part in found:
        if part is None:
            continue
        source = as_source(part)
        try:
            source.read(np.array([0, len(source) - 1]), [0, 1])
        except SampleError as error:
            raise DataError(str(error)) from error  # which loaders name the sample of, and end the job


def read_fashion(folder: Path, content: bytes) -> None:
    for name, good in (("train-images-idx3", idx(16, 28, 28)), ("train-labels-idx1", idx(16)),
                       ("t10k-images-idx3", content), ("t10k-labels-idx1", idx(8))):  # fmt: skip
        (folder / f"{name}-ubyte").write_bytes(good)
    read_set("fashion_mnist", folder)


def read_npy(folder: Path, content: bytes) -> None:
    (folder / "x.npy").write_bytes(content)
    (folder / "y.npy").write_bytes(array_file(np.zeros(4, np.int64)))
    try:
        read_set("x.npy,y.npy", folder)
    except DataError as error:  # what fits no tensor, or not the other file, is told of the arrays
        raise DataError(f"{folder}: {error}") from error


def read_npz(folder: Path, content: bytes) -> None:
    (folder / "own.npz").write_bytes(content)
    try:
        read_set("own.npz", folder)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from error


def read_cifar(folder: Path, content: bytes) -> None:
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (folder / f"{name}.bin").write_bytes(bytes(3073))
    (folder / "data_batch_3.bin").write_bytes(content)
    read_set("cifar10", folder, augment=True)


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    PIL.Image.effect_noise((12, 9), 80).convert("RGB").save(file, kind)
    return file.getvalue()


def png_that_states(width: int, height: int) -> bytes:
    content = picture("png")
    head = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]


def read_image(folder: Path, content: bytes) -> None:
    (folder / "train" / "cat").mkdir(parents=True, exist_ok=True)
    (folder / "train" / "cat" / "tom.jpg").write_bytes(content)
    read_set("images", folder, size=4, convert=True)


def read_text(folder: Path, content: bytes) -> None:
    (folder / "a.txt").write_bytes(content)
    read_set("text", folder, tokens="characters", context=3)


DATA = {
    "idx": Target(
        (idx(8, 28, 28), gzip.compress(idx(8, 28, 28))), read_fashion, ratio=1100,
        hostile=(idx(1, 28, 28)[:4] + b"\x7f\xff\xff\xff" + idx(1, 28, 28)[8:], gzip.compress(idx(9, 28, 28) + b"0")),
    ),
    "npy": Target(
        (array_file(np.ones((4, 3), np.float32)), array_file(np.ones((3, 4), ">i2").T)), read_npy,
        hostile=(npy_that_states(2**40), npy_that_states(-1), array_file(np.array([print])), array_file(np.float32(3))),
    ),
    "npz": Target(
        (array_file(None, x=np.ones((4, 3), np.float32), y=np.zeros(4, np.int64)),), read_npz, ratio=1100,
        hostile=(npz_that_states(2**28), array_file(None, x=np.array([print]), y=np.zeros(1))),
    ),
    "cifar": Target((bytes(2 * 3073),), read_cifar),
    "image": Target(tuple(map(picture, ("jpeg", "png", "gif", "bmp", "tiff", "webp", "ppm"))), read_image,
                    hostile=(png_that_states(9000, 9000), png_that_states(2**30, 2**30))),
    "text": Target((("a b c d äöü 漢字 " * 8).encode(),), read_text),
}  # fmt: skip
