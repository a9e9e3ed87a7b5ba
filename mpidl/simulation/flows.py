"""The wire flow by flow, by SimGrid: a program that `outside.py` starts, since a process can simulate only once.

It ends when the one that started it does. It reads {"platform", "overheads", "iteration" or "collective"} as JSON and
writes {"seconds"} or the phases. Each node of each exchange is an actor: it starts a round's flows, waits until what it
sends has arrived, and goes on. (What it receives comes from nodes that are as far: in a symmetric exchange both end
together.) SimGrid shares every link fairly among its flows (model CM02, without TCP's windows).

This is the only module that imports simgrid, which Debian installs beside its own Python's packages: it is found there
without anything else of that folder.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.machinery
import importlib.util
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from mpidl.simulation.collectives import Collective, Overheads
from mpidl.simulation.platforms import Platform
from mpidl.simulation.timeline import Iteration, Part, simulate

FOLDER = "/usr/lib/python3/dist-packages"
"""Where Debian's python3-simgrid is."""

_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""

_SHORTEST_S = 1e-9
"""SimGrid's clock moves in no smaller steps."""

_OPTIONS = (
    "--cfg=network/model:CM02",
    "--cfg=network/TCP-gamma:0",  # no limit by window and latency
    "--cfg=network/crosstraffic:0",  # acknowledgements take nothing of the other direction
    "--log=root.thresh:critical",
)

_PLATFORM = """<?xml version='1.0'?>
<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">
<platform version="4.1">
  <cluster id="nodes" prefix="node" suffix="" radical="0-{last}" speed="1Gf" bw="{rate}Bps" lat="{latency}s"
           sharing_policy="SPLITDUPLEX"{topology}/>
</platform>
"""


def find() -> importlib.machinery.ModuleSpec | None:
    """Where simgrid can be loaded from; None where it is not installed for this Python."""
    return importlib.util.find_spec("simgrid") or importlib.machinery.PathFinder.find_spec("simgrid", [FOLDER])


def load() -> Any:
    """The module."""
    spec = find()
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["simgrid"] = module
    spec.loader.exec_module(module)
    return module


def platform_text(platform: Platform) -> str:
    """SimGrid's platform file."""
    name, parameters = platform.topology
    topology = f' topology="{name}" topo_parameters="{parameters}"' if parameters else ""
    rate, latency = repr(platform.link_bytes_s), f"{platform.latency_s:.12f}"
    return _PLATFORM.format(last=platform.capacity - 1, rate=rate, latency=latency, topology=topology)


class FlowWire:
    """A wire of flows; see `timeline.Wire`. Its methods are called by an actor."""

    def __init__(self, simgrid: Any, platform: Platform, overheads: Overheads) -> None:
        self._simgrid, self._overheads, self._num_nodes = simgrid, overheads, platform.num_nodes
        self._hosts = [simgrid.Host.by_name(f"node{index}") for index in range(platform.num_nodes)]
        self._ended = simgrid.Semaphore(0)

    @property
    def now(self) -> float:
        """SimGrid's clock."""
        return float(self._simgrid.Engine.instance.clock)

    def start(self, collective: Collective) -> Callable[[], bool]:
        """Begin an exchange: an actor for each node."""
        left = [collective.num_nodes if collective.num_nodes > 1 else 0]
        for node in range(left[0]):
            self._simgrid.Actor.create("exchange", self._hosts[node], self._exchange, node, collective, left)
        return lambda: not left[0]

    def _exchange(self, node: int, collective: Collective, left: list[int]) -> None:
        simgrid, overheads = self._simgrid, self._overheads
        for each in collective.rounds():
            waits = overheads.round_s + overheads.message_s * len(each.distances)
            simgrid.this_actor.sleep_for(waits)
            targets = [each.target(node, distance, self._num_nodes) for distance in each.distances]
            num_bytes = max(1, round(each.num_bytes))
            flows = [
                simgrid.Comm.sendto_async(self._hosts[node], self._hosts[target], num_bytes)
                for target in targets
                if target != node
            ]
            simgrid.Comm.wait_all(flows)
            if collective.is_added:
                simgrid.this_actor.sleep_for(overheads.add_s_per_byte * each.num_bytes)
        left[0] -= 1
        if not left[0]:
            self._ended.release()

    def advance(self, until: float) -> None:
        """Let time pass until then, or until an exchange ends."""
        if math.isinf(until):
            self._ended.acquire()
        else:
            self._ended.acquire_timeout(max(until - self.now, _SHORTEST_S))


def answer(request: dict[str, Any]) -> dict[str, float]:
    """Simulate what is asked for; once in a process."""
    simgrid = load()
    platform = Platform(**request["platform"] | {"shape": tuple(request["platform"]["shape"])})
    overheads = Overheads(**request["overheads"])
    engine = simgrid.Engine(["mpidl", *_OPTIONS])
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(platform_text(platform))
        file.flush()
        engine.load_platform(file.name)
    found: dict[str, float] = {}

    def control() -> None:
        wire = FlowWire(simgrid, platform, overheads)
        if "collective" in request:
            is_over = wire.start(Collective(**request["collective"]))
            while not is_over():
                wire.advance(math.inf)
            found["seconds"] = wire.now
        else:
            found.update(dataclasses.asdict(simulate(_iteration(request["iteration"]), wire)))

    simgrid.Actor.create("control", simgrid.Host.by_name("node0"), control)
    engine.run()
    return found


def _iteration(fields: dict[str, Any]) -> Iteration:
    small = {name: fields[name] and Collective(**fields[name]) for name in ("counters", "squares")}
    changes = fields["changes"] and _part(fields["changes"])
    return Iteration(**fields | small | {"parts": tuple(map(_part, fields["parts"])), "changes": changes})


def _part(fields: dict[str, Any]) -> Part:
    publish = tuple(Collective(**each) for each in fields["publish"])
    return Part(**fields | {"reduce": Collective(**fields["reduce"]), "publish": publish})


def end_with(parent: int) -> None:
    """Be killed when the process that asked has ended, however it did: nobody reads the answer."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        sys.exit(1)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    print(json.dumps(answer(json.load(sys.stdin))))
