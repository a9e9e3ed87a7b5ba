"""Benchmarks on any number of ranks and nodes: all ways agree, one that does not is found, times are everybody's."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mpidl import cli
from mpidl.bench import control, gloo, horovod, limits, plan, step, sync
from mpidl.bench.cases import OPTIMIZERS, Batches, Exchanged, build_model
from mpidl.bench.central import Central
from mpidl.bench.control import ControlOnly, Groups
from mpidl.bench.exchange_ways import WAYS, GlooAllreduce
from mpidl.bench.measuring import time_in_turn
from mpidl.bench.step_ways import ALONE, Alone, Clock, Ddp
from mpidl.errors import ConfigError, DisagreementError
from mpidl.runtime import World, faults
from tests.mpi.worlds import node_layouts, with_nodes

# torch.distributed.optim, where ZeroRedundancyOptimizer lives, compiles functions as it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

SHAPES = [(30, 10), (5000,), (1,)]


class Sleeper:
    def __init__(self, seconds: float, told: list[str], name: str) -> None:
        self.seconds, self.told, self.name = seconds, told, name

    def prepare(self) -> None:
        self.told.append(self.name)

    def run(self) -> None:
        time.sleep(self.seconds)


class OnlyItsOwn(GlooAllreduce):
    """Leaves out the other ranks."""

    def run(self) -> None:
        self._optimizer.step()


class Forgets(Alone):
    """Never updates."""

    def finish(self, clock: Clock) -> None:
        self.module.zero_grad()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_ways_give_the_weights_of_a_float64_optimizer(world: World, optimizer: str) -> None:
    unusable = horovod.unusable()
    with gloo.group(world):
        for sizes in node_layouts(world):
            with with_nodes(world, sizes) as other:
                exchanged = Exchanged.of("x", SHAPES, OPTIMIZERS[optimizer], other.rank)
                ways = {name: make(other, exchanged) for name, make in WAYS.items() if name not in unusable}
                sync.check(other, exchanged, ways)  # raises where one is not
                for name, way in ways.items():
                    assert not torch.equal(way.parameters[0], exchanged.weights[0]), f"{name} has made no step"
                    way.close()


def test_a_way_that_leaves_ranks_out_is_found_on_all_ranks(world: World) -> None:
    exchanged = Exchanged.of("x", SHAPES, OPTIMIZERS["sgd"], world.rank)
    with gloo.group(world):
        ways = {"right": GlooAllreduce(world, exchanged), "wrong": OnlyItsOwn(world, exchanged)}
        if world.size == 1:
            sync.check(world, exchanged, ways)
            return
        with pytest.raises(DisagreementError, match="the weights of wrong are") as caught:
            sync.check(world, exchanged, ways)
    assert faults.is_on_all_ranks(caught.value)


def test_a_way_that_trains_otherwise_is_found_by_its_losses(world: World) -> None:
    model = build_model("lenet5")
    with gloo.group(world):
        makers = {ALONE: Alone, "right": Ddp, "wrong": Forgets}
        loops = {
            name: step.Loop(
                world, make(world, build_model("lenet5"), OPTIMIZERS["sgd"]), Batches(model, 4, world.rank), 1
            )
            for name, make in makers.items()
        }
        with pytest.raises(DisagreementError, match="the first losses of wrong are .* those of right") as caught:
            step.check(world, loops)
    assert faults.is_on_all_ranks(caught.value)


def test_a_repetition_takes_as_long_as_on_the_slowest_rank(world: World) -> None:
    told: list[str] = []
    slow = Sleeper(0.03 if world.rank == world.size - 1 else 0.0, told, "slow")
    timings = time_in_turn(world, {"slow": slow, "quick": Sleeper(0.0, told, "quick")}, 2)
    assert timings["slow"].seconds >= 0.03 > timings["quick"].spread[0]
    assert told == ["slow", "quick", "quick", "slow", "slow", "quick"], "each repetition begins with another way"
    assert len(set(world.allgather_object(timings["slow"]))) == 1
    assert timings["slow"].divided(3).seconds == timings["slow"].seconds / 3


def test_the_wire_has_a_limit_between_nodes_only(world: World) -> None:
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            seconds = limits.wire_seconds(other, 1000, 8.0)  # 1e9 bytes a second
            expected = 8 * 1000 * (len(sizes) - 1) / len(sizes) / 1e9
            assert (seconds or 0.0) == pytest.approx(expected)
            measured = limits.wire_seconds(other, 1000, None)
            assert (measured is None) == (len(sizes) == 1)
            assert set(other.allgather_object(measured)) == {measured}


def test_the_copy_that_is_the_limit_moves_a_rank_s_part_of_the_bytes(world: World) -> None:
    with with_nodes(world, (world.size,) if len(set(world.hostnames)) == 1 else (1,) * world.size) as other:
        copy = limits.Copy(other, 8000.0 * other.local_size)
        assert copy._source.numel() == 1000
        copy.run()
        assert torch.equal(copy._target, torch.ones(1000))
        total = other.allreduce(np.array([2 * 4 * copy._source.numel()]))
        assert total[0] == 8000 * other.size


@pytest.mark.parametrize("group_size", [1, 2, 5])
def test_a_group_is_two_calls_whatever_its_size(world: World, group_size: int) -> None:
    trainer = ControlOnly(world, 8, None)
    way = Groups(trainer, group_size, 3, 0.0)
    for _ in range(2):
        way.prepare()
        way.run()
        assert way.calls_per_group == 2
        assert len(way._executor.control_s) == 3 + 2, "one group before those that are timed, one behind"
        seconds, waits = way.take()
        assert seconds > 0 == waits
    trainer.close()


def test_what_iterations_take_is_not_control(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def compute(seconds: float) -> None:
        now[0] += seconds

    trainer = ControlOnly(world, 8, None)
    way = Groups(trainer, 2, 3, 0.5)
    way.prepare()
    monkeypatch.setattr(control, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(control, "pause", compute)
    way.run()
    assert now[0] == (3 + 2) * 2 * 0.5
    assert way.take()[0] == 0
    trainer.close()


@pytest.mark.parametrize("partitions", [8, 13])
def test_every_task_is_sent_to_the_rank_that_has_it_and_answered_once(world: World, partitions: int) -> None:
    way = Central(world, partitions, 3, 0.004)
    for _ in range(2):
        way.prepare()
        way.run()
        seconds, waits = way.take()
        if world.rank > 0:
            assert (seconds, waits, way.answers) == (0, 0, [])
            continue
        assert [(a.iteration, a.partition) for a in sorted(way.answers)] == [
            (iteration, partition) for iteration in range(3 + 1) for partition in range(partitions)
        ]
        assert all(answer.samples == 1 for answer in way.answers)
        assert seconds >= waits >= 3 * 0.004, "three iterations are timed; a sleep may be longer, never shorter"
        assert (way.num_bytes > 0) == (world.size > 1)


def test_a_task_that_was_left_out_is_found(world: World) -> None:
    way = Central(world, 8, 2, 0.0)
    way.prepare()
    way.run()
    if world.rank == 0:
        del way.answers[5]
        with pytest.raises(DisagreementError, match="not answered exactly once"):
            way.check()


def test_plan_measures_both_at_every_size_and_the_same_on_all_ranks(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MESSAGE_BYTES": (64,), "RANKS_IN_PLAN": (10,), "_NUM_GROUPS": 3, "_NUM_TASKS": 32}.items():
        monkeypatch.setattr(plan, name, value)
    parsed = cli.parse(["bench", "plan", "--repeats", "1", "--group-sizes", "1,4", "--partitions", "8,16"])
    found = plan.measure(world, parsed)
    assert len(set(world.allgather_object(repr(found.rows)))) == 1
    groups = {(row["group_size"], row["partitions"]) for row in found.rows if row["way"] == "mpidl"}
    assert groups == {(1, 16), (4, 8), (4, 16)}
    assert [row["partitions"] for row in found.rows if row["way"] == "central"] == [8, 16]
    for row in found.rows:
        assert row["seconds"] > 0
        assert row["share"] == pytest.approx(row["seconds"] / 0.05)
        assert row["ranks_per_core"] >= 1


def test_fewer_partitions_than_ranks_are_refused_before_anything_is_measured(world: World) -> None:
    parsed = cli.parse(["bench", "plan", "--partitions", "1"])
    if world.size > 1:
        with pytest.raises(ConfigError, match="ranks but at most 1 partitions") as caught:
            plan.measure(world, parsed)
        assert faults.is_on_all_ranks(caught.value)
