"""Plans travel: every rank gets the coordinator's, and what was started is completed."""

from __future__ import annotations

import functools

import numpy as np
import torch

from mpidl.parameters import Assignment
from mpidl.runtime import World
from mpidl.scheduling import (
    Action,
    Coordinator,
    GroupPlan,
    GroupSize,
    LearningRates,
    PlanChannel,
    Triggers,
    capacity,
    num_iterations,
    triggers,
)

NUM_SAMPLES, BATCH_SIZE, GROUP_SIZE = 45, 10, 3


def decaying(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def coordinator_of(world: World) -> Coordinator:
    return Coordinator(
        num_samples=NUM_SAMPLES,
        batch_size=BATCH_SIZE,
        assignment=Assignment.even(world.size + 3, world.size),
        triggers=Triggers(num_iterations(NUM_SAMPLES, BATCH_SIZE), epochs=3, validate=triggers.epochs(2)),
        group_size=GroupSize(GROUP_SIZE),
        learning_rates=LearningRates(functools.partial(torch.optim.SGD, lr=0.1), [{}, {"lr": 1.0}], decaying),
    )


def channel_of(world: World) -> PlanChannel:
    """On rank 0 alone with a coordinator, and with no byte more than the largest plan takes."""
    coordinator = coordinator_of(world) if world.rank == 0 else None
    return PlanChannel(world, coordinator, capacity(GROUP_SIZE, world.size, 2))


def expected_plans(world: World) -> list[GroupPlan]:
    coordinator, plans = coordinator_of(world), list[GroupPlan]()
    while not plans or Action.END not in plans[-1].actions:
        plans.append(coordinator.next_plan())
    return plans


def test_every_rank_receives_the_coordinator_s_plans_while_other_messages_pass(world: World) -> None:
    channel, expected = channel_of(world), expected_plans(world)
    assert {plan.num_iterations for plan in expected} == {2, 3}  # a short plan follows a long one in its buffer
    received = []
    channel.start()
    plan = channel.receive()
    while True:
        received.append(plan)
        if Action.END in plan.actions:
            break
        channel.start()
        # What a group does while the next plan is under way.
        for iteration in range(plan.num_iterations):
            total = world.allreduce(np.array([float(iteration)]))
            assert total[0] == world.size * iteration
            world.node_barrier()
        plan = channel.receive()
    assert received == expected
    texts = world.allgather_object([plan.encode() for plan in received])
    assert all(text == texts[0] for text in texts)


def test_a_plan_stays_as_it_was_while_later_ones_arrive(world: World) -> None:
    channel = channel_of(world)
    channel.start()
    first = channel.receive()
    kept = first.encode()
    for _ in range(3):
        channel.start()
        channel.receive()
    assert first.encode() == kept


def test_a_dropped_plan_leaves_nothing_under_way(world: World) -> None:
    channel, expected = channel_of(world), expected_plans(world)
    channel.drop()  # nothing was started
    channel.start()
    channel.drop()
    channel.drop()
    assert channel._pending is None
    # Collectives match by their order: a broadcast that some rank had not joined would take these arrays' place.
    array = np.full(8, world.rank + 5)
    world.broadcast(array)
    assert (array == 5).all()
    channel.start()
    assert channel.receive() == expected[1]
    other = channel_of(world)
    other.start()
    assert other.receive() == expected[0]
