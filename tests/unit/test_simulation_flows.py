"""The wire flow by flow, by SimGrid, beside the aggregated one and closed forms.

Where SimGrid is missing these are skipped, but not in CI, which installs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpidl import simulation
from mpidl.errors import ConfigError
from mpidl.simulation import (
    Collective,
    FluidWire,
    Iteration,
    Outside,
    Overheads,
    Part,
    Platform,
    alone_s,
    dragonfly,
    fat_tree,
    flows,
    switch,
)

RATE = 1e9
NOTHING = Overheads(message_s=0.0, round_s=0.0)
LIMIT_S = 90.0

pytestmark = [
    pytest.mark.launches,
    pytest.mark.skipif(flows.find() is None and "CI" not in os.environ, reason="SimGrid is not installed"),
]


def test_an_all_to_all_behind_a_switch_takes_what_a_link_needs_for_all_messages() -> None:
    found = Outside(switch(4, RATE, 1e-6), NOTHING, LIMIT_S).alone(Collective("alltoall", 4, 1e6))
    assert found == pytest.approx(2e-6 + 3 * 1e6 / RATE, rel=1e-3)


def test_a_ring_behind_a_switch_takes_a_round_for_each_other_node() -> None:
    overheads = Overheads(message_s=1e-5, round_s=1e-4)
    found = Outside(switch(4, RATE, 1e-6), overheads, LIMIT_S).alone(Collective("allgather", 4, 1e6))
    assert found == pytest.approx(3 * (1e-5 + 1e-4 + 2e-6 + 1e6 / RATE), rel=1e-3)


@pytest.mark.parametrize(
    ("platform", "kind", "tolerance"),
    [
        (fat_tree(64, RATE, 1e-7), "alltoall", 0.05),
        (dragonfly(32, RATE, 1e-7), "alltoall", 0.05),
        (dragonfly(32, RATE, 1e-7), "reduce_scatter", 0.05),
    ],
    ids=["fat_tree", "dragonfly", "dragonfly pairwise"],
)
def test_the_most_loaded_link_says_what_flows_say(platform: Platform, kind: str, tolerance: float) -> None:
    collective = Collective(kind, platform.num_nodes, 4e5, num_rounds=8)
    found = Outside(platform, NOTHING, LIMIT_S).alone(collective)
    assert found == pytest.approx(sum(alone_s(platform, NOTHING, collective)), rel=tolerance)


def test_a_whole_iteration_flow_by_flow_takes_what_the_aggregated_one_does() -> None:
    platform = fat_tree(8, RATE, 1e-6)
    exchange = Collective("alltoall", 8, 4e6)
    parts = tuple(
        Part(2e-3, 2e-3, 1e-3, exchange, (exchange,), ready_s=0.1 * (1 - index / 4), needed_s=0.05 * index / 4)
        for index in range(4)
    )
    few = Collective("alltoall", 8, 1e4)
    iteration = Iteration(
        0.05, 0.1, parts, changes=Part(1e-4, 1e-4, 1e-4, few, (few,)), counters=Collective("allgather", 8, 48.0),
        squares=Collective("allgather", 8, 1e4), poll_s=1e-3,
    )  # fmt: skip
    by_flows = Outside(platform, Overheads(), LIMIT_S).iteration(iteration)
    aggregated = simulation.simulate(iteration, FluidWire(platform, Overheads()))
    assert by_flows is not None
    assert by_flows.seconds > iteration.compute_s
    assert by_flows.seconds == pytest.approx(aggregated.seconds, rel=0.05)


def test_what_takes_too_long_is_not_simulated() -> None:
    platform = fat_tree(256, RATE, 1e-6)
    assert Outside(platform, NOTHING, 2.0).alone(Collective("alltoall", 256, 1e6)) is None


def children(process: int) -> list[int]:
    """Processes that it has started and not seen the end of."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
        if parent == process:
            found.append(int(path.parent.name))
    return found


def is_simulating(process: int) -> bool:
    """Whether it runs and has loaded SimGrid: it reads the request before."""
    try:
        return "simgrid" in Path(f"/proc/{process}/maps").read_text()
    except OSError:
        return False


def assert_soon(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_simulation_ends_with_the_command_that_was_killed() -> None:
    """Without the request to the kernel it would go on for minutes: 256 nodes."""
    code = (
        "from mpidl.simulation import Collective, Outside, Overheads, fat_tree\n"
        "Outside(fat_tree(256, 1e9, 1e-6), Overheads(), 600.0).alone(Collective('alltoall', 256, 1e6))"
    )
    command = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert_soon(lambda: any(map(is_simulating, children(command.pid))), "it simulates")
        (simulation_of_it,) = children(command.pid)
    finally:
        command.terminate()
        command.wait(LIMIT_S)
    assert_soon(lambda: not is_simulating(simulation_of_it), "it ends")


def test_without_simgrid_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "find", lambda: None)
    with pytest.raises(ConfigError, match=r"apt-get install python3-simgrid .*; or --method aggregated"):
        simulation.check()
