"""LAMB: Adam with a ratio of norms for each layer, for large batches."""

from __future__ import annotations

from typing import Any

import torch

from mpidl.optimizers.layerwise import Group, LayerWise, check_options


class Lamb(LayerWise):
    """AdamW whose step for each layer has a length in proportion to its weights' norm.

    For each tensor w with gradient g in step t, as in algorithm 2 of the paper, its phi being the identity:

        m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g * g
        r = (m / (1 - beta1 ** t)) / (sqrt(v / (1 - beta2 ** t)) + eps) + weight_decay * w
        w = w - lr * (|w| / |r|) * r

    The ratio is 1 where either norm is 0, as in the authors' code.

    Args:
        params: parameters or param groups; groups with `adapt=False` take the ratio 1 (`layer_groups`).
        lr: learning rate.
        betas: decay of the two moments, from 0 to below 1.
        eps: added to the root of the second moment.
        weight_decay: added to the direction as weight_decay * w.
        adapt: the groups' default.

    Raises:
        ValueError: an option is out of its range.

    Source: You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, arXiv 1904.00962
    (2019).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        adapt: bool = True,
    ) -> None:
        check_options(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"Invalid betas: {betas}; both must be from 0 to below 1")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt})

    def _measured(self, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        assert tensor.grad is not None
        state = self.state[tensor]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(tensor)
            state["exp_avg_sq"] = torch.zeros_like(tensor)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(tensor.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(tensor.grad, tensor.grad, value=1 - beta2)
        return self._direction(tensor, group)

    def _direction(self, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        """The paper's r: made twice, as keeping it would take as much memory as a moment."""
        state, (beta1, beta2) = self.state[tensor], group["betas"]
        step = float(state["step"])
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        direction: torch.Tensor = (state["exp_avg"] / (1 - beta1**step)).div_(root)
        return direction.add_(tensor, alpha=group["weight_decay"]) if group["weight_decay"] else direction

    def _ratio(self, group: Group, weight_norm: float, measured_norm: float) -> float:
        return weight_norm / measured_norm if weight_norm > 0 and measured_norm > 0 else 1.0

    def _move(self, tensor: torch.Tensor, group: Group, ratio: float) -> None:
        tensor.sub_(self._direction(tensor, group), alpha=group["lr"] * ratio)
