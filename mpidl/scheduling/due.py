"""The course of a training by its triggers: where groups end, and what is due after an iteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mpidl.errors import ConfigError
from mpidl.scheduling.plan import Action
from mpidl.scheduling.triggers import Facts, Trigger


@dataclasses.dataclass
class Triggers:
    """The course of a training: epochs of equal length, and what is due when. One on every rank."""

    iterations_per_epoch: int
    epochs: int
    validate: Trigger | None = None
    checkpoint: Trigger | None = None
    summarize: Trigger | None = None
    end: Trigger | None = None
    """Ends the training before its last epoch has."""

    @property
    def total_iterations(self) -> int:
        """Iterations of the whole training, unless it ends earlier."""
        return self.iterations_per_epoch * self.epochs

    def next_cut(self, iteration: int) -> int:
        """The end of the group that begins at `iteration`, if its size did not end it earlier.

        An epoch's end, or the first iteration after which something can be foreseen to be due.
        """
        per_epoch = self.iterations_per_epoch
        found = [(iteration // per_epoch + 1) * per_epoch]
        for trigger in self._all:
            foreseen = trigger.next_after(iteration, per_epoch)
            found += [] if foreseen is None else [foreseen]
        return min(found)

    def foreseen_after(self, completed: int) -> Action:
        """What may be due after `completed` iterations, as far as it can be foreseen."""
        per_epoch, is_last = self.iterations_per_epoch, completed == self.total_iterations
        actions = Action.NONE if completed % per_epoch else Action.END_EPOCH
        named = (Action.VALIDATE, self.validate), (Action.CHECKPOINT, self.checkpoint)
        for action, trigger in named:
            if trigger is not None and (is_last or trigger.next_after(completed - 1, per_epoch) == completed):
                actions |= action
        return actions | Action.END if is_last else actions

    def facts(self, completed: int, loss: float, seconds: float, validation: Mapping[str, float]) -> Facts:
        """What is known after an iteration; `is_last` is whether the training ends there."""
        facts = Facts(
            completed, self.iterations_per_epoch, completed == self.total_iterations, loss, seconds, validation
        )
        ends = self.end is not None and self.end.holds(facts)
        return dataclasses.replace(facts, is_last=facts.is_last or ends)

    def fires(self, trigger: Trigger | None, facts: Facts) -> bool:
        """Whether what the trigger is for is due now; always at the training's end, never without a trigger."""
        is_due = trigger is not None and (trigger.holds(facts) or facts.is_last)
        if is_due and trigger is not None:
            trigger.fired(facts)
        return is_due

    def holds_before_end(self, trigger: Trigger | None, facts: Facts) -> bool:
        """Whether the trigger would hold if the training did not end here."""
        return trigger is not None and trigger.holds(dataclasses.replace(facts, is_last=False))

    def validated(self, result: Mapping[str, float]) -> None:
        """Take a validation's numbers, those of an earlier part of a resumed training too."""
        for trigger in self._all:
            trigger.validated(result)

    def check(self, measured: Sequence[str]) -> None:
        """Raise ConfigError where a trigger looks at what no validation gives.

        Args:
            measured: the names of the numbers that a validation gives; empty: there are no validations.
        """
        for trigger in self._all:
            for metric in trigger.metrics:
                if metric not in measured:
                    known = f"validations give {', '.join(measured)}" if measured else "this run has no validations"
                    raise ConfigError(f"{trigger!r} looks at {metric!r} of the validation, but {known}")

    @property
    def _all(self) -> list[Trigger]:
        return [each for each in (self.validate, self.checkpoint, self.summarize, self.end) if each is not None]
