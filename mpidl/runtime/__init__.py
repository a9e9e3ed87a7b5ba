"""The machine under the job: ranks and nodes, shared memory, threads, launchers, and how a job ends."""

from mpidl.runtime import activity, clocks, faults, signals, spans, ulfm
from mpidl.runtime.faults import end_job, on_all_ranks, run_command, warn
from mpidl.runtime.launcher import launched_rank, launched_size, without_launcher
from mpidl.runtime.part import run_on_first
from mpidl.runtime.shared import SharedMemoryError, share
from mpidl.runtime.shared_folder import check_shared
from mpidl.runtime.slurm import Slurm
from mpidl.runtime.startup import check_watch, init, restart, watch
from mpidl.runtime.waiting import Patience, Pending
from mpidl.runtime.world import World

__all__ = [
    "Patience",
    "Pending",
    "SharedMemoryError",
    "Slurm",
    "World",
    "activity",
    "check_shared",
    "check_watch",
    "clocks",
    "end_job",
    "faults",
    "init",
    "launched_rank",
    "launched_size",
    "on_all_ranks",
    "restart",
    "run_command",
    "run_on_first",
    "share",
    "signals",
    "spans",
    "ulfm",
    "warn",
    "watch",
    "without_launcher",
]
