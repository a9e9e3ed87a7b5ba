"""The parameter manager: gradients of all partitions in, updated weights on every rank.

One iteration, in phases (the same words stand in `synchronize`):

1. *compute*: each rank runs its partitions; autograd adds into `.grad`, which is a view of the rank's row.
2. *local sum*: after a node barrier every row of the node is complete; ranks merge the rows of their node.
3. *reduce_scatter*: merged rows go to the shards' owners (`reduction.py`), with the partitions' counters.
4. *update*: the owner divides the sum by the samples that ran and lets its optimizer update its shard, in place, in
   the node's one copy of the weights. Nobody reads weights between the two barriers.
5. *allgather*: shards go to the other nodes' copies; a node barrier ends the iteration.

With one node phases 3 and 5 send nothing: two node barriers are all the synchronisation there is.

Every rank's parameters are views of the node's copy. Persistent buffers are each rank's own (`buffers.py`). A loss
that is not finite is seen by every rank in phase 3, from the counters, before anything is updated: all raise.

If a rank stops, the others of its node wait in a barrier, those of other nodes in the exchange, until the launcher or
the abort hook ends them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpidl import kernels
from mpidl.errors import LayoutError, NonFiniteLossError
from mpidl.runtime import SharedMemoryError, World, init, on_all_ranks, share, warn
from mpidl.parameters import counters as counter_fields
from mpidl.parameters import tree
from mpidl.parameters.assignment import Assignment, row_plan
from mpidl.parameters.buffers import ModelBuffers
from mpidl.parameters.counters import Counters
from mpidl.parameters.exchange import Exchange
from mpidl.parameters.layout import FlatLayout
from mpidl.parameters.model import check_model, check_state_names, describe_model, group_parameters, trainable_parameters
from mpidl.parameters.reduction import REDUCTIONS
from mpidl.parameters.state import full_state, load_full_state
from mpidl.parameters.update import OptimizerFactory, ShardOptimizer

PHASES = ("wait", "local_sum", "reduce_scatter", "update", "allgather")


class ParameterManager:
    """Sums gradients over ranks and keeps the weights of all ranks the same. Construction is collective.

    Rank 0's weights and buffers go to all ranks. In a loop of your own, a partition is a rank: call `backward` on this
    rank's samples, then `step`. Results then depend on the number of ranks, as they do everywhere else; `mpidl.Trainer`
    keeps them apart.

    A parameter that received no gradient in an iteration counts as having the gradient zero on that rank: an optimizer
    with momentum or weight decay still moves it.

    Args:
        model: parameters float32, on the CPU; frozen ones (`requires_grad=False`) are left alone, tied ones are one.
        optimizer: callable from param groups to an element-wise `torch.optim.Optimizer`, for example
            `functools.partial(torch.optim.AdamW, lr=1e-3)`.
        reduction: "ordered" (fixed order of additions) or "mpi" (MPI_Reduce_scatter between nodes).
        param_groups: as torch's: a list of dicts with "params" and options; must hold every trainable parameter once.
        world: default `mpidl.init()`.
        assignment: who computes which partitions; default: rank r is partition r.

    Raises:
        LayoutError: on every rank: nothing to train, wrong dtype or device, groups that do not fit, an optimizer that
            is not element-wise, ranks with different models.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        *,
        reduction: str = "ordered",
        param_groups: Iterable[Mapping[str, Any]] | None = None,
        world: World | None = None,
        assignment: Assignment | None = None,
    ) -> None:
        self.world = init() if world is None else world
        self.model = model
        self.assignment = assignment or Assignment.even(self.world.size, self.world.size)
        with self.world.agreed("checking the model"):
            if reduction not in REDUCTIONS:
                raise LayoutError(f"reduction {reduction!r} is not one of {', '.join(REDUCTIONS)}")
            check_model(model)
            self._parameters = trainable_parameters(model)
            self._groups = group_parameters(self._parameters, param_groups)
        self._reduce = REDUCTIONS[reduction]
        self.layout = FlatLayout.of((name, tuple(p.shape)) for name, p in self._parameters)
        self.world.check_equal("the model", describe_model(model, self._groups), LayoutError)
        self._buffers = ModelBuffers(model)
        self._allocate()
        self._share_weights()
        with self.world.agreed("making the optimizer"):
            self._update = ShardOptimizer(
                optimizer, self._groups, self.layout, self._gradients.result, self._gradient, self._gradients.shard
            )
        self._accumulating = False
        self.times: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        """Seconds spent in each phase since the last `take_times`."""

    # --- set-up -------------------------------------------------------------------------------------------------

    def _allocate(self) -> None:
        try:
            self._allocate_in(self.world)
        except SharedMemoryError as error:
            copies = 4 * self.layout.size * (self.world.local_size - 1)
            warn(
                f"no shared memory: {error}; every rank becomes a node of its own: {copies / 2**20:.0f} MiB more "
                "for weights on each machine, and gradients travel through MPI messages; raise the size of "
                "/dev/shm (in containers: --shm-size)"
            )
            self.world = self.world.without_shared_memory()
            self._allocate_in(self.world)

    def _allocate_in(self, world: World) -> None:
        slots = self.assignment.num_slots(world.rank)
        self._gradients = Exchange(world, self.layout.size, slots)
        self._changes = Exchange(world, self._buffers.layout.size, slots)
        self._counters = Counters(world, self.assignment.num_partitions)
        start, stop = self._gradients.shard
        self._gradient = np.zeros(stop - start, np.float32)
        self._square_pieces = [
            (a // kernels.BLOCK_SIZE, -(-b // kernels.BLOCK_SIZE)) if a < b else (0, 0) for a, b in self._gradients.shards
        ]
        num_blocks = -(-self.layout.size // kernels.BLOCK_SIZE)
        self._squares = share(world, 8 * num_blocks if world.local_rank == 0 else 0)[0].view(np.float64)

    def _share_weights(self) -> None:
        """Put rank 0's weights into every node's copy and make all parameters views of it; broadcast the rest."""
        weights = self._gradients.result
        if self.world.rank == 0:
            self._copy_into(weights)
        self._to_all_nodes(weights)
        for (_, parameter), slot in zip(self._parameters, self.layout.slots, strict=True):
            parameter.data = torch.from_numpy(weights[slot.offset : slot.stop]).view(slot.shape)
        trained = {id(parameter) for _, parameter in self._parameters}
        frozen = [p.data for p in self.model.parameters() if id(p) not in trained]
        for tensor in [*frozen, *self.model.buffers()]:
            _broadcast_tensor(self.world, tensor)
        self._buffers.take_base()
        self._views = [
            [torch.from_numpy(row[slot.offset : slot.stop]).view(slot.shape) for slot in self.layout.slots]
            for row in self._gradients.rows
        ]
        self._open_row(0)

    def _copy_into(self, weights: NDArray[np.float32]) -> None:
        for (_, parameter), slot in zip(self._parameters, self.layout.slots, strict=True):
            weights[slot.offset : slot.stop] = parameter.detach().reshape(-1).numpy()

    def _to_all_nodes(self, weights: NDArray[np.float32]) -> None:
        """Bring rank 0's node's weights to every node. Every rank takes part; only the first of a node writes."""
        receives = self.world.local_rank == 0
        scratch = weights if receives else np.empty(0, np.float32)
        counts = [0] * self.world.size
        for node in range(1, self.world.num_nodes):
            counts[self.world.first_rank_of(node)] = weights.size
        nothing = [0] * self.world.size
        sends = counts if self.world.rank == 0 else nothing
        expects = [weights.size if receives and self.world.node > 0 else 0, *nothing[1:]]
        source = weights if self.world.rank == 0 else np.empty(0, np.float32)
        self.world.alltoall_varying(source, sends, nothing, scratch, expects, nothing)
        self.world.node_barrier()

    # --- one iteration --------------------------------------------------------------------------------------------

    def _open_row(self, slot: int) -> None:
        """Zero a row and let autograd add into it."""
        self._gradients.rows[slot].fill(0)
        for (_, parameter), view in zip(self._parameters, self._views[slot], strict=True):
            parameter.grad = view
        self._slot = slot

    def _close_row(self) -> None:
        """Bring gradients that are not in the row (zeroed with set_to_none, or replaced) into it."""
        for (name, parameter), view in zip(self._parameters, self._views[self._slot], strict=True):
            gradient = parameter.grad
            if gradient is None:
                view.zero_()
            elif gradient.layout != torch.strided:
                raise LayoutError(f"the gradient of {name} is sparse; use sparse=False in the embedding")
            elif gradient.data_ptr() != view.data_ptr():
                view.copy_(gradient)

    def begin_partition(self, assignment: Assignment, partition: int) -> None:
        """Make ready for one partition's forward and backward: a zeroed row, the iteration's own buffers.

        A rank runs its partitions in ascending order.
        """
        start, _ = assignment.range_of(self.world.rank)
        self._open_row(len(tree.cover(assignment.num_partitions, start, partition)))
        self._buffers.reset()

    def end_partition(
        self, assignment: Assignment, partition: int, loss_sum: float, weight: float, samples: int
    ) -> None:
        """Report a partition whose gradient (of the loss *sum*) has been added, and merge rows as the tree allows."""
        start, _ = assignment.range_of(self.world.rank)
        self._close_row()
        self._buffers.write_changes(self._changes.rows[self._slot], weight)
        self._counters.write(partition, loss_sum, weight, samples)
        for merge in range(tree.merges(assignment.num_partitions, start, partition)):
            into = self._slot - merge - 1
            for exchange in (self._gradients, self._changes):
                addresses = exchange.addresses(
                    ((self.world.local_rank, into), (self.world.local_rank, into + 1)), 0
                )
                kernels.add_rows(addresses, np.array([[0, 1]], dtype=np.int64), exchange.size)

    def synchronize(self, assignment: Assignment) -> NDArray[np.float64]:
        """Phases 2 to 5 of an iteration. Collective.

        Args:
            assignment: the same on all ranks; this rank has ended all of its partitions.

        Returns:
            float64, (num_partitions, 4): loss_sum, weight, samples, flags of every partition.

        Raises:
            NonFiniteLossError: on every rank, before anything was updated; names the partition.
        """
        world, clock = self.world, _Clock(self.times)
        world.node_barrier()
        clock.lap("wait")
        self._counters.read_node(world, assignment)
        plan = row_plan(assignment, world.node_of, world.rank)
        rows = self._reduce(self._gradients, assignment, plan, self._counters)
        clock.lap("reduce_scatter", rows.local_sum_s)
        table = self._counters.table[: assignment.num_partitions].copy()
        _check_finite(table)
        weight = float(table[:, counter_fields.WEIGHT].sum())
        if weight > 0:
            self._sum_and_update(rows, weight, clock)
            self._exchange_buffers(assignment, weight, plan, clock)
        world.node_barrier()
        if weight > 0 and self._buffers.advance(self._changes.result):
            world.node_barrier()
            self._changes = Exchange(world, self._buffers.layout.size, self._gradients.num_slots)
        clock.lap("allgather")
        return table

    def _sum_and_update(self, rows: Any, weight: float, clock: _Clock) -> None:
        first, last = self._square_pieces[self.world.rank]
        kernels.sum_rows(rows.addresses, rows.additions, weight, self._gradient, self._squares[first:last])
        clock.lap("local_sum")
        self._update.step()
        clock.lap("update")
        self._gradients.distribute(self._gradients.result, self._gradients.shards)
        self._gradients.distribute(self._squares, self._square_pieces)

    def _exchange_buffers(self, assignment: Assignment, weight: float, plan: Any, clock: _Clock) -> None:
        changes = self._changes
        if changes.size == 0:
            return
        rows = self._reduce(changes, assignment, plan, None)
        start, stop = changes.shard
        squares = np.empty(-(-(stop - start) // kernels.BLOCK_SIZE))
        kernels.sum_rows(rows.addresses, rows.additions, weight, changes.result[start:stop], squares)
        changes.distribute(changes.result, changes.shards)

    # --- a loop of your own ---------------------------------------------------------------------------------------

    def step(self, num_samples: int | None = None) -> float:
        """Sum the gradients of all ranks, update the weights everywhere, zero the gradients. Collective.

        Every rank must call it equally often; a rank that has run out of data calls `step(num_samples=0)` until the
        result is 0 on all ranks.

        Args:
            num_samples: how many samples this rank's mean loss was over; the gradient is then the mean over all
                samples of all ranks. Default: every rank weighs the same. All ranks must do alike.

        Returns:
            The sum of all ranks' num_samples (the number of ranks by default); 0: nothing was updated.
        """
        if self._accumulating:
            return 0.0
        if num_samples is not None and num_samples < 0:
            raise LayoutError(f"num_samples is {num_samples}; it must not be negative")
        weight = 1.0 if num_samples is None else float(num_samples)
        self._close_row()
        if num_samples is not None:
            self._gradients.rows[0] *= np.float32(weight)
        self._buffers.write_changes(self._changes.rows[0], weight)
        self._counters.write(self.world.rank, 0.0, weight, int(weight), flags=int(num_samples is None))
        table = self.synchronize(self.assignment)
        self._open_row(0)
        given = table[:, counter_fields.FLAGS]
        if given.min() != given.max():
            raise on_all_ranks(
                LayoutError(
                    f"rank {int(given.argmax())} called step() without num_samples, rank {int(given.argmin())} with "
                    "it; all ranks must do alike"
                )
            )
        return float(table[:, counter_fields.WEIGHT].sum())

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let `step()` do nothing inside the block: gradients of several backward passes add up. Not collective.

        As with DistributedDataParallel, divide each loss by the number of passes if the mean is wanted.
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def zero_grad(self) -> None:
        """Forget the gradients added since the last `step`. `model.zero_grad()` does the same. Not collective."""
        self._open_row(0)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer of this rank's shard; torch's learning-rate schedulers work on it."""
        return self._update.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's param groups, in the order given; set `["lr"]` alike on all ranks."""
        return self._update.optimizer.param_groups

    @property
    def grad_norm(self) -> float:
        """The L2 norm of the mean gradient of the last update, over all parameters. Not collective."""
        return math.sqrt(float(self._squares.sum()))

    # --- state ----------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> NDArray[np.float32]:
        """The node's copy of the weights, float32, (layout.size,)."""
        return self._gradients.result

    @property
    def shard(self) -> tuple[int, int]:
        """This rank's [start, stop) of the flat vector."""
        return self._gradients.shard

    @property
    def shard_optimizer(self) -> ShardOptimizer:
        """The optimizer of this rank's shard, with its state by name."""
        return self._update

    def publish(self) -> None:
        """Bring every rank's own shard of the weights to all nodes, after it was written there. Collective."""
        self.world.node_barrier()
        self._gradients.distribute(self._gradients.result, self._gradients.shards)
        self.world.node_barrier()
        self._buffers.take_base()

    def load_weights(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Replace weights and buffers on all ranks by rank 0's `state_dict`; the way to edit them. Collective.

        Raises:
            LayoutError: on every rank: names or shapes do not fit the model.
        """
        with self.world.agreed("loading weights"):
            if self.world.rank == 0:
                check_state_names(self.model, state_dict)
        self.world.node_barrier()
        if self.world.rank == 0:
            self.model.load_state_dict(state_dict)
        self._share_weights()

    def state_dict(self) -> dict[str, Any]:
        """The whole optimizer's state in torch's own format, on rank 0; {} on the others. Collective."""
        return full_state(self.world, self._update, self._groups, self.layout, self._gradients.shards)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take rank 0's `state_dict`, on any number of ranks; the others may pass anything. Collective."""
        load_full_state(
            self.world, self._update, self._groups, self.layout, self._gradients.shards, state
        )

    def take_times(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        taken, fresh = dict(self.times), dict.fromkeys(PHASES, 0.0)
        self.times.update(fresh)
        return taken

    def memory_bytes(self) -> dict[str, int]:
        """What this rank's part of the work takes, by what it is for."""
        state = 4 * (self._gradients.shard[1] - self._gradients.shard[0])
        return {
            "weights (one copy a node)": self._gradients.result.nbytes,
            "gradient rows": sum(row.nbytes for row in self._gradients.rows),
            "summed gradient shard": self._gradient.nbytes,
            "optimizer state, per element-wise tensor": state,
        }

    def close(self) -> None:
        """Give every rank's model private copies of weights back, and let the shared memory go. Collective."""
        self.world.node_barrier()
        for _, parameter in self._parameters:
            parameter.data = parameter.data.clone()
            parameter.grad = None
        self.world.node_barrier()


def _broadcast_tensor(world: World, tensor: torch.Tensor) -> None:
    """Overwrite a tensor of any dtype with rank 0's. Collective."""
    values = tensor.detach().reshape(-1).clone()
    world.broadcast(values.view(torch.uint8).numpy())
    tensor.copy_(values.view(tensor.shape))


class _Clock:
    """Adds the time since the last lap to a phase."""

    def __init__(self, times: dict[str, float]) -> None:
        self._times = times
        self._last = time.perf_counter()

    def lap(self, phase: str, of_it_local_sum: float = 0.0) -> None:
        now = time.perf_counter()
        self._times[phase] += now - self._last - of_it_local_sum
        self._times["local_sum"] += of_it_local_sum
        self._last = now


def _check_finite(table: NDArray[np.float64]) -> None:
    bad = np.flatnonzero(~np.isfinite(table[:, counter_fields.LOSS_SUM]))
    if bad.size:
        raise on_all_ranks(
            NonFiniteLossError(f"the loss of partition {bad[0]} is {table[bad[0], counter_fields.LOSS_SUM]}")
        )
