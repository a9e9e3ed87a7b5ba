"""What bad input gets: one message that helps, exit code 2, no traceback, and all ranks ended before they train."""

from __future__ import annotations

import gzip
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import mpidl
from mpidl.data import permute
from tests.cli.jobs.parts import MARKED, POISONED_AFTER, PoisonedNet
from tests.cli.processes import Watched, run_commands
from tests.launch import Completed, is_open_mpi, launch, run

MPIDL = [sys.executable, "-m", "mpidl"]
JOB = "tests/cli/jobs/small.toml"
PARTS = "tests.cli.jobs.parts"

LIMIT_S = 60.0
"""Seconds from the start to the end of all ranks; far less unless the machine is busy."""


def idx(shape: tuple[int, ...], *, magic: bytes = b"\0\0\x08", values: bytes | None = None) -> bytes:
    """An idx file of bytes, all zero by default."""
    content = bytes(int(np.prod(shape))) if values is None else values
    return magic + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + content


def fashion(folder: Path, **replaced: bytes | None) -> list[str]:
    """A small Fashion-MNIST; keywords replace the content of a file, or take it away."""
    contents: dict[str, bytes | None] = {
        "train_images_idx3": idx((16, 28, 28)), "train_labels_idx1": idx((16,)),
        "t10k_images_idx3": idx((8, 28, 28)), "t10k_labels_idx1": idx((8,)),
    }  # fmt: skip
    contents.update(replaced)
    for name, content in contents.items():
        if content is not None:
            (folder / f"{name.replace('_', '-')}-ubyte").write_bytes(content)
    return ["--data", "fashion_mnist", "--model", "lenet5", "--data-dir", str(folder)]


def npz(folder: Path, num_inputs: int, num_targets: int) -> list[str]:
    path = folder / "own.npz"
    np.savez(path, x=np.zeros((num_inputs, 1, 8, 8), np.float32), y=np.zeros(num_targets, np.int64))
    return ["--data", str(path)]


def toml(folder: Path, text: str) -> list[str]:
    path = folder / "own.toml"
    path.write_text(text)
    return [str(path)]


def cut_gzip(folder: Path) -> list[str]:
    args = fashion(folder, train_images_idx3=None)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx((16, 28, 28), values=b"ab" * 6272))[:60])
    return args


# Name of the case -> the arguments after `mpidl train`, made in an empty folder, and what the message must say:
# the value, the bound or the names allowed, and what to do.
CASES: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "an unknown key": (lambda f: toml(f, "epoch = 3"), ["unknown key 'epoch'", "did you mean epochs?", "own.toml"]),
    "a key far from all": (lambda f: toml(f, "zzz = 3"), ["unknown key 'zzz'", "--help"]),
    "an unknown flag": (lambda f: [JOB, "--epoch", "3"], ["--epoch", "did you mean", "--epochs"]),
    "a wrong type in the file": (lambda f: toml(f, 'epochs = "3"'), ["epochs is '3' (str), must be an integer"]),
    "a wrong type in a flag": (lambda f: [JOB, "--batch-size", "many"], ["--batch-size is 'many'", "an integer"]),
    "an unknown word": (lambda f: [JOB, "--schedule", "cosin"], ["'constant' or 'step' or", "did you mean cosine?"]),
    "out of range": (lambda f: toml(f, "lr = -0.5"), ["lr is -0.5, must be at least 0"]),
    "no such job file": (lambda f: [str(f / "no.toml")], ["no.toml", "No such file"]),
    "not TOML": (lambda f: toml(f, "epochs = = 3"), ["own.toml is not valid TOML", "line 1"]),
    "fewer samples in a batch than partitions": (
        lambda f: [JOB, "--batch-size", "7"], ["batch_size 7", "partitions 8", "raise batch_size or lower partitions"],
    ),
    "fewer partitions than ranks": (
        lambda f: [JOB, "--partitions", "1"], ["2 ranks, but partitions is 1", "lower -n or raise partitions"],
    ),
    "no data folder": (
        lambda f: [*fashion(f)[:-1], str(f / "none")], ["/none", "does not exist", "make data", "--data-dir"],
    ),
    "a missing data file": (
        lambda f: fashion(f, t10k_labels_idx1=None), ["neither t10k-labels-idx1-ubyte nor", "make data"],
    ),
    "a truncated data file": (
        lambda f: fashion(f, train_images_idx3=idx((16, 28, 28))[:-1]),
        ["train-images-idx3-ubyte is cut short", "12544 bytes"],
    ),
    "a truncated compressed file": (cut_gzip, ["train-images-idx3-ubyte.gz", "cut short"]),
    "a wrong magic number": (
        lambda f: fashion(f, train_labels_idx1=b"PNG" + idx((16,))), ["is not an idx file", "50 4e 47"],
    ),
    "labels out of range in a file": (
        lambda f: fashion(f, train_labels_idx1=idx((16,), values=bytes(15) + b"\x0a")),
        ["sample 15 has label 10", "from 0 to 9"],
    ),
    "labels out of range for the model": (
        lambda f: [JOB, "--data", f"{PARTS}:wrong_labels"], ["sample 3 has label 10", "from 0 to 9"],
    ),
    "images and labels of different numbers": (
        lambda f: fashion(f, train_labels_idx1=idx((15,))), ["16 images", "15 labels"],
    ),
    "x and y of different sizes": (lambda f: npz(f, 20, 19), ["20 and 19 samples", "must be equal"]),
    "no such data": (lambda f: [JOB, "--data", "digit"], ["unknown data 'digit'", "did you mean 'digits'?"]),
    "no such model": (lambda f: [JOB, "--model", "digit_cnn"], ["'digit_cnn'", "did you mean 'digits_cnn'"]),
    "nothing to train": (lambda f: [JOB, "--model", f"{PARTS}:frozen_net"], ["no", "parameter", "requires_grad"]),
    "an argument that the schedule does not take": (
        lambda f: [JOB, "--schedule", "step", "--schedule-args", "{stepsize = 3}"],
        ["'stepsize', which step does not take", "it takes step_size, gamma", "did you mean step_size?"],
    ),
    "a module that is not there": (
        lambda f: [JOB, "--model", "nowhere.at_all:net"], ["cannot import 'nowhere.at_all'", "looked in"],
    ),
    "a callable that is not there": (
        lambda f: [JOB, "--data", f"{PARTS}:noisy_digit"], ["has no 'noisy_digit'", "did you mean", "noisy_digits"],
    ),
    "ranks with different models": (
        lambda f: [JOB, "--model", f"{PARTS}:net_of_this_rank"], ["the model of rank 1", "differs from rank 0's"],
    ),
    "a file in the run directory's way": (
        lambda f: [JOB, "--run-dir", f"{toml(f, '')[0]}/run"], ["own.toml/run", "give another --run-dir"],
    ),
    "a run directory that cannot be made": (
        lambda f: [JOB, "--run-dir", "/proc/mpidl/run"], ["/proc/mpidl/run", "give another --run-dir"],
    ),
}  # fmt: skip


# Found when torch is loaded already, which takes seconds: one launch tries all of these. The others end their own.
TOGETHER = [
    "no data folder", "a missing data file", "a truncated data file", "a truncated compressed file",
    "a wrong magic number", "a file in the run directory's way",
    "labels out of range in a file", "labels out of range for the model", "images and labels of different numbers",
    "x and y of different sizes", "no such data", "no such model", "a module that is not there",
    "an argument that the schedule does not take",
    "a callable that is not there", "a run directory that cannot be made",
]  # fmt: skip


def check_message(errors: str, expected: list[str]) -> None:
    """One message, with all the expected words, and no traceback."""
    messages = [line for line in errors.splitlines() if "mpidl: error: " in line]
    assert len(messages) == 1, errors
    for words in expected:
        assert words in messages[0]
    assert "Traceback" not in errors


def check_refused(ended: Completed, expected: list[str]) -> None:
    assert ended.returncode == 2, ended.output
    check_message(ended.output, expected)
    assert ended.seconds < LIMIT_S


def arguments(case: str, folder: Path) -> list[str]:
    """The command's arguments, with a run directory of its own where the case is not about that."""
    folder.mkdir(exist_ok=True)
    args = ["train", *CASES[case][0](folder)]
    return args if "--run-dir" in args else [*args, "--run-dir", str(folder / "run")]


@pytest.mark.parametrize("case", [case for case in CASES if case not in TOGETHER])
def test_bad_input_gets_one_message_and_ends_all_ranks(case: str, tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    ended = launch(2, [*MPIDL, *arguments(case, tmp_path / "own")], env=watched.env)
    check_refused(ended, CASES[case][1])
    watched.check_nothing_is_left(ended)
    assert ended.stdout == "", "it began to train"
    assert not (tmp_path / "own" / "run").exists(), "what failed before it began leaves no run directory"


@pytest.fixture(scope="module")
def told_together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What two ranks printed for each case."""
    folder = tmp_path_factory.mktemp("together")
    lines = {case: arguments(case, folder / str(number)) for number, case in enumerate(TOGETHER)}
    ended, told = run_commands(2, folder, lines)
    assert ended.stdout == "", "something began to train"
    assert not list(folder.glob("*/run")), "what failed before it began leaves no run directory"
    assert all(codes == [2, 2] for codes, _ in told.values()), ended.output
    return {name: errors for name, (_, errors) in told.items()}


@pytest.mark.parametrize("case", TOGETHER)
def test_bad_input_gets_one_message_and_code_2_on_all_ranks(case: str, told_together: dict[str, str]) -> None:
    check_message(told_together[case], CASES[case][1])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--lr", "0.2"], ["the configuration of rank 1", "differs from rank 0's"]),
        (["--lr", "high"], ["--lr is 'high'", "rank 1"]),
        (["--learning-rate", "0.1"], ["unknown argument --learning-rate", "rank 1"]),
        (["missing.toml"], ["missing.toml"]),
    ],
    ids=["another value", "a value that is none", "an unknown flag", "another job file"],
)
def test_a_rank_with_other_settings_ends_all_ranks(args: list[str], expected: list[str], tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    right = [*MPIDL, "train", JOB, "--run-dir", str(tmp_path / "run")]
    wrong = [*MPIDL, "train", *args] if args[0].endswith(".toml") else [*right, *args]
    ended = launch(1, [*right, ":", "-n", "1", *wrong], env=watched.env)
    check_refused(ended, expected)
    watched.check_nothing_is_left(ended)
    assert not (tmp_path / "run").exists()


def test_settings_that_may_differ_do_not_end_the_job(tmp_path: Path) -> None:
    right = [*MPIDL, "train", JOB, "--epochs", "1", "--run-dir", str(tmp_path / "run"), "--loader-workers"]
    ended = launch(1, [*right, "0", ":", "-n", "1", *right, "1"])
    assert ended.returncode == 0, ended.output
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert '"status": "finished"' in last


def test_nan_stops_all_ranks_at_its_iteration_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    batch, samples, seed, partitions = 24, 96, 5, 8
    per_epoch = samples // batch
    # The marked sample's place in the second epoch, which is the first that meets it after POISONED_AFTER iterations.
    order = permute(np.arange(samples), samples, seed, 1)
    (place,) = np.flatnonzero(order == MARKED)
    iteration = per_epoch + place // batch + 1
    assert per_epoch < POISONED_AFTER < iteration <= 2 * per_epoch, "choose another seed"
    partition = place % batch // (batch // partitions)
    watched = Watched(tmp_path)
    args = [
        "--model", f"{PARTS}:PoisonedNet", "--data", f"{PARTS}:marked_digits", "--run-dir", str(tmp_path / "run"),
        "--batch-size", str(batch), "--seed", str(seed), "--partitions", str(partitions), "--epochs", "4",
    ]  # fmt: skip
    ended = launch(3, [*MPIDL, "train", *args], env=watched.env)
    assert ended.returncode == 3, ended.output
    messages = [line for line in ended.stderr.splitlines() if "mpidl: error: " in line]
    assert len(messages) == 1, ended.output
    assert re.search(rf"\bpartition {partition}\b", messages[0]), messages[0]
    assert re.search(rf"\biteration {iteration}\b", messages[0]), messages[0]
    assert "Traceback" not in ended.output
    watched.check_nothing_is_left(ended)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["epoch-000001"]
    assert str(checkpoints / "epoch-000001") in messages[0]
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    weights = mpidl.load(tmp_path / "run")
    PoisonedNet().load_state_dict(weights)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert int(weights["norm.num_batches_tracked"]) == per_epoch


SLURM_STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
"""What srun leaves, also where it has no plugin for the MPI; and size and rank."""


@pytest.mark.parametrize(("args", "starter"), [(["train"], "mpirun"), (["train"], "srun"), (["doctor"], "mpirun")])
def test_processes_that_each_believe_to_be_alone_are_told_so_once(
    args: list[str], starter: str, tmp_path: Path
) -> None:
    """The environment of another MPI's launcher: each process sees itself as one of one."""
    size, rank = ("PMI_SIZE", "PMI_RANK") if is_open_mpi() else ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    more = SLURM_STEP if starter == "srun" else {}
    if starter == "srun":
        size, rank = "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"
    watched = Watched(tmp_path)
    ended = [
        run([*MPIDL, *args], env={**watched.env, **more, size: "2", rank: str(number)}, cwd=tmp_path)
        for number in (0, 1)
    ]
    assert [each.returncode for each in ended] == ([2, 2] if args[0] == "train" else [1, 0])
    alone = (
        "each process believes to be alone"
        if is_open_mpi() or starter == "srun"
        else "Open MPI's mpirun cannot start MPICH"
    )
    told = alone if args[0] == "train" else "problem: "
    assert [each.output.count(told) for each in ended] == [1, 0], ended[0].output + ended[1].output
    assert "mpirun" in ended[0].output.partition(told)[2]
    assert all("Traceback" not in each.output for each in ended)
    assert not (tmp_path / "runs").exists()
