"""Emulated hosts: several on one machine that share nothing, with links of a given rate, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cli.processes import Watched
from tests.launch import ROOT, Completed, environment, launch, run

HOSTS = [sys.executable, str(ROOT / "jobs" / "local" / "hosts.py")]
REPORT = Path(__file__).parent / "jobs" / "report.py"
BITS = ROOT / "tests" / "cli" / "jobs" / "bits.py"

RATE, BYTES_PER_S = "200mbit", 25_000_000
TRANSFER = """
import sys, time
import numpy as np
from mpi4py import MPI
world, data, answer = MPI.COMM_WORLD, np.ones(int(sys.argv[1]), np.uint8), np.zeros(1, np.uint8)
for sender in (0, 1):
    world.Barrier()
    begin = time.perf_counter()
    if world.rank == sender:
        world.Send(data, 1 - sender)
        world.Recv(answer, 1 - sender)
        print("seconds", time.perf_counter() - begin, flush=True)
    else:
        world.Recv(data, sender)
        world.Send(answer, sender)
"""
FAILING = """
import mpidl
mpidl.init()
raise RuntimeError("on purpose")
"""
SWITCHING_OFF = """
import subprocess, sys
sys.path.insert(0, "jobs/local")
from hosts import find_hosts
from namespaces import SWITCH, switch_off
hosts, _ = find_hosts(sys.argv[1])
look = ["nsenter", "--target", str(hosts.pids[0]), "--net", "ip", "-brief", "link", "show", SWITCH]
for name in sys.argv[2:]:
    print("address", subprocess.check_output(look, text=True).split()[2])
    switch_off(hosts, name)
"""
WAITING = ["sh", "-c", "echo started; sleep 600"]


def why_not() -> str:
    """Why this machine, or this user, can have no emulated hosts; "" where it can."""
    if os.geteuid() != 0:
        return "emulated hosts need root"
    if missing := [tool for tool in ("ip", "tc", "unshare", "nsenter") if shutil.which(tool) is None]:
        return f"emulated hosts need {', '.join(missing)}: apt-get install iproute2 util-linux"
    refused = run(["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "true"], timeout=30.0)
    return f"no namespaces here: {refused.stderr.strip()}" if refused.returncode else ""


REASON = why_not()
needs_hosts = pytest.mark.skipif(bool(REASON), reason=REASON)


def hosts(*args: object, timeout: float = 120.0, env: Mapping[str, str] | None = None) -> Completed:
    """What `hosts.py ARGS` did."""
    return run([*HOSTS, *map(str, args)], timeout=timeout, env=env)


@needs_hosts
@pytest.mark.parametrize(
    ("num_hosts", "options", "sizes"),
    [(2, [], [1, 1]), (3, ["-n", 4], [2, 1, 1])],
    ids=["2 hosts", "4 ranks on 3 hosts"],
)
def test_hosts_are_nodes_that_share_only_their_link(
    tmp_path: Path, num_hosts: int, options: list[object], sizes: list[int]
) -> None:
    file = tmp_path / "report.json"
    hosts("with", num_hosts, *options, "--", sys.executable, REPORT, file).check()
    entries: list[dict[str, Any]] = json.loads(file.read_text())
    nodes = [node for node, size in enumerate(sizes) for _ in range(size)]
    assert [entry["node"] for entry in entries] == nodes
    for node, entry in zip(nodes, entries, strict=True):
        assert entry["node_sizes"] == sizes
        assert entry["hostname"] == f"host{node + 1}"
        assert entry["address"] == f"10.77.0.{node + 1}"
        assert entry["shared_memory"] == [f"of-{rank}" for rank, other in enumerate(nodes) if other == node]
        assert entry["sent"] > 1 << 20  # each host's data has to reach the others
    assert len({entry["boot_id"] for entry in entries}) == num_hosts


@needs_hosts
def test_hosts_have_their_shares_of_the_cores(tmp_path: Path) -> None:
    # Into files: what two hosts print at once may mix within a line.
    code = "import os, sys; open(sys.argv[1] + os.uname()[1], 'w').write(str(sorted(os.sched_getaffinity(0))))"
    cores = sorted(os.sched_getaffinity(0))

    def seen(*args: object) -> list[list[int]]:
        hosts("with", *args, "--", sys.executable, "-c", code, f"{tmp_path}/").check()
        return [json.loads((tmp_path / name).read_text()) for name in ("host1", "host2")]

    if len(cores) > 1:
        shares = seen(2)
        assert sorted(shares[0] + shares[1]) == cores
        assert abs(len(shares[0]) - len(shares[1])) <= 1
    assert seen(2, "--cores", "all") == [cores, cores]


@needs_hosts
def test_two_hosts_give_the_bits_of_one_rank(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    launch(1, [sys.executable, BITS, one, "command"]).check()
    hosts("with", 2, "--", sys.executable, BITS, two, "command").check()
    of_one, of_two = (json.loads((folder / "results.json").read_text()) for folder in (one, two))
    assert of_two == of_one


@needs_hosts
def test_a_link_is_no_faster_than_its_rate_in_either_direction() -> None:
    size = BYTES_PER_S // 2
    ended = hosts("with", 2, "--rate", RATE, "--", sys.executable, "-c", TRANSFER, size).check()
    seconds = [float(line.split()[1]) for line in ended.stdout.splitlines() if line.startswith("seconds")]
    assert len(seconds) == 2
    # The headers, 4 %, are more than what the link may send at once at first, 256 KiB.
    assert min(seconds) >= size / BYTES_PER_S


@needs_hosts
def test_ranks_that_fail_together_on_four_hosts_end_the_job() -> None:
    ended = hosts("with", 4, "--", sys.executable, "-c", FAILING, timeout=30.0)
    assert ended.returncode == 1, ended.output
    assert "] RuntimeError: on purpose" in ended.stderr


@needs_hosts
def test_the_command_s_code_is_the_code_and_nothing_is_left(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    ended = hosts("with", 2, "--", "sh", "-c", "exit 5", env=watched.env)
    assert ended.returncode == 5, ended.output
    watched.check_nothing_is_left(ended)


@needs_hosts
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_whatever_signal_ends_it_nothing_is_left(tmp_path: Path, number: signal.Signals) -> None:
    watched = Watched(tmp_path)

    def when_started(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["started\n"] * 2

    ended = interrupted(["with", "2", "--", *WAITING], watched, when_started, number)
    assert ended.returncode == (-number if number == signal.SIGKILL else 128 + number), ended.output
    watched.check_nothing_is_left(ended)


@needs_hosts
def test_up_that_is_killed_half_way_leaves_nothing(tmp_path: Path) -> None:
    watched = Watched(tmp_path)

    def when_half_way(process: subprocess.Popen[str]) -> None:
        while len(watched.processes()) < 5 and process.poll() is None:
            time.sleep(0.001)

    ended = interrupted(["up", "40", "--name", unique()], watched, when_half_way, signal.SIGKILL)
    assert ended.returncode == -signal.SIGKILL, ended.output
    watched.check_nothing_is_left(ended)


def interrupted(
    args: list[str], watched: Watched, wait: Callable[[subprocess.Popen[str]], None], number: signal.Signals
) -> Completed:
    """Start hosts.py, wait, send it a signal."""
    command = [*HOSTS, *args]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment() | watched.env, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    try:
        wait(process)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60.0)
    finally:
        process.kill()
    return Completed(command, process.returncode, stdout, stderr, 0.0)


def unique() -> str:
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def names() -> Iterator[list[str]]:
    """Names for two sets of hosts; what is up under them in the end is taken down."""
    names = [unique(), unique()]
    yield names
    for name in names:
        hosts("down", "--name", name)


@needs_hosts
def test_hosts_stay_up_side_by_side_until_taken_down(names: list[str]) -> None:
    first, second = names

    def seen(name: str) -> list[str]:
        return sorted(hosts("run", "--name", name, "--", "hostname").check().stdout.split())

    hosts("up", 2, "--rate", "100mbit", "--name", first).check()
    hosts("up", 1, "--name", second).check()
    again = hosts("up", 3, "--name", first)
    assert again.returncode == 2
    assert f"2 hosts named {first} are up already, at 100mbit" in again.stderr
    assert (seen(first), seen(second)) == (["host1", "host2"], ["host1"])
    hosts("down", "--name", first).check()
    assert hosts("run", "--name", first, "--", "hostname").returncode == 2
    assert seen(second) == ["host1"]


@needs_hosts
def test_down_ends_what_runs_there(tmp_path: Path, names: list[str]) -> None:
    watched = Watched(tmp_path)
    hosts("up", 2, "--name", names[0], env=watched.env).check()

    def when_started(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        hosts("down", "--name", names[0]).check()

    ended = interrupted(["run", "--name", names[0], "--", *WAITING], watched, when_started, signal.SIGCONT)
    watched.check_nothing_is_left(ended)


@needs_hosts
def test_the_way_to_the_head_stays_the_same_when_a_host_s_power_goes(names: list[str]) -> None:
    hosts("up", 3, "--name", names[0]).check()
    ended = run([sys.executable, "-c", SWITCHING_OFF, names[0], "host1", "host2", "host3"], timeout=60.0).check()
    addresses = [line for line in ended.stdout.splitlines() if line.startswith("address")]
    assert len(addresses) == 3
    assert len(set(addresses)) == 1, ended.output


@needs_hosts
def test_ranks_run_on_the_hosts_that_are_named(names: list[str]) -> None:
    hosts("up", 3, "--name", names[0]).check()
    ended = hosts("run", "--name", names[0], "--on", "host1,host3", "--", "hostname").check()
    assert sorted(ended.stdout.split()) == ["host1", "host3"]


def test_without_root_a_line_says_what_to_do() -> None:
    as_nobody = [] if os.geteuid() else ["unshare", "--user"]
    if run([*as_nobody, "true"], timeout=30.0).returncode:
        pytest.skip("root cannot give up its rights here: no user namespaces")
    ended = run([*as_nobody, *HOSTS, "up", "2"], timeout=30.0)
    assert ended.returncode == 2, ended.output
    assert ended.stderr.count("\n") == 1
    assert "need Linux and root: sudo env" in ended.stderr


@needs_hosts
def test_a_missing_tool_is_named_with_its_package() -> None:
    hidden = 'mount --bind /dev/null "$(command -v tc)"; exec "$@"'
    ended = run(["unshare", "--mount", "sh", "-c", hidden, "sh", *HOSTS, "up", "2"], timeout=30.0)
    assert ended.returncode == 2, ended.output
    assert ended.stderr == "hosts.py: no tc here; on Debian and Ubuntu: apt-get install iproute2\n"


@needs_hosts
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["with", "2", "--rate", "fast", "--", "true"], "rate fast burst"),
        (["with", "0", "--", "true"], "0 hosts; allowed are 1 to 253"),
        (["with", "2", "-n", "5", "--per-host", "2", "--", "true"], "5 ranks do not fit on 2 hosts with 2 each"),
        (["with", "2", "-n", "0", "--", "true"], "0 is no number above 0"),
        (["with", "2"], "no command; write it behind --"),
    ],
)  # fmt: skip
def test_bad_input_is_an_error_that_says_so(args: list[str], message: str) -> None:
    ended = hosts(*args)
    assert ended.returncode == 2, ended.output
    assert message in ended.stderr
