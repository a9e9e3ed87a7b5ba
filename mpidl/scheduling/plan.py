"""The message that rank 0 sends for a group of iterations.

Layout, little-endian, in a buffer whose size is fixed for the whole run:

    magic "MPDL", version u16, actions u16, length u32, crc32 u32, index u64, epoch u64, first_iteration u64,
    budget_s f64, num_partitions u32, num_ranks u32, num_iterations u32, num_groups u32,
    starts u32[num_ranks + 1], spans u64[num_iterations, 2], learning_rates f64[num_iterations, num_groups]

`length` counts all bytes of the message and `crc32` covers all of them but itself. Nothing is pickled. A receiver
checks magic, version, length, checksum and every count before it reads an array.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from mpidl.errors import PlanError
from mpidl.parameters import Assignment

MAGIC = b"MPDL"
VERSION = 2
_HEADER = struct.Struct("<4sHHII")
_COUNTS = struct.Struct("<QQQdIIII")
_CHECKSUM_OFFSET = _HEADER.size - 4


class Action(enum.IntFlag):
    """What may be due when a group has ended, as far as it can be foreseen; the ranks find out by themselves."""

    NONE = 0
    END_EPOCH = 1
    VALIDATE = 2
    CHECKPOINT = 4
    END = 8
    WAIT = 16
    """The next plan depends on the validation: it is made and sent after it, not while the group runs."""
    SUMMARIZE = 32
    ONLY_AT_END = 64
    """Of a validation that was done: because the training ended there, and for no other reason."""


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Everything that the ranks need to run a group of iterations by themselves."""

    index: int
    """Number of the group in this run, from 0."""
    epoch: int
    """From 0; a group never spans two epochs."""
    first_iteration: int
    """Number of the group's first iteration in the whole training, from 0."""
    assignment: Assignment
    """Which rank computes which partitions of a full batch."""
    spans: tuple[tuple[int, int], ...]
    """Per iteration: positions [start, stop) in the epoch's order of samples."""
    learning_rates: tuple[tuple[float, ...], ...]
    """Per iteration and param group."""
    actions: Action = Action.NONE
    budget_s: float = 0.0
    """Seconds of an iteration after which a rank drops what it has not started; 0: never."""

    @property
    def num_iterations(self) -> int:
        """Iterations in the group."""
        return len(self.spans)

    def encode(self) -> bytes:
        """The message, at most `capacity` bytes."""
        groups = len(self.learning_rates[0]) if self.learning_rates else 0
        body = _COUNTS.pack(
            self.index,
            self.epoch,
            self.first_iteration,
            self.budget_s,
            self.assignment.num_partitions,
            len(self.assignment.starts) - 1,
            len(self.spans),
            groups,
        )
        body += np.array(self.assignment.starts, "<u4").tobytes()
        body += np.array(self.spans, "<u8").tobytes() + np.array(self.learning_rates, "<f8").tobytes()
        header = _HEADER.pack(MAGIC, VERSION, self.actions, _HEADER.size + len(body), 0)
        return header[:_CHECKSUM_OFFSET] + struct.pack("<I", _checksum(header + body)) + body

    @classmethod
    def decode(cls, message: bytes) -> GroupPlan:
        """Read a message, which may be followed by anything.

        Raises:
            PlanError: not a plan of this version, cut short, or damaged.
        """
        if len(message) < _HEADER.size + _COUNTS.size:
            raise PlanError(f"a plan of {len(message)} bytes is shorter than its header")
        magic, version, actions, length, checksum = _HEADER.unpack_from(message)
        if magic != MAGIC:
            raise PlanError(f"a plan begins with {MAGIC!r}, not {magic!r}")
        if version != VERSION:
            raise PlanError(f"a plan of version {version}, this code reads version {VERSION}: ranks run different code")
        if not _HEADER.size + _COUNTS.size <= length <= len(message):
            raise PlanError(f"a plan that says it has {length} bytes arrived in a message of {len(message)}")
        if _checksum(message[:length]) != checksum:
            raise PlanError("a plan arrived damaged (its checksum does not fit)")
        if actions not in range(2 * max(Action)):
            raise PlanError(f"a plan has actions {actions:#x}, this code knows those up to {2 * max(Action) - 1:#x}")
        body = message[_HEADER.size : length]
        index, epoch, first, budget_s, partitions, ranks, iterations, groups = _COUNTS.unpack_from(body)
        sizes = (4 * (ranks + 1), 16 * iterations, 8 * iterations * groups)
        if len(body) != _COUNTS.size + sum(sizes):
            raise PlanError(f"a plan of {iterations} iterations and {ranks} ranks cannot have {length} bytes")
        offset = _COUNTS.size
        starts = np.frombuffer(body, "<u4", ranks + 1, offset)
        if starts[0] != 0 or starts[-1] != partitions or (starts[1:] < starts[:-1]).any():
            raise PlanError(f"a plan's ranges do not cover {partitions} partitions in the order of the ranks")
        spans = np.frombuffer(body, "<u8", 2 * iterations, offset + sizes[0]).reshape(-1, 2)
        rates = np.frombuffer(body, "<f8", iterations * groups, offset + sizes[0] + sizes[1])
        return cls(
            index=index,
            epoch=epoch,
            first_iteration=first,
            assignment=Assignment(partitions, tuple(starts.tolist())),
            spans=tuple(map(tuple, spans.tolist())),
            learning_rates=tuple(map(tuple, rates.reshape(iterations, groups).tolist())),
            actions=Action(actions),
            budget_s=budget_s,
        )


def _checksum(message: bytes) -> int:
    """Over all bytes of a message but the four that hold it."""
    return zlib.crc32(message[_HEADER.size :], zlib.crc32(message[:_CHECKSUM_OFFSET]))


def capacity(max_group_size: int, world_size: int, num_groups: int) -> int:
    """Bytes that the largest plan of a run takes."""
    return _HEADER.size + _COUNTS.size + 4 * (world_size + 1) + max_group_size * (16 + 8 * num_groups)


def to_buffer(plan: GroupPlan, buffer: NDArray[np.uint8]) -> None:
    """Write a plan into the front of a buffer of `capacity` bytes.

    Raises:
        PlanError: there is no room: it is of another run.
    """
    message = np.frombuffer(plan.encode(), np.uint8)
    if message.size > buffer.size:
        raise PlanError(f"a plan of {message.size} bytes is too long for this run, whose longest has {buffer.size}")
    buffer[: message.size] = message
