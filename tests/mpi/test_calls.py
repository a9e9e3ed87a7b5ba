"""What a training says to MPI: two small collectives a group, and inside it nothing but the exchange."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from mpidl.runtime import World
from mpidl.runtime.calls import Key
from mpidl.telemetry import Telemetry
from tests.mpi.cases import classes, dense, job_of, made, trainer_of
from tests.mpi.worlds import as_the_world, node_layouts

pytestmark = pytest.mark.thorough

BATCH_SIZE = 16
IN_ITERATIONS = "exchange"


class Listening(Telemetry):
    """Takes what was called down whenever a group has been recorded."""

    def __init__(self, world: World) -> None:
        super().__init__(None, quiet=True)
        self.world = world
        self.totals: list[Counter[Key]] = []

    def record(self, event: str, **fields: object) -> None:
        if event in ("start", "group"):
            self.totals.append(self.world.calls.total())


def calls_of_groups(world: World, iterations: int, group_size: int) -> list[Counter[Key]]:
    """What rank 0 called for each group of a training of one epoch, by name and purpose."""
    job = job_of(*classes(BATCH_SIZE * iterations), batch_size=BATCH_SIZE, epochs=1, partitions=8)
    telemetry = Listening(world)
    options = {"group_size": group_size, "telemetry": telemetry, "bucket_mb": 1.0}
    trainer = trainer_of(made(dense), job, balance=False, **options)  # a rank that gets more work may need more rows
    trainer.fit(classes(BATCH_SIZE * iterations), epochs=1)
    trainer.close()
    totals: list[Counter[Key]] = world.broadcast_object(telemetry.totals)
    return [after - before for before, after in itertools.pairwise(totals)]


@pytest.mark.parametrize("group_size", [1, 3, 7])
def test_a_group_takes_one_plan_and_one_report_and_nothing_else_for_any_of_its_iterations(
    world: World, group_size: int
) -> None:
    num_groups = 4
    for sizes in node_layouts(world)[:2]:
        with as_the_world(world, sizes) as other:
            calls = calls_of_groups(other, group_size * num_groups, group_size)
            control = [{key: n for key, n in each.items() if key[1] != IN_ITERATIONS} for each in calls]
            plan, report = {("Ibcast", "plan"): 1}, {("Igather", "report"): 1}
            # The first group has its own plan and the next one's, the last one none that would follow.
            assert control == [{("Ibcast", "plan"): 2, **report}, *[plan | report] * (num_groups - 2), report]


def test_the_exchange_takes_as_many_calls_for_an_iteration_whatever_the_group_size(world: World) -> None:
    per_iteration = []
    for group_size in (2, 6):
        middle = calls_of_groups(world, 3 * group_size, group_size)[1]
        exchange = {key: number for key, number in middle.items() if key[1] == IN_ITERATIONS}
        assert exchange, "the exchange is counted"
        per_iteration.append({key: number / group_size for key, number in exchange.items()})
    assert per_iteration[0] == per_iteration[1]


def test_every_collective_counts_once_by_its_name_and_purpose(world: World) -> None:
    array = np.zeros(2 * world.size)
    counts = [2] * world.size
    offsets = list(range(0, 2 * world.size, 2))
    before = world.calls.total()
    view = world.for_purpose("listed")
    view.barrier()
    view.node_barrier()
    view.broadcast(array)
    view.allreduce(array)
    view.allgather(array)
    view.allgather_varying(array[:2], counts)
    view.gather(array)
    view.alltoall_varying(array, counts, offsets, np.zeros(2 * world.size), counts, offsets)
    view.start_reduce(array, np.zeros_like(array)).wait()
    view.broadcast_object(1)
    view.gather_object(1)
    view.allgather_object(1)
    view.node_allgather_object(1)
    with view.agreed("nothing"):
        pass
    names = ["Ibarrier", "Ibarrier", "Ibcast", "Iallreduce", "Iallgather", "Iallgatherv", "Igather", "Ialltoallv"]
    names += ["Ireduce", "bcast", "gather", "allgather", "allgather", "allgather"]
    assert world.calls.total() - before == Counter((name, "listed") for name in names)
    assert world.purpose != "listed"


def test_what_a_duplicate_calls_is_in_the_total_and_not_in_its_origin_s_tally(world: World) -> None:
    before, own = world.calls.number_of("apart"), world.calls.own.total()
    lane = world.for_purpose("apart").duplicate()
    copies = world.calls.number_of("apart") - before
    assert copies == world.calls.own.total() - own
    for _ in range(3):
        lane.barrier()
        lane.node_barrier()
    assert world.calls.number_of("apart") == before + copies + 6
    assert lane.calls.own == {("Ibarrier", "apart"): 6}
    lane.free()
