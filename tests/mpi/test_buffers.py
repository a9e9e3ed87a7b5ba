"""Buffers: averaged by samples where forward changes them, left alone to the bit where it does not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import mpidl
from mpidl.errors import LayoutError
from mpidl.runtime import World
from tests.mpi import reference
from tests.mpi.cases import NUM_FEATURES, SGD, made
from tests.mpi.reference import differing
from tests.mpi.worlds import node_layouts, with_nodes


def inputs_of(rank: int, iteration: int, samples: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * iteration + rank)
    return torch.randn(samples, NUM_FEATURES, generator=generator) * (rank + 1) + iteration


def train(world: World, model: nn.Module, iterations: int) -> mpidl.ParameterManager:
    """Some iterations of a loop of one's own; every rank weighs the same."""
    manager = mpidl.ParameterManager(model, SGD, world=world)
    for iteration in range(iterations):
        model(inputs_of(world.rank, iteration)).square().mean().backward()
        manager.step()
    return manager


def bits(tensor: torch.Tensor) -> bytes:
    """Every bit of a tensor, signs of zeros included."""
    return tensor.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Linear(30, 3))


def test_batchnorms_statistics_are_the_average_by_samples_of_all_ranks(world: World) -> None:
    counts = [2 + 3 * rank for rank in range(world.size)]
    model = made(batch_norm)
    manager = mpidl.ParameterManager(model, SGD)
    with torch.no_grad():
        hidden = [model[0](inputs_of(rank, 0, count)).double() for rank, count in enumerate(counts)]
    model(inputs_of(world.rank, 0, counts[world.rank])).square().mean().backward()
    manager.step(num_samples=counts[world.rank])
    total = sum(counts)
    mean = sum(count * h.mean(0) for count, h in zip(counts, hidden, strict=True)) / total
    variance = sum(count * h.var(0) for count, h in zip(counts, hidden, strict=True)) / total
    assert torch.allclose(model[1].running_mean.double(), 0.1 * mean, rtol=1e-5, atol=1e-7)
    assert torch.allclose(model[1].running_var.double(), 0.9 + 0.1 * variance, rtol=1e-5)
    manager.close()


def test_the_batch_counter_advances_once_an_iteration(world: World) -> None:
    model = made(batch_norm)
    model[1].num_batches_tracked.fill_(2**40)  # far past what float32 could count
    manager = train(world, model, 3)
    assert model[1].num_batches_tracked.dtype == torch.int64
    assert int(model[1].num_batches_tracked) == 2**40 + 3
    manager.close()


def test_all_ranks_hold_the_same_statistics_after_every_iteration(world: World) -> None:
    model = made(batch_norm)
    manager = mpidl.ParameterManager(model, SGD)
    for iteration in range(3):
        model(inputs_of(world.rank, iteration)).square().mean().backward()
        manager.step()
        own = {name: bits(buffer) for name, buffer in model.named_buffers()}
        assert world.allgather_object(own) == [own] * world.size
    manager.close()


def test_an_iteration_without_samples_leaves_the_statistics_as_they_were(world: World) -> None:
    model = made(batch_norm)
    manager = train(world, model, 2)
    before = {name: bits(buffer) for name, buffer in model.named_buffers()}
    model(inputs_of(world.rank, 2)).square().mean().backward()
    assert manager.step(num_samples=0) == 0
    assert {name: bits(buffer) for name, buffer in model.named_buffers()} == before
    manager.close()


def test_forward_in_evaluation_mode_between_iterations_has_no_effect(world: World) -> None:
    model, undisturbed = made(batch_norm), made(batch_norm)
    manager, other = mpidl.ParameterManager(model, SGD), mpidl.ParameterManager(undisturbed, SGD)
    for iteration in range(3):
        for net, owner in ((model, manager), (undisturbed, other)):
            net(inputs_of(world.rank, iteration)).square().mean().backward()
            owner.step()
        model.eval()
        with torch.no_grad():
            model(inputs_of(world.rank, 99))
        model.train()
    assert differing(model.state_dict(), undisturbed.state_dict()) == []
    manager.close()
    other.close()


def test_a_frozen_batchnorm_stays_to_the_bit(world: World) -> None:
    model = made(batch_norm)
    model[1].running_mean.normal_(generator=torch.Generator().manual_seed(1))
    model[1].eval()
    before = {name: bits(buffer) for name, buffer in model.named_buffers()}
    manager = train(world, model, 3)
    assert {name: bits(buffer) for name, buffer in model.named_buffers()} == before
    manager.close()


class Unchanged(nn.Module):
    """Buffers that forward reads and never writes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(NUM_FEATURES, 4)
        mask = torch.triu(torch.full((4, 4), -math.inf), diagonal=1)
        odd = [-0.0, 0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3.4e38]
        self.register_buffer("mask", mask)
        self.register_buffer("odd", torch.tensor(odd))
        self.register_buffer("wide", torch.tensor([math.pi, -0.0, 1e300, -math.inf], dtype=torch.float64))
        self.register_buffer("narrow", torch.tensor([-0.0, 1 / 3, math.inf], dtype=torch.bfloat16))
        self.register_buffer("table", torch.tensor([2**62 + 1, -(2**63), 0, 7]))
        self.register_buffer("bytes", torch.arange(256, dtype=torch.uint8))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("waves", torch.tensor([1 + 2j, complex(-0.0, 0.0)]))
        self.register_buffer("nothing", None)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.linear(inputs).unsqueeze(1) + self.mask, -1) + self.table[2]


def test_masks_tables_and_odd_values_that_forward_only_reads_stay_to_the_bit(world: World) -> None:
    model = Unchanged()
    before = {name: bits(buffer) for name, buffer in model.named_buffers()}
    manager = train(world, model, 3)
    after = {name: bits(buffer) for name, buffer in model.named_buffers()}
    assert [name for name in before if before[name] != after[name]] == []
    manager.close()


class Counting(nn.Module):
    """Buffers of several kinds that forward changes, in place or by new tensors, and a cache of each rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(NUM_FEATURES, 4)
        self.register_buffer("calls", torch.tensor(0, dtype=torch.int32))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("average", torch.zeros(NUM_FEATURES))
        self.register_buffer("unchanged", torch.arange(3.0))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            self.seen += torch.tensor([float(len(inputs)), 1.0])
            self.average = 0.5 * self.average + 0.5 * inputs.mean(0)  # another tensor every time
            self.cache = inputs[:1, 0].clone()
        return self.linear(inputs - self.average)


def test_buffers_of_any_kind_that_forward_changes_are_averaged_as_the_oracle_does(world: World) -> None:
    model, expected = made(Counting), made(Counting)
    manager, plain = mpidl.ParameterManager(model, SGD), SGD(expected.parameters())

    def part(net: nn.Module, rank: int, iteration: int) -> float:
        net(inputs_of(rank, iteration)).square().mean().backward()
        return 1.0

    for iteration in range(4):
        part(model, world.rank, iteration)
        manager.step()
        parts = [functools.partial(part, expected, rank, iteration) for rank in range(world.size)]
        reference.update(expected, plain, parts)
        assert differing(model.state_dict(), expected.state_dict()) == []
    assert int(model.calls) == 4
    assert model.seen.tolist() == [24.0, 4.0]
    assert bits(model.cache) == bits(inputs_of(world.rank, 3)[:1, 0])  # each rank's own: it does not travel
    manager.load_weights(model.state_dict())
    assert differing(model.state_dict(), expected.state_dict()) == []
    assert bits(model.cache) == bits(inputs_of(world.rank, 3)[:1, 0])  # nor where weights are loaded
    manager.close()


def in_place(model: nn.Module) -> None:
    model.scale.add_(1.0)


def anew(model: nn.Module) -> None:
    model.scale = model.scale + 1.0


class Late(nn.Module):
    """Leaves its buffer alone in the first iteration, and changes it later."""

    def __init__(self, change: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.linear = nn.Linear(NUM_FEATURES, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scale", torch.ones(1))
        self.change = change
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            self.change(self)
        return self.norm(self.linear(inputs)) * self.scale


@pytest.mark.parametrize("change", [in_place, anew])
def test_a_buffer_that_is_first_changed_after_the_first_iteration_is_an_error_that_names_it(
    world: World, change: Callable[[nn.Module], None]
) -> None:
    model = Late(change)
    with pytest.raises(LayoutError, match="buffer scale was changed and is not among .* after the first iteration"):
        train(world, model, 3)
    assert model.calls == 3


def test_a_buffer_that_grows_is_an_error_that_names_it(world: World) -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(NUM_FEATURES, 4)
            self.register_buffer("history", torch.zeros(1))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.history = torch.cat([self.history, inputs[:1, 0]])
            return self.linear(inputs)

    with pytest.raises(LayoutError, match="buffer history changed its shape .* persistent=False"):
        train(world, Growing(), 2)


def test_buffers_are_the_same_on_any_spread_over_nodes(world: World) -> None:
    found = []
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            model = made(batch_norm)
            train(other, model, 3).close()
            found.append({name: bits(value) for name, value in model.state_dict().items()})
    assert all(other == found[0] for other in found)


def test_statistics_larger_than_a_block_are_averaged_by_all_ranks(world: World) -> None:
    width = 3 * 4096
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1), nn.Linear(1, width), nn.BatchNorm1d(width))
    manager = mpidl.ParameterManager(model, SGD)
    with torch.no_grad():
        for number in (0, 2):
            model[number].weight.fill_(0.5)
            model[number].bias.zero_()
    manager.load_weights(model.state_dict())
    constant = float(world.rank + 1)
    model[3](torch.full((4, width), constant) * torch.tensor([1.0, 2.0, 3.0, 4.0]).unsqueeze(1)).sum().backward()
    manager.step()
    mean = 0.1 * 2.5 * np.mean([rank + 1 for rank in range(world.size)])
    assert torch.allclose(model[3].running_mean, torch.full((width,), float(mean)), rtol=1e-6)
    assert model[3].num_batches_tracked == 1
    manager.close()
