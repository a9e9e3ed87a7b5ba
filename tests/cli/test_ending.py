"""How a job ends when a rank does: within seconds, for a reason that is printed once, with nothing left behind."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.cli.processes import Watched
from tests.launch import Completed, launch

PARTS = "tests.cli.jobs.parts"
COMMAND = [
    sys.executable, "-m", "mpidl", "train", "--model", f"{PARTS}:EndingNet", "--data", f"{PARTS}:noisy_digits",
    "--batch-size", "24", "--threads-per-rank", "1", "--run-dir",
]  # fmt: skip
OWN_LOOP = [sys.executable, "tests/cli/jobs/own_loop.py", "6"]

PATIENCE_S = 10.0
"""From a rank's end to that of the job."""

Fate = Callable[..., Completed]


@pytest.fixture
def meet(tmp_path: Path) -> Fate:
    """Run a job of three ranks with the given fate, and see that it ends in time and leaves nothing behind."""
    watched = Watched(tmp_path)

    def run(command: Sequence[str], fate: str, n: int = 3) -> Completed:
        ended = launch(n, command, env={**watched.env, "FATE": fate})
        met = [path.stat().st_mtime for path in tmp_path.glob("fate of *")]
        assert met, ended.output
        assert time.time() - min(met) < PATIENCE_S, ended.output
        watched.check_nothing_is_left(ended)
        return ended

    return run


def command(tmp_path: Path, *args: str) -> list[str]:
    return [*COMMAND, str(tmp_path / "run"), *args]


@pytest.mark.parametrize(
    ("fate", "is_own"),
    [("raise:1:3", False), ("raise:all:3", True)],
    ids=["on one rank of the command", "on all ranks of an own loop"],
)
def test_an_exception_ends_the_job_and_is_printed_once(fate: str, is_own: bool, meet: Fate, tmp_path: Path) -> None:
    ended = meet(OWN_LOOP if is_own else command(tmp_path), fate)
    assert ended.returncode != 0, ended.output  # the launcher may mix its own signal into the code
    assert ended.stderr.count("RuntimeError: this rank has failed") == 1, ended.output
    assert ended.stderr.count("Traceback (most recent call last)") == 1, ended.output
    # The line of the model's own that raised it, behind the number of its rank.
    (line,) = [line for line in ended.stderr.splitlines() if "self.end()" in line]
    assert line.startswith("[rank 1] " if "1" in fate.split(":")[1] else "[rank "), line
    assert "have ended" not in ended.stdout


def test_an_exception_between_two_exchanges_of_sync_batchnorm_ends_the_job(tmp_path: Path) -> None:
    code = """
import mpidl, torch

class Failing(torch.nn.Module):
    def forward(self, inputs):
        if mpidl.rank() == 1:
            raise RuntimeError("this rank" + " has failed")
        return inputs

torch.nn.Sequential(mpidl.SyncBatchNorm(3), Failing(), mpidl.SyncBatchNorm(3))(torch.randn(4, 3))
print("have ended")
"""
    watched = Watched(tmp_path)
    ended = launch(2, [sys.executable, "-c", code], env=watched.env)
    assert ended.returncode != 0, ended.output
    assert ended.stderr.count("RuntimeError: this rank has failed") == 1, ended.output
    assert "have ended" not in ended.stdout
    watched.check_nothing_is_left(ended)


def test_an_exception_between_two_buckets_that_travel_ends_the_job_of_all_nodes(tmp_path: Path) -> None:
    code = """
import functools, mpidl, torch
from mpidl.parameters.pipeline import Pipeline

announced, announce = [], Pipeline.announce
Pipeline.announce = lambda pipeline, index: (announced.append(index), announce(pipeline, index))
fails = False

class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        if fails:
            raise RuntimeError(f"this rank has failed after {len(announced)} buckets")
        return gradient

layers = [torch.nn.Linear(600, 600) for _ in range(6)]  # each more than the smallest bucket
model = torch.nn.Sequential(*layers)
manager = mpidl.ParameterManager(model, functools.partial(torch.optim.SGD, lr=0.1))
for iteration in range(4):
    fails, announced[:] = iteration == 3 and mpidl.rank() == 1, []
    back = torch.nn.Sequential(*layers[3:])
    back(Failing.apply(torch.nn.Sequential(*layers[:3])(torch.randn(2, 600)))).square().mean().backward()
    manager.step(wait=False)
print("have ended")
"""
    watched = Watched(tmp_path)
    ended = launch(3, [sys.executable, "-c", code], env={**watched.env, "MPIDL_EMULATED_NODES": "3"}, timeout=60.0)
    assert ended.returncode != 0, ended.output
    (told,) = re.findall(r"RuntimeError: this rank has failed after (\d+) buckets", ended.stderr)
    assert int(told) >= 2, ended.output
    assert "have ended" not in ended.stdout
    watched.check_nothing_is_left(ended)


def test_sys_exit_on_one_rank_of_an_own_loop_ends_the_job_and_is_told(meet: Fate) -> None:
    ended = meet(OWN_LOOP, "exit:1:3")
    assert ended.returncode != 0, ended.output
    assert ended.stderr.count("[rank 1] left with code 3") == 1, ended.output
    assert "have ended" not in ended.stdout


def test_ranks_that_leave_at_different_times_leave_in_peace(tmp_path: Path) -> None:
    code = "import sys, time, mpidl; time.sleep(4 * mpidl.rank()); print('left'); sys.exit({code})"
    for status in (0, 7):
        ended = launch(2, [sys.executable, "-c", code.format(code=f"{status} if mpidl.rank() == 1 else 0")])
        assert ended.returncode == status, ended.output
        assert ended.stdout.count("left") == 2
        assert "go on" not in ended.stderr


def test_an_exception_in_a_loader_worker_ends_the_job_and_names_the_sample(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    args = ["--data", f"{PARTS}:broken_digits", "--loader-workers", "1", "--model", f"{PARTS}:NoisyNet"]
    ended = launch(2, command(tmp_path, *args), env=watched.env)
    assert ended.returncode != 0, ended.output
    assert ended.stderr.count("RuntimeError: this sample is broken") == 1, ended.output
    assert ended.stderr.count("dataset[23] of 197 failed") == 1, ended.output
    watched.check_nothing_is_left(ended)


def test_a_killed_rank_ends_the_job_with_its_loader_workers_and_memory(meet: Fate, tmp_path: Path) -> None:
    ended = meet(command(tmp_path, "--loader-workers", "1"), "kill:1:5", n=2)
    assert ended.returncode != 0, ended.output
    assert "result" not in ended.stdout


def test_kernels_are_compiled_once_a_machine(tmp_path: Path) -> None:
    """Numba says what it saves and what it loads; ranks that find nothing wait for the one that compiles."""
    env = {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_DEBUG_CACHE": "1"}
    code = "import mpidl.kernels, mpidl; mpidl.init()"
    first, second = (launch(3, [sys.executable, "-c", code], env=env).check() for _ in range(2))
    saved = [line for line in first.stdout.splitlines() if "data saved to" in line]
    assert len(saved) >= 2, first.output
    assert len(saved) == len(set(saved)), "some rank compiled what another one had"
    assert first.stdout.count("data loaded from") == 2 * len(saved)
    assert "data saved to" not in second.stdout
    assert second.stdout.count("data loaded from") == 3 * len(saved)
