"""Running a function on several ranks from a notebook or a script that was not started by mpirun.

Protocol: the function, its arguments and nothing else are written with cloudpickle into a private temporary directory;
`mpirun -n N python -m mpidl.runtime.launch DIRECTORY` starts the ranks; each runs the function and writes its result
beside it; the caller reads the results of all ranks. If a rank fails, the launcher ends all of them (the abort hook),
and the caller raises with what they printed. The directory belongs to the caller, mode 0700, and is removed.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import cloudpickle

from mpidl.errors import ConfigError, LaunchError
from mpidl.runtime.faults import run_command
from mpidl.runtime.launcher import launched_size, without_launcher

_LAUNCHER_ENDS_S = 10.0
"""How long the launcher may take to end its ranks."""


class RemoteError(LaunchError):
    """The function failed on some rank; the message holds what the ranks printed."""


def mpirun() -> str:
    """The mpirun of this environment, else the one on the path.

    Raises:
        LaunchError: there is none.
    """
    own = pathlib.Path(sys.prefix) / "bin" / "mpirun"
    found = str(own) if own.exists() else shutil.which("mpirun")
    if not found:
        raise LaunchError("there is no mpirun; install an MPI with `pip install mpich`, or load the site's")
    return found


def launch_environment() -> dict[str, str]:
    """The environment for starting mpirun from any process: root and more ranks than cores are fine here."""
    return {
        **without_launcher(),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }


def run(function: Callable[..., Any], n: int = 4, *args: Any, timeout: float | None = None) -> list[Any]:
    """Run `function(*args)` on `n` ranks of this machine and return every rank's result, in rank order.

    Args:
        function: may be defined in a notebook; inside it, `mpidl.rank()` and the like work.
        n: the number of ranks.
        args: given to the function on every rank.
        timeout: seconds after which all ranks are ended; None: no limit.

    Raises:
        LaunchError: called on a rank of an MPI job, or no mpirun, or the time is over.
        ConfigError: n is no number of ranks, or function is none.
        RemoteError: a rank failed.
    """
    if not callable(function):
        raise ConfigError(f"mpidl.run takes a function and its number of ranks, not {function!r}")
    if isinstance(n, bool) or not hasattr(n, "__index__") or n < 1:
        raise ConfigError(f"n is {n!r}; it must be a number of ranks, 1 at least")
    if (launched_size() or 1) > 1:
        raise LaunchError("mpidl.run starts ranks of its own; it cannot be called under mpirun")
    with tempfile.TemporaryDirectory(prefix="mpidl-run-") as name:
        directory = pathlib.Path(name)
        (directory / "function").write_bytes(cloudpickle.dumps((function, args)))
        command = [mpirun(), "-n", str(n), sys.executable, "-u", "-m", "mpidl.runtime.launch", name]
        environment = {**launch_environment(), "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        errors = _printed(process, timeout)
        if errors is None:
            raise LaunchError(f"{n} ranks did not end within {timeout} s and were ended")
        if process.returncode:
            why = (
                f":\n{errors.strip()}" if errors.strip() else " and did not say why: it was killed, or left by os._exit"
            )
            raise RemoteError(f"a rank failed (exit code {process.returncode}){why}")
        print(errors, end="", file=sys.stderr)
        return [pickle.loads((directory / f"result-{rank}").read_bytes()) for rank in range(n)]


def _printed(process: subprocess.Popen[str], timeout: float | None) -> str | None:
    """Print what ranks print as they do; their standard error when they have ended, None where the time is over."""
    assert process.stdout is not None
    errors: list[str] = []
    collector = threading.Thread(
        target=lambda stream: errors.append(stream.read()), args=(process.stderr,), daemon=True
    )
    is_over = threading.Event()

    def expire() -> None:
        is_over.set()
        _end(process)

    timer = threading.Timer(threading.TIMEOUT_MAX if timeout is None else timeout, expire)
    timer.daemon = True
    collector.start()
    timer.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
        process.wait()
        collector.join()
    except BaseException:
        threading.Thread(target=process.stdout.read, daemon=True).start()  # nobody may wait for a reader
        _end(process)
        raise
    finally:
        timer.cancel()
        if is_over.is_set():
            timer.join()
    return None if is_over.is_set() else "".join(errors)


def _end(process: subprocess.Popen[str]) -> None:
    """End the launcher in a way that lets it end its ranks first, wherever they are."""
    process.terminate()
    try:
        process.wait(_LAUNCHER_ENDS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _run_here(directory: pathlib.Path) -> None:
    """What each rank does."""
    from mpidl.runtime.startup import init

    world = init()
    function, args = cloudpickle.loads((directory / "function").read_bytes())
    result = function(*args)
    (directory / f"result-{world.rank}").write_bytes(cloudpickle.dumps(result))
    world.barrier()


if __name__ == "__main__":
    sys.exit(run_command(lambda: _run_here(pathlib.Path(sys.argv[1]))))
