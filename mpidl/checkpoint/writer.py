"""Writing checkpoints while training goes on: each rank its own shard; nothing is gathered on one rank.

A checkpoint is a directory `checkpoints/epoch-000003`, or `epoch-000003+000017` where 17 iterations more are done, of

- `shard-00000-of-00004.safetensors`, one per rank that holds elements, so one writer per shard: "weights" and one
  vector per kind of element-wise optimizer state, float32, in the model's order without alignment gaps, so any number
  of ranks can read the elements that it needs; and the sums of its chunks (`image.py`);
- `rest.safetensors`: what is not trained (buffers, frozen parameters), by its state-dict name;
- `manifest.json`: names and shapes, which elements are in which file with checksums, the optimizer's scalars and
  options, versions, and the training's position (seed and iteration are the whole state of all random streams). It is
  written last.

Phases:

0. *prepare*: after the first iteration each rank's thread makes the buffer of the snapshots: memory that nobody has
   touched yet costs ten times what a copy does. Without it the first snapshot makes the buffer.
1. *snapshot*: `begin`, collective. The optimizer's scalars, which are small, are gathered everywhere; each rank's main
   thread copies its shard into a buffer that is kept; rank 0 copies the rest, too. A barrier on the node ends it, so
   nobody writes while others copy. This is what training waits for.
2. *write*: each rank's thread writes its file into `.new-NAME`, makes the sums, has the file on disk. It makes no MPI
   call; none of the threads here does.
3. *report*: a rank's main thread that finds its thread done, after some iteration, starts an MPI_Igather of a report of
   fixed size (sum, or what went wrong) to rank 0, and goes on training.
4. *publish*: where rank 0's main thread finds all reports, its thread writes the rest and the manifest, has them on
   disk, and renames the directory; then it removes old checkpoints. Where a rank has failed it removes the directory.
5. *tell*: an MPI_Ibcast of the outcome, started by each rank behind its report.

Ranks find out after different iterations, so 3 and 5 have communicators of their own. `poll` moves the course on and
never waits; `complete` waits for its end and is collective: before the next snapshot, which needs the buffers, and
before all ranks leave. Buffers belong to the thread from `begin` until the outcome is known.

What if. A rank cannot write (full disk): all learn it in phase 5, and nobody waits longer than otherwise; the
checkpoints before are untouched; whoever called decides. A rank dies, or all do, at any moment: there is no directory
of that name, or a whole one; the next run clears the rest away. A thread meets what it does not expect: its main thread
raises it, and the job ends as after any error of one rank. A rank raises while training: the job ends, and this
checkpoint is not completed.

Nothing is pickled: loading a stranger's checkpoint cannot run code.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from mpidl.checkpoint.files import Keep
from mpidl.checkpoint.image import ShardImage, header
from mpidl.checkpoint.publication import Publisher, draft
from mpidl.checkpoint.report import Report
from mpidl.checkpoint.snapshot import RestSnapshot, Snapshot
from mpidl.errors import CheckpointError
from mpidl.parameters import ParameterManager
from mpidl.parameters.layout import Piece, merge_pieces
from mpidl.parameters.state import merge_scalars
from mpidl.runtime import on_all_ranks
from mpidl.runtime.spans import CHECKPOINTS

_FINITE_SIZE = 1 << 20
"""Weights looked at together: the flags stay in cache."""


class Awaited(Protocol):
    """What a course waits for."""

    def is_over(self) -> bool: ...  # noqa: D102
    def wait(self) -> None: ...  # noqa: D102


class _Work:
    """What a thread does."""

    def __init__(self, future: concurrent.futures.Future[Report]) -> None:
        self._future = future

    def is_over(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        concurrent.futures.wait([self._future])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How writing a checkpoint has ended; the same on all ranks but for the times."""

    path: pathlib.Path
    num_bytes: int
    """Of all files."""
    error: str | None
    """Why there is no such checkpoint; None: there is."""
    pause_s: float
    """Seconds that `begin` took."""
    seconds: float
    """From then until this rank knew."""


class Writer:
    """Writes the checkpoints of one manager, one at a time. Construction is collective.

    Args:
        manager: whose weights and optimizer state.
        directory: that holds the checkpoints; made when the first is written.
        keep: which of them stay.
    """

    def __init__(self, manager: ParameterManager, directory: pathlib.Path, keep: Keep | None = None) -> None:
        self._manager = manager
        self._world = manager.world.for_purpose("checkpoint").duplicate()
        self._snapshot, self._rest = Snapshot(manager), RestSnapshot(manager)
        own = merge_pieces(manager.layout.unpadded(run) for run in manager.shard_runs)
        self._runs: list[list[Piece]] | None = self._world.gather_object(own)
        """Of each rank's file, on rank 0: elements [start, stop) of the vector without gaps."""
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "mpidl-checkpoint")
        self._course: Generator[Awaited, None, Outcome] | None = None
        self._awaited: Awaited | None = None
        self._preparing: concurrent.futures.Future[None] | None = None
        with self._world.agreed("looking at the checkpoints"):
            if self._world.rank == 0:
                try:
                    self._publisher = Publisher(directory, keep or Keep())
                except OSError as error:
                    raise CheckpointError(f"cannot write {directory}: {error.strerror or error}") from None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is under way."""
        return self._course is not None

    def prepare(self) -> None:
        """Let the thread make the buffer of the first snapshot, so that training does not wait for its memory.

        To be called when the optimizer has made its state; behind a `begin` it does nothing. Not collective.
        """
        if self._course is not None:
            return  # its snapshot has been taken already
        states = _states(self._manager.shard_optimizer.scalars())
        self._preparing = self._thread.submit(self._snapshot.prepare, states)

    def begin(self, path: pathlib.Path, progress: Mapping[str, Any]) -> None:
        """Take a snapshot, and begin to write it. Collective; the one before must be complete, and weights settled.

        Args:
            path: the checkpoint's directory.
            progress: the training's position, as JSON values.
        """
        assert self._course is None, "one at a time: complete() comes first"
        began = time.perf_counter()
        scalars = merge_scalars(self._world.allgather_object(self._manager.shard_optimizer.scalars()))
        if self._preparing is not None:
            self._preparing.result()
            self._preparing = None
        image = self._snapshot.take(_states(scalars))
        manifest: dict[str, Any] = {}
        rest: dict[str, torch.Tensor] = {}
        if self._world.rank == 0:
            rest, aliases = self._rest.take()
            manifest = draft(self._manager, aliases, scalars, progress)
        self._world.node_barrier()  # a thread that writes takes the core and the memory that others still copy with
        self._course = self._steps(path, image, manifest, rest, began)
        self._awaited = next(self._course)

    def poll(self) -> Outcome | None:
        """Move on what can be moved on; the outcome where it has just become known. Not collective, and never waits."""
        while self._awaited is not None and self._awaited.is_over():
            outcome = self._go_on()
            if outcome is not None:
                return outcome
        return None

    def complete(self) -> Outcome | None:
        """Wait for the end of what is under way; its outcome, None where nothing was. Collective."""
        while self._awaited is not None:
            self._awaited.wait()
            outcome = self._go_on()
            if outcome is not None:
                return outcome
        return None

    def close(self) -> None:
        """End the thread and let the communicators go. Collective; nothing may be under way."""
        assert self._course is None, "complete() comes first"
        self._thread.shutdown()
        self._world.free()

    def abandon(self) -> None:
        """Give up what is under way, after a rank was lost; what this rank writes is on disk then. Not collective."""
        self._thread.shutdown()

    def _go_on(self) -> Outcome | None:
        assert self._course is not None
        try:
            self._awaited = next(self._course)
        except StopIteration as ended:
            self._course = self._awaited = None
            outcome: Outcome = ended.value
            return outcome
        return None

    def _steps(
        self,
        path: pathlib.Path,
        image: ShardImage | None,
        manifest: Mapping[str, Any],
        rest: Mapping[str, torch.Tensor],
        began: float,
    ) -> Generator[Awaited, None, Outcome]:
        """Phases 2 to 5 of one checkpoint; yields what has to be over before it goes on."""
        temporary = path.with_name(f".new-{path.name}")
        writing = self._submit("writing", self._write, image, temporary)
        pause_s = time.perf_counter() - began
        yield _Work(writing)
        report = writing.result().encode()
        reports, gathering = self._world.start_gather(report)
        yield gathering
        told = np.zeros_like(report)
        if reports is not None:
            publishing = self._submit("publishing", self._publish, temporary, path, manifest, rest, image, reports)
            yield _Work(publishing)
            told = publishing.result().encode()
        yield self._world.start_broadcast(told)
        outcome = Report.decode(told)
        seconds = time.perf_counter() - began
        return Outcome(path, outcome.num_bytes, outcome.error or None, pause_s, seconds)

    def _submit(self, name: str, work: Callable[..., Report], *arguments: Any) -> concurrent.futures.Future[Report]:
        """Let the thread work, and a trace show it."""

        def traced() -> Report:
            with self._world.activity.spans.within(CHECKPOINTS, name):
                return work(*arguments)

        return self._thread.submit(traced)

    # --- in the thread ------------------------------------------------------------------------------------------

    def _write(self, image: ShardImage | None, temporary: pathlib.Path) -> Report:
        """Phase 2."""
        try:
            temporary.mkdir(parents=True, exist_ok=True)  # whoever comes first; the others need no word from it
            if image is None:
                return Report()
            if not _is_finite(image.vectors["weights"]):
                return Report(error=f"{temporary.name[5:]}: the weights are not finite any more")
            return Report(
                image.write(temporary / self._file_of(self._world.rank), self._world.activity.beat), image.num_bytes
            )
        except OSError as error:
            return Report(error=f"cannot write {temporary}: {error.strerror or error}")

    def _publish(
        self,
        temporary: pathlib.Path,
        path: pathlib.Path,
        manifest: Mapping[str, Any],
        rest: Mapping[str, torch.Tensor],
        image: ShardImage | None,
        encoded: NDArray[np.uint8],
    ) -> Report:
        """Phase 4."""
        reports = [Report.decode(each) for each in encoded]
        outcome = next((each.of(self._world, rank) for rank, each in enumerate(reports) if each.error), None)
        if outcome is None:
            written = [(rank, each) for rank, each in enumerate(reports) if each.checksum]
            shards = [(self._entry(rank, image, each), each.num_bytes) for rank, each in written]
            try:
                return Report(num_bytes=self._publisher.publish(temporary, path, manifest, rest, shards))
            except (OSError, SafetensorError) as error:
                outcome = Report(error=f"cannot write {temporary}: {getattr(error, 'strerror', None) or error}")
        shutil.rmtree(temporary, ignore_errors=True)
        return outcome

    def _entry(self, rank: int, image: ShardImage | None, report: Report) -> dict[str, Any]:
        """A shard's entry of the manifest."""
        assert image is not None, "rank 0 holds the first elements"
        assert self._runs is not None, "rank 0 has them"
        runs = self._runs[rank]
        size = sum(stop - start for start, stop in runs)
        return {
            "file": self._file_of(rank),
            "runs": runs,
            "vectors": image.keys,  # the same on all ranks
            "data_start": len(header(image.keys, size)),
            "checksum": report.checksum,
        }

    def _file_of(self, rank: int) -> str:
        return f"shard-{rank:05d}-of-{self._world.size:05d}.safetensors"


def _states(scalars: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all element-wise state."""
    return sorted({key for entry in scalars for key in entry.get("arrays", [])})


def _is_finite(weights: NDArray[np.float32]) -> bool:
    parts = (weights[start : start + _FINITE_SIZE] for start in range(0, weights.size, _FINITE_SIZE))
    return all(bool(np.isfinite(part).all()) for part in parts)


def save(manager: ParameterManager, path: pathlib.Path, progress: Mapping[str, Any]) -> int:
    """Write a checkpoint, and return when it is there. Collective.

    Args:
        manager: whose weights and optimizer state.
        path: the checkpoint's directory; its parent is made.
        progress: the training's position, as JSON values.

    Returns:
        Bytes of all files, on every rank.

    Raises:
        CheckpointError: on every rank: a file could not be written, or weights are not finite.
    """
    writer = Writer(manager, path.parent)
    writer.begin(path, progress)
    outcome = writer.complete()
    writer.close()
    assert outcome is not None
    if outcome.error is not None:
        raise on_all_ranks(CheckpointError(f"{outcome.error}; the previous one is kept"))
    return outcome.num_bytes
