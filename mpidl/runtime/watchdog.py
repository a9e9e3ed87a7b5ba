"""A thread on every rank that names whoever keeps the others waiting. It makes no MPI calls, but for the last one.

Every rank says in its row of node-shared memory what it does (`activity.py`). Once a second each rank's watchdog looks
at the rows of its node. The *speaker* of a node is the lowest local rank whose watchdog is awake, so a rank that is
stopped, dead, or keeps the interpreter to itself is spoken for by its neighbours. Where nothing has moved on its node
for far longer than an iteration usually takes (`notice_after`), the speaker raises an *alarm*:

1. *tell*: with several nodes and a run directory it writes what its ranks do to `hang/node-00003.json`
   (`node_files.py`), anew every few seconds. Speakers of other nodes that see an alarm do the same, also where their
   ranks move. Without an alarm nothing is written; each speaker looks for the folder every few seconds.
2. *hear*: it waits until every other node has written anew, or the patience for that is over; a node that has not is
   *silent*: nobody is left there who could. Its own looking goes on meanwhile.
3. *judge*: it looks again at everything. If any node has moved since, there is no hang. Else the lowest node that is
   heard prints one report (`hang_report.py`), with the stacks of those that do not wait for others (`stacks.py`).
4. *end*: if nothing has moved anywhere for `hang_seconds`, and on_hang is "end", the lowest speaker aborts the job with
   code EXIT_HUNG; all tell on meanwhile, as another may have begun to hear just now. Should that fail, each speaker
   kills the stopped ranks of its node some seconds later, and every process whose node's speaker has judged so ends
   itself. A node that is still there then was perhaps the only one whose output anybody sees (the link to the lowest
   one is dead): before it ends, it tells and aborts as well.

Where the others go on without a lost rank (`ulfm.py`), speakers kill those that keep the others waiting in 4, and the
job ends only if there is none.

Without a run directory each node judges and tells for itself, and ends the job if the rank to blame is its own. Where
its ranks all wait, somebody elsewhere may move yet: the job ends only when they have waited twice `hang_seconds`.

A rank that has died while the launcher goes on (srun without --kill-on-bad-exit) is told after LOST_S, and the job ends
with EXIT_LOST, if on_hang is "end". Ranks of the same node see it; where none of a node is left, the lowest other node
does, seconds later, from what the ranks' guards have written into the run directory (`mpidl/guard.py`). A node that has
lost its power is silent.

Where the launcher does end the job (srun with it sends SIGTERM, and kills only after KillWait, 30 s), a rank that knows
of a loss and has got that signal leaves at once: the iteration that it would end before, as it is asked to, has no end.

A watchdog that was not awake itself for some seconds (a suspended job, a laptop's lid) begins to count anew. Watching
goes on until the process ends, also while ranks that are done wait for the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from mpidl import guard
from mpidl.errors import EXIT_HUNG, EXIT_LOST
from mpidl.runtime import hang_report, signals, stacks, ulfm
from mpidl.runtime.activity import (
    ENDING,
    ENDS,
    LOOKED,
    MOVED,
    PHASE,
    PID,
    STACK_FILE,
    USUAL_S,
    WAITS_SINCE,
    RankState,
    read_state,
)
from mpidl.runtime.node_files import NodeFiles, Told
from mpidl.runtime.world import World

LOOK_S = 1.0
ASLEEP_S = 5.0
"""A watchdog that looked this long ago is not awake."""
LOST_S = 3.0
HANG_SECONDS = 900.0
USUAL_TIMES, LEAST_S = 30.0, 30.0
"""A first report comes when nothing has moved for so many of the usual iterations, and at least so many seconds."""
ALONE_TIMES = 2.0
"""A node that cannot ask the others ends the job when its ranks have waited so many times `hang_seconds`."""
PATIENCE_S = 10.0
"""How long a node waits for what the others tell."""
END_S = 5.0
"""How long MPI_Abort may take."""
OTHERS_END_S = PATIENCE_S + END_S
"""And how long others wait for who is to call it: it may judge later, where a node is silent."""
ON_HANG = ("end", "warn")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is done when."""

    hang_seconds: float = HANG_SECONDS
    """After which a hang is certain; 0: nobody watches."""
    on_hang: str = "warn"
    run_dir: pathlib.Path | None = None
    """Through which nodes tell each other."""
    is_training: bool = False
    """Whether something has to move even if nobody waits: a loop of one's own may rest."""
    survives: bool = False
    """Whether the others go on where one is lost (`ulfm.py`): who hangs is killed, instead of the job."""


def notice_after(hang_seconds: float, usual_s: float) -> float:
    """Seconds without any movement after which there is an alarm."""
    if usual_s < 0:
        return hang_seconds
    return min(hang_seconds, max(LEAST_S, USUAL_TIMES * usual_s))


class Watchdog:
    """Watches the ranks of this node, from `start` on.

    Args:
        rows: of this node's ranks, by rank, ascending; see `activity.py`.
        world: who is where. Nothing of it is called but `abort`.
        key: a word that belongs to this job only.
    """

    def __init__(self, rows: Mapping[int, NDArray[np.float64]], world: World, key: str) -> None:
        self.settings = Settings()
        self._rows = rows
        self._activity = world.activity
        self._abort = world.abort
        self._rank, self._hostnames = world.rank, world.hostnames
        # Without shared memory nobody else speaks for this rank.
        self._node_of = world.node_of if len(rows) == world.local_size else tuple(range(world.size))
        self._node = self._node_of[self._rank]
        self._num_nodes = len(set(self._node_of))
        self._key = key
        self._files: NodeFiles | None = None
        self._process = os.getpid()
        self._awake_since = time.monotonic()
        self._reported_s = 0.0
        """For how long nothing had moved at the last report; 0: all goes well."""
        self._hears_until: float | None = None
        self._lost_since: float | None = None
        self._has_told_lost = False
        self._ends_at: float | None = None
        self._is_retired = False
        self._thread = threading.Thread(target=self._run, name="mpidl-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch, and let others read this rank's stack."""
        descriptor = stacks.listen()
        if descriptor is not None:
            self._activity.set_stack_file(descriptor)
        self._activity.looked()
        self._thread.start()

    def end(self) -> None:
        """This rank has done its work: it is not to blame any more."""
        if os.getpid() == self._process:  # a child made by fork is no rank
            self._activity.enter(ENDING)

    def retire(self) -> None:
        """Another one watches those that are left."""
        self._is_retired = True

    # --- looking --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(LOOK_S)
            if self._is_retired:
                return
            now = time.monotonic()
            if now - last > ASLEEP_S:
                self._awake_since = now
            self._activity.looked()
            try:
                self._look(now)
            except Exception as error:  # the training is worth more than its watchdog
                print(f"mpidl: warning: [rank {self._rank}] watchdog: {error!r}", file=sys.stderr, flush=True)
                return
            last = time.monotonic()

    def _look(self, now: float) -> None:
        if signals.is_ended() and not ulfm.is_on() and self._knows_loss():
            self._leave(EXIT_LOST)  # the guard of the lost one has told it
        if self._ends_with_speaker(now) or not self.settings.hang_seconds > 0 or not self._speaks(now):
            return
        self._look_for_lost(now)
        quiet_s = self._quiet_s(now)
        has_alarm = quiet_s >= self._notice_s
        files = self._run_files() if self._num_nodes > 1 else None
        if files is not None and (has_alarm or files.see_alarm()):
            files.tell(quiet_s, has_alarm, lambda: self._states(now))
        if not has_alarm:
            self._all_is_well(files)
        elif self._hears_until is not None or self._is_due(quiet_s):
            self._hear(now, files)

    def _quiet_s(self, now: float) -> float:
        """For how long nothing has moved on this node."""
        return now - max(self._awake_since, *(float(row[MOVED]) for row in self._rows.values()))

    @property
    def _notice_s(self) -> float:
        return notice_after(self.settings.hang_seconds, max(float(row[USUAL_S]) for row in self._rows.values()))

    @property
    def _is_alone(self) -> bool:
        """Whether there are other nodes, which cannot be asked."""
        return self._num_nodes > 1 and self.settings.run_dir is None

    @property
    def _alone_s(self) -> float:
        """After which a node that cannot ask the others ends the job, the lowest one first."""
        return ALONE_TIMES * self.settings.hang_seconds + (END_S if self._node else 0.0)

    def _speaks(self, now: float) -> bool:
        """Whether this rank is the lowest of its node whose watchdog is awake."""
        awake = [r for r, row in self._rows.items() if now - row[LOOKED] < ASLEEP_S and not self._is_dead(row)]
        return not awake or awake[0] == self._rank

    def _is_dead(self, row: NDArray[np.float64]) -> bool:
        return int(row[PHASE]) != ENDING and stacks.process_state(int(row[PID])) == "dead"

    def _run_files(self) -> NodeFiles | None:
        run_dir = self.settings.run_dir
        if run_dir is None:
            return None
        if self._files is None or self._files.run_dir != run_dir:
            self._files = NodeFiles(run_dir, self._key, self._node, self._num_nodes)
        return self._files

    def _all_is_well(self, files: NodeFiles | None) -> None:
        self._reported_s, self._hears_until = 0.0, None
        if files is not None and not files.see_alarm():
            files.withdraw()

    def _is_due(self, quiet_s: float) -> bool:
        """Whether there is something to report: a hang, that it is certain or over now, or lasts twice as long."""
        certain_s = self.settings.hang_seconds
        ends_s = self._alone_s if self._is_alone and self.settings.on_hang == "end" else certain_s
        is_now = any(self._reported_s < limit_s <= quiet_s for limit_s in (certain_s, ends_s))
        lasts = quiet_s >= 2 * self._reported_s and not certain_s <= quiet_s < ends_s
        return not self._reported_s or is_now or lasts

    # --- hearing and judging --------------------------------------------------------------------------------------

    def _hear(self, now: float, files: NodeFiles | None) -> None:
        """Begin to wait for what other nodes tell, or go on to; judge when all have, or patience is over."""
        if self._hears_until is None:
            self._hears_until = now + (PATIENCE_S if files else 0.0)
            if files is not None:
                files.listen()
        told = {} if files is None else files.heard()
        if files is None or len(told) == self._num_nodes - 1 or now >= self._hears_until:
            self._hears_until = None
            self._judge(told)

    def _judge(self, told: Mapping[int, Told]) -> None:
        now = time.monotonic()
        states = self._states(now)
        quiet_s = min([self._quiet_s(now), *(each.quiet_s for each in told.values())])
        if quiet_s < self._notice_s:
            return  # somebody moves, or does again
        all_states = [*states, *(state for each in told.values() for state in each.states)]
        if not self.settings.is_training and not any(state.waits_s is not None for state in all_states):
            return  # a loop of one's own that rests
        self._reported_s = quiet_s
        is_alone = self._is_alone
        ends = self.settings.on_hang == "end" and quiet_s >= self.settings.hang_seconds
        if is_alone and all(hang_report.waits(state) for state in states):
            ends = ends and quiet_s >= self._alone_s
        survives = ends and self.settings.survives and not all(hang_report.waits(state) for state in all_states)
        tells = is_alone or self._node == min([self._node, *told])
        silent = [] if is_alone else self._silent(told)
        where = f" on {self._hostnames[self._rank]}" if is_alone else ""
        usual_s = max(float(row[USUAL_S]) for row in self._rows.values())
        usual = "" if usual_s < 0 else f"; an iteration usually takes {usual_s:.2g} s"
        title = f"nothing has moved{where} for {quiet_s:.0f} s{usual}"
        all_states.sort(key=lambda state: state.rank)
        lines = hang_report.describe(all_states, silent, is_alone=is_alone)
        if survives:
            lines.append("whoever does not wait is killed; the others go on")
        code = EXIT_HUNG if ends and not survives else None
        if tells:
            self._print(title, lines, code)
        if survives:
            self._sacrifice(states)
        elif code is not None:
            self._end(code, states, None if tells else lambda: self._print(title, lines, code))

    def _silent(self, told: Mapping[int, Told]) -> list[tuple[str, Sequence[int]]]:
        """(host, ranks) of the nodes that nothing was heard of."""
        missing = sorted(set(self._node_of) - set(told) - {self._node})
        ranks = [[rank for rank, other in enumerate(self._node_of) if other == node] for node in missing]
        return [(self._hostnames[own[0]], own) for own in ranks]

    def _states(self, now: float) -> list[RankState]:
        """Of this node's ranks, with the stacks of those that do not wait for others, or of all if all do."""
        states = [
            dataclasses.replace(
                read_state(row, rank, self._hostnames[rank], now), process=stacks.process_state(int(row[PID]))
            )
            for rank, row in self._rows.items()
        ]
        all_wait = all(hang_report.waits(state) for state in states)
        return [
            state
            if hang_report.waits(state) and not all_wait
            else dataclasses.replace(state, stack=self._stack(state, self._rows[state.rank]))
            for state in states
        ]

    def _stack(self, state: RankState, row: NDArray[np.float64]) -> str:
        self._activity.looked()  # reading takes a while
        if state.rank == self._rank:
            return stacks.own_stack()
        if state.process or row[STACK_FILE] < 0:
            return ""
        return stacks.stack_of(state.pid, int(row[STACK_FILE]))

    def _print(self, title: str, lines: Sequence[str], code: int | None) -> None:
        """One report; with a code, the job ends with it."""
        end = [] if code is None else [f"all ranks end with code {code}{guard.how_to_resume(looks=False)}"]
        kind = "warning" if code is None else "error"
        text = "\n".join([f"mpidl: {kind}: {title}", *(f"  {line}" for line in [*lines, *end])])
        print(text, file=sys.stderr, flush=True)

    # --- ending ---------------------------------------------------------------------------------------------------

    def _look_for_lost(self, now: float) -> None:
        """Tell of a rank of this node that has been dead for a while, or of a node without ranks."""
        gone = self._gone_nodes()
        has_lost = bool(gone) or any(self._is_dead(row) for row in self._rows.values())
        if not has_lost or (ulfm.is_on() and not self._all_others_wait(now)):
            self._lost_since = None
            return
        self._lost_since = self._lost_since or now
        if self._has_told_lost or now - self._lost_since < LOST_S:
            return
        self._has_told_lost = True
        ends = self.settings.on_hang == "end"
        states = self._states(now)
        lost = [state for state in states if state.process == "dead"]
        if gone or not self._guards_told(lost):
            self._print("a rank was lost", [*hang_report.describe(lost), *gone], EXIT_LOST if ends else None)
        if ends:
            self._end(EXIT_LOST, states)

    def _guards_told(self, lost: Sequence[RankState]) -> bool:
        """Whether the guards of these ranks have said all that there is to say."""
        files = self._run_files()
        return files is not None and {state.rank for state in lost} <= files.lost(at_once=True).keys()

    def _knows_loss(self) -> bool:
        """Whether a rank of this node has died, or a guard says so of any."""
        files = self._run_files()
        return any(self._is_dead(row) for row in self._rows.values()) or bool(files and files.lost(at_once=True))

    def _gone_nodes(self) -> list[str]:
        """Lines about nodes whose ranks were all killed, if this node is the lowest that is left."""
        files = self._run_files() if self._num_nodes > 1 else None  # the file system may be what hangs
        lost = {} if files is None else files.lost()
        ranks = {node: [r for r, its in enumerate(self._node_of) if its == node] for node in set(self._node_of)}
        gone = sorted(node for node, own in ranks.items() if lost.keys() >= set(own))
        if self._node != min(ranks.keys() - gone, default=self._node):
            return []
        return [
            hang_report.describe_gone(self._hostnames[ranks[node][0]], {rank: lost[rank] for rank in ranks[node]})
            for node in gone
        ]

    def _all_others_wait(self, now: float) -> bool:
        """Whether every living rank has waited since long: MPI has not noticed the loss, or it would not let them."""
        waiting = [row[WAITS_SINCE] for row in self._rows.values() if not self._is_dead(row)]
        return all(since > 0 and now - since > LOST_S for since in waiting)

    def _sacrifice(self, states: Sequence[RankState]) -> None:
        """Kill this node's ranks that keep the others waiting: those go on without them."""
        for state in sorted(states, key=lambda state: state.rank == self._rank):  # this one last
            if not hang_report.waits(state):
                with contextlib.suppress(OSError):
                    os.kill(state.pid, signal.SIGKILL)

    def _end(self, code: int, states: Sequence[RankState], tell: Callable[[], None] | None = None) -> None:
        """End the job; this node in any case.

        Args:
            code: that it ends with.
            states: of this node's ranks.
            tell: prints the report if whoever has to does not end the job; None: this rank has, and ends it.
        """
        self._rows[self._rank][ENDS] = code
        guard.tell(has_said=1)  # also where it is MPI_Abort that ends this process
        # In C, so that it works while MPI_Abort keeps the interpreter's lock.
        faulthandler.dump_traceback_later(OTHERS_END_S + 2 * END_S, exit=True, file=sys.stderr)
        if tell is not None:
            self._tell_on(OTHERS_END_S, states)
            tell()
        time.sleep(0.1)  # the report must get out
        threading.Thread(target=self._abort, args=(code,), daemon=True).start()
        self._tell_on(END_S, states)
        # Not before: a launcher that sees a rank killed ends the job with that rank's code.
        for state in states:
            if state.process == "stopped":
                with contextlib.suppress(OSError):
                    os.kill(state.pid, signal.SIGKILL)
        self._leave(code)

    def _tell_on(self, seconds: float, states: Sequence[RankState]) -> None:
        """Wait for the job's end, and be heard meanwhile: another node may have begun to listen just now."""
        files = self._run_files() if self._num_nodes > 1 else None
        for _ in range(int(seconds / LOOK_S)):
            time.sleep(LOOK_S)
            if files is not None:
                files.tell(self._quiet_s(time.monotonic()), True, lambda: states)

    def _leave(self, code: int) -> NoReturn:
        """End this process, of which its guard has nothing to say."""
        guard.tell(has_said=1)
        os._exit(code)

    def _ends_with_speaker(self, now: float) -> bool:
        """Whether this node's speaker has judged that all end; then this process does so, if nobody ends it before."""
        codes = [int(row[ENDS]) for row in self._rows.values() if row[ENDS] > 0]
        if codes:
            self._ends_at = self._ends_at or now + OTHERS_END_S + 2 * END_S
            if now >= self._ends_at:
                self._leave(codes[0])
        return bool(codes)
