"""What each partition reports with its gradient: loss, weight, samples, flags, the time, when it was started.

One slot per partition, float64. The counters ride with the gradients, so after the exchange every rank knows every
partition's values: the exact global loss, the divisor, and which partition's loss is not finite, without a message
of their own. Sums over partitions are made locally, in partition order, in float64.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpidl.errors import LayoutError, NonFiniteLossError, TooManyDroppedError
from mpidl.parameters.assignment import Assignment
from mpidl.runtime import Pending, World, on_all_ranks, share

FIELDS = ("loss_sum", "weight", "samples", "flags", "seconds", "started")
LOSS_SUM, WEIGHT, SAMPLES, FLAGS, SECONDS, STARTED = range(len(FIELDS))

EQUAL_WEIGHTS = 1
"""Flag: `step` was called without num_samples."""

TOO_EARLY = 2
"""Flag: gradients changed after their bucket was announced; everything has to be reduced once more."""

DROPPED = 4
"""Flag: the partition was not computed; it weighs nothing."""

FIRST_FREE = 8
"""Flags from here on are the caller's own."""


class Counters:
    """The counters of at most `max_partitions` partitions. Construction is collective.

    Each rank writes the slots of its own partitions in its segment of node-shared memory between two exchanges;
    `table` is this rank's private copy of all partitions, complete after an exchange.
    """

    def __init__(self, world: World, max_partitions: int) -> None:
        shape = (max_partitions, len(FIELDS))
        segments = share(world, 8 * shape[0] * shape[1])
        self._segments = [segment.view(np.float64).reshape(shape) for segment in segments]
        self._own = self._segments[world.local_rank]
        self.table: NDArray[np.float64] = np.zeros(shape)
        """float64, (max_partitions, 6): FIELDS of every partition."""

    def write(
        self,
        partition: int,
        loss_sum: float,
        weight: float,
        samples: int,
        flags: int = 0,
        seconds: float = 0.0,
        started: float = 0.0,
    ) -> None:
        """Set this rank's values of one partition."""
        self._own[partition] = (loss_sum, weight, samples, flags, seconds, started)

    def read_node(self, world: World, assignment: Assignment) -> None:
        """Copy the counters of this node's partitions into `table`; after the node barrier."""
        first = world.first_rank_of(world.node)
        for local_rank, segment in enumerate(self._segments):
            start, stop = assignment.range_of(first + local_rank)
            self.table[start:stop] = segment[start:stop]

    def num_bytes(self, start: int, stop: int) -> int:
        """Bytes that partitions [start, stop) take in a message."""
        return 8 * len(FIELDS) * (stop - start)

    def pack(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of partitions [start, stop), as of now."""
        return self.table[start:stop].reshape(-1).view(np.uint8)

    def unpack(self, message: NDArray[Any], start: int, stop: int) -> None:
        """Take partitions [start, stop) from a message of `num_bytes` bytes."""
        self.table[start:stop].reshape(-1).view(np.uint8)[:] = message.view(np.uint8)

    def allgather(self, world: World, assignment: Assignment) -> Generator[Pending, None, None]:
        """Complete `table` by a collective of its own, which is over when its result is taken. Collective."""
        start, stop = assignment.range_of(world.rank)
        counts = [len(FIELDS) * (assignment.starts[r + 1] - assignment.starts[r]) for r in range(world.size)]
        gathered, pending = world.start_allgather_varying(self._own[start:stop].reshape(-1), counts)
        yield pending
        self.table[: assignment.num_partitions] = gathered.reshape(-1, len(FIELDS))


def check_dropped(table: NDArray[np.float64], most: int | None) -> None:
    """Raise TooManyDroppedError where more than `most` partitions of a complete table were dropped."""
    dropped = int(np.count_nonzero(table[:, FLAGS].astype(int) & DROPPED))
    if most is not None and dropped > most:
        raise TooManyDroppedError(f"{dropped} of {len(table)} partitions were dropped; at most {most} may be")


def check_table(table: NDArray[np.float64]) -> None:
    """See that a complete table can be divided by and counted on; all ranks hold the same, so all raise alike.

    Raises:
        NonFiniteLossError: a partition's loss or weight is not finite, or the weight negative.
        LayoutError: some ranks have told their weights and others have not.
    """
    bad = np.flatnonzero(~np.isfinite(table[:, LOSS_SUM]))
    if bad.size:
        raise on_all_ranks(NonFiniteLossError(f"the loss of partition {bad[0]} is {table[bad[0], LOSS_SUM]}"))
    odd = np.flatnonzero(~(np.isfinite(table[:, WEIGHT]) & (table[:, WEIGHT] >= 0)))
    if odd.size:
        raise on_all_ranks(NonFiniteLossError(f"the weight of partition {odd[0]} is {table[odd[0], WEIGHT]}"))
    flags = table[:, FLAGS].astype(int) & EQUAL_WEIGHTS
    if flags.min() != flags.max():
        raise on_all_ranks(
            LayoutError(
                f"rank {int(flags.argmax())} called step() without num_samples, rank {int(flags.argmin())} with it; "
                "all ranks must do alike"
            )
        )
