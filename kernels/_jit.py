"""Every Numba option in one place.

Kernels are compiled when they are imported (eager signatures) and kept in Numba's cache, so nothing is compiled
inside the training loop. `fastmath` stays off: the order of additions is the result.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def _ensure_cache_directory() -> None:
    """Point Numba at a writable cache where the installed package is read-only (a site's shared software tree)."""
    here = pathlib.Path(__file__).resolve().parent
    if os.environ.get("NUMBA_CACHE_DIR") or os.access(here, os.W_OK):
        return
    home = pathlib.Path.home() / ".cache"
    base = home if os.access(home, os.W_OK) else pathlib.Path(tempfile.gettempdir())
    os.environ["NUMBA_CACHE_DIR"] = str(base / f"mpidl-numba-{os.getuid()}")


_ensure_cache_directory()

import numba  # noqa: E402  (the cache directory is read when Numba is imported)
from numba.core import types  # noqa: E402
from numba.extending import intrinsic  # noqa: E402


def kernel(signature: str) -> Callable[[Function], Function]:
    """Compile a function for one signature, now, without the GIL, cached on disk."""
    decorator: Callable[[Function], Function] = numba.njit(
        signature, cache=True, nogil=True, fastmath=False, error_model="numpy", boundscheck=False
    )
    return decorator


def inlined(function: Function) -> Function:
    """Compile a helper that kernels call; typed by its callers."""
    compiled: Function = numba.njit(inline="always", error_model="numpy")(function)
    return compiled


@intrinsic  # type: ignore[untyped-decorator]
def float32_pointer(typing_context: Any, address: Any) -> Any:
    """Turn an address (int64) into a pointer to float32, for `numba.carray`."""
    signature = types.CPointer(types.float32)(types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate
