"""The times of a group name what took them: each part is made slow in turn, and its own time has to grow by that."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import mpidl
from mpidl.runtime import World
from mpidl.telemetry import Telemetry

pytestmark = pytest.mark.thorough

SAMPLES, BATCH_SIZE, PARTITIONS, EPOCHS = 16, 8, 4, 2
ITERATIONS = EPOCHS * SAMPLES // BATCH_SIZE
NAP_S = 0.03
"""Long beside what a scheduler does to a process that shares its core."""


class Groups(Telemetry):
    """Adds up the phases of all groups."""

    def __init__(self) -> None:
        super().__init__(None, quiet=True)
        self.phases: dict[str, float] = {}

    def record(self, event: str, **fields: Any) -> None:
        if event == "group":
            for name, seconds in fields["phases"].items():
                self.phases[name] = self.phases.get(name, 0.0) + seconds


class Numbers(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, nap_s: float) -> None:
        self._nap_s = nap_s

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(self._nap_s)
        return torch.full((4,), float(index)), index % 3


class Napping(nn.Module):
    def __init__(self, nap_s: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self._nap_s = nap_s

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(self._nap_s)
        result: torch.Tensor = self.linear(inputs)
        return result


class Slow(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        time.sleep(NAP_S)
        return super().step(closure)


def phases_of(world: World, slow: str, rank: int | None = None) -> dict[str, float]:
    """Seconds by phase over a training, the mean of all ranks; on rank 0, {} elsewhere."""
    nap_s = NAP_S if rank in (None, world.rank) else 0.0
    groups = Groups()
    trainer = mpidl.Trainer(
        Napping(nap_s if slow == "compute" else 0.0),
        F.cross_entropy,
        (lambda groups: Slow(groups, lr=0.1)) if slow == "update" else (lambda groups: torch.optim.SGD(groups, lr=0.1)),
        batch_size=BATCH_SIZE,
        partitions=PARTITIONS,
        threads_per_rank=1,
        telemetry=groups,
    )
    trainer.fit(Numbers(nap_s if slow == "load" else 0.0), epochs=EPOCHS)
    trainer.close()
    return groups.phases


@pytest.mark.parametrize(
    ("slow", "naps_of_all"),
    [
        ("load", SAMPLES * EPOCHS),
        ("compute", PARTITIONS * ITERATIONS),
    ],
)
def test_what_is_divided_over_ranks_takes_each_its_share(world: World, slow: str, naps_of_all: int) -> None:
    phases = phases_of(world, slow)
    if phases:
        phases["load"] += phases["loader_start"]  # the first one's
        assert phases[slow] >= NAP_S * naps_of_all / world.size


def test_an_optimizer_s_step_is_the_update(world: World) -> None:
    phases = phases_of(world, "update")
    if phases:
        assert phases["update"] >= NAP_S * ITERATIONS


def test_a_slow_rank_is_what_the_others_wait_for(world: World) -> None:
    if world.size == 1:
        pytest.skip("nobody to wait for")
    phases = phases_of(world, "compute", rank=world.size - 1)
    if phases:
        of_slow = NAP_S * ITERATIONS * PARTITIONS // world.size
        waits = phases["wait"] + phases["reduce_scatter"] + phases["allgather"]
        assert phases["compute"] >= of_slow / world.size
        assert waits >= of_slow * (world.size - 1) / world.size / 4
