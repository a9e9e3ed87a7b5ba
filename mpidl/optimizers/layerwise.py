"""What layer-wise optimizers have in common: an update scaled by a ratio of norms over each whole tensor.

A step has two phases: 1. *measure*: for each tensor, the norm of its weights and of what is to move them; 2. *move*
each tensor by as much as the ratio of the two says.

In ordinary PyTorch a tensor is whole and its norms are its own. Under a `ParameterManager` each of the optimizer's
tensors is a piece of one parameter, of which other ranks hold the rest; the manager then puts other `norms` into the
optimizer, which add pieces up over all ranks (`mpidl.parameters.norms`). The optimizer itself knows nothing of it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""One of the optimizer's tensors each, and what is measured beside it, of the same shape."""

Norms = Callable[[Pairs], list[tuple[float, float]]]
"""From pairs to the L2 norms of both over the whole tensors, pair by pair. Takes all pairs, each before the next."""

Group = dict[str, Any]

CHUNK_SIZE = 1 << 16
"""Elements that are squared at a time: float64 copies of them stay in cache."""


def whole_tensor_norms(pairs: Pairs) -> list[tuple[float, float]]:
    """The norms where every tensor is whole; squares are added in float64."""
    return [(_norm(weights), _norm(measured)) for weights, measured in pairs]


def _norm(values: torch.Tensor) -> float:
    squares = [chunk.double().square().sum() for chunk in values.detach().reshape(-1).split(CHUNK_SIZE)]
    return math.sqrt(math.fsum(map(float, squares)))


class LayerWise(torch.optim.Optimizer, abc.ABC):
    """An optimizer that scales each tensor's update by a ratio of norms over the whole tensor.

    Param groups with the option `adapt=False` take the ratio 1: what one uses for biases and normalisation layers
    (`layer_groups` makes such groups).
    """

    norms: Norms = staticmethod(whole_tensor_norms)  # of the class: a copy of an optimizer is one over whole tensors

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all tensors that have a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(tensor, g) for g in self.param_groups for tensor in g["params"] if tensor.grad is not None]
        found = iter(self.norms(self._measure(moved)))
        for tensor, group in moved:
            self._move(tensor, group, self._ratio(group, *next(found)) if group["adapt"] else 1.0)
        return loss

    def _measure(self, moved: Iterable[tuple[torch.Tensor, Group]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for tensor, group in moved:
            measured = self._measured(tensor, group)
            if group["adapt"]:
                yield tensor, measured

    @abc.abstractmethod
    def _measured(self, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        """What is measured beside the weights; called once for each tensor of a step, before any is moved."""

    @abc.abstractmethod
    def _ratio(self, group: Group, weight_norm: float, measured_norm: float) -> float:
        """What the update is multiplied by."""

    @abc.abstractmethod
    def _move(self, tensor: torch.Tensor, group: Group, ratio: float) -> None:
        """Update one tensor in place."""


def layer_groups(model: nn.Module) -> list[Group]:
    """Param groups for layer-wise optimizers: matrices and kernels; and, apart, what has at most one dimension.

    The second group (biases, scales and shifts of normalisation layers) is neither adapted nor decayed, as is usual:
    the norms of so few numbers say little about a layer. Frozen parameters are in neither.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() > 1]},
        {
            "params": [parameter for parameter in trained if parameter.dim() <= 1],
            "adapt": False,
            "weight_decay": 0.0,
        },
    ]


def check_options(**options: float) -> None:
    """Raise ValueError unless all options are numbers from 0 on."""
    for name, value in options.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"Invalid {name}: {value}; it must be a number from 0 on")
