"""Latency and bandwidth between ranks, measured in about two seconds, and what memory gives beside them.

Three rounds. In the first, the first two ranks of every node play at once; then the first ranks of nodes 0 and 1, 2
and 3, ...; then those of nodes 1 and 2, 3 and 4, ... So every node is seen with its neighbours, however many there are.
In a round the lower rank leads: it sends a message, the other sends it back; the first byte says whether another
follows, and the leader ends when its time is over. First small messages, then large ones. A rank that is in no pair of
a round goes on to the next. Every wait has a deadline: who waits in vain raises `SilentError`, and its messages are
left to the job's end, which is then an abort (`examination.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpidl.doctor.facts import Link
from mpidl.doctor.networks import carried_bytes, carrier
from mpidl.errors import LaunchError
from mpidl.runtime import World

SMALL_BYTES, LARGE_BYTES = 8, 1 << 20
_SMALL_S, _LARGE_S, _COPY_S = 0.1, 0.35, 0.1
"""How long each is repeated."""
_COPY_BYTES = 32 << 20
_ANSWER_LIMIT_S = 10.0
_TAG = 71


class SilentError(LaunchError):
    """A rank does not answer."""


def measure(world: World) -> list[Link]:
    """The links that this rank leads. Collective, without waiting for any but the own partners.

    Raises:
        SilentError: a partner does not answer.
    """
    copy = copy_speed() if world.local_rank == 0 else 0.0
    return [
        link
        for pairs in _rounds(world.node_sizes)
        for pair in pairs
        if world.rank in pair and (link := _play(world, pair, copy)) is not None
    ]


def _rounds(node_sizes: tuple[int, ...]) -> Iterator[list[tuple[int, int]]]:
    """The pairs of ranks, round by round, the leader first."""
    firsts = [sum(node_sizes[:node]) for node in range(len(node_sizes))]
    yield [(first, first + 1) for first, size in zip(firsts, node_sizes, strict=True) if size > 1]
    for begin in (0, 1):
        yield [(firsts[node], firsts[node + 1]) for node in range(begin, len(firsts) - 1, 2)]


def copy_speed() -> float:
    """Bytes a second that a copy in memory writes."""
    source = np.ones(_COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    np.copyto(target, source)  # the pages are there now
    times: list[float] = []
    end = time.perf_counter() + _COPY_S
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begin)
    return _COPY_BYTES / float(np.median(times))


def _play(world: World, pair: tuple[int, int], copy: float) -> Link | None:
    """Measure a link, with both ranks; the result is the leader's."""
    leads = world.rank == pair[0]
    other = pair[1] if leads else pair[0]
    if not leads:
        _answer(world, other, SMALL_BYTES)
        _answer(world, other, LARGE_BYTES)
        return None
    small = _ask(world, other, SMALL_BYTES, _SMALL_S)
    before = carried_bytes()
    large = _ask(world, other, LARGE_BYTES, _LARGE_S)
    device = carrier(before, carried_bytes(), 2 * LARGE_BYTES * len(large))
    return Link(
        ranks=pair,
        is_inside=world.node_of[pair[0]] == world.node_of[pair[1]],
        # Others, too, want the cores: the median may be the time that the scheduler gives them.
        latency_s=float(np.quantile(small, 0.1)) / 2,
        bytes_per_s=2 * LARGE_BYTES / float(np.quantile(large, 0.1)),
        copy_bytes_per_s=copy,
        device=device,
    )


def _ask(world: World, other: int, num_bytes: int, seconds: float) -> list[float]:
    """Send and receive until the time is over; seconds of each round trip but the first."""
    sent, received = np.ones(num_bytes, np.uint8), np.empty(num_bytes, np.uint8)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while sent[0]:
        sent[0] = time.perf_counter() < end or len(times) < 2
        begin = time.perf_counter()
        _exchange(world, other, sent, received)
        times.append(time.perf_counter() - begin)
    return times[1:]


def _answer(world: World, other: int, num_bytes: int) -> None:
    message = np.ones(num_bytes, np.uint8)
    while message[0]:
        _complete(world, world.comm.Irecv(message, source=other, tag=_TAG), other)
        _complete(world, world.comm.Isend(message, dest=other, tag=_TAG), other)


def _exchange(world: World, other: int, sent: NDArray[np.uint8], received: NDArray[np.uint8]) -> None:
    incoming = world.comm.Irecv(received, source=other, tag=_TAG)
    _complete(world, world.comm.Isend(sent, dest=other, tag=_TAG), other)
    _complete(world, incoming, other)


def _complete(world: World, request: Any, other: int) -> None:
    deadline = time.monotonic() + _ANSWER_LIMIT_S
    while not request.Test():
        if world.shares_cores:
            os.sched_yield()
        if time.monotonic() > deadline:
            raise SilentError(f"rank {other} on {world.hostnames[other]} did not answer within {_ANSWER_LIMIT_S:g} s")
