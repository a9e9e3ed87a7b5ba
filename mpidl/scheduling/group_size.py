"""How many iterations the next group has. Pure.

A number stays what it is. "auto" keeps the share of the time that coordination takes between two bounds: above the
upper one the size is multiplied, so that the share falls fast; below the lower one it shrinks by a step, so that what
the coordinator decides takes effect sooner. A group is never meant to take longer than `max_group_seconds`, at the time
of an iteration as measured: what the coordinator decides waits for its end. Triggers cut groups where something can be
foreseen to be due (`triggers.py`). A group has one iteration only where two would take longer than that: its plan's
broadcast has nothing to hide behind, and is small beside such an iteration. The numbers of a training do not depend on
the group size.

What is smoothed are the two measurements, a group's coordination in seconds and an iteration's; the share follows from
them for any size. A share that was smoothed itself would go on telling of sizes that are long past, and so would one
of a group that a trigger has cut short.

Source: Venkataraman et al., Drizzle (SOSP 2017), section 3.4: additive decrease, multiplicative increase, over an
exponential average.
"""

from __future__ import annotations

LOWER_SHARE, UPPER_SHARE = 0.01, 0.05
"""Below this share of coordination groups shrink, above it they grow."""
MAX_GROUP_S = 2.0
LARGEST_AUTO = 256
FACTOR, STEP = 2, 1
SHORTEST_AUTO = 2
"""The next plan arrives while the first runs, and its samples are read while the second does."""
NEWEST = 0.3
"""How much of a smoothed number is the newest measurement."""


class GroupSize:
    """The group size over the course of a run; kept by the coordinator.

    Args:
        setting: iterations, or "auto".
        max_group_seconds: the longest time a group may be meant to take; "auto" only.
    """

    def __init__(self, setting: int | str, max_group_seconds: float = MAX_GROUP_S) -> None:
        self._automatic = setting == "auto"
        self._max_group_s = max_group_seconds
        self._has_begun = False
        self._smoothed: tuple[float, float] | None = None  # seconds of a group's coordination, of an iteration
        self.value = 1 if self._automatic else int(setting)
        """Iterations of the next group."""

    @property
    def largest(self) -> int:
        """The largest value that may ever come."""
        return LARGEST_AUTO if self._automatic else self.value

    @property
    def share(self) -> float | None:
        """The share of coordination in a group of `value` iterations; None as long as nothing was learned."""
        if self._smoothed is None:
            return None
        coordination_s, iteration_s = self._smoothed
        return coordination_s / max(coordination_s + self.value * iteration_s, 1e-9)

    def observe(self, iterations: int, seconds: float, coordination_s: float) -> None:
        """Learn from a group. The first one teaches nothing: it loads and compiles what later ones have.

        Args:
            iterations: that it had.
            seconds: that they took.
            coordination_s: what its plans and reports took on rank 0.
        """
        if iterations < 1:
            return
        is_first, self._has_begun = not self._has_begun, True
        if is_first:
            return
        newest = coordination_s, seconds / iterations
        old = self._smoothed or newest
        self._smoothed = old[0] + NEWEST * (newest[0] - old[0]), old[1] + NEWEST * (newest[1] - old[1])
        if self._automatic:
            # The slower of both times: a run that has become slow must not go on in long groups.
            longest = int(min(self._max_group_s / max(newest[1], self._smoothed[1], 1e-9), LARGEST_AUTO))
            self.value = max(1, min(max(self._adapted(), SHORTEST_AUTO), longest))

    def _adapted(self) -> int:
        share = self.share
        assert share is not None
        if share > UPPER_SHARE:
            return FACTOR * self.value
        return self.value - STEP if share < LOWER_SHARE else self.value
