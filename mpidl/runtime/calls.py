"""How many collectives a rank has started, by MPI's name and by what they are for.

Collectives on one communicator have one order, so one thread at a time makes those of a `World` and of the views that
share its communicators; they count into one tally. A `World.duplicate`, whose calls may be another thread's, has one
of its own. So each tally has one writer at a time and needs no lock, and a call costs one addition in a dict. Whoever
asks for the total reads all tallies; what another thread is just adding may be missing.
"""

from __future__ import annotations

from collections import Counter

Key = tuple[str, str]
"""(MPI's name of the call, purpose); names in lower case are mpi4py's, for calls that pickle."""


class Calls:
    """The tally of one set of communicators, and those of all others of this rank."""

    def __init__(self) -> None:
        self.own: Counter[Key] = Counter()
        """Started on these communicators."""
        self._all = [self.own]

    def apart(self) -> Calls:
        """Another tally, whose calls are in the total too."""
        made = Calls()
        self._all.append(made.own)
        made._all = self._all
        return made

    def total(self) -> Counter[Key]:
        """All that this rank has started so far."""
        total: Counter[Key] = Counter()
        for tally in list(self._all):
            total.update(dict(tally))  # copied in one step: another thread may be adding a key
        return total

    def number_of(self, purpose: str) -> int:
        """How many of the total are for this purpose."""
        return sum(number for (_, other), number in self.total().items() if other == purpose)
