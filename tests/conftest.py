"""The suite under plain ``pytest`` and under ``mpirun -n N pytest``: one report, one verdict, no rank left waiting.

Under a launcher every rank runs the same tests. After each phase of a test (set-up, call, teardown) the ranks tell
each other how it went:

- all ended it: a rank that passed takes over the failure of the lowest rank that did not, so every rank stops
  at the same test and rank 0 prints that rank's report in the one summary;
- some are still in it (waiting in a collective for the rank that failed, most likely): the rank that failed
  prints its report and aborts the job;
- nobody ends it: each rank's stack is printed after `TIMEOUT_S` and the job ends.

Only rank 0 writes to the terminal and to report files. Tests marked ``launches`` run under plain ``pytest`` only.
"""

from __future__ import annotations

import os

# Before torch is imported by any test: the bits depend on the threads, and the ranks share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import faulthandler
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import hypothesis
import numpy as np
import pytest

import mpidl.runtime
from mpidl.errors import LaunchError
from mpidl.runtime import faults

if TYPE_CHECKING:
    from mpidl.runtime import World

TIMEOUT_S = float(os.environ.get("MPIDL_TEST_TIMEOUT", "120"))
"""How long one phase of a test may take on a rank."""

LAUNCHING_TIMEOUT_S = 5 * TIMEOUT_S
"""The same for a test that launches: it may start several jobs, and each has a limit that tells more."""

GRACE_S = 1.0
"""How long a rank that failed waits for the others to end the same phase, before it ends them."""

STAGGER_S = 10.0
"""The ranks' graces are spread over this, a second apart at most: of several that failed, the lowest prints."""

DRAIN_S = 0.2
"""Time for the launcher to read what was printed before the job is aborted."""

LAUNCHING_FOLDERS = {"cli", "cluster"}

T = TypeVar("T")

PASSED, SKIPPED, FAILED = range(3)

# The ranks have to draw the same examples, and a shared machine makes any deadline a lie.
hypothesis.settings.register_profile("mpidl", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("mpidl")


@dataclass(frozen=True)
class RankFailure:
    """What stands in a report for a failure on some rank: what pytest asks of an exception's representation."""

    title: str
    text: str

    @property
    def reprcrash(self) -> SimpleNamespace:
        """What the short summary says: the title, where it would repeat a plain text in full."""
        return SimpleNamespace(message=self.title)

    def toterminal(self, writer: Any) -> None:
        writer.line(str(self))

    def __str__(self) -> str:
        return f"{self.title}\n{self.text}"


class Ranks:
    """The ranks of this test run, and how they agree on verdicts.

    Attributes:
        rank: this process's number.
        size: the number of processes; above 1, as plain pytest has no need of any of this.
    """

    def __init__(self) -> None:
        try:
            mpidl.runtime.init()
        except LaunchError as error:
            raise pytest.UsageError(str(error)) from error
        from mpi4py import MPI  # only now: mpidl.runtime chooses how MPI starts

        self._comm = MPI.COMM_WORLD.Dup()  # apart from all that the tests send
        self._abort = MPI.COMM_WORLD.Abort
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()

    def exchange(self, verdict: int, place: str, patience_s: float) -> list[int] | None:
        """Tell all ranks this one's verdict on a phase and hear theirs.

        Collective, but it returns after ``patience_s`` whether or not all the others have come.

        Args:
            verdict: PASSED, SKIPPED or FAILED.
            place: which test and phase; has to be the same on all ranks.
            patience_s: seconds to wait for the others.

        Returns:
            One verdict per rank, or None where some rank did not come in time.
        """
        mine = np.array([verdict, zlib.crc32(place.encode())], dtype=np.int64)
        everyones = np.empty((self.size, 2), dtype=np.int64)
        request = self._comm.Iallgather(mine, everyones)
        deadline = time.monotonic() + patience_s
        pause_s = 0.0
        while not request.Test():
            if time.monotonic() > deadline:
                return None
            time.sleep(pause_s)
            pause_s = min(pause_s + 1e-4, 2e-3)
        if len(set(everyones[:, 1].tolist())) > 1:
            self.abort(f"the ranks run different tests; this one: {place}")
        return [int(value) for value in everyones[:, 0]]

    def share(self, mine: T) -> list[T]:
        """Give every rank the objects of all. Collective."""
        return self._comm.allgather(mine)

    def abort(self, report: str) -> None:
        """Print a report under this rank's name and end all ranks."""
        print(f"\nrank {self.rank} of {self.size}: {report}\nall ranks end here", file=sys.stderr, flush=True)
        time.sleep(DRAIN_S)
        self._abort(1)


STDERR = pytest.StashKey[int]()
RANKS = pytest.StashKey[Ranks]()


class RanksPlugin:
    """What changes in pytest when several ranks run the same tests."""

    def __init__(self, ranks: Ranks, config: pytest.Config) -> None:
        self._ranks = ranks
        self._capture: Any = config.pluginmanager.getplugin("capturemanager")

    def pytest_report_header(self) -> str:
        return f"ranks: {self._ranks.size}"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """All ranks have to run the same tests in the same order."""
        names = [f"{session.testsfailed} errors", *(item.nodeid for item in session.items)]
        everyones = self._ranks.share("\n".join(names))
        faulthandler.cancel_dump_traceback_later()
        if any(theirs != everyones[0] for theirs in everyones):
            counts = [theirs.count("\n") for theirs in everyones]
            raise pytest.UsageError(f"the ranks collected different tests; numbers on ranks 0, 1, ...: {counts}")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Agree on one phase of one test; see the module's docstring."""
        report = yield
        faulthandler.cancel_dump_traceback_later()  # a rank that only waits has nothing to show
        with self._capture.global_and_fixture_disabled():
            self._agree(report, f"{item.nodeid} ({call.when})")
        if report.failed:
            item.session.shouldfail = "a test failed, and all ranks ended with it"
        return report

    def _agree(self, report: pytest.TestReport, place: str) -> None:
        own = {"passed": PASSED, "skipped": SKIPPED, "failed": FAILED}[report.outcome]
        # A rank that passed waits for those that the watchdog guards; one that failed knows that something is wrong.
        grace_s = GRACE_S + self._ranks.rank * min(1.0, STAGGER_S / self._ranks.size)
        patience_s = grace_s if own == FAILED else TIMEOUT_S + 10.0
        verdicts = self._ranks.exchange(own, place, patience_s)
        if verdicts is None:
            state = "failed here, and others still run it" if own == FAILED else "not every rank ended it"
            printed = [f"--- {title}\n{text}" for title, text in report.sections]
            self._ranks.abort("\n".join([f"{place}: {state}", report.longreprtext, *printed]))
        elif FAILED in verdicts:
            rank = verdicts.index(FAILED)
            text, report.sections = self._ranks.share((report.longreprtext, report.sections))[rank]
            report.outcome = "failed"
            title = f"rank {rank} of {self._ranks.size} ({verdicts.count(FAILED)} failed)"
            report.longrepr = RankFailure(title, text)  # type: ignore[assignment]  # pytest takes what has its methods
        elif len(set(verdicts)) > 1:
            report.outcome = "failed"
            report.longrepr = f"skipped on ranks {[r for r, v in enumerate(verdicts) if v == SKIPPED]} only"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Start the ranks' agreement where there are several; silence all but rank 0."""
    # A copy of the real standard error: while a test runs, descriptor 2 leads into pytest's capture.
    config.stash[STDERR] = os.dup(2)
    if (mpidl.runtime.launched_size() or 1) == 1:
        return
    ranks = Ranks()
    config.stash[RANKS] = ranks
    _tell_who_ends_all(config.stash[STDERR])
    if config.option.basetemp is None:
        # A folder of this rank's own: where several ranks clear pytest's old ones away at once, some fail over it.
        config.option.basetemp = tempfile.mkdtemp(prefix="mpidl-tests-")
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))
    if ranks.rank != 0:
        config.option.xmlpath = None  # one report file


def _tell_who_ends_all(stderr: int) -> None:
    """A test that ends the job by mpidl's own means leaves neither report nor output: say at least which it was."""
    job = faults._job
    assert job is not None
    rank, abort = job.rank, job.abort

    def told(code: int) -> None:
        test = os.environ.get("PYTEST_CURRENT_TEST")
        os.write(stderr, f"\nrank {rank}: all ranks are ended with code {code} in {test}\n".encode())
        time.sleep(DRAIN_S)
        abort(code)

    job.abort = told


def pytest_sessionstart(session: pytest.Session) -> None:
    """Between pytest's own configuration, which makes the terminal reporter, and its first line."""
    config = session.config
    ranks = config.stash.get(RANKS, None)
    if ranks is None:
        return
    config.pluginmanager.register(RanksPlugin(ranks, config), "mpidl-ranks")
    faulthandler.dump_traceback_later(TIMEOUT_S, exit=True, file=config.stash[STDERR])  # guards the collection
    if ranks.rank != 0:
        # Open until the process ends: the terminal reporter writes to it to the last.
        config.get_terminal_writer()._file = open(os.devnull, "w")  # noqa: SIM115


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[STDERR])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what launches jobs of its own by its folder, and leave it out under a launcher."""
    for item in items:
        if LAUNCHING_FOLDERS & set(item.path.parts):
            item.add_marker("launches")
    if RANKS in config.stash:
        launching = [item for item in items if item.get_closest_marker("launches")]
        config.hook.pytest_deselected(items=launching)
        items[:] = [item for item in items if not item.get_closest_marker("launches")]


def _guarded(item: pytest.Item) -> Generator[None, object, object]:
    """A phase that never ends prints its stacks and ends the process, and the launcher then ends the others."""
    limit_s = LAUNCHING_TIMEOUT_S if item.get_closest_marker("launches") else TIMEOUT_S
    faulthandler.dump_traceback_later(limit_s, exit=True, file=item.config.stash[STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


pytest_runtest_setup = pytest.hookimpl(wrapper=True, tryfirst=True)(_guarded)
pytest_runtest_call = pytest.hookimpl(wrapper=True, tryfirst=True)(_guarded)
pytest_runtest_teardown = pytest.hookimpl(wrapper=True, tryfirst=True)(_guarded)


@pytest.fixture(scope="session")
def world() -> World:
    """All ranks of this run; one under plain pytest."""
    return mpidl.runtime.init()


@pytest.fixture
def shared_tmp_path(tmp_path: Path, world: World) -> Path:
    """One empty folder per test, the same on all ranks."""
    path: Path = world.broadcast_object(tmp_path)
    return path
