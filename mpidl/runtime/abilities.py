"""What the MPI library can do beyond its duty, found out by asking or trying: survive lost ranks, read GPU memory.

Nothing of this can be told from the functions that are there: mpi4py has `Comm.Shrink` with every library.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Literal

from mpidl.runtime.launcher import run_apart

_FAULT_TOLERANCE = b"mpi_ft_enable"
_GPU_FILES = ("nvidia[0-9]*", "kfd")
"""In /dev: NVIDIA's, and AMD's."""
_GPU_LIMIT_S = 60.0
_GPU_TRY = """
import torch
if not torch.cuda.is_available():
    raise SystemExit(print("unseen"))
from mpi4py import MPI
sent = torch.arange(1 << 16, dtype=torch.float32, device="cuda")
received = torch.zeros_like(sent)
torch.cuda.synchronize()
MPI.COMM_SELF.Allreduce(sent, received)
torch.cuda.synchronize()
print("yes" if torch.equal(sent, received) else "no")
"""


def survives_lost_ranks() -> bool | None:
    """Whether this job's MPI tells of lost ranks and goes on (ULFM). MPI has to be started.

    Open MPI says it in the control variable mpi_ft_enable of MPI_T (MPI 4.1, section 15.3).

    Returns:
        None where the library has no such thing.
    """
    from mpi4py import MPI

    library, provided, index = ctypes.CDLL(MPI.__file__), ctypes.c_int(), ctypes.c_int()
    # Open MPI takes the level that is asked for here for the whole process's from now on.
    if library.MPI_T_init_thread(int(MPI.Query_thread()), ctypes.byref(provided)):
        return None
    try:
        if library.MPI_T_cvar_get_index(_FAULT_TOLERANCE, ctypes.byref(index)):
            return None
        handle, count, value = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        if library.MPI_T_cvar_handle_alloc(index, None, ctypes.byref(handle), ctypes.byref(count)):
            return None
        failed = library.MPI_T_cvar_read(handle, ctypes.byref(value))
        library.MPI_T_cvar_handle_free(ctypes.byref(handle))
        return None if failed else bool(value.value)
    finally:
        library.MPI_T_finalize()


def takes_gpu_memory() -> Literal["no GPU", "unseen", "yes", "no"]:
    """Whether MPI can send what lies on a GPU: a child process tries it, since it may crash.

    Returns:
        "unseen": there is a GPU, but torch does not see it.
    """
    if not any(any(Path("/dev").glob(pattern)) for pattern in _GPU_FILES):
        return "no GPU"
    try:
        done = run_apart([sys.executable, "-c", _GPU_TRY], _GPU_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return "no"
    return "unseen" if done.stdout.strip() == "unseen" else "yes" if done.stdout.strip() == "yes" else "no"


def thread_level() -> str:
    """How MPI's calls may be spread over threads, in MPI's words. MPI has to be started."""
    from mpi4py import MPI

    levels = {
        MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized", MPI.THREAD_MULTIPLE: "multiple",
    }  # fmt: skip
    return levels[MPI.Query_thread()]
