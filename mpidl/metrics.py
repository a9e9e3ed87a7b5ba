"""Metrics: functions of (outputs, targets) that return a sum over the samples of the batch."""

from __future__ import annotations

import torch


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How many samples' largest output is at their label.

    Args:
        outputs: float, (samples, classes), or (samples, classes, ...) where a sample has several labels.
        targets: int64, (samples,) or (samples, ...); labels. With several a sample counts by the share that is right.
    """
    return (outputs.argmax(dim=1) == targets).sum() / targets[0].numel()
