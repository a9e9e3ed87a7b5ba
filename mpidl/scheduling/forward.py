"""Calling a model and a loss on a batch, whatever its structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mpidl.errors import UserError

LossFunction = Callable[[Any, Any], Any]


def split_batch(batch: Any) -> tuple[Any, Any]:
    """The inputs and the targets of a batch.

    A tuple's last element is the target; what stands before it is the input (several become a tuple). Anything else
    (a dict, a tensor) is both: the loss picks from it what it needs.
    """
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    return batch, batch


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call with one tensor, with a tuple's elements, or with a dict's entries as keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def loss_sum(loss_fn: LossFunction, outputs: Any, targets: Any, samples: int) -> tuple[torch.Tensor, float]:
    """The loss summed over a batch and the weight that belongs to it.

    Args:
        loss_fn: returns the mean over the samples, or (sum, weight) where samples do not weigh the same (tokens).
        outputs: what the model returned.
        targets: what the batch had as targets.
        samples: samples in the batch: the weight of a mean.
    """
    loss = loss_fn(outputs, targets)
    if isinstance(loss, tuple):
        total, weight = loss
        return total, float(weight)
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise UserError(f"the loss must be a tensor of no dimension (a mean) or (sum, weight); it is {found}")
    return loss * samples, float(samples)
