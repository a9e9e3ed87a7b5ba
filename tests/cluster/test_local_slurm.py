"""The local Slurm cluster itself: the commands of its page, bad input, and nothing left behind."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from tests.cluster.local_slurm import PATIENCE_S, SCRIPT, LocalSlurm, plugin
from tests.launch import ROOT, environment, run

pytestmark = pytest.mark.slurm

PAGE = ROOT / "docs" / "slurm.md"
GONE_S = 20.0


def commands() -> list[list[str]]:
    """What the page has in its console block, behind the root's prompt."""
    block = PAGE.read_text().split("```console\n")[1].split("```")[0]
    return [shlex.split(line.removeprefix("# ")) for line in block.splitlines()]


def test_the_commands_of_the_page_work(cluster: LocalSlurm, tmp_path: Path) -> None:
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    env = {"MPIDL_CLUSTER": f"test-{uuid.uuid4().hex}", "PYTHONPATH": str(ROOT), "SLURM_MPI_TYPE": plugin()}
    lines = commands()
    assert [line[1] for line in lines] == ["up", "run", "run", "run", "off", "on", "down"]
    try:
        for line in lines:
            run(line, cwd=tmp_path, timeout=PATIENCE_S, env=env).check()
    finally:
        run(lines[-1], cwd=tmp_path, env=env)
    assert "finished" in (tmp_path / "train-2.out").read_text()


def test_a_cluster_that_is_killed_leaves_nothing(cluster: LocalSlurm) -> None:
    command = ["with", "2", "--", "sh", "-c", 'srun --nodes=2 hostname; dirname "$SLURM_CONF"; sleep 600']
    process = subprocess.Popen(
        [*SCRIPT, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        env=environment(), cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as lines:
        told = [lines.readline().strip() for _ in range(3)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.killpg(process.pid, signal.SIGTERM)  # the command itself is its user's
    assert sorted(told[:2]) == ["host1", "host2"]
    directory, deadline = Path(told[2]), time.monotonic() + GONE_S
    while directory.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not directory.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["with", "0", "--", "true"], "0 is no number above 0"),
        (["with", "2"], "no command; write it behind --"),
        (["with", "2", "--rate", "fast", "--", "true"], "rate fast burst"),
        (
            ["run", "--name", "none of these", "--", "true"],
            "no cluster named none of these is up; first: slurm.py up 4",
        ),
    ],
)
def test_bad_input_is_an_error_that_says_so(cluster: LocalSlurm, args: list[str], message: str) -> None:
    ended = run([*SCRIPT, *args], timeout=60.0)
    assert ended.returncode == 2, ended.output
    assert message in ended.stderr


def test_only_nodes_can_be_switched_off(cluster: LocalSlurm) -> None:
    ended = cluster.slurm_py("off", "host5")  # the controller
    assert ended.returncode == 2, ended.output
    assert "there is no node host5; there are host1, host2, host3, host4" in ended.stderr
    assert "host1 is on" in cluster.slurm_py("on", "host1").stderr
    again = cluster.slurm_py("up", "2")
    assert f"a cluster named {cluster.name} of 4 nodes is up already" in again.stderr
