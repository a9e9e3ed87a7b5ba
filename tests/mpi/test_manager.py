"""The ParameterManager: which models it takes, what it leaves alone, and what goes in and out of it."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpidl
from mpidl.errors import LayoutError
from mpidl.runtime import World
from tests.mpi import reference
from tests.mpi.cases import ADAM, ADAMW, NUM_FEATURES, SGD, Scale, dense, made, normalised, tiny
from tests.mpi.reference import differing
from tests.mpi.worlds import node_layouts, with_nodes

Groups = Callable[[nn.Module], list[dict[str, Any]]]


def backward(model: nn.Module, rank: int, iteration: int) -> float:
    """Some smooth loss on a rank's own random samples."""
    generator = torch.Generator().manual_seed(1000 * iteration + rank)
    torch.manual_seed(77 * iteration + rank)
    first = next(model.parameters())
    model(torch.randn(5, NUM_FEATURES, generator=generator)).square().sum(1).sqrt().mean().backward()
    assert first.grad is not None or not first.requires_grad
    return 1.0


class Pair:
    """A model under a manager, and its twin under a plain optimizer in one process."""

    def __init__(
        self, build: Callable[[], nn.Module], optimizer: Any, groups: Groups | None = None, **options: Any
    ) -> None:
        self.model, self.twin = made(build), made(build)
        own_groups = groups(self.model) if groups else None
        self.manager = mpidl.ParameterManager(self.model, optimizer, param_groups=own_groups, **options)
        self.plain = optimizer(groups(self.twin) if groups else [p for p in self.twin.parameters() if p.requires_grad])
        self.iteration = 0

    def assert_trains_alike(self, iterations: int) -> None:
        """Train both, and compare all weights and buffers after every iteration."""
        world = self.manager.world
        for _ in range(iterations):
            backward(self.model, world.rank, self.iteration)
            self.manager.step()
            self.run_twin()
            assert differing(self.model.state_dict(), self.twin.state_dict()) == []

    def run_twin(self) -> None:
        parts = [functools.partial(backward, self.twin, rank, self.iteration) for rank in range(mpidl.size())]
        reference.update(self.twin, self.plain, parts)
        self.iteration += 1


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
def test_a_model_of_fewer_parameters_than_a_shard_trains_as_in_plain_pytorch(world: World, optimizer: Any) -> None:
    pair = Pair(tiny, optimizer)
    assert pair.manager.layout.num_elements == 23
    shards = world.allgather_object(pair.manager.shard_runs)
    assert sum(bool(runs) for runs in shards) == 1  # the others hold nothing
    pair.assert_trains_alike(4)
    pair.manager.close()


class OneNumber(nn.Module):
    """A single parameter of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.factor + 1


def test_a_single_scalar_parameter_trains_as_in_plain_pytorch(world: World) -> None:
    pair = Pair(OneNumber, ADAM)
    pair.assert_trains_alike(4)
    assert pair.model.get_parameter("factor").shape == ()
    pair.manager.close()


def test_shards_are_spread_over_all_ranks_where_the_model_is_large_enough(world: World) -> None:
    pair = Pair(dense, ADAM)
    shards = world.allgather_object(pair.manager.shard_runs)
    assert all(shards)
    if len(pair.manager.world.node_sizes) == 1:
        assert [runs[0][0] for runs in shards[1:]] == [runs[0][1] for runs in shards[:-1]]
    assert sum(stop - start for runs in shards for start, stop in runs) == pair.manager.layout.size
    pair.assert_trains_alike(1)
    state = list(pair.manager.optimizer.state.values())
    assert sum(entry["exp_avg"].numel() for entry in state) == sum(stop - start for start, stop in shards[world.rank])
    pair.manager.close()


class Tied(nn.Module):
    """An encoder and a decoder that share one matrix, and a layer that is in the model twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(NUM_FEATURES, 300, bias=False)
        self.middle = nn.Linear(300, 300)
        self.again = self.middle
        self.decoder = nn.Linear(300, NUM_FEATURES, bias=False)
        self.decoder.weight = nn.Parameter(torch.empty(NUM_FEATURES, 300))
        self.encoder.weight = nn.Parameter(torch.randn(NUM_FEATURES, 300) / 10)
        self.decoder.weight = self.encoder.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(inputs @ self.encoder.weight)
        return torch.tanh(self.again(torch.tanh(self.middle(hidden)))) @ self.decoder.weight.t()


def test_tied_parameters_are_one_and_stay_tied(world: World) -> None:
    pair = Pair(Tied, ADAM)
    assert pair.manager.layout.num_elements == 300 * NUM_FEATURES + 300 * 301
    pair.assert_trains_alike(3)
    names = {"encoder.weight", "decoder.weight", "middle.weight", "again.weight"}
    assert names <= set(pair.model.state_dict())
    weights = {name: value.clone() for name, value in made(Tied, seed=9).state_dict().items()}
    pair.manager.load_weights(weights if world.rank == 0 else {})
    assert differing(pair.model.state_dict(), weights) == []
    pair.manager.close()
    for one, other in (("encoder.weight", "decoder.weight"), ("middle.weight", "again.weight")):
        assert pair.model.get_parameter(one) is pair.model.get_parameter(other)


class Frozen(nn.Module):
    """Frozen parameters before, between and behind those that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(NUM_FEATURES, NUM_FEATURES) for _ in range(5)])
        for number in (0, 2, 4):
            self.layers[number].requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)


def test_frozen_parameters_are_rank_0s_and_stay_to_the_bit(world: World) -> None:
    pair = Pair(Frozen, SGD)
    pair.assert_trains_alike(2)
    pair.manager.close()
    model = made(Frozen, seed=1 + world.rank)
    manager = mpidl.ParameterManager(model, ADAMW)
    backward(model, world.rank, 0)
    manager.step()
    for number in (0, 2, 4):
        for name in (f"layers.{number}.weight", f"layers.{number}.bias"):
            assert torch.equal(model.get_parameter(name), made(Frozen, seed=1).get_parameter(name))
            assert model.get_parameter(name).grad is None
    manager.close()


def strided() -> nn.Module:
    """A weight that does not lie in memory row by row."""
    model = nn.Sequential(nn.Linear(NUM_FEATURES, 80), nn.Tanh(), nn.Linear(80, 7))
    weight = torch.randn(NUM_FEATURES, 80) / 5
    model[0].weight = nn.Parameter(weight.t())
    return model


def test_a_parameter_with_unusual_strides_keeps_its_values(world: World) -> None:
    model = made(strided)
    assert not model.get_parameter("0.weight").is_contiguous()
    manager = mpidl.ParameterManager(model, SGD)
    assert differing(model.state_dict(), made(strided).state_dict()) == []
    backward(model, world.rank, 0)
    manager.step()
    manager.close()
    expected = made(strided)
    plain = SGD(expected.parameters())
    reference.update(expected, plain, [functools.partial(backward, expected, rank, 0) for rank in range(world.size)])
    assert reference.largest_difference(model.state_dict(), expected.state_dict()) < 1e-6


def test_all_ranks_start_with_the_weights_and_buffers_of_rank_0(world: World) -> None:
    class Many(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("table", torch.arange(5) + seed)
            self.register_buffer("flags", torch.tensor([seed == 0, True]))
            self.register_buffer("narrow", torch.full((3,), seed + 0.5, dtype=torch.bfloat16))
            self.register_buffer("cache", torch.full((2,), float(seed)), persistent=False)
            self.register_buffer("nothing", None)
            self.register_buffer("empty", torch.empty(0))

    torch.manual_seed(world.rank)
    model = Many(world.rank)
    manager = mpidl.ParameterManager(model, SGD)
    own = {name: value.clone() for name, value in [*model.state_dict().items(), *model.named_buffers()]}
    first = world.broadcast_object(own)
    assert list(own) == list(first)
    assert differing(own, first) == []
    assert torch.equal(own["table"], torch.arange(5))
    manager.close()


# --- param groups -----------------------------------------------------------------------------------------------------


def interleaved(model: nn.Module) -> list[dict[str, Any]]:
    """Groups whose parameters lie between each other's, in an order of their own."""
    named = dict(model.named_parameters())
    names = sorted(named, reverse=True)
    return [
        {"params": [named[name] for name in names if "bias" in name], "lr": 1e-2, "weight_decay": 0.0},
        {"params": (named[name] for name in names if "weight" in name and name != "4.weight")},
        {"params": named["4.weight"], "lr": 5e-3, "weight_decay": 0.5},
    ]


@pytest.mark.parametrize("build", [dense, normalised])
def test_interleaved_groups_with_other_rates_and_decay_train_as_in_plain_pytorch(
    world: World, build: Callable[[], nn.Module]
) -> None:
    pair = Pair(build, ADAMW, interleaved)
    pair.assert_trains_alike(3)
    for group in (*pair.manager.param_groups[:1], *pair.plain.param_groups[:1]):
        group["lr"] = 0.1
    pair.assert_trains_alike(2)
    pair.manager.close()


def test_a_group_without_parameters_is_kept_in_its_place(world: World) -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": [], "lr": 3.0}, {"params": list(model.parameters()), "lr": 1e-3}]

    pair = Pair(dense, ADAM, groups)
    pair.assert_trains_alike(2)
    assert [group["lr"] for group in pair.manager.param_groups] == [3.0, 1e-3]
    pair.manager.close()


def test_groups_that_do_not_fit_the_model_are_refused(world: World) -> None:
    model = made(dense)
    every = list(model.parameters())
    cases: list[tuple[Any, str]] = [
        ([{"params": every[1:]}], "parameter 0.weight is in no param group"),
        ([{"params": every}, {"params": every[:1]}], "parameter 0.weight is in two param groups"),
        ([{"params": [*every, every[2]]}], "parameter 2.weight is in two param groups"),
        ([{"params": [*every, nn.Parameter(torch.zeros(3, 2))]}], r"shape \(3, 2\) that the model does not train"),
        ([{"lr": 0.1}], 'not a dict with the key "params"'),
        (every, 'not a dict with the key "params"'),
        ([{"params": ["0.weight"]}], "param group 0"),
        ([{"params": list(model.named_parameters())}], "param group 0"),
    ]
    for groups, message in cases:
        with pytest.raises(LayoutError, match=message):
            mpidl.ParameterManager(model, SGD, param_groups=groups)


# --- weights in and out -----------------------------------------------------------------------------------------------


def test_a_saved_state_dict_is_no_larger_than_the_model_and_loads_in_plain_torch(world: World) -> None:
    pair = Pair(normalised, SGD)
    pair.assert_trains_alike(1)
    if world.rank == 0:
        file = io.BytesIO()
        torch.save(pair.model.state_dict(), file)
        size = sum(value.nbytes for value in pair.model.state_dict().values())
        assert size < len(file.getvalue()) < size + 20_000
        one_tensor = io.BytesIO()
        torch.save(pair.model.get_parameter("0.bias"), one_tensor)
        assert len(one_tensor.getvalue()) < 5000
        file.seek(0)
        fresh = made(normalised, seed=8)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert differing(fresh.state_dict(), pair.twin.state_dict()) == []
    pair.manager.close()


def test_load_weights_gives_every_rank_rank_0s_and_training_goes_on_from_there(world: World) -> None:
    pair = Pair(normalised, SGD)
    pair.assert_trains_alike(2)
    other = made(normalised, seed=5)
    other.get_buffer("1.running_mean").fill_(3.0)
    other.get_buffer("1.num_batches_tracked").fill_(40)
    backward(pair.model, world.rank, 99)  # forgotten
    pair.manager.load_weights(other.state_dict() if world.rank == 0 else {"anything": torch.zeros(1)})
    assert differing(pair.model.state_dict(), other.state_dict()) == []
    pair.twin.load_state_dict(other.state_dict())
    pair.assert_trains_alike(3)
    pair.manager.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("2.bias"), "2.bias is missing"),
        (lambda state: state.update({"2.biass": torch.zeros(1)}), r"2.biass is not in the model \(near: 2.bias\)"),
        (lambda state: state.update({"2.bias": torch.zeros(7)}), r"2.bias has shape \(7,\), the model wants \(120,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_on_all_ranks_and_change_nothing(
    world: World, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    pair = Pair(dense, SGD)
    state = dict(made(dense, seed=4).state_dict())
    change(state)
    with pytest.raises(LayoutError, match=message):
        pair.manager.load_weights(state if world.rank == 0 else {})
    pair.assert_trains_alike(2)
    pair.manager.close()


def test_close_gives_every_rank_private_weights_that_plain_pytorch_trains_on(world: World) -> None:
    pair = Pair(normalised, SGD)
    pair.assert_trains_alike(2)
    pair.manager.close()
    assert differing(pair.model.state_dict(), pair.twin.state_dict()) == []
    assert all(parameter.grad is None for parameter in pair.model.parameters())
    with torch.no_grad():
        for parameter in pair.model.parameters():
            parameter.fill_(float(world.rank))
    world.barrier()
    assert all((parameter == world.rank).all() for parameter in pair.model.parameters())
    pair.model.load_state_dict(pair.twin.state_dict())
    plain, twin = SGD(pair.model.parameters()), SGD(pair.twin.parameters())
    for model, optimizer in ((pair.model, plain), (pair.twin, twin)):
        model.zero_grad()
        backward(model, 0, 7)
        optimizer.step()
    assert differing(pair.model.state_dict(), pair.twin.state_dict()) == []
    mpidl.ParameterManager(pair.model, SGD).close()


def test_a_copy_of_the_model_is_private(world: World) -> None:
    pair = Pair(normalised, SGD)
    average = copy.deepcopy(pair.model)
    pair.assert_trains_alike(2)
    assert differing(average.state_dict(), made(normalised).state_dict()) == []
    pair.manager.close()


# --- the optimizer's state --------------------------------------------------------------------------------------------


def both_sizes() -> nn.Module:
    """Tensors of every kind: over several shards, one element, no dimension."""
    return nn.Sequential(dense(), nn.Linear(5, 1), Scale())


STATES = {
    "SGD": SGD,
    "SGD without momentum": functools.partial(torch.optim.SGD, lr=0.01),
    "Adam": ADAM,
    "amsgrad": functools.partial(torch.optim.Adam, lr=2e-3, amsgrad=True),
    "NAdam": torch.optim.NAdam,
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": functools.partial(torch.optim.RMSprop, momentum=0.9, centered=True),
    "ASGD": functools.partial(torch.optim.ASGD, t0=1.0),
    "Rprop": torch.optim.Rprop,
}


def last_layers_apart(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": list(model.get_submodule("1").parameters()), "lr": 1e-3},
        {"params": [*model.get_submodule("0").parameters(), *model.get_submodule("2").parameters()]},
    ]


@pytest.mark.parametrize(
    ("name", "groups"), [("SGD", None), ("Adam", None), *((name, last_layers_apart) for name in STATES)]
)
def test_state_dicts_are_those_of_plain_torch_and_go_both_ways(world: World, name: str, groups: Groups | None) -> None:
    pair = Pair(both_sizes, STATES[name], groups)
    pair.assert_trains_alike(3)
    state = pair.manager.state_dict()
    if world.rank > 0:
        assert state == {}
    else:
        assert_same_state(state, pair.plain.state_dict())
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        pair.plain.load_state_dict(torch.load(file, weights_only=True))  # manager to torch
    pair.assert_trains_alike(2)
    fresh = Pair(both_sizes, STATES[name], groups)
    fresh.manager.load_weights(pair.twin.state_dict() if world.rank == 0 else {})
    fresh.manager.load_state_dict(pair.plain.state_dict() if world.rank == 0 else {})  # torch to manager
    fresh.twin, fresh.plain, fresh.iteration = pair.twin, pair.plain, pair.iteration
    fresh.assert_trains_alike(3)
    pair.manager.close()
    fresh.manager.close()


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["param_groups"] == expected["param_groups"]
    used = {index: entry for index, entry in expected["state"].items() if any(v is not None for v in entry.values())}
    assert list(found["state"]) == list(used)
    for index, entry in used.items():
        own = found["state"][index]
        assert set(own) == {key for key, value in entry.items() if value is not None}
        for key, value in own.items():
            assert type(value) is type(entry[key]), (index, key)
            if isinstance(value, torch.Tensor):
                assert (value.dtype, value.shape) == (entry[key].dtype, entry[key].shape), (index, key)
                assert torch.equal(value, entry[key]), (index, key)
            else:
                assert value == entry[key], (index, key)


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
def test_loading_the_state_of_a_new_optimizer_forgets_the_moments(world: World, optimizer: Any) -> None:
    pair = Pair(dense, optimizer)
    pair.assert_trains_alike(2)
    pair.plain = optimizer(pair.twin.parameters())
    pair.manager.load_state_dict(pair.plain.state_dict())
    pair.assert_trains_alike(2)
    pair.manager.close()


def test_state_that_does_not_fit_is_refused_on_all_ranks(world: World) -> None:
    pair = Pair(dense, ADAM)
    pair.assert_trains_alike(1)
    good = pair.plain.state_dict()
    other_shape = copy.deepcopy(good)
    other_shape["state"][1]["exp_avg"] = torch.zeros(3)
    one_group_more = copy.deepcopy(good)
    one_group_more["param_groups"].append(good["param_groups"][0])
    cases: list[tuple[Any, str]] = [
        ({"state": {}}, '"state" and "param_groups"'),
        ([1, 2], '"state" and "param_groups"'),
        (one_group_more, r"param groups of \[6, 6\] parameters, the model has \[6\]"),
        (other_shape, r"exp_avg of 0.bias has shape \(3,\), not \(200,\)"),
    ]
    for state, message in cases:
        with pytest.raises(LayoutError, match=message):
            pair.manager.load_state_dict(state if world.rank == 0 else good)
    pair.assert_trains_alike(2)
    pair.manager.close()


# --- what is refused --------------------------------------------------------------------------------------------------


def refused() -> Iterator[tuple[str, nn.Module, Any, str]]:
    """(case, model, optimizer, message)."""
    yield "nothing to train", made(dense).requires_grad_(False), SGD, "Sequential has no trainable parameter .of 6"
    yield "no parameters", nn.ReLU(), SGD, "ReLU has no trainable parameter .of 0"
    yield "float64", nn.Linear(2, 2).double(), SGD, r"weight is torch.float64; .*model.float\(\)"
    yield "bfloat16", nn.Linear(2, 2).bfloat16(), SGD, "weight is torch.bfloat16"
    yield "meta", nn.Linear(2, 2, device="meta"), SGD, r"weight is on meta; .*model.cpu\(\)"
    yield "lazy", nn.LazyLinear(2), SGD, "weight has no shape yet"
    yield "no module", torch.zeros(2), SGD, "the model is a Tensor"
    yield "LBFGS", nn.Linear(2, 2), torch.optim.LBFGS, "LBFGS does not treat every element alike"
    yield "SparseAdam", nn.Linear(2, 2), torch.optim.SparseAdam, "SparseAdam does not treat every element alike"
    yield "Adafactor", nn.Linear(2, 2), torch.optim.Adafactor, "Adafactor does not treat every element alike"
    yield "Muon", nn.Linear(2, 2), torch.optim.Muon, "those that can are SGD"
    yield "no optimizer", nn.Linear(2, 2), lambda groups: "SGD", "gave a str, not a torch.optim.Optimizer"
    yield "bad option", nn.Linear(2, 2), functools.partial(torch.optim.SGD, lr=-1), "Invalid learning rate: -1"
    linear = nn.Linear(2, 2)
    yield "made already", linear, torch.optim.SGD(linear.parameters()), "callable"
    yield "of the model", linear, lambda groups: torch.optim.SGD(linear.parameters()), "other tensors than those"


def test_what_cannot_be_trained_is_refused_on_all_ranks_with_a_reason(world: World) -> None:
    for case, model, optimizer, message in refused():
        with pytest.raises(LayoutError, match=message):
            mpidl.ParameterManager(model, optimizer)
            pytest.fail(f"{case}: accepted")


def test_an_unknown_reduction_is_refused_with_the_names_of_those_there_are(world: World) -> None:
    with pytest.raises(LayoutError, match="reduction 'ring' is not one of ordered, mpi"):
        mpidl.ParameterManager(nn.Linear(2, 2), SGD, reduction="ring")


def test_ranks_with_different_models_or_options_are_refused_on_all_ranks(world: World) -> None:
    if world.size == 1:
        return  # there is nobody to differ from
    last = world.rank == world.size - 1

    def options(decay: float) -> dict[str, Any]:
        model = nn.Linear(2, 2)
        return {"model": model, "param_groups": [{"params": list(model.parameters()), "weight_decay": decay}]}

    cases: list[dict[str, Any]] = [
        {"model": nn.Linear(2, 3 if last else 2)},
        {"model": nn.Sequential(nn.Linear(2, 2)) if last else nn.Linear(2, 2)},
        {"model": nn.Sequential(nn.BatchNorm1d(2) if last else nn.LayerNorm(2))},
        {"model": nn.Linear(2, 2).requires_grad_(True), "frozen": last},
        options(0.1 if last else 0.2),
    ]
    for case in cases:
        if case.pop("frozen", False):
            case["model"].bias.requires_grad_(False)
        with pytest.raises(LayoutError, match=f"the model of rank {world.size - 1} .* differs from rank 0's"):
            mpidl.ParameterManager(optimizer=SGD, **case)


def test_what_only_one_rank_can_see_is_refused_on_all_ranks(world: World) -> None:
    model = nn.Linear(2, 2)
    if world.rank == world.size - 1:
        model.double()
    with pytest.raises(LayoutError, match="weight is torch.float64"):
        mpidl.ParameterManager(model, SGD)


def test_ranks_that_build_different_optimizers_are_refused(world: World) -> None:
    if world.size == 1:
        return  # there is nobody to differ from
    for first, other in ((SGD, ADAM), (SGD, functools.partial(torch.optim.SGD, lr=0.2, momentum=0.9))):
        with pytest.raises(LayoutError, match="the optimizer of rank"):
            mpidl.ParameterManager(made(dense), other if world.rank else first)


def test_unfreezing_a_parameter_later_is_an_error_that_says_what_to_do(world: World) -> None:
    model = made(Frozen)
    manager = mpidl.ParameterManager(model, SGD)
    model.get_parameter("layers.2.weight").requires_grad_(True)
    backward(model, world.rank, 0)
    with pytest.raises(LayoutError, match="layers.2.weight was frozen"):
        manager.step()
    manager.close()
    again = mpidl.ParameterManager(model, SGD)
    backward(model, world.rank, 0)
    assert again.step() == world.size
    assert differing(model.state_dict(), made(Frozen).state_dict()) == [
        "layers.1.weight",
        "layers.1.bias",
        "layers.2.weight",
        "layers.3.weight",
        "layers.3.bias",
    ]
    again.close()


def test_a_sparse_gradient_is_an_error_that_names_the_parameter(world: World) -> None:
    model = nn.Embedding(50, 4, sparse=True)
    manager = mpidl.ParameterManager(model, SGD)
    model.zero_grad()
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(LayoutError, match="the gradient of weight is sparse"):
        manager.step()
    manager.close()


# --- nodes and memory -------------------------------------------------------------------------------------------------


def test_any_spread_over_nodes_gives_the_same_bits_and_state(world: World) -> None:
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            pair = Pair(both_sizes, ADAM, last_layers_apart, world=other)
            pair.assert_trains_alike(2)
            state = pair.manager.state_dict()
            if world.rank == 0:
                assert_same_state(state, pair.plain.state_dict())
            pair.manager.load_state_dict(state)
            pair.manager.load_weights(pair.twin.state_dict() if world.rank == 0 else {})
            pair.assert_trains_alike(2)
            pair.manager.close()


def test_weights_are_one_copy_on_each_node(world: World) -> None:
    model = made(dense)
    manager = mpidl.ParameterManager(model, SGD)
    world.barrier()
    if manager.world.local_rank == 0:
        manager.weights[:] = manager.world.node + 5
    world.barrier()
    assert all((parameter == manager.world.node + 5).all() for parameter in model.parameters())
    world.barrier()
    manager.close()


def test_no_room_in_shared_memory_costs_a_warning_and_no_bit(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.setattr("mpidl.runtime.shared.DIRECTORY", tmp_path / "missing")
    pair = Pair(normalised, ADAM)
    printed = capsys.readouterr().err
    warned = "no shared memory" in printed and "0 MiB more for weights" in printed and "--shm-size" in printed
    assert warned == (max(world.node_sizes) > 1 and world.rank == 0)
    assert pair.manager.world.num_nodes == world.size or max(world.node_sizes) == 1
    pair.assert_trains_alike(3)
    state = pair.manager.state_dict()
    if world.rank == 0:
        assert_same_state(state, pair.plain.state_dict())
    pair.manager.close()


def test_gradients_have_the_shapes_of_their_parameters_and_lie_in_one_row(world: World) -> None:
    model = made(both_sizes)
    manager = mpidl.ParameterManager(model, SGD)
    assert all(parameter.grad is None for parameter in model.parameters())
    backward(model, world.rank, 0)
    (row,) = manager._sync.gradients.rows
    for parameter, slot in zip(model.parameters(), manager.layout.slots, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.data_ptr() == row.ctypes.data + 4 * slot.offset
    assert np.abs(row).max() > 0
    manager.close()
