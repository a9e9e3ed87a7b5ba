"""What is due when, and that group sizes change nothing about it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from mpidl.errors import ConfigError
from mpidl.parameters import Assignment
from mpidl.scheduling import Action, Coordinator, GroupPlan, GroupSize, LearningRates, Triggers, num_iterations

SGD = functools.partial(torch.optim.SGD, lr=0.1)

TRIGGERS = st.builds(
    Triggers,
    iterations_per_epoch=st.integers(1, 12),
    epochs=st.integers(1, 6),
    validate_every=st.integers(0, 4),
    checkpoint_every=st.integers(0, 4),
)


def due(triggers: Triggers, epoch: int, every: int) -> bool:
    return every > 0 and (epoch % every == 0 or epoch == triggers.epochs)


@given(triggers=TRIGGERS)
def test_every_iteration_has_the_actions_that_the_settings_name(triggers: Triggers) -> None:
    for completed in range(1, triggers.total_iterations + 1):
        actions = triggers.actions_after(completed)
        epoch, within = divmod(completed, triggers.iterations_per_epoch)
        if within:
            assert actions == Action.NONE
            continue
        assert Action.END_EPOCH in actions
        assert (Action.VALIDATE in actions) == due(triggers, epoch, triggers.validate_every)
        assert (Action.CHECKPOINT in actions) == due(triggers, epoch, triggers.checkpoint_every)
        assert (Action.END in actions) == (completed == triggers.total_iterations)


@given(triggers=TRIGGERS)
def test_the_next_cut_is_the_first_iteration_after_which_something_is_due(triggers: Triggers) -> None:
    for iteration in range(triggers.total_iterations):
        later = range(iteration + 1, triggers.total_iterations + 1)
        assert triggers.next_cut(iteration) == next(i for i in later if triggers.actions_after(i))


def plans_of(triggers: Triggers, sizes: Callable[[], int], *, first: int = 0, schedule: Any = None) -> list[GroupPlan]:
    """All plans of a training with 4 samples a batch, of which the last of an epoch has 3."""
    group_size = GroupSize(1)
    coordinator = Coordinator(
        num_samples=4 * triggers.iterations_per_epoch - 1,
        batch_size=4,
        assignment=Assignment.even(2, 1),
        triggers=triggers,
        group_size=group_size,
        learning_rates=LearningRates(SGD, [{}], schedule),
        first_iteration=first,
    )
    plans: list[GroupPlan] = []
    while not plans or Action.END not in plans[-1].actions:
        group_size.value = sizes()
        plans.append(coordinator.next_plan())
    return plans


@settings(max_examples=40)
@given(data=st.data(), triggers=TRIGGERS)
def test_any_group_sizes_visit_the_same_iterations_and_actions_as_groups_of_one(
    data: st.DataObject, triggers: Triggers
) -> None:
    def decay(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.ExponentialLR(optimizer, 0.9)

    single = plans_of(triggers, lambda: 1, schedule=decay)
    grouped = plans_of(triggers, lambda: data.draw(st.integers(1, 9)), schedule=decay)
    assert [plan.index for plan in grouped] == list(range(len(grouped)))
    assert {plan.num_iterations for plan in single} == {1}

    def walk(plans: list[GroupPlan]) -> list[Any]:
        return [
            (plan.first_iteration + i, plan.epoch, plan.spans[i], plan.learning_rates[i])
            for plan in plans
            for i in range(plan.num_iterations)
        ]

    def actions(plans: list[GroupPlan]) -> list[Any]:
        return [(plan.first_iteration + plan.num_iterations, plan.actions) for plan in plans if plan.actions]

    assert walk(grouped) == walk(single)
    assert actions(grouped) == actions(single)
    assert [entry[0] for entry in walk(single)] == list(range(triggers.total_iterations))


@settings(max_examples=40)
@given(data=st.data(), triggers=TRIGGERS)
def test_a_resumed_training_makes_the_plans_that_were_left(data: st.DataObject, triggers: Triggers) -> None:
    def warm_up(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)

    whole = plans_of(triggers, lambda: 3, schedule=warm_up)
    first = data.draw(st.sampled_from([plan.first_iteration for plan in whole]))
    left = [plan for plan in whole if plan.first_iteration >= first]
    resumed = plans_of(triggers, lambda: 3, first=first, schedule=warm_up)
    assert [plan.encode()[24:] for plan in resumed] == [plan.encode()[24:] for plan in left]  # all but the index


def test_an_epochs_spans_are_the_same_in_every_epoch_and_hold_all_samples() -> None:
    triggers = Triggers(iterations_per_epoch=num_iterations(11, 4), epochs=3, validate_every=1, checkpoint_every=0)
    by_epoch: dict[int, list[Any]] = {}
    for plan in plans_of(triggers, lambda: 2):
        by_epoch.setdefault(plan.epoch, []).extend(plan.spans)
    assert set(by_epoch) == {0, 1, 2}
    assert all(spans == [(0, 4), (4, 8), (8, 11)] for spans in by_epoch.values())


# --- learning rates ---------------------------------------------------------------------------------------------------

Schedule = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


def chained(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(optimizer, 20)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[5])


SCHEDULES: dict[str, Schedule] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4, 0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 4, 17]),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.97),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 25),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 25, 2.0),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=31, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 5, cycle_momentum=False),
    "warm-up, then cosine": chained,
}


def by_torch(options: list[dict[str, Any]], schedule: Schedule | None, iterations: int) -> list[tuple[float, ...]]:
    """What a plain loop would use: optimizer.step(), then scheduler.step(), every iteration."""
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in options]
    optimizer = SGD([{**group, "params": [p]} for group, p in zip(options, parameters, strict=True)])
    scheduler = schedule(optimizer) if schedule else None
    rates = []
    for _ in range(iterations):
        for parameter in parameters:
            parameter.grad = torch.ones(3)
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rates_are_those_of_torch_s_scheduler_stepped_every_iteration(name: str) -> None:
    options: list[dict[str, Any]] = [{}, {"lr": 0.02, "weight_decay": 0.1}]
    expected = by_torch(options, SCHEDULES[name], 30)
    rates = LearningRates(SGD, options, SCHEDULES[name])
    assert rates.num_groups == 2
    assert [rates.at(i) for i in range(30)] == expected
    assert len(set(expected)) > 3  # a schedule that stood still would prove nothing


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_asked_for_from_the_middle_are_those_of_the_whole_way(name: str) -> None:
    expected = by_torch([{}], SCHEDULES[name], 30)
    for first in (0, 1, 13, 29):
        rates = LearningRates(SGD, [{}], SCHEDULES[name])
        assert [rates.at(i) for i in range(first, 30)] == expected[first:]


def test_asking_twice_for_an_iteration_gives_the_same_rate() -> None:
    rates = LearningRates(SGD, [{}], SCHEDULES["ExponentialLR"])
    assert rates.at(3) == rates.at(3) == by_torch([{}], SCHEDULES["ExponentialLR"], 4)[3]


def test_without_a_schedule_each_group_keeps_its_rate() -> None:
    rates = LearningRates(SGD, [{}, {"lr": 3.0}], None)
    assert list(itertools.chain(*(rates.at(i) for i in (0, 5, 1000)))) == [0.1, 3.0] * 3


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.ASGD, torch.optim.Rprop])
def test_rates_work_with_any_optimizer_and_say_nothing(optimizer: Any) -> None:
    # Warnings are errors here: torch warns about a scheduler that moves before its optimizer.
    rates = LearningRates(functools.partial(optimizer, lr=0.1), [{}], SCHEDULES["StepLR"])
    assert rates.at(4)[0] == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("optimizer", "changed"),
    [(functools.partial(torch.optim.SGD, momentum=0.9), "momentum"), (torch.optim.Adam, "betas")],
    ids=["SGD", "Adam"],
)
@pytest.mark.parametrize(
    "schedule",
    [lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=31), lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 5)],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_a_schedule_that_cycles_the_momentum_too_is_refused(optimizer: Any, schedule: Any, changed: str) -> None:
    # Only rates travel in plans: such a run would differ from torch's in silence.
    with pytest.raises(ConfigError, match=f"({changed}|momentum).*cycle_momentum=False"):
        LearningRates(functools.partial(optimizer, lr=0.1), [{}], schedule)
