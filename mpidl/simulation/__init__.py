"""What one iteration would take on a machine that is not there: between 16 and 4,096 nodes, say.

The model of an iteration, from what is measured to what is told:

1. *iteration* (`bench/workload.py` makes it of a model): which bucket's gradients are ready when, which weights are
   needed when, and what is exchanged.
2. *collectives* (`collectives.py`): the messages of each exchange, round by round, as MPICH sends them.
3. *platforms* (`platforms.py`): fat-trees and dragonflies, and which of their links limits a round.
4. *wires*: how long exchanges take that share the network: `fluid.py` from the most loaded link, `flows.py` flow by
   flow with SimGrid.
5. *timeline* (`timeline.py`): update, forward, backward, the exchange's thread and the wire, side by side, as
   `parameters/pipeline.py` orders them; every iteration begins from the same state, so one is simulated.

All nodes do the same at the same time. Nothing here needs MPI or torch.
"""

from mpidl.simulation.collectives import THROTTLE, Collective, Overheads, Round
from mpidl.simulation.fluid import FluidWire, alone_s
from mpidl.simulation.outside import Outside, check
from mpidl.simulation.platforms import Platform, dragonfly, fat_tree, switch
from mpidl.simulation.timeline import Iteration, Part, Phases, simulate

__all__ = [
    "THROTTLE",
    "Collective",
    "FluidWire",
    "Iteration",
    "Outside",
    "Overheads",
    "Part",
    "Phases",
    "Platform",
    "Round",
    "alone_s",
    "check",
    "dragonfly",
    "fat_tree",
    "simulate",
    "switch",
]
