"""SyncBatchNorm over all ranks against torch's BatchNorm over the whole batch in one process."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpidl
from mpidl.errors import ConfigError, UserError
from mpidl.metrics import accuracy
from mpidl.runtime import World
from tests.mpi import reference
from tests.mpi.cases import NUM_CLASSES, NUM_FEATURES, SGD, classes, dense, job_of, made, trainer_of
from tests.mpi.reference import differing, largest_difference

pytestmark = pytest.mark.thorough

CHANNELS = 5
SHAPES = {"1d": (), "1d of sequences": (7,), "2d": (3, 4), "3d": (2, 3, 2)}
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "1d": nn.BatchNorm1d, "1d of sequences": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d,
}  # fmt: skip


def even(rank: int, size: int) -> int:
    return 4


def uneven(rank: int, size: int) -> int:
    return 2 + 3 * rank


def none_on_the_last(rank: int, size: int) -> int:
    return 0 if rank == size - 1 > 0 else 3


def one_on_the_first(rank: int, size: int) -> int:
    """A rank's single value a channel has no variance of its own."""
    return 1 if rank == 0 and size > 1 else 2


SPLITS = [even, uneven, none_on_the_last, one_on_the_first]


def spans(world: World, split: Callable[[int, int], int]) -> list[tuple[int, int]]:
    counts = [split(rank, world.size) for rank in range(world.size)]
    return list(itertools.pairwise(itertools.accumulate(counts, initial=0)))


def batch(samples: int, shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(samples, CHANNELS, *shape, generator=generator, dtype=torch.float64)
    return (values * torch.arange(1, CHANNELS + 1).view(-1, *[1] * len(shape)) + 2).to(dtype)


def layer_of(kind: str, **options: Any) -> nn.Module:
    """Torch's, in float64, with weights and statistics that are not those of a new one."""
    layer = LAYERS[kind](CHANNELS, **options).double()
    with torch.no_grad():
        for seed, tensor in enumerate((*layer.parameters(), *layer.buffers())):
            if tensor.is_floating_point():
                tensor.add_(torch.rand(CHANNELS, generator=torch.Generator().manual_seed(seed)))
    return layer


def run(layer: nn.Module, inputs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and the inputs' gradient of a loss sum in which every output counts differently."""
    inputs = inputs.clone().requires_grad_()
    outputs = layer(inputs)
    (outputs.tanh() * weights).sum().backward()
    assert inputs.grad is not None
    return outputs.detach(), inputs.grad


def total(world: World, tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(world.allgather(tensor.detach().numpy()).sum(axis=0))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None, "eps": 0.1}, {"affine": False, "momentum": 0.3}, {"track_running_stats": False}],
    ids=["default", "cumulative", "not affine", "not tracked"],
)
def test_outputs_gradients_and_statistics_are_those_of_the_whole_batch(
    world: World, split: Any, kind: str, options: dict[str, Any]
) -> None:
    plain = layer_of(kind, **options)
    synced = mpidl.convert_sync_batchnorm(copy.deepcopy(plain))
    assert isinstance(synced, mpidl.SyncBatchNorm)
    all_spans = spans(world, split)
    start, stop = all_spans[world.rank]
    for iteration in range(3):
        inputs, weights = (batch(all_spans[-1][1], SHAPES[kind], 2 * iteration + i) for i in (0, 1))
        plain.zero_grad()
        synced.zero_grad()
        expected, expected_grad = run(plain, inputs, weights)
        found, found_grad = run(synced, inputs[start:stop], weights[start:stop])
        assert_close(found, expected[start:stop])
        assert_close(found_grad, expected_grad[start:stop])
        for own, whole in zip(synced.parameters(), plain.parameters(), strict=True):
            assert own.grad is not None
            assert whole.grad is not None
            assert_close(total(world, own.grad), whole.grad)
        for own, whole in zip(synced.buffers(), plain.buffers(), strict=True):
            assert_close(own, whole)
            assert (world.allgather(own.numpy()) == own.numpy()).all(), "ranks have different bits"
    synced.load_state_dict(plain.state_dict())  # they differ in the last bits
    plain.eval()
    synced.eval()
    inputs, weights = batch(2 + world.rank, SHAPES[kind], 20), batch(2 + world.rank, SHAPES[kind], 21)
    for found, expected in zip(run(synced, inputs, weights), run(plain, inputs, weights), strict=True):
        assert torch.equal(found, expected)


def test_a_mean_far_from_zero_costs_no_digits_in_float32(world: World) -> None:
    inputs = batch(16 * world.size, (8, 8), 1) + 1000
    expected = inputs.var((0, 2, 3))
    layer = mpidl.SyncBatchNorm(CHANNELS, momentum=1.0)
    start = 16 * world.rank
    layer(inputs[start : start + 16].float())
    assert layer.running_var is not None
    # What rounding the inputs to float32 costs is 3e-5 of a value.
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=2e-5, atol=0)


def test_bfloat16_inputs_are_summed_in_float32(world: World) -> None:
    inputs = batch(8 * world.size, (6,), 3).bfloat16()
    plain, start = nn.BatchNorm1d(CHANNELS), 8 * world.rank
    expected = plain(inputs.float())[start : start + 8]
    layer = mpidl.convert_sync_batchnorm(nn.BatchNorm1d(CHANNELS))
    own = inputs[start : start + 8].clone().requires_grad_()
    found = layer(own)
    found.float().square().sum().backward()
    assert own.grad is not None
    assert found.dtype == own.grad.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    assert isinstance(layer.running_var, torch.Tensor)
    assert isinstance(plain.running_var, torch.Tensor)
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_when_no_rank_has_samples_the_output_is_empty_and_statistics_stay(world: World) -> None:
    layer = mpidl.SyncBatchNorm(CHANNELS)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(torch.empty(0, CHANNELS, 3, requires_grad=True)).sum().backward()
    assert differing(layer.state_dict(), before) == []
    assert layer.weight.grad is not None
    assert float(layer.weight.grad.abs().sum()) == 0


def test_one_value_in_all_is_an_error_on_every_rank(world: World) -> None:
    layer = mpidl.SyncBatchNorm(CHANNELS)
    with pytest.raises(UserError, match="needs at least two"):
        layer(torch.zeros(int(world.rank == world.size - 1), CHANNELS))


@pytest.mark.parametrize("shape", [(3,), (3, CHANNELS + 1), (2, 4, CHANNELS)])
def test_an_input_of_another_shape_is_refused_before_anything_is_sent(world: World, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"\(samples, 5, ...\), not"):
        mpidl.SyncBatchNorm(CHANNELS)(torch.zeros(shape))


# --- conversion -------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One normalisation in two places, one kept in evaluation mode, and one of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None, eps=0.01))
        self.second = nn.ModuleDict({"norm": self.first[1], "other": nn.InstanceNorm2d(4, affine=True)})
        self.kept = nn.BatchNorm3d(2, affine=False).eval()
        self.nothing: nn.Module | None = None


def test_conversion_keeps_parameters_statistics_names_and_modes(world: World) -> None:
    model = made(Shared)
    before = dict(model.state_dict(keep_vars=True))
    assert mpidl.convert_sync_batchnorm(model) is model
    after = dict(model.state_dict(keep_vars=True))
    assert list(after) == list(before)
    assert all(after[name] is tensor for name, tensor in before.items())
    assert model.get_submodule("first.1") is model.get_submodule("second.norm")
    assert isinstance(model.get_submodule("second.other"), nn.InstanceNorm2d)
    first, kept = model.get_submodule("first.1"), model.get_submodule("kept")
    assert isinstance(first, mpidl.SyncBatchNorm)
    assert (first.momentum, first.eps, first.training, kept.training) == (None, 0.01, True, False)
    assert mpidl.convert_sync_batchnorm(model).get_submodule("first.1") is first


def test_a_lazy_normalisation_is_refused(world: World) -> None:
    with pytest.raises(UserError, match="LazyBatchNorm2d does not know its number of features; run one forward pass"):
        mpidl.convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()))


# --- training ---------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(NUM_FEATURES, 30), nn.BatchNorm1d(30), nn.Tanh(),
        nn.Linear(30, 20), nn.BatchNorm1d(20, momentum=None), nn.Tanh(), nn.Linear(20, NUM_CLASSES),
    )  # fmt: skip


def test_the_trainer_does_what_a_plain_loop_over_whole_batches_does(world: World) -> None:
    rest = 2 * world.size + 1  # the last batch has partitions of two and three samples
    data = classes(5 * 32 + rest)
    job = job_of(*data, partitions=world.size, epochs=3)
    expected, model = made(network), mpidl.convert_sync_batchnorm(made(network))
    losses = reference.train_plainly(expected, job)
    trainer = trainer_of(model, job, metrics={"accuracy": accuracy})
    history = trainer.fit(data, classes(37, seed=8), epochs=3)
    trainer.close()
    assert largest_difference(model.state_dict(), expected.state_dict()) < 2e-5
    assert [event["loss"] for event in history if event["event"] == "epoch"] == pytest.approx(losses, rel=1e-5)
    found = reference.evaluate(expected, job_of(*classes(37, seed=8)), 37)
    assert history[-1]["loss"] == pytest.approx(found["loss"], rel=1e-4)


def test_an_own_loop_with_uneven_ranks_does_what_a_plain_loop_over_whole_batches_does(world: World) -> None:
    """The recipe of docs/sharp-bits.md: sums of losses on one scale, empty batches to the end."""
    inputs, labels = classes(200)
    sizes = [[7 + rank - 2 * i * (rank > 0) for rank in range(world.size)] for i in range(4)] + [[0] * world.size]
    sizes = [[max(0, count) for count in counts] for counts in sizes]
    expected, model = made(network), mpidl.convert_sync_batchnorm(made(network))
    optimizer, manager = SGD(expected.parameters()), mpidl.ParameterManager(model, SGD)
    done = iterations = 0
    for counts in sizes:
        edges = list(itertools.accumulate(counts, initial=done))
        own = slice(edges[world.rank], edges[world.rank + 1])
        number = mpidl.allreduce(len(labels[own]))
        if number == 0:
            break
        loss = F.cross_entropy(model(inputs[own]), labels[own], reduction="sum") * mpidl.size() / number
        loss.backward()
        manager.step()
        whole = slice(done, edges[-1])
        optimizer.zero_grad()
        F.cross_entropy(expected(inputs[whole]), labels[whole]).backward()
        optimizer.step()
        assert largest_difference(model.state_dict(), expected.state_dict()) < 2e-5
        for name, buffer in model.named_buffers():
            assert (world.allgather(buffer.numpy()) == buffer.numpy()).all(), f"ranks have different bits in {name}"
        done, iterations = edges[-1], iterations + 1
    assert iterations == 4
    manager.close()


@pytest.mark.parametrize("more", [1, 5])
def test_a_trainer_of_other_partitions_than_ranks_is_refused(world: World, more: int) -> None:
    data = classes(64)
    model = mpidl.convert_sync_batchnorm(made(network))
    trainer = trainer_of(model, job_of(*data, partitions=world.size + more))
    with pytest.raises(ConfigError, match=f"partitions is {world.size + more} on {world.size} ranks; give partitions"):
        trainer.fit(data, epochs=1)
    trainer.evaluate(data)  # needs no lockstep
    trainer.close()


def test_a_last_batch_that_leaves_ranks_without_a_partition_is_refused_with_a_batch_size_that_does_not(
    world: World,
) -> None:
    data = classes(5 * 40 + 3)
    trainer = trainer_of(
        mpidl.convert_sync_batchnorm(made(network)), job_of(*data, partitions=world.size, batch_size=40)
    )
    if world.size == 1:
        assert trainer.fit(data, epochs=1)[0]["samples"] == 203
    else:
        with pytest.raises(
            ConfigError, match=r"fill only 1 of the \d partitions; batch_size (39|38|37|36|35) would do"
        ):
            trainer.fit(data, epochs=1)
    trainer.close()


def test_a_normalisation_kept_in_evaluation_mode_needs_no_lockstep(world: World) -> None:
    data = classes(64)
    model = mpidl.convert_sync_batchnorm(made(network))
    for index in (1, 4):
        model.get_submodule(str(index)).eval()
    trainer = trainer_of(model, job_of(*data, partitions=world.size + 3, epochs=1))
    assert len(trainer.fit(data, epochs=1)) == 1
    trainer.close()
    trainer = trainer_of(made(dense), job_of(*data, partitions=world.size + 3, epochs=1))
    assert len(trainer.fit(data, epochs=1)) == 1
    trainer.close()
