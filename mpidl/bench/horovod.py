"""Horovod between the ranks of this job, where it is installed.

While it is started, a thread of it wakes up again and again and talks to the other ranks. So it is started before each
run that needs it and stopped after it, outside the timed part: the other ways must not share their cores with it.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any


def unusable() -> dict[str, str]:
    """Ways that cannot be run without it, with the reason; empty where it is installed."""
    if importlib.util.find_spec("horovod") is not None:
        return {}
    return {"horovod": "Horovod is not installed; build it against the MPI of this environment (HOROVOD_WITH_MPI=1)"}


def start() -> Any:
    """Start it, if it does not run yet, and return its module for torch. Collective."""
    import horovod.torch

    if not horovod.torch.is_initialized():
        horovod.torch.init()
    return horovod.torch


def stop() -> None:
    """End its thread, if it runs. Collective."""
    if "horovod.torch" in sys.modules and sys.modules["horovod.torch"].is_initialized():
        sys.modules["horovod.torch"].shutdown()
