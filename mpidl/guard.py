"""A small process in front of each rank that says when the rank was lost, under any launcher.

Launchers that do not go on without a rank (MPICH's, srun with --kill-on-bad-exit, Open MPI's without ULFM) kill all
other ranks within 0.1 s of a death, so no rank can tell whose it was. But they know of it only when the process that
they have started ends. So this is not the rank: before it loads anything, it forks (`begin`), and

1. the child goes on as the rank. It tells the guard through a pipe what a message needs (`tell`): the run directory,
   its rank in mpidl's order, and the job's key. It tells a few short lines, which a pipe holds, so the rank never
   waits.
2. The parent, the guard, does nothing but wait for it. It stays in the rank's process group, where launchers and Slurm
   send their signals, so the rank has got each of them as well; the guard only remembers which.
3. When the rank has died of a signal that nobody sent to both, the guard prints one line with its rank, node and
   signal, and the command that resumes; so it does when a rank of a running job has left with an error code of which
   nobody has said why (`has_said`): `os._exit(3)`, or a library that ends the process. If the run directory has the
   folder `ends` (made by `mpidl launch`), it writes there how the rank has ended, also where it left with an error
   code. A loss goes into the folder `hang`, too, for the watchdogs: srun without --kill-on-bad-exit lets the other
   ranks wait, and a loss is to be told once.
4. The guard ends like the rank, by the same signal or with the same code. Only now the launcher learns of it.

What if. The launcher kills the guard: the system kills the rank with it (PR_SET_PDEATHSIG), and nothing is said. The
guard is killed by itself: the same, and the launcher ends the job. The machine goes down: nobody is left to say it
(`runtime/watchdog.py` and `mpidl launch` do). The run directory cannot be written: the line is printed all the same.

Where Open MPI goes on without the lost rank (ULFM) there is no guard: the survivors tell. Nor is there one on other
systems than Linux, or for ranks that run a script of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import platform
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

ENDS = "ends"
"""The folder in a run directory that takes how ranks have ended, where somebody wants to know."""
HANG = "hang"
"""The folder through which the watchdogs of a job's nodes tell each other (`runtime/node_files.py`)."""

_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What launchers pass on to all processes of a rank."""
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_MOST_BYTES = 65536

_pipe: int | None = None
_facts: dict[str, Any] = {}


def begin() -> None:
    """Put a guard in front of this process, where it is a rank; returns in the rank. Before any thread is started."""
    global _pipe
    rank = _launched_rank(os.environ)
    if rank is None or sys.platform != "linux":
        return
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # none may come to a guard that is not yet prepared
    guard, process = os.getpid(), os.fork()
    if process:
        os.close(writing)
        _guard(process, rank, reading, mask)
    os.close(reading)
    _pipe = writing
    die_with_parent(guard, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def tell(**facts: int | str) -> None:
    """Let this rank's guard know: `rank`, `size`, `run_dir`, `job` (the watchdogs' key), `has_said` (why it ends)."""
    _facts.update(facts)
    if _pipe is not None:
        os.write(_pipe, json.dumps(facts).encode() + b"\n")


def die_with_parent(parent: int, number: signal.Signals) -> None:
    """Have the system send this process a signal when its parent has ended.

    Args:
        parent: the process id of the parent, which may have ended already.
        number: of the signal.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number))
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def _launched_rank(environment: Mapping[str, str]) -> int | None:
    """The rank by the launcher's word; None: this is none, or one that survivors would speak for."""
    if environment.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "yes"):
        return None
    found = [environment[name] for name in _RANKS if environment.get(name, "").isdigit()]
    return int(found[0]) if found else None


def _guard(process: int, rank: int, reading: int, mask: set[int | signal.Signals]) -> NoReturn:
    """Wait for the rank, tell what has to be told, and end like it."""
    got: set[int] = set()

    def note(number: int, frame: FrameType | None) -> None:
        got.add(number)

    for number in _SIGNALS:
        signal.signal(number, note)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code and -code not in got:
        with contextlib.suppress(Exception):  # whatever it was, the guard has to end
            _report(code, {"rank": rank, "host": platform.node(), "process": process, **_told(reading)})
    _end(code)


def _told(reading: int) -> dict[str, Any]:
    """What the rank told while it lived."""
    os.set_blocking(reading, False)  # a child of the rank may still have the other end
    told: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in os.read(reading, _MOST_BYTES).splitlines():
            told.update(json.loads(line))
    return told


def _report(code: int, facts: dict[str, Any]) -> None:
    """Write the end down where somebody wants to know; print the loss. One who stands by is none of the training's."""
    if facts.get("is_standby"):
        return
    run_dir = pathlib.Path(facts.get("run_dir", os.devnull))
    if _is_so((run_dir / ENDS).is_dir):
        _write(run_dir / ENDS / f"rank-{facts['rank']:05d}.json", {**facts, "code": code})
    if not is_loss(code, facts):
        return
    if "job" in facts:
        _write(run_dir / HANG / f"lost-{facts['rank']:05d}.json", {**facts, "code": code})
    print(describe_loss(code, facts), file=sys.stderr, flush=True)


def is_loss(code: int, facts: Mapping[str, Any]) -> bool:
    """Whether a rank that did not end well was lost: by a signal, or with a code of which it has not said why.

    Args:
        code: the negative number of the signal, or the exit code.
        facts: what it told while it lived.
    """
    return code < 0 or ("size" in facts and "has_said" not in facts)


def _is_so(looks: Callable[[], bool]) -> bool:
    """What a file system says; no, where it fails."""
    with contextlib.suppress(OSError):
        return looks()
    return False


def _write(file: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        file.with_suffix(".new").write_text(json.dumps(facts))
        file.with_suffix(".new").rename(file)


def describe_loss(code: int, facts: Mapping[str, Any]) -> str:
    """The line about a lost rank.

    Args:
        code: the negative number of the signal, or the exit code.
        facts: rank, host and process, and what else is known.
    """
    of = f" of {facts['size']}" if "size" in facts else ""
    who = f"mpidl: error: rank {facts['rank']}{of} was lost: process {facts['process']} on {facts['host']}"
    if code > 0:
        return f"{who} left with code {code} and did not say why{how_to_resume(facts)}"
    try:
        name = f" ({signal.Signals(-code).name})"
    except ValueError:
        name = ""
    hint = ", perhaps by the system for lack of memory" if -code == signal.SIGKILL else ""
    return f"{who} was killed by signal {-code}{name}{hint}{how_to_resume(facts)}"


def how_to_resume(facts: Mapping[str, Any] | None = None, *, looks: bool = True) -> str:
    """The end of a line about a loss: the command that goes on; empty without a run of `mpidl train`.

    Args:
        facts: `tell`'s; default: this rank's own.
        looks: whether the run has begun; not where the file system may be what hangs.
    """
    run_dir = (_facts if facts is None else facts).get("run_dir")
    if not run_dir or (looks and not _is_so(pathlib.Path(run_dir, "config.toml").is_file)):
        return ""
    return f"; mpidl train --resume {run_dir} goes on from the newest checkpoint"


def _end(code: int) -> NoReturn:
    """End as a process that ended with `code` did."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the rank has dumped its core
        with contextlib.suppress(OSError, ValueError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)
