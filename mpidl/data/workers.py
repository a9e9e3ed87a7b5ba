"""Worker processes that read a data set ahead, seen from the rank that owns them.

They are new interpreters, started without fork (which breaks MPI libraries and their registered memory) and
without the launcher's variables, so that nothing in them takes itself for a rank. They run on the cores that
their rank is bound to.
"""

from __future__ import annotations

import io
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping

import torch

from mpidl.data.order import Order, Request
from mpidl.data.pipe import REQUEST, Assignment, Frame, decode, encode, read_frame, write_frame
from mpidl.data.sources import Batch, ReadError, Source
from mpidl.errors import DataError
from mpidl.runtime import without_launcher

_BATCHES_PER_WORKER = 2  # asked for and not taken yet: one to read while the other waits
_GRACE_S = 2.0  # from the end of a worker's input to SIGKILL

_SLURM_RANK = ("PROCID", "LOCALID", "NODEID", "GTIDS", "TASK_PID", "STEP_ID", "STEPID")
_LAUNCHER_NAMES = {f"SLURM_{name}" for name in _SLURM_RANK}
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class WorkerPool:
    """Batches of a source from several processes, in the order of their requests.

    Request number n goes to worker n modulo their number; each answers in order. A few requests per worker are
    under way at a time, so memory stays flat however many are queued.
    """

    def __init__(self, source: Source, order: Order, num_workers: int) -> None:
        """Start the processes, without waiting for them.

        Raises:
            DataError: the source cannot be pickled.
        """
        try:
            content = encode(source)
        except Exception as error:
            raise DataError(
                f"the data set cannot be sent to worker processes: {type(error).__name__}: {error}; open files and "
                "connections when the first sample is read, not in __init__, or use no workers"
            ) from error
        assignment = Assignment(
            order=order,
            default_dtype=torch.get_default_dtype(),
            # The kernel means the thread that started the process; other threads may end before the loader.
            dies_with_parent=threading.current_thread() is threading.main_thread(),
        )
        self._queued: deque[Request] = deque()
        self._num_sent = self._num_taken = 0
        self._workers = [_Worker(number) for number in range(num_workers)]
        for worker in self._workers:
            worker.start([encode(assignment), content])

    def request(self, request: Request) -> None:
        """Queue a batch; does not block."""
        self._queued.append(request)
        self._send()

    def next(self) -> Batch:
        """Wait for the oldest batch that was requested.

        Raises:
            ReadError: a sample could not be read, or the worker died.
        """
        if self._num_sent == self._num_taken:  # what was skipped is still under way, and has kept this one back
            self._send_oldest()
        worker = self._workers[self._num_taken % len(self._workers)]
        self._num_taken += 1
        try:
            return worker.receive()
        finally:
            self._send()

    def skip(self) -> None:
        """Forget the oldest batch that was requested; does not block."""
        if self._num_sent == self._num_taken:
            self._queued.popleft()
            return
        self._workers[self._num_taken % len(self._workers)].skip()
        self._num_taken += 1
        self._send()

    def close(self) -> None:
        """End all processes and threads, within a few seconds."""
        for worker in self._workers:
            worker.hang_up()
        deadline = time.monotonic() + _GRACE_S
        for worker in self._workers:
            worker.end(deadline)

    def _send(self) -> None:
        under_way = self._num_sent - self._num_taken + sum(worker.num_skipped() for worker in self._workers)
        while self._queued and under_way < _BATCHES_PER_WORKER * len(self._workers):
            self._send_oldest()
            under_way += 1

    def _send_oldest(self) -> None:
        self._workers[self._num_sent % len(self._workers)].send(self._queued.popleft())
        self._num_sent += 1


class _WorkerDiedError(ReadError):
    """The last outcome of a worker."""


class _Worker:
    """One process and the thread that reads what it sends.

    The main thread writes requests, of 24 bytes, few enough to fit any pipe; the thread never stops reading.
    So neither side can wait for the other.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mpidl.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=worker_environment(os.environ),
        )
        assert isinstance(self._process.stdin, io.FileIO)  # as bufsize=0 has it
        assert isinstance(self._process.stdout, io.FileIO)
        self._input, self._output = self._process.stdin, self._process.stdout
        # Over the two below and writing to the input. Reentrant, since the garbage collector may close loaders.
        self._lock = threading.RLock()
        self._num_skipped = 0
        self._is_listening = False  # whether all that comes before the requests has been written
        self._early: list[Request] = []
        self._outcomes: queue.SimpleQueue[Batch | ReadError] = queue.SimpleQueue()

    def start(self, frames: list[Frame]) -> None:
        """Send what the worker needs first, however large, from the thread."""
        name = f"mpidl-loader-{self._number}"
        self._thread = threading.Thread(target=self._run, args=(frames,), name=name, daemon=True)
        self._thread.start()

    def send(self, request: Request) -> None:
        with self._lock:
            if self._is_listening:
                self._write(request)
            else:
                self._early.append(request)

    def receive(self) -> Batch:
        outcome = self._outcomes.get()
        while self._num_skipped and not isinstance(outcome, _WorkerDiedError):
            self._num_skipped -= 1
            outcome = self._outcomes.get()
        if isinstance(outcome, _WorkerDiedError):
            self._outcomes.put(outcome)  # for whoever asks again
        if isinstance(outcome, ReadError):
            raise outcome
        return outcome

    def skip(self) -> None:
        """Throw the next outcome away, when it has come."""
        self._num_skipped += 1

    def num_skipped(self) -> int:
        """Outcomes that are still to come, or to be thrown away by `receive`."""
        while self._num_skipped:
            try:
                outcome = self._outcomes.get_nowait()
            except queue.Empty:
                break
            if isinstance(outcome, _WorkerDiedError):
                self._outcomes.put(outcome)
                break
            self._num_skipped -= 1
        return self._num_skipped

    def hang_up(self) -> None:
        """Tell the worker that no more requests come."""
        with self._lock:
            if self._is_listening:
                self._input.close()
            else:
                self._process.kill()  # which also ends the thread's writing

    def end(self, deadline: float) -> None:
        """Wait for the process until the deadline (time.monotonic), kill it if need be, end the thread."""
        self._wait(deadline - time.monotonic())
        if self._thread is not threading.current_thread():  # where the garbage collector closes the loader
            self._thread.join()
        self._input.close()
        self._output.close()

    def _run(self, frames: list[Frame]) -> None:
        try:
            while frames:
                write_frame(self._input, frames.pop(0))
            with self._lock:
                self._is_listening = True
                for request in self._early:
                    self._write(request)
            while True:
                self._outcomes.put(self._decoded(read_frame(self._output)))
        except (OSError, ValueError, EOFError):
            self._outcomes.put(self._death())

    def _decoded(self, frame: Frame) -> Batch | ReadError:
        try:
            return decode(frame)
        except Exception as error:
            return ReadError(f"a batch from loader worker {self._number} cannot be rebuilt: {error!r}")

    def _write(self, request: Request) -> None:
        try:
            self._input.write(REQUEST.pack(*request))
        except OSError:
            pass  # it has died; the thread finds out and says how

    def _death(self) -> _WorkerDiedError:
        code = self._wait(_GRACE_S)
        how = f"exit code {code}"
        if code < 0:
            how = f"{how}, killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how = f"{how}, most often for want of memory: use fewer workers or smaller batches"
        return _WorkerDiedError(f"loader worker {self._number} (process {self._process.pid}) died: {how}")

    def _wait(self, timeout_s: float) -> int:
        try:
            return self._process.wait(max(timeout_s, 0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Give a worker's environment: without the launcher's variables, one thread, this process's import path.

    mpi4py, should the Dataset's module import it, is told not to initialise MPI.
    """
    kept = {k: v for k, v in without_launcher(environment).items() if k not in _LAUNCHER_NAMES}
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return kept | _ONE_THREAD | {"MPI4PY_RC_INITIALIZE": "0", "PYTHONPATH": path}
