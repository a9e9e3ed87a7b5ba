"""Metrics: functions of (outputs, targets) that return a sum over the samples of the batch."""

from __future__ import annotations

import torch


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How many samples' largest output is at their label.

    Args:
        outputs: float, (samples, classes).
        targets: int64, (samples,); labels.
    """
    return (outputs.argmax(dim=1) == targets).sum()
