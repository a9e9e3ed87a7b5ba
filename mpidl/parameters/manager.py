"""The parameter manager: what a user holds. The exchange behind it is in `synchronizer.py`.

The model's parameters become views of the node's one copy of the weights, their gradients views of this rank's row in
node-shared memory. Persistent buffers stay each rank's own (`buffers.py`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpidl.errors import LayoutError, MpidlError
from mpidl.parameters import counters as fields
from mpidl.parameters import tree, weights
from mpidl.parameters.assignment import Assignment
from mpidl.parameters.baselines import BASELINES
from mpidl.parameters.bucket_size import BucketSize
from mpidl.parameters.buffers import ModelBuffers
from mpidl.parameters.exchange_settings import ExchangeSettings
from mpidl.parameters.gate import Gate
from mpidl.parameters.layout import FlatLayout, Piece
from mpidl.parameters.model import (
    check_model,
    check_state_names,
    describe_model,
    group_parameters,
    trainable_parameters,
)
from mpidl.parameters.norms import use_norms_over_shards
from mpidl.parameters.pipeline import Pipeline
from mpidl.parameters.rows import GradientRows
from mpidl.parameters.state import full_state, load_full_state
from mpidl.parameters.synchronizer import Synchronizer
from mpidl.parameters.update import OptimizerFactory, ShardOptimizer, goes_by_slices
from mpidl.parameters.wire import WIRES
from mpidl.runtime import SharedMemoryError, World, activity, init, warn


class ParameterManager:
    """Sums gradients over ranks and keeps the weights of all ranks the same. Construction is collective.

    Rank 0's weights and buffers go to all ranks. In a loop of your own, a partition is a rank: call `backward` on this
    rank's samples, then `step`. Results then depend on the number of ranks, as they do everywhere else; `mpidl.Trainer`
    keeps them apart.

    A parameter that received no gradient in an iteration counts as having the gradient zero on that rank: an optimizer
    with momentum or weight decay still moves it.

    Gradients may be changed between backward and `step`, in place or by others, but not through `parameter.grad.data`
    or a NumPy view: torch does not count such changes, and between nodes the gradient may be on its way already.

    Args:
        model: parameters float32, on the CPU; frozen ones (`requires_grad=False`) are left alone, tied ones are one.
        optimizer: callable from param groups to an element-wise `torch.optim.Optimizer`, for example
            `functools.partial(torch.optim.AdamW, lr=1e-3)`, or to a layer-wise one, `mpidl.Lars` or `mpidl.Lamb`.
        reduction: "ordered" (fixed order of additions) or "mpi" (MPI_Reduce_scatter between nodes); or one of what
            they are measured against: "driver" (rank 0 adds and updates), "tree" (the same over several levels) and
            "allreduce" (every rank has the whole optimizer). These three share no memory.
        wire: what travels between nodes: "float32", or "bfloat16" (half the bytes; sums and the owner's weights stay
            float32).
        error_feedback: with wire "bfloat16": what rounding takes from a gradient is kept and added to the next one.
        clip_norm: bound of the mean gradient's L2 norm over all parameters, as torch's `clip_grad_norm_` has it.
        clip_value: bound of the magnitude of each of its elements; applied before `clip_norm`.
        bucket_mb: MiB of gradients that are exchanged together, in steps of the vector's cells (1 MiB or more);
            default: what proves fastest in the first iterations.
        param_groups: as torch's: a list of dicts with "params" and options; must hold every trainable parameter once.
        world: default `mpidl.init()`.
        assignment: who computes which partitions at first; default: rank r is partition r. Before others, `reserve`.

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
        wire: str = "float32",
        error_feedback: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        bucket_mb: float | None = None,
        param_groups: Iterable[Mapping[str, Any]] | None = None,
        world: World | None = None,
        assignment: Assignment | None = None,
    ) -> None:
        settings = ExchangeSettings(reduction, wire, error_feedback, clip_norm, clip_value, bucket_mb)
        self.world = (init() if world is None else world).for_purpose("exchange")
        if reduction in BASELINES:
            self.world = self.world.without_shared_memory()
        self.model = model
        self.assignment = assignment or Assignment.even(self.world.size, self.world.size)
        with self.world.agreed("checking the model"):
            settings.check()
            check_model(model)
            self._parameters = trainable_parameters(model)
            self._groups = group_parameters(self._parameters, param_groups)
        self._trained = {id(parameter) for _, parameter in self._parameters}
        self.layout = FlatLayout.of((name, tuple(p.shape)) for name, p in self._parameters)
        self.world.check_equal("the model", describe_model(model, self._groups), LayoutError)
        self.world.check_equal("the exchange's settings", repr(settings), LayoutError)
        self._buffers = ModelBuffers(model)
        make = functools.partial(
            Synchronizer,
            layout=self.layout,
            buffers=self._buffers,
            assignment=self.assignment,
            reduction=reduction,
            wire=WIRES[wire],
            clipping=settings.clipping,
            by_slices=goes_by_slices(optimizer),
            error_feedback=error_feedback,
        )
        self._sync = self._allocate(make)
        self._accumulating = False
        try:
            self._build(optimizer, bucket_mb)
        except MpidlError:  # on every rank
            self._release()
            raise
        except Exception:
            self.abandon()
            raise
        self.world.activity.enter(activity.OWN_CODE, 1)

    def _build(self, optimizer: OptimizerFactory, bucket_mb: float | None) -> None:
        """Move the model in, and make the optimizer."""
        self._place_model(with_caches=True)
        self._rows = self._make_rows()
        self._gate = self._make_gate()
        self._bucket_size = self._make_bucket_size(bucket_mb)
        own_weights = [self._sync.route.own_weights(each) for each in self._sync.slices]
        own_gradients = [self._sync.route.own_gradient(each) for each in self._sync.slices]
        with self.world.agreed("making the optimizer"):
            self._update = ShardOptimizer(
                optimizer, self._groups, self.layout, own_weights, own_gradients, self._sync.slices
            )
            use_norms_over_shards(self._update, self.world, self.layout, self._sync.gradients.shards)
        self.world.check_equal("the optimizer", self._update.describe(), LayoutError)

    def _allocate(self, make: Callable[[World], Synchronizer]) -> Synchronizer:
        try:
            return make(self.world)
        except SharedMemoryError as error:
            copies = 4 * self.layout.size * (self.world.local_size - 1)
            warn(
                f"no shared memory: {error}; every rank becomes a node of its own: {copies / 2**20:.0f} MiB more "
                "for weights on each machine, and gradients travel through MPI messages; raise the size of "
                "/dev/shm (in containers: --shm-size)"
            )
            self.world = self.world.without_shared_memory()
            return make(self.world)

    def _place_model(self, *, with_caches: bool) -> None:
        """Let the model live in the node's weights."""
        weights.place(self.world, self.model, self._parameters, self.layout, self.weights, with_caches=with_caches)
        self._sync.route.take_weights()
        self._buffers.take_base()

    def _make_rows(self) -> GradientRows:
        """Let autograd write into this rank's rows."""
        route, rows = self._sync.route, self._sync.gradients.rows
        spans = [bucket.span for bucket in route.buckets]
        made = GradientRows(self._parameters, self.layout, rows, spans, route.announce)
        made.open(0)
        return made

    def _make_gate(self) -> Gate | None:
        """Where weights come from other nodes, let modules wait for their own."""
        route = self._sync.route
        if not isinstance(route, Pipeline):
            return None
        return Gate(
            self.model, self._parameters, self.layout, [bucket.span for bucket in route.buckets], self._sync.wait
        )

    def _make_bucket_size(self, bucket_mb: float | None) -> BucketSize | None:
        route = self._sync.route
        if not isinstance(route, Pipeline):
            return None
        cells = route.exchange.shards.cells
        fixed = None if bucket_mb is None else round(bucket_mb * 2**20 / 4 / (cells[0][1] - cells[0][0] or 1))
        made = BucketSize(self.world, len(cells), fixed)
        self._set_bucket_size(made.value)
        return made

    # --- partitions -----------------------------------------------------------------------------------------------

    def reserve(self, assignment: Assignment) -> bool:
        """Make ready for iterations of an assignment of the same partitions, at any time between two. Collective.

        Some ranks may need more rows of gradients; those that were made stay.

        Returns:
            Whether there is room, the same on every rank; if not, `assignment` must not be used.
        """
        try:
            self._sync.reserve(assignment)
        except SharedMemoryError as error:
            warn(f"partitions stay where they are: no room for more rows of gradients: {error}")
            return False
        rows = self._sync.gradients.rows
        self._rows.extend(rows[self._rows.num_rows :])
        return True

    @property
    def moves_keep_bits(self) -> bool:
        """Whether results are the same to the last bit whoever computes which partition."""
        return self._sync.moves_keep_bits

    @property
    def waited_s(self) -> float:
        """Seconds, since `take_times`, in which forward and others waited for weights."""
        return self._sync.times.seconds["allgather"]

    def begin_partition(self, assignment: Assignment, partition: int) -> None:
        """Make ready for one partition's forward and backward: an empty row, the iteration's own buffers.

        A rank runs its partitions in ascending order.
        """
        start, stop = assignment.range_of(self.world.rank)
        self.begin(assignment)
        slot = len(tree.cover(assignment.num_partitions, start, partition))
        self._rows.open(slot, is_last=partition == stop - 1)
        self._buffers.reset()

    def begin(self, assignment: Assignment) -> None:
        """Make ready for an iteration, on every rank, also one without partitions. Collective, and never waits."""
        if self._sync.route.begin(assignment):
            self._rows.begin()

    def end_partition(
        self,
        assignment: Assignment,
        partition: int,
        loss_sum: float,
        weight: float,
        samples: int,
        flags: int = 0,
        seconds: float = 0.0,
        started: float = 0.0,
    ) -> None:
        """Report a partition whose gradient (of the loss *sum*) has been added, and merge rows as the tree allows.

        Args:
            assignment: as in `begin_partition`.
            partition: as in `begin_partition`.
            loss_sum: of its samples.
            weight: what the sum of all partitions' gradients is divided by the sum of.
            samples: how many it has.
            flags: what this rank has to tell all others, from `counters.FIRST_FREE` on.
            seconds: this rank's clock.
            started: seconds from the iteration's begin on this rank to the partition's.
        """
        flags |= 0 if self._close_row(weight) else fields.TOO_EARLY
        self._sync.counters.write(partition, loss_sum, weight, samples, flags, seconds, started)
        self._sync.merge_own_rows(assignment, partition, self._rows.slot)

    def drop_partition(
        self, assignment: Assignment, partition: int, flags: int = 0, seconds: float = 0.0, started: float = 0.0
    ) -> None:
        """Let a partition add zeros and weigh nothing, in place of begin_partition and end_partition.

        Nothing of its row is announced: what was expected of the iteration's last row is expected of the next one's.
        """
        start, _ = assignment.range_of(self.world.rank)
        self.begin(assignment)
        self._rows.open(len(tree.cover(assignment.num_partitions, start, partition)))
        self._rows.close()
        self._sync.changes.rows[self._rows.slot].fill(0)
        self._sync.counters.write(partition, 0.0, 0.0, 0, flags | fields.DROPPED, seconds, started)
        self._sync.merge_own_rows(assignment, partition, self._rows.slot)

    def _close_row(self, weight: float) -> bool:
        holds = self._rows.close()
        self._buffers.write_changes(self._sync.changes.rows[self._rows.slot], weight)
        new = {id(p): p for p in self.model.parameters() if p.requires_grad and id(p) not in self._trained}
        if new:
            name = next(name for name, parameter in self.model.named_parameters() if id(parameter) in new)
            raise LayoutError(
                f"parameter {name} was frozen, or not there, when the ParameterManager was made; make a new one to "
                "train it"
            )
        return holds

    def synchronize(
        self, assignment: Assignment, *, wait: bool = True, most_dropped: int | None = None
    ) -> NDArray[np.float64]:
        """Sum, update and share the weights, once every rank has ended its partitions. Collective.

        Args:
            assignment: the one that the partitions were begun with.
            wait: whether to return only when the weights are complete; else they are after `wait`, and until then
                each module's forward waits for its own.
            most_dropped: how many partitions may have been dropped; None: any number.

        Returns:
            float64, (num_partitions, 6): `counters.FIELDS` of every partition.

        Raises:
            NonFiniteLossError: on every rank, before anything was updated; names the partition.
            TooManyDroppedError: on every rank, before anything was updated: the iteration can be computed anew.
        """
        table = self._sync.synchronize(assignment, self._update, most_dropped)
        if self._gate is not None:
            self._gate.shut()
        self._rows.tell_autograd()
        if self._bucket_size is not None and self._bucket_size.observe():
            self.wait()
            self._set_bucket_size(self._bucket_size.value)
        if wait or not self.world.takes_threads:  # without a thread nothing travels while this rank does not wait
            self.wait()
        return table

    def _set_bucket_size(self, num_cells: int) -> None:
        route = self._sync.route
        assert isinstance(route, Pipeline)
        assert self._gate is not None
        route.set_bucket_size(num_cells)
        spans = [bucket.span for bucket in route.buckets]
        self._rows.set_buckets(spans)
        self._gate.set_buckets(spans)

    @property
    def bucket_bytes(self) -> int:
        """Bytes of float32 that are exchanged together, at the most."""
        return 4 * max(stop - start for start, stop in (bucket.span for bucket in self._sync.route.buckets))

    @property
    def is_settled(self) -> bool:
        """Whether buckets stay as large as they are."""
        return self._bucket_size is None or self._bucket_size.is_settled

    def wait(self) -> None:
        """Return when the weights, and what follows them, are complete on this rank's node. Not collective."""
        if self._gate is not None:
            self._gate.open()
        self._sync.route.wait()

    @property
    def runs_ahead(self) -> bool:
        """Whether weights may be under way when `synchronize(wait=False)` returns."""
        return self._gate is not None and self.world.takes_threads

    def reset_buffers(self) -> None:
        """Give the model's buffers the values they had when the iteration began. Not collective."""
        self._buffers.reset()

    # --- a loop of your own ---------------------------------------------------------------------------------------

    def step(self, num_samples: int | None = None, *, wait: bool = True) -> float:
        """Sum the gradients of all ranks, update the weights everywhere, zero the gradients. Collective.

        Every rank must call it equally often; a rank that has run out of data calls `step(num_samples=0)` until the
        result is 0 on all ranks.

        Args:
            num_samples: how many samples this rank's mean loss was over; the gradient is then the mean over all
                samples of all ranks. Default: every rank weighs the same. All ranks must do alike.
            wait: False: between nodes, weights may still arrive while the next forward runs; each module waits for its
                own when its forward begins. Whoever reads weights otherwise than through their module calls `wait`.

        Returns:
            The sum of all ranks' num_samples (the number of ranks by default); 0: nothing was updated.

        Raises:
            NonFiniteLossError: on every rank, with `clip_norm`: the gradient's norm is not finite. Nothing was updated;
                whoever goes on calls `zero_grad` first.
        """
        if self._accumulating:
            return 0.0
        if num_samples is not None and num_samples < 0:
            raise LayoutError(f"num_samples is {num_samples}; it must not be negative")
        weight = 1.0 if num_samples is None else float(num_samples)
        holds = self._close_row(weight)
        flags = fields.EQUAL_WEIGHTS if num_samples is None else 0
        if num_samples is not None:
            holds &= not self._rows.has_announced
            self._rows.scale(weight)
        flags |= 0 if holds else fields.TOO_EARLY
        self._sync.counters.write(self.world.rank, 0.0, weight, int(weight), flags)
        table = self.synchronize(self.assignment, wait=wait)
        self.begin(self.assignment)
        # Where the weight is told last, nothing can be sent before.
        self._rows.open(0, is_last=num_samples is None)
        self.world.activity.enter(activity.OWN_CODE, self.world.activity.iteration + 1)
        return float(table[:, fields.WEIGHT].sum())

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
        self._rows.open(0, is_last=self._rows.is_last)

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
        """The L2 norm of the last update's mean gradient over all parameters, before `clip_norm`. Not collective.

        It comes after the weights: after `step(wait=False)` it waits for all of them.
        """
        return self._sync.norm()

    # --- state ----------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> NDArray[np.float32]:
        """The node's copy of the weights, float32, (layout.size,)."""
        return self._sync.gradients.result

    @property
    def shard_runs(self) -> list[Piece]:
        """This rank's shard: elements [start, stop) of the flat vector, ascending.

        With the reduction "allreduce" every rank's is the whole vector.
        """
        return self._sync.gradients.shards.runs(self.world.rank)

    @property
    def is_replicated(self) -> bool:
        """Whether every rank's shard is the whole vector."""
        return self._sync.gradients.shards.is_replicated

    @property
    def group_names(self) -> list[list[str]]:
        """The names of each param group's parameters, in the order of torch's numbering."""
        return [list(names) for _, names in self._groups]

    @property
    def shard_optimizer(self) -> ShardOptimizer:
        """The optimizer of this rank's shard, with its state by name."""
        return self._update

    def shard_weight_pieces(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """This rank's shard of the weights, as the optimizer has them: (where a piece begins in it, values).

        Nothing is copied: weights have to be complete (`wait`), and the next update changes the values.
        """
        for each in self._sync.slices:
            yield each.offset, self._sync.route.own_weights(each)

    @property
    def updates_in_place(self) -> bool:
        """Whether the node's weights are what the optimizers update, not a rounded copy of it."""
        route = self._sync.route
        return not isinstance(route, Pipeline) or route.masters is None

    def shard_weights(self) -> NDArray[np.float32]:
        """A copy of this rank's shard of the weights, float32, (shard size,), as the optimizer has them."""
        return np.concatenate([np.empty(0, np.float32), *(values for _, values in self.shard_weight_pieces())])

    def set_shard_weights(self, values: NDArray[np.float32]) -> None:
        """Replace this rank's shard of the weights, as `shard_weights` gave it, on all nodes. Collective."""
        self.world.node_barrier()
        self._sync.route.forget()
        for each in self._sync.slices:
            self._sync.route.own_weights(each)[:] = values[each.own]
        self._sync.publish_all()
        self._buffers.take_base()

    @property
    def travelling_buffers(self) -> list[str] | None:
        """The names of the buffers that are averaged over ranks; None before the first iteration has ended."""
        return self._buffers.settled_names

    def buffer_values(self) -> dict[str, torch.Tensor]:
        """The persistent buffers at the last iteration's end, by name; not copied, and never written into."""
        return self._buffers.values()

    def restore_buffers(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take what `buffer_values` gave, before `set_shard_weights`. Not collective."""
        self._buffers.restore(values)

    def settle_buffers(self, names: list[str]) -> None:
        """Average these buffers from now on, as the run did whose checkpoint is loaded. Collective."""
        if self._buffers.settle(names):
            self._sync.lay_out_changes()

    def load_weights(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Replace weights and buffers on all ranks by rank 0's `state_dict`; the way to edit them. Collective.

        Raises:
            LayoutError: on every rank: names or shapes do not fit the model.
        """
        with self.world.agreed("loading weights"):
            if self.world.rank == 0:
                check_state_names(self.model, state_dict)
        self.wait()
        self.world.node_barrier()
        if self.world.rank == 0:
            self.model.load_state_dict(state_dict)
        self._place_model(with_caches=False)
        self.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The whole optimizer's state in torch's own format, on rank 0; {} on the others. Collective."""
        return full_state(self.world, self._update, self._groups, self.layout, self._sync.gradients.shards)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take rank 0's `state_dict`, on any number of ranks; the others may pass anything. Collective."""
        load_full_state(self.world, self._update, self._groups, self.layout, self._sync.gradients.shards, state)

    def take_times(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        return self._sync.times.take()

    def memory_bytes(self) -> dict[str, int]:
        """What this rank's part of the work takes, by what it is for; message buffers as far as any were needed yet."""
        return {
            "weights (one copy a node)": self.weights.nbytes,
            "gradient rows": sum(row.nbytes for row in self._sync.gradients.rows),
            **self._sync.route.exchange_bytes,
            "optimizer state, per element-wise tensor": 4 * self._update.shard_size,
        }

    def close(self) -> None:
        """Give every rank's model private copies of weights back, and let the shared memory go. Collective.

        A second call does nothing; anything else fails from here on.
        """
        if not hasattr(self, "_sync"):
            return
        self._release()
        del self._sync, self._rows, self._update, self._gate

    def abandon(self) -> None:
        """Let go of the model, after a rank was lost; its weights stay where they are. Not collective."""
        if getattr(self, "_gate", None) is not None:  # construction may have come to anywhere
            assert self._gate is not None
            self._gate.forget()
            self._gate.remove()
        if hasattr(self, "_rows"):
            self._rows.release()
        self._sync.abandon()

    def runs_of(self, rank: int) -> list[Piece]:
        """A rank's shard, as `shard_runs` has this rank's."""
        return self._sync.gradients.shards.runs(rank)

    def _release(self) -> None:
        """Give the model back what is its own. Collective."""
        if self._gate is not None:
            self._gate.remove()
        self._sync.close()
        self.world.node_barrier()
        weights.take_back(self._parameters)
        self._rows.release()
        self.world.node_barrier()
