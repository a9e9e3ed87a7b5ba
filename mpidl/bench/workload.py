"""What an iteration of a model is made of, for a number of nodes: from tensors' sizes to buckets with their times.

Forward's and backward's times are measured ones, or given. They are dealt out to the layers by the multiplications and
additions that these need, counted by a forward pass on torch's meta device, which has no numbers. A tensor's gradient
is ready when backward has come past its layer, its weights are needed when forward comes to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import nn

from mpidl import kernels
from mpidl.parameters import WIRES, Assignment, FlatLayout, Shards
from mpidl.parameters.counters import FIELDS
from mpidl.scheduling import most_rows, most_sent
from mpidl.simulation import THROTTLE, Collective, Iteration, Part

_FLOAT_BYTES = 4
_UPDATE_BYTES = 20
"""Of memory, for each element: SGD reads the mean, reads and writes weight and moment."""
_COPY_BYTES = 8
"""Of memory, for each element that is copied, or divided into another place."""
_COUNTERS_BYTES = 8 * len(FIELDS)
"""Of a partition."""


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """A module with parameters of its own."""

    names: tuple[str, ...]
    """Its parameters."""
    operations: float
    """Multiplications of its forward pass, of one sample."""


def layer_costs(model: nn.Module) -> list[LayerCost]:
    """The model's layers, in the order in which forward comes to them.

    Args:
        model: on the meta device, with `image_shape`.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    costs: dict[nn.Module, list[float]] = {}

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        weights = max(parameter.numel() for parameter in module.parameters(recurse=False))
        channels = output.shape[1]
        costs.setdefault(module, []).append(weights * output[0].numel() / channels)

    layers = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    hooks = [module.register_forward_hook(count) for module in layers]
    shape: tuple[int, ...] = model.image_shape  # type: ignore[assignment]
    model.train()
    model(torch.empty(2, *shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return [
        LayerCost(tuple(names[id(p)] for p in module.parameters(recurse=False)), sum(operations))
        for module, operations in costs.items()
    ]


@dataclasses.dataclass(frozen=True)
class Machine:
    """A node and its software, as measured."""

    ranks_per_node: int = 1
    partitions_per_rank: int = 1
    memory_bytes_s: float = 10e9
    """Bytes that a rank's kernels read and write in a second."""
    update_bytes_s: float = 10e9
    """Bytes that its optimizer reads and writes in a second."""
    shard_s: float = 2e-5
    """Of the exchange's thread, for each other rank's piece of a bucket that it adds up for a message."""
    poll_s: float = 5e-4
    """Until the exchange's thread sees that an exchange is over."""
    throttle: int = THROTTLE

    @property
    def peers(self) -> int:
        """Nodes that a rank sends to at a time: it walks over all ranks, of which only its column's get something."""
        return self.throttle and max(1, self.throttle // self.ranks_per_node)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model's training, apart from where it runs."""

    layout: FlatLayout
    layers: Sequence[LayerCost]
    forward_s: float
    backward_s: float
    changes_size: int = 0
    """Elements of the buffers that travel."""

    @classmethod
    def of(cls, model: nn.Module, forward_s: float, backward_s: float) -> Workload:
        """Of a model on the meta device."""
        layout = FlatLayout.of((name, p.shape) for name, p in model.named_parameters() if p.requires_grad)
        changes_size = sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())
        return cls(layout, layer_costs(model), forward_s, backward_s, changes_size)

    @property
    def operations(self) -> float:
        """Multiplications of one sample's forward pass."""
        return math.fsum(layer.operations for layer in self.layers)

    def cell_size(self, num_nodes: int, machine: Machine) -> int:
        """Elements of all cells but the last."""
        start, stop = self._shards(num_nodes, machine).cells[0]
        return stop - start

    def num_cells(self, num_nodes: int, machine: Machine) -> int:
        """Cells that the vector is dealt out in."""
        return len(self._shards(num_nodes, machine).cells)

    def _shards(self, num_nodes: int, machine: Machine) -> Shards:
        world_size = num_nodes * machine.ranks_per_node
        return Shards.of(self.layout.size, world_size, kernels.BLOCK_SIZE, num_cells=None if num_nodes > 1 else 1)

    def iteration(
        self,
        num_nodes: int,
        machine: Machine,
        *,
        reduction: str = "ordered",
        wire: str = "float32",
        cells_per_bucket: int = 4,
        assignment: Assignment | None = None,
    ) -> Iteration:
        """The same on a number of nodes: buckets with their messages, and the thread's and the owners' work.

        Args:
            num_nodes: all alike.
            machine: each of them.
            reduction: "ordered" or "mpi".
            wire: "float32" or "bfloat16".
            cells_per_bucket: that are exchanged together.
            assignment: who computes which partitions; None: all as many.
        """
        shards = self._shards(num_nodes, machine)
        ready, needed = self._times()
        deal = _Deal.of(num_nodes, machine, reduction, WIRES[wire].dtype().itemsize, assignment)
        own_counters = _COUNTERS_BYTES * machine.ranks_per_node * machine.partitions_per_rank
        parts = []
        for first in range(0, len(shards.cells), cells_per_bucket):
            cells = range(first, min(first + cells_per_bucket, len(shards.cells)))
            span = shards.cells[cells[0]][0], shards.cells[cells[-1]][1]
            slots = {slot.name for slot, _, _ in self.layout.tensors_in(span)}
            own = [_largest_piece(shards, machine.ranks_per_node, [cell]) for cell in cells]
            part = deal.part(span[1] - span[0], own)
            ready_s, needed_s = (max(ready[name] for name in slots), min(needed[name] for name in slots))
            parts.append(dataclasses.replace(part, ready_s=ready_s, needed_s=needed_s))
        return Iteration(
            self.forward_s,
            self.backward_s,
            tuple(parts),
            changes=self._changes(num_nodes, machine, deal),
            counters=None if deal.is_ordered else Collective("allgather", num_nodes, own_counters),
            squares=Collective("allgather", num_nodes, 8 * self.layout.size / kernels.BLOCK_SIZE / num_nodes),
            poll_s=machine.poll_s,
        )

    def _changes(self, num_nodes: int, machine: Machine, deal: _Deal) -> Part | None:
        """One cell in blocks, which may be fewer than nodes."""
        if not self.changes_size:
            return None
        world_size = num_nodes * machine.ranks_per_node
        shards = Shards.of(self.changes_size, world_size, kernels.BLOCK_SIZE, num_cells=1)
        return deal.uneven(self.changes_size, _largest_piece(shards, machine.ranks_per_node, [0]))

    def _times(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds after backward's start when each gradient is ready; after forward's when weights are needed."""
        total = self.operations
        ready, needed, done = {}, {}, 0.0
        for layer in self.layers:
            for name in layer.names:
                needed[name] = self.forward_s * done / total
                ready[name] = self.backward_s * (1 - done / total)
            done += layer.operations
        for slot in self.layout.slots:  # what forward never came to has no gradient to wait for
            needed.setdefault(slot.name, 0.0)
            ready.setdefault(slot.name, 0.0)
        return ready, needed


def _largest_piece(shards: Shards, ranks_per_node: int, cells: Sequence[int]) -> int:
    """Elements that the node with the most owns of some cells."""
    of_rank = [sum(pieces[cell][1] - pieces[cell][0] for cell in cells) for pieces in shards.pieces]
    return max(sum(of_rank[first : first + ranks_per_node]) for first in range(0, len(of_rank), ranks_per_node))


@dataclasses.dataclass(frozen=True)
class _Deal:
    """How a bucket's work and messages follow from its size."""

    num_nodes: int
    machine: Machine
    is_ordered: bool
    word_bytes: int
    rows: int
    """That the ranks of a node add up, on the node with the most."""
    sent_rows: int
    """That a node sends, of the one that sends most: its ranks' added up as far as the tree allows."""

    @classmethod
    def of(
        cls, num_nodes: int, machine: Machine, reduction: str, word_bytes: int, assignment: Assignment | None
    ) -> _Deal:
        """With the rows of an assignment."""
        world_size = num_nodes * machine.ranks_per_node
        given = assignment or Assignment.even(machine.partitions_per_rank * world_size, world_size)
        node_of = [rank // machine.ranks_per_node for rank in range(world_size)]
        is_ordered = reduction == "ordered"
        rows = most_rows(given, node_of)
        return cls(num_nodes, machine, is_ordered, word_bytes, rows, most_sent(given, node_of) if is_ordered else 1)

    def part(self, size: int, own: Sequence[int]) -> Part:
        """A bucket; its times in the iteration are still to be filled in.

        Args:
            size: its elements.
            own: the most that a node owns of each of its cells.
        """
        machine, nodes = self.machine, self.num_nodes
        word = self.word_bytes if self.is_ordered else _FLOAT_BYTES
        elements = size / machine.ranks_per_node  # that a rank adds up, for others nearly all of them
        node_own = sum(own)
        rank_own = node_own / machine.ranks_per_node
        received = (nodes - 1) * self.sent_rows * word
        added = _FLOAT_BYTES * (self.rows + 1) + received if self.is_ordered else _COPY_BYTES  # `mpi` has added itself
        kind = "alltoall" if self.is_ordered else "reduce_scatter"
        spread = own if self.word_bytes == _FLOAT_BYTES else [node_own]  # rounded weights travel as one message
        return Part(
            pack_s=self._memory_s(elements * (_FLOAT_BYTES * self.rows + self.sent_rows * word))
            + machine.shard_s * (nodes - 1),
            add_s=self._memory_s(rank_own * added),
            update_s=self._memory_s(rank_own * _COPY_BYTES) + rank_own * _UPDATE_BYTES / machine.update_bytes_s,
            reduce=Collective(kind, nodes, self.sent_rows * node_own * word, machine.peers),
            publish=tuple(Collective("alltoall", nodes, each * self.word_bytes, machine.peers) for each in spread),
        )

    def uneven(self, size: int, most: int) -> Part:
        """A vector of float32 in one piece a rank, of which nodes own up to `most` elements, or none."""
        part = dataclasses.replace(self, word_bytes=_FLOAT_BYTES).part(size, [most])
        reduce, *publish = [
            dataclasses.replace(
                each, num_bytes=each.num_bytes * size / (most * self.num_nodes), busiest_bytes=each.num_bytes
            )
            for each in (part.reduce, *part.publish)
        ]
        return dataclasses.replace(part, reduce=reduce, publish=tuple(publish))

    def _memory_s(self, num_bytes: float) -> float:
        return num_bytes / self.machine.memory_bytes_s
