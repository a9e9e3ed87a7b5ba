"""The errors that a user can meet, each with the exit code of the command line.

A message says what is wrong, with the values; the bound or the allowed names; and what to do.
"""

from __future__ import annotations


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


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class PlanError(MpidlError):
    """A plan that arrived is not one that this version can run."""


class NonFiniteLossError(MpidlError):
    """A partition's loss became NaN or infinite; every rank stops at the same iteration."""

    exit_code = 3


class TooManyDroppedError(MpidlError):
    """More of an iteration's partitions were dropped than may be; every rank repeats the iteration."""


class DisagreementError(MpidlError):
    """Two ways of a benchmark do not give the same result."""
