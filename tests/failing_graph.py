"""A backward pass that fails half-way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Failure(Exception):
    """What it fails with."""


class _Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise Failure


fails_in_backward: Callable[..., torch.Tensor] = _Failing.apply
"""The values themselves; no gradient gets through to those behind them in the graph."""
