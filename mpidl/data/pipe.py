"""Messages over the private pipes between a loader and its worker processes.

A message is a pickle of protocol 5 whose arrays and tensors travel beside it: they are written from where they
lie and read to where they stay. cloudpickle takes along what a worker cannot import, such as a Dataset defined
in a script or a notebook. Only what a parent and its own child send each other is ever unpickled here; nothing
from disk or network is.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import cloudpickle
import numpy as np
import torch

from mpidl.data import memory
from mpidl.data.order import Order

Frame: TypeAlias = list[memoryview]  # the pickle, then the buffers it refers to

REQUEST = struct.Struct("<3q")  # epoch, start, stop

_COUNT = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a worker is told first, before the data set.

    Attributes:
        order: the order of the data set.
        default_dtype: torch's default type in the parent, for Datasets that make tensors.
        dies_with_parent: whether the kernel shall kill the worker when the thread that started it ends.
    """

    order: Order
    default_dtype: torch.dtype
    dies_with_parent: bool


def encode(message: object) -> Frame:
    """Turn a message into bytes, its arrays into views of their memory.

    Raises:
        Exception: whatever the message's own parts raise when they cannot be pickled.
    """
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(message)
    return [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]


def decode(frame: Sequence[memoryview]) -> Any:
    """Rebuild the message; its arrays and tensors use the frame's memory."""
    return pickle.loads(frame[0], buffers=frame[1:])


def write_frame(file: io.FileIO, frame: Frame) -> None:
    """Write a frame, however little the pipe takes at a time.

    Raises:
        OSError: nobody reads the other end any more.
    """
    sizes = [len(part) for part in frame]
    header = struct.pack(f"<{len(sizes) + 1}Q", len(sizes), *sizes)
    for part in (memoryview(header), *frame):
        while part.nbytes:
            part = part[file.write(part) :]


def read_frame(file: io.FileIO) -> Frame:
    """Read one frame.

    Raises:
        EOFError: the other end was closed, between two frames or within one.
    """
    (count,) = _COUNT.unpack(read_exactly(file, _COUNT.size))
    sizes = struct.unpack(f"<{count}Q", read_exactly(file, count * _COUNT.size))
    return [read_exactly(file, size) for size in sizes]


def read_exactly(file: io.FileIO, size: int) -> memoryview:
    """Read so many bytes into new memory.

    Raises:
        EOFError: the file ended before.
    """
    content = memory.empty((size,), np.uint8).data  # not set to zero first, as a bytearray is
    filled = 0
    while filled < size:
        count = file.readinto(content[filled:])
        if not count:
            raise EOFError(f"the pipe ended after {filled} of {size} bytes")
        filled += count
    return content


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no type hints
    """cloudpickle with tensors as out-of-band buffers and memory maps as the names of their files."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor and _is_plain(value):
            flat = value.contiguous().view(-1).view(torch.uint8) if value.numel() else torch.empty(0, dtype=torch.uint8)
            return _tensor, (pickle.PickleBuffer(flat.numpy().data), value.dtype, tuple(value.shape))
        if type(value) is np.memmap and _is_whole_file(value):  # by value, it would be read whole
            mode = "r" if value.mode == "r" else "r+"
            order = "C" if value.flags.c_contiguous else "F"
            return np.memmap, (value.filename, value.dtype, mode, value.offset, value.shape, order)
        return super().reducer_override(value)


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _is_whole_file(array: np.memmap[Any, Any]) -> bool:
    """Tell whether opening the file again gives the same array: not of parts, nor of copies on write."""
    base: object = array.base
    return isinstance(base, mmap.mmap) and array.mode in ("r", "r+", "w+")


def _tensor(buffer: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not len(buffer):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)
