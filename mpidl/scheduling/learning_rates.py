"""The learning rate of every iteration, by torch's own schedulers; lives on rank 0 only.

A scheduler is stepped once an iteration. `ReduceLROnPlateau` is stepped at validations instead, with a number of their
result: the rates of the iterations behind a validation are then known only after it, and the coordinator waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LinearLR, LRScheduler, ReduceLROnPlateau

from mpidl.config import near
from mpidl.errors import ConfigError

ScheduleFactory = Callable[[torch.optim.Optimizer], LRScheduler]


def rise(optimizer: torch.optim.Optimizer, iterations: int) -> LinearLR:
    """A warm-up from lr / (iterations + 1) to lr, which iteration number `iterations` (from 0) has first."""
    return LinearLR(optimizer, start_factor=1 / (iterations + 1), total_iters=iterations)


class Plateau(ReduceLROnPlateau):
    """Torch's ReduceLROnPlateau on a named number of the validations, after a warm-up if one is wanted.

    Args:
        optimizer: whose learning rates.
        metric: "loss" or one of the Trainer's metrics, of which `mode` says whether "min" or "max" is better.
        warmup_iterations: iterations in which the rates rise linearly; validations before their end do not count.
        **arguments: torch's own: mode, factor, patience, ...
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, metric: str = "loss", warmup_iterations: int = 0, **arguments: Any
    ) -> None:
        super().__init__(optimizer, **arguments)
        self.metric = metric
        self.warmup_iterations = warmup_iterations
        self.warm_up = rise(optimizer, warmup_iterations) if warmup_iterations else None


class LearningRates:
    """The learning rates of one training, asked for in ascending order of iterations.

    The scheduler works on an optimizer of the run's own kind over one empty tensor per param group.

    Args:
        factory: the run's optimizer factory.
        groups: each param group's options.
        schedule: from an optimizer to a torch scheduler; None: constant.

    Raises:
        ConfigError: the schedule changes more than learning rates, which is all that a plan carries.
    """

    def __init__(
        self,
        factory: Callable[[Any], torch.optim.Optimizer],
        groups: Sequence[Mapping[str, Any]],
        schedule: ScheduleFactory | None,
    ) -> None:
        empty = [{**options, "params": [torch.nn.Parameter(torch.empty(0))]} for options in groups]
        self._optimizer = factory(empty)
        self._options = [dict(group) for group in self._optimizer.param_groups]
        self._scheduler = schedule(self._optimizer) if schedule else None
        self._plateau: ReduceLROnPlateau | None = None
        self._warmup_iterations = 0
        self.metric: str | None = None
        """The number of a validation's result that later rates depend on; None: they depend on none."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._plateau, self._scheduler, self.metric = self._scheduler, None, "loss"
        if isinstance(self._plateau, Plateau):
            self._scheduler, self.metric = self._plateau.warm_up, self._plateau.metric
            self._warmup_iterations = self._plateau.warmup_iterations
        self._next = 0
        self._check()

    @property
    def num_groups(self) -> int:
        """The number of param groups."""
        return len(self._optimizer.param_groups)

    def at(self, iteration: int) -> tuple[float, ...]:
        """The rates of an iteration, one for each param group."""
        while self._next < iteration:
            self._advance()
        return tuple(float(group["lr"]) for group in self._optimizer.param_groups)

    def observe(self, completed: int, result: Mapping[str, float]) -> None:
        """Take the result of the validation after `completed` iterations: the rates behind it may depend on it.

        To be called in the order of the validations, before any later rate is asked for.

        Raises:
            ConfigError: the result, which an earlier run may have recorded, has not the number that is needed.
        """
        if self._plateau is None or self.metric is None or completed < self._warmup_iterations:
            return
        if self.metric not in result:
            raise ConfigError(
                f"the validation after iteration {completed} gave no {self.metric!r}, which the plateau schedule "
                "needs; resume with the metrics that the run began with"
            )
        self.at(completed)
        self._plateau.step(result[self.metric])
        self._check()

    def _advance(self) -> None:
        self._next += 1
        if self._scheduler is not None:
            self._optimizer.step()  # torch warns about schedulers that move before their optimizer
            self._scheduler.step()
            self._check()

    def _check(self) -> None:
        for group, before in zip(self._optimizer.param_groups, self._options, strict=True):
            changed = {key for key, value in before.items() if key not in ("lr", "params") and group[key] != value}
            # Torch's cycles announce themselves by this key, even while the momentum still is what it was.
            changed |= {"momentum"} & {key.removeprefix("max_") for key in group.keys() - before.keys()}
            if changed:
                raise ConfigError(
                    f"the schedule changes {', '.join(sorted(changed))}; it may change the learning rate only; pass "
                    "cycle_momentum=False to torch's OneCycleLR and CyclicLR"
                )


LONGEST_TRIAL = 100_000
"""Iterations for which a schedule is tried before the training begins: about a second."""


def check_schedule(
    factory: Callable[[Any], torch.optim.Optimizer],
    groups: Sequence[Mapping[str, Any]],
    schedule: ScheduleFactory | None,
    total_iterations: int,
    validated: Sequence[str] = (),
) -> None:
    """Walk a schedule through the training, so that one that fails does so before the first iteration.

    Args:
        factory: the run's optimizer factory.
        groups: each param group's options.
        schedule: from an optimizer to a torch scheduler; None: constant.
        total_iterations: of the whole training.
        validated: the names of the numbers that a validation gives; empty: there are no validations.

    Raises:
        ConfigError: it cannot be made, cannot be stepped once an iteration, or depends on what no validation gives.
    """
    if schedule is None:
        return
    last = max(0, min(total_iterations, LONGEST_TRIAL) - 1)
    try:
        rates = LearningRates(factory, groups, schedule)
        _check_metric(rates.metric, validated)
        rates.at(last)
        if rates.metric is not None:
            rates.observe(last, {rates.metric: 1.0})
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the schedule does not serve {total_iterations} iterations, one step each: {type(error).__name__}: {error}"
        ) from error


def _check_metric(metric: str | None, validated: Sequence[str]) -> None:
    if metric is None:
        return
    if not validated:
        raise ConfigError(
            "a plateau schedule lowers the learning rate by the result of validations, and this run has none; give "
            "validation data and a validate_every of at least 1, or take another schedule"
        )
    if metric not in validated:
        hint = near(metric, validated)
        raise ConfigError(f"the plateau schedule's metric {metric!r} is not one of {', '.join(validated)}{hint}")
