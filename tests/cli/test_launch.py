"""`mpidl launch` with real launchers: a lost rank, another number of ranks, Ctrl-C and bad input."""

from __future__ import annotations

import hashlib
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.processes import Watched
from tests.launch import Completed, is_open_mpi, launch, mpirun, run

pytestmark = pytest.mark.thorough

MPIDL = [sys.executable, "-m", "mpidl"]
PARTS = "tests.cli.jobs.parts"
JOB = [
    "--model", f"{PARTS}:EndingNet", "--data", f"{PARTS}:noisy_digits", "--optimizer", "adamw", "--lr", "0.01",
    "--batch-size", "48", "--partitions", "8", "--threads-per-rank", "1", "--epochs", "4", "--run-dir",
]  # fmt: skip
PATIENCE_S = 90.0


def launched(n: int, watched: Watched, run_dir: Path, fate: str, *flags: str, restarts: int = 3) -> Completed:
    launcher = f"{mpirun()} --oversubscribe" if is_open_mpi() else mpirun()
    options = ["-n", str(n), "--restarts", str(restarts), "--mpirun", launcher]
    command = [*MPIDL, "launch", *options, *MPIDL, "train", *JOB, str(run_dir), *flags]
    return run(command, env={**watched.env, "FATE": fate}, timeout=150.0)


def when_fate_is_met(folder: Path, act: Callable[[], object]) -> threading.Thread:
    """Do something once a rank has met its fate."""

    def wait() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not list(folder.glob("fate of *")) and time.monotonic() < deadline:
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "weights.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    launch(2, [*MPIDL, "train", *JOB, str(run_dir)]).check()
    return weights(run_dir)


def test_a_killed_rank_is_named_and_the_restarted_run_ends_with_the_undisturbed_bits(
    undisturbed: str, tmp_path: Path
) -> None:
    watched = Watched(tmp_path)
    ended = launched(3, watched, tmp_path / "run", "kill once:1:20").check()
    assert ended.stderr.count("mpidl: error: rank 1 of 3 was lost: process ") == 1, ended.output
    assert f" on {platform.node()} was killed by signal 9 (SIGKILL)" in ended.stderr, ended.output
    assert f"lost rank 1 on {platform.node()}; starts again from epoch-00000" in ended.stderr, ended.output
    assert weights(tmp_path / "run") == undisturbed
    assert not (tmp_path / "run" / "ends").exists()
    watched.check_nothing_is_left(ended)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_restart_goes_on_from_what_the_nodes_have_kept_to_the_undisturbed_bits(
    undisturbed: str, tmp_path: Path, rank: int
) -> None:
    watched, run_dir = Watched(tmp_path), tmp_path / "run"
    # The fourth iteration, of four partitions a rank; in it three starts of groups and a checkpoint are behind.
    flags = ["--group-size", "1", "--checkpoint-every", "iterations(2)"]
    ended = launched(2, watched, run_dir, f"kill late:{rank}:14", *flags).check()
    assert f"lost rank {rank} on {platform.node()}; starts again from " in ended.stderr, ended.output
    assert "mpidl: goes on from what the nodes have kept, after iteration 3; the" in ended.stdout, ended.output
    assert weights(run_dir) == undisturbed
    watched.check_nothing_is_left(ended)


def test_what_killed_ranks_have_kept_is_removed_when_there_are_no_restarts_left(tmp_path: Path) -> None:
    watched, run_dir = Watched(tmp_path), tmp_path / "run"
    (shared, _) = watched.folders
    seen: list[str] = []
    looking = when_fate_is_met(tmp_path, lambda: seen.extend(path.name for path in shared.glob("mpidl-*/*.own")))
    ended = launched(2, watched, run_dir, "kill late:1:14", "--group-size", "1", restarts=0)
    looking.join()
    assert not seen, "nothing is kept for restarts that there are not"
    (tmp_path / "fate of 1").unlink()
    looking = when_fate_is_met(tmp_path, lambda: seen.extend(path.name for path in shared.glob("mpidl-*/*.own")))
    ended = launched(2, watched, tmp_path / "again", "raise:1:14", "--group-size", "1", restarts=1)
    looking.join()
    assert ended.returncode == 1, ended.output
    assert seen
    assert "no restarts are left" in ended.stderr, ended.output
    watched.check_nothing_is_left(ended)


def test_a_run_that_grows_ends_with_the_undisturbed_bits(undisturbed: str, tmp_path: Path) -> None:
    watched, run_dir = Watched(tmp_path), tmp_path / "run"
    asking = when_fate_is_met(tmp_path, lambda: (run_dir / "RANKS").write_text("3\n"))
    ended = launched(1, watched, run_dir, "until others are ready:0:30").check()
    asking.join()
    assert "3 ranks get ready, while training goes on" in ended.stderr, ended.output
    assert "stops with a checkpoint, to go on with 3 ranks" in ended.stderr, ended.output
    assert "on 3 ranks\n" in ended.stderr, ended.output
    assert "3 ranks on 1 node" in ended.stdout, ended.output
    assert weights(run_dir) == undisturbed
    watched.check_nothing_is_left(ended)


def test_a_second_ctrl_c_ends_all_and_restarts_nothing(tmp_path: Path) -> None:
    watched = Watched(tmp_path)

    def interrupt() -> None:
        (parent,) = [
            each for each in watched.processes() if b"\0launch\0" in Path(f"/proc/{each}/cmdline").read_bytes()
        ]
        os.kill(parent, signal.SIGINT)
        time.sleep(1.0)
        os.kill(parent, signal.SIGINT)

    when_fate_is_met(tmp_path, interrupt)
    ended = launched(2, watched, tmp_path / "run", "sleep:1:9")
    assert ended.returncode == 128 + signal.SIGINT, ended.output
    assert "mpidl: launch: interrupted; " in ended.stderr, ended.output
    assert "starts again" not in ended.stderr, ended.output
    watched.check_nothing_is_left(ended)


def test_bad_input_that_the_ranks_find_is_told_once_and_not_tried_again(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    ended = launched(2, watched, tmp_path / "run", "never:all:0", "--optimizer-args", "{beta = 1}")
    assert ended.returncode == 2, ended.output
    assert ended.stderr.count("mpidl: error: ") == 1, ended.output
    assert "starts again" not in ended.stderr, ended.output
    assert not (tmp_path / "run").exists()
    watched.check_nothing_is_left(ended)
