"""`mpidl train --resume`: the bits of the undisturbed run, after any interruption, on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import mpidl
from tests.cli.processes import Watched, run_commands
from tests.launch import Completed, launch

MPIDL = [sys.executable, "-m", "mpidl"]
PARTS = "tests.cli.jobs.parts"
# Adam has moments and a step count, the network BatchNorm and dropout, the data augmentation, the rate a schedule;
# the last batch of an epoch is smaller than the others. 5 iterations an epoch.
JOB = [
    "--model", f"{PARTS}:EndingNet", "--data", f"{PARTS}:noisy_digits", "--optimizer", "adamw", "--lr", "0.01",
    "--schedule", "cosine", "--warmup-iterations", "3", "--batch-size", "48", "--partitions", "8",
    "--threads-per-rank", "1", "--epochs", "4",
]  # fmt: skip


def train(n: int, *args: str, **env: str) -> Completed:
    return launch(n, [*MPIDL, "train", *args], env=env)


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "weights.safetensors").read_bytes()).hexdigest()


def events(run_dir: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] in kinds]


def losses(run_dir: Path, after_epoch: int = 0) -> list[tuple[int, float]]:
    """(epoch, loss) of training and validation."""
    found = events(run_dir, "epoch", "validation")
    return [(event["epoch"], event["loss"]) for event in found if event["epoch"] > after_epoch]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(3, *JOB, "--run-dir", str(run_dir)).check()
    return run_dir


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 ranks, one of which was killed within the third epoch."""
    folder = tmp_path_factory.mktemp("killed")
    watched = Watched(folder)
    ended = train(4, *JOB, "--run-dir", str(folder / "run"), FATE=f"kill:1:{2 * 8 + 5}", **watched.env)
    assert ended.returncode != 0
    watched.check_nothing_is_left(ended)
    assert checkpoints(folder / "run") == ["epoch-000001", "epoch-000002"]
    assert not (folder / "run" / "weights.safetensors").exists()
    return folder / "run"


def copied(run_dir: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run_dir, folder / "run"))


@pytest.mark.parametrize("n", [3])
def test_a_killed_run_goes_on_with_the_bits_of_the_undisturbed_one(
    n: int, undisturbed: Path, killed: Path, tmp_path: Path
) -> None:
    run_dir = copied(killed, tmp_path)
    # What a rank killed while it wrote a checkpoint leaves behind: a folder without its final name or manifest.
    for name in (".new-epoch-000003", "epoch-000003"):
        (run_dir / "checkpoints" / name).mkdir()
        (run_dir / "checkpoints" / name / "shard-00000-of-00004.safetensors").write_bytes(b"half a sh")
    train(n, "--resume", str(run_dir)).check()
    assert weights(run_dir) == weights(undisturbed)
    assert [event["first_iteration"] for event in events(run_dir, "start")] == [0, 10]
    assert losses(run_dir) == losses(undisturbed)
    assert checkpoints(run_dir) == [f"epoch-00000{epoch}" for epoch in range(1, 5)]


def test_a_run_resumed_from_its_last_checkpoint_is_left_as_it_is(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = copied(undisturbed, tmp_path)
    ended = train(2, "--resume", str(run_dir)).check()
    assert weights(run_dir) == weights(undisturbed)
    assert losses(run_dir) == losses(undisturbed)
    assert "finished" in ended.stdout
    assert all(mpidl.load(run_dir)[name].equal(tensor) for name, tensor in mpidl.load(undisturbed).items())


def test_without_a_whole_checkpoint_a_resumed_run_starts_over_and_says_so(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = copied(undisturbed, tmp_path)
    (run_dir / "weights.safetensors").unlink()
    for path in (run_dir / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    ended = train(2, "--resume", str(run_dir)).check()
    assert "the run starts over" in ended.output
    assert [event["first_iteration"] for event in events(run_dir, "start")] == [0, 0]
    assert weights(run_dir) == weights(undisturbed)


def test_what_does_not_fit_the_run_is_refused(killed: Path, tmp_path: Path) -> None:
    run_dir, damaged = copied(killed, tmp_path), copied(killed, tmp_path / "damaged")
    shards = sorted((damaged / "checkpoints" / "epoch-000002").glob("shard-*-of-00004.safetensors"))
    assert len(shards) == 4
    content = bytearray(shards[2].read_bytes())
    content[-1] ^= 1
    shards[2].write_bytes(content)
    before = (run_dir / "config.toml").read_text()
    assert "seed = 0" in before
    resume = ["train", "--resume", str(run_dir)]
    cases = {
        "another seed": ([*resume, "--seed", "1"], "was written with seed 0, this run has 1"),
        "other partitions": ([*resume, "--partitions", "4"], "was written with partitions 8, this run has 4"),
        "another optimizer": ([*resume, "--optimizer", "sgd"], "is of AdamW"),
        "another directory": ([*resume, "--run-dir", "other"], "leave out --run-dir"),
        "a job file": ([*resume, "jobs/digits.toml"], "leave out jobs/digits.toml"),
        "no run": (["train", "--resume", str(tmp_path)], "is not a run directory"),
        "damaged": (["train", "--resume", str(damaged)], f"{shards[2]} is damaged"),
    }
    ended, told = run_commands(2, tmp_path, {name: args for name, (args, _) in cases.items()})
    for name, (_, expected) in cases.items():
        codes, errors = told[name]
        assert codes == [2, 2], ended.output
        assert errors.count("mpidl: error: ") == 1, errors
        assert expected in errors
    assert (run_dir / "config.toml").read_text() == before, "the run can still be resumed as it was"
