"""The starts of one training, one after the other: waiting for the launcher, passing signals on, and starting again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from mpidl import local_folder
from mpidl.config import CONFIG_FILE, FINISHED
from mpidl.errors import EXIT_LOST, MALFORMED
from mpidl.guard import ENDS, die_with_parent, is_loss
from mpidl.launching.command import Command
from mpidl.launching.verdict import HOPELESS, STOPPED, Count, End, Verdict, judge
from mpidl.occupation import occupy
from mpidl.standby import GO, LEAVE, Gate

RANKS_FILE = "RANKS"
"""The name, in the run directory, of the file with the number of ranks that the training is to go on with."""

LAUNCH_FILE = "LAUNCH"
"""The name of the file that the one launch in a run directory has a lock on."""
_MOST_CHARACTERS = 100
"""That are read of it."""
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_LOOK_S = 0.2
_AGAIN_S = 1.0
"""After which SIGTERM is sent once more: ranks that listen take the first one as a wish to stop."""
_READY_S = 600.0
"""How long new ranks may take to get ready beside those that train."""
_REMOVAL_S = 20.0
"""How long a launcher may take to remove what was kept on its nodes: one that is gone does not answer."""
_ENDS_S = 10.0
"""How long the launcher may then take to end all ranks."""


@dataclasses.dataclass(frozen=True)
class Standby:
    """Ranks that get ready while others train."""

    ranks: int
    process: subprocess.Popen[bytes]
    gate: Gate
    ready_by: float
    """When they are given up otherwise (time.monotonic)."""


class Course:
    """One `mpidl launch`.

    Args:
        command: what is started.
        ranks: how many; None: the launcher knows.
        restarts: how often it may be started again.
    """

    def __init__(self, command: Command, ranks: int | None, restarts: int) -> None:
        self._command = command
        self._run_dir = command.run_dir
        self._ranks = ranks
        self._wanted: int | None = None
        """The ranks of the next start, where the ranks were stopped for it."""
        self._standby: Standby | None = None
        self._num_gates = 0
        self._replaced: int | None = None
        """The ranks whose place others took last."""
        self._leave: Callable[[], None] | None = None
        """Lets another launch into the run directory."""
        self._restarts = restarts
        self._count = Count(restarts, self._newest())
        self._announced = local_folder.announcement(self._run_dir) if restarts else None
        """Where ranks keep their state for another start."""
        self._kept: local_folder.Kept | None = None
        """What they have told of it last."""
        self._asked: signal.Signals | None = None
        self._end_by: float | None = None
        """When the launcher has to be ended with more force (time.monotonic), which is:"""
        self._force = signal.SIGTERM
        self._process: subprocess.Popen[bytes] | None = None
        self._has_begun = False
        """Whether a start has written the configuration of a run: an earlier one's is not to be gone on with."""

    def run(self) -> int:
        """Start until there is an end; the exit code."""
        self._leave = occupy(self._run_dir, LAUNCH_FILE, patience_s=0.0)
        (self._run_dir / RANKS_FILE).unlink(missing_ok=True)  # of an earlier launch that ended before it saw the file
        is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        taken = [number for number in _SIGNALS if not (number == signal.SIGHUP and is_nohup)]
        before = {number: signal.signal(number, self._pass_on) for number in taken}
        try:
            while True:
                end = self._start()
                self._count.ended_with(self._newest(), self._look_for_kept())
                verdict = judge(end, self._count)
                if not verdict.restarts:
                    self._say_end(end, verdict)
                    return verdict.code
                self._prepare_restart(end, verdict)
                if self._asked is not None:  # in between
                    self._say_end(end, Verdict(False, f"stopped by {self._asked.name}"))
                    return 128 + signal.SIGINT if self._asked == signal.SIGINT else STOPPED
        finally:
            self._tidy()
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- one start ------------------------------------------------------------------------------------------------

    def _start(self) -> End:
        """Start the launcher, or let the ranks begin that are ready; wait for its end."""
        shutil.rmtree(self._ends, ignore_errors=True)
        with contextlib.suppress(OSError):  # a full disk: the run directory then says nothing of ranks
            self._ends.mkdir(mode=0o700)
        finished, config = self._stamp(FINISHED), self._stamp(CONFIG_FILE)
        taken_over = self._take_over()
        self._process = taken_over or self._launch(self._ranks)
        if self._asked is not None:  # in between
            self._process.send_signal(signal.SIGTERM)
        code = self._wait(self._process)
        self._process = None
        has_begun = self._stamp(CONFIG_FILE) not in (None, config)
        self._has_begun |= has_begun
        return End(
            code,
            is_finished=self._stamp(FINISHED) not in (None, finished),
            has_begun=has_begun,
            rank_codes=[EXIT_LOST if each["is_loss"] else each["code"] for each in self._rank_ends()],
            asked=self._asked,
            is_resized=self._wanted is not None,
            took_over=taken_over is not None,
        )

    def _take_over(self) -> subprocess.Popen[bytes] | None:
        """Let the ranks begin that stand by; None: there are none that can be told."""
        standby = self._standby
        if standby is None:
            return None
        if not standby.gate.say(GO):
            self._dismiss()
            return None
        self._standby = None
        return standby.process

    def _launch(self, ranks: int | None, gate: Gate | None = None) -> subprocess.Popen[bytes]:
        announced = self._announced and dataclasses.replace(
            self._announced, is_restart=self._has_begun or gate is not None
        )
        parent = os.getpid()
        return subprocess.Popen(
            self._command.line(ranks, announced, resumes=self._has_begun or gate is not None, gate=gate),
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=lambda: die_with_parent(parent, signal.SIGTERM),
        )

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_LOOK_S)
            if self._end_by is not None and time.monotonic() >= self._end_by:
                process.send_signal(self._force)
                self._force = signal.SIGKILL
                self._end_by += _ENDS_S
            self._look_for_request(process)
            self._look_after_standby(process)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """The handler of signals: they stop the ranks with a checkpoint, and end them when they come again."""
        again, self._asked = self._asked is not None, signal.Signals(number)
        if again:
            self._end_by = self._end_by or time.monotonic() + _AGAIN_S
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM if again else signal.SIGUSR1)

    def _look_for_request(self, process: subprocess.Popen[bytes]) -> None:
        """Stop the ranks where the file RANKS asks for another number of them."""
        file = self._run_dir / RANKS_FILE
        try:
            with file.open(encoding="utf-8", errors="replace") as opened:
                text = opened.read(_MOST_CHARACTERS).strip()
        except OSError:
            return
        if not text or self._asked is not None:  # it is just being written, or all ends anyway
            return
        file.unlink(missing_ok=True)
        most = self._command.training.partitions
        if not re.fullmatch("[0-9]+", text) or not 1 <= int(text) <= most:
            _say(f"{file} says {text[:20]!r}; it takes a number from 1 to {most}, the partitions; nothing is changed")
        elif int(text) == self._ranks and self._wanted is None:
            self._dismiss()
            _say(f"{file} says {text}, as many as there are; nothing is changed")
        else:
            self._prepare(int(text), process)

    def _prepare(self, ranks: int, process: subprocess.Popen[bytes]) -> None:
        """Get other ranks ready beside the ones that train, or, where that cannot be, stop these first."""
        if self._wanted is not None:  # they stop already
            self._wanted = ranks
            return
        if self._standby is not None and self._standby.ranks == ranks:
            _say(f"{ranks} ranks get ready already")
            return
        self._dismiss()
        if not (self._command.starts_beside and self._stamp(CONFIG_FILE)):
            self._stop_for(ranks, process)
            return
        self._num_gates += 1
        gate = Gate(self._ends / f"gate-{self._num_gates}")
        try:
            started = self._launch(ranks, gate)
        except (OSError, subprocess.SubprocessError) as error:
            _say(f"{ranks} ranks cannot be started: {error}; nothing is changed, training goes on")
            return
        self._standby = Standby(ranks, started, gate, time.monotonic() + _READY_S)
        _say(f"{ranks} ranks get ready, while training goes on")

    def _look_after_standby(self, process: subprocess.Popen[bytes]) -> None:
        """Stop the ranks that train as soon as the others are ready."""
        standby = self._standby
        if standby is None or self._wanted is not None or self._asked is not None:
            return
        code = standby.process.poll()
        if code is not None:
            reason = f"did not start (code {code})"
        elif standby.gate.is_ready():
            self._stop_for(standby.ranks, process)
            return
        elif time.monotonic() > standby.ready_by:
            reason = f"were not ready after {_READY_S:g} s"
        else:
            return
        _say(f"{standby.ranks} ranks {reason}; nothing is changed, training goes on")
        self._dismiss()

    def _stop_for(self, ranks: int, process: subprocess.Popen[bytes]) -> None:
        self._wanted = ranks
        _say(f"stops with a checkpoint, to go on with {ranks} ranks")
        process.send_signal(signal.SIGUSR1)

    def _dismiss(self) -> None:
        """End the ranks that stand by, where there are any."""
        standby, self._standby = self._standby, None
        if standby is not None:
            leaves = standby.gate.say(LEAVE) and standby.gate.is_ready()
            _end(standby.process, first_s=_ENDS_S if leaves else 0.0)

    # --- between starts -------------------------------------------------------------------------------------------

    def _prepare_restart(self, end: End, verdict: Verdict) -> None:
        if verdict.is_counted:
            self._count.restarts_left -= 1
        failed = self._choose_ranks(end)
        where = f"from {self._count.checkpoint}" if self._count.checkpoint else "from the beginning"
        keeps = bool(self._kept and self._kept.num_nodes)
        where += ", or from what its nodes have kept since" * keeps
        number = "" if self._ranks is None else f"{',' * keeps} on {self._ranks} ranks"
        left = f"; restarts left: {self._count.restarts_left}" if verdict.is_counted else ""
        _say(f"{self._describe(end)}{failed}starts again {where}{number}{left}")

    def _choose_ranks(self, end: End) -> str:
        """How many the next start has; in words what keeps it from another number.

        Those that stand by take the place of ranks that were stopped for them only: they were ready.
        """
        standby, wanted, self._wanted = self._standby, self._wanted, None
        if end.took_over and not end.has_begun and wanted is None:
            self._dismiss()
            failed, self._ranks = self._ranks, self._replaced
            return f"{failed} ranks failed before they began; "
        if standby is None or standby.ranks != wanted:
            self._dismiss()
            self._ranks = wanted or self._ranks
            return "" if standby is None or wanted else f"{standby.ranks} ranks were not ready yet; "
        if standby.process.poll() is not None:
            self._standby = None
            return f"{standby.ranks} ranks failed before they began; "
        self._replaced, self._ranks = self._ranks, wanted
        return ""

    def _say_end(self, end: End, verdict: Verdict) -> None:
        if not verdict.reason:
            return
        given = self._command.given_launcher
        options = [] if given is None else ["--mpirun", given]
        options += [] if self._ranks is None else ["-n", str(self._ranks)]
        options += ["--restarts", str(self._restarts)]
        again = shlex.join(
            ["mpidl", "launch", *options, *self._command.program, "train", "--resume", str(self._run_dir)]
        )
        can_resume = self._stamp(CONFIG_FILE) is not None and verdict.code not in HOPELESS
        resume = f"; {again} goes on" if can_resume else ""
        lost = self._describe(end) if end.asked is None else ""
        _say(f"{lost}{verdict.reason}{resume}")

    def _describe(self, end: End) -> str:
        """Which ranks were lost, and where."""
        lost = [f"rank {each['rank']} on {each['host']}" for each in self._rank_ends() if each["is_loss"]]
        if lost:
            return f"lost {', '.join(lost)}; "
        if end.rank_codes or end.is_resized or not end.has_begun:
            return ""
        return f"the launcher ended with code {end.code}, and no rank says why: a node may be lost; "

    # --- the run directory ----------------------------------------------------------------------------------------

    @property
    def _ends(self) -> pathlib.Path:
        return self._run_dir / ENDS

    def _rank_ends(self) -> list[dict[str, Any]]:
        """What guards have written, by rank."""
        found = []
        for file in sorted(self._ends.glob("rank-*.json")):
            with contextlib.suppress(OSError, *MALFORMED):
                entry = json.loads(file.read_text())
                rank, host, code = int(entry["rank"]), str(entry["host"]), int(entry["code"])
                found.append({"rank": rank, "host": host, "code": code, "is_loss": is_loss(code, entry)})
        return sorted(found, key=lambda entry: entry["rank"])

    def _stamp(self, name: str) -> tuple[int, int] | None:
        """Which file of that name there is: one that an earlier start has written is another."""
        try:
            found = (self._run_dir / name).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _newest(self) -> str | None:
        """The name of the newest whole checkpoint; `mpidl.checkpoint` knows it too, but loads torch."""
        names = sorted(path.parent.name for path in self._run_dir.glob("checkpoints/epoch-*/manifest.json"))
        return names[-1] if names else None

    def _look_for_kept(self) -> int:
        """Note what ranks have kept; the iterations that were done where a start from such state began."""
        kept = local_folder.read_kept(self._ends)
        self._kept = kept or self._kept
        return kept.iteration if kept is not None else 0

    def _remove_kept(self) -> None:
        """Remove what killed ranks have kept: of this node, and by the launcher of the others, if they live."""
        if self._announced is None:
            return
        local_folder.remove(self._announced.name)
        kept = self._kept
        if kept is None or not kept.num_nodes or (kept.num_nodes == 1 and kept.host == platform.node()):
            return
        process = subprocess.Popen(
            self._command.removal(self._ranks, local_folder.DIRECTORY / self._announced.name),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        _end(process, first_s=_REMOVAL_S)

    def _tidy(self) -> None:
        self._dismiss()
        self._remove_kept()
        shutil.rmtree(self._ends, ignore_errors=True)
        if self._leave is not None:
            self._leave()
        with contextlib.suppress(OSError):  # a run lies there
            self._run_dir.rmdir()


def _end(process: subprocess.Popen[bytes], first_s: float) -> None:
    """Wait for a process so long, and end it then."""
    wait_s = first_s
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
            return
        process.send_signal(number)
        wait_s = _ENDS_S
    process.wait()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that was closed
        print(f"mpidl: launch: {text}", file=sys.stderr, flush=True)
