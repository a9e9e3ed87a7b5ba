"""The oracle: plain PyTorch in one process over the same partitions, and a plain loop without partitions.

Written apart from mpidl's exchange: it shares only the order of samples (`mpidl.data`) and the seeds with it. The rules
for cutting epochs and batches stand here once more, in words of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpidl.data import partition_seed, permute, sample_seed, seed_everything

Float32Array = NDArray[np.float32]
Span = tuple[int, int]
Batch = tuple[Any, Any]
Samples = Callable[[int, Sequence[int]], Batch]
"""From (epoch, sample indices) to (inputs, targets)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained; the names are the Trainer's."""

    loss_fn: Callable[[Any, Any], Any]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    samples: Samples
    num_samples: int
    batch_size: int
    partitions: int = 8
    epochs: int = 1
    seed: int = 0
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None
    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    max_iterations: int | None = None
    """Where the oracle stops, inside an epoch."""


def of_arrays(*arrays: torch.Tensor) -> Samples:
    """Samples of tensors: the last is the target."""

    def samples(epoch: int, indices: Sequence[int]) -> Batch:
        del epoch
        taken = [array[list(indices)] for array in arrays]
        return (taken[0] if len(taken) == 2 else tuple(taken[:-1])), taken[-1]

    return samples


def of_dataset(dataset: Any, seed: int) -> Samples:
    """Samples of a Dataset of (input, target) tensors, each seeded by (seed, epoch, index) before it is read."""

    def samples(epoch: int, indices: Sequence[int]) -> Batch:
        items = []
        for index in indices:
            seed_everything(sample_seed(seed, epoch, index))
            items.append(dataset[index])
        return torch.stack([item[0] for item in items]), torch.stack([item[1] for item in items])

    return samples


# --- cuts -------------------------------------------------------------------------------------------------------------


def batches(num_samples: int, batch_size: int) -> list[Span]:
    """An epoch's batches: a smaller last one is used; one sample that is left over joins the batch before it."""
    spans = [(start, min(start + batch_size, num_samples)) for start in range(0, num_samples, batch_size)]
    if len(spans) > 1 and spans[-1][1] - spans[-1][0] == 1:
        spans[-2:] = [(spans[-2][0], num_samples)]
    return spans


def cut(span: Span, batch_size: int, partitions: int) -> list[Span]:
    """A batch's partitions: no smaller than two samples where those of a full batch are not."""
    size = span[1] - span[0]
    if batch_size >= 2 * partitions:
        partitions = max(1, min(partitions, size // 2))
    partitions = min(partitions, size)
    edges = [span[0] + size * number // partitions for number in range(partitions + 1)]
    return list(itertools.pairwise(edges))


def tree_sum(rows: Sequence[Float32Array]) -> Float32Array:
    """The sum in the fixed tree: split at the largest power of two smaller than the length."""
    if len(rows) == 1:
        return rows[0]
    half = 1
    while 2 * half < len(rows):
        half *= 2
    return tree_sum(rows[:half]) + tree_sum(rows[half:])


# --- training ---------------------------------------------------------------------------------------------------------


def train(model: nn.Module, job: Job) -> list[float]:
    """Train in place over partitions; returns each epoch's mean loss."""
    return [loss for loss, _ in epochs(model, job)]


def epochs(model: nn.Module, job: Job) -> Iterator[tuple[float, torch.optim.Optimizer]]:
    """Train epoch by epoch: yields the mean loss and the optimizer."""
    optimizer = job.optimizer(job.groups(model) if job.groups else model.parameters())
    scheduler = job.schedule(optimizer) if job.schedule else None
    iteration = 0
    model.train()
    for epoch in range(job.epochs):
        totals: list[float] = []
        weights: list[float] = []
        for span in batches(job.num_samples, job.batch_size):
            if iteration == job.max_iterations:
                break
            parts = cut(span, job.batch_size, job.partitions)
            loss_sums, part_weights = _iterate(model, job, epoch, iteration, parts, optimizer)
            if scheduler is not None:
                scheduler.step()
            totals += loss_sums
            weights += part_weights
            iteration += 1
        yield math.fsum(totals) / math.fsum(weights), optimizer


def _iterate(
    model: nn.Module, job: Job, epoch: int, iteration: int, parts: Sequence[Span], optimizer: torch.optim.Optimizer
) -> tuple[list[float], list[float]]:
    loss_sums, weights = [], []

    def part(number: int, start: int, stop: int) -> float:
        positions = permute(np.arange(start, stop), job.num_samples, job.seed, epoch)
        inputs, targets = job.samples(epoch, positions.tolist())
        seed_everything(partition_seed(job.seed, iteration, number))
        loss_sum, weight = summed(job.loss_fn(call(model, inputs), targets), stop - start)
        loss_sum.backward()
        loss_sums.append(float(loss_sum.detach()))
        weights.append(weight)
        return weight

    update(model, optimizer, [functools.partial(part, number, *span) for number, span in enumerate(parts)])
    return loss_sums, weights


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Callable[[], float]],
    of_means: bool = False,
) -> None:
    """One iteration: every part from the same buffers, gradients and changes of buffers added up, one step.

    Args:
        model: trained in place; the mean gradient is left in its parameters' `.grad`.
        optimizer: of the model.
        parts: each runs forward and backward and returns its weight.
        of_means: gradients are of means, and have to be multiplied by the weights.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = {name: buffer.clone() for name, buffer in persistent_buffers(model).items()}
    gradients: list[list[Float32Array]] = [[] for _ in parameters]
    changes: dict[str, list[Float32Array]] = {name: [] for name in base}
    weights = []
    for part in parts:
        for name, buffer in persistent_buffers(model).items():
            buffer.copy_(base[name])
        for parameter in parameters:
            parameter.grad = None
        weight = part()
        for rows, parameter in zip(gradients, parameters, strict=True):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            rows.append(gradient.numpy() * np.float32(weight if of_means else 1))
        for name, buffer in persistent_buffers(model).items():
            difference = torch.where(buffer == base[name], 0, buffer - base[name]).to(torch.float32)
            changes[name].append(difference.numpy() * np.float32(weight))
        weights.append(weight)
    divisor = np.float32(math.fsum(weights))
    for rows, parameter in zip(gradients, parameters, strict=True):
        parameter.grad = torch.from_numpy(np.asarray(tree_sum(rows) / divisor))
    optimizer.step()
    for name, buffer in persistent_buffers(model).items():
        change = torch.from_numpy(np.asarray(tree_sum(changes[name]) / divisor))
        moved = base[name] + (change if buffer.is_floating_point() else change.round()).to(buffer.dtype)
        buffer.copy_(torch.where(change == 0, base[name], moved))


def train_plainly(model: nn.Module, job: Job) -> list[float]:
    """Train in place by the loop that everyone writes: one backward over the whole batch; gives epoch losses."""
    optimizer = job.optimizer(job.groups(model) if job.groups else model.parameters())
    scheduler = job.schedule(optimizer) if job.schedule else None
    losses = []
    model.train()
    for epoch in range(job.epochs):
        totals, weights = [], []
        for start, stop in batches(job.num_samples, job.batch_size):
            positions = permute(np.arange(start, stop), job.num_samples, job.seed, epoch)
            inputs, targets = job.samples(epoch, positions.tolist())
            loss_sum, weight = summed(job.loss_fn(call(model, inputs), targets), stop - start)
            optimizer.zero_grad()
            (loss_sum / weight).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            totals.append(float(loss_sum.detach()))
            weights.append(weight)
        losses.append(math.fsum(totals) / math.fsum(weights))
    return losses


def evaluate(
    model: nn.Module,
    job: Job,
    size: int,
    metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
    num_samples: int | None = None,
) -> dict[str, float]:
    """The mean loss and metrics over samples 0, 1, ... in chunks of `size`."""
    total = job.num_samples if num_samples is None else num_samples
    sums: dict[str, list[float]] = {name: [] for name in ("loss", "weight", *(metrics or {}))}
    model.eval()
    with torch.no_grad():
        for start in range(0, total, size):
            stop = min(start + size, total)
            inputs, targets = job.samples(0, range(start, stop))
            outputs = call(model, inputs)
            loss_sum, weight = summed(job.loss_fn(outputs, targets), stop - start)
            sums["loss"].append(float(loss_sum))
            sums["weight"].append(weight)
            for name, metric in (metrics or {}).items():
                sums[name].append(float(metric(outputs, targets)))
    model.train()
    weight = math.fsum(sums.pop("weight"))
    loss = math.fsum(sums.pop("loss")) / weight
    return {"loss": loss, **{name: math.fsum(values) / total for name, values in sums.items()}, "samples": total}


# --- small things -----------------------------------------------------------------------------------------------------


def call(model: nn.Module, inputs: Any) -> Any:
    """The model of one tensor, a tuple or a dict."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def summed(loss: Any, samples: int) -> tuple[torch.Tensor, float]:
    """(sum, weight) of a mean over samples, or of a (sum, weight)."""
    if isinstance(loss, tuple):
        return loss[0], float(loss[1])
    return loss * samples, float(samples)


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The numeric buffers that a state dict holds."""
    saved = model.state_dict(keep_vars=True)
    return {name: b for name, b in model.named_buffers() if name in saved and b.dtype != torch.bool}


def differing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """The names whose tensors differ in any bit but the sign of a zero."""
    assert list(one) == list(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


def largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Over all tensors: the largest |difference| of a tensor over its largest |value|."""
    ratios = [
        float((one[name].double() - other[name].double()).abs().max() / other[name].double().abs().max())
        for name in other
    ]
    return max(ratios)
