"""What can be set about the exchange: clipping, the wire, the baselines, the size of buckets."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpidl
from mpidl.errors import LayoutError, NonFiniteLossError
from mpidl.parameters import layout, synchronizer
from mpidl.parameters.bucket_size import COUNTED, SETTLING, BucketSize
from mpidl.parameters.team import Helpers
from mpidl.runtime import World
from tests.mpi.cases import ADAM, NUM_FEATURES, SGD, dense, made
from tests.mpi.worlds import node_layouts, with_nodes

pytestmark = pytest.mark.thorough

Clip = Callable[[list[nn.Parameter]], object]


def backward(model: nn.Module, rank: int, iteration: int) -> None:
    generator = torch.Generator().manual_seed(1000 * iteration + rank)
    (model(torch.randn(5, NUM_FEATURES, generator=generator)).square().sum(1) * 10).mean().backward()


def twin_after(iterations: int, optimizer: Any, size: int, clip: Clip = lambda _: None) -> nn.Module:
    """Plain PyTorch in one process: the mean of all ranks' gradients, clipped by torch."""
    twin = made(dense)
    plain = optimizer(twin.parameters())
    for iteration in range(iterations):
        for rank in range(size):
            backward(twin, rank, iteration)
        for parameter in twin.parameters():
            assert parameter.grad is not None
            parameter.grad /= size
        clip(list(twin.parameters()))
        plain.step()
        plain.zero_grad()
    return twin


def trained(world: World, iterations: int, optimizer: Any, **settings: Any) -> tuple[nn.Module, list[float]]:
    """Under a manager; returns the model and the norms of the mean gradients."""
    model = made(dense)
    manager = mpidl.ParameterManager(model, optimizer, world=world, **settings)
    norms = []
    for iteration in range(iterations):
        backward(model, world.rank, iteration)
        manager.step(wait=iteration % 2 == 0)
        norms.append(manager.grad_norm)
    manager.close()
    return model, norms


def difference(model: nn.Module, twin: nn.Module) -> float:
    """The largest difference of a weight, relative to the largest weight of its tensor."""
    pairs = zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
@pytest.mark.parametrize("bounds", [{"clip_norm": 0.5}, {"clip_value": 0.01}, {"clip_norm": 0.3, "clip_value": 0.02}])
def test_clipping_is_torch_s_on_any_nodes(
    world: World, optimizer: Any, bounds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synchronizer, "SLICE_SIZE", 4096)  # several to a shard
    norms: list[float] = []

    def clip(parameters: list[nn.Parameter]) -> None:
        if "clip_value" in bounds:
            nn.utils.clip_grad_value_(parameters, bounds["clip_value"])
        norms.append(float(nn.utils.clip_grad_norm_(parameters, bounds.get("clip_norm", np.inf))))

    twin = twin_after(4, optimizer, world.size, clip)
    assert max(norms) > bounds.get("clip_norm", 0)  # else nothing would be clipped
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            model, own_norms = trained(other, 4, optimizer, **bounds)
            assert difference(model, twin) < 5e-6, sizes
            assert own_norms == pytest.approx(norms, rel=1e-5)


def test_a_norm_that_is_not_finite_ends_all_ranks_before_the_update(world: World) -> None:
    model = made(dense)
    manager = mpidl.ParameterManager(model, SGD, clip_norm=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    backward(model, world.rank, 0)
    if world.rank == world.size - 1:
        next(model.parameters()).grad[0] = torch.inf
    with pytest.raises(NonFiniteLossError, match="norm of the gradient is inf"):
        manager.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    manager.close()


def test_the_whole_gradient_is_kept_in_the_rows_of_one_node(world: World) -> None:
    """Clipping by the norm needs all of it before the update."""
    with with_nodes(world, [world.size]) as other:
        manager = mpidl.ParameterManager(made(dense), SGD, world=other, clip_norm=1.0)
        kept = manager.memory_bytes()
        assert (kept["gradient rows"], kept["summed gradient"]) == (4 * manager.layout.size, 0)
        manager.close()


@pytest.mark.parametrize(
    "setting", [{"clip_norm": 0.0}, {"clip_value": -1.0}, {"clip_norm": np.nan}, {"bucket_mb": 0.0}]
)
def test_bounds_that_make_no_sense_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(LayoutError, match=f"{next(iter(setting))} is"):
        mpidl.ParameterManager(made(dense), SGD, **setting)


@pytest.mark.parametrize("name", ["reduction", "wire"])
def test_an_unknown_reduction_or_wire_is_refused_with_the_names(name: str) -> None:
    with pytest.raises(LayoutError, match="'int8' is not one of (ordered|float32)"):
        mpidl.ParameterManager(made(dense), SGD, **{name: "int8"})


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
@pytest.mark.parametrize("strategy", ["driver", "tree", "allreduce", "mpi"])
def test_the_baselines_give_the_same_results_within_rounding(world: World, optimizer: Any, strategy: str) -> None:
    model, _ = trained(world, 4, optimizer, reduction=strategy)
    assert difference(model, twin_after(4, optimizer, world.size)) < 2e-6


@pytest.mark.parametrize("strategy", ["driver", "allreduce"])
def test_a_baseline_s_optimizer_state_goes_out_and_in(world: World, strategy: str) -> None:
    model = made(dense)
    manager = mpidl.ParameterManager(model, ADAM, reduction=strategy)
    backward(model, world.rank, 0)
    manager.step()
    state = world.broadcast_object(manager.state_dict())
    own = sum(v["exp_avg"].numel() for v in manager.optimizer.state.values() if "exp_avg" in v)
    assert own == (manager.layout.size if strategy == "allreduce" or world.rank == 0 else 0)
    manager.load_state_dict(state)
    again = world.broadcast_object(manager.state_dict())
    assert str(again) == str(state)
    manager.close()


def test_a_narrow_wire_gives_all_ranks_the_same_rounded_weights_near_the_exact_ones(world: World) -> None:
    sizes = (1,) * world.size
    with with_nodes(world, sizes) as other:
        model, _ = trained(other, 4, SGD, wire="bfloat16")
    values = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    everyones = world.allgather(values.numpy())
    assert all(np.array_equal(theirs, everyones[0]) for theirs in everyones)
    assert difference(model, twin_after(4, SGD, world.size)) < 2**-5
    if world.size > 1:
        assert torch.equal(values, values.bfloat16().float())
        assert difference(model, twin_after(4, SGD, world.size)) > 2e-6  # else nothing was rounded


def test_a_narrow_wire_loses_no_small_updates(world: World) -> None:
    # A thousandth of a bfloat16's last digit each: only float32 masters remember them.
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    with with_nodes(world, (1,) * world.size) as other:
        manager = mpidl.ParameterManager(
            model, functools.partial(torch.optim.SGD, lr=1e-4), world=other, wire="bfloat16"
        )
        for _ in range(200):
            model(-torch.ones(1, 3)).sum().backward()
            manager.step()
        manager.close()
    assert model.weight.detach().numpy() == pytest.approx(1.02, rel=2**-8)


def test_buckets_of_any_size_give_the_same_bits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MIN_CELL_SIZE", 1)
    expected, _ = trained(world, 3, SGD)
    for sizes in node_layouts(world):
        for bucket_mb in (None, 0.001, 100.0):
            with with_nodes(world, sizes) as other:
                model, _ = trained(other, 3, SGD, bucket_mb=bucket_mb)
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("settings", [{}, {"wire": "bfloat16"}, {"wire": "bfloat16", "error_feedback": True}])
def test_the_threads_that_share_the_sums_change_no_bit(
    world: World, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpidl.parameters.team.PART_SIZE", 4096)
    helped: list[int] = []
    ask = Helpers.ask

    def asking(helpers: Helpers, task: Any, number: int) -> None:
        helped.append(number)
        ask(helpers, task, number)

    monkeypatch.setattr(Helpers, "ask", asking)
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            expected, expected_norms = trained(other, 3, SGD, **settings)
            assert not helped
            for threads in (2, 3):
                several = dataclasses.replace(other, threads_per_rank=threads)  # torch keeps one
                model, norms = trained(several, 3, SGD, **settings)
                assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
                assert norms == expected_norms
            # Between nodes only if this thread waits when messages are packed; the last shard may be too small.
            assert helped or len(sizes) > 1 or world.rank > 0
            helped.clear()


def test_threads_share_the_sums_of_an_mpi_reduction_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpidl.parameters.team.PART_SIZE", 4096)
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            expected, _ = trained(other, 2, SGD, reduction="mpi")
            several = dataclasses.replace(other, threads_per_rank=3)
            model, _ = trained(several, 2, SGD, reduction="mpi")
            assert difference(model, expected) < 1e-6


def test_the_bucket_size_settles_on_the_fastest_of_the_slowest_rank(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("mpidl.parameters.bucket_size.time.perf_counter", lambda: now[0])
    # On rank 0 four cells are fastest, on the last rank two: the slowest rank counts.
    seconds = {1: 3.0, 2: 2.0, 4: 1.0 if world.rank == 0 and world.size > 1 else 9.0}
    size = BucketSize(world, num_cells=16)
    course = []
    for _ in range(4 * (SETTLING + COUNTED) + 2):
        course.append(size.value)
        now[0] += seconds[size.value]
        size.observe()
    assert list(dict.fromkeys(course)) == [1, 2, 4]
    assert size.is_settled
    assert course[-1] == 2


def test_a_given_bucket_size_stays(world: World) -> None:
    size = BucketSize(world, num_cells=16, fixed=4)
    assert size.is_settled
    assert not any(size.observe() for _ in range(30))
    assert size.value == 4
    assert BucketSize(world, num_cells=2, fixed=100).value == 2
    assert BucketSize(world, num_cells=1).is_settled


def test_a_copy_of_the_model_is_a_plain_one_between_nodes_too(world: World) -> None:
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            model = made(dense)
            manager = mpidl.ParameterManager(model, SGD, world=other)
            backward(model, world.rank, 0)
            manager.step(wait=False)
            copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
            manager.close()
        assert difference(copied, model) == 0
        copied(torch.zeros(1, NUM_FEATURES))
        assert type(next(iter(copied.children()))._parameters) is dict


def test_a_first_step_without_samples_updates_nothing(world: World) -> None:
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            model, twin = made(dense), made(dense)
            manager = mpidl.ParameterManager(model, SGD, world=other)
            assert manager.step(num_samples=0) == 0
            model(torch.zeros(1, NUM_FEATURES))
            assert difference(model, twin) == 0
            manager.close()


def test_hooks_of_the_optimizer_see_the_whole_shard_once_an_iteration(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synchronizer, "SLICE_SIZE", 4096)
    seen: list[float] = []

    def halve(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        seen.append(sum(tensor.numel() for tensor in tensors))
        for tensor in tensors:
            if tensor.grad is not None:
                tensor.grad /= 2

    def clip(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad /= 2

    twin = twin_after(3, SGD, world.size, clip)
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            seen.clear()
            model = made(dense)
            manager = mpidl.ParameterManager(model, SGD, world=other)
            manager.optimizer.register_step_pre_hook(halve)
            for iteration in range(3):
                backward(model, world.rank, iteration)
                manager.step()
            assert seen == [sum(stop - start for start, stop in manager.shard_runs)] * 3
            manager.close()
        assert difference(model, twin) < 2e-6


def test_a_constructor_that_fails_gives_the_model_back(world: World) -> None:
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            model = made(dense)
            with pytest.raises(LayoutError, match="LBFGS"):
                mpidl.ParameterManager(model, torch.optim.LBFGS, world=other)
            assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
            assert all(type(module._parameters) is dict for module in model.modules())
            manager = mpidl.ParameterManager(model, SGD, world=other)
            backward(model, world.rank, 0)
            manager.step()
            manager.close()
    assert threading.active_count() == 1 or not any(t.name == "mpidl-exchange" for t in threading.enumerate())


def test_a_baseline_takes_no_narrow_wire() -> None:
    with pytest.raises(LayoutError, match="'driver' sends float32 only"):
        mpidl.ParameterManager(made(dense), SGD, reduction="driver", wire="bfloat16")


@pytest.mark.parametrize("name", ["clip_norm", "clip_value", "bucket_mb"])
def test_ranks_with_other_settings_are_refused_on_all(world: World, name: str) -> None:
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    settings = {name: 1.0 + (world.rank == world.size - 1)}
    with pytest.raises(LayoutError, match=f"the exchange's settings of rank {world.size - 1}"):
        mpidl.ParameterManager(made(dense), SGD, **settings)


@pytest.mark.parametrize("threads", [True, False])
def test_an_exception_of_one_rank_s_optimizer_leaves_no_rank_of_its_node_waiting(world: World, threads: bool) -> None:
    # Two ranks on a node of several: the one that raises must not wait for the other, which waits for it.
    if world.size < 3:
        pytest.skip("needs a node of two ranks and another node")
    with with_nodes(world, (2,) + (1,) * (world.size - 2)) as other:
        other = dataclasses.replace(other, takes_threads=threads and world.takes_threads)
        model = made(dense)
        manager = mpidl.ParameterManager(model, SGD, world=other)
        backward(model, world.rank, 0)
        manager.step()

        def fail() -> None:
            raise ArithmeticError("in the optimizer")

        backward(model, world.rank, 1)
        if world.rank == 0:
            manager.optimizer.step = fail
            with pytest.raises(ArithmeticError):
                manager.step()
            # Such a job ends; here rank 0 takes part in what its node still does.
            other.node_barrier()
        else:
            manager.step()
        other.barrier()
