"""Who trains in a run directory: one job at a time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpidl.errors import ConfigError, OccupiedError
from mpidl.occupation import LOCK_FILE, occupy
from mpidl.runtime import signals

PATIENCE_S = 60.0
HOLD = (
    "import sys, pathlib, mpidl.occupation as o; leave = o.occupy(pathlib.Path(sys.argv[1])); print('in', flush=True); "
)

pytestmark = pytest.mark.launches


def entered(folder: Path, patience_s: float = 0.0) -> Callable[[], None]:
    leave = occupy(folder, patience_s=patience_s)
    assert leave is not None
    return leave


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another job that trains in the folder, until it gets a line."""
    command = [sys.executable, "-c", HOLD + "input(); leave()", str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_job_is_refused_by_name_of_the_first(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(OccupiedError, match=re.escape(f"another job trains in {tmp_path} (process {holder.pid} on ")):
        occupy(tmp_path, patience_s=0.2)
    assert holder.poll() is None


def test_a_second_job_waits_for_the_end_of_the_first(
    holder: subprocess.Popen[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def end() -> None:
        time.sleep(3.0)
        holder.communicate("\n", timeout=PATIENCE_S)

    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    leave = entered(tmp_path, PATIENCE_S)
    ending.join()
    assert capfd.readouterr().err.count(f"another job trains in {tmp_path}") == 1
    assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    leave()
    assert not list(tmp_path.iterdir())


def test_a_job_that_was_killed_keeps_nobody_out(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait(PATIENCE_S)
    assert (tmp_path / LOCK_FILE).exists()
    entered(tmp_path)()
    assert not (tmp_path / LOCK_FILE).exists()


def test_processes_that_a_job_has_left_keep_nobody_out(tmp_path: Path) -> None:
    code = HOLD + "import os, time; os.fork() or time.sleep(5); os._exit(0)"
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        first.wait(PATIENCE_S)
        entered(tmp_path)()
    finally:
        first.kill()


def test_a_signal_ends_the_wait(holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "received", lambda: "SIGUSR1")
    assert occupy(tmp_path, patience_s=PATIENCE_S) is None


def test_who_leaves_takes_no_lock_of_another_one_away(tmp_path: Path) -> None:
    leave = entered(tmp_path)
    (tmp_path / LOCK_FILE).rename(tmp_path / "old")
    (tmp_path / LOCK_FILE).touch()
    leave()
    assert (tmp_path / LOCK_FILE).exists()


def test_a_folder_that_is_gone_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the run directory"):
        occupy(tmp_path / "gone")
