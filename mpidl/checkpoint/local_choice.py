"""Which of the starts that nodes have kept (`local.py`) is taken: pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from mpidl.parameters.layout import Piece

Place = tuple[str, int, int]
"""An image: series, rank, iteration."""


@dataclasses.dataclass
class Held:
    """What one rank of now can read."""

    images: set[Place] = dataclasses.field(default_factory=set)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    """The number of ranks of each series."""
    commons: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    """Series and iteration."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A whole start, and who reads what of it."""

    series: str
    iteration: int
    holders: tuple[int, ...]
    """By rank of then, the rank of now."""
    common: int
    """Who reads the common file."""


def choose(told: Sequence[Held], newer_than: int) -> Choice | None:
    """The newest whole start; None: there is none.

    Args:
        told: by rank of now.
        newer_than: iterations that a start must have more than.
    """
    starts = {common for held in told for common in held.commons if common[1] > newer_than}
    for series, iteration in sorted(starts, key=lambda start: (start[1], start[0]), reverse=True):
        sizes = {held.sizes[series] for held in told if series in held.sizes}
        if len(sizes) != 1:
            continue
        readers = [
            [now for now, held in enumerate(told) if (series, rank, iteration) in held.images]
            for rank in range(min(*sizes, sum(len(held.images) for held in told) + 1))
        ]
        if all(readers):
            # Ranks of a node see the same files: each reads some.
            holders = tuple(found[rank % len(found)] for rank, found in enumerate(readers))
            common = min(now for now, held in enumerate(told) if (series, iteration) in held.commons)
            return Choice(series, iteration, holders, common)
    return None


def newest(told: Sequence[Held]) -> int | None:
    """The newest start of which there is anything at all."""
    return max((image[2] for held in told for image in held.images), default=None)


def covers(runs: Iterable[Sequence[Piece]], total: int) -> bool:
    """Whether shards are the whole vector."""
    position = 0
    for start, stop in sorted(run for each in runs for run in each):
        if start != position:
            return False
        position = stop
    return position == total
