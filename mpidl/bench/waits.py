"""Compute replaced by waits of measured length, so that many hosts can be emulated on few cores.

1. *measure*: one rank, alone, trains on a batch and takes down each layer's time (`measure_course`). A *layer* is a
   module with parameters of its own. Its forward lasts until the next layer's begins, or the loss is there; its
   backward ends when the last of its gradients is there. So what lies between two layers counts to one of them.
2. *wait*: `Waiting` has the model's parameters, in the same order, and no other part of it. Its layers stand in a row,
   in the order of the real forward; each sleeps for its time, forward and backward. Autograd runs through them as
   through the real ones: a layer's forward waits for its weights, and its gradients, which are zeros, are there when
   the real ones would be. So whatever overlaps with real compute overlaps with waits; sums, updates and messages are
   real.

A sleep that lasts too long is taken off the following ones. What differs from compute: the core is free meanwhile, for
the exchange too, and there are no buffers.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpidl.bench.measuring import pause

_ITERATIONS = 4
"""That are measured; the first one, which touches memory, does not count."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """Seconds of a module's own compute, for a batch of some size."""

    name: str
    forward_s: float
    backward_s: float

    def scaled(self, factor: float) -> Layer:
        """So many times as long."""
        return Layer(self.name, factor * self.forward_s, factor * self.backward_s)


Course = tuple[Layer, ...]
"""One forward and backward, in the order of forward."""


def seconds_of(course: Iterable[Layer]) -> float:
    """Forward and backward of all layers."""
    return sum(layer.forward_s + layer.backward_s for layer in course)


def with_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have parameters of their own, by name."""
    modules = model.named_modules()
    return {name: each for name, each in modules if next(each.parameters(recurse=False), None) is not None}


def measure_course(model: nn.Module, loss_of: Callable[[Any, Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Course:
    """Time the layers of a model on this rank; medians of three iterations. Nothing is updated.

    Args:
        model: what is trained.
        loss_of: of the model's outputs and the targets.
        batch: samples and targets.

    Returns:
        The layers that forward passes through, in the order in which it first does.
    """
    watch = _Stopwatch(model)
    courses = [watch.iterate(model, loss_of, batch) for _ in range(_ITERATIONS)][1:]
    watch.remove()
    times = np.median([[(layer.forward_s, layer.backward_s) for layer in course] for course in courses], axis=0)
    return tuple(Layer(layer.name, *map(float, pair)) for layer, pair in zip(courses[0], times, strict=True))


class _Stopwatch:
    """Hooks at the layers of a model, and what they saw in one iteration."""

    def __init__(self, model: nn.Module) -> None:
        self._begun: list[tuple[str, float]] = []
        self._ready: dict[str, float] = {}
        self._hooks: list[Any] = []
        for name, module in with_parameters(model).items():
            self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    hook = parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._leave(name))
                    self._hooks.append(hook)

    def _enter(self, name: str) -> None:
        self._begun.append((name, time.perf_counter()))

    def _leave(self, name: str) -> None:
        self._ready[name] = time.perf_counter()

    def iterate(
        self, model: nn.Module, loss_of: Callable[[Any, Tensor], Tensor], batch: tuple[Tensor, Tensor]
    ) -> Course:
        """One forward and backward."""
        self._begun, self._ready = [], {}
        samples, targets = batch
        begin = time.perf_counter()
        loss = loss_of(model(samples), targets)
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        model.zero_grad()
        return course_of(self._begun, self._ready, (begin, middle, end))

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()


def course_of(
    begun: Sequence[tuple[str, float]], ready: Mapping[str, float], clock: tuple[float, float, float]
) -> Course:
    """Cut the time of one iteration into its layers' parts, none negative, which add up to the whole.

    Args:
        begun: names of layers and when each call began, in that order.
        ready: when the last gradient of a layer was there; without those that have none.
        clock: when forward began, when it had ended with the loss, and when backward had.
    """
    begin, middle, end = clock
    names = list(dict.fromkeys(name for name, _ in begun))
    forward, backward = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    starts = [begin, *(start for _, start in begun[1:]), middle]
    for (name, _), start, stop in zip(begun, starts, starts[1:], strict=False):
        forward[name] += stop - start
    last = middle
    for name in reversed(names):
        now = max(last, ready.get(name, last))
        backward[name], last = now - last, now
    backward[names[0]] += end - last
    return tuple(Layer(name, forward[name], backward[name]) for name in names)


class Waiting(nn.Module):
    """A model's parameters, and waits in place of its compute.

    Args:
        model: whose parameters these become, with their values; it is of no use afterwards.
        courses: batch size -> layers, as `measure_course` gave them for this model.
    """

    def __init__(self, model: nn.Module, courses: Mapping[int, Course]) -> None:
        super().__init__()
        self._courses = courses
        # Its samples and outputs are as small as can be: they cost nothing.
        self.image_shape, self.num_classes = (1,), 1
        largest = max((parameter.numel() for parameter in model.parameters()), default=0)
        zeros = torch.zeros(largest)
        modules = with_parameters(model)
        self._layers = nn.ModuleList(_WaitingLayer(module, zeros) for module in modules.values())
        self._index = {name: index for index, name in enumerate(modules)}
        self._pace = Pace()

    def forward(self, samples: Tensor) -> Tensor:
        """Wait for every layer; zeros, float32, (batch, 1)."""
        values = torch.zeros(len(samples), 1)
        for layer in self._courses[len(samples)]:
            values = self._layers[self._index[layer.name]](values, layer, self._pace)
        return values


class Pace:
    """Sleeps that add up to what they should: what one lasts too long, the next ones are shorter."""

    def __init__(self) -> None:
        self._owed_s = 0.0

    def wait(self, seconds: float) -> None:
        """Sleep for so long, more or less."""
        self._owed_s += seconds
        if self._owed_s > 0:
            self._owed_s -= pause(self._owed_s)


class _WaitingLayer(nn.Module):
    def __init__(self, module: nn.Module, zeros: Tensor) -> None:
        super().__init__()
        self._zeros = zeros
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, values: Tensor, layer: Layer, pace: Pace) -> Tensor:
        passed: Tensor = _Wait.apply(values, layer, pace, self._zeros, *self.parameters(recurse=False))  # type: ignore[no-untyped-call]
        return passed


class _Wait(torch.autograd.Function):
    """Passes values on, and zeros to its parameters as gradients, after a while."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, layer: Layer, pace: Pace, zeros: Tensor, *parameters: Tensor) -> Tensor:
        pace.wait(layer.forward_s)
        ctx.layer, ctx.pace, ctx.zeros = layer, pace, zeros
        ctx.shapes = [parameter.shape for parameter in parameters]
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.pace.wait(ctx.layer.backward_s)
        # Views of one memory: whoever takes a gradient copies it, as the ParameterManager does into its row.
        zeros = (ctx.zeros[: shape.numel()].view(shape) for shape in ctx.shapes)
        return gradient, None, None, None, *zeros
