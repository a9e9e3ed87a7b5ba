"""LARS: layer-wise adaptive rate scaling, for large batches."""

from __future__ import annotations

from typing import Any

import torch

from mpidl.optimizers.layerwise import Group, LayerWise, check_options


class Lars(LayerWise):
    """SGD with momentum whose rate for each layer is in proportion to its weights' norm over its gradient's.

    For each tensor w with gradient g, as in algorithm 1 of the paper:

        ratio = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)
        v = momentum * v + lr * ratio * (g + weight_decay * w)
        w = w - v

    The ratio is 1 where |w| is 0 or the denominator is, of which the paper says nothing.

    Others differ: NVIDIA's apex (LARC with clip=False) multiplies v by lr instead of what enters v, so that a changed
    rate acts on the past too; with clip=True it bounds lr * ratio by lr; where |g| is 0 it leaves weight decay out.
    BigDL's LarsSGD is this one without eps, its `trust` 1 by default, and bounds the ratio where it is not a number.

    Args:
        params: parameters or param groups; groups with `adapt=False` take the ratio 1 (`layer_groups`).
        lr: global learning rate.
        momentum: of the velocity v; 0: no state is kept.
        trust_coefficient: how much of its own length a layer may move at lr 1.
        weight_decay: added to the gradient as weight_decay * w.
        eps: keeps the ratio finite.
        adapt: the groups' default.

    Raises:
        ValueError: an option is negative or not a number.

    Source: You, Gitman, Ginsburg, Large Batch Training of Convolutional Networks, arXiv 1708.03888 (2017).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        trust_coefficient: float = 1e-3,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        *,
        adapt: bool = True,
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
            "weight_decay": weight_decay,
            "eps": eps,
        }
        check_options(**options)
        super().__init__(params, {**options, "adapt": adapt})

    def _measured(self, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        assert tensor.grad is not None
        return tensor.grad

    def _ratio(self, group: Group, weight_norm: float, measured_norm: float) -> float:
        denominator = measured_norm + group["weight_decay"] * weight_norm + group["eps"]
        return group["trust_coefficient"] * weight_norm / denominator if weight_norm > 0 and denominator > 0 else 1.0

    def _move(self, tensor: torch.Tensor, group: Group, ratio: float) -> None:
        assert tensor.grad is not None
        change, rate = tensor.grad, group["lr"] * ratio
        if group["weight_decay"]:
            change = change.add(tensor, alpha=group["weight_decay"])
        if not group["momentum"]:
            tensor.sub_(change, alpha=rate)
            return
        state = self.state[tensor]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(tensor)
        tensor.sub_(state["momentum_buffer"].mul_(group["momentum"]).add_(change, alpha=rate))
