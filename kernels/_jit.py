"""Every Numba option in one place.

Kernels are compiled when they are imported (eager signatures) and kept in Numba's cache, so nothing is compiled
inside the training loop. `fastmath` stays off: the order of additions is the result.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import stat
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def _ensure_cache_directory() -> None:
    """Point Numba at a writable cache where the installed package is read-only (a site's shared software tree)."""
    here = pathlib.Path(__file__).resolve().parent
    if os.environ.get("NUMBA_CACHE_DIR") or os.access(here, os.W_OK):
        return
    for base in (pathlib.Path.home() / ".cache", pathlib.Path(tempfile.gettempdir())):
        path = base / f"mpidl-numba-{os.getuid()}"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = path.lstat()
        except OSError:
            continue
        # What lies there is loaded as code: a directory that somebody else may write is not to be trusted.
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            os.environ["NUMBA_CACHE_DIR"] = str(path)
            return
    os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="mpidl-numba-")


_ensure_cache_directory()

import numba  # noqa: E402  (the cache directory is read when Numba is imported)
from numba import float64 as float64  # noqa: E402
from numba.core import types  # noqa: E402
from numba.extending import intrinsic  # noqa: E402


def kernel(signature: str) -> Callable[[Function], Function]:
    """Compile a function for one signature, now, without the GIL, cached on disk.

    The processes of a machine take turns: the first one compiles, the others find what it has cached.
    """
    compiled: Callable[[Function], Function] = numba.njit(
        signature, cache=True, nogil=True, fastmath=False, error_model="numpy", boundscheck=False
    )

    def decorator(function: Function) -> Function:
        with open(__file__, "rb") as lock:
            with contextlib.suppress(OSError):  # some network file systems cannot: then each compiles for itself
                fcntl.flock(lock, fcntl.LOCK_EX)
            return compiled(function)

    return decorator


def inlined(function: Function) -> Function:
    """Compile a helper that kernels call; typed by its callers."""
    compiled: Function = numba.njit(inline="always", error_model="numpy")(function)
    return compiled


@intrinsic
def float32_pointer(typing_context: Any, address: Any) -> Any:
    """Turn an address (int64) into a pointer to float32, for `numba.carray`."""
    signature = types.CPointer(types.float32)(types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate
