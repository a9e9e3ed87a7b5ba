"""The world: ranks, nodes, threads, and every communicator of a job. `startup.py` makes it.

Ranks are numbered node by node: `World.comm` is a private duplicate of MPI_COMM_WORLD, reordered so that the ranks of
one node follow each other (rank 0 stays rank 0). A *node* is the set of ranks that share memory.

The main thread makes every call; those on a `duplicate` may be another thread's. All waits go through `waiting.wait`,
so that a waiting rank gives its core away where ranks share cores. Methods named in lower case with arrays move buffers
and never pickle; the `_object` ones pickle.

Every collective that is started is counted by its name and its purpose, which a view of the world has: see `calls.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpidl.errors import LaunchError, MpidlError, UserError
from mpidl.runtime import faults, ulfm
from mpidl.runtime.activity import Activity
from mpidl.runtime.calls import Calls
from mpidl.runtime.waiting import Pending

if TYPE_CHECKING:
    from mpi4py import MPI

AnyArray = NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Ranks, nodes and communicators of one job; made by `init`."""

    comm: MPI.Intracomm
    """All ranks, numbered node by node."""
    node_comm: MPI.Intracomm
    """This node's ranks."""
    column_comm: MPI.Intracomm | None
    """The ranks of this local rank on every node, where every node has one; None otherwise."""
    node_of: tuple[int, ...]
    """Node of each rank, ascending."""
    threads_per_rank: int
    shares_cores: bool
    """Whether more ranks than cores run on this machine."""
    library: str
    """What the MPI library calls itself, first line."""
    hostnames: tuple[str, ...]
    """Host of each rank."""
    takes_threads: bool
    """Whether several threads may call MPI at the same time (MPI_THREAD_MULTIPLE)."""
    purpose: str = "other"
    """What the collectives that are started by this view are for."""
    calls: Calls = dataclasses.field(default_factory=Calls)
    """How many collectives this rank has started, by name and purpose."""
    activity: Activity = dataclasses.field(default_factory=Activity)
    """What this rank does, for those who watch."""

    @property
    def rank(self) -> int:
        """This rank, 0 <= rank < size, numbered node by node."""
        return int(self.comm.rank)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return int(self.comm.size)

    @property
    def node(self) -> int:
        """This rank's node."""
        return self.node_of[self.rank]

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return self.node_of[-1] + 1

    @property
    def local_rank(self) -> int:
        """This rank among the ranks of its node."""
        return int(self.node_comm.rank)

    @property
    def local_size(self) -> int:
        """The number of ranks on this node."""
        return int(self.node_comm.size)

    @property
    def hostname(self) -> str:
        """This rank's host."""
        return self.hostnames[self.rank]

    @property
    def node_sizes(self) -> tuple[int, ...]:
        """Ranks on each node, in node order."""
        return tuple(self.node_of.count(node) for node in range(self.num_nodes))

    def first_rank_of(self, node: int) -> int:
        """The lowest rank of a node."""
        return self.node_of.index(node)

    def for_purpose(self, purpose: str) -> World:
        """The same ranks and communicators; what is started by the result counts as this. Not collective."""
        return dataclasses.replace(self, purpose=purpose)

    def _call(self, comm: MPI.Intracomm, name: str, *arguments: Any, **options: Any) -> Any:
        """Count and make a call of the communicator."""
        self.calls.own[name, self.purpose] += 1
        return getattr(comm, name)(*arguments, **options)

    def _call_and_wait(self, comm: MPI.Intracomm, name: str, *arguments: Any, **options: Any) -> Any:
        """The same with a call that returns when others have made it, too."""
        with self.activity.waiting():
            return self._call(comm, name, *arguments, **options)

    def _start(self, comm: MPI.Intracomm, name: str, *arguments: Any, **options: Any) -> Pending:
        """Count and start a non-blocking collective."""
        return Pending(self._call(comm, name, *arguments, **options), self.shares_cores, self.activity.waiting)

    # --- collectives over all ranks -------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait for every rank. Collective."""
        self.start_barrier().wait()

    def start_barrier(self) -> Pending:
        """Begin `barrier`. Collective."""
        return self._start(self.comm, "Ibarrier")

    def broadcast(self, array: AnyArray, root: int = 0) -> None:
        """Overwrite `array` with the root's, in place. Collective; same shape and dtype everywhere."""
        self.start_broadcast(array, root).wait()

    def start_broadcast(self, array: AnyArray, root: int = 0) -> Pending:
        """Begin `broadcast`; the array belongs to MPI until the result's `wait` returns. Collective."""
        return self._start(self.comm, "Ibcast", array, root=root)

    def allreduce(self, array: AnyArray, operation: str = "sum") -> AnyArray:
        """The elementwise "sum", "min" or "max" over all ranks, as a new array. Collective."""
        from mpi4py import MPI

        array = np.asarray(array, order="C")
        result = np.empty_like(array)
        operations = {"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}
        if operation not in operations:
            raise ValueError(f"allreduce operation {operation!r} is not one of {', '.join(operations)}")
        self._start(self.comm, "Iallreduce", array, result, operations[operation]).wait()
        return result

    def allgather(self, array: AnyArray) -> AnyArray:
        """Every rank's array, (size, *array.shape). Collective; same shape and dtype everywhere."""
        array = np.asarray(array, order="C")
        result = np.empty((self.size, *array.shape), array.dtype)
        self._start(self.comm, "Iallgather", array, result).wait()
        return result

    def allgather_varying(self, array: AnyArray, counts: Sequence[int]) -> AnyArray:
        """Every rank's one-dimensional array of counts[rank] elements, one behind the other. Collective."""
        result, pending = self.start_allgather_varying(array, counts)
        pending.wait()
        return result

    def gather(self, array: AnyArray) -> AnyArray | None:
        """Every rank's array, (size, *array.shape), on rank 0; None elsewhere. Collective."""
        result, pending = self.start_gather(array)
        pending.wait()
        return result

    def start_gather(self, array: AnyArray) -> tuple[AnyArray | None, Pending]:
        """Begin `gather`; returns what it will have filled. Collective; the array must stay until it is complete."""
        array = np.asarray(array, order="C")
        result = np.empty((self.size, *array.shape), array.dtype) if self.rank == 0 else None
        return result, self._start(self.comm, "Igather", array, result, root=0)

    def alltoall_varying(
        self,
        send: AnyArray,
        send_counts: Sequence[int],
        send_offsets: Sequence[int],
        receive: AnyArray,
        receive_counts: Sequence[int],
        receive_offsets: Sequence[int],
    ) -> None:
        """Send `send[offset : offset + count]` to each rank, receive likewise (MPI_Ialltoallv). Collective.

        Counts and offsets are in elements, one per rank. What is sent and what is received must not overlap.
        """
        self.start_alltoall_varying(send, send_counts, send_offsets, receive, receive_counts, receive_offsets).wait()

    def start_alltoall_varying(
        self,
        send: AnyArray,
        send_counts: Sequence[int],
        send_offsets: Sequence[int],
        receive: AnyArray,
        receive_counts: Sequence[int],
        receive_offsets: Sequence[int],
    ) -> Pending:
        """Begin `alltoall_varying`; both arrays belong to MPI until it is complete. Collective."""
        if send.ctypes.data == receive.ctypes.data:
            # Open MPI's non-blocking calls take equal addresses for MPI_IN_PLACE. Callers see to it that this happens
            # only where one side is empty: an empty slice keeps its array's address.
            assert not send.size or not receive.size, "send and receive begin at the same address"
            send = send if send.size else np.empty(1, send.dtype)
            receive = receive if receive.size else np.empty(1, receive.dtype)
        sent = [send, (list(send_counts), list(send_offsets))]
        received = [receive, (list(receive_counts), list(receive_offsets))]
        return self._start(self.comm, "Ialltoallv", sent, received)

    def start_allgather_varying(self, array: AnyArray, counts: Sequence[int]) -> tuple[AnyArray, Pending]:
        """Begin `allgather_varying`; returns what it will have filled. Collective."""
        result = np.empty(sum(counts), array.dtype)
        return result, self._start(self.comm, "Iallgatherv", np.ascontiguousarray(array), [result, list(counts)])

    def start_allreduce(self, send: AnyArray, receive: AnyArray) -> Pending:
        """Begin to add `send` over all ranks into everyone's `receive`. Collective; same shape and dtype everywhere."""
        return self._start(self.comm, "Iallreduce", send, receive)

    def start_reduce(self, send: AnyArray, receive: AnyArray) -> Pending:
        """Begin to add `send` over all ranks into rank 0's `receive`; the others' is not touched. Collective."""
        return self._start(self.comm, "Ireduce", send, receive if self.rank == 0 else None, root=0)

    def start_column_reduce_scatter(self, send: AnyArray, receive: AnyArray, counts: Sequence[int]) -> Pending:
        """Add `send` over the ranks of this column and keep this node's block (MPI_Ireduce_scatter).

        Collective over the column: the ranks of the same local rank on every node.

        Args:
            send: (sum(counts),); one block per node, in node order.
            receive: (counts[node],); overwritten.
            counts: elements for each node.
        """
        assert self.column_comm is not None, "this rank is in no column"
        return self._start(self.column_comm, "Ireduce_scatter", send, receive, list(counts))

    def nothing(self) -> Pending:
        """What is over at once. Not collective."""
        from mpi4py import MPI

        return Pending(MPI.REQUEST_NULL, self.shares_cores)

    # --- between two ranks ----------------------------------------------------------------------------------------

    def send(self, array: AnyArray, to: int) -> None:
        """Send an array to a rank, which calls `receive`. Returns when the array may be written again."""
        self.start_send(array, to).wait()

    def start_send(self, array: AnyArray, to: int) -> Pending:
        """Begin `send`; the array is not to be written until it is complete."""
        return self._start(self.comm, "Isend", array, dest=to)

    def receive(self, array: AnyArray, source: int) -> None:
        """Overwrite an array with what a rank sends; same shape and dtype there."""
        self.start_receive(array, source).wait()

    def start_receive(self, array: AnyArray, source: int) -> Pending:
        """Begin `receive`; the array belongs to MPI until it is complete."""
        return self._start(self.comm, "Irecv", array, source=source)

    # --- collectives over this node's ranks -----------------------------------------------------------------------

    def node_barrier(self) -> None:
        """Wait for the ranks of this node. Collective over the node."""
        self.start_node_barrier().wait()

    def start_node_barrier(self) -> Pending:
        """Begin `node_barrier`. Collective over the node."""
        return self._start(self.node_comm, "Ibarrier")

    def node_allgather_object(self, value: Any) -> list[Any]:
        """Every local rank's object (pickled). Collective over the node."""
        return list(self._call_and_wait(self.node_comm, "allgather", value))

    # --- objects, for set-up and for users ------------------------------------------------------------------------

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """The root's object on every rank (pickled). Collective."""
        return self._call_and_wait(self.comm, "bcast", value, root=root)

    def gather_object(self, value: Any) -> list[Any] | None:
        """Every rank's object on rank 0 (pickled); None elsewhere. Collective."""
        gathered: list[Any] | None = self._call_and_wait(self.comm, "gather", value, root=0)
        return gathered

    def allgather_object(self, value: Any) -> list[Any]:
        """Every rank's object (pickled). Collective."""
        return list(self._call_and_wait(self.comm, "allgather", value))

    @contextlib.contextmanager
    def agreed(self, stage: str) -> Iterator[None]:
        """Make one rank's `UserError` inside the block an error of every rank. Collective at the block's end.

        Every rank must run the block, and the block must not hold collectives behind which a rank could be left
        waiting. The error of the lowest rank is raised everywhere; `faults.run_command` prints it once.

        Args:
            stage: what the block does, for the message unless all ranks failed alike.
        """
        failure: UserError | None = None
        try:
            yield
        except UserError as error:
            failure = error
        failures = self.allgather_object(None if failure is None else (type(failure), str(failure)))
        failed = [rank for rank, entry in enumerate(failures) if entry is not None]
        if not failed:
            return
        if failure is not None and len(set(failures)) == 1:
            raise faults.on_all_ranks(failure)
        kind, message = failures[failed[0]]
        message = f"{message} (rank {failed[0]} on {self.hostnames[failed[0]]}, {stage})"
        raise faults.on_all_ranks(kind(message)) from failure

    def check_equal(self, what: str, digest: str, error: type[MpidlError] = LaunchError) -> None:
        """Raise on all ranks unless every rank passed the same digest. Collective."""
        digests = self.allgather_object(digest)
        different = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if different:
            raise faults.on_all_ranks(
                error(
                    f"{what} of rank {different[0]} ({self.hostnames[different[0]]}) differs from rank 0's "
                    f"({self.hostnames[0]}); every rank must run the same job with the same code and settings"
                )
            )

    def abort(self, code: int = 1) -> None:
        """End every rank of the job at once. Not collective; returns only where ranks may be lost (`ulfm.end_all`)."""
        if ulfm.is_on():
            ulfm.end_all(code)
            return
        from mpi4py import MPI

        # Not self.comm: where ranks of three hosts abort a duplicate at once, MPICH 5.0 leaves some spinning in there,
        # and its launcher waits for them.
        MPI.COMM_WORLD.Abort(code)

    def duplicate(self) -> World:
        """The same ranks with communicators of their own: collectives there do not mix with those here. Collective."""
        comm, node_comm = (ulfm.guard(self._call(each, "Dup")) for each in (self.comm, self.node_comm))
        column = None if self.column_comm is None else ulfm.guard(self._call(self.column_comm, "Dup"))
        return dataclasses.replace(self, comm=comm, node_comm=node_comm, column_comm=column, calls=self.calls.apart())

    def free(self) -> None:
        """Let the communicators of a `duplicate`, or of a part of the ranks, go. Collective."""
        for comm in filter(None, (self.comm, self.node_comm, self.column_comm)):
            ulfm.release(comm)
            self._call(comm, "Free")

    def without_shared_memory(self) -> World:
        """The same ranks, each on a node of its own, so that nothing is shared. Collective."""
        from mpi4py import MPI

        return dataclasses.replace(
            self, node_comm=MPI.COMM_SELF, column_comm=self.comm, node_of=tuple(range(self.size))
        )
