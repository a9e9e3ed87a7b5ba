"""The machine under the job: ranks and nodes, shared memory, threads, launchers, and how a job ends."""

from mpidl.runtime import signals
from mpidl.runtime.faults import end_job, on_all_ranks, run_command, warn
from mpidl.runtime.launcher import launched_rank, launched_size, without_launcher
from mpidl.runtime.shared import SharedMemoryError, share
from mpidl.runtime.startup import init
from mpidl.runtime.waiting import Patience, Pending
from mpidl.runtime.world import World

__all__ = [
    "Patience",
    "Pending",
    "SharedMemoryError",
    "World",
    "end_job",
    "init",
    "launched_rank",
    "launched_size",
    "on_all_ranks",
    "run_command",
    "share",
    "signals",
    "warn",
    "without_launcher",
]
