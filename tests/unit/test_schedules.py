"""Learning-rate schedules by name: the rate of every iteration, against formulas and torch's own schedulers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch.optim import lr_scheduler

from mpidl import job
from mpidl.config import Config, load, to_toml
from mpidl.errors import ConfigError
from mpidl.parameters import Assignment
from mpidl.scheduling import (
    Action,
    Coordinator,
    Course,
    GroupSize,
    LearningRates,
    Plateau,
    Triggers,
    as_trigger,
    check_schedule,
    named_schedule,
)
from mpidl.scheduling.schedules import ARGUMENTS

LR, EPOCHS, PER_EPOCH = 0.4, 12, 5
TOTAL = EPOCHS * PER_EPOCH
SGD = functools.partial(torch.optim.SGD, lr=LR)
GROUPS: list[dict[str, Any]] = [{}, {"lr": 0.03}]

Scheduler = lr_scheduler.LRScheduler
Make = Callable[[torch.optim.Optimizer], Scheduler]


def course(warmup: int = 0) -> Course:
    return Course(epochs=EPOCHS, iterations_per_epoch=PER_EPOCH, warmup_iterations=warmup)


def rates_of(name: str, arguments: Mapping[str, Any], warmup: int = 0) -> list[tuple[float, ...]]:
    rates = LearningRates(SGD, GROUPS, named_schedule(name, arguments, course(warmup)))
    return [rates.at(iteration) for iteration in range(TOTAL)]


def plain_optimizer() -> torch.optim.Optimizer:
    optimizer = SGD([{**group, "params": [torch.nn.Parameter(torch.zeros(1))]} for group in GROUPS])
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(1)
    return optimizer


def by_torch(make: Make, *, every: int = 1) -> list[tuple[float, ...]]:
    """A plain loop that steps the scheduler once in so many iterations."""
    optimizer = plain_optimizer()
    scheduler, rates = make(optimizer), []
    for iteration in range(1, TOTAL + 1):
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        if iteration % every == 0:
            scheduler.step()
    return rates


# Name and arguments -> torch's scheduler, how often it is stepped, and the factor on lr at iteration i of n.
Case = tuple[str, dict[str, Any], Make, int, Callable[[int, int], float]]
CASES: list[Case] = [
    ("step", {"step_size": 4}, lambda o: lr_scheduler.StepLR(o, 4), PER_EPOCH, lambda i, n: 0.1 ** (i // 20)),
    (
        "step", {"step_size": 1, "gamma": 0.7}, lambda o: lr_scheduler.StepLR(o, 1, 0.7), PER_EPOCH,
        lambda i, n: 0.7 ** (i // 5),
    ),
    (
        "multistep", {"milestones": [2, 3, 9], "gamma": 0.5}, lambda o: lr_scheduler.MultiStepLR(o, [2, 3, 9], 0.5),
        PER_EPOCH, lambda i, n: 0.5 ** ((i >= 10) + (i >= 15) + (i >= 45)),
    ),
    ("poly", {}, lambda o: lr_scheduler.PolynomialLR(o, TOTAL), 1, lambda i, n: 1 - i / n),
    ("poly", {"power": 2}, lambda o: lr_scheduler.PolynomialLR(o, TOTAL, 2.0), 1, lambda i, n: (1 - i / n) ** 2),
    (
        "exponential", {"gamma": 0.8}, lambda o: lr_scheduler.ExponentialLR(o, 0.8 ** (1 / PER_EPOCH)), 1,
        lambda i, n: 0.8 ** (i / PER_EPOCH),
    ),
    (
        "cosine", {}, lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL), 1,
        lambda i, n: (1 + math.cos(math.pi * i / n)) / 2,
    ),
]  # fmt: skip
IDS = [f"{name} {arguments}" for name, arguments, *_ in CASES]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_rate_of_every_iteration_is_torch_s(case: Case) -> None:
    name, arguments, make, every, _ = case
    found = rates_of(name, arguments)
    assert found == by_torch(make, every=every)
    assert len(set(found)) > 2


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("warmup", [0, 1, 7, 20, 33])
def test_the_rates_rise_to_lr_and_follow_the_formula_after_the_warm_up(case: Case, warmup: int) -> None:
    name, arguments, _, _, factor = case
    # Steps fall where they do without a warm-up; the others begin after it.
    counts_from_start = name in ("step", "multistep")
    expected = [(i + 1) / (warmup + 1) for i in range(warmup)]
    for i in range(warmup, TOTAL):
        expected.append(factor(i, TOTAL) if counts_from_start else factor(i - warmup, TOTAL - warmup))
    found = rates_of(name, arguments, warmup)
    assert [group[0] for group in found] == pytest.approx([LR * value for value in expected], rel=1e-12)
    assert [group[1] for group in found] == pytest.approx([0.03 * value for value in expected], rel=1e-12)


def test_the_cosine_ends_at_its_minimum() -> None:
    found = [group[0] for group in rates_of("cosine", {"eta_min": 0.01})]
    expected = by_torch(lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, 0.01))
    assert found == [group[0] for group in expected]
    assert 0.01 < found[-1] < 0.0105


def test_constant_stays_and_rises_only_in_a_warm_up() -> None:
    assert named_schedule("constant", {}, course()) is None
    expected = [LR * min(1, (i + 1) / 7) for i in range(TOTAL)]
    assert [group[0] for group in rates_of("constant", {}, 6)] == pytest.approx(expected, rel=1e-12)


# --- plateau ----------------------------------------------------------------------------------------------------------

LOSSES = [2.0, 1.5, 1.5, 1.6, 1.4, 1.7, 1.8, math.nan, 1.39999, 1.0, 1.1, 1.2]
"""Of the validation after each epoch."""


def plateau_by_torch(warmup: int, losses: list[float], **arguments: Any) -> list[tuple[float, ...]]:
    """A plain loop: a warm-up stepped every iteration, torch's plateau after every epoch that the warm-up is over."""
    optimizer = plain_optimizer()
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, **arguments)
    warm_up = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup) if warmup else None
    rates = []
    for iteration in range(TOTAL):
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        if warm_up is not None:
            warm_up.step()
        if (iteration + 1) % PER_EPOCH == 0 and iteration + 1 >= warmup:
            scheduler.step(losses[iteration // PER_EPOCH])
    return rates


def plateau_coordinator(schedule: Any, *, first: int = 0, validate_every: int = 1, group_size: int = 3) -> Coordinator:
    return Coordinator(
        num_samples=4 * PER_EPOCH,
        batch_size=4,
        assignment=Assignment.even(2, 1),
        triggers=Triggers(PER_EPOCH, EPOCHS, as_trigger("validate_every", validate_every)),
        group_size=GroupSize(group_size),
        learning_rates=LearningRates(SGD, GROUPS, schedule),
        first_iteration=first,
    )


def walk(coordinator: Coordinator, metric: str, values: list[float], first: int = 0) -> list[tuple[float, ...]]:
    """The rates of all plans, where each validation gives the next value."""
    rates: list[tuple[float, ...]] = []
    while first + len(rates) < TOTAL:
        plan = coordinator.next_plan()
        rates += plan.learning_rates
        completed = plan.first_iteration + plan.num_iterations
        assert (Action.WAIT in plan.actions) == (Action.VALIDATE in plan.actions and completed < TOTAL)
        if Action.VALIDATE in plan.actions:
            coordinator.validated(completed, {metric: values[plan.epoch], "samples": 3.0})
    return rates


@pytest.mark.parametrize("warmup", [0, 4, 5, 13])
@pytest.mark.parametrize("arguments", [{"patience": 0}, {"patience": 1, "factor": 0.5, "cooldown": 1, "min_lr": 0.01}])
def test_plateau_s_rates_are_those_of_torch_s_stepped_at_validations(warmup: int, arguments: dict[str, Any]) -> None:
    schedule = named_schedule("plateau", arguments, course(warmup))
    found = walk(plateau_coordinator(schedule), "loss", LOSSES)
    assert found == plateau_by_torch(warmup, LOSSES, **arguments)
    assert len(set(found[13:])) > 1


def test_plateau_follows_a_named_metric_and_its_mode() -> None:
    arguments = {"metric": "accuracy", "mode": "max", "patience": 0, "threshold": 0.2, "threshold_mode": "abs"}
    found = walk(plateau_coordinator(named_schedule("plateau", arguments, course())), "accuracy", LOSSES)
    del arguments["metric"]
    assert found == plateau_by_torch(0, LOSSES, **arguments)


def test_a_user_s_own_plateau_scheduler_takes_the_loss() -> None:
    schedule = functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0)
    assert walk(plateau_coordinator(schedule), "loss", LOSSES) == plateau_by_torch(0, LOSSES, patience=0)


@pytest.mark.parametrize("warmup", [0, 13])
def test_plateau_resumed_with_the_earlier_results_goes_on_as_it_would_have(warmup: int) -> None:
    schedule = named_schedule("plateau", {"patience": 1}, course(warmup))
    whole = walk(plateau_coordinator(schedule), "loss", LOSSES)
    for epoch in range(1, EPOCHS):
        resumed = plateau_coordinator(schedule, first=epoch * PER_EPOCH)
        for earlier in range(epoch):
            resumed.validated((earlier + 1) * PER_EPOCH, {"loss": LOSSES[earlier]})
        assert walk(resumed, "loss", LOSSES, epoch * PER_EPOCH) == whole[epoch * PER_EPOCH :]


def test_only_a_plateau_schedule_lets_plans_wait() -> None:
    for schedule in (None, named_schedule("cosine", {}, course())):
        coordinator = plateau_coordinator(schedule)
        plans = [coordinator.next_plan() for _ in range(2 * EPOCHS)]
        assert not any(plan.actions & Action.WAIT for plan in plans)
        assert any(plan.actions & Action.VALIDATE for plan in plans)
        coordinator.validated(TOTAL, {"loss": 1.0})  # of no consequence


def test_an_earlier_result_without_the_metric_is_refused() -> None:
    coordinator = plateau_coordinator(functools.partial(Plateau, metric="accuracy", mode="max"))
    with pytest.raises(ConfigError, match="after iteration 5 gave no 'accuracy'"):
        coordinator.validated(5, {"loss": 1.0})


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("step", {}, "step needs step_size, a number of epochs, an integer of at least 1, in schedule_args"),
        ("step", {"stepsize": 3}, "'stepsize', which step does not take; it takes step_size, gamma; did you mean"),
        ("step", {"step_size": 0}, "step_size 0, must be a number of epochs, an integer of at least 1"),
        ("step", {"step_size": 2.5}, "step_size 2.5, must be"),
        ("step", {"step_size": True}, "step_size True, must be"),
        ("multistep", {"gamma": 0.5}, "multistep needs milestones, a list of numbers of epochs"),
        ("multistep", {"milestones": [30, 20]}, "milestones [30, 20], must be a list of numbers of epochs, ascending"),
        ("multistep", {"milestones": []}, "milestones [], must be"),
        ("multistep", {"milestones": 3}, "milestones 3, must be"),
        ("poly", {"power": 0}, "power 0, must be a number above 0"),
        ("poly", {"gamma": 0.5}, "'gamma', which poly does not take; it takes power"),
        ("exponential", {}, "exponential needs gamma, a number above 0"),
        ("exponential", {"gamma": "0.9"}, "gamma '0.9', must be"),
        ("cosine", {"eta_min": -1}, "eta_min -1, must be a learning rate of at least 0"),
        ("constant", {"gamma": 0.5}, "'gamma', which constant does not take; it takes none"),
        ("plateau", {"factor": 1.0}, "factor 1.0, must be a number between 0 and 1"),
        ("plateau", {"mode": "best"}, "mode 'best', must be \"min\" or \"max\""),
        ("plateau", {"metric": "accuracy"}, "the metric 'accuracy' and no mode; add \"min\" or \"max\""),
        ("plateau", {"patience": 1.5}, "patience 1.5, must be a number of validations"),
        ("plateau", {"patienc": 1}, "did you mean patience?"),
    ],
)  # fmt: skip
def test_arguments_that_a_schedule_does_not_take_are_refused(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        named_schedule(name, arguments, course())
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("validated", "message"),
    [
        ((), "this run has none; give validation data and a validate_every of at least 1"),
        (("loss", "accuracy"), "metric 'accurac' is not one of loss, accuracy; did you mean accuracy?"),
    ],
)
def test_a_plateau_that_no_validation_can_serve_is_refused(validated: tuple[str, ...], message: str) -> None:
    schedule = named_schedule("plateau", {"metric": "accurac", "mode": "max"}, course())
    with pytest.raises(ConfigError) as raised:
        check_schedule(SGD, GROUPS, schedule, TOTAL, validated)
    assert message in str(raised.value)


def test_a_plateau_that_fails_at_its_step_is_refused_before_the_first_iteration() -> None:
    class Broken(lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: Any = None) -> None:  # type: ignore[override]  # as torch's own
            raise KeyError("nothing")

    with pytest.raises(ConfigError, match="KeyError: 'nothing'"):
        check_schedule(SGD, GROUPS, Broken, TOTAL, ("loss",))
    check_schedule(SGD, GROUPS, lr_scheduler.ReduceLROnPlateau, TOTAL, ("loss",))


# --- the configuration ------------------------------------------------------------------------------------------------


def test_every_schedule_of_the_configuration_has_its_arguments_and_a_line_of_help() -> None:
    names = get_args(get_type_hints(Config)["schedule"])
    assert set(names) == set(ARGUMENTS)
    (text,) = (f.metadata["help"] for f in Config.__dataclass_fields__.values() if f.name == "schedule_args")
    for name, arguments in ARGUMENTS.items():
        assert not arguments or f"{name} {{{', '.join(arguments)}}}" in text


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name != "constant"])
def test_a_job_file_s_schedule_becomes_a_scheduler(name: str, tmp_path: Any) -> None:
    given = {
        "step": "step_size = 2", "multistep": "milestones = [1, 3]", "exponential": "gamma = 0.9",
        "plateau": "patience = 3, min_lr = 1e-3",
    }.get(name, "")  # fmt: skip
    file = tmp_path / "job.toml"
    file.write_text(f'schedule = "{name}"\nschedule_args = {{{given}}}\nwarmup_iterations = 2\n')
    config = load(file)
    file.write_text(to_toml(config))
    assert load(file) == config
    schedule = job.find_schedule(config, 1000)
    assert schedule is not None
    optimizer = plain_optimizer()
    made = schedule(optimizer)
    assert isinstance(made, Plateau if name == "plateau" else lr_scheduler.SequentialLR)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR / 3)
