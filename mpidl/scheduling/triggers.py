"""What is due after which iteration.

Every rank asks every trigger after every iteration, about facts that are the same on all ranks: the number of the
iteration, its loss and the first partition's clock (both came with the gradients), the newest validation. So all ranks
act after the same iteration, without a message, whatever the group size. Groups end where something can be foreseen to
be due; what cannot be foreseen (a loss, a time) is acted on in the middle of a group.

A trigger is made by the functions below, combined with `|` and `&`:

    epochs(1) | seconds(600)
    iterations(100) & loss_below(0.5)

or written as text, as in a job file, with the same words: see `trigger_text.py`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping

from mpidl.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known after an iteration, the same on all ranks."""

    completed: int
    """Iterations of the training that are done."""
    iterations_per_epoch: int
    is_last: bool = False
    """Whether the training ends here."""
    loss: float = math.nan
    """The iteration's mean training loss."""
    seconds: float = 0.0
    """Since this run began, by the clock of the rank that has partition 0."""
    validation: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The newest validation's numbers; empty before the first."""


class Trigger(abc.ABC):
    """Says after which iterations something is due."""

    word = ""
    """The function that makes it."""
    is_foreseen = False
    """Whether `next_after` names every iteration after which it may hold."""
    metrics: tuple[str, ...] = ()
    """The numbers of a validation that it looks at."""

    @abc.abstractmethod
    def holds(self, facts: Facts) -> bool:
        """Whether the condition is met; asked once an iteration."""

    def next_after(self, completed: int, iterations_per_epoch: int) -> int | None:
        """The first iteration count above `completed` for which this can be foreseen to hold, if any can."""
        return None

    def validated(self, result: Mapping[str, float]) -> None:  # noqa: B027
        """Take a validation's numbers; called once for each."""

    def fired(self, facts: Facts) -> None:  # noqa: B027
        """Take note that what this trigger, or one that it is a part of, is for was done."""

    def __repr__(self) -> str:
        given = [field.name for field in dataclasses.fields(self) if field.init]  # type: ignore[arg-type]
        return f"{self.word}({', '.join(repr(getattr(self, name)) for name in given)})"

    def __or__(self, other: Trigger) -> Trigger:
        return _Or(self, other)

    def __and__(self, other: Trigger) -> Trigger:
        return _And(self, other)


@dataclasses.dataclass(repr=False)
class _Iterations(Trigger):
    word = "iterations"
    number: int
    is_foreseen = True

    def holds(self, facts: Facts) -> bool:
        return facts.completed % self.number == 0

    def next_after(self, completed: int, iterations_per_epoch: int) -> int:
        return (completed // self.number + 1) * self.number


@dataclasses.dataclass(repr=False)
class _Epochs(Trigger):
    word = "epochs"
    number: int
    is_foreseen = True

    def holds(self, facts: Facts) -> bool:
        return facts.completed % (self.number * facts.iterations_per_epoch) == 0

    def next_after(self, completed: int, iterations_per_epoch: int) -> int:
        period = self.number * iterations_per_epoch
        return (completed // period + 1) * period


@dataclasses.dataclass(repr=False)
class _Seconds(Trigger):
    word = "seconds"
    number: float
    _since: float = dataclasses.field(default=0.0, init=False)

    def holds(self, facts: Facts) -> bool:
        return facts.seconds - self._since >= self.number

    def fired(self, facts: Facts) -> None:
        self._since = facts.seconds


@dataclasses.dataclass(repr=False)
class _AtEnd(Trigger):
    word = "at_end"
    is_foreseen = True

    def holds(self, facts: Facts) -> bool:
        return facts.is_last


@dataclasses.dataclass(repr=False)
class _LossBelow(Trigger):
    word = "loss_below"
    bound: float

    def holds(self, facts: Facts) -> bool:
        return facts.loss < self.bound


@dataclasses.dataclass(repr=False)
class _Reached(Trigger):
    word = "reached"
    metric: str
    bound: float
    mode: str

    def __post_init__(self) -> None:
        self.metrics = (self.metric,)

    def holds(self, facts: Facts) -> bool:
        found = facts.validation.get(self.metric, math.nan)
        return found >= self.bound if self.mode == "max" else found <= self.bound


@dataclasses.dataclass(repr=False)
class _Plateau(Trigger):
    word = "plateau"
    metric: str
    patience: int
    mode: str
    min_delta: float
    _best: float = dataclasses.field(default=math.nan, init=False)
    _num_worse: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        self.metrics = (self.metric,)

    def holds(self, facts: Facts) -> bool:
        return self._num_worse >= self.patience

    def validated(self, result: Mapping[str, float]) -> None:
        found = result.get(self.metric, math.nan)
        gain = found - self._best if self.mode == "max" else self._best - found
        if gain > self.min_delta or math.isnan(self._best):
            self._best, self._num_worse = found, 0
        else:
            self._num_worse += 1


class _Pair(Trigger):
    """Two triggers with a sign between them."""

    def __init__(self, first: Trigger, second: Trigger) -> None:
        self.parts = (first, second)
        self.metrics = first.metrics + second.metrics

    def __repr__(self) -> str:
        return f"({self.parts[0]!r} {self.word} {self.parts[1]!r})"

    def next_after(self, completed: int, iterations_per_epoch: int) -> int | None:
        found = (part.next_after(completed, iterations_per_epoch) for part in self.parts)
        return min((each for each in found if each is not None), default=None)

    def validated(self, result: Mapping[str, float]) -> None:
        for part in self.parts:
            part.validated(result)

    def fired(self, facts: Facts) -> None:
        for part in self.parts:
            part.fired(facts)


class _Or(_Pair):
    word = "|"

    def holds(self, facts: Facts) -> bool:
        return any(part.holds(facts) for part in self.parts)

    @property
    def is_foreseen(self) -> bool:  # type: ignore[override]
        return all(part.is_foreseen for part in self.parts)


class _And(_Pair):
    word = "&"

    def holds(self, facts: Facts) -> bool:
        return all(part.holds(facts) for part in self.parts)

    @property
    def is_foreseen(self) -> bool:  # type: ignore[override]
        return any(part.is_foreseen for part in self.parts)


# --- the words --------------------------------------------------------------------------------------------------------


def iterations(number: int) -> Trigger:
    """After every `number` iterations of the training."""
    return _Iterations(_positive_int("iterations", number))


def epochs(number: int) -> Trigger:
    """After every `number` epochs."""
    return _Epochs(_positive_int("epochs", number))


def seconds(number: float) -> Trigger:
    """When `number` seconds have passed since the last time, or since the run began."""
    if not _is_number(number) or not 0 < number < math.inf:
        raise ConfigError(f"seconds({number!r}): give a positive number")
    return _Seconds(float(number))


def at_end() -> Trigger:
    """After the training's last iteration."""
    return _AtEnd()


def loss_below(bound: float) -> Trigger:
    """After an iteration whose mean training loss is below `bound`."""
    return _LossBelow(_number("loss_below", bound))


def reached(metric: str, bound: float, mode: str = "max") -> Trigger:
    """Where the newest validation's `metric` is at least `bound`, or at most with mode "min"."""
    return _Reached(_metric("reached", metric), _number("reached", bound), _mode("reached", mode))


def plateau(metric: str, patience: int, mode: str = "min", min_delta: float = 0.0) -> Trigger:
    """Where `patience` validations in a row have not improved `metric` by more than `min_delta`."""
    patience = _positive_int("plateau", patience)
    return _Plateau(_metric("plateau", metric), patience, _mode("plateau", mode), _number("plateau", min_delta))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive_int(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}({value!r}): give a whole number of at least 1")
    return value


def _number(name: str, value: object) -> float:
    if not isinstance(value, int | float) or not _is_number(value) or not math.isfinite(value):
        raise ConfigError(f"{name}({value!r}): give a finite number")
    return float(value)


def _metric(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f'{name}({value!r}): give the name of a metric in quotes, such as "accuracy"')
    return value


def _mode(name: str, value: object) -> str:
    if value not in ("min", "max"):
        raise ConfigError(f'{name}: mode is {value!r}, must be "min" or "max"')
    return str(value)
