"""`mpidl.run`: a function of a plain script on several ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mpidl
from mpidl.errors import ConfigError
from tests.cli.processes import Watched
from tests.launch import is_open_mpi, launch, run

# What a user would write in a notebook: __main__ holds the function, a class and a value that it closes over.
RESULTS = """
import mpidl

class Pair:
    def __init__(self, rank, size):
        self.rank, self.size = rank, size

factor = 10

def work(first, second):
    import numpy
    mpidl.barrier()
    print("printed by a rank")
    return Pair(mpidl.rank(), mpidl.size()), mpidl.allreduce(numpy.full(2, factor * mpidl.rank())), first + second

def outer(addend):
    return lambda: mpidl.rank() + addend

if __name__ == "__main__":
    for rank, (pair, total, sum_of_arguments) in enumerate(mpidl.run(work, 3, 1, 2)):
        assert isinstance(pair, Pair), pair
        assert (pair.rank, pair.size) == (rank, 3)
        assert total.tolist() == [30, 30]
        assert sum_of_arguments == 3
    assert mpidl.run(outer(0.5), n=2) == [0.5, 1.5]
    assert mpidl.runtime.startup._world is None, "the script itself is no rank"
    print("all is well")
"""

# A rank that fails, one that never ends, and a job within a job; the script goes on after each.
FAILURES = """
import time
import mpidl
from mpidl.errors import LaunchError
from mpidl.runtime.launch import RemoteError

def failing():
    if mpidl.rank() == 1:
        raise KeyError("only" + " rank 1")
    mpidl.barrier()

def endless():
    mpidl.init()
    while True:
        time.sleep(0.1)

def within():
    return mpidl.run(mpidl.rank, n=2)

for function, timeout in ((failing, None), (endless, 10.0), (within, None)):
    began = time.monotonic()
    try:
        mpidl.run(function, n=2, timeout=timeout)
    except LaunchError as error:
        print(function.__name__, type(error).__name__, str(error).count("KeyError: 'only rank 1'"))
        print(str(error))
        assert time.monotonic() - began < 60
"""


# A rank that leaves without a word, and one that prints and then waits for whoever has read it.
SILENT = """
import os
import mpidl

def leaving():
    mpidl.init()
    os._exit(3)

try:
    mpidl.run(leaving, n=2)
except mpidl.errors.LaunchError as error:
    print(error)
"""
PRINTING = """
import pathlib, time
import mpidl

def work():
    print("first")
    deadline = time.monotonic() + 60.0
    while not pathlib.Path("read").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return pathlib.Path("read").exists()

assert mpidl.run(work, n=1) == [True]
"""


def script(folder: Path, text: str) -> list[str]:
    """The script lies elsewhere and runs there: ranks find what it finds."""
    (folder / "script.py").write_text(text)
    return [sys.executable, "script.py"]


def test_every_rank_runs_the_function_and_its_result_comes_back(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    ended = run(script(tmp_path, RESULTS), cwd=tmp_path, env=watched.env).check()
    assert "all is well" in ended.stdout
    assert ended.stdout.count("printed by a rank") == 3
    assert ended.stderr == ""
    watched.check_nothing_is_left(ended)


def test_a_failure_or_too_long_a_run_ends_all_ranks_and_is_raised(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    ended = run(script(tmp_path, FAILURES), cwd=tmp_path, env=watched.env).check()
    assert "failing RemoteError 1" in ended.stdout
    assert "in failing" in ended.stdout, "the rank's own traceback"
    assert "endless LaunchError 0" in ended.stdout
    assert "2 ranks did not end within 10.0 s" in ended.stdout
    assert "cannot be called under mpirun" in ended.stdout.partition("within RemoteError")[2]
    watched.check_nothing_is_left(ended)


def test_a_rank_that_left_without_a_word_is_told_as_that(tmp_path: Path) -> None:
    ended = run(script(tmp_path, SILENT), cwd=tmp_path).check()
    assert "a rank failed (exit code " in ended.stdout, ended.output
    if not is_open_mpi():  # whose launcher says it at length
        assert "and did not say why: it was killed, or left by os._exit" in ended.stdout, ended.output


def test_what_ranks_print_is_seen_while_they_run(tmp_path: Path) -> None:
    process = subprocess.Popen(script(tmp_path, PRINTING), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n"
    (tmp_path / "read").touch()
    process.communicate(timeout=60.0)
    assert process.returncode == 0


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes a function and its number of ranks, not 3"):
        mpidl.run(3, n=2)  # type: ignore[arg-type]


def test_run_is_refused_under_mpirun(tmp_path: Path) -> None:
    code = "import mpidl\ntry:\n    mpidl.run(print, n=2)\nexcept mpidl.errors.LaunchError as error:\n    print(error)"
    ended = launch(2, [sys.executable, "-c", f"import mpidl.errors\n{code}"], cwd=tmp_path).check()
    assert ended.stdout.count("it cannot be called under mpirun") == 2


@pytest.mark.parametrize("n", [0, -1, "2"])
def test_a_number_of_ranks_that_is_none_is_refused(n: Any) -> None:
    with pytest.raises(ConfigError, match=f"n is {n!r}; it must be a number of ranks"):
        mpidl.run(print, n=n)
