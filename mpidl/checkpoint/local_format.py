"""The files that `local.py` keeps on a node: written, and read as anybody's."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import mmap
import os
import re
import stat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpidl import local_folder
from mpidl.checkpoint.slots import NUM_SLOTS, Slot, slot_bytes
from mpidl.checkpoint.transfer import BLOCK_BYTES, SUM_BYTES, checksum, whole_blocks
from mpidl.parameters.layout import Piece

Bytes = NDArray[np.uint8]

_MAGIC = b"mpidl kept state"
_FORMAT = 1
_HEAD = len(_MAGIC) + 8 + SUM_BYTES
"""Bytes before a header's text: the magic word, the text's length, its checksum."""
IMAGE = re.compile(r"([0-9a-f]{16})-(\d{5,9})\.(own|copy)")
COMMON = re.compile(r"([0-9a-f]{16})-(\d)\.common")
_MOST_RANKS = 1 << 24


class UnfitError(Exception):
    """A file is not one of this launch and this training."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What an image file says of itself."""

    key: str
    """Of the launch."""
    series: str
    rank: int
    world_size: int
    layout: str
    """The digest of the flat vector's."""
    keys: tuple[str, ...]
    """Of the vectors."""
    runs: tuple[Piece, ...]
    """The shard: elements [start, stop) of the vector without gaps."""
    head_bytes: int
    """Of a slot, before its vectors."""

    @property
    def size(self) -> int:
        """Elements of each vector."""
        return sum(stop - start for start, stop in self.runs)

    @property
    def slot_bytes(self) -> int:
        """The length of one slot."""
        return slot_bytes(self.head_bytes, self.size, len(self.keys))

    def encode(self) -> bytes:
        """As it stands in the file, in whole pages."""
        text = json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}).encode()
        head = _MAGIC + len(text).to_bytes(8, "little") + checksum(np.frombuffer(text, np.uint8)) + text
        return head.ljust(whole_blocks(len(head)), b"\0")

    @classmethod
    def decode(cls, text: bytes) -> Header:
        """What `encode` made of it, behind the sum.

        Raises:
            UnfitError, MALFORMED: it is no header, or one of a shard that cannot be.
        """
        found = json.loads(text)
        if found.pop("format") != _FORMAT:
            raise UnfitError("another format")
        runs = tuple((_count(start), _count(stop)) for start, stop in found.pop("runs"))
        header = cls(keys=tuple(found.pop("keys")), runs=runs, **found)
        texts = [header.key, header.series, header.layout, *header.keys]
        if not all(isinstance(each, str) for each in texts) or len({*header.keys}) != len(header.keys):
            raise UnfitError("names that are none")
        if header.keys[:1] != ("weights",) or not _count(header.rank) < _count(header.world_size) <= _MOST_RANKS:
            raise UnfitError("a rank or vectors that cannot be")
        if _count(header.head_bytes) % BLOCK_BYTES or header.head_bytes < BLOCK_BYTES:
            raise UnfitError("slots that cannot be")
        cuts = [cut for run in runs for cut in run]
        if cuts != sorted(cuts) or any(start == stop for start, stop in runs):
            raise UnfitError("a shard that cannot be")
        return header


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise UnfitError(f"{value!r:.40} is no count")
    return value


def open_folder(name: str) -> int:
    """The descriptor of a private folder of this user, made where there is none.

    Raises:
        OSError: it cannot be made, or it is another's, a link, or open to others.
    """
    path = local_folder.DIRECTORY / name
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        os.close(descriptor)
        raise OSError(errno.EPERM, "it belongs to somebody else, or others may enter it")
    return descriptor


def open_file(folder: int, name: str, flags: int = os.O_RDONLY) -> tuple[int, int]:
    """The descriptor and the length of an ordinary file of this user.

    Raises:
        OSError: it cannot be opened.
        UnfitError: it is something else.
    """
    descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        os.close(descriptor)
        raise UnfitError("not an ordinary file of this user")
    return descriptor, found.st_size


def read_header(descriptor: int, num_bytes: int) -> tuple[Header, int]:
    """The header of an image file, and where its slots begin.

    Args:
        descriptor: of the file.
        num_bytes: its length.

    Raises:
        OSError, UnfitError, MALFORMED: it is none, or does not fit the file's length.
    """
    head = os.pread(descriptor, _HEAD, 0)
    length = int.from_bytes(head[len(_MAGIC) : len(_MAGIC) + 8], "little")
    if len(head) < _HEAD or not head.startswith(_MAGIC) or _HEAD + length > num_bytes:
        raise UnfitError("no header")
    text = os.pread(descriptor, length, _HEAD)
    if checksum(np.frombuffer(text, np.uint8)) != head[-SUM_BYTES:]:
        raise UnfitError("a damaged header")
    header, start = Header.decode(text), whole_blocks(_HEAD + length)
    if start + NUM_SLOTS * header.slot_bytes != num_bytes:
        raise UnfitError("another length than the header says")
    return header, start


def read_slot(descriptor: int, header: Header, start: int, number: int) -> Slot:
    """A copy of a slot, which nobody writes into, after a look at its checksum.

    Raises:
        OSError, UnfitError: it is not sound.
    """
    content = np.empty(header.slot_bytes, np.uint8)
    done = 0
    while done < content.size:
        got = os.preadv(descriptor, [content[done:].data], start + number * content.size + done)
        if not got:
            raise UnfitError("a file that ends too early")
        done += got
    slot = Slot(content, header.keys, header.size, header.head_bytes, has_sum=True)
    if not slot.is_sound():
        raise UnfitError("a wrong checksum")
    return slot


def create(folder: int, name: str, header: bytes, num_bytes: int) -> Bytes:
    """A new file with a header, mapped; the `num_bytes` behind the header.

    Raises:
        OSError: there is no room.
    """
    descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    try:
        os.posix_fallocate(descriptor, 0, len(header) + num_bytes)
        memory = np.frombuffer(mmap.mmap(descriptor, len(header) + num_bytes), np.uint8)
    except OSError:
        os.unlink(name, dir_fd=folder)
        raise
    finally:
        os.close(descriptor)
    memory[: len(header)] = np.frombuffer(header, np.uint8)
    return memory[len(header) :]


@dataclasses.dataclass(frozen=True)
class Common:
    """What is the same on all ranks at one start."""

    series: str
    iteration: int
    state: dict[str, Any]
    """As `Memory.keep` was given it."""
    fixed: dict[str, Any]
    """Of the training, as `describe_fixed` gave it."""
    travelling: list[str] | None
    buffers: bytes
    """In safetensors' format."""


def encode_common(key: str, common: Common) -> bytes:
    """The content of a common file."""
    told = {"key": key, **dataclasses.asdict(dataclasses.replace(common, buffers=b""))}
    del told["buffers"]
    text = json.dumps(told).encode()
    content = len(text).to_bytes(8, "little") + text + common.buffers
    return checksum(np.frombuffer(content, np.uint8)) + content


def decode_common(key: str, content: bytes) -> Common:
    """What `encode_common` made.

    Raises:
        UnfitError, MALFORMED: it is none, or of another launch.
    """
    if len(content) < SUM_BYTES + 8 or checksum(np.frombuffer(content[SUM_BYTES:], np.uint8)) != content[:SUM_BYTES]:
        raise UnfitError("a damaged file")
    start = SUM_BYTES + 8
    stop = start + int.from_bytes(content[SUM_BYTES:start], "little")
    if stop > len(content):
        raise UnfitError("a text that is too long")
    told = json.loads(content[start:stop])
    if told.pop("key") != key:
        raise UnfitError("another launch")
    common = Common(**told, buffers=content[stop:])
    _count(common.iteration)
    texts = [common.series, *(common.travelling or [])]
    if not all(isinstance(each, str) for each in texts):
        raise UnfitError("names that are none")
    if not isinstance(common.state, dict) or not isinstance(common.fixed, dict):
        raise UnfitError("no state")
    return common


def image_name(series: str, rank: int, *, is_own: bool) -> str:
    """The name of a rank's image file, its own or its buddy's."""
    return f"{series}-{rank:05d}.{'own' if is_own else 'copy'}"
