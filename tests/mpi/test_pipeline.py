"""Buckets that travel between nodes while backward runs: the bits of plain PyTorch, whatever happens on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mpidl
from mpidl.errors import LayoutError
from mpidl.parameters import Assignment
from mpidl.parameters.errands import Errand
from mpidl.parameters.exchange import Exchange
from mpidl.parameters.pipeline import Pipeline
from mpidl.parameters.reduction import REDUCTIONS
from mpidl.parameters.rows import GradientRows
from mpidl.parameters.update import ShardOptimizer
from mpidl.runtime import World
from tests.failing_graph import Failure, fails_in_backward
from tests.mpi import reference
from tests.mpi.cases import ADAM, NUM_FEATURES, SGD, made
from tests.mpi.reference import differing
from tests.mpi.worlds import with_nodes

pytestmark = pytest.mark.thorough

ITERATIONS = 6
LEARNT = 2
"""The first iteration whose buckets are announced: the one before it showed how many gradients there are."""

LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def small_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block for every rank: models of 100 k parameters then have many cells."""
    monkeypatch.setattr("mpidl.parameters.layout.MIN_CELL_SIZE", 1)


def layouts(world: World) -> list[tuple[int, ...]]:
    """A rank on each node, and several on some where there are enough; one rank has no other node to send to."""
    size = world.size
    return [(1,) * size] + ([(size // 2, size - size // 2)] if size > 2 else [])


# --- models -----------------------------------------------------------------------------------------------------------

WIDTH = 150


class Chain(nn.Module):
    """Layers of 22,650 parameters; which of them are used, and how, is for each case to say."""

    def __init__(self, num_layers: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_FEATURES, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, inputs: torch.Tensor, layers: list[int] | None = None) -> torch.Tensor:
        values = torch.tanh(self.first(inputs))
        for number in range(len(self.layers)) if layers is None else layers:
            values = torch.tanh(self.layers[number](values))
        return self.last(values)


class Frozen(Chain):
    def __init__(self) -> None:
        super().__init__()
        for number in (0, 2, 4):
            self.layers[number].requires_grad_(False)


class Tied(Chain):
    """A layer that is in the model twice, and a matrix that is also another's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[4] = self.layers[1]
        self.layers[3].weight = self.layers[0].weight


class Checkpointed(Chain):
    reentrant = False

    def forward(self, inputs: torch.Tensor, layers: list[int] | None = None) -> torch.Tensor:
        values = torch.tanh(self.first(inputs))
        for pair in (self.layers[:2], self.layers[2:4], self.layers[3:]):  # one layer is in two of them
            values = checkpoint(nn.Sequential(*pair), values, use_reentrant=self.reentrant)
        return self.last(values)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


def inputs_of(rank: int, iteration: int, part: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * iteration + 10 * rank + part)
    return torch.randn(4, NUM_FEATURES, generator=generator)


def backward(model: nn.Module, rank: int, iteration: int, part: int = 0, **options: Any) -> None:
    outputs = model(inputs_of(rank, iteration, part), **options)
    (outputs.square().sum(1) + 1).sqrt().mean().backward()


# --- what a rank does in an iteration ---------------------------------------------------------------------------------

Part = Callable[[nn.Module, int, int], None]
"""(model, rank, iteration): done by this rank to the model under the manager, and for all ranks to its twin."""


def once(model: nn.Module, rank: int, iteration: int) -> None:
    backward(model, rank, iteration)


def without_some(model: nn.Module, rank: int, iteration: int) -> None:
    backward(model, rank, iteration, layers=[0, 2, 4])


def now_and_then(model: nn.Module, rank: int, iteration: int) -> None:
    """A layer is used in some iterations, on some ranks only."""
    backward(model, rank, iteration, layers=[0, 1, 2, 3, 4] if (iteration + rank) % 3 == 0 else [0, 1, 4])


def in_another_order(model: nn.Module, rank: int, iteration: int) -> None:
    order = [0, 1, 2, 3, 4, 4, 0]  # some twice
    backward(model, rank, iteration, layers=order if iteration % 2 else order[::-1])


def ever_longer(model: nn.Module, rank: int, iteration: int) -> None:
    backward(model, rank, iteration, layers=[0, 1, 2, 3, 4] + [0, 2] * (iteration // 2))


def three_times(model: nn.Module, rank: int, iteration: int) -> None:
    for part in range(3):
        backward(model, rank, iteration, part)


def more_and_more(model: nn.Module, rank: int, iteration: int) -> None:
    for part in range(1 + iteration // 2 + rank):
        backward(model, rank, iteration, part)


def not_always(model: nn.Module, rank: int, iteration: int) -> None:
    if (iteration + rank) % 4 != 3:
        backward(model, rank, iteration)


def failing(model: nn.Module, rank: int, iteration: int) -> None:
    """Backward that has gone through half of the layers when it fails."""
    values = torch.tanh(model.first(inputs_of(rank, iteration)))
    for number, layer in enumerate(model.layers):
        values = torch.tanh(layer(values))
        if number == 1:
            values = fails_in_backward(values)
    with pytest.raises(Failure):
        model.last(values).square().mean().backward()


def failed_and_repeated(model: nn.Module, rank: int, iteration: int) -> None:
    if iteration == 3 and rank == 0:
        failing(model, rank, iteration)
    backward(model, rank, iteration)


def failed_zeroed_and_repeated(model: nn.Module, rank: int, iteration: int) -> None:
    if iteration == 3:
        failing(model, rank, iteration)
        model.zero_grad()
    backward(model, rank, iteration)


def failed_and_left_out(model: nn.Module, rank: int, iteration: int) -> None:
    if iteration == 3 and rank == 0:
        failing(model, rank, iteration)
        model.zero_grad()
    else:
        backward(model, rank, iteration)


def zeroed_to_none_between(model: nn.Module, rank: int, iteration: int) -> None:
    backward(model, rank, iteration, 1)
    if iteration >= 3:
        model.zero_grad()
        backward(model, rank, iteration)


def zeroed_in_place_between(model: nn.Module, rank: int, iteration: int) -> None:
    backward(model, rank, iteration, 1)
    if iteration >= 3 and rank == 0:
        model.zero_grad(set_to_none=False)
        backward(model, rank, iteration)


def zeroed_at_the_end(model: nn.Module, rank: int, iteration: int) -> None:
    backward(model, rank, iteration)
    if iteration == 3:
        model.zero_grad()


def zeroed_where_it_was_not_used(model: nn.Module, rank: int, iteration: int) -> None:
    """All layers get gradients, which are thrown away; then some."""
    if iteration >= 3:
        backward(model, rank, iteration, 1)
        model.zero_grad()
    without_some(model, rank, iteration)


def clipped(model: nn.Module, rank: int, iteration: int) -> None:
    backward(model, rank, iteration)
    if iteration >= 3:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01 * (rank + 1))


def replaced(model: nn.Module, rank: int, iteration: int) -> None:
    backward(model, rank, iteration)
    if iteration >= 3:
        model.get_parameter("layers.3.weight").grad = torch.full((WIDTH, WIDTH), rank + 0.5).t()


def given_by_hand(model: nn.Module, rank: int, iteration: int) -> None:
    """A gradient where backward makes none."""
    without_some(model, rank, iteration)
    if iteration >= 3:
        for name in ("layers.1.bias", "layers.3.weight"):
            parameter = model.get_parameter(name)
            parameter.grad = torch.full_like(parameter, rank - 0.5)


def taken_away(model: nn.Module, rank: int, iteration: int) -> None:
    backward(model, rank, iteration)
    if iteration >= 3:
        model.get_parameter("layers.3.weight").grad = None


@dataclasses.dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    part: Part
    all_early: bool = False
    """Every bucket but the last is announced before `step`, in all iterations after `LEARNT`."""
    again: tuple[int, ...] = ()
    """The iterations that have to be reduced once more."""


CASES = {
    "plain": Case(Chain, once, all_early=True),
    "frozen": Case(Frozen, once, all_early=True),
    "unused": Case(Chain, without_some, all_early=True),
    "tied": Case(Tied, once, all_early=True),
    "now and then": Case(Chain, now_and_then),
    "another order": Case(Chain, in_another_order),
    "ever longer": Case(Chain, ever_longer),
    "three passes": Case(Chain, three_times, all_early=True),
    "more and more passes": Case(Chain, more_and_more, again=(2, 4)),
    "not always": Case(Chain, not_always),
    "checkpointed": Case(Checkpointed, once, all_early=True),
    "checkpointed, re-entrant": Case(CheckpointedReentrant, once, all_early=True),
    "failed and repeated": Case(Chain, failed_and_repeated, again=(3,)),
    "failed, zeroed and repeated": Case(Chain, failed_zeroed_and_repeated, again=(3,)),
    "failed and left out": Case(Chain, failed_and_left_out, again=(3,)),
    "zeroed to none between": Case(Chain, zeroed_to_none_between, again=(3,)),
    "zeroed in place between": Case(Chain, zeroed_in_place_between, again=(3,)),
    "zeroed at the end": Case(Chain, zeroed_at_the_end, again=(3,)),
    "zeroed where it was not used": Case(Chain, zeroed_where_it_was_not_used, again=(3,)),
    "clipped": Case(Chain, clipped, again=(3,)),
    "replaced": Case(Chain, replaced, again=(3,)),
    "given by hand": Case(Chain, given_by_hand, again=(3,)),
    "taken away": Case(Chain, taken_away, again=(3,)),
}


# --- training beside plain PyTorch ------------------------------------------------------------------------------------


class Watch:
    """What the pipelines of this rank were told and did, iteration by iteration."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.early: list[set[int]] = [set()]
        """Buckets announced before `collect`."""
        self.collects: list[int] = [0]
        self.started: list[int] = []
        """Buckets whose reduction has begun, since the list was emptied."""
        announce, collect = Pipeline.announce, Pipeline.collect
        start: Callable[..., Any] = Pipeline._start_reduction

        def announcing(pipeline: Pipeline, index: int) -> None:
            self.early[-1].add(index)
            announce(pipeline, index)

        def collecting(pipeline: Pipeline, assignment: Assignment) -> float:
            self.collects[-1] += 1
            return collect(pipeline, assignment)

        def starting(pipeline: Pipeline, errand: Errand) -> Any:
            result = yield from start(pipeline, errand)
            self.started.append(errand[0])
            return result

        monkeypatch.setattr(Pipeline, "announce", announcing)
        monkeypatch.setattr(Pipeline, "collect", collecting)
        monkeypatch.setattr(Pipeline, "_start_reduction", starting)

    def next(self) -> None:
        self.early.append(set())
        self.collects.append(0)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


class Pair:
    """A model under a manager on some layout of nodes, and its twin under a plain optimizer."""

    def __init__(self, world: World, build: Callable[[], nn.Module], optimizer: Any = SGD, **options: Any) -> None:
        self.model, self.twin = made(build), made(build)
        self.manager = mpidl.ParameterManager(self.model, optimizer, world=world, **options)
        self.plain = optimizer([p for p in self.twin.parameters() if p.requires_grad])
        self.world = world

    @property
    def num_buckets(self) -> int:
        return len(self.manager._sync.route.buckets)

    def step(self, part: Part, iteration: int) -> None:
        part(self.model, self.world.rank, iteration)
        assert self.manager.step() == self.world.size
        self.step_twin(part, iteration)

    def step_twin(self, part: Part, iteration: int) -> None:
        def run(rank: int) -> float:
            part(self.twin, rank, iteration)
            return 1.0

        reference.update(self.twin, self.plain, [functools.partial(run, rank) for rank in range(self.world.size)])

    def assert_same_bits(self) -> None:
        assert differing(self.model.state_dict(), self.twin.state_dict()) == []


@contextlib.contextmanager
def paired(
    world: World, sizes: tuple[int, ...], build: Callable[[], nn.Module], *, threads: bool = True, **options: Any
) -> Iterator[Pair]:
    with with_nodes(world, sizes) as other:
        other = dataclasses.replace(other, takes_threads=threads and world.takes_threads)
        pair = Pair(other, build, **options)
        assert len(sizes) == 1 or pair.num_buckets > 2
        yield pair
        pair.manager.close()


@pytest.mark.parametrize("name", CASES)
def test_whatever_gradients_come_the_weights_are_those_of_plain_pytorch(world: World, watch: Watch, name: str) -> None:
    case = CASES[name]
    for sizes in layouts(world):
        with paired(world, sizes, case.build) as pair:
            watch.early, watch.collects = [set()], [0]
            for iteration in range(ITERATIONS):
                pair.step(case.part, iteration)
                pair.assert_same_bits()
                watch.next()
            if len(sizes) > 1:
                assert_watched(world, watch, case, pair.num_buckets)


def assert_watched(world: World, watch: Watch, case: Case, num_buckets: int) -> None:
    """Else nothing was early, or nothing too early, and the test could not fail."""
    assert not any(watch.early[:LEARNT])
    everyones = world.allgather_object([watch.early[iteration] for iteration in range(LEARNT, ITERATIONS)])
    assert any(any(early) for of_rank in everyones for early in of_rank)
    if case.all_early:
        assert all(early | {0} == set(range(num_buckets)) for early in everyones[world.rank])
        assert watch.collects[:ITERATIONS] == [1] * ITERATIONS
    for iteration in case.again:
        assert watch.collects[iteration] == 2, iteration


@pytest.mark.parametrize("name", ["plain", "tied", "more and more passes", "clipped"])
def test_without_a_thread_the_bits_are_the_same(world: World, watch: Watch, name: str) -> None:
    case = CASES[name]
    for sizes in layouts(world):
        with paired(world, sizes, case.build, threads=False, optimizer=ADAM) as pair:
            for iteration in range(ITERATIONS):
                pair.step(case.part, iteration)
                pair.assert_same_bits()


def test_buckets_are_exchanged_before_step_is_called(world: World, watch: Watch) -> None:
    if not world.takes_threads:
        pytest.skip("this MPI was not granted MPI_THREAD_MULTIPLE")
    for sizes in layouts(world):
        with paired(world, sizes, Chain) as pair:
            for iteration in range(ITERATIONS):
                watch.started.clear()
                once(pair.model, world.rank, iteration)
                deadline = time.monotonic() + LIMIT_S
                wanted = pair.num_buckets - 1 if iteration >= LEARNT and len(sizes) > 1 else 0
                while len(watch.started) < wanted and time.monotonic() < deadline:
                    time.sleep(1e-3)
                assert watch.started == list(range(pair.num_buckets))[::-1][:wanted]
                pair.manager.step()
                pair.step_twin(once, iteration)
                pair.assert_same_bits()


@pytest.mark.parametrize("threads", [True, False], ids=["thread", "no thread"])
def test_one_rank_may_ask_for_the_norm_while_the_others_do_something_else(world: World, threads: bool) -> None:
    for sizes in layouts(world):
        with paired(world, sizes, Chain, threads=threads) as pair:
            for iteration in range(3):
                pair.step(once, iteration)
                if world.rank == iteration % world.size:
                    assert pair.manager.grad_norm > 0
                world.barrier()


@pytest.mark.parametrize("clip_norm", [None, 1e9])
def test_the_norm_is_there_whoever_asks_while_weights_travel_and_while_bucket_sizes_are_tried(
    world: World, clip_norm: float | None
) -> None:
    for sizes in layouts(world):
        with paired(world, sizes, Chain, clip_norm=clip_norm) as pair:
            for iteration in range(30):  # some change the size of buckets
                once(pair.model, world.rank, iteration)
                pair.manager.step(wait=False)
                if (iteration + world.rank) % 3 == 0:  # not collective
                    norm = pair.manager.grad_norm
                    assert norm == pair.manager.grad_norm
                pair.step_twin(once, iteration)
                if (iteration + world.rank) % 3 == 0:
                    mean = torch.cat([parameter.grad.flatten() for parameter in pair.twin.parameters()])
                    assert norm == pytest.approx(float(mean.norm()), rel=1e-5)
            pair.manager.wait()
            pair.assert_same_bits()


# --- what the manager is asked for ------------------------------------------------------------------------------------


def test_passes_inside_no_sync_are_added_up_however_many_there_are(world: World, watch: Watch) -> None:
    counts = [1, 2, 2, 2, 3, 1, 1]
    for sizes in layouts(world):
        with paired(world, sizes, Chain) as pair:
            watch.early, watch.collects = [set()], [0]

            def passes(model: nn.Module, rank: int, iteration: int, pair: Pair = pair) -> None:
                for number in range(counts[iteration] - 1):
                    with pair.manager.no_sync():
                        backward(model, rank, iteration, number + 1)
                        if model is pair.model:
                            assert pair.manager.step() == 0
                backward(model, rank, iteration)

            for iteration in range(len(counts)):
                pair.step(passes, iteration)
                pair.assert_same_bits()
                watch.next()
            if len(sizes) > 1:
                assert len(watch.early[3]) == pair.num_buckets  # two as before
                assert watch.collects[4] == 2  # three after two
                assert not watch.early[5]  # one after three
                assert len(watch.early[6]) == pair.num_buckets


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_the_managers_zero_grad_forgets_what_was_announced(world: World, watch: Watch, when: str) -> None:
    for sizes in layouts(world):
        with paired(world, sizes, Chain) as pair:
            watch.early, watch.collects = [set()], [0]

            def zeroing(model: nn.Module, rank: int, iteration: int, pair: Pair = pair) -> None:
                zero = pair.manager.zero_grad if model is pair.model else model.zero_grad
                if when == "before":
                    zero()
                backward(model, rank, iteration, 1)
                if when == "between":
                    zero()
                    backward(model, rank, iteration)
                if when == "after" and iteration == 3 and rank == 0:
                    zero()

            for iteration in range(ITERATIONS):
                pair.step(zeroing, iteration)
                pair.assert_same_bits()
                watch.next()
            if len(sizes) > 1:
                assert watch.collects[:6] == [1, 1, 1, 2 if when == "after" else 1, 1, 1]
                assert watch.early[LEARNT]


def test_gradients_of_another_managers_loss_are_thrown_away_and_nothing_is_reduced_twice(
    world: World, watch: Watch
) -> None:
    """An adversarial pair: the generator's loss leaves gradients in the critic."""
    for sizes in layouts(world):
        with paired(world, sizes, Chain) as critic, paired(world, sizes, generator) as maker:
            watch.early, watch.collects = [set()], [0]
            for iteration in range(ITERATIONS):
                critic.manager.zero_grad()
                judged(maker.model, critic.model, world.rank, iteration)
                critic.manager.step()
                made_well(maker.model, critic.model, world.rank, iteration)
                maker.manager.step()
                critic.step_twin(lambda model, rank, i: judged(maker.twin, model, rank, i), iteration)
                maker.step_twin(lambda model, rank, i: made_well(model, critic.twin, rank, i), iteration)
                critic.twin.zero_grad()
                critic.assert_same_bits()
                maker.assert_same_bits()
                watch.next()
            if len(sizes) > 1:
                assert watch.collects[:ITERATIONS] == [2] * ITERATIONS  # once each
                assert all(len(early) >= critic.num_buckets for early in watch.early[LEARNT + 1 : ITERATIONS])


def generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(NUM_FEATURES, WIDTH), *[nn.Linear(WIDTH, WIDTH) for _ in range(6)], nn.Linear(WIDTH, NUM_FEATURES)
    )


def judged(maker: nn.Module, critic: nn.Module, rank: int, iteration: int) -> None:
    fake = critic(maker(inputs_of(rank, iteration, 1)).detach())
    (critic(inputs_of(rank, iteration)).tanh() - fake.tanh()).mean().backward()


def made_well(maker: nn.Module, critic: nn.Module, rank: int, iteration: int) -> None:
    critic(maker(inputs_of(rank, iteration, 1))).tanh().mean().backward()


def test_step_with_num_samples_gives_the_exact_mean_and_announces_nothing(world: World, watch: Watch) -> None:
    for sizes in layouts(world):
        with paired(world, sizes, Chain) as pair:
            watch.early, watch.collects = [set()], [0]
            for iteration in range(ITERATIONS):
                counts = [(rank + iteration) % 3 for rank in range(world.size)]
                assert_weighted(pair, iteration, counts if any(counts) else None)
                watch.next()
            assert not any(watch.early)


def test_steps_with_and_without_num_samples_may_alternate_and_nobody_may_have_samples(
    world: World, watch: Watch
) -> None:
    for sizes in layouts(world):
        with paired(world, sizes, Chain) as pair:
            watch.early, watch.collects = [set()], [0]
            for iteration, counts in enumerate([None, None, None, 3, None, None, 0, None, None]):
                assert_weighted(pair, iteration, None if counts is None else [counts] * world.size)
                watch.next()
            if len(sizes) > 1:
                assert [bool(early) for early in watch.early[:9]] == [0, 0, 1, 1, 0, 1, 1, 0, 1]
                assert watch.collects[:9] == [1, 1, 1, 2, 1, 1, 2, 1, 1]


def assert_weighted(pair: Pair, iteration: int, counts: list[int] | None) -> None:
    """One iteration in which the ranks weigh by these numbers of samples, or all alike."""
    if counts is None:
        pair.step(once, iteration)
    else:
        once(pair.model, pair.world.rank, iteration)
        assert pair.manager.step(num_samples=counts[pair.world.rank]) == sum(counts)

        def part(rank: int) -> float:
            once(pair.twin, rank, iteration)
            return float(counts[rank])

        if any(counts):
            parts = [functools.partial(part, rank) for rank in range(pair.world.size)]
            reference.update(pair.twin, pair.plain, parts, of_means=True)
    pair.assert_same_bits()


def test_weights_loaded_after_a_backward_make_its_gradients_forgotten(world: World, watch: Watch) -> None:
    for sizes in layouts(world):
        with paired(world, sizes, Chain) as pair:
            for iteration in range(4):
                pair.step(once, iteration)
            once(pair.model, world.rank, 99)
            other = made(Chain, seed=5).state_dict()
            pair.manager.load_weights(other if world.rank == 0 else {})
            pair.twin.load_state_dict(other)
            for iteration in range(4, 8):
                pair.step(once, iteration)
                pair.assert_same_bits()


def test_an_error_at_step_leaves_nothing_behind_that_counts(world: World, watch: Watch) -> None:
    """A parameter that was unfrozen too late is refused on all ranks, and frozen again."""

    def build() -> nn.Module:
        model = Chain()
        model.layers[0].requires_grad_(False)
        return model

    for sizes in layouts(world):
        for way in ("zero", "again"):
            with paired(world, sizes, build) as pair:
                for iteration in range(3):
                    pair.step(once, iteration)
                pair.model.layers[0].requires_grad_(True)
                once(pair.model, world.rank, 99)
                with pytest.raises(LayoutError, match="was frozen"):
                    pair.manager.step()
                pair.model.layers[0].requires_grad_(False)
                pair.model.layers[0].zero_grad()
                if way == "zero":
                    pair.manager.zero_grad()
                else:
                    pair.model.zero_grad()
                for iteration in range(4, 7):
                    pair.step(once, iteration)
                    pair.assert_same_bits()


@pytest.mark.parametrize("abandoned", [0, 1, 3])
def test_an_abandoned_iteration_of_other_partitions_does_not_spoil_the_next(
    world: World, watch: Watch, abandoned: int
) -> None:
    """An exception that the user caught has ended an iteration on all ranks, half-way."""
    size = world.size
    few, many = Assignment.even(size, size), Assignment.even(3 * size, size)
    for sizes in layouts(world):
        with paired(world, sizes, Chain, assignment=many) as pair:
            for iteration, assignment in enumerate([many, few, many, few, many]):
                if iteration == abandoned:
                    other = few if assignment is many else many
                    run_partitions(pair, other, 77, ends=False)
                run_partitions(pair, assignment, iteration)
                table = pair.manager.synchronize(assignment)
                partitions = range(assignment.num_partitions)
                expected = [[7.0 * iteration + p, weight_of(p, iteration), 4 + p] for p in partitions]
                assert table[:, :3].tolist() == expected
                parts = [functools.partial(summed, pair.twin, partition, iteration) for partition in partitions]
                reference.update(pair.twin, pair.plain, parts)
                pair.assert_same_bits()


def run_partitions(pair: Pair, assignment: Assignment, iteration: int, *, ends: bool = True) -> None:
    start, stop = assignment.range_of(pair.world.rank)
    for partition in range(start, stop):
        pair.manager.begin_partition(assignment, partition)
        weight = summed(pair.model, partition, iteration)
        if ends or partition < stop - 1:
            pair.manager.end_partition(assignment, partition, 7.0 * iteration + partition, weight, 4 + partition)


def summed(model: nn.Module, partition: int, iteration: int) -> float:
    once(model, partition, iteration)
    return weight_of(partition, iteration)


def weight_of(partition: int, iteration: int) -> float:
    return 1.0 + (partition + iteration) % 3


# --- delays -----------------------------------------------------------------------------------------------------------


def with_naps(monkeypatch: pytest.MonkeyPatch, rank: int, seed: int) -> None:
    """Let this rank sleep at random before everything that another rank or the driver may wait for."""
    generator = random.Random(100 * seed + rank)
    lazy = generator.random() < 0.7

    def nap() -> None:
        if lazy and generator.random() < 0.3:
            time.sleep(generator.random() * 4e-3)

    def sleepy(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def late(*args: Any, **options: Any) -> Any:
            nap()
            return original(*args, **options)

        monkeypatch.setattr(owner, name, late)

    for owner, name in [
        (GradientRows, "_added"), (GradientRows, "close"), (GradientRows, "open"), (Pipeline, "announce"),
        (Pipeline, "begin"), (Pipeline, "collect"), (Pipeline, "begin_publishing"), (Pipeline, "publish"),
        (Pipeline, "mean"), (Pipeline, "wait"), (ShardOptimizer, "step"), (Exchange, "addresses"),
        (Exchange, "start_spread"), (World, "start_node_barrier"), (World, "start_alltoall_varying"),
        (World, "start_column_reduce_scatter"), (World, "start_allgather_varying"), (Pipeline, "publish_changes"),
        (Pipeline, "end_publishing"),
    ]:  # fmt: skip
        sleepy(owner, name)


@pytest.mark.parametrize("threads", [True, False], ids=["thread", "no thread"])
@pytest.mark.parametrize("seed", range(3))
def test_delays_anywhere_do_not_change_the_bits(
    world: World, monkeypatch: pytest.MonkeyPatch, seed: int, threads: bool
) -> None:
    with_naps(monkeypatch, world.rank, seed)
    for sizes in layouts(world):
        for part in (once, clipped):
            with paired(world, sizes, Chain, optimizer=ADAM, threads=threads) as pair:
                for iteration in range(ITERATIONS - 1):
                    pair.step(part, iteration)
                    pair.assert_same_bits()


@pytest.mark.parametrize("seed", range(2))
def test_delays_anywhere_leave_an_mpi_reduction_within_rounding(
    world: World, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    with_naps(monkeypatch, world.rank, seed)
    for sizes in layouts(world):
        with paired(world, sizes, Chain, reduction="mpi") as pair:
            for iteration in range(ITERATIONS):
                pair.step(in_another_order if seed else once, iteration)
            assert reference.largest_difference(pair.model.state_dict(), pair.twin.state_dict()) < 1e-5
            digests = world.allgather_object(pair.manager.weights.tobytes())
            assert len(set(digests)) == 1


@pytest.mark.parametrize("name", ["plain", "clipped", "more and more passes", "given by hand"])
def test_an_mpi_reduction_is_within_rounding_whatever_gradients_come(world: World, watch: Watch, name: str) -> None:
    case = CASES[name]
    for sizes in layouts(world):
        with paired(world, sizes, case.build, reduction="mpi") as pair:
            watch.early, watch.collects = [set()], [0]
            for iteration in range(ITERATIONS):
                pair.step(case.part, iteration)
                watch.next()
            assert reference.largest_difference(pair.model.state_dict(), pair.twin.state_dict()) < 1e-5
            if len(sizes) > 1:
                assert_watched(world, watch, case, pair.num_buckets)


# --- closing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [True, False], ids=["thread", "no thread"])
@pytest.mark.parametrize("reduction", list(REDUCTIONS))
def test_close_in_the_middle_of_an_iteration_ends_and_gives_the_weights_before_it(
    world: World, reduction: str, threads: bool
) -> None:
    for sizes in layouts(world):
        for num_iterations in (0, 1, 4):
            with paired(world, sizes, Chain, reduction=reduction, threads=threads) as pair:
                for iteration in range(num_iterations):
                    pair.step(once, iteration)
                once(pair.model, world.rank, 99)  # in the last case announced
                if num_iterations == 4 and world.rank == 0:
                    once(pair.model, world.rank, 98)
            assert all(parameter.grad is None for parameter in pair.model.parameters())
            if reduction == "ordered":
                pair.assert_same_bits()
            pair.manager.close()  # does nothing


class Breaking(torch.optim.SGD):
    """Raises in the middle of the third update."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise Failure
        return super().step(closure)


@pytest.mark.parametrize("threads", [True, False], ids=["thread", "no thread"])
def test_an_exception_in_the_update_that_all_ranks_see_is_raised_and_training_may_go_on_or_end(
    world: World, threads: bool
) -> None:
    for sizes in layouts(world):
        for goes_on in (True, False):
            with paired(world, sizes, Chain, optimizer=functools.partial(Breaking, lr=0.1), threads=threads) as pair:
                for iteration in range(2):
                    pair.step(once, iteration)
                once(pair.model, world.rank, 99)
                with pytest.raises(Failure):
                    pair.manager.step()
                pair.plain.calls += 1
                pair.assert_same_bits()
                if goes_on:
                    pair.manager.zero_grad()
                    for iteration in range(3, 6):
                        pair.step(once, iteration)
                        pair.assert_same_bits()
