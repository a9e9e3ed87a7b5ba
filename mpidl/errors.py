"""The errors that a user can meet, each with the exit code of the command line.

A message says what is wrong, with the values; the bound or the allowed names; and what to do.
"""

from __future__ import annotations

import struct

MALFORMED = (
    ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError, struct.error,
)  # fmt: skip
"""What taking a value apart raises where it is not what it should be: JSON has infinities, any type in any place, and
lists in lists for which no stack is deep enough."""

EXIT_HUNG = 76
"""The job's exit code where nothing moved for `hang_seconds`."""
EXIT_LOST = 77
"""And where a rank has died."""


class MpidlError(Exception):
    """Base of every error that mpidl raises on purpose."""

    exit_code = 1


class UserError(MpidlError, ValueError):
    """Bad input, found before the first iteration: one message, exit code 2, no traceback."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or out of its range."""


class DataError(UserError):
    """A data set is missing, cut short, malformed, or does not fit its labels."""


class LayoutError(UserError):
    """The model, the optimizer or the ranks do not fit the flat vector."""


class LaunchError(UserError):
    """The launcher, the MPI library and the ranks do not fit together."""


class OccupiedError(UserError):
    """Another job trains in the run directory. Exit code 4: a later start may find it free."""

    exit_code = 4


class CheckpointError(UserError):
    """A checkpoint is missing or damaged; or it cannot be written, at any time.

    Exit code 4: another start may do better, once there is room on the disk again.
    """

    exit_code = 4


class DamagedError(CheckpointError):
    """A checkpoint, or a file of it, is not what was written; an older one may be whole."""


class PlanError(MpidlError):
    """A plan that arrived is not one that this version can run."""


class NonFiniteLossError(MpidlError):
    """A partition's loss became NaN or infinite; every rank stops at the same iteration."""

    exit_code = 3


class RankLostError(MpidlError):
    """A rank has died, and the others cannot go on without it; on all that live."""

    exit_code = EXIT_LOST


class EndedElsewhereError(MpidlError):
    """Another rank has ended the job, and said why; this one leaves with its code and says nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another rank has ended the job with code {exit_code}")
        self.exit_code = exit_code


class TooManyDroppedError(MpidlError):
    """More of an iteration's partitions were dropped than may be; every rank repeats the iteration."""


class DisagreementError(MpidlError):
    """Two ways of a benchmark do not give the same result."""
