"""Batch normalisation by the statistics of the whole batch: of all ranks' samples, not of each partition's.

Forward (training mode) is a collective; phases:

1. *local*: this rank's count of values, mean and sum of squared deviations of each channel, by the corrected two-pass
   algorithm: sums are of differences from a first mean, so that a mean far from zero costs no digits.
2. *gather*: one small allgather, float64, 1 + 2 channels numbers a rank.
3. *combine*: every rank puts all ranks' numbers together, in rank order (Chan, Golub, LeVeque): all have the same bits.

Backward is one more small allgather, of the sums of the gradient and of its products with the deviations: each rank's
loss depends on all ranks' samples. So all ranks have to run forward and backward equally often and in the same order,
also one without samples (on an empty batch). Who raises between two of these exchanges leaves the others waiting in the
next one, as in any collective, until the job is ended.

Sources: Chan, Golub, LeVeque, Algorithms for computing the sample variance, The American Statistician 37 (1983);
torch.nn.SyncBatchNorm, whose names and defaults these are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mpidl.errors import UserError
from mpidl.runtime import init, on_all_ranks


class SyncBatchNorm(_BatchNorm):
    """As `torch.nn.BatchNorm1d`, 2d and 3d, with the mean and variance of all ranks' samples in training mode.

    Forward and backward in training mode are collective: see the module's docstring. Evaluation mode is torch's own,
    without communication. Construction is not collective; the arguments are `torch.nn.BatchNorm2d`'s.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.size(1) != self.num_features:
            raise UserError(
                f"SyncBatchNorm takes inputs of shape (samples, {self.num_features}, ...), not {tuple(input.shape)}"
            )

    def forward(self, input: Tensor) -> Tensor:
        """Normalise. Collective in training mode; a rank without samples passes an empty batch.

        Args:
            input: floating point, (samples, num_features, ...).

        Returns:
            The same shape and dtype.

        Raises:
            UserError: on every rank: all ranks together have one value a channel, which has no variance.
        """
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        total, mean, squares = _statistics(input.detach())
        if total == 1:
            raise on_all_ranks(
                UserError("SyncBatchNorm got one value a channel from all ranks together; it needs at least two")
            )
        variance = squares / max(total, 1)
        if self.track_running_stats and total:
            self._track(mean, squares / (total - 1))
        arguments = (input, self.weight, self.bias, mean, variance, self.eps, total)
        output: Tensor = _Normalise.apply(*arguments)  # type: ignore[no-untyped-call]
        return output

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics; `variance` is the unbiased one."""
        running_mean, running_var, count = self.running_mean, self.running_var, self.num_batches_tracked
        assert running_mean is not None
        assert running_var is not None
        assert count is not None
        count.add_(1)
        factor = 1.0 / float(count) if self.momentum is None else self.momentum
        running_mean.mul_(1 - factor).add_(mean.to(running_mean.dtype), alpha=factor)
        running_var.mul_(1 - factor).add_(variance.to(running_var.dtype), alpha=factor)


class _Normalise(torch.autograd.Function):
    """(input - mean) / sqrt(variance + eps) * weight + bias, where mean and variance are functions of all inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        total: int,
    ) -> Tensor:
        dtype = _wide(input.dtype)
        ctx.save_for_backward(input, weight, mean.to(dtype), torch.rsqrt(variance + eps).to(dtype))
        ctx.total = total
        return F.batch_norm(input, mean.to(dtype), variance.to(dtype), weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, inverse = ctx.saved_tensors
        dims, shape = _dims(input)
        deviation = input - mean.view(shape)
        grad_sum, product_sum = grad.sum(dims, dtype=mean.dtype), (grad * deviation).sum(dims)
        grad_input = None
        if ctx.needs_input_grad[0]:  # alike on all ranks, whose models are the same
            everyones = init().for_purpose("batchnorm").allgather(torch.stack([grad_sum, product_sum]).double().numpy())
            grad_mean, product_mean = torch.from_numpy(everyones.sum(axis=0) / max(ctx.total, 1)).to(mean.dtype)
            slope = -product_mean * inverse.square()
            scale = inverse if weight is None else inverse * weight
            # In place: `deviation` is this function's own.
            inner = deviation.mul_(slope.view(shape)).add_(grad).sub_(grad_mean.view(shape))
            grad_input = inner.mul_(scale.view(shape)).to(input.dtype)
        grad_weight = product_sum * inverse if ctx.needs_input_grad[1] else None
        grad_bias = grad_sum if ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias, None, None, None, None


def _dims(input: Tensor) -> tuple[list[int], list[int]]:
    """All dimensions but the channels', and the shape in which a value per channel fits the input."""
    return [0, *range(2, input.dim())], [1, -1, *[1] * (input.dim() - 2)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _statistics(input: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of every channel over all ranks, the same bits on each. Collective.

    Returns:
        Values per channel; float64, (channels,); float64, (channels,).
    """
    count, mean, squares = _local_statistics(input)
    everyones = init().for_purpose("batchnorm").allgather(np.concatenate([[count], mean.numpy(), squares.numpy()]))
    counts, means, all_squares = everyones[:, :1], *np.split(everyones[:, 1:], 2, axis=1)
    total = int(counts.sum())
    whole_mean = (counts * means).sum(axis=0) / max(total, 1)
    whole_squares = (all_squares + counts * (means - whole_mean) ** 2).sum(axis=0)
    return total, torch.from_numpy(whole_mean), torch.from_numpy(whole_squares)


def _local_statistics(input: Tensor) -> tuple[int, Tensor, Tensor]:
    """As `_statistics`, of this rank alone; zeros where it has no samples."""
    dims, shape = _dims(input)
    channels = input.size(1)
    count = input.numel() // channels
    if count == 0:
        return 0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    first_mean = input.mean(dims, dtype=_wide(input.dtype))
    deviation = input - first_mean.view(shape)
    rest = deviation.sum(dims).double()
    squares = deviation.square_().sum(dims).double()
    return count, first_mean.double() + rest / count, (squares - rest.square() / count).clamp_(min=0)


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Replace all of torch's batch normalisations in a model by SyncBatchNorm. Not collective.

    To be called on every rank, before a ParameterManager or an optimizer is made. Parameters, statistics and names stay
    what they are.

    Args:
        model: changed in place; where it is itself a batch normalisation, only the result is new.

    Returns:
        The model.

    Raises:
        UserError: a lazy batch normalisation does not know its number of features yet.
    """
    converted: dict[int, nn.Module] = {}  # a module that hangs in two places stays one

    def replaced(module: nn.Module) -> nn.Module:
        if not isinstance(module, _BatchNorm) or isinstance(module, SyncBatchNorm):
            return module
        if id(module) not in converted:
            converted[id(module)] = _converted(module)
        return converted[id(module)]

    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = replaced(child)
    return replaced(model)


def _converted(module: _BatchNorm) -> SyncBatchNorm:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise UserError(f"{type(module).__name__} does not know its number of features; run one forward pass before")
    made = SyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    made.weight, made.bias = module.weight, module.bias
    for name, buffer in module._buffers.items():
        made._buffers[name] = buffer
    return made.train(module.training)


def needs_lockstep(model: nn.Module) -> bool:
    """Whether forward in training is a collective: a SyncBatchNorm is not, by its user, kept in evaluation mode."""
    return any(isinstance(m, SyncBatchNorm) and (m.training or not model.training) for m in model.modules())
