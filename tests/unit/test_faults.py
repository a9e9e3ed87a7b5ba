"""How a job ends: who prints what, with which code, and when the others are ended."""

from __future__ import annotations

import atexit
import math
import os
import pathlib
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from mpidl import guard
from mpidl.errors import CheckpointError, ConfigError, MpidlError, NonFiniteLossError, PlanError, UserError
from mpidl.runtime import end_job, faults, on_all_ranks, run_command, warn

CODES = [
    (ConfigError("too many ranks"), 2),
    (CheckpointError("damaged"), 4),
    (NonFiniteLossError("the loss is nan"), 3),
    (PlanError("damaged"), 1),
    (ValueError("a bug"), 1),
]

Become = Callable[..., list[int]]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(faults, "_OTHERS_PRINT_S", 0.0)
    monkeypatch.setattr(faults, "_job", None)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Iterator[Become]:
    """Be a rank of a job; returns the list of codes with which it was aborted."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "exit", pythons_exit)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setattr(atexit, "register", lambda function: function)

    def become(rank: int, size: int, right: int | None = None) -> list[int]:
        aborted: list[int] = []
        faults.install(rank, size, aborted.append, lambda seconds: True, right)
        return aborted

    yield become
    signal.signal(signal.SIGTERM, before)


def pythons_exit(status: Any = None) -> NoReturn:
    raise SystemExit(status)


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


# --- errors that all ranks have ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "code"), [entry for entry in CODES if isinstance(entry[0], MpidlError)])
def test_an_agreed_error_is_printed_by_rank_0_alone_and_aborts_nobody(
    become: Become, capsys: pytest.CaptureFixture[str], error: MpidlError, code: int
) -> None:
    for rank in range(3):
        aborted = become(rank, 3)
        assert run_command(raising(on_all_ranks(type(error)(str(error))))) == code
        assert aborted == []
        assert capsys.readouterr().err == (f"mpidl: error: {error}\n" if rank == 0 else "")


def test_the_mark_belongs_to_one_error_only() -> None:
    marked, other = on_all_ranks(ConfigError("x")), ConfigError("x")
    assert faults.is_on_all_ranks(marked)
    assert not faults.is_on_all_ranks(other)
    assert not faults.is_on_all_ranks(ValueError("x"))


# --- errors of one rank -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "code"), CODES)
def test_an_uncaught_error_of_a_rank_is_printed_under_its_number_and_ends_all(
    become: Become, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    aborted = become(2, 4)
    run_command(raising(error))
    assert aborted == [code]
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("[rank 2] ") for line in lines)
    assert str(error) in lines[-1]
    # Bad input needs no traceback; a bug does.
    assert any("Traceback" in line for line in lines) != isinstance(error, UserError)


def test_of_ranks_that_fail_alike_one_prints_and_all_abort(
    become: Become, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    rights = [faults.open_right("unit") for _ in range(2)]  # of two ranks
    rights[0][0].unlink()
    assert list(tmp_path.iterdir()) == []
    for rank, (_, right) in enumerate(rights):
        aborted = become(rank, 4, right)
        for _ in range(2):
            run_command(raising(ValueError("alike")))
        assert aborted == [1, 1]
    printed = capsys.readouterr().err
    assert printed.count("[rank 0] ValueError: alike") == printed.count("alike\n") == 1


def test_jobs_and_users_do_not_share_the_right_to_print(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [faults.open_right("unit")[0], faults.open_right("another")[0]]
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    paths.append(faults.open_right("unit")[0])
    assert len(set(paths)) == 3


def test_where_no_file_can_be_made_a_rank_prints_all_the_same(
    become: Become, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "missing"))
    aborted = become(1, 2, faults.open_right("unit")[1])
    run_command(raising(ValueError("no place")))
    assert aborted == [1]
    assert "[rank 1] ValueError: no place" in capsys.readouterr().err


def test_an_interrupt_prints_one_line_and_ends_all(become: Become, capsys: pytest.CaptureFixture[str]) -> None:
    aborted = become(1, 2)
    run_command(raising(KeyboardInterrupt()))
    assert aborted
    assert aborted[0] != 0
    assert capsys.readouterr().err == "[rank 1] interrupted\n"


# --- one rank, or none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize(("error", "code"), CODES)
def test_alone_bad_input_is_one_line_and_a_bug_a_traceback(
    become: Become,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    size: int | None,
    error: Exception,
    code: int,
) -> None:
    monkeypatch.setattr(faults, "launched_rank", lambda: None)
    aborted = become(0, 1) if size else []
    assert run_command(raising(error)) == code
    assert aborted == []
    printed = capsys.readouterr().err
    if isinstance(error, UserError):
        assert printed == f"mpidl: error: {error}\n"
    else:
        assert printed.startswith("Traceback")
        assert printed.count(str(error)) >= 1


@pytest.mark.parametrize(("rank", "prints"), [(None, True), (0, True), (1, False)])
def test_before_mpi_runs_the_launcher_s_rank_0_prints_for_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int | None, prints: bool
) -> None:
    monkeypatch.setattr(faults, "launched_rank", lambda: rank)
    assert run_command(raising(ConfigError("unknown key"))) == 2
    assert bool(capsys.readouterr().err) == prints


# --- leaving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_command_s_result_is_its_exit_code(become: Become, result: int | None, code: int) -> None:
    aborted = become(1, 2)
    assert run_command(lambda: result) == code
    assert aborted == []
    ignores = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    assert ignores == (code > 0), "srun ends the others with SIGTERM once one has left with a code"


@pytest.mark.parametrize(("argument", "code"), [(None, 0), (0, 0), (5, 5), ("no such thing", 1)])
@pytest.mark.parametrize("size", [1, 2])
def test_leaving_early_ends_the_others_unless_the_code_is_0(
    become: Become, capsys: pytest.CaptureFixture[str], argument: Any, code: int, size: int
) -> None:
    aborted = become(size - 1, size)
    assert run_command(lambda: sys.exit(argument)) == code
    assert aborted == ([code] if code and size > 1 else [])
    told = "no such thing\n" if isinstance(argument, str) else f"[rank 1] left with code {code}; all end\n"
    assert capsys.readouterr().err == (told if isinstance(argument, str) or aborted else "")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("argument", [5, "no such thing"])
def test_the_guard_of_a_rank_that_leaves_on_purpose_has_nothing_to_say(
    become: Become, monkeypatch: pytest.MonkeyPatch, argument: Any, size: int
) -> None:
    told: dict[str, int | str] = {}
    monkeypatch.setattr(guard, "tell", lambda **facts: told.update(facts))
    become(size - 1, size)
    run_command(lambda: sys.exit(argument))
    assert told == {"has_said": 1}


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_a_job_of_one_keeps_python_s_own_behaviour(become: Become) -> None:
    become(0, 1)
    assert sys.excepthook is sys.__excepthook__
    assert threading.excepthook is threading.__excepthook__
    assert sys.exit is pythons_exit


@pytest.mark.parametrize(("status", "code"), [(None, 0), (0, 0), (5, 5), ("no such thing", 1)])
def test_sys_exit_is_python_s_own_and_remembers_its_code(become: Become, status: Any, code: int) -> None:
    become(1, 2)
    with pytest.raises(SystemExit) as left:
        sys.exit(status)
    assert left.value.code == status
    assert faults._job is not None
    assert faults._job.exit_code == code


def test_a_thread_that_leaves_does_not_set_the_process_s_code(become: Become) -> None:
    become(1, 2)
    thread = threading.Thread(target=lambda: sys.exit(5))
    thread.start()
    thread.join()
    assert faults._job is not None
    assert faults._job.exit_code == 0


@pytest.mark.parametrize("code", [0, 5])
@pytest.mark.parametrize("come", [True, False])
def test_a_rank_that_leaves_waits_for_the_others_and_with_an_error_not_for_ever(
    become: Become, capsys: pytest.CaptureFixture[str], code: int, come: bool
) -> None:
    aborted = become(1, 2)
    assert faults._job is not None
    waited: list[float] = []

    def all_leave(seconds: float) -> bool:
        waited.append(seconds)
        return come or math.isinf(seconds)

    faults._job.all_leave = all_leave
    faults._job.exit_code = code
    faults._leave()
    assert waited == [math.inf if code == 0 else faults._OTHERS_LEAVE_S]
    told = code != 0 and not come
    assert aborted == ([code] if told else [])
    assert ("[rank 1] left with code 5 while others go on" in capsys.readouterr().err) == told


def test_a_forked_child_is_no_rank(become: Become, monkeypatch: pytest.MonkeyPatch) -> None:
    become(1, 2)
    assert faults._job is not None
    monkeypatch.setattr(faults._job, "all_leave", lambda seconds: pytest.fail("waited for ranks"))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    faults._leave()


def test_an_uncaught_error_in_the_main_program_ends_all(become: Become, capsys: pytest.CaptureFixture[str]) -> None:
    aborted = become(1, 2)
    error = ValueError("in a loop of one's own")
    sys.excepthook(ValueError, error, None)
    assert aborted == [1]
    assert "[rank 1] ValueError: in a loop of one's own" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "codes"), [(ValueError("in a thread"), [1]), (SystemExit(3), [])])
def test_an_error_in_a_thread_ends_all_and_leaving_a_thread_does_not(
    become: Become, capsys: pytest.CaptureFixture[str], error: BaseException, codes: list[int]
) -> None:
    aborted = become(1, 2)
    thread = threading.Thread(target=raising(error))
    thread.start()
    thread.join()
    assert aborted == codes
    assert ("in a thread" in capsys.readouterr().err) == bool(codes)


def test_end_job_returns_the_code_where_there_is_nobody_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert end_job(on_all_ranks(NonFiniteLossError("nan"))) == 3
    assert capsys.readouterr().err == "mpidl: error: nan\n"


def test_a_warning_is_printed_once(become: Become, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (1, 0, 2):
        become(rank, 3)
        warn("little room")
    assert capsys.readouterr().err == "mpidl: warning: little room\n"
