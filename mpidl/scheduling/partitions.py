"""How an epoch is cut into iterations, and an iteration into partitions. Pure.

Everything depends on the number of samples, the batch size and the number of partitions only, never on the ranks.
"""

from __future__ import annotations

from mpidl.parameters import Assignment

Span = tuple[int, int]
"""Positions [start, stop) in an epoch's order of samples."""


def num_iterations(num_samples: int, batch_size: int) -> int:
    """Iterations of one epoch: a last, smaller batch is an iteration of its own.

    A single sample that is left over joins the batch before it: one sample alone has no variance for BatchNorm.
    """
    full, rest = divmod(num_samples, batch_size)
    return full + (1 if rest > 1 or (rest == 1 and full == 0) else 0)


def batch_span(num_samples: int, batch_size: int, index: int) -> Span:
    """The positions of an epoch's iteration `index`."""
    last = index == num_iterations(num_samples, batch_size) - 1
    return index * batch_size, num_samples if last else (index + 1) * batch_size


def num_partitions(batch: int, batch_size: int, partitions: int) -> int:
    """Into how many partitions a batch is cut.

    A smaller last batch is cut into fewer where a partition would get a single sample although those of a full batch
    get more.

    Args:
        batch: samples of this batch.
        batch_size: samples of a full batch.
        partitions: partitions of a full batch.
    """
    fewest = min(2, batch_size // partitions)
    return min(partitions, max(1, batch // fewest))


def last_partitions(num_samples: int, batch_size: int, partitions: int) -> int:
    """Into how many partitions an epoch's last batch is cut."""
    start, stop = batch_span(num_samples, batch_size, num_iterations(num_samples, batch_size) - 1)
    return num_partitions(stop - start, batch_size, partitions)


def partition_span(span: Span, partitions: int, partition: int) -> Span:
    """The positions of one partition of a batch; sizes differ by at most one sample."""
    start, stop = span
    size = stop - start
    return start + size * partition // partitions, start + size * (partition + 1) // partitions


def assignment_for(full: Assignment, partitions: int) -> Assignment:
    """Who computes what in an iteration of `partitions` partitions: the plan's ranges, cut where there are fewer.

    Cut, not spread anew: a range that begins where it began and ends earlier never needs more rows than were made.
    Spread evenly, 8 partitions on 3 ranks need a row more than 9.
    """
    if partitions == full.num_partitions:
        return full
    return Assignment(partitions, tuple(min(start, partitions) for start in full.starts))
