"""mpidl: data-parallel deep-learning training over MPI.

Importing this package starts neither MPI nor torch; each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mpidl._version import __version__

if TYPE_CHECKING:
    from mpidl.api import allreduce, barrier, broadcast_object, local_rank, rank, size
    from mpidl.checkpoint import load_weights as load
    from mpidl.data.sampler import RankBatchSampler
    from mpidl.optimizers import Lamb, Lars, layer_groups
    from mpidl.parameters import ParameterManager
    from mpidl.runtime import World, init, watch
    from mpidl.runtime.launch import run
    from mpidl.scheduling import triggers
    from mpidl.sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm
    from mpidl.trainer import Trainer

_HOMES = {
    "Lamb": ("mpidl.optimizers", "Lamb"),
    "Lars": ("mpidl.optimizers", "Lars"),
    "ParameterManager": ("mpidl.parameters", "ParameterManager"),
    "RankBatchSampler": ("mpidl.data.sampler", "RankBatchSampler"),
    "SyncBatchNorm": ("mpidl.sync_batchnorm", "SyncBatchNorm"),
    "Trainer": ("mpidl.trainer", "Trainer"),
    "World": ("mpidl.runtime", "World"),
    "allreduce": ("mpidl.api", "allreduce"),
    "barrier": ("mpidl.api", "barrier"),
    "broadcast_object": ("mpidl.api", "broadcast_object"),
    "convert_sync_batchnorm": ("mpidl.sync_batchnorm", "convert_sync_batchnorm"),
    "init": ("mpidl.runtime", "init"),
    "layer_groups": ("mpidl.optimizers", "layer_groups"),
    "load": ("mpidl.checkpoint", "load_weights"),
    "local_rank": ("mpidl.api", "local_rank"),
    "rank": ("mpidl.api", "rank"),
    "run": ("mpidl.runtime.launch", "run"),
    "size": ("mpidl.api", "size"),
    "triggers": ("mpidl.scheduling.triggers", ""),
    "watch": ("mpidl.runtime", "watch"),
}

__all__ = [
    "Lamb",
    "Lars",
    "ParameterManager",
    "RankBatchSampler",
    "SyncBatchNorm",
    "Trainer",
    "World",
    "__version__",
    "allreduce",
    "barrier",
    "broadcast_object",
    "convert_sync_batchnorm",
    "init",
    "layer_groups",
    "load",
    "local_rank",
    "rank",
    "run",
    "size",
    "triggers",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpidl' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = importlib.import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
