"""A loop of one's own over a ParameterManager, against the same loop in plain PyTorch with every rank's part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpidl
from mpidl.errors import ConfigError, DataError, LayoutError
from mpidl.runtime import World
from tests.mpi import reference
from tests.mpi.cases import ADAM, NESTEROV, NUM_FEATURES, SGD, classes, dense, made, normalised
from tests.mpi.reference import differing

Loss = Callable[[nn.Module], torch.Tensor]


def loss_of(rank: int, iteration: int, samples: int = 6) -> Loss:
    """The mean loss of a rank's own samples in an iteration, with dropout of its own."""
    inputs, labels = classes(samples, seed=1000 * iteration + rank)

    def loss(model: nn.Module) -> torch.Tensor:
        torch.manual_seed(77 * iteration + rank)
        return F.cross_entropy(model(inputs), labels)

    return loss


def rank_part(model: nn.Module, rank: int, iteration: int, samples: int = 6, weight: float = 1.0) -> float:
    """One rank's forward and backward."""
    if samples:
        loss_of(rank, iteration, samples)(model).backward()
    return weight


def plain_iteration(
    model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, samples: Sequence[int], weighted: bool = False
) -> None:
    """All ranks' parts in one process."""
    parts = [
        functools.partial(rank_part, model, rank, iteration, count, float(count) if weighted else 1.0)
        for rank, count in enumerate(samples)
    ]
    reference.update(model, optimizer, parts, of_means=weighted)


# --- one update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD, NESTEROV, ADAM])
def test_a_loop_of_ones_own_gives_the_bits_of_plain_pytorch(world: World, optimizer: Any) -> None:
    model, expected = made(normalised), made(normalised)
    manager = mpidl.ParameterManager(model, optimizer)
    plain = optimizer(expected.parameters())
    for iteration in range(6):
        rank_part(model, world.rank, iteration)
        assert manager.step() == world.size
        plain_iteration(expected, plain, iteration, [6] * world.size)
        assert differing(model.state_dict(), expected.state_dict()) == []
    manager.close()


def test_step_zeroes_the_gradients_of_this_manager_only(world: World) -> None:
    model = made(dense)
    manager = mpidl.ParameterManager(model, SGD)
    rank_part(model, world.rank, 0)
    assert all(parameter.grad.any() for parameter in model.parameters())
    manager.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    manager.close()


def uneven(world: World, iteration: int) -> list[int]:
    """Numbers of samples, other ones on every rank; in turn one rank has none, but where it is alone."""
    counts = [3 + (rank + iteration) % 3 * 2 for rank in range(world.size)]
    if world.size > 1:
        counts[iteration % world.size] = 0
    return counts


def test_num_samples_gives_the_exact_mean_over_all_samples(world: World) -> None:
    model, expected = made(normalised), made(normalised)
    manager, plain = mpidl.ParameterManager(model, ADAM), ADAM(expected.parameters())
    for iteration in range(5):
        counts = uneven(world, iteration)
        own = counts[world.rank]
        rank_part(model, world.rank, iteration, own)
        assert manager.step(num_samples=own) == sum(counts)
        plain_iteration(expected, plain, iteration, counts, weighted=True)
        assert differing(model.state_dict(), expected.state_dict()) == []
    manager.close()


def test_the_mean_over_samples_is_that_of_one_batch(world: World) -> None:
    counts = uneven(world, 0)
    model, expected = made(dense), made(dense)
    manager = mpidl.ParameterManager(model, SGD)
    rank_part(model, world.rank, 0, counts[world.rank])
    manager.step(num_samples=counts[world.rank])
    inputs, labels = zip(*[classes(count, seed=rank) for rank, count in enumerate(counts) if count], strict=True)
    plain = SGD(expected.parameters())
    F.cross_entropy(expected(torch.cat(inputs)), torch.cat(labels)).backward()
    plain.step()
    assert reference.largest_difference(model.state_dict(), expected.state_dict()) < 1e-6
    manager.close()


def test_when_no_rank_has_samples_step_gives_zero_and_changes_nothing(world: World) -> None:
    model = made(normalised)
    manager = mpidl.ParameterManager(model, SGD)
    rank_part(model, world.rank, 0)
    manager.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = manager.state_dict()
    rank_part(model, world.rank, 1)  # moves BatchNorm's statistics, otherwise on every rank
    assert manager.step(num_samples=0) == 0
    assert differing(model.state_dict(), before) == []
    assert all(parameter.grad is None for parameter in model.parameters())
    after = manager.state_dict()
    for index, state in moments.get("state", {}).items():
        assert torch.equal(after["state"][index]["momentum_buffer"], state["momentum_buffer"])
    manager.close()


def test_ranks_that_run_out_of_data_go_on_with_zero_until_all_have(world: World) -> None:
    model, expected = made(dense), made(dense)
    manager, plain = mpidl.ParameterManager(model, SGD), SGD(expected.parameters())
    batches = world.rank + 1  # the last rank has the most
    iteration = 0
    while True:
        own = 4 if iteration < batches else 0
        rank_part(model, world.rank, iteration, own)
        total = manager.step(num_samples=own)
        if total == 0:
            break
        counts = [4 if iteration < rank + 1 else 0 for rank in range(world.size)]
        assert total == sum(counts)
        plain_iteration(expected, plain, iteration, counts, weighted=True)
        iteration += 1
    assert iteration == world.size
    assert differing(model.state_dict(), expected.state_dict()) == []
    manager.close()


def test_ranks_that_do_not_weigh_alike_all_get_an_error_before_any_update(world: World) -> None:
    if world.size == 1:
        return  # there is nobody to differ from
    model, expected = made(normalised), made(normalised)
    manager, plain = mpidl.ParameterManager(model, SGD), SGD(expected.parameters())
    rank_part(model, world.rank, 0)
    with pytest.raises(LayoutError, match=r"rank 0 called step\(\) without num_samples, rank 1 with it"):
        manager.step(num_samples=6 if world.rank else None)
    assert differing(model.state_dict(), expected.state_dict()) == []
    manager.zero_grad()
    rank_part(model, world.rank, 1)
    manager.step()
    plain_iteration(expected, plain, 1, [6] * world.size)
    assert differing(model.state_dict(), expected.state_dict()) == []
    manager.close()


def test_a_negative_number_of_samples_is_an_error(world: World) -> None:
    manager = mpidl.ParameterManager(made(dense), SGD)
    with pytest.raises(LayoutError, match="num_samples is -1"):
        manager.step(num_samples=-1)
    manager.close()


# --- gradients --------------------------------------------------------------------------------------------------------


def test_no_sync_adds_gradients_up_until_the_next_step(world: World) -> None:
    model, expected = made(dense), made(dense)
    manager, plain = mpidl.ParameterManager(model, SGD), SGD(expected.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with manager.no_sync():
        for part in (0, 1):
            loss_of(world.rank, part)(model).backward()
            assert manager.step() == 0
        assert differing(model.state_dict(), before) == []
    loss_of(world.rank, 2)(model).backward()
    assert manager.step() == world.size

    def three_passes(rank: int) -> float:
        for part in (0, 1, 2):
            loss_of(rank, part)(expected).backward()
        return 1.0

    reference.update(expected, plain, [functools.partial(three_passes, rank) for rank in range(world.size)])
    assert differing(model.state_dict(), expected.state_dict()) == []
    manager.close()


def test_the_gradient_norm_is_torchs_and_the_same_on_every_rank(world: World) -> None:
    model, expected = made(dense), made(dense)
    manager, plain = mpidl.ParameterManager(model, SGD), SGD(expected.parameters())
    for iteration in range(2):
        rank_part(model, world.rank, iteration)
        manager.step()
        plain_iteration(expected, plain, iteration, [6] * world.size)
        whole = torch.cat([parameter.grad.double().flatten() for parameter in expected.parameters()])
        assert manager.grad_norm == pytest.approx(float(whole.norm()), rel=1e-12)
        norms = [parameter.grad.norm() for parameter in expected.parameters()]
        assert manager.grad_norm == pytest.approx(float(torch.stack(norms).norm()), rel=1e-6)
        assert world.allgather_object(manager.grad_norm) == [manager.grad_norm] * world.size
    manager.close()


def forget_nothing(manager: mpidl.ParameterManager, model: nn.Module) -> None:
    del manager, model


ZERO = {
    "nothing": forget_nothing,
    "model, to None": lambda manager, model: model.zero_grad(),
    "model, to zero": lambda manager, model: model.zero_grad(set_to_none=False),
    "manager": lambda manager, model: manager.zero_grad(),
    "optimizer, to None": lambda manager, model: manager.optimizer.zero_grad(),
    "optimizer, to zero": lambda manager, model: manager.optimizer.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("way", ZERO)
def test_zeroing_gradients_at_the_beginning_of_an_iteration_changes_nothing(world: World, way: str) -> None:
    model, expected = made(dense), made(dense)
    manager, plain = mpidl.ParameterManager(model, SGD), SGD(expected.parameters())
    for iteration in range(3):
        ZERO[way](manager, model)
        rank_part(model, world.rank, iteration)
        manager.step()
        plain_iteration(expected, plain, iteration, [6] * world.size)
    assert differing(model.state_dict(), expected.state_dict()) == []
    manager.close()


@pytest.mark.parametrize("way", ["model, to None", "model, to zero", "manager"])
def test_gradients_that_were_zeroed_before_step_do_not_count(world: World, way: str) -> None:
    model = made(dense)
    manager = mpidl.ParameterManager(model, SGD)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rank_part(model, world.rank, 0)
    ZERO[way](manager, model)
    manager.step()
    assert differing(model.state_dict(), before) == []
    assert manager.grad_norm == 0
    manager.close()


def test_a_parameter_without_gradient_counts_as_zero_and_momentum_still_moves_it(world: World) -> None:
    model, expected = made(dense), made(dense)
    manager, plain = mpidl.ParameterManager(model, SGD), SGD(expected.parameters())
    rank_part(model, world.rank, 0)
    manager.step()
    plain_iteration(expected, plain, 0, [6] * world.size)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def first_layer_only(module: nn.Module, rank: int) -> float:
        if rank % 2 == 0:  # and on odd ranks none has one
            inputs, _ = classes(6, seed=rank)
            module.get_submodule("0")(inputs).square().mean().backward()
        return 1.0

    model.zero_grad()
    first_layer_only(model, world.rank)
    assert model.get_parameter("4.weight").grad is None
    manager.step()
    reference.update(
        expected, plain, [functools.partial(first_layer_only, expected, rank) for rank in range(world.size)]
    )
    assert differing(model.state_dict(), expected.state_dict()) == []
    assert set(differing(model.state_dict(), before)) == set(before)
    manager.close()


def test_gradients_that_the_user_replaced_or_changed_are_the_ones_that_count(world: World) -> None:
    model, expected = made(dense), made(dense)
    manager, plain = mpidl.ParameterManager(model, SGD), SGD(expected.parameters())

    def clipped(module: nn.Module, rank: int) -> float:
        rank_part(module, rank, 0)
        nn.utils.clip_grad_norm_(module.parameters(), 0.01 * (rank + 1))  # in place
        weight = module.get_parameter("2.weight")
        weight.grad = torch.full((200, 120), rank + 0.5).t()  # another tensor, with other strides
        return 1.0

    for _ in range(2):
        clipped(model, world.rank)
        manager.step()
        reference.update(expected, plain, [functools.partial(clipped, expected, r) for r in range(world.size)])
        assert differing(model.state_dict(), expected.state_dict()) == []
    manager.close()


# --- learning rates ---------------------------------------------------------------------------------------------------


def one_cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=7)


def sequence(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    first = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=3)
    return torch.optim.lr_scheduler.SequentialLR(
        optimizer, [first, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)], milestones=[3]
    )


@pytest.mark.parametrize("schedule", [one_cycle, sequence])
@pytest.mark.parametrize("optimizer", [SGD, ADAM])
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_torchs_schedulers_work_on_the_managers_optimizer(world: World, optimizer: Any, schedule: Any) -> None:
    model, expected = made(dense), made(dense)
    manager, plain = mpidl.ParameterManager(model, optimizer), optimizer(expected.parameters())
    own_schedule, plain_schedule = schedule(manager.optimizer), schedule(plain)
    for iteration in range(6):
        rank_part(model, world.rank, iteration)
        manager.step()
        own_schedule.step()
        plain_iteration(expected, plain, iteration, [6] * world.size)
        plain_schedule.step()
        assert manager.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert differing(model.state_dict(), expected.state_dict()) == []
    manager.close()


def test_a_learning_rate_set_by_hand_takes_effect(world: World) -> None:
    model = made(dense)
    manager = mpidl.ParameterManager(model, torch.optim.SGD)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    manager.param_groups[0]["lr"] = 0.0
    rank_part(model, world.rank, 0)
    manager.step()
    assert differing(model.state_dict(), before) == []
    manager.close()


# --- two managers -----------------------------------------------------------------------------------------------------


def generator() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 100), nn.BatchNorm1d(100), nn.Tanh(), nn.Linear(100, NUM_FEATURES))


def critic() -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, 90), nn.LeakyReLU(0.2), nn.Linear(90, 1))


def critic_pass(generate: nn.Module, judge: nn.Module, rank: int, iteration: int) -> float:
    real, _ = classes(6, seed=50 * iteration + rank)
    fake = generate(noise(rank, iteration)).detach()
    loss = F.softplus(-judge(real)).mean() + F.softplus(judge(fake)).mean()
    loss.backward()
    return 1.0


def generator_pass(generate: nn.Module, judge: nn.Module, rank: int, iteration: int) -> float:
    F.softplus(-judge(generate(noise(rank, iteration)))).mean().backward()
    return 1.0


def noise(rank: int, iteration: int) -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(31 * iteration + rank))


def test_two_managers_train_an_adversarial_pair_as_a_plain_loop_does(world: World) -> None:
    generate, judge = made(generator), made(critic)
    expected_generate, expected_judge = made(generator), made(critic)
    generate_manager = mpidl.ParameterManager(generate, ADAM)
    judge_manager = mpidl.ParameterManager(judge, SGD)
    plain_generate, plain_judge = ADAM(expected_generate.parameters()), SGD(expected_judge.parameters())
    for iteration in range(4):
        judge_manager.zero_grad()  # the generator's pass left gradients here
        critic_pass(generate, judge, world.rank, iteration)
        judge_manager.step()
        generator_pass(generate, judge, world.rank, iteration)
        generate_manager.step()
        _plain_pair(expected_generate, expected_judge, plain_generate, plain_judge, iteration, world.size)
        assert differing(judge.state_dict(), expected_judge.state_dict()) == []
        assert differing(generate.state_dict(), expected_generate.state_dict()) == []
    judge_manager.close()
    rank_part_of_generator = generate(noise(world.rank, 0))
    rank_part_of_generator.sum().backward()
    assert generate_manager.step() == world.size  # the other one is none the worse
    generate_manager.close()


def _plain_pair(
    generate: nn.Module,
    judge: nn.Module,
    plain_generate: torch.optim.Optimizer,
    plain_judge: torch.optim.Optimizer,
    iteration: int,
    size: int,
) -> None:
    """Both passes; a rank's two forward passes through the generator move one copy of its statistics."""
    base = {name: buffer.clone() for name, buffer in reference.persistent_buffers(generate).items()}
    after: list[dict[str, torch.Tensor]] = []

    def judged(rank: int) -> float:
        for name, buffer in reference.persistent_buffers(generate).items():
            buffer.copy_(base[name])
        weight = critic_pass(generate, judge, rank, iteration)
        after.append({name: buffer.clone() for name, buffer in reference.persistent_buffers(generate).items()})
        return weight

    def generated(rank: int) -> float:
        for name, buffer in reference.persistent_buffers(generate).items():
            buffer.copy_(after[rank][name])
        return generator_pass(generate, judge, rank, iteration)

    reference.update(judge, plain_judge, [functools.partial(judged, rank) for rank in range(size)])
    for name, buffer in reference.persistent_buffers(generate).items():
        buffer.copy_(base[name])
    reference.update(generate, plain_generate, [functools.partial(generated, rank) for rank in range(size)])


# --- samplers and small functions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [0, 1, 5])
def test_the_sampler_gives_every_sample_to_one_rank_and_exact_means_with_num_samples(world: World, rest: int) -> None:
    inputs, labels = classes(8 * world.size + rest)
    sampler = mpidl.RankBatchSampler(inputs, batch_size=4, seed=3)
    model, expected = made(dense), made(dense)
    manager, plain = mpidl.ParameterManager(model, SGD), SGD(expected.parameters())
    data = torch.utils.data.TensorDataset(inputs, labels)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        everyones = world.allgather_object(list(sampler))
        assert {len(batches) for batches in everyones} == {len(sampler)}
        assert sorted(index for batches in everyones for batch in batches for index in batch) == list(range(len(data)))
        loader = torch.utils.data.DataLoader(data, batch_sampler=sampler)
        for number, (own_inputs, own_labels) in enumerate(loader):
            F.cross_entropy(model(own_inputs), own_labels).backward()
            manager.step(num_samples=len(own_labels))
            indices = [index for batches in everyones for index in batches[number]]
            plain.zero_grad()
            F.cross_entropy(expected(inputs[indices]), labels[indices]).backward()
            plain.step()
    assert reference.largest_difference(model.state_dict(), expected.state_dict()) < 2e-6
    manager.close()


def test_the_sampler_refuses_fewer_samples_than_ranks_and_empty_batches(world: World) -> None:
    with pytest.raises(DataError, match=f"{world.size - 1} samples for {world.size} ranks"):
        mpidl.RankBatchSampler(world.size - 1, batch_size=4)
    with pytest.raises(DataError, match="batch_size 0"):
        mpidl.RankBatchSampler(100, batch_size=0)


def test_rank_size_and_local_rank_are_the_worlds(world: World) -> None:
    assert (mpidl.rank(), mpidl.size(), mpidl.local_rank()) == (world.rank, world.size, world.local_rank)
    mpidl.barrier()
    assert sorted(world.allgather_object(mpidl.rank())) == list(range(mpidl.size()))


def test_allreduce_keeps_kind_shape_and_dtype(world: World) -> None:
    size = world.size
    assert mpidl.allreduce(world.rank + 1) == size * (size + 1) // 2
    assert type(mpidl.allreduce(world.rank)) is int
    assert mpidl.allreduce(0.5) == pytest.approx(0.5 * size)
    assert mpidl.allreduce(world.rank, "max") == size - 1
    assert mpidl.allreduce(world.rank, "min") == 0
    array = np.arange(6.0).reshape(2, 3) * (world.rank + 1)
    assert np.array_equal(mpidl.allreduce(array), np.arange(6.0).reshape(2, 3) * (size * (size + 1) // 2))
    assert np.array_equal(mpidl.allreduce(array.T), np.arange(6.0).reshape(2, 3).T * (size * (size + 1) // 2))
    scalar = mpidl.allreduce(torch.tensor(2.0, requires_grad=True))
    assert torch.equal(scalar, torch.tensor(2.0 * size))
    tensor = mpidl.allreduce(torch.ones(2, 3, dtype=torch.int64).t())
    assert torch.equal(tensor, torch.full((3, 2), size))
    array[:] = 0
    assert mpidl.allreduce(np.float32(1.5), "max") == 1.5
    with pytest.raises(ValueError, match="sum, min, max"):
        mpidl.allreduce(1, "product")


def test_broadcast_object_gives_every_rank_the_roots(world: World) -> None:
    root = world.size - 1
    assert mpidl.broadcast_object({"rank": world.rank}) == {"rank": 0}
    assert mpidl.broadcast_object([world.rank], root) == [root]


def test_a_folder_for_the_watchdogs_that_cannot_be_made_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match=r"cannot make the folder /proc/none: .*; give another run_dir"):
        mpidl.watch(600.0, "warn", "/proc/none")
