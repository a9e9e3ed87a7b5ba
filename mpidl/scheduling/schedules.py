"""Learning-rate schedules by name, made of torch's own schedulers.

Arguments have the names that torch gives them. What torch counts in steps of the scheduler (`step_size`, `milestones`)
is in epochs of the training here, whatever else happens once an iteration; `patience` and `cooldown` are validations.

| schedule | arguments (defaults) | the rate of an iteration |
| --- | --- | --- |
| constant | | lr |
| step | step_size, gamma (0.1) | times gamma after every step_size epochs |
| multistep | milestones, gamma (0.1) | times gamma after each of these numbers of epochs |
| poly | power (1) | lr (1 - t)^power, t from 0 to 1 at the end of the training |
| exponential | gamma | lr gamma^epochs, a little less in every iteration (in stairs: step with step_size 1) |
| cosine | eta_min (0) | half a cosine from lr to eta_min at the end of the training |
| plateau | metric ("loss"), mode, and torch's | times factor where validations do not get better |

A warm-up comes first: the rate rises linearly over the first iterations. After it, poly, exponential and cosine begin;
step and multistep are where they would be without it; plateau begins to count validations.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LRScheduler,
    MultiStepLR,
    PolynomialLR,
    SequentialLR,
)

from mpidl.config import near
from mpidl.errors import ConfigError
from mpidl.scheduling.learning_rates import Plateau, ScheduleFactory, rise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """How long a training is and how it begins."""

    epochs: int
    iterations_per_epoch: int
    warmup_iterations: int
    """Less than all iterations."""

    @property
    def decay_iterations(self) -> int:
        """Iterations after the warm-up."""
        return self.epochs * self.iterations_per_epoch - self.warmup_iterations


def named_schedule(name: str, arguments: Mapping[str, Any], course: Course) -> ScheduleFactory | None:
    """A callable from an optimizer to the scheduler of that name.

    Args:
        name: one of the configuration's `schedule`.
        arguments: see the module's table.
        course: of the training.

    Returns:
        None where the learning rate never changes.

    Raises:
        ConfigError: the schedule does not take an argument or its value, or lacks one.
    """
    _check_arguments(name, arguments)
    if name == "constant" and not course.warmup_iterations:
        return None
    return functools.partial(_make, name=name, arguments=arguments, course=course)


def _make(optimizer: Optimizer, *, name: str, arguments: Mapping[str, Any], course: Course) -> LRScheduler:
    warmup = course.warmup_iterations
    if name == "plateau":  # SequentialLR does not take it
        return Plateau(optimizer, warmup_iterations=warmup, **arguments)
    if name == "constant":
        return rise(optimizer, warmup)
    if not warmup:
        return _BUILDERS[name](optimizer, course, **arguments)
    parts = [rise(optimizer, warmup), _BUILDERS[name](optimizer, course, **arguments)]
    return SequentialLR(optimizer, parts, milestones=[warmup])


# --- the schedulers after a warm-up -----------------------------------------------------------------------------------


def _multistep(optimizer: Optimizer, course: Course, milestones: Sequence[int], gamma: float = 0.1) -> LRScheduler:
    # Those in the warm-up are negative here; SequentialLR begins with the closed form, which counts them.
    iterations = [epoch * course.iterations_per_epoch - course.warmup_iterations for epoch in milestones]
    return MultiStepLR(optimizer, iterations, gamma)


def _step(optimizer: Optimizer, course: Course, step_size: int, gamma: float = 0.1) -> LRScheduler:
    # Not StepLR, whose first step would be as long after the warm-up as without it.
    return _multistep(optimizer, course, range(step_size, course.epochs, step_size), gamma)


def _poly(optimizer: Optimizer, course: Course, power: float = 1.0) -> LRScheduler:
    return PolynomialLR(optimizer, total_iters=course.decay_iterations, power=power)


def _exponential(optimizer: Optimizer, course: Course, gamma: float) -> LRScheduler:
    return ExponentialLR(optimizer, gamma ** (1 / course.iterations_per_epoch))


def _cosine(optimizer: Optimizer, course: Course, eta_min: float = 0.0) -> LRScheduler:
    return CosineAnnealingLR(optimizer, T_max=course.decay_iterations, eta_min=eta_min)


_BUILDERS: dict[str, Callable[..., LRScheduler]] = {
    "step": _step,
    "multistep": _multistep,
    "poly": _poly,
    "exponential": _exponential,
    "cosine": _cosine,
}


# --- arguments --------------------------------------------------------------------------------------------------------


def _is_integer(value: object, minimum: int) -> bool:
    return type(value) is int and value >= minimum


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _are_milestones(value: object) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(_is_integer(epoch, 1) for epoch in value) and all(a < b for a, b in itertools.pairwise(value))


_Rule = tuple[Callable[[Any], bool], str]

_RULES: dict[str, _Rule] = {
    "step_size": (lambda v: _is_integer(v, 1), "a number of epochs, an integer of at least 1"),
    "milestones": (_are_milestones, "a list of numbers of epochs, ascending integers of at least 1"),
    "gamma": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "power": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "eta_min": (lambda v: _is_number(v) and v >= 0, "a learning rate of at least 0"),
    "metric": (lambda v: isinstance(v, str), '"loss" or the name of a metric'),
    "mode": (lambda v: v in ("min", "max"), '"min" or "max": which of the metric is better'),
    "factor": (lambda v: _is_number(v) and 0 < v < 1, "a number between 0 and 1"),
    "patience": (lambda v: _is_integer(v, 0), "a number of validations, an integer of at least 0"),
    "threshold": (lambda v: _is_number(v) and v >= 0, "a number of at least 0"),
    "threshold_mode": (lambda v: v in ("rel", "abs"), '"rel" or "abs"'),
    "cooldown": (lambda v: _is_integer(v, 0), "a number of validations, an integer of at least 0"),
    "min_lr": (lambda v: _is_number(v) and v >= 0, "a learning rate of at least 0"),
    "eps": (lambda v: _is_number(v) and v >= 0, "a difference of learning rates of at least 0"),
}

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "step": ("step_size", "gamma"),
    "multistep": ("milestones", "gamma"),
    "poly": ("power",),
    "exponential": ("gamma",),
    "cosine": ("eta_min",),
    "plateau": (
        "metric", "mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps",
    ),
}  # fmt: skip
"""The names of each schedule's arguments."""

_REQUIRED = {"step": "step_size", "multistep": "milestones", "exponential": "gamma"}


def _check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    allowed = ARGUMENTS[name]
    for key, value in arguments.items():
        if key not in allowed:
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
            raise ConfigError(f"schedule_args has {key!r}, which {name} does not take; {takes}{near(key, allowed)}")
        is_right, wanted = _RULES[key]
        if not is_right(value):
            raise ConfigError(f"schedule_args has {key} {value!r}, must be {wanted}")
    required = _REQUIRED.get(name)
    if required is not None and required not in arguments:
        raise ConfigError(f"the schedule {name} needs {required}, {_RULES[required][1]}, in schedule_args")
    if arguments.get("metric", "loss") != "loss" and "mode" not in arguments:
        raise ConfigError(
            f"schedule_args has the metric {arguments['metric']!r} and no mode; add {_RULES['mode'][1]}, as mode"
        )
