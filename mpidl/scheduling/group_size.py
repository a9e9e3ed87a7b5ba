"""How many iterations the next group has.

A number stays what it is. "auto" aims at groups of about a second: long enough that a plan and a report cost nothing
that could be measured, short enough that what the coordinator decides takes effect soon. The numbers of a training do
not depend on the group size.
"""

from __future__ import annotations

TARGET_S = 1.0
LARGEST_AUTO = 256


class GroupSize:
    """The group size over the course of a run; kept by the coordinator."""

    def __init__(self, setting: int | str) -> None:
        self._automatic = setting == "auto"
        self.value = 1 if self._automatic else int(setting)
        """Iterations of the next group."""

    @property
    def largest(self) -> int:
        """The largest value that may ever come."""
        return LARGEST_AUTO if self._automatic else self.value

    def observe(self, iterations: int, seconds: float) -> None:
        """Learn from a group that took `seconds`: at most double, and at most LARGEST_AUTO."""
        if self._automatic and iterations > 0:
            aim = int(TARGET_S * iterations / max(seconds, 1e-9))
            self.value = max(1, min(aim, 2 * self.value, LARGEST_AUTO))
