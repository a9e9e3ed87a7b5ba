"""What the ways are given: optimizers, weights, gradients, models and batches, the same for all of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpidl import models
from mpidl.config import near
from mpidl.data import Loader, as_source
from mpidl.errors import ConfigError
from mpidl.parameters import OptimizerFactory

SEED = 20
_TENSOR_SIZE = 1_000_000
_BATCHES = 4
"""So many different ones, in another order every time."""
_BATCHES_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A torch optimizer at its fastest."""

    name: str
    kind: type[torch.optim.Optimizer]
    options: Mapping[str, Any]
    num_states: int
    """Tensors of state as long as the parameters."""

    @property
    def factory(self) -> OptimizerFactory:
        """Makes it, of parameters or param groups."""
        return functools.partial(self.kind, **self.options)


OPTIMIZERS = {
    "sgd": Optimizer("sgd", torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "fused": True}, 1),
    "adam": Optimizer("adam", torch.optim.Adam, {"lr": 0.001, "fused": True}, 2),
}


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """What is synchronised: weights that all ranks begin with, and this rank's gradients."""

    name: str
    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    optimizer: Optimizer

    @classmethod
    def of(cls, name: str, shapes: Iterable[Sequence[int]], optimizer: Optimizer, rank: int) -> Exchanged:
        """Random weights, and gradients that differ from rank to rank.

        The gradients are between 0.5 and 1.5: no sum of them comes near zero, where the last bit of a rounding would
        decide the direction of Adam's step.
        """
        common, own = torch.Generator().manual_seed(SEED), torch.Generator().manual_seed(SEED + 1 + rank)
        shapes = list(shapes)
        weights = [torch.rand(tuple(shape), generator=common) - 0.5 for shape in shapes]
        gradients = [torch.rand(tuple(shape), generator=own) + 0.5 for shape in shapes]
        return cls(f"{name}, {optimizer.name}", weights, gradients, optimizer)

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(weight.numel() for weight in self.weights)

    def parameters(self) -> list[nn.Parameter]:
        """The weights anew."""
        return [nn.Parameter(weight.clone()) for weight in self.weights]


def shapes_of_millions(millions: float) -> list[tuple[int]]:
    """Tensors of a million elements, the last one smaller, that many million in all."""
    size = max(1, round(1e6 * millions))
    return [(min(_TENSOR_SIZE, size - start),) for start in range(0, size, _TENSOR_SIZE)]


def shapes_of_model(name: str) -> list[tuple[int, ...]]:
    """The shapes of a model's parameters.

    Raises:
        ConfigError: unknown model.
    """
    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in models.build(name).parameters()]


def build_model(name: str) -> nn.Module:
    """A model with the same weights on every rank, at every call.

    Raises:
        ConfigError: unknown model, or one that does not tell what it takes.
    """
    torch.manual_seed(SEED)
    model = models.build(name)
    if not hasattr(model, "num_classes") or not (hasattr(model, "image_shape") or hasattr(model, "context")):
        raise ConfigError(
            f"model {name} does not tell what it takes; a batch of random samples needs its attributes num_classes and "
            "image_shape (channels, height, width), or context (how many tokens it looks at)"
        )
    return model


def samples_for(model: nn.Module, number: int, rank: int) -> tuple[Tensor, Tensor]:
    """Random samples of one rank: images and classes, or texts and the tokens after them.

    Returns:
        float32, (number, channels, height, width), and int64, (number,); or int64, (number, context), twice.
    """
    generator = torch.Generator().manual_seed(SEED + 1 + rank)
    num_classes: int = model.num_classes  # type: ignore[assignment]
    if not hasattr(model, "image_shape"):
        context: int = model.context  # type: ignore[assignment]
        tokens = torch.randint(num_classes, (number, context + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    shape: tuple[int, ...] = model.image_shape  # type: ignore[assignment]
    images = torch.randn(number, *shape, generator=generator)
    return images, torch.randint(num_classes, (number,), generator=generator)


class Batches:
    """A rank's batches of random samples, one after the other, read ahead as in a training.

    Args:
        model: who takes them.
        size: of each.
        rank: whose.
    """

    def __init__(self, model: nn.Module, size: int, rank: int) -> None:
        self._size = size
        source = as_source(samples_for(model, _BATCHES * size, rank))
        self._loader = Loader(source, seed=SEED, shuffle=True)
        self._requested = 0
        for _ in range(_BATCHES_AHEAD):
            self._request()

    def next(self) -> tuple[Tensor, Tensor]:
        """The next one, the same at every number of calls in every way that is measured."""
        inputs, targets = self._loader.next()
        self._request()
        return inputs, targets

    def _request(self) -> None:
        epoch, place = divmod(self._requested, _BATCHES)
        self._loader.request(epoch, place * self._size, (place + 1) * self._size)
        self._requested += 1

    def close(self) -> None:
        """End the thread that reads."""
        self._loader.close()


def chosen(names: str | None, ways: Iterable[str], unusable: Mapping[str, str]) -> list[str]:
    """The ways to measure.

    Args:
        names: separated by commas, as the user gave them; None: all usable ones.
        ways: the names of all.
        unusable: those that cannot be run here, with what they lack.

    Raises:
        ConfigError: unknown or unusable ones.
    """
    usable = [way for way in ways if way not in unusable]
    if names is None:
        return usable
    wanted = list(dict.fromkeys(names.split(",")))
    for name in wanted:
        if name in unusable:
            raise ConfigError(f"way {name} cannot be run here: {unusable[name]}")
        if name not in usable:
            raise ConfigError(f"unknown way {name!r}{near(name, usable)}; allowed are {', '.join(usable)}")
    return wanted
