"""How a job ends when something goes wrong: once, in words, on every rank.

Three kinds of errors:

- An error that all ranks have agreed on (`on_all_ranks`): rank 0 prints its message, every rank leaves with its code.
- Anything uncaught on one rank: that rank prints its traceback, each line behind `[rank r]`, and aborts the job, so
  that no other rank is left waiting. When several ranks of a machine fail alike, the first prints and the others
  keep quiet: the right to print is a file that only one can create, removed before the job is aborted.
- `sys.exit(code)` on one rank is caught only where `run_command` is the main function.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from mpidl.errors import MpidlError, UserError
from mpidl.runtime.launcher import launched_rank

Error = TypeVar("Error", bound=MpidlError)

_OTHERS_PRINT_S = 2.0
"""How long a rank that lost the right to print waits before it aborts: the winner's text must get out."""

_AGREED_MARK = "_mpidl_on_all_ranks"


def on_all_ranks(error: Error) -> Error:
    """Mark an error that every rank raises at the same point; rank 0 alone prints it."""
    setattr(error, _AGREED_MARK, True)
    return error


def is_on_all_ranks(error: BaseException) -> bool:
    """Whether `on_all_ranks` marked the error."""
    return getattr(error, _AGREED_MARK, False)


class _Job:
    """What the hooks need to know of the running job."""

    def __init__(self, rank: int, size: int, abort: Callable[[int], None], key: str) -> None:
        self.rank = rank
        self.size = size
        self.abort = abort
        self.lock = pathlib.Path(tempfile.gettempdir()) / f"mpidl-{os.getuid()}-{key}.failed"


_job: _Job | None = None


def install(rank: int, size: int, abort: Callable[[int], None], key: str) -> None:
    """Make an uncaught exception on any rank, in any thread, end the whole job.

    Args:
        rank: this rank.
        size: ranks of the job; a job of one keeps Python's own behaviour.
        abort: ends all ranks with an exit code.
        key: a word that is the same on all ranks and belongs to this job only.
    """
    global _job
    _job = _Job(rank, size, abort, key)
    if size > 1:
        sys.excepthook = _on_uncaught
        threading.excepthook = lambda hook: _on_uncaught(
            hook.exc_type, hook.exc_value or hook.exc_type(), hook.exc_traceback
        )


def warn(message: str) -> None:
    """Print a warning once, from rank 0."""
    if _job is None or _job.rank == 0:
        print(f"mpidl: warning: {message}", file=sys.stderr, flush=True)


def _on_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    end_job(error.with_traceback(trace))


def end_job(error: BaseException) -> int:
    """End every rank because of `error`; returns the exit code only where there is no other rank to end.

    An agreed error returns on every rank: all of them leave by themselves.
    """
    code = error.exit_code if isinstance(error, MpidlError) else 1
    if is_on_all_ranks(error):
        if _job is None or _job.rank == 0:
            print(f"mpidl: error: {error}", file=sys.stderr, flush=True)
        return code
    if _job is None or _job.size == 1:
        _print_alone(error)
        return code
    if _may_print(_job):
        _print_with_rank(error, _job.rank)
        time.sleep(0.1)
        _job.lock.unlink(missing_ok=True)
    else:
        time.sleep(_OTHERS_PRINT_S)
    _job.abort(code)
    return code


def _may_print(job: _Job) -> bool:
    try:
        os.close(os.open(job.lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _print_alone(error: BaseException) -> None:
    if isinstance(error, UserError):
        if launched_rank() in (None, 0):
            print(f"mpidl: error: {error}", file=sys.stderr, flush=True)
        return
    traceback.print_exception(error)


def _print_with_rank(error: BaseException, rank: int) -> None:
    if isinstance(error, UserError):
        lines = [f"mpidl: error: {error}"]
    elif isinstance(error, KeyboardInterrupt):
        lines = ["interrupted"]
    else:
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    print("\n".join(f"[rank {rank}] {line}" for line in lines), file=sys.stderr, flush=True)


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command line's main function and turn every way to end into one exit code on all ranks.

    Args:
        command: returns an exit code, or None for success.

    Returns:
        The exit code of this rank's process. Does not return when this rank has to end the others.
    """
    try:
        return command() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and _job is not None and _job.size > 1:
            _job.abort(code)
        return code
    except BaseException as error:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        return end_job(error)
