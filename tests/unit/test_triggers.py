"""What is due when, and that group sizes change nothing about it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from mpidl.errors import ConfigError
from mpidl.parameters import Assignment
from mpidl.runtime import faults
from mpidl.scheduling import (
    Action,
    Coordinator,
    GroupPlan,
    GroupSize,
    LearningRates,
    StopRequests,
    Trigger,
    Triggers,
    as_trigger,
    num_iterations,
    trigger_text,
    triggers,
)
from mpidl.scheduling.triggers import Facts

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def leaves() -> st.SearchStrategy[Trigger]:
    return st.one_of(
        st.builds(triggers.iterations, st.integers(1, 9)),
        st.builds(triggers.epochs, st.integers(1, 3)),
        st.builds(triggers.seconds, st.floats(0.5, 20.0)),
        st.builds(triggers.at_end),
        st.builds(triggers.loss_below, st.floats(0.0, 1.0)),
        st.builds(triggers.reached, st.just("accuracy"), st.floats(0.0, 1.0), st.sampled_from(["min", "max"])),
        st.builds(triggers.plateau, st.just("loss"), st.integers(1, 4), st.sampled_from(["min", "max"])),
    )


ANY = st.recursive(
    leaves(),
    lambda inner: st.builds(lambda a, b, either: a | b if either else a & b, inner, inner, st.booleans()),
    max_leaves=4,
)
FORESEEN = st.one_of(
    st.none(), st.builds(triggers.iterations, st.integers(1, 9)), st.builds(triggers.epochs, st.integers(1, 3))
)

TRIGGERS = st.builds(
    Triggers, iterations_per_epoch=st.integers(1, 12), epochs=st.integers(1, 6), validate=FORESEEN, checkpoint=FORESEEN
)


# --- single triggers --------------------------------------------------------------------------------------------------


def facts(completed: int = 7, **more: Any) -> Facts:
    return Facts(completed, 5, **more)


@pytest.mark.parametrize(
    ("text", "met", "not_met"),
    [
        ("iterations(4)", facts(8), facts(9)),
        ("epochs(2)", facts(10), facts(5)),
        ("at_end()", facts(is_last=True), facts()),
        ("loss_below(0.5)", facts(loss=0.49), facts(loss=0.5)),
        ("seconds(3)", facts(seconds=3.0), facts(seconds=2.9)),
        ("reached('accuracy', 0.9)", facts(validation={"accuracy": 0.9}), facts(validation={"accuracy": 0.89})),
        ("reached('loss', 0.1, mode='min')", facts(validation={"loss": 0.1}), facts(validation={"loss": 0.11})),
        ("reached('accuracy', 0.9)", facts(validation={"accuracy": 1.0}), facts()),
        ("iterations(4) & loss_below(1)", facts(8, loss=0.0), facts(7, loss=0.0)),
        ("iterations(4) or loss_below(1)", facts(7, loss=0.0), facts(7, loss=2.0)),
        ("loss_below(1) | iterations(2) & iterations(3)", facts(6, loss=2.0), facts(4, loss=2.0)),
    ],
)
def test_a_trigger_holds_where_its_words_say(text: str, met: Facts, not_met: Facts) -> None:
    assert trigger_text.parse(text).holds(met)
    assert not trigger_text.parse(text).holds(not_met)


def test_seconds_count_from_when_the_whole_trigger_fired_last() -> None:
    trigger = trigger_text.parse("seconds(10) | iterations(100)")
    assert trigger.holds(facts(seconds=10.5))
    trigger.fired(facts(seconds=10.5))
    assert not trigger.holds(facts(seconds=20.0))
    trigger.fired(facts(100, seconds=18.0))
    assert not trigger.holds(facts(seconds=27.0))
    assert trigger.holds(facts(seconds=28.0))


def test_seconds_stay_due_until_the_other_half_holds() -> None:
    trigger = trigger_text.parse("seconds(10) & iterations(5)")
    assert [i for i in range(1, 16) if trigger.holds(facts(i, seconds=2.0 * i))] == [5, 10, 15]
    trigger.fired(facts(5, seconds=10.0))
    assert [i for i in range(6, 16) if trigger.holds(facts(i, seconds=2.0 * i))] == [10, 15]


@pytest.mark.parametrize(
    ("text", "losses", "ends_after"),
    [
        ("plateau('loss', 2)", [3, 2, 1, 1, 1, 0], 5),
        ("plateau('loss', 2)", [3, 2, 2.5, 1.5, 1.6, 1.4], None),
        ("plateau('loss', 1, min_delta=0.5)", [3, 2.6], 2),
        ("plateau('loss', 2, mode='max')", [3, 2, 1], 3),
        ("plateau('loss', 1)", [math.nan, 1, math.nan], 3),
    ],
)
def test_a_plateau_is_as_many_validations_in_a_row_without_a_better_one(
    text: str, losses: list[float], ends_after: int | None
) -> None:
    trigger = trigger_text.parse(text)
    held = []
    for loss in losses:
        trigger.validated({"loss": loss})
        held.append(trigger.holds(facts()))
    assert (held.index(True) + 1 if True in held else None) == ends_after


@given(trigger=ANY)
def test_a_trigger_s_text_is_read_as_that_trigger(trigger: Trigger) -> None:
    assert repr(trigger_text.parse(repr(trigger))) == repr(trigger)


@given(trigger=ANY, per_epoch=st.integers(1, 6))
def test_what_is_foreseen_names_every_iteration_of_a_trigger_that_can_be_foreseen(
    trigger: Trigger, per_epoch: int
) -> None:
    if not trigger.is_foreseen:
        return
    for completed in range(1, 40):
        if trigger.holds(Facts(completed, per_epoch, loss=0.0, seconds=1e9, validation={"loss": 1, "accuracy": 0.5})):
            assert trigger.next_after(completed - 1, per_epoch) == completed


@pytest.mark.parametrize(
    "text",
    [
        "", "epoch(1)", "epochs(0)", "epochs(1.5)", "epochs()", "epochs(True)", "seconds(-1)", "seconds(1e999)",
        "iterations(1, 2)", "iterations(1) + epochs(1)", "__import__('os')", "epochs(1).holds", "reached(accuracy, 1)",
        "reached('', 1)", "reached('a', 1, mode='up')", "plateau('loss', 0)", "loss_below('x')", "epochs(1) |",
        "(lambda: 1)()", "epochs(n=1)", "(" * 300 + "epochs(1)" + ")" * 300,
    ],
)  # fmt: skip
def test_what_is_no_trigger_is_refused_with_the_setting_s_name(text: str) -> None:
    with pytest.raises(ConfigError, match="^end_when: "):
        as_trigger("end_when", text)


def test_a_metric_that_validations_do_not_give_is_refused() -> None:
    made = Triggers(5, 2, validate=triggers.epochs(1), end=trigger_text.parse("epochs(1) & reached('acuracy', 1)"))
    with pytest.raises(ConfigError, match="looks at 'acuracy' of the validation, but validations give loss, accuracy"):
        made.check(("loss", "accuracy"))
    with pytest.raises(ConfigError, match="this run has no validations"):
        made.check(())
    Triggers(5, 2, end=triggers.loss_below(0.1)).check(())


# --- the course -------------------------------------------------------------------------------------------------------


def due(made: Triggers, trigger: Trigger | None, completed: int) -> bool:
    reached_end = completed == made.total_iterations
    return trigger is not None and (reached_end or trigger.holds(Facts(completed, made.iterations_per_epoch)))


@given(made=TRIGGERS)
def test_every_iteration_has_the_actions_that_the_settings_name(made: Triggers) -> None:
    for completed in range(1, made.total_iterations + 1):
        actions = made.foreseen_after(completed)
        assert (Action.END_EPOCH in actions) == (completed % made.iterations_per_epoch == 0)
        assert (Action.VALIDATE in actions) == due(made, made.validate, completed)
        assert (Action.CHECKPOINT in actions) == due(made, made.checkpoint, completed)
        assert (Action.END in actions) == (completed == made.total_iterations)


@given(made=TRIGGERS)
def test_the_next_cut_is_the_first_iteration_after_which_something_is_due(made: Triggers) -> None:
    for iteration in range(made.total_iterations):
        later = range(iteration + 1, made.total_iterations + 1)
        assert made.next_cut(iteration) == next(i for i in later if made.foreseen_after(i))


@given(made=TRIGGERS, end=ANY, losses=st.lists(st.floats(0, 1), min_size=72, max_size=72))
def test_all_that_is_due_at_the_end_fires_at_an_early_end_too(
    made: Triggers, end: Trigger, losses: list[float]
) -> None:
    made.end = end
    for completed in range(1, made.total_iterations + 1):
        found = made.facts(completed, losses[completed - 1], float(completed), {})
        fired = {made.fires(each, found) for each in (made.validate, made.checkpoint) if each is not None}
        if found.is_last:
            assert fired <= {True}
            return
    raise AssertionError("a training ends")


def plans_of(made: Triggers, sizes: Callable[[], int], *, first: int = 0, schedule: Any = None) -> list[GroupPlan]:
    """All plans of a training with 4 samples a batch, of which the last of an epoch has 3."""
    group_size = GroupSize(1)
    coordinator = Coordinator(
        num_samples=4 * made.iterations_per_epoch - 1,
        batch_size=4,
        assignment=Assignment.even(2, 1),
        triggers=made,
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
@given(data=st.data(), made=TRIGGERS)
def test_any_group_sizes_visit_the_same_iterations_and_actions_as_groups_of_one(
    data: st.DataObject, made: Triggers
) -> None:
    def decay(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.ExponentialLR(optimizer, 0.9)

    single = plans_of(made, lambda: 1, schedule=decay)
    grouped = plans_of(made, lambda: data.draw(st.integers(1, 9)), schedule=decay)
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
    assert [entry[0] for entry in walk(single)] == list(range(made.total_iterations))


@settings(max_examples=40)
@given(data=st.data(), made=TRIGGERS)
def test_a_resumed_training_makes_the_plans_that_were_left(data: st.DataObject, made: Triggers) -> None:
    def warm_up(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)

    whole = plans_of(made, lambda: 3, schedule=warm_up)
    first = data.draw(st.sampled_from([plan.first_iteration for plan in whole]))
    left = [plan for plan in whole if plan.first_iteration >= first]
    resumed = plans_of(made, lambda: 3, first=first, schedule=warm_up)
    assert [plan.encode()[24:] for plan in resumed] == [plan.encode()[24:] for plan in left]  # all but the index


def test_an_epochs_spans_are_the_same_in_every_epoch_and_hold_all_samples() -> None:
    made = Triggers(iterations_per_epoch=num_iterations(11, 4), epochs=3, validate=triggers.epochs(1))
    by_epoch: dict[int, list[Any]] = {}
    for plan in plans_of(made, lambda: 2):
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


def test_a_folder_in_the_place_of_the_file_stop_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults, "_job", None)  # of which rank 0 alone would warn
    (tmp_path / "STOP").mkdir()
    StopRequests(tmp_path / "STOP", None).obeyed()
    assert f"{tmp_path / 'STOP'} cannot be removed" in capsys.readouterr().err
