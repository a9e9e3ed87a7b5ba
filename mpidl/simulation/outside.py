"""Simulations flow by flow in processes of their own, with a time limit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mpidl.errors import ConfigError
from mpidl.simulation import flows
from mpidl.simulation.collectives import Collective, Overheads
from mpidl.simulation.platforms import Platform
from mpidl.simulation.timeline import Iteration, Phases


def check() -> None:
    """See that SimGrid is there.

    Raises:
        ConfigError: it is not.
    """
    if flows.find() is None:
        version = ".".join(map(str, sys.version_info[:2]))
        raise ConfigError(
            f"simulating flow by flow needs SimGrid for Python {version}: apt-get install python3-simgrid (Debian; it "
            f"belongs to Debian's own Python and is looked for in {flows.FOLDER}); or --method aggregated"
        )


@dataclasses.dataclass(frozen=True)
class Outside:
    """Asks SimGrid."""

    platform: Platform
    overheads: Overheads
    limit_s: float
    """Of one simulation, on the clock of the machine that simulates."""

    def alone(self, collective: Collective) -> float | None:
        """Seconds of an exchange that has the network for itself; None: not simulated in time, or SimGrid aborted."""
        found = self._ask("collective", collective)
        return None if found is None else found["seconds"]

    def iteration(self, iteration: Iteration) -> Phases | None:
        """A whole iteration, all of its exchanges flow by flow; None: not simulated in time, or SimGrid aborted."""
        found = self._ask("iteration", iteration)
        return None if found is None else Phases(**found)

    def _ask(self, what: str, question: Any) -> dict[str, float] | None:
        fields = {"platform": self.platform, "overheads": self.overheads, what: question}
        request = json.dumps({name: dataclasses.asdict(value) for name, value in fields.items()})
        package = Path(__file__).parents[2]  # the same mpidl, wherever it was imported from
        paths = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        try:
            done = subprocess.run(
                [sys.executable, "-m", flows.__name__, str(os.getpid())],
                input=request, capture_output=True, text=True, timeout=self.limit_s,
                env=os.environ | {"PYTHONPATH": paths},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
        if done.returncode < 0:  # SimGrid 3.32 aborts where rates and latencies are too far apart for its solver
            return None
        if done.returncode:
            raise RuntimeError(f"SimGrid's process ended with code {done.returncode}:\n{done.stderr[-2000:]}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found
