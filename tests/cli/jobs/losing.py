"""`mpidl`, but the ranks that LOSSES names die at the moments it names: `python -m tests.cli.jobs.losing train ...`.

LOSSES is a list such as "0@iterate:5 2@restart:1": the process that was rank 0 when the job began kills itself when it
calls `iterate` the fifth time. Moments are the calls in MOMENTS; "synchronize+" is behind the call.
"""

from __future__ import annotations

import collections
import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from mpidl import cli, recovery
from mpidl.checkpoint import Memory, Writer
from mpidl.checkpoint.slots import Store
from mpidl.parameters import ParameterManager
from mpidl.parameters.update import ShardOptimizer
from mpidl.progress import Checkpoints
from mpidl.runtime import ulfm
from mpidl.scheduling import Executor
from mpidl.training import Training

MOMENTS: dict[str, tuple[Any, str]] = {
    "iterate": (Executor, "iterate"),
    "compute": (ParameterManager, "begin_partition"),
    "synchronize": (ParameterManager, "synchronize"),
    "update": (ShardOptimizer, "step"),
    "keep": (Memory, "keep"),
    "close": (Memory, "_write"),
    "pass_on": (Store, "pass_on"),
    "begin": (Writer, "begin"),
    "poll": (Checkpoints, "poll"),
    "validate": (Training, "_validate"),
    "finish": (Training, "_finish"),
    "restart": (recovery, "restart"),
    "meet": (ulfm, "meet"),
    "commit": (ulfm, "commit"),
}


def main() -> int:
    """Let this rank die when it is its turn."""
    own = os.environ.get("OMPI_COMM_WORLD_RANK")
    turns = [each.partition("@") for each in os.environ.get("LOSSES", "").split()]
    mine = {moment for rank, _, moment in turns if rank == own}
    counts: collections.Counter[str] = collections.Counter()

    def passed(moment: str) -> None:
        counts[moment] += 1
        if f"{moment}:{counts[moment]}" in mine:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def made(*arguments: Any, **options: Any) -> Any:
            passed(name)
            result = call(*arguments, **options)
            passed(f"{name}+")
            return result

        return made

    for name, (owner, attribute) in MOMENTS.items():
        setattr(owner, attribute, dying(name, getattr(owner, attribute)))
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
