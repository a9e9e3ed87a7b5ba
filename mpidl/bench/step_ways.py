"""Ways to train: one model each, and what follows a backward pass."""

from __future__ import annotations

import functools
import time
import warnings
from typing import Any, Protocol

from torch import nn

from mpidl.bench import horovod
from mpidl.bench.cases import Optimizer
from mpidl.bench.exchange_ways import allreduce, flat_views, set_gradients, zero_optimizer
from mpidl.bench.limits import ring_bytes, sent_bytes
from mpidl.parameters import ParameterManager
from mpidl.runtime import World

PHASES = ("data", "forward", "backward", "communication", "update", "wait")
"""Of an iteration. Data is waiting for a batch, which is made ahead. Communication that runs during backward is a
part of that phase; ZeroRedundancyOptimizer's broadcasts are a part of its update; only mpidl tells waiting for other
ranks apart from communication."""


LOCAL_SUM = "local_sum"
"""The part of communication in which mpidl's kernels add up rows in memory."""


class Clock:
    """Seconds by phase, and of a part of one; a lap ends a phase."""

    def __init__(self) -> None:
        self.seconds = self._zeros()
        self._last = 0.0

    def start(self) -> None:
        """Begin an iteration."""
        self._last = time.perf_counter()

    def lap(self, phase: str, **inside: float) -> None:
        """Add the time since the last lap to a phase; `inside` are seconds of it that belong to others."""
        now = time.perf_counter()
        for other, seconds in inside.items():
            self.seconds[other] += seconds
        self.seconds[phase] += now - self._last - sum(inside.values())
        self._last = now

    def take(self) -> dict[str, float]:
        """The seconds since the last call, which begin anew."""
        taken, self.seconds = self.seconds, self._zeros()
        return taken

    @staticmethod
    def _zeros() -> dict[str, float]:
        return dict.fromkeys((*PHASES, LOCAL_SUM), 0.0)


class Way(Protocol):
    """One way to train one model. Construction and all calls are collective, as the first forward pass may be."""

    module: nn.Module
    """What the batch goes through."""
    sent_bytes: float
    """What an average rank sends in messages in an iteration, reckoned for the algorithm that sends least."""

    def prepare(self) -> None:
        """What has to be done before some iterations and is not timed."""

    def finish(self, clock: Clock) -> None:
        """All that follows a backward pass, with laps: in the end new weights, and no gradients."""

    def end(self) -> None:
        """Complete what is under way after the last of some iterations."""

    def close(self) -> None:
        """Let it go."""


class Alone:
    """Plain torch on each rank, at the same time and without any exchange: what compute needs here."""

    def __init__(self, world: World, model: nn.Module, optimizer: Optimizer) -> None:
        self.module = model
        self.sent_bytes = 0.0
        self._optimizer = optimizer.factory(model.parameters())

    def prepare(self) -> None:
        """Nothing."""

    def finish(self, clock: Clock) -> None:
        """Update."""
        self._optimizer.step()
        self._optimizer.zero_grad()
        clock.lap("update")

    def end(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing to do."""


class Mpidl:
    """mpidl's ParameterManager, with any of its settings."""

    def __init__(self, world: World, model: nn.Module, optimizer: Optimizer, **settings: Any) -> None:
        self.module = model
        self.manager = ParameterManager(model, optimizer.factory, world=world, **settings)
        self.sent_bytes = sent_bytes(world, num_elements(model), reduction=settings["reduction"], wire=settings["wire"])

    def prepare(self) -> None:
        """Nothing."""

    def finish(self, clock: Clock) -> None:
        """One step, which zeroes the gradients as well."""
        self.manager.step(wait=False)  # as the Trainer does
        times = self.manager.take_times()
        clock.lap("communication", update=times["update"], wait=times["wait"])
        clock.seconds[LOCAL_SUM] += times["local_sum"]

    def end(self) -> None:
        """Wait for the weights."""
        self.manager.wait()

    def close(self) -> None:
        """Close the manager."""
        self.manager.close()


class MpiAllreduce:
    """MPI_Allreduce of one flat vector after backward, and torch's optimizer of all parameters on every rank."""

    def __init__(self, world: World, model: nn.Module, optimizer: Optimizer) -> None:
        self.module = model
        self.sent_bytes = ring_bytes(world, num_elements(model))
        self._world, self._parameters = world, list(model.parameters())
        self._own, self._mine = flat_views(self._parameters)
        self._sum, self._means = flat_views(self._parameters)
        set_gradients(self._parameters, self._mine)
        self._optimizer = optimizer.factory(self._parameters)

    def prepare(self) -> None:
        """Nothing."""

    def finish(self, clock: Clock) -> None:
        """Add over ranks, update everything."""
        allreduce(self._world, self._own, self._sum)
        clock.lap("communication")
        set_gradients(self._parameters, self._means)
        self._optimizer.step()
        self._own.zero_()
        set_gradients(self._parameters, self._mine)
        clock.lap("update")

    def end(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing to do."""


class Ddp(Alone):
    """DistributedDataParallel over gloo at its fastest: gradients live in the buckets, buffers are not broadcast."""

    def __init__(self, world: World, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(world, model, optimizer)
        self.module = _distributed(model)
        self.sent_bytes = ring_bytes(world, num_elements(model))


class DdpZero(Alone):
    """The same with ZeroRedundancyOptimizer."""

    def __init__(self, world: World, model: nn.Module, optimizer: Optimizer) -> None:
        self.module = _distributed(model)
        self.sent_bytes = 1.5 * ring_bytes(world, num_elements(model))  # it broadcasts the weights, too
        self._optimizer = zero_optimizer(model.parameters(), optimizer)


class Horovod(Alone):
    """Horovod's DistributedOptimizer, which adds gradients from backward on."""

    def __init__(self, world: World, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(world, model, optimizer)
        self.sent_bytes = ring_bytes(world, num_elements(model))
        names = model.named_parameters()
        self._distributed = horovod.start().DistributedOptimizer(self._optimizer, named_parameters=names)

    def prepare(self) -> None:
        """Start Horovod."""
        horovod.start()

    def finish(self, clock: Clock) -> None:
        """Wait for the sums, update."""
        self._distributed.synchronize()
        clock.lap("communication")
        with self._distributed.skip_synchronize():
            self._distributed.step()
        self._distributed.zero_grad()
        clock.lap("update")


class MakesWay(Protocol):
    """How a way is made of a model. Collective."""

    def __call__(self, world: World, model: nn.Module, optimizer: Optimizer) -> Way:
        """Make it."""
        ...


ONE = "one process"
ALONE = "compute alone"
ORDERED = "mpidl-ordered"

MPIDL: dict[str, dict[str, Any]] = {
    ORDERED: {"reduction": "ordered", "wire": "float32"},
    "mpidl-bfloat16": {"reduction": "ordered", "wire": "bfloat16"},
    "mpidl-mpi": {"reduction": "mpi", "wire": "float32"},
    "mpidl-driver": {"reduction": "driver", "wire": "float32"},
    "mpidl-tree": {"reduction": "tree", "wire": "float32"},
    "mpidl-allreduce": {"reduction": "allreduce", "wire": "float32"},
}
"""The ParameterManager's settings of each of its ways."""

WAYS: dict[str, MakesWay] = {
    **{name: functools.partial(Mpidl, **settings) for name, settings in MPIDL.items()},
    "mpi-allreduce": MpiAllreduce,
    "ddp-gloo": Ddp,
    "zero-gloo": DdpZero,
    "horovod": Horovod,
}
"""All ways by name, but for `Alone`, which is always measured beside them: on all ranks at a time, and on one."""

ROUNDING = {"mpidl-bfloat16"}
"""Ways whose weights lose digits where they travel."""


def num_elements(model: nn.Module) -> int:
    """Of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _distributed(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():  # newer releases of torch call broadcast_buffers by another name
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
