"""How a job ends when something goes wrong: once, in words, on every rank.

Three kinds of errors:

- An error that all ranks have agreed on (`on_all_ranks`): rank 0 prints its message, every rank leaves with its code.
- Anything uncaught on one rank: that rank prints its traceback, each line behind `[rank r]`, and aborts the job, so
  that no other rank is left waiting. When several ranks of a machine fail alike, the first prints and the others
  keep quiet: the right to print is an empty file that all have open and that the first one writes to. It has no name
  any more when training begins, so that nothing is left behind, and it is taken for as long as any rank lives.
- `sys.exit(code)` with another code than 0 on one rank ends the others, unless they leave as well within a few seconds.
  `raise SystemExit`, `exit()` and `quit()` are seen only where `run_command` is the main function.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import math
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NoReturn, TypeVar

from mpidl import guard
from mpidl.errors import EXIT_LOST, EndedElsewhereError, MpidlError, RankLostError, UserError
from mpidl.runtime import ulfm
from mpidl.runtime.launcher import launched_rank

Error = TypeVar("Error", bound=MpidlError)

_OTHERS_PRINT_S = 2.0
"""How long a rank that lost the right to print waits before it aborts: the winner's text must get out."""

_OTHERS_LEAVE_S = 2.0
"""How long a rank that leaves with an error code waits for the others to leave as well, before it ends them."""

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

    def __init__(
        self, rank: int, size: int, abort: Callable[[int], None], all_leave: Callable[[float], bool], right: int | None
    ) -> None:
        self.rank = rank
        self.size = size
        self.abort = abort
        self.all_leave = all_leave
        self.process = os.getpid()
        self.exit_code = 0
        self.right = right


_job: _Job | None = None


def open_right(key: str) -> tuple[pathlib.Path, int | None]:
    """Make or open the file that is the right to print; the caller unlinks it when all ranks of the machine have it.

    Args:
        key: a word that is the same on all ranks and belongs to this job only.

    Returns:
        Its path and descriptor, None where it cannot be made: such a rank always prints.
    """
    path = pathlib.Path(tempfile.gettempdir()) / f"mpidl-{os.getuid()}-{key}.failed"
    try:
        return path, os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    except OSError:
        return path, None


def install(
    rank: int, size: int, abort: Callable[[int], None], all_leave: Callable[[float], bool], right: int | None = None
) -> None:
    """Make an uncaught exception on any rank, in any thread, and `sys.exit(code)` on some ranks end the whole job.

    Args:
        rank: this rank.
        size: ranks of the job; a job of one keeps Python's own behaviour.
        abort: ends all ranks with an exit code.
        all_leave: waits some seconds for all ranks to call it as well, and tells whether they did.
        right: what `open_right` gave; None: no other rank shares this one's errors.
    """
    global _job
    _job = _Job(rank, size, abort, all_leave, right)
    if size > 1:
        sys.exit = _exit
        atexit.register(_leave)
        sys.excepthook = _on_uncaught
        threading.excepthook = _on_uncaught_in_thread


def move(rank: int, size: int, abort: Callable[[int], None], all_leave: Callable[[float], bool]) -> None:
    """Take the world of those that are left after a loss, with `install`'s arguments."""
    assert _job is not None, "installed before"
    _job.rank, _job.size, _job.abort, _job.all_leave = rank, size, abort, all_leave


def warn(message: str) -> None:
    """Print a warning once, from rank 0."""
    if _job is None or _job.rank == 0:
        print(f"mpidl: warning: {message}", file=sys.stderr, flush=True)


def _exit(status: object = None) -> NoReturn:
    """What `sys.exit` does, remembered: at the interpreter's end nothing else tells the code."""
    if _job is not None and threading.current_thread() is threading.main_thread():
        _job.exit_code = int(status is not None) if not isinstance(status, int) else status
    raise SystemExit(status)


def _leave() -> None:
    """At the interpreter's end: the ranks leave together, since MPI would wait there without saying why."""
    if _job is None or _job.process != os.getpid() or ulfm.has_ended():  # a child made by fork is no rank
        return
    if _job.exit_code:
        _keep_own_code()
    if _job.all_leave(_OTHERS_LEAVE_S if _job.exit_code else math.inf):
        return
    told = f"[rank {_job.rank}] left with code {_job.exit_code} while others go on; all end"
    print(told, file=sys.stderr, flush=True)
    guard.tell(has_said=1)
    time.sleep(0.1)
    _job.abort(_job.exit_code)


def _keep_own_code() -> None:
    """Leave with this process's own code, though others leave before it.

    `srun --kill-on-bad-exit` sends SIGTERM to the others when the first rank has left with an error, and the job's
    code would be that of the signal.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _on_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    end_job(error.with_traceback(trace))


def _on_uncaught_in_thread(hook: threading.ExceptHookArgs) -> None:
    if hook.exc_type is not SystemExit:  # which ends its thread only, as Python has it
        _on_uncaught(hook.exc_type, hook.exc_value or hook.exc_type(), hook.exc_traceback)


def end_job(error: BaseException) -> int:
    """End every rank because of `error`; returns the exit code only where there is no other rank to end.

    An agreed error returns on every rank: all of them leave by themselves.
    """
    guard.tell(has_said=1)
    if ulfm.is_loss(error):
        error = end_of_loss(ulfm.meet_to_end(EXIT_LOST))
    if isinstance(error, EndedElsewhereError):
        ulfm.leave()
        return error.exit_code
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
    else:
        time.sleep(_OTHERS_PRINT_S)
    _job.abort(code)
    return code


def end_of_loss(meeting: ulfm.Meeting) -> MpidlError:
    """The error, of every rank that lives, with which a job ends that does not go on after a meeting."""
    ulfm.leave()
    if not meeting.lost or meeting.code not in (0, EXIT_LOST):
        return EndedElsewhereError(meeting.code)
    if _job is not None:
        _job.rank = meeting.comm.rank  # who prints
    told = f"{describe_lost(meeting.lost)}; all ranks end{guard.how_to_resume()}"
    return on_all_ranks(RankLostError(told))


def describe_lost(lost: Sequence[tuple[int, str]]) -> str:
    """`rank 3 (node07) was lost`."""
    names = " and ".join(f"rank {rank} ({host})" for rank, host in lost)
    return f"{names} {'was' if len(lost) == 1 else 'were'} lost"


def _may_print(job: _Job) -> bool:
    """Whether this rank is the first of its machine to fail."""
    if job.right is None:
        return True
    try:
        fcntl.flock(job.right, fcntl.LOCK_EX)
        try:
            is_first = os.fstat(job.right).st_size == 0
            os.write(job.right, b"!")
        finally:
            fcntl.flock(job.right, fcntl.LOCK_UN)
    except OSError:
        return True
    return is_first


def told_once(error: Error) -> Error:
    """Let an error that every process of a launch meets alone, if nobody catches it, be printed by the first only."""

    def hook(kind: type[BaseException], other: BaseException, trace: TracebackType | None) -> None:
        if other is error:
            _print_alone(other)
        else:
            sys.__excepthook__(kind, other, trace)

    sys.excepthook = hook
    return error


def _print_alone(error: BaseException) -> None:
    if isinstance(error, UserError):
        if launched_rank() in (None, 0):
            print(f"mpidl: error: {error}", file=sys.stderr, flush=True)
        else:
            _keep_own_code()
            time.sleep(_OTHERS_PRINT_S)  # a launcher may end all others when the first leaves, so that one has to print
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
    code = _code_of(command)
    atexit.register(gc.freeze)  # else the interpreter's end looks for garbage in all of torch, for a second of CPU time
    if code and _job is not None and _job.size > 1:  # `sys.exit(main())` looks `exit` up before there is a job
        _keep_own_code()
    return code


def _code_of(command: Callable[[], int | None]) -> int:
    try:
        code = command() or 0
        guard.tell(has_said=1)
        return code
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        guard.tell(has_said=1)
        others = _job if code and _job is not None and _job.size > 1 else None
        if isinstance(error.code, str):  # as Python does with sys.exit("message")
            print(error.code, file=sys.stderr, flush=True)
        elif others is not None:
            print(f"[rank {others.rank}] left with code {code}; all end", file=sys.stderr, flush=True)
            time.sleep(0.1)
        if others is not None:
            others.abort(code)
        return code
    except BaseException as error:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        return end_job(error)
