"""LARS and LAMB over whole tensors and over pieces of them, and the sums of squares that their norms are made of."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mpidl
from mpidl import kernels
from mpidl.kernels import BLOCK_SIZE
from mpidl.parameters.layout import FlatLayout, Shards
from mpidl.parameters.norms import Segments, ShardNorms, use_norms_over_shards
from mpidl.parameters.update import ShardOptimizer, goes_by_slices
from tests.layerwise import LambReference, LarsReference

LARS = functools.partial(mpidl.Lars, lr=8.0, momentum=0.9, trust_coefficient=0.01, weight_decay=0.02)
LAMB = functools.partial(mpidl.Lamb, lr=0.02, weight_decay=0.1)
BOTH = pytest.mark.parametrize(
    ("factory", "reference"), [(LARS, LarsReference), (LAMB, LambReference)], ids=["lars", "lamb"]
)
SHAPES = [(40, 300), (3,), (2, 5, 7), (), (130, 100), (0, 4), (17,)]
LAYOUT = FlatLayout.of((str(index), shape) for index, shape in enumerate(SHAPES))


def tensors(seed: int) -> list[nn.Parameter]:
    """Of several shapes and magnitudes, each with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(shape, generator=generator) * 2.0**i) for i, shape in enumerate(SHAPES)]
    return made


def set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 3.0 ** (index - 2)


def groups_of(parameters: list[Any]) -> list[dict[str, Any]]:
    """Interleaved: tensors that are neighbours in the vector are not in a group."""
    return [
        {"params": parameters[0::2]},
        {"params": parameters[1:4:2], "adapt": False, "weight_decay": 0.0, "lr": 0.01},
        {"params": parameters[5:6]},
    ]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to float32 rounding of a few operations on values as large as the tensor's largest."""
    found, expected = found.detach().double(), expected.detach().double()
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-7 * max(expected.abs().flatten().tolist(), default=0.0))


# --- whole tensors ----------------------------------------------------------------------------------------------------


@BOTH
def test_five_steps_are_those_of_the_paper_in_float64(factory: Any, reference: Any) -> None:
    parameters = tensors(0)
    optimizer = factory(groups_of(parameters))
    expected = {}
    for group in groups_of(parameters):
        options = {**factory.keywords, **{key: value for key, value in group.items() if key != "params"}}
        for parameter in group["params"]:
            expected[parameter] = [parameter.detach().double().numpy(), reference(options)]
    for seed in range(5):
        set_gradients(parameters, seed)
        optimizer.step()
        for parameter, entry in expected.items():
            entry[0] = entry[1].step(entry[0], parameter.grad.double().numpy())
            assert_close(parameter, torch.from_numpy(np.asarray(entry[0])))


def test_lars_that_adapts_nothing_is_torchs_sgd() -> None:
    one, other = tensors(1), tensors(1)
    optimizers = [
        mpidl.Lars(one, lr=0.1, momentum=0.9, weight_decay=0.01, adapt=False),
        torch.optim.SGD(other, lr=0.1, momentum=0.9, weight_decay=0.01),
    ]
    for seed in range(4):
        for parameters, optimizer in zip((one, other), optimizers, strict=True):
            set_gradients(parameters, seed)
            optimizer.step()
    for a, b in zip(one, other, strict=True):
        assert_close(a, b)


def test_lamb_that_adapts_nothing_is_torchs_adamw() -> None:
    one, other = tensors(1), tensors(1)
    optimizers = [
        mpidl.Lamb(one, lr=0.1, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.01, adapt=False),
        torch.optim.AdamW(other, lr=0.1, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.01),
    ]
    for seed in range(4):
        for parameters, optimizer in zip((one, other), optimizers, strict=True):
            set_gradients(parameters, seed)
            optimizer.step()
    for a, b in zip(one, other, strict=True):
        assert_close(a, b)


def test_a_step_of_lars_without_momentum_has_the_length_that_trust_gives() -> None:
    parameter = nn.Parameter(torch.full((50, 20), 3.0))
    before = parameter.detach().clone()
    parameter.grad = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * 1e6
    mpidl.Lars([parameter], lr=2.0, momentum=0.0, trust_coefficient=0.01).step()
    assert float((parameter.detach() - before).norm() / before.norm()) == pytest.approx(0.02, rel=1e-5)


@pytest.mark.parametrize("factory", [LARS, LAMB])
def test_weights_of_norm_zero_take_the_ratio_1_and_gradients_of_norm_zero_do_no_harm(factory: Any) -> None:
    zeros = [nn.Parameter(torch.zeros(4, 5)) for _ in range(2)]
    still = nn.Parameter(torch.ones(3, 3))
    for parameter in zeros:
        parameter.grad = torch.full((4, 5), 0.5)
    still.grad = torch.zeros(3, 3)
    factory([zeros[0], still], weight_decay=0.0).step()
    factory([zeros[1]], weight_decay=0.0, adapt=False).step()
    assert torch.equal(zeros[0], zeros[1])
    assert zeros[0].abs().min() > 0
    assert torch.equal(still, torch.ones(3, 3))


@pytest.mark.parametrize("factory", [LARS, LAMB])
def test_a_closure_is_called_with_gradients_and_its_loss_returned(factory: Any) -> None:
    parameter, unused = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))
    optimizer = factory([parameter, unused])

    def closure() -> torch.Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 6.0
    assert not torch.equal(parameter, torch.ones(3, 2))
    assert torch.equal(unused, torch.ones(2))  # it has no gradient


@pytest.mark.parametrize("factory", [LARS, LAMB])
def test_state_goes_to_another_optimizer_and_through_a_copy(factory: Any) -> None:
    parameters, others = tensors(2), tensors(2)
    optimizer = factory(parameters)
    for seed in range(2):
        set_gradients(parameters, seed)
        optimizer.step()
    second = factory(others)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = copy.deepcopy(optimizer)
    for parameter, other in zip(parameters, others, strict=True):
        other.data.copy_(parameter.detach())
    for each in (parameters, others, [p for group in copied.param_groups for p in group["params"]]):
        set_gradients(each, 2)
    for each in (optimizer, second, copied):
        each.step()
    for own, *same in zip(parameters, others, copied.param_groups[0]["params"], strict=True):
        assert all(torch.equal(own, other) for other in same)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(mpidl.Lars, lr=-1.0), "Invalid lr: -1.0"),
        (functools.partial(mpidl.Lars, lr=0.1, momentum=math.nan), "Invalid momentum: nan"),
        (functools.partial(mpidl.Lars, lr=0.1, trust_coefficient=-1e-3), "Invalid trust_coefficient: -0.001"),
        (functools.partial(mpidl.Lamb, eps=math.inf), "Invalid eps: inf"),
        (functools.partial(mpidl.Lamb, betas=(0.9, 1.0)), r"Invalid betas: \(0.9, 1.0\)"),
    ],
)
def test_options_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tensors(0))


def test_layer_groups_set_apart_what_has_at_most_one_dimension() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(3, 4), nn.Linear(4, 3, bias=False))
    model[2].weight.requires_grad_(False)
    layers, rest = mpidl.layer_groups(model)
    assert {id(p) for p in layers["params"]} == {id(model[0].weight), id(model[3].weight)}
    assert {id(p) for p in rest.pop("params")} == {
        id(p) for p in (model[0].bias, *model[1].parameters(), model[2].bias)
    }
    assert rest == {"adapt": False, "weight_decay": 0.0}


# --- pieces -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 3 * BLOCK_SIZE), max_size=6), gap=st.integers(0, 40), seed=st.integers(0, 99))
def test_sums_of_squares_are_those_of_numpy_and_do_not_depend_on_the_place(
    sizes: list[int], gap: int, seed: int
) -> None:
    cuts = np.cumsum([0, *sizes], dtype=np.int64)
    generator = np.random.default_rng(seed)
    values = (generator.standard_normal(cuts[-1]) * 10.0 ** generator.integers(-18, 19, cuts[-1])).astype(np.float32)
    found, moved = np.empty(len(sizes)), np.empty(len(sizes))
    kernels.segment_squares(values, cuts, found)
    kernels.segment_squares(np.concatenate([np.full(gap, np.nan, np.float32), values]), cuts + gap, moved)
    assert found.tobytes() == moved.tobytes()
    expected = [math.fsum(values[a:b].astype(float) ** 2) for a, b in itertools.pairwise(cuts)]
    np.testing.assert_allclose(found, expected, rtol=1e-14)


class Ranks:
    """As many ranks as one likes, one after the other: each sends in a first call and receives in a second."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent: dict[int, Any] = {}

    def world(self, rank: int) -> Any:
        def allgather_varying(array: Any, counts: Any) -> Any:
            assert array.size == counts[rank]
            self.sent[rank] = array.copy()
            total = [self.sent.get(r, np.zeros(counts[r])) for r in range(self.size)]
            return np.concatenate(total)

        return types.SimpleNamespace(rank=rank, size=self.size, allgather_varying=allgather_varying)


@settings(max_examples=40)
@given(world_size=st.integers(1, 6), num_cells=st.integers(1, 3), max_size=st.sampled_from([1, 2, 64]))
def test_norms_over_any_shards_have_the_bits_of_one_shard_and_are_numpys(
    world_size: int, num_cells: int, max_size: int
) -> None:
    generator = np.random.default_rng(7)
    weights, gradient = generator.standard_normal((2, LAYOUT.size)).astype(np.float32)
    expected = norms_over(Shards.of(LAYOUT.size, 1, BLOCK_SIZE, num_cells=1), 1, 64, weights, gradient)
    found = norms_over(
        Shards.of(LAYOUT.size, world_size, BLOCK_SIZE, num_cells=num_cells), world_size, max_size, weights, gradient
    )
    assert found == expected
    assert set(found) == {slot.offset for slot in LAYOUT.slots if slot.size}
    for slot in LAYOUT.slots:
        if slot.size:
            own = [float(np.linalg.norm(v[slot.offset : slot.stop].astype(float))) for v in (weights, gradient)]
            assert found[slot.offset] == pytest.approx(own, rel=1e-14)


def norms_over(shards: Shards, world_size: int, max_size: int, weights: Any, gradient: Any) -> dict[int, Any]:
    """From each tensor's offset to the norms that every rank with a piece of it gets."""
    ranks = Ranks(world_size)
    for _ in ("send", "receive"):
        found: dict[int, Any] = {}
        for rank in range(world_size):
            pieces = {}
            for each in shards.slices(rank, max_size * BLOCK_SIZE):
                for __, start, stop in LAYOUT.tensors_in((each.start, each.stop)):
                    pieces[torch.from_numpy(weights[start:stop])] = (start, stop)
            norms = ShardNorms(ranks.world(rank), LAYOUT, shards, pieces)
            own = norms((tensor, torch.from_numpy(gradient[slice(*piece)])) for tensor, piece in pieces.items())
            for (start, _), pair in zip(pieces.values(), own, strict=True):
                slot = next(slot for slot in LAYOUT.slots if slot.offset <= start < slot.stop)
                found.setdefault(slot.offset, set()).add(pair)
    assert all(len(pairs) == 1 for pairs in found.values())
    return {offset: pairs.pop() for offset, pairs in found.items()}


def test_segments_end_at_every_block_and_tensor_and_leave_gaps_out() -> None:
    segments = Segments.of(LAYOUT)
    covered = [element for a, b in zip(segments.starts, segments.stops, strict=True) for element in range(a, b)]
    assert covered == [element for slot in LAYOUT.slots for element in range(slot.offset, slot.stop)]
    assert all(a // BLOCK_SIZE == (b - 1) // BLOCK_SIZE for a, b in zip(segments.starts, segments.stops, strict=True))
    assert segments.firsts[0] == 0
    assert segments.firsts[-1] == len(segments.starts)


@pytest.mark.parametrize("factory", [LARS, LAMB], ids=["lars", "lamb"])
@pytest.mark.parametrize("max_size", [1, 64], ids=["slices of a block", "one slice"])
def test_pieces_of_one_rank_have_the_bits_of_whole_tensors_and_gaps_stay_zero(factory: Any, max_size: int) -> None:
    parameters = tensors(3)
    plain = factory(groups_of(parameters))
    weights, gradient = np.zeros((2, LAYOUT.size), np.float32)
    fill(weights, [p.detach() for p in parameters])
    shards = Shards.of(LAYOUT.size, 1, BLOCK_SIZE, num_cells=1)
    slices = shards.slices(0, max_size * BLOCK_SIZE)
    names = groups_of([slot.name for slot in LAYOUT.slots])
    groups = [({k: v for k, v in group.items() if k != "params"}, tuple(group["params"])) for group in names]
    own_weights = [weights[each.start : each.stop] for each in slices]
    own_gradients = [gradient[each.start : each.stop] for each in slices]
    update = ShardOptimizer(factory, groups, LAYOUT, own_weights, own_gradients, slices)
    assert not goes_by_slices(factory)
    use_norms_over_shards(update, Ranks(1).world(0), LAYOUT, shards)
    for seed in range(4):
        set_gradients(parameters, seed)
        fill(gradient, [p.grad for p in parameters])
        update.step(0, len(slices))
        plain.step()
    expected = np.zeros(LAYOUT.size, np.float32)
    fill(expected, [p.detach() for p in parameters])
    assert weights.tobytes() == expected.tobytes()
    state = update.arrays()
    assert set(state) == {key for key, value in plain.state[parameters[0]].items() if value.dim()}
    for key, values in state.items():
        fill(expected, [plain.state[p][key] for p in parameters])
        assert values.tobytes() == expected.tobytes()


def fill(vector: Any, values: list[Any]) -> None:
    for slot, value in zip(LAYOUT.slots, values, strict=True):
        vector[slot.offset : slot.stop] = value.numpy().reshape(-1)
