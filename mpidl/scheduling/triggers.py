"""What is due after which iteration. Pure.

Groups end where something is due, so that nothing is skipped or late, whatever the group size.
"""

from __future__ import annotations

import dataclasses

from mpidl.scheduling.plan import Action


@dataclasses.dataclass(frozen=True)
class Triggers:
    """The course of a training: epochs of equal length, with validation and checkpoints at the end of some."""

    iterations_per_epoch: int
    epochs: int
    validate_every: int
    """Epochs between validations; 0: never. The last epoch is always validated unless it is 0."""
    checkpoint_every: int
    """Epochs between checkpoints; 0: never. The last epoch always has one unless it is 0."""

    @property
    def total_iterations(self) -> int:
        """Iterations of the whole training."""
        return self.iterations_per_epoch * self.epochs

    def next_cut(self, iteration: int) -> int:
        """The end of the group that begins at `iteration`, if its size did not end it earlier."""
        return (iteration // self.iterations_per_epoch + 1) * self.iterations_per_epoch

    def actions_after(self, completed: int) -> Action:
        """What is due once `completed` iterations of the training are done."""
        if completed % self.iterations_per_epoch:
            return Action.NONE
        epoch = completed // self.iterations_per_epoch
        actions, last = Action.END_EPOCH, completed == self.total_iterations
        if self.validate_every and (epoch % self.validate_every == 0 or last):
            actions |= Action.VALIDATE
        if self.checkpoint_every and (epoch % self.checkpoint_every == 0 or last):
            actions |= Action.CHECKPOINT
        return actions | Action.END if last else actions
