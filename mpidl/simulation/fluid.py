"""The aggregated wire: exchanges that go on at the same time share it equally.

An exchange alone takes, round by round, its latencies and what the most loaded link needs. Latencies pass for all at
once, the rest is shared: with m exchanges under way each gets on at 1/m of its speed. Nothing is known of single flows,
so a platform of thousands of nodes costs no more than a small one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

from mpidl.simulation.collectives import Collective, Overheads
from mpidl.simulation.platforms import Platform


@functools.lru_cache(maxsize=20_000)
def alone_s(platform: Platform, overheads: Overheads, collective: Collective) -> tuple[float, float]:
    """Seconds of latencies and of the most loaded links, of an exchange that has the wire for itself."""
    waits = loads = 0.0
    for each in collective.rounds():
        waits += platform.path_s + overheads.round_s + overheads.message_s * len(each.distances)
        loads += platform.seconds(each)
        if collective.is_added:
            waits += overheads.add_s_per_byte * each.num_bytes
    return waits, loads


class _Transfer:
    """An exchange under way: what is left of it, in seconds that it would take alone."""

    def __init__(self, waits: float, load: float) -> None:
        self.waits, self.load = waits, load

    def is_over(self) -> bool:
        return self.waits <= 0 and self.load <= 0


class FluidWire:
    """A wire between nodes that exchanges share; see `timeline.Wire`.

    Args:
        platform: the network.
        overheads: of messages.
        factors: by the collectives' kind, how much longer the links need than the most loaded one says: of a
            simulation flow by flow.
    """

    def __init__(self, platform: Platform, overheads: Overheads, factors: Mapping[str, float] | None = None) -> None:
        self._platform, self._overheads, self._factors = platform, overheads, factors or {}
        self._active: list[_Transfer] = []
        self.now = 0.0

    def start(self, collective: Collective) -> Callable[[], bool]:
        """Begin an exchange."""
        waits, load = alone_s(self._platform, self._overheads, collective)
        transfer = _Transfer(waits, load * self._factors.get(collective.kind, 1.0))
        if not transfer.is_over():
            self._active.append(transfer)
        return transfer.is_over

    def advance(self, until: float) -> None:
        """Let time pass until then, or until an exchange ends or begins to load the wire."""
        sharing = sum(each.waits <= 0 for each in self._active)
        ends = [each.waits if each.waits > 0 else each.load * sharing for each in self._active]
        passed = min([until - self.now, *ends])
        if math.isinf(passed):
            raise RuntimeError("the simulation waits for nothing; a process waits for what never comes")
        for each, end in zip(self._active, ends, strict=True):
            is_first = end <= passed  # no remainder of a rounding is left over
            if each.waits > 0:
                each.waits = 0.0 if is_first else each.waits - passed
            else:
                each.load = 0.0 if is_first else each.load - passed / sharing
        self._active = [each for each in self._active if not each.is_over()]
        self.now += passed
