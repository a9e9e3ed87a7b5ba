"""LARS and LAMB over shards: the results of whole tensors, on any ranks and nodes, for one small message a step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpidl
from mpidl.parameters.baselines import BASELINES
from mpidl.runtime import World
from tests.layerwise import LambReference, LarsReference
from tests.mpi import reference
from tests.mpi.cases import NUM_FEATURES, SGD, classes, dense, job_of, made, normalised, tiny, trainer_of
from tests.mpi.reference import differing, largest_difference
from tests.mpi.worlds import node_layouts, with_nodes

pytestmark = pytest.mark.thorough

LARS = functools.partial(mpidl.Lars, lr=8.0, trust_coefficient=0.01, weight_decay=0.02)
LAMB = functools.partial(mpidl.Lamb, lr=0.02, weight_decay=0.1)
BOTH = pytest.mark.parametrize("optimizer", [LARS, LAMB], ids=["lars", "lamb"])

Groups = Callable[[nn.Module], list[dict[str, Any]]]


class TiedAndFrozen(nn.Module):
    """A matrix used twice, frozen tensors between trained ones, and a trained one without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(NUM_FEATURES, 300)
        self.frozen = nn.Linear(300, 300)
        self.frozen.weight.requires_grad_(False)
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.decoder = nn.Linear(300, NUM_FEATURES, bias=False)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().t().contiguous())
        self.again = self.decoder

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.decoder(torch.tanh(self.frozen(torch.tanh(self.encoder(inputs))))))
        return self.again(torch.tanh(self.encoder(hidden))) + self.nothing.sum()


def halves(model: nn.Module) -> list[dict[str, Any]]:
    """Every other tensor, whatever its shape: neighbours in the vector are in different groups."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [{"params": trained[0::2]}, {"params": trained[1::2], "lr": 0.01, "weight_decay": 0.0}]


def backward(model: nn.Module, rank: int, iteration: int) -> float:
    generator = torch.Generator().manual_seed(1000 * iteration + rank)
    torch.manual_seed(77 * iteration + rank)
    model(torch.randn(5, NUM_FEATURES, generator=generator)).square().sum(1).sqrt().mean().backward()
    return 1.0


class Twins:
    """A model under a manager, and its twin under the same optimizer over whole tensors in one process."""

    def __init__(self, build: Callable[[], nn.Module], optimizer: Any, groups: Groups | None, **options: Any) -> None:
        self.model, self.twin = made(build), made(build)
        own_groups = groups(self.model) if groups else None
        self.manager = mpidl.ParameterManager(self.model, optimizer, param_groups=own_groups, **options)
        self.plain = optimizer(groups(self.twin) if groups else [p for p in self.twin.parameters() if p.requires_grad])
        self.iteration = 0

    def run(self, iterations: int) -> None:
        for _ in range(iterations):
            world = self.manager.world
            backward(self.model, world.rank, self.iteration)
            self.manager.step()
            parts = [functools.partial(backward, self.twin, rank, self.iteration) for rank in range(world.size)]
            reference.update(self.twin, self.plain, parts)
            self.iteration += 1


CASES: dict[str, tuple[Callable[[], nn.Module], Groups | None]] = {
    "shards that cut tensors": (dense, None),
    "groups of layers and the rest": (normalised, mpidl.layer_groups),
    "interleaved groups": (dense, halves),
    "ranks without elements": (tiny, mpidl.layer_groups),
    "tied, frozen and empty": (TiedAndFrozen, mpidl.layer_groups),
}


@pytest.mark.parametrize("case", CASES)
@BOTH
def test_every_node_layout_gives_the_bits_of_whole_tensors(world: World, optimizer: Any, case: str) -> None:
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as nodes:
            twins = Twins(*CASES[case][:1], optimizer, CASES[case][1], world=nodes)
            twins.run(4)
            assert differing(twins.model.state_dict(), twins.twin.state_dict()) == []
            twins.manager.close()


@pytest.mark.parametrize("reduction", BASELINES)
@BOTH
def test_the_baselines_train_as_over_whole_tensors_too(world: World, optimizer: Any, reduction: str) -> None:
    twins = Twins(dense, optimizer, mpidl.layer_groups, world=world, reduction=reduction)
    twins.run(3)
    assert largest_difference(twins.model.state_dict(), twins.twin.state_dict()) < 1e-5
    twins.manager.close()


@pytest.mark.parametrize(("optimizer", "formula"), [(LARS, LarsReference), (LAMB, LambReference)])
def test_shards_follow_the_paper_in_float64(world: World, optimizer: Any, formula: Any) -> None:
    twins = Twins(dense, optimizer, mpidl.layer_groups, world=world)
    names = {parameter: name for name, parameter in twins.twin.named_parameters()}
    expected = {
        names[parameter]: [parameter.detach().double().numpy().copy(), formula({**optimizer.keywords, **rest})]
        for group in mpidl.layer_groups(twins.twin)
        for rest in [{key: value for key, value in group.items() if key != "params"}]
        for parameter in group["params"]
    }
    for _ in range(3):
        twins.run(1)
        for name, entry in expected.items():  # the twin's gradients are the means over all ranks
            entry[0] = entry[1].step(entry[0], twins.twin.get_parameter(name).grad.double().numpy())
    found = {name: torch.from_numpy(entry[0]) for name, entry in expected.items()}
    assert largest_difference(twins.model.state_dict(), {name: found[name] for name in twins.model.state_dict()}) < 1e-6
    twins.manager.close()


@BOTH
def test_norms_are_of_the_clipped_gradient(world: World, optimizer: Any) -> None:
    found = []
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as nodes:
            twins = Twins(dense, optimizer, None, world=nodes, clip_norm=0.02, clip_value=0.001)

            def clip(*_: Any, model: nn.Module = twins.twin) -> None:
                nn.utils.clip_grad_value_(model.parameters(), 0.001)
                nn.utils.clip_grad_norm_(model.parameters(), 0.02)

            twins.plain.register_step_pre_hook(clip)
            twins.run(3)
            assert twins.manager.grad_norm > 0.02  # so that both bounds matter
            assert largest_difference(twins.model.state_dict(), twins.twin.state_dict()) < 1e-5
            found.append({name: value.clone() for name, value in twins.model.state_dict().items()})
            twins.manager.close()
    assert all(differing(each, found[0]) == [] for each in found)


@BOTH
def test_norms_are_of_the_float32_masters_where_bfloat16_travels(world: World, optimizer: Any) -> None:
    with with_nodes(world, (1,) * world.size) as nodes:
        model = made(dense)
        manager = mpidl.ParameterManager(model, optimizer, world=nodes, wire="bfloat16")
        measured: list[float] = []
        norms = manager.optimizer.norms

        def recorded(pairs: Any) -> Any:
            found = norms(pairs)
            measured.extend(weights for weights, _ in found)
            return found

        manager.optimizer.norms = recorded
        for iteration in range(2):
            measured.clear()
            masters = np.empty(manager.layout.size, np.float32)
            for runs, values in world.allgather_object((manager.shard_runs, manager.shard_weights())):
                for start, stop in runs:
                    masters[start:stop], values = values[: stop - start], values[stop - start :]
            rounded = [float(parameter.detach().double().norm()) for parameter in model.parameters()]
            backward(model, world.rank, iteration)
            manager.step()
            every = {value for values in world.allgather_object(measured) for value in values}
            slots = manager.layout.slots
            exact = [float(np.linalg.norm(masters[slot.offset : slot.stop].astype(float))) for slot in slots]
            assert sorted(every) == pytest.approx(sorted(exact), rel=1e-14)
        if world.size > 1:
            assert exact != pytest.approx(rounded, rel=1e-9)
        manager.close()


@BOTH
def test_a_step_takes_one_allgather_of_the_world_more_than_sgd(
    world: World, monkeypatch: pytest.MonkeyPatch, optimizer: Any
) -> None:
    sent: list[int] = []
    original = World.start_allgather_varying

    def counted(self: World, array: Any, counts: Any) -> Any:
        sent.append(array.nbytes)
        return original(self, array, counts)

    monkeypatch.setattr(World, "start_allgather_varying", counted)
    counts = []
    for each in (SGD, optimizer):
        manager = mpidl.ParameterManager(made(dense), each)
        sent.clear()
        for iteration in range(3):
            backward(manager.model, world.rank, iteration)
            manager.step()
        counts.append((len(sent), sum(sent)))
        manager.close()
    assert counts[1][0] - counts[0][0] == 3
    added = sum(world.allgather_object(counts[1][1] - counts[0][1]))
    assert added == 3 * 16 * 13  # 29,325 elements in 6 tensors and 8 blocks: 13 segments of two float64


@pytest.mark.parametrize("groups", [None, mpidl.layer_groups], ids=["one group", "two groups"])
@BOTH
def test_state_dicts_go_to_plain_pytorch_and_back(world: World, optimizer: Any, groups: Groups | None) -> None:
    twins = Twins(dense, optimizer, groups, world=world)
    twins.run(2)
    state = world.broadcast_object(twins.manager.state_dict())
    plain = optimizer(groups(twins.twin) if groups else list(twins.twin.parameters()))
    plain.load_state_dict(copy.deepcopy(state))
    twins.plain = plain
    twins.run(2)
    assert differing(twins.model.state_dict(), twins.twin.state_dict()) == []

    model = made(dense, seed=8)
    model.load_state_dict(twins.twin.state_dict())
    second = mpidl.ParameterManager(model, optimizer, param_groups=groups(model) if groups else None)
    second.load_state_dict(plain.state_dict() if world.rank == 0 else {})
    for manager in (twins.manager, second):
        backward(manager.model, world.rank, 9)
        manager.step()
    assert differing(model.state_dict(), twins.model.state_dict()) == []
    second.close()
    twins.manager.close()


@BOTH
def test_a_trainer_gives_the_bits_of_plain_pytorch_also_after_resuming(
    world: World, shared_tmp_path: Path, optimizer: Any
) -> None:
    data = classes(60)
    job = job_of(*data, optimizer=optimizer, groups=mpidl.layer_groups, epochs=3)
    expected = made(normalised)
    reference.train(expected, job)
    for resume, epochs in ((False, 2), (True, 3)):
        model = made(normalised, seed=1 + resume)
        trainer = trainer_of(model, job, run_dir=shared_tmp_path / "run")
        trainer.fit(data, epochs=epochs, resume=resume)
        trainer.close()
    assert differing(model.state_dict(), expected.state_dict()) == []
