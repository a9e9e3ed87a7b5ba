"""Ways to synchronise: gradients of all ranks added, weights updated, the new weights visible on every rank.

Each is given gradients before a run, outside the timed part, where autograd would have put them; its run is what
follows a backward pass. Zeroing gradients is a part of mpidl's `step` and not of the others' runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, distributed, nn

from mpidl.bench import horovod
from mpidl.bench.cases import Exchanged, Optimizer
from mpidl.bench.limits import FLOAT_BYTES, ring_bytes, sent_bytes
from mpidl.parameters import ParameterManager
from mpidl.runtime import Pending, World

_BUCKET_SIZE = 25 * 2**20 // FLOAT_BYTES
"""Elements that travel together: DistributedDataParallel's default of 25 MiB."""


@dataclasses.dataclass(frozen=True)
class RankBytes:
    """What a rank keeps, its part of what ranks share included; reckoned from sizes."""

    weights: float
    gradients: float
    state: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.state


class Way(Protocol):
    """One way over one `Exchanged`. Construction and all calls but `kept` are collective."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The weights, as this rank sees them."""

    @property
    def sent_bytes(self) -> float:
        """What an average rank sends in messages, reckoned for the algorithm that sends least."""

    def prepare(self) -> None:
        """Put this rank's gradients where autograd would."""

    def run(self) -> None:
        """Add, update, make visible."""

    def kept(self) -> RankBytes:
        """What this rank keeps."""

    def close(self) -> None:
        """Let it go."""


class Mpidl:
    """mpidl's ParameterManager."""

    def __init__(self, world: World, exchanged: Exchanged, *, reduction: str) -> None:
        self.parameters = exchanged.parameters()
        self._given, self._num_states = exchanged.gradients, exchanged.optimizer.num_states
        model = nn.ParameterList(self.parameters)
        self._manager = ParameterManager(model, exchanged.optimizer.factory, world=world, reduction=reduction)
        self.sent_bytes = sent_bytes(world, exchanged.size, reduction=reduction)

    def prepare(self) -> None:
        """Let autograd give every parameter its gradient, as the end of a backward pass does."""
        torch.autograd.backward(self.parameters, self._given)

    def run(self) -> None:
        """One step."""
        self._manager.step()

    def kept(self) -> RankBytes:
        """As the manager tells it; the weights are one copy a node."""
        found = {"weights": 0.0, "optimizer state": 0.0, "": 0.0}
        for name, num_bytes in self._manager.memory_bytes().items():
            found[next(start for start in found if name.startswith(start))] += num_bytes
        weights = found["weights"] / self._manager.world.local_size
        return RankBytes(weights, found[""], found["optimizer state"] * self._num_states)

    def close(self) -> None:
        """Close the manager."""
        self._manager.close()


class MpiAllreduce:
    """MPI_Allreduce of one flat vector, and torch's optimizer of all parameters on every rank."""

    def __init__(self, world: World, exchanged: Exchanged) -> None:
        self.parameters = exchanged.parameters()
        self._given, self._world, self._num_states = exchanged.gradients, world, exchanged.optimizer.num_states
        self._own, self._mine = flat_views(self.parameters)
        self._sum, views = flat_views(self.parameters)
        set_gradients(self.parameters, views)
        self._optimizer = exchanged.optimizer.factory(self.parameters)
        self.sent_bytes = ring_bytes(world, exchanged.size)

    def prepare(self) -> None:
        """Fill the vector that is sent."""
        _fill(self._mine, self._given)

    def run(self) -> None:
        """Add over ranks, divide, update everything."""
        allreduce(self._world, self._own, self._sum)
        self._optimizer.step()

    def kept(self) -> RankBytes:
        """Everything, and the gradients twice: own ones and their sum."""
        size = FLOAT_BYTES * self._own.numel()
        return RankBytes(size, 2 * size, size * self._num_states)

    def close(self) -> None:
        """Nothing to do."""


class GlooAllreduce:
    """What DistributedDataParallel does over gloo after a backward pass: buckets added, all parameters updated.

    The gradients are views of the buckets, as with gradient_as_bucket_view=True.
    """

    def __init__(self, world: World, exchanged: Exchanged) -> None:
        self.parameters = exchanged.parameters()
        self._given, self._world, self._num_states = exchanged.gradients, world, exchanged.optimizer.num_states
        self._flat, self._mine = flat_views(self.parameters)
        set_gradients(self.parameters, self._mine)
        self._optimizer = self._make_optimizer(exchanged)
        self.sent_bytes = ring_bytes(world, exchanged.size)

    def _make_optimizer(self, exchanged: Exchanged) -> torch.optim.Optimizer:
        return exchanged.optimizer.factory(self.parameters)

    def prepare(self) -> None:
        """Fill the buckets."""
        _fill(self._mine, self._given)

    def run(self) -> None:
        """Add bucket by bucket, divide, update."""
        buckets = self._flat.split(_BUCKET_SIZE)
        under_way = [distributed.all_reduce(bucket, async_op=True) for bucket in buckets]
        for bucket, work in zip(buckets, under_way, strict=True):
            work.wait()
            bucket.div_(self._world.size)
        self._optimizer.step()

    def kept(self) -> RankBytes:
        """Everything once."""
        size = FLOAT_BYTES * self._flat.numel()
        return RankBytes(size, size, size * self._num_states)

    def close(self) -> None:
        """Nothing to do."""


class GlooZero(GlooAllreduce):
    """The same sums with torch's ZeroRedundancyOptimizer: each rank updates some parameters and broadcasts them."""

    def __init__(self, world: World, exchanged: Exchanged) -> None:
        super().__init__(world, exchanged)
        self.sent_bytes = 1.5 * ring_bytes(world, exchanged.size)

    def _make_optimizer(self, exchanged: Exchanged) -> torch.optim.Optimizer:
        return zero_optimizer(self.parameters, exchanged.optimizer)

    def kept(self) -> RankBytes:
        """A rank's part of the state only."""
        kept = super().kept()
        return dataclasses.replace(kept, state=kept.state / self._world.size)


class Horovod(GlooAllreduce):
    """What Horovod's DistributedOptimizer does: every gradient by itself, in Horovod's buffers, then the update."""

    def prepare(self) -> None:
        """Start Horovod, fill the gradients."""
        self._horovod = horovod.start()
        super().prepare()

    def run(self) -> None:
        """Average all gradients, update."""
        under_way = [
            self._horovod.allreduce_async_(gradient, name=f"gradient {index}", op=self._horovod.Average)
            for index, gradient in enumerate(self._mine)
        ]
        for handle in under_way:
            self._horovod.synchronize(handle)
        self._optimizer.step()


class _MakesWay(Protocol):
    def __call__(self, world: World, exchanged: Exchanged) -> Way: ...


WAYS: dict[str, _MakesWay] = {
    "mpidl-ordered": functools.partial(Mpidl, reduction="ordered"),
    "mpidl-mpi": functools.partial(Mpidl, reduction="mpi"),
    "mpidl-driver": functools.partial(Mpidl, reduction="driver"),
    "mpidl-tree": functools.partial(Mpidl, reduction="tree"),
    "mpidl-allreduce": functools.partial(Mpidl, reduction="allreduce"),
    "mpi-allreduce": MpiAllreduce,
    "ddp-gloo": GlooAllreduce,
    "zero-gloo": GlooZero,
    "horovod": Horovod,
}
"""All ways by name."""


def flat_views(parameters: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A flat vector of zeros, float32, as long as all parameters, and a view of it for each of them."""
    parameters = list(parameters)
    flat = torch.zeros(sum(parameter.numel() for parameter in parameters))
    parts = flat.split([parameter.numel() for parameter in parameters])
    return flat, [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]


def set_gradients(parameters: Iterable[Tensor], gradients: Iterable[Tensor]) -> None:
    """Make these the parameters' gradients."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def allreduce(world: World, own: Tensor, total: Tensor) -> None:
    """Write the mean of all ranks' `own` into `total` with MPI_Allreduce. Collective.

    MPI's blocking call, or where ranks share cores the other one, waited for without spinning: the faster one there.
    """
    send, receive = own.numpy(), total.numpy()
    if world.shares_cores:
        Pending(world.comm.Iallreduce(send, receive), world.shares_cores).wait()
    else:
        world.comm.Allreduce(send, receive)
    total.div_(world.size)


def zero_optimizer(parameters: Iterable[Tensor], optimizer: Optimizer) -> torch.optim.Optimizer:
    """ZeroRedundancyOptimizer at its fastest setting: parameters are broadcast in buckets, not one by one."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(
        list(parameters), optimizer.kind, parameters_as_bucket_view=True, **optimizer.options
    )


def _fill(gradients: Iterable[Tensor], given: Iterable[Tensor]) -> None:
    for gradient, values in zip(gradients, given, strict=True):
        gradient.copy_(values)
