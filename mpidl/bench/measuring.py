"""Timing ways in turn."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpidl.runtime import World


class Timed(Protocol):
    """One way to do what is measured. Both calls may be collective: all ranks make them in the same order."""

    def prepare(self) -> None:
        """What has to be done before each run and is not timed."""

    def run(self) -> None:
        """What is timed."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one way over its repetitions; the same on all ranks."""

    seconds: float
    """Median of the slowest rank's."""
    spread: tuple[float, float]
    """The quartiles around it."""
    cpu_seconds: float
    """Median of the ranks' mean processor time, all threads of the process."""

    def divided(self, number: int) -> Timing:
        """The times of one of `number` equal parts."""
        low, high = self.spread
        return Timing(self.seconds / number, (low / number, high / number), self.cpu_seconds / number)

    def with_cpu_of(self, share: float) -> Timing:
        """The mean processor time of so many of the ranks, where the others do nothing."""
        return dataclasses.replace(self, cpu_seconds=self.cpu_seconds / share)


def time_in_turn(
    world: World, ways: Mapping[str, Timed], repeats: int, after: Callable[[], None] = lambda: None
) -> dict[str, Timing]:
    """Run all ways one after the other, again and again, so that all meet the same machine. Collective.

    A repetition begins when every rank has prepared; it has taken as long as on the slowest rank. The first one, which
    touches memory and opens connections, does not count. Each repetition begins with another way than the last.

    Args:
        world: the ranks.
        ways: name -> way; the same names on all ranks.
        repeats: how often each is timed.
        after: called after each run, outside the timed part.

    Returns:
        name -> seconds, the same on all ranks.
    """
    names = list(ways)
    wall = np.empty((len(names), repeats + 1))
    cpu = np.empty((len(names), repeats + 1))
    for repeat in range(repeats + 1):
        for turn in range(len(names)):
            index = (turn + repeat) % len(names)
            way = ways[names[index]]
            way.prepare()
            world.barrier()
            begin, cpu_begin = time.perf_counter(), time.process_time()
            way.run()
            wall[index, repeat] = time.perf_counter() - begin
            cpu[index, repeat] = time.process_time() - cpu_begin
            after()
    slowest = world.allreduce(wall, "max")[:, 1:]
    mean_cpu = world.allreduce(cpu)[:, 1:] / world.size
    return {name: _timing(slowest[index], mean_cpu[index]) for index, name in enumerate(names)}


def pause(seconds: float) -> float:
    """Sleep, instead of computing for so long; returns how long it took."""
    if seconds == 0:
        return 0.0
    began = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - began


def quartiles(values: NDArray[Any]) -> tuple[float, tuple[float, float]]:
    """The median and the quartiles around it."""
    low, median, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return median, (low, high)


def _timing(wall: NDArray[Any], cpu: NDArray[Any]) -> Timing:
    return Timing(*quartiles(wall), float(np.median(cpu)))
