"""The parameter manager: one flat vector, summed in a fixed tree, updated in shards, kept once per node."""

from mpidl.parameters.assignment import Addends, Assignment
from mpidl.parameters.baselines import BASELINES
from mpidl.parameters.layout import FlatLayout, Shards
from mpidl.parameters.manager import ParameterManager
from mpidl.parameters.synchronizer import STRATEGIES
from mpidl.parameters.team import Helpers, Team
from mpidl.parameters.timing import PHASES
from mpidl.parameters.update import OptimizerFactory
from mpidl.parameters.wire import WIRES

__all__ = [
    "BASELINES",
    "PHASES",
    "STRATEGIES",
    "WIRES",
    "Addends",
    "Assignment",
    "FlatLayout",
    "Helpers",
    "OptimizerFactory",
    "ParameterManager",
    "Shards",
    "Team",
]
