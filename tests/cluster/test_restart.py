"""A host that is lost between checkpoints: the training goes on from what the next host has kept of it."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.processes import MARK, Watched
from tests.cli.test_launch import JOB, MPIDL, weights, when_fate_is_met
from tests.cluster.test_hosts import HOSTS, SWITCHING_OFF, hosts, needs_hosts, unique
from tests.launch import Completed, launch, run

pytestmark = [pytest.mark.thorough, needs_hosts]

LEFT = ["sh", "-c", "ls -d /dev/shm/mpidl-* 2>/dev/null || true"]


@pytest.fixture
def name() -> Iterator[str]:
    """Of two hosts that are up."""
    yield from up(2)


@pytest.fixture
def name_of_three() -> Iterator[str]:
    """Of three."""
    yield from up(3)


def up(number: int) -> Iterator[str]:
    name = unique()
    hosts("up", number, "--name", name).check()
    yield name
    hosts("down", "--name", name)


def namespace(process: int | str) -> Path:
    return Path(f"/proc/{process}/ns/mnt").readlink()


def lose_the_host_of(folder: Path, rank: int) -> None:
    """Remove what is kept on the host of a rank, and kill all processes of the job there."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
            if f"{MARK}={folder}".encode() in words:
                found[int(entry.name)] = (namespace(int(entry.name)), words)
        except OSError:
            continue
    of_rank = [each for each, (_, words) in found.items() if f"PMI_RANK={rank}".encode() in words]
    there = found[of_rank[0]][0]
    assert there != namespace("self"), "an emulated host has a namespace of its own"
    removal = ["sh", "-c", "ls -d /dev/shm/mpidl-* && rm -rf /dev/shm/mpidl-*"]
    run(["nsenter", "--target", str(of_rank[0]), "--mount", *removal], timeout=30.0).check()
    for process in [each for each, (space, _) in found.items() if space == there]:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def launched(
    tmp_path: Path,
    watched: Watched,
    first: list[str],
    second: list[str],
    *flags: str,
    fate: str,
    hang_seconds: int = 900,
) -> Completed:
    """`mpidl launch` whose launcher has other options from the second start on."""
    script = tmp_path / "launcher"
    starts = [shlex.join([*HOSTS, "run", *options, "--"]) + ' "$@"' for options in (first, second)]
    script.write_text(
        f"#!/bin/sh\nif [ -e '{tmp_path}/started' ]; then exec {starts[1]}; fi\n"
        f"touch '{tmp_path}/started'\nexec {starts[0]}\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    command = [*MPIDL, "launch", "--mpirun", str(script), *flags, *MPIDL, "train", *JOB, str(tmp_path / "run")]
    # Hosts have /dev/shm of their own; a folder of the test's would be one that they share.
    env = {key: value for key, value in watched.env.items() if key != "MPIDL_SHM_DIR"}
    command += ["--group-size", "1", "--checkpoint-every", "0", "--hang-seconds", str(hang_seconds)]
    return run(command, env=env | {"FATE": fate}, timeout=300.0)


@pytest.mark.parametrize("where", [["-n", "4"], ["-n", "2", "--per-host", "2"]], ids=["both hosts", "the other host"])
def test_a_lost_host_s_part_comes_from_the_next_host(tmp_path: Path, name: str, where: list[str]) -> None:
    reference = tmp_path / "reference"
    launch(1, [*MPIDL, "train", *JOB, str(reference)]).check()
    watched = Watched(tmp_path)

    def lose() -> None:
        time.sleep(1.0)  # the others come so far, too
        lose_the_host_of(tmp_path, 3)

    losing = when_fate_is_met(tmp_path, lose)
    ended = launched(tmp_path, watched, ["--name", name, "-n", "4"], ["--name", name, *where], fate="sleep once:3:7")
    losing.join()
    ended.check()
    assert "goes on from what the nodes have kept, after iteration 3; there is no checkpoint" in ended.output, (
        ended.output
    )
    assert weights(reference) == weights(tmp_path / "run"), ended.output
    assert not hosts("run", "--name", name, "-n", "2", "--", *LEFT).check().stdout


@pytest.mark.parametrize(
    ("first", "lost", "second"),
    [("host1,host2,host3", 0, "host2,host3"), ("host1,host2", 1, "host1,host3")],
    ids=["of three, rank 0's", "of two, and a third takes its place"],
)
def test_without_a_host_that_has_lost_its_power_others_end_with_the_undisturbed_bits(
    tmp_path: Path, name_of_three: str, first: str, lost: int, second: str
) -> None:
    launch(1, [*MPIDL, "train", *JOB, str(tmp_path / "reference")]).check()
    watched = Watched(tmp_path)

    def lose() -> None:
        time.sleep(1.0)  # the others come so far, too
        run([sys.executable, "-c", SWITCHING_OFF, name_of_three, f"host{lost + 1}"], timeout=60.0).check()

    losing = when_fate_is_met(tmp_path, lose)
    starts = [["--name", name_of_three, "--on", on] for on in (first, second)]
    ended = launched(
        tmp_path, watched, starts[0], starts[1], "--restarts", "1", fate=f"sleep once:{lost}:11", hang_seconds=4
    )
    losing.join()
    ended.check()
    assert "starts again" in ended.output, ended.output
    assert "goes on from what the nodes have kept, after iteration" in ended.output, ended.output
    assert weights(tmp_path / "run") == weights(tmp_path / "reference"), ended.output
    assert not hosts("run", *starts[1], "--", *LEFT).check().stdout


def test_what_ranks_have_kept_on_other_hosts_is_removed_in_the_end(tmp_path: Path, name: str) -> None:
    watched, options = Watched(tmp_path), ["--name", name, "-n", "2"]
    ended = launched(tmp_path, watched, options, options, "--restarts", "1", fate="raise:1:14")
    assert ended.returncode == 1, ended.output
    assert "goes on from what the nodes have kept" in ended.output, ended.output
    assert "no restarts are left" in ended.output, ended.output
    assert not hosts("run", *options, "--", *LEFT).check().stdout, ended.output
