"""Who is to blame for a hang, when it is told, and how another process's stack is read."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mpidl import guard
from mpidl.errors import EXIT_HUNG, EXIT_LOST, ConfigError
from mpidl.runtime import activity, check_watch, hang_report, node_files, signals, stacks, watchdog
from mpidl.runtime.activity import Activity, RankState, read_state
from mpidl.runtime.watchdog import Watchdog

LISTENER = """
import sys, time
from mpidl.runtime import stacks
print(stacks.listen(), flush=True)
def inner():
    time.sleep(100)
def outer():
    inner()
outer()
"""


def state(rank: int, *, waits: bool, phase: str = "reduce-scatter", **facts: object) -> RankState:
    known: dict[str, object] = {
        "rank": rank, "host": f"node{rank // 2}", "pid": 100 + rank, "iteration": 8, "phase": phase, "phase_s": 41.2,
        "waits_s": 40.0 if waits else None, "bucket": None,
    }  # fmt: skip
    return RankState(**{**known, **facts})  # type: ignore[arg-type]


def test_the_one_that_does_not_wait_is_accused_with_its_stack() -> None:
    states = [state(rank, waits=True) for rank in (0, 1, 2, 4)]
    culprit = state(3, waits=False, phase="reading data", stack='  File "x.py", line 3 in __getitem__')
    lines = hang_report.describe([*states, culprit])
    assert lines == [
        "rank 3 (node1, process 103) has not entered reduce-scatter of iteration 8; it has been in reading data of "
        "iteration 8 for 41 s; its stack:",
        '  File "x.py", line 3 in __getitem__',
        "4 ranks wait (ranks 0-2, 4) in reduce-scatter of iteration 8, for 40 s",
    ]


def test_ranks_that_wait_for_different_things_are_told_apart() -> None:
    states = [state(0, waits=True, phase="validation"), state(1, waits=True), state(2, waits=True)]
    lines = hang_report.describe([*states[:2], state(2, waits=True, host="node0")])
    assert lines == [
        "no rank computes, and they wait for different things: do all ranks make the same calls?",
        "2 ranks wait (ranks 1-2) in reduce-scatter of iteration 8, for 40 s",
        "1 rank waits (rank 0) in validation of iteration 8, for 40 s",
    ]
    assert hang_report.describe(states)[0].endswith("the same calls, or is a connection between hosts dead?")


def test_where_all_wait_in_one_place_the_wire_is_suspected() -> None:
    lines = hang_report.describe([state(0, waits=True), state(1, waits=True)])
    assert "a connection between hosts may be dead" in lines[0]


def test_silent_nodes_stopped_and_dead_ranks_are_to_blame_even_if_they_waited() -> None:
    lines = hang_report.describe(
        [state(0, waits=True), state(1, waits=True, process="stopped"), state(2, waits=True, process="dead")],
        [("node9", [6, 7])],
    )
    assert lines[0].startswith("rank 1 (node0, process 101) is stopped (SIGSTOP, or a debugger); it has been in")
    assert lines[1] == "rank 2 (node1, process 102) has died; it was in reduce-scatter of iteration 8"
    assert lines[2].startswith("nothing is heard of node9 (ranks 6-7): it is down")
    assert lines[3] == "1 rank waits (rank 0) in reduce-scatter of iteration 8, for 40 s"


def test_a_rank_that_has_done_its_work_is_not_to_blame() -> None:
    lines = hang_report.describe([state(0, waits=False, phase="ending"), state(1, waits=True)])
    assert lines[0].startswith("no rank computes, and they wait for different things")


@pytest.mark.parametrize(
    ("hang_seconds", "usual_s", "expected"),
    [(900, -1, 900), (900, 0.1, 30), (900, 4, 120), (900, 60, 900), (5, 0.1, 5)],
)
def test_the_first_report_comes_after_many_usual_iterations(
    hang_seconds: float, usual_s: float, expected: float
) -> None:
    assert watchdog.notice_after(hang_seconds, usual_s) == expected


def test_a_row_tells_what_its_rank_does() -> None:
    own, row = Activity(), np.zeros(len(activity.FIELDS))
    own.move_to(row)
    own.enter(activity.COMPUTE, 12)
    own.end_iteration()
    with own.within(activity.VALIDATION), own.waiting():
        seen = read_state(row, 3, "host", time.monotonic())
        assert (seen.rank, seen.pid, seen.iteration, seen.phase) == (3, os.getpid(), 12, "validation")
        assert seen.waits_s is not None
        assert 0 <= seen.waits_s <= seen.phase_s < 10
    after = read_state(row, 3, "host", time.monotonic())
    assert (after.phase, after.waits_s, after.bucket) == ("forward and backward", None, None)
    assert row[activity.USUAL_S] == activity.NONE, "one iteration's end says nothing yet"
    time.sleep(0.01)
    own.end_iteration()
    longest = row[activity.USUAL_S]
    assert longest >= 0.01
    own.end_iteration()
    assert longest * 0.9 < row[activity.USUAL_S] < longest, "long iterations are forgotten slowly"


@pytest.fixture
def listener() -> Iterator[tuple[subprocess.Popen[str], int]]:
    with subprocess.Popen([sys.executable, "-c", LISTENER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


def test_another_process_s_stack_is_read_innermost_call_last(listener: tuple[subprocess.Popen[str], int]) -> None:
    process, descriptor = listener
    lines: list[str] = []
    deadline = time.monotonic() + 20
    while not (lines and "inner" in lines[-1]) and time.monotonic() < deadline:  # it may not have got there yet
        lines = stacks.stack_of(process.pid, descriptor).splitlines()
    assert [line.rpartition(" in ")[2] for line in lines] == ["<module>", "outer", "inner"]
    assert stacks.process_state(process.pid) == ""
    process.send_signal(signal.SIGSTOP)
    while not stacks.process_state(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stacks.process_state(process.pid) == "stopped"
    assert stacks.stack_of(process.pid, descriptor) == "", "it cannot answer"
    process.kill()
    process.wait()
    assert stacks.process_state(process.pid) == "dead"


class Clock:
    """Time that passes when the test says so; who sleeps is not waited for."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Nobody waits."""


class Ended(Exception):
    """In place of the end of the process."""


class Job:
    """Watchdogs of ranks on nodes, all in this process, looking in turn; `codes` are those of aborts and exits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, node_of: Sequence[int], settings: watchdog.Settings) -> None:
        self.clock, self.codes = Clock(), list[tuple[str, int]]()
        for module in (watchdog, node_files, activity):
            monkeypatch.setattr(module, "time", self.clock)
        monkeypatch.setattr(watchdog, "threading", SimpleNamespace(Thread=AtOnce))
        monkeypatch.setattr(watchdog, "faulthandler", SimpleNamespace(dump_traceback_later=lambda *_, **__: None))
        monkeypatch.setattr(os, "_exit", self._exit)
        monkeypatch.setattr(stacks, "own_stack", lambda: '  File "x.py", line 1 in stuck')
        rows = [np.zeros(len(activity.FIELDS)) for _ in node_of]
        self.dogs: list[Watchdog] = []
        self.activities: list[Activity] = []
        for rank, node in enumerate(node_of):
            own = {other: rows[other] for other, its in enumerate(node_of) if its == node}
            made = Activity()
            made.move_to(rows[rank])
            made.set_stack_file(-1)
            world = SimpleNamespace(
                activity=made, abort=lambda code: self.codes.append(("abort", code)), rank=rank, size=len(node_of),
                hostnames=[f"host{its}" for its in node_of], node_of=tuple(node_of), local_size=len(own),
            )  # fmt: skip
            self.dogs.append(Watchdog(own, world, "key"))  # type: ignore[arg-type]
            self.dogs[-1].settings = settings
            self.activities.append(made)

    def _exit(self, code: int) -> None:
        self.codes.append(("exit", code))
        raise Ended

    def watch(self, seconds: int, moving: Sequence[int] = (), asleep: Sequence[int] = ()) -> None:
        """So many seconds go by; some ranks move, the watchdogs of others sleep."""
        gone = set(asleep)
        for _ in range(seconds):
            self.clock.now += 1
            for rank in moving:
                self.activities[rank].beat()
            for rank, dog in enumerate(self.dogs):
                if rank not in gone:
                    self.activities[rank].looked()
                    try:
                        dog._look(self.clock.now)
                    except Ended:
                        gone.add(rank)


class AtOnce:
    """A thread that has run when it is started."""

    def __init__(self, target: Callable[..., None], args: Sequence[int] = (), **_: object) -> None:
        self.start = lambda: target(*args)


def stuck(job: Job, culprit: int) -> None:
    """All ranks but one wait."""
    for rank, each in enumerate(job.activities):
        each.enter(activity.COMPUTE if rank == culprit else activity.REDUCE_SCATTER, 7)
        each.end_iteration()
        job.clock.now += 0.1
        each.end_iteration()
        if rank != culprit:
            each._row[activity.WAITS_SINCE] = job.clock.now


def hanging(
    monkeypatch: pytest.MonkeyPatch, node_of: Sequence[int], settings: watchdog.Settings, *, culprit: int
) -> Job:
    """A job in which all ranks but one wait."""
    job = Job(monkeypatch, node_of, settings)
    stuck(job, culprit)
    return job


def settings(run_dir: Path | None = None, on_hang: str = "end", *, is_training: bool = True) -> watchdog.Settings:
    return watchdog.Settings(100.0, on_hang, run_dir, is_training)


def test_a_hang_is_told_early_and_once_and_ended_when_it_is_certain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = hanging(monkeypatch, [0, 0, 1, 1], settings(tmp_path), culprit=3)
    monkeypatch.setattr(guard, "_facts", {"run_dir": "runs/x"})
    job.watch(60)
    told = capsys.readouterr().err
    assert told.count("mpidl: warning: nothing has moved for ") == 1, told
    assert "  rank 3 (host1, process" in told
    assert "3 ranks wait (ranks 0-2) in reduce-scatter of iteration 7" in told
    assert not job.codes
    job.watch(100)
    told = capsys.readouterr().err
    assert told.count("mpidl: error: nothing has moved for 1") == 2, "should the first not end the job, the other node"
    assert told.count("mpidl train --resume runs/x") == 2
    assert job.codes.count(("abort", EXIT_HUNG)) == 2
    assert job.codes.count(("exit", EXIT_HUNG)) == 4, "should that fail"


def test_a_node_tells_only_after_the_one_that_has_to_did_not_end_the_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, done = hanging(monkeypatch, [0, 1], settings(tmp_path), culprit=1), list[str]()
    counts: list[list[int]] = [[], []]

    def sleep(seconds: float) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # under mpirun this rank's own watchdog has this clock, too
        job.clock.now += seconds
        done.append(f"{seconds:g} s")
        for node, of_node in enumerate(counts):
            with contextlib.suppress(FileNotFoundError):
                of_node.append(json.loads((tmp_path / "hang" / f"node-{node:05}.json").read_text())["count"])

    monkeypatch.setattr(job.clock, "sleep", sleep)
    monkeypatch.setattr(Watchdog, "_print", lambda self, *_: done.append(f"rank {self._rank} tells"))
    job.watch(99)
    done.clear()
    job.watch(30)
    assert done.count("rank 0 tells") == done.count("rank 1 tells") == 1, done
    assert done[: done.index("rank 1 tells")].count("1 s") == watchdog.OTHERS_END_S, done
    assert counts[1][-1] - counts[1][0] > watchdog.OTHERS_END_S / node_files.TELL_S / 2, "it is heard all the time"
    assert counts[0][-1] > counts[0][0], "and so is who ends the job"


def test_a_silent_node_does_not_keep_a_hang_from_being_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = hanging(monkeypatch, [0, 1], settings(tmp_path), culprit=1)
    job.watch(200, asleep=[1])
    told = capsys.readouterr().err
    assert "nothing is heard of host1 (rank 1)" in told
    assert job.codes[0] == ("abort", EXIT_HUNG)


def test_a_node_that_moves_answers_an_alarm_and_nothing_is_told_or_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = hanging(monkeypatch, [0, 1], settings(tmp_path), culprit=1)
    job.watch(300, moving=[1])
    assert capsys.readouterr().err == ""
    assert not job.codes
    assert list((tmp_path / "hang").glob("*.json")), "they have told each other"
    job.watch(20, moving=[0, 1])
    assert not list((tmp_path / "hang").glob("*.json")), "and take it back"


def test_a_loop_of_one_s_own_may_rest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(monkeypatch, [0, 0], settings(on_hang="warn", is_training=False))
    job.watch(300)
    assert capsys.readouterr().err == "", "nobody waits"
    stuck(job, culprit=0)
    job.watch(300)
    assert capsys.readouterr().err.count("mpidl: warning: nothing has moved") >= 2, "with growing intervals"
    assert not job.codes


def test_nodes_that_cannot_ask_each_other_end_a_job_whose_ranks_all_wait_for_twice_as_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(monkeypatch, [0, 1], settings(is_training=False))
    stuck(job, culprit=2)
    job.watch(199)
    assert "nothing has moved on host1" in capsys.readouterr().err
    assert not job.codes
    job.watch(3)
    told = capsys.readouterr().err
    assert told.count("nothing has moved") == told.count("mpidl: error: nothing has moved on host0 for 20") == 1, told
    assert job.codes == [("abort", EXIT_HUNG), ("exit", EXIT_HUNG)], "the lowest ends it"
    job.watch(6)
    assert capsys.readouterr().err.count("mpidl: error: nothing has moved on host1 for 20") == 1, "should that fail"
    assert job.codes[2:] == [("abort", EXIT_HUNG), ("exit", EXIT_HUNG)]


@pytest.mark.parametrize("on_hang", ["end", "warn"])
def test_a_rank_that_has_died_is_told_once(
    on_hang: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(monkeypatch, [0, 0], settings(on_hang=on_hang))
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    job.dogs[0]._rows[1][activity.PID] = process.pid  # which does not exist any more
    job.watch(20, asleep=[1])
    told = capsys.readouterr().err
    assert told.count("a rank was lost") == 1
    assert f"rank 1 (host0, process {process.pid}) has died" in told
    assert job.codes[:1] == ([("abort", EXIT_LOST)] if on_hang == "end" else [])


def test_a_loss_that_a_guard_has_told_is_not_told_again_but_ends_the_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(monkeypatch, [0, 0, 1], settings(tmp_path))
    (tmp_path / "hang").mkdir()
    facts = {"rank": 1, "host": "host0", "process": 5, "code": -9, "job": "key"}
    (tmp_path / "hang" / "lost-00001.json").write_text(json.dumps(facts))
    monkeypatch.setattr(stacks, "process_state", lambda pid: "dead" if pid == 5 else "")
    job.dogs[0]._rows[1][activity.PID] = 5
    job.watch(20, asleep=[1])
    assert capsys.readouterr().err == ""
    assert job.codes[:1] == [("abort", EXIT_LOST)]


def test_a_node_whose_only_rank_was_killed_is_told_by_the_lowest_that_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(monkeypatch, [0, 1, 2], settings(tmp_path))
    monkeypatch.setattr(guard, "_facts", {"run_dir": "runs/x"})
    (tmp_path / "hang").mkdir()
    facts = {"rank": 0, "host": "host0", "process": 5, "code": -9}
    for name, key in (("lost-00000.json", "key"), ("lost-00001.json", "of an earlier job")):
        (tmp_path / "hang" / name).write_text(json.dumps({**facts, "rank": int(name[9]), "job": key}))
    (tmp_path / "hang" / "lost-00002.json").write_text("half")
    job.watch(20, moving=[1, 2], asleep=[0])
    told = capsys.readouterr().err
    assert told.count("a rank was lost") == 1, told
    assert "nobody is left on host0: rank 0 died of signal 9" in told
    assert "mpidl train --resume runs/x" in told
    assert [code for code in job.codes if code[0] == "abort"] == [("abort", EXIT_LOST)]
    assert not (tmp_path / "hang" / "lost-00001.json").exists()


def test_ranks_of_a_node_that_were_killed_and_those_that_left_are_told_apart() -> None:
    told = hang_report.describe_gone("host0", {0: 9, 1: -3, 2: 9, 3: 11})
    assert (
        told
        == "nobody is left on host0: ranks 0, 2 died of signal 9, rank 1 left with code 3, rank 3 died of signal 11"
    )


def test_a_rank_that_is_asked_to_end_after_a_loss_leaves_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = hanging(monkeypatch, [0, 1], settings(tmp_path), culprit=0)
    monkeypatch.setattr(signals, "_received", [signal.SIGTERM])
    job.watch(2, asleep=[0])
    assert not job.codes, "nobody is lost: it ends its iteration"
    (tmp_path / "hang").mkdir()
    facts = {"rank": 0, "host": "host0", "process": 5, "code": -9, "job": "key"}
    (tmp_path / "hang" / "lost-00000.json").write_text(json.dumps(facts))
    job.watch(1, asleep=[0])
    assert job.codes == [("exit", EXIT_LOST)]
    assert capsys.readouterr().err == "", "its guard has told it"


@pytest.mark.parametrize(
    ("hang_seconds", "on_hang", "said"),
    [
        (-1.0, "end", "hang_seconds is -1"),
        (float("nan"), "end", "hang_seconds is nan"),
        (1.0, "stop", "on_hang is 'stop'"),
    ],
)
def test_settings_out_of_range_are_refused(hang_seconds: float, on_hang: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_watch(hang_seconds, on_hang)
