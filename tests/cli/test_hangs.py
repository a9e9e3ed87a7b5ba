"""A rank that keeps the others waiting is named, with what it does, and the job ends or goes on as it was told."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mpidl.errors import EXIT_HUNG
from tests.cli.processes import Watched
from tests.launch import launch

pytestmark = pytest.mark.thorough

PARTS = "tests.cli.jobs.parts"
COMMAND = [
    sys.executable, "-m", "mpidl", "train", "--model", f"{PARTS}:EndingNet", "--data", f"{PARTS}:noisy_digits",
    "--batch-size", "24", "--threads-per-rank", "1", "--hang-seconds", "4", "--run-dir",
]  # fmt: skip
OWN_LOOP = [sys.executable, "tests/cli/jobs/own_loop.py", "6", "3"]


@pytest.mark.parametrize(
    ("fate", "said"),
    [
        ("sleep:1:9", "in end"),
        ("stop:0:9", "is stopped (SIGSTOP, or a debugger); it has not entered reduce-scatter of iteration"),
        ("lock:2:9", "in end"),
    ],
    ids=["waits in user code", "rank 0 is stopped", "keeps the interpreter's lock"],
)
def test_who_keeps_the_others_waiting_is_named_and_the_job_ends(fate: str, said: str, tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    ended = launch(3, [*COMMAND, str(tmp_path / "run")], env={**watched.env, "FATE": fate})
    assert ended.returncode == EXIT_HUNG, ended.output
    rank = fate.split(":")[1]
    assert ended.stderr.count("mpidl: error: nothing has moved for ") == 1, ended.output
    assert f"  rank {rank} (" in ended.stderr, ended.output
    phases = (
        r"has not entered reduce-scatter of iteration (\d+); it has been in forward and backward of iteration \1 for"
    )
    assert re.search(phases, ended.stderr), ended.output
    assert said in ended.stderr, ended.output
    assert "2 ranks wait" in ended.stderr, ended.output
    assert f"mpidl train --resume {tmp_path / 'run'}" in ended.stderr, ended.output
    watched.check_nothing_is_left(ended)


def test_a_node_that_says_nothing_is_named_by_the_others(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    env = {**watched.env, "FATE": "stop:1:9", "MPIDL_EMULATED_NODES": "3"}
    ended = launch(3, [*COMMAND, str(tmp_path / "run")], env=env)
    assert ended.returncode == EXIT_HUNG, ended.output
    assert ended.stderr.count("mpidl: error: nothing has moved for ") == 1, "one report for all nodes\n" + ended.output
    assert "(rank 1): it is down, stopped, or does not see the run directory" in ended.stderr, ended.output
    watched.check_nothing_is_left(ended)


def test_ranks_of_an_own_loop_that_make_different_calls_are_shown_with_their_stacks(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    ended = launch(3, [*OWN_LOOP, "end"], env={**watched.env, "FATE": "barrier:1:4"})
    assert ended.returncode == EXIT_HUNG, ended.output
    assert "do all ranks make the same calls?" in ended.stderr, ended.output
    assert "1 rank waits (rank 1) in the loop's own code of iteration 4" in ended.stderr, ended.output
    assert "2 ranks wait (ranks 0, 2) in reduce-scatter of iteration 4" in ended.stderr, ended.output
    assert "mpidl.barrier()" in ended.stderr or "in end" in ended.stderr, ended.output
    watched.check_nothing_is_left(ended)


@pytest.mark.parametrize("has_folder", [True, False])
def test_such_an_own_loop_is_ended_on_several_nodes_too(tmp_path: Path, *, has_folder: bool) -> None:
    watched, folder = Watched(tmp_path), tmp_path / "made" / "here"
    env = {**watched.env, "FATE": "barrier:1:4", "MPIDL_EMULATED_NODES": "3"}
    ended = launch(3, [*OWN_LOOP, "end", *([str(folder)] if has_folder else [])], env=env)
    assert ended.returncode == EXIT_HUNG, ended.output
    errors = [line for line in ended.stderr.splitlines() if line.startswith("mpidl: error: nothing has moved")]
    assert len(errors) == 1, "one report for all nodes, or of the lowest for itself\n" + ended.output
    assert ("2 ranks wait (ranks 0, 2)" in ended.stderr) == has_folder, ended.output
    assert ("all ranks here wait for those of other nodes" in ended.stderr) != has_folder, ended.output
    assert "--resume" not in ended.stderr, ended.output
    watched.check_nothing_is_left(ended)


def test_a_pause_is_told_and_the_job_goes_on_where_it_was_asked_to(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    ended = launch(2, [*OWN_LOOP, "warn"], env={**watched.env, "FATE": "pause:1:3"}).check()
    assert "mpidl: warning: nothing has moved for " in ended.stderr, ended.output
    assert "rank 1 (" in ended.stderr
    assert "all 2 ranks have ended" in ended.stdout
