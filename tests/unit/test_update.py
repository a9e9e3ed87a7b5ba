"""The optimizer of a shard: the same bits however the vector is cut, and those of torch's optimizer over the model."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidl.errors import LayoutError
from mpidl.kernels import BLOCK_SIZE
from mpidl.parameters.layout import FlatLayout, Shards, Slice
from mpidl.parameters.model import Group
from mpidl.parameters.update import ELEMENT_WISE, OptimizerFactory, ShardOptimizer, goes_by_slices

Float32Array = npt.NDArray[np.float32]

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1},
    "SGD momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    "SGD nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "SGD maximize": {"lr": 0.1, "momentum": 0.5, "maximize": True},
    "SGD fused": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "fused": True},
    "SGD foreach": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "foreach": True},
    "Adam": {"lr": 0.01, "betas": (0.8, 0.95)},
    "Adam amsgrad": {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True},
    "Adam fused": {"lr": 0.01, "weight_decay": 0.01, "fused": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW amsgrad": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    "AdamW fused": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "fused": True},
    "Adamax": {"lr": 0.01, "weight_decay": 0.01},
    "NAdam": {"lr": 0.01, "weight_decay": 0.01, "decoupled_weight_decay": True},
    "RAdam": {"lr": 0.01, "weight_decay": 0.01, "decoupled_weight_decay": True},
    "Adagrad": {"lr": 0.05, "lr_decay": 0.01, "weight_decay": 0.01, "initial_accumulator_value": 0.1},
    "Adagrad fused": {"lr": 0.05, "lr_decay": 0.01, "weight_decay": 0.01, "fused": True},
    "Adadelta": {"lr": 0.5, "rho": 0.8, "weight_decay": 0.01},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.01},
    "RMSprop plain": {"lr": 0.01, "alpha": 0.9},
    "Rprop": {"lr": 0.01, "etas": (0.4, 1.3)},
    "ASGD": {"lr": 0.05, "lambd": 1e-3, "t0": 2.0, "weight_decay": 0.01},
}
"""Every optimizer that is said to work, with options that take its other paths."""

NAMES = list(OPTIMIZERS)
STEPS = 4

# Sizes that leave every kind of rest: of a cache line, of two vectors of 16, of a block; scalars and empty tensors.
SHAPES: list[tuple[int, ...]] = [
    (3, 7), (), (5000,), (1,), (17, 33), (0, 4), (BLOCK_SIZE,), (49,), (2 * BLOCK_SIZE + 1,), (16,), (301,), (40, 30),
]  # fmt: skip
LAYOUT = FlatLayout.of((f"p{i}", shape) for i, shape in enumerate(SHAPES))


def factory_of(name: str) -> OptimizerFactory:
    return functools.partial(getattr(torch.optim, name.split()[0]), **OPTIMIZERS[name])


def one_group() -> list[Group]:
    return [({}, tuple(slot.name for slot in LAYOUT.slots))]


def two_groups() -> list[Group]:
    """Every other parameter, in an order of the user's own: runs of many lengths, cut at any cache line."""
    names = [slot.name for slot in LAYOUT.slots]
    return [({"lr": 0.02}, tuple(names[::-2])), ({"weight_decay": 0.3}, tuple(names[-2::-2]))]


def start_weights() -> Float32Array:
    weights = np.zeros(LAYOUT.size, np.float32)
    generator = np.random.default_rng(1)
    for slot in LAYOUT.slots:
        weights[slot.offset : slot.stop] = generator.standard_normal(slot.size)
    return weights


@functools.cache
def gradients() -> list[Float32Array]:
    """One gradient a step, of many magnitudes; some elements stay zero; zeros in the gaps."""
    generator, found = np.random.default_rng(2), []
    for _ in range(2 * STEPS):
        gradient = np.zeros(LAYOUT.size, np.float32)
        for slot in LAYOUT.slots:
            values = generator.standard_normal(slot.size) * np.exp2(generator.integers(-12, 3, slot.size))
            gradient[slot.offset : slot.stop] = values * (generator.random(slot.size) < 0.9)
        found.append(gradient)
    return found


Spread = list[list[Slice]]
"""Each owner's slices."""


def sharded(
    factory: Any,
    groups: list[Group],
    layout: FlatLayout,
    weights: Float32Array,
    gradient: Float32Array,
    slices: list[Slice],
) -> ShardOptimizer:
    """Over slices of a vector of weights, with their gradients one behind the other."""
    own_weights = [weights[each.start : each.stop] for each in slices]
    return ShardOptimizer(factory, groups, layout, own_weights, [gradient[each.own] for each in slices], slices)


class Cut:
    """Shard optimizers over one vector of weights, one per owner, each stepped some slices at a time."""

    def __init__(
        self, name: str, groups: list[Group], spread: Spread, weights: Float32Array, at_a_time: int | None = None
    ) -> None:
        self.weights = weights.copy()
        self._parts = []
        self._at_a_time = at_a_time
        for slices in spread:
            gradient = np.zeros(sum(each.size for each in slices), np.float32)
            update = sharded(factory_of(name), groups, LAYOUT, self.weights, gradient, slices)
            self._parts.append((update, gradient, slices))

    def step(self, gradient: Float32Array) -> None:
        for update, own, slices in self._parts:
            stride = self._at_a_time or max(len(slices), 1)
            for first in range(0, max(len(slices), 1), stride):
                last = min(first + stride, len(slices))
                own[:] = np.nan  # what is not to be used yet
                for each in slices[first:last]:
                    own[each.own] = gradient[each.start : each.stop]
                update.step(first, last)

    def state(self) -> tuple[dict[str, Float32Array], list[dict[str, Any]]]:
        """The state of all shards, as a checkpoint would hold it."""
        vectors: dict[str, Float32Array] = {}
        for update, _, slices in self._parts:
            for key, values in update.arrays().items():
                whole = vectors.setdefault(key, np.zeros(LAYOUT.size, np.float32))
                for each in slices:
                    whole[each.start : each.stop] = values[each.own]
        entries = zip(*(update.scalars() for update, _, _ in self._parts), strict=True)
        scalars: list[dict[str, Any]] = [next((entry for entry in group if entry), {}) for group in entries]
        scalars = json.loads(json.dumps(scalars))
        return vectors, scalars

    def load(self, vectors: dict[str, Float32Array], scalars: list[dict[str, Any]]) -> None:
        for update, _, slices in self._parts:
            own = {
                key: np.concatenate([np.empty(0, np.float32), *(values[each.start : each.stop] for each in slices)])
                for key, values in vectors.items()
            }
            update.load(own, scalars)


def slices_of(start: int, stop: int, most: int) -> list[Slice]:
    """One contiguous shard, cut into slices."""
    return [Slice(first, min(first + most, stop), first - start) for first in range(start, stop, most)]


def cut_at(blocks: list[int], slice_blocks: int = 99) -> Spread:
    cuts = [0, *(min(LAYOUT.size, BLOCK_SIZE * block) for block in sorted(blocks)), LAYOUT.size]
    return [slices_of(start, stop, slice_blocks * BLOCK_SIZE) for start, stop in itertools.pairwise(cuts)]


def dealt(world_size: int, num_cells: int, slice_blocks: int) -> Spread:
    """Cell by cell, so that every owner has pieces in several places."""
    shards = Shards.of(LAYOUT.size, world_size, BLOCK_SIZE, num_cells=num_cells)
    return [shards.slices(rank, slice_blocks * BLOCK_SIZE) for rank in range(world_size)]


NUM_BLOCKS = -(-LAYOUT.size // BLOCK_SIZE)
WHOLE = cut_at([])
FINEST = cut_at(list(range(1, NUM_BLOCKS)))
SCATTERED = dealt(2, 2, 1)
BLOCKS = st.integers(1, NUM_BLOCKS)
CUTS = st.builds(cut_at, st.lists(st.integers(0, NUM_BLOCKS), max_size=6), BLOCKS) | st.builds(
    dealt, st.integers(1, 7), BLOCKS, BLOCKS
)
AT_A_TIME = st.none() | st.integers(1, NUM_BLOCKS)


@functools.cache
def uncut(name: str, *, two: bool) -> tuple[bytes, dict[str, bytes], str]:
    """Weights and state after STEPS steps over the whole vector at once."""
    groups = two_groups() if two else one_group()
    whole = Cut(name, groups, WHOLE, start_weights())
    for gradient in gradients()[:STEPS]:
        whole.step(gradient)
    vectors, scalars = whole.state()
    return whole.weights.tobytes(), {key: v.tobytes() for key, v in vectors.items()}, json.dumps(scalars)


def by_torch(name: str, groups: list[Group]) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    """The plain optimizer over ordinary parameters of the model's shapes, after STEPS steps."""
    weights = start_weights()
    parameters = {
        slot.name: torch.nn.Parameter(torch.from_numpy(weights[slot.offset : slot.stop].copy()).view(slot.shape))
        for slot in LAYOUT.slots
    }
    optimizer = factory_of(name)([{**options, "params": [parameters[n] for n in names]} for options, names in groups])
    for gradient in gradients()[:STEPS]:
        for slot in LAYOUT.slots:
            own = torch.from_numpy(gradient[slot.offset : slot.stop].copy())
            parameters[slot.name].grad = own.view(slot.shape)
        optimizer.step()
    return list(parameters.values()), optimizer


def test_every_optimizer_that_is_said_to_work_is_tested() -> None:
    assert {name.split()[0] for name in OPTIMIZERS} == set(ELEMENT_WISE)


def test_every_optimizer_of_torch_is_either_supported_or_refused() -> None:
    names = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
    known_to_mix_elements = {"Adafactor", "LBFGS", "Muon", "Optimizer", "SparseAdam"}
    assert names - known_to_mix_elements == set(ELEMENT_WISE)


@pytest.mark.parametrize("two", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("name", [name for name in NAMES if "fused" not in name])
def test_one_shard_has_the_bits_of_torch_s_optimizer_over_the_parameters(name: str, two: bool) -> None:
    for place, own, theirs in beside_torch(name, two=two):
        assert own.tobytes() == theirs.tobytes(), place


@pytest.mark.parametrize("name", [name for name in NAMES if "fused" in name])
def test_a_fused_optimizer_is_within_rounding_of_torch_s_over_the_parameters(name: str) -> None:
    # torch's fused kernels round a tensor's last few elements, those that fill no vector, in another way.
    for place, own, theirs in beside_torch(name, two=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-6, atol=1e-7, err_msg=str(place))


def beside_torch(name: str, *, two: bool) -> Iterator[tuple[Any, Float32Array, Float32Array]]:
    """Weights and element-wise state of every parameter: ours, torch's."""
    parameters, optimizer = by_torch(name, two_groups() if two else one_group())
    weights, vectors, _ = uncut(name, two=two)
    found = np.frombuffer(weights, np.float32)
    assert not np.array_equal(found, start_weights())
    for slot, parameter in zip(LAYOUT.slots, parameters, strict=True):
        yield slot, found[slot.offset : slot.stop], parameter.detach().numpy().reshape(-1)
        state = optimizer.state[parameter]
        tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == parameter.shape}
        assert parameter.dim() == 0 or parameter.numel() == 0 or set(tensors) == set(vectors)
        for key in vectors:
            yield (slot, key), np.frombuffer(vectors[key], np.float32)[slot.offset : slot.stop], as_array(tensors[key])


def as_array(tensor: torch.Tensor) -> Float32Array:
    array: Float32Array = tensor.numpy().reshape(-1)
    return array


@pytest.mark.parametrize("two", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("name", NAMES)
def test_the_finest_cut_has_the_bits_of_no_cut(name: str, two: bool) -> None:
    check_cut(name, FINEST, None, two=two)


@pytest.mark.parametrize("two", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("name", NAMES)
def test_slice_by_slice_has_the_bits_of_the_whole_at_once(name: str, two: bool) -> None:
    assert max(len(slices) for slices in SCATTERED) > 2
    check_cut(name, SCATTERED, 1, two=two)


@settings(max_examples=60)
@given(name=st.sampled_from(NAMES), spread=CUTS, at_a_time=AT_A_TIME, two=st.booleans())
def test_any_cut_has_the_bits_of_no_cut(name: str, spread: Spread, at_a_time: int | None, two: bool) -> None:
    check_cut(name, spread, at_a_time, two=two)


def check_cut(name: str, spread: Spread, at_a_time: int | None, *, two: bool) -> None:
    weights, vectors, scalars = uncut(name, two=two)
    cut = Cut(name, two_groups() if two else one_group(), spread, start_weights(), at_a_time)
    for gradient in gradients()[:STEPS]:
        cut.step(gradient)
    own_vectors, own_scalars = cut.state()
    assert cut.weights.tobytes() == weights
    assert {key: values.tobytes() for key, values in own_vectors.items()} == vectors
    assert json.dumps(own_scalars) == scalars


@pytest.mark.parametrize("name", NAMES)
def test_gaps_between_tensors_stay_zero(name: str) -> None:
    found = np.frombuffer(uncut(name, two=True)[0], np.float32)
    inside = np.zeros(LAYOUT.size, bool)
    for slot in LAYOUT.slots:
        inside[slot.offset : slot.stop] = True
    assert not inside.all()
    assert (found[~inside] == 0).all()


@settings(max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    before=CUTS,
    after=CUTS,
    at_a_time=AT_A_TIME,
    steps=st.integers(0, STEPS - 1),
    two=st.booleans(),
)
def test_state_taken_midway_goes_on_over_another_cut_with_the_bits_of_the_undisturbed_run(
    name: str, before: Spread, after: Spread, at_a_time: int | None, steps: int, two: bool
) -> None:
    groups = two_groups() if two else one_group()
    first = Cut(name, groups, before, start_weights(), at_a_time)
    for gradient in gradients()[:steps]:
        first.step(gradient)
    second = Cut(name, groups, after, first.weights, at_a_time)
    second.load(*first.state())
    for gradient in gradients()[steps:STEPS]:
        second.step(gradient)
    weights, vectors, scalars = uncut(name, two=two)
    assert second.weights.tobytes() == weights
    own_vectors, own_scalars = second.state()
    assert {key: values.tobytes() for key, values in own_vectors.items()} == vectors
    assert json.dumps(own_scalars) == scalars


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("SGD", "RMSprop plain")])
def test_the_state_matters(name: str) -> None:
    # Else the test above could not fail.
    first = Cut(name, one_group(), FINEST, start_weights())
    for gradient in gradients()[: STEPS - 1]:
        first.step(gradient)
    cold = Cut(name, one_group(), FINEST, first.weights)
    cold.step(gradients()[STEPS - 1])
    assert cold.weights.tobytes() != uncut(name, two=False)[0]


def test_loaded_state_is_a_copy() -> None:
    first = Cut("SGD momentum", one_group(), WHOLE, start_weights())
    first.step(gradients()[0])
    vectors, scalars = first.state()
    kept = {key: values.copy() for key, values in vectors.items()}
    second = Cut("SGD momentum", one_group(), WHOLE, first.weights)
    second.load(vectors, scalars)
    second.step(gradients()[1])
    assert all(np.array_equal(vectors[key], kept[key]) for key in kept)


def test_an_empty_shard_has_no_state_and_takes_any() -> None:
    whole = Cut("Adam", two_groups(), WHOLE, start_weights())
    whole.step(gradients()[0])
    vectors, scalars = whole.state()
    for place in (0, BLOCK_SIZE, LAYOUT.size):
        empty = Cut("Adam", two_groups(), [slices_of(place, place, BLOCK_SIZE)], start_weights())
        empty.step(gradients()[0])
        assert empty.state() == ({}, [{}, {}])
        empty.load(vectors, scalars)
        empty.step(gradients()[1])
        assert empty.weights.tobytes() == start_weights().tobytes()


def shard_optimizer(factory: Any, groups: list[Group] | None = None) -> ShardOptimizer:
    """Over the whole vector in slices of one block."""
    gradient = np.zeros(LAYOUT.size, np.float32)
    slices = slices_of(0, LAYOUT.size, BLOCK_SIZE)
    return sharded(factory, groups or one_group(), LAYOUT, start_weights(), gradient, slices)


def make(factory: Any) -> None:
    shard_optimizer(factory)


@pytest.mark.parametrize("name", ["LBFGS", "Adafactor", "SparseAdam", "Muon"])
def test_an_optimizer_that_mixes_elements_is_refused_by_name(name: str) -> None:
    if not hasattr(torch.optim, name):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    with pytest.raises(LayoutError, match=name):
        make(getattr(torch.optim, name))


def test_arguments_that_an_optimizer_refuses_are_an_error_of_the_user() -> None:
    with pytest.raises(LayoutError, match="Invalid learning rate: -1"):
        make(functools.partial(torch.optim.SGD, lr=-1))
    with pytest.raises(LayoutError, match="momentums"):
        make(functools.partial(torch.optim.SGD, momentums=0.9))  # type: ignore[call-arg]


def test_what_is_no_optimizer_is_refused_with_a_hint() -> None:
    with pytest.raises(LayoutError, match="list.*functools.partial"):
        make(lambda groups: groups)


def test_an_element_wise_optimizer_of_the_users_own_is_taken() -> None:
    class Own(torch.optim.SGD):
        pass

    factory = functools.partial(Own, lr=0.1)
    shard_optimizer(factory).step(0, 1)
    assert not goes_by_slices(factory)  # it may count its calls
    assert not goes_by_slices(lambda _: 1 / 0)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("name", sorted({name.split()[0] for name in NAMES}))
def test_torch_s_own_optimizers_may_be_called_slice_by_slice(name: str) -> None:
    assert goes_by_slices(getattr(torch.optim, name))


def test_hooks_are_seen_and_gradients_may_move_to_other_memory() -> None:
    update = shard_optimizer(factory_of("SGD"))
    found = [update.has_hooks]
    handle = update.optimizer.register_step_pre_hook(lambda *_: None)
    found.append(update.has_hooks)
    handle.remove()
    assert [*found, update.has_hooks] == [False, True, False]
    before = [part.tensor.detach().clone() for part in update._parts[0]]
    slices = slices_of(0, LAYOUT.size, BLOCK_SIZE)
    update.set_gradients([np.ones(each.size, np.float32) for each in slices])
    update.step(0, update.num_slices)
    moved = [a - part.tensor.detach() for a, part in zip(before, update._parts[0], strict=True)]
    lr = update.optimizer.param_groups[0]["lr"]
    assert all(torch.allclose(each, torch.full_like(each, lr), rtol=1e-3) for each in moved)


def test_between_two_steps_the_param_groups_hold_all_tensors_also_after_an_exception() -> None:
    update = shard_optimizer(factory_of("SGD"), two_groups())
    tensors = [list(map(id, group["params"])) for group in update.optimizer.param_groups]
    seen: list[int] = []
    step = update.optimizer.step

    def counting() -> None:
        seen.append(sum(len(group["params"]) for group in update.optimizer.param_groups))
        step()

    update.optimizer.step = counting  # type: ignore[method-assign, assignment]
    update.step(0, 2)
    update.optimizer.param_groups[1]["lr"] = torch.zeros(2)  # which SGD cannot take
    with pytest.raises(Exception, match="(?s)."):
        update.step(1, 3)
    assert [list(map(id, group["params"])) for group in update.optimizer.param_groups] == tensors
    assert all(0 < count < sum(map(len, tensors)) for count in seen)


@pytest.fixture
def two_threads() -> Iterator[None]:
    kept = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(kept)


@pytest.mark.parametrize("name", ["SGD momentum", "SGD fused", "AdamW", "Adam fused", "RMSprop", "Adadelta"])
@pytest.mark.usefixtures("two_threads")
def test_threads_that_cut_a_shard_again_do_not_change_bits(name: str) -> None:
    # torch gives each thread a part of a long tensor; where the parts begin depends on the shard's length.
    size = 20 * BLOCK_SIZE + 48
    layout = FlatLayout.of([("p", (size,))])
    generator = np.random.default_rng(3)
    start, gradient = generator.standard_normal((2, size)).astype(np.float32)
    found = []
    for cuts in ([0, size], [0, 9 * BLOCK_SIZE, size], [0, 17 * BLOCK_SIZE, 18 * BLOCK_SIZE, size]):
        for most in (size, 7 * BLOCK_SIZE):
            weights = start.copy()
            for first, last in itertools.pairwise(cuts):
                own, slices = gradient[first:last].copy(), slices_of(first, last, most)
                update = sharded(factory_of(name), [({}, ("p",))], layout, weights, own, slices)
                for _ in range(3):
                    for index in range(len(slices)):
                        update.step(index, index + 1)
            found.append(weights.tobytes())
    assert len(set(found)) == 1
