"""What a rank sees around it: memory, caches, networks, GPUs. Without MPI."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import tempfile
from pathlib import Path

from mpidl.doctor import networks
from mpidl.doctor.facts import Surroundings
from mpidl.runtime.diagnosis import RankFacts
from mpidl.runtime.shared import DIRECTORY

_FORK_GUARDS = ("RDMAV_FORK_SAFE", "IBV_FORK_SAFE")


def look(rank: RankFacts, gpu: str) -> Surroundings:
    """This rank's; the file that tells a shared folder is looked for later."""
    cache_dir = _cache_dir()
    return Surroundings(
        rank=rank,
        shared_memory_dir=str(DIRECTORY),
        shared_memory_free=_shared_memory_free(),
        cache_dir=str(cache_dir),
        is_cache_writable=_is_writable(cache_dir),
        networks=networks.find_networks(),
        network_settings=networks.settings(),
        forks=multiprocessing.get_context().get_start_method() == "fork"
        and not any(os.environ.get(name) for name in _FORK_GUARDS),
        gpu=gpu,
    )


def _cache_dir() -> Path:
    """Where the compiled kernels are kept; found without importing them, which would compile them."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        return Path(os.environ["NUMBA_CACHE_DIR"])
    spec = importlib.util.find_spec("mpidl.kernels")
    beside = Path(str(spec.origin)).resolve().parent / "__pycache__" if spec else Path("__pycache__")
    # An installation that is read-only keeps them in the user's cache, else in the temporary folder.
    choices = [beside, Path.home() / ".cache", Path(tempfile.gettempdir())]
    return next((directory for directory in choices if _is_writable(directory)), beside)


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def _shared_memory_free() -> int | None:
    try:
        found = os.statvfs(DIRECTORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize
