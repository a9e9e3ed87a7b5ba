"""Partitions that move from group to group: no bit changes, rows are there when needed, and slow ranks get fewer."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpidl.planning
from mpidl.parameters import Assignment, ParameterManager
from mpidl.parameters.exchange import Exchange
from mpidl.runtime import SharedMemoryError, World
from tests.mpi import reference
from tests.mpi.cases import (
    ADAM,
    NUM_CLASSES,
    NUM_FEATURES,
    SGD,
    Kept,
    classes,
    dense,
    job_of,
    made,
    normalised,
    trainer_of,
)
from tests.mpi.test_trainer import assert_bits_of_the_oracle
from tests.mpi.worlds import as_the_world, node_layouts

pytestmark = pytest.mark.thorough


class Wanderer:
    """In the balancer's place: another assignment in every plan."""

    def __init__(self, assignment: Assignment, node_of: tuple[int, ...]) -> None:
        self._partitions, self._ranks = assignment.num_partitions, len(node_of)
        self._random = random.Random(str(node_of))
        self.confined = 0

    @property
    def assignment(self) -> Assignment:
        cuts = sorted(self._random.sample(range(1, self._partitions), self._ranks - 1))
        return Assignment(self._partitions, (0, *cuts, self._partitions))

    def observe(self, *_: Any, **__: Any) -> None:
        pass

    def confine(self, ran: Assignment) -> None:
        self.confined += 1


def test_assignments_that_change_with_every_group_change_no_bit_on_any_nodes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpidl.planning, "Balancer", Wanderer)
    data = classes(150)
    kept = Kept()
    options: dict[str, Any] = {"group_size": 1, "telemetry": kept, "balance": True}
    for sizes in node_layouts(world):
        with as_the_world(world, sizes):
            job = job_of(*data, optimizer=ADAM, partitions=13, batch_size=26, epochs=1)
            assert_bits_of_the_oracle(normalised, job, data, **options)
    if world.rank == 0 and world.size > 1:
        assert len({tuple(event["partition_starts"]) for event in kept.of("group") if "partition_starts" in event}) > 2


def test_the_mpi_reduction_and_those_measured_against_take_assignments_that_change(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpidl.planning, "Balancer", Wanderer)
    data = classes(64)
    job = job_of(*data, partitions=11, epochs=1)
    expected = made(dense)
    reference.train(expected, job)
    for reduction in ("mpi", "driver", "tree", "allreduce"):
        model = made(dense)
        with as_the_world(world, node_layouts(world)[0]):
            trainer = trainer_of(model, job, reduction=reduction, balance=True, group_size=1)
            trainer.fit(data, epochs=1)
            trainer.close()
        assert reference.largest_difference(model.state_dict(), expected.state_dict()) < 2e-6


@pytest.mark.parametrize("sizes_index", [0, -1])
def test_rows_are_made_when_an_assignment_needs_them_and_stay(world: World, sizes_index: int) -> None:
    with as_the_world(world, node_layouts(world)[sizes_index]) as other:
        small = Assignment(64, (*range(other.size), 64))
        rest = Assignment(64, (0, *(64 - other.size + rank + 1 for rank in range(other.size))))
        manager = ParameterManager(made(normalised), SGD, world=other, assignment=small)
        sizes = [manager.memory_bytes()["gradient rows"]]
        for assignment in (rest, small):
            assert manager.reserve(assignment)
            sizes.append(manager.memory_bytes()["gradient rows"])
            slots = max(small.num_slots(other.rank), assignment.num_slots(other.rank))
            assert sizes[-1] >= 4 * manager.layout.size * slots
        assert sizes[0] <= sizes[1] == sizes[2]
        manager.close()


def test_no_room_for_more_rows_costs_a_warning_and_no_bit(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(Exchange):
        def grow(self, num_slots: int) -> None:
            if self.num_slots:
                raise SharedMemoryError("16 MiB in /dev/shm: No space left on device")
            super().grow(num_slots)

    monkeypatch.setattr(mpidl.planning, "Balancer", Wanderer)
    monkeypatch.setattr("mpidl.parameters.synchronizer.Exchange", Full)
    data = classes(150)
    kept = Kept()
    job = job_of(*data, partitions=32)
    assert_bits_of_the_oracle(dense, job, data, group_size=1, telemetry=kept, balance=True)
    if world.rank == 0 and world.size > 1:
        assert "partitions stay where they are: no room" in capsys.readouterr().err


def test_a_replay_repeats_moves(world: World, monkeypatch: pytest.MonkeyPatch, shared_tmp_path: Path) -> None:
    monkeypatch.setattr(mpidl.planning, "Balancer", Wanderer)
    data = classes(96)
    job = job_of(*data, partitions=11, epochs=1)
    found = []
    for name, replay in (("first", None), ("again", shared_tmp_path / "first")):
        kept = Kept()
        trainer = trainer_of(
            made(dense), job, run_dir=shared_tmp_path / name, telemetry=kept, group_size=1, balance=True
        )
        trainer.fit(data, epochs=1, replay=replay)
        trainer.close()
        found.append([(event["iteration"], event.get("partition_starts")) for event in kept.of("group")])
    assert found[0] == found[1]
    if world.rank == 0 and world.size > 1:
        assert any(starts for _, starts in found[0])


class Waits(nn.Module):
    """Takes a given time for every sample."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.last = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds * len(inputs))
        outputs: torch.Tensor = self.last(inputs)
        return outputs


def test_a_rank_that_is_twice_as_slow_soon_has_fewer_partitions(world: World) -> None:
    slow, per_rank = world.size - 1, 4
    partitions = per_rank * world.size
    data = classes(partitions * 42)
    kept = Kept()
    model = Waits(0.01 * (1 + (world.rank == slow)))
    job = job_of(*data, batch_size=partitions, partitions=partitions, epochs=1)
    trainer = trainer_of(model, job, group_size=6, telemetry=kept)
    trainer.fit(data, epochs=1)
    trainer.close()
    if world.rank > 0:
        return
    groups, moves = kept.of("group"), kept.of("balance")
    if world.size == 1:
        assert moves == []
        return
    starts = next(event["partition_starts"] for event in reversed(groups) if "partition_starts" in event)
    counts = [stop - start for start, stop in itertools.pairwise(starts)]
    assert counts[slow] <= {2: 3, 3: 2, 4: 2}.get(world.size, 2)
    assert max(counts[:slow]) <= 5
    assert groups[-1]["iteration"] == 42
    told = moves[0]["rank"]
    assert told == slow or world.size == 2  # of two, either differs from the other
    assert moves[0]["speed"] == pytest.approx(0.5 if told == slow else 2.0, rel=0.4)
    assert f"rank {told} (" in moves[0]["message"]


def test_what_would_change_bits_is_not_moved_unless_it_is_asked_for(world: World) -> None:
    with as_the_world(world, (1,) * world.size) as other:
        for options, keeps in (
            ({"wire": "float32"}, True),
            ({"wire": "bfloat16"}, world.size == 1),
            ({"reduction": "mpi"}, world.size == 1),
            ({"reduction": "allreduce"}, False),
        ):
            manager = ParameterManager(made(dense), SGD, world=other, **options)
            assert manager.moves_keep_bits is keeps
            manager.close()
