"""What is done after the launcher has ended: a function of what was found, without files and processes."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Sequence

from mpidl.errors import EXIT_LOST, UserError

MOST_STARTS = 3
"""In a row without a new checkpoint; as in jobs/preempt.sbatch."""
STOPPED = 75
"""The exit code of a training that stopped before its end and can be resumed."""
HOPELESS = {UserError.exit_code: "a mistake in the input", 3: "a loss that is not finite"}
"""Codes that another start would end with as well, and what they mean."""


@dataclasses.dataclass(frozen=True)
class End:
    """How one start has ended."""

    code: int
    """The launcher's; negative: the signal that it died of."""
    is_finished: bool
    """Whether the training has written that there is nothing left to do."""
    has_begun: bool
    """Whether the ranks have come so far that one has written the run directory's configuration anew."""
    rank_codes: Sequence[int] = ()
    """Exit codes that ranks' guards have noted; EXIT_LOST: it was lost. Launchers kill guards: some are missing."""
    asked: signal.Signals | None = None
    """What this process was asked to pass on last."""
    is_resized: bool = False
    """Whether the ranks were stopped to be started in another number."""
    took_over: bool = False
    """Whether they were ready before, and took the place of others."""


@dataclasses.dataclass
class Count:
    """Starts so far."""

    restarts_left: int
    checkpoint: str | None = None
    """The newest whole one when the last start ended."""
    fruitless: int = 0
    """Starts in a row, up to the last one, that have not left a new checkpoint."""
    began: int = 0
    """Iterations that were done where a start began from what nodes had kept, the most."""

    def ended_with(self, checkpoint: str | None, began: int = 0) -> None:
        """Count a start by the newest whole checkpoint after it, and by where it could begin."""
        is_fruitless = checkpoint == self.checkpoint and began <= self.began
        self.fruitless = self.fruitless + 1 if is_fruitless else 0
        self.checkpoint, self.began = checkpoint, max(began, self.began)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What to do."""

    restarts: bool
    reason: str
    """In words; empty where there is nothing to say."""
    code: int = 0
    """The exit code, unless it restarts."""
    is_counted: bool = True
    """Whether it takes one of the restarts."""


def judge(end: End, count: Count) -> Verdict:
    """Decide; the rules stand in the order in which they apply."""
    code = _exit_code(end)
    codes = end.rank_codes or [code]
    hopeless = next((each for each in codes if each in HOPELESS), None)
    if hopeless is None and code in HOPELESS:  # of a rank that was lost
        code = EXIT_LOST
    if end.is_finished:
        return Verdict(False, "")
    if end.asked == signal.SIGINT:
        return Verdict(False, "interrupted", 128 + signal.SIGINT)
    if end.took_over and not end.has_begun and end.asked is None:
        return Verdict(True, "", is_counted=False)  # as many as there were before
    if hopeless is not None:
        return Verdict(False, f"not started again after {HOPELESS[hopeless]} (code {hopeless})", hopeless)
    if end.asked is not None:
        return Verdict(False, f"stopped by {end.asked.name}", code)
    if end.is_resized:
        return Verdict(True, "", is_counted=False)
    if STOPPED in codes:
        return Verdict(False, "stopped as it was asked to", STOPPED)
    if not end.has_begun and not end.rank_codes:
        return Verdict(False, f"the launcher ended with code {code} before the training began", code)
    if count.fruitless >= MOST_STARTS:
        return Verdict(False, f"no new checkpoint in {MOST_STARTS} starts in a row: gives up", code)
    if count.restarts_left < 1:
        return Verdict(False, "no restarts are left", code)
    return Verdict(True, "")


def _exit_code(end: End) -> int:
    """As a shell has it; never 0 where there is no success: launchers may end so when a node is lost."""
    if end.is_finished:
        return 0
    return 128 - end.code if end.code < 0 else end.code or 1
