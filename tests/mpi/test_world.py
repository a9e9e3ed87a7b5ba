"""Ranks, nodes and collectives: expected values in closed forms of rank and size, at any world size."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mpidl.runtime
from mpidl.errors import ConfigError, DataError, LaunchError, LayoutError, MpidlError, UserError
from mpidl.runtime import World, faults, waiting
from mpidl.runtime.startup import _emulated_node, _split_nodes
from tests.mpi.worlds import node_layouts, with_nodes

DTYPES = [np.uint8, np.int64, np.float32, np.float64]


@pytest.fixture(params=[False, True], ids=["spinning", "giving cores away"])
def either(request: pytest.FixtureRequest, world: World) -> World:
    """The world with each way of waiting."""
    return dataclasses.replace(world, shares_cores=request.param)


def outcome(action: Callable[[], Any]) -> tuple[type[BaseException], str] | None:
    """The type and text of what an action raises."""
    caught: MpidlError | None = None
    try:
        action()
    except MpidlError as error:
        caught = error
    assert caught is None or faults.is_on_all_ranks(caught)
    return None if caught is None else (type(caught), str(caught))


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_ranks_are_numbered_node_by_node(world: World) -> None:
    from mpi4py import MPI

    assert world.size == MPI.COMM_WORLD.size
    assert (world.rank == 0) == (MPI.COMM_WORLD.rank == 0)
    assert list(world.node_of) == sorted(world.node_of)
    assert set(world.node_of) == set(range(world.num_nodes))
    assert world.node_sizes == tuple(world.node_of.count(node) for node in range(world.num_nodes))
    assert sum(world.node_sizes) == world.size
    first = world.first_rank_of(world.node)
    assert world.rank == first + world.local_rank
    assert world.local_size == world.node_sizes[world.node]
    assert world.node_allgather_object(world.rank) == list(range(first, first + world.local_size))
    assert len(world.hostnames) == world.size
    assert world.allgather_object(world.hostname) == list(world.hostnames)
    assert len(set(world.allgather_object((world.node_of, world.threads_per_rank, world.library)))) == 1


def test_ranks_that_were_placed_round_robin_are_renumbered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpi4py import MPI

    monkeypatch.delenv("MPIDL_EMULATED_NODES", raising=False)
    everyone = MPI.COMM_WORLD
    nodes = min(2, everyone.size)
    machine = everyone.Split(everyone.rank % nodes, everyone.rank)
    comm, node_comm, node_of = _split_nodes(MPI, machine)
    expected = sorted(range(everyone.size), key=lambda rank: (rank % nodes, rank))
    assert comm.rank == expected.index(everyone.rank)
    assert node_of == tuple(rank % nodes for rank in expected)
    assert node_comm.rank == everyone.rank // nodes
    assert node_of[comm.rank] == everyone.rank % nodes
    for each in (comm, node_comm, machine):
        each.Free()


@pytest.mark.parametrize(
    ("setting", "nodes"),
    [
        ("", [0, 0, 0, 0]),
        ("1", [0, 0, 0, 0]),
        ("2", [0, 0, 1, 1]),
        ("3", [0, 0, 1, 2]),
        ("4", [0, 1, 2, 3]),
        ("3,1", [0, 0, 0, 1]),
        ("1,2,1", [0, 1, 1, 2]),
    ],
)
def test_a_machine_s_ranks_are_split_as_the_setting_says(setting: str, nodes: list[int]) -> None:
    assert [_emulated_node(setting, rank, 4) for rank in range(4)] == nodes


@pytest.mark.parametrize("setting", ["0", "5", "-2", "2,1", "3,2", "5,-1", "4,0", "two", "1,", "2.0"])
def test_a_setting_that_does_not_fit_is_refused_with_both_numbers(setting: str) -> None:
    with pytest.raises(LaunchError, match=f"{setting} does not fit 4 ranks"):
        _emulated_node(setting, 0, 4)


def test_init_gives_the_same_world_again(world: World) -> None:
    assert mpidl.runtime.startup._world is not None
    assert mpidl.runtime.init() is mpidl.runtime.init()
    assert mpidl.runtime.init(world.threads_per_rank).comm is world.comm


def test_what_is_asked_of_mpi_at_the_start_leaves_threads_their_calls(world: World) -> None:
    from mpi4py import MPI

    assert MPI.Query_thread() == MPI.THREAD_MULTIPLE
    assert world.takes_threads


def test_ranks_without_shared_memory_are_nodes_of_their_own(world: World) -> None:
    alone = world.without_shared_memory()
    assert alone.node_sizes == (1,) * world.size
    assert (alone.rank, alone.node, alone.local_rank, alone.local_size) == (world.rank, world.rank, 0, 1)
    assert alone.node_allgather_object(world.rank) == [world.rank]
    assert alone.allgather_object(world.rank) == list(range(world.size))
    received = np.zeros(2)
    send = np.repeat(np.arange(world.size, dtype=float), 2) + world.rank
    alone.start_column_reduce_scatter(send, received, [2] * world.size).wait()
    assert (received == world.size * world.rank + world.size * (world.size - 1) / 2).all()


# --- collectives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (5,), (2, 3)])
def test_allreduce_adds_and_compares_elementwise(either: World, dtype: Any, shape: tuple[int, ...]) -> None:
    size = either.size
    index = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    own = (index + either.rank).astype(dtype)
    kept = own.copy()
    expected = {"sum": size * index + size * (size - 1) // 2, "min": index, "max": index + size - 1}
    for operation, values in expected.items():
        result = either.allreduce(own, operation)
        assert result.dtype == own.dtype
        assert result.shape == shape
        assert np.array_equal(result, values.astype(dtype))
    assert np.array_equal(own, kept)


@pytest.mark.parametrize("view", [lambda a: a.T, lambda a: a[:, ::2], lambda a: a[::-1], np.asfortranarray])
def test_arrays_in_any_order_of_memory_arrive_in_the_order_of_their_elements(world: World, view: Any) -> None:
    own = view(np.arange(12.0).reshape(3, 4) * (world.rank + 1))
    one = view(np.arange(12.0).reshape(3, 4))
    total = world.size * (world.size + 1) / 2
    assert np.array_equal(world.allreduce(own), one * total)
    everyones = np.stack([one * (rank + 1) for rank in range(world.size)])
    assert np.array_equal(world.allgather(own), everyones)
    gathered = world.gather(own)
    assert (gathered is None) == (world.rank > 0)
    assert gathered is None or np.array_equal(gathered, everyones)


def test_an_unknown_operation_is_refused_before_anything_is_sent(world: World) -> None:
    with pytest.raises(ValueError, match="'mean' is not one of sum, min, max"):
        world.allreduce(np.zeros(1), "mean")


@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_overwrites_with_the_root_s_array_from_any_root(either: World, dtype: Any) -> None:
    for root in range(either.size):
        array = np.full((2, 3), either.rank + 1, dtype)
        either.broadcast(array, root)
        assert (array == root + 1).all()


def test_broadcasts_under_way_do_not_mix_with_each_other_or_other_collectives(either: World) -> None:
    arrays = [np.full(1000, either.rank + 10 * i) for i in range(4)]
    pending = [either.start_broadcast(array, root=i % either.size) for i, array in enumerate(arrays)]
    assert either.allreduce(np.ones(1))[0] == either.size
    for started in reversed(pending):
        started.wait()
        started.wait()  # complete is complete
    assert [array[0] for array in arrays] == [i % either.size + 10 * i for i in range(4)]
    assert all((array == array[0]).all() for array in arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 2)])
def test_every_rank_s_array_is_gathered_in_rank_order(either: World, dtype: Any, shape: tuple[int, ...]) -> None:
    own = np.full(shape, either.rank + 1, dtype)
    expected = np.stack([np.full(shape, rank + 1, dtype) for rank in range(either.size)])
    everywhere, on_root = either.allgather(own), either.gather(own)
    assert everywhere.shape == expected.shape
    assert np.array_equal(everywhere, expected)
    assert (on_root is None) == (either.rank > 0)
    assert on_root is None or (on_root.shape == expected.shape and np.array_equal(on_root, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_different_lengths_lie_one_behind_the_other(either: World, dtype: Any) -> None:
    counts = [(3 * rank) % 4 for rank in range(either.size)]  # 0, 3, 2, 1, 0, ...
    own = np.full(counts[either.rank], either.rank, dtype)
    assert np.array_equal(either.allgather_varying(own, counts), np.repeat(np.arange(either.size), counts))


def test_each_pair_of_ranks_exchanges_its_own_number_of_elements(either: World) -> None:
    size, rank = either.size, either.rank

    def count(sender: int, receiver: int) -> int:
        return (sender + 2 * receiver) % 4

    room = 5  # more than any message: gaps between them
    send = np.full(room * size, -1.0, np.float32)
    for receiver in range(size):
        send[room * receiver : room * receiver + count(rank, receiver)] = 100 * rank + receiver
    received = np.full(room * size, -2.0, np.float32)
    to = [count(rank, other) for other in range(size)]
    of = [count(other, rank) for other in range(size)]
    # Received in reversed order: offsets need not ascend.
    offsets = [room * (size - 1 - other) for other in range(size)]
    either.alltoall_varying(send, to, [room * other for other in range(size)], received, of, offsets)
    for other in range(size):
        block = received[offsets[other] : offsets[other] + room]
        assert (block[: of[other]] == 100 * other + rank).all()
        assert (block[of[other] :] == -2.0).all()


def test_a_column_adds_over_the_nodes_and_each_keeps_its_block(world: World) -> None:
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            in_column = other.local_rank < min(sizes)
            assert (other.column_comm is not None) == in_column
            counts = [2 * node + 1 for node in range(len(sizes))]
            if in_column:
                received = np.full(counts[other.node], np.nan, np.float32)
                blocks = [np.full(count, 100 * node + other.node + 1) for node, count in enumerate(counts)]
                other.start_column_reduce_scatter(np.concatenate(blocks).astype(np.float32), received, counts).wait()
                num_nodes = len(sizes)
                assert (received == num_nodes * 100 * other.node + num_nodes * (num_nodes + 1) / 2).all()
            other.node_barrier()


def test_nobody_leaves_a_barrier_before_everyone_has_come(either: World, shared_tmp_path: Any) -> None:
    if either.rank == either.size - 1:
        (shared_tmp_path / "late").touch()
    either.barrier()
    assert (shared_tmp_path / "late").exists()
    either.node_barrier()
    either.barrier()


def test_objects_travel_from_any_root_and_gather_in_rank_order(world: World) -> None:
    for root in range(world.size):
        assert world.broadcast_object({"from": world.rank}, root) == {"from": root}
    everyones = [("rank", rank, [None] * rank) for rank in range(world.size)]
    assert world.allgather_object(everyones[world.rank]) == everyones
    assert world.gather_object(everyones[world.rank]) == (everyones if world.rank == 0 else None)


class Slow:
    """A request that is complete after some tests."""

    def __init__(self, tests: int) -> None:
        self.tests_left, self.waited = tests, False

    def Test(self) -> bool:
        self.tests_left -= 1
        return self.tests_left < 0

    def Wait(self) -> bool:
        self.waited = True
        return True


@pytest.mark.parametrize("tests", [0, 1, waiting.TESTS_BEFORE_SLEEP, waiting.TESTS_BEFORE_SLEEP + 20])
def test_where_ranks_share_cores_a_wait_tests_until_the_request_is_complete(tests: int) -> None:
    request = Slow(tests)
    waiting.wait(request, shares_cores=True)
    assert (request.tests_left, request.waited) == (-1, False)
    waiting.wait(request, shares_cores=False)
    assert request.waited


# --- agreeing on errors -----------------------------------------------------------------------------------------------


def failing_sets(world: World) -> list[set[int]]:
    return [{0}, {world.size - 1}, {world.size // 2}, set(range(0, world.size, 2)), set(range(world.size))]


def check_agreed(world: World, fail: Callable[[], None], failing: set[int]) -> tuple[type[BaseException], str]:
    """Every rank gets the same error; returns it."""

    def action() -> None:
        with world.agreed("reading the data"):
            if world.rank in failing:
                fail()

    found = world.allgather_object(outcome(action))
    assert len(set(found)) == 1, found
    assert found[0] is not None
    kind, message = found[0]
    return kind, message


@pytest.mark.parametrize("kind", [UserError, ConfigError, DataError, LayoutError, LaunchError])
def test_an_error_of_any_ranks_is_raised_on_all_with_its_type_and_text(world: World, kind: type[UserError]) -> None:
    for failing in failing_sets(world):

        def fail() -> None:
            raise kind("no such file")

        found, message = check_agreed(world, fail, failing)
        assert found is kind
        if len(failing) == world.size:
            assert message == "no such file"
        else:
            lowest = min(failing)
            assert message == f"no such file (rank {lowest} on {world.hostnames[lowest]}, reading the data)"


def test_of_errors_that_differ_the_lowest_rank_s_is_raised_everywhere(world: World) -> None:
    kinds = [DataError, ConfigError, LayoutError]

    def fail() -> None:
        raise kinds[world.rank % 3](f"rank {world.rank} has {world.rank + 1} of them")

    for failing in failing_sets(world):
        lowest = min(failing)
        kind, message = check_agreed(world, fail, failing)
        assert kind is kinds[lowest % 3]
        assert message.startswith(f"rank {lowest} has {lowest + 1} of them")
        assert (f"(rank {lowest} on " in message) == (world.size > 1)


def test_without_an_error_the_block_is_just_run(world: World) -> None:
    with world.agreed("nothing much"):
        value = 3
    assert value == 3


def test_an_error_that_is_no_user_s_passes_through(world: World) -> None:
    with pytest.raises(ZeroDivisionError), world.agreed("dividing"):
        _ = 1 / 0
    world.barrier()


def test_blocks_in_blocks_agree_once(world: World) -> None:
    def action() -> None:
        with world.agreed("outside"), world.agreed("inside"):
            if world.rank == world.size - 1:
                raise DataError("cut short")

    found = world.allgather_object(outcome(action))
    assert len(set(found)) == 1
    assert found[0] is not None
    assert ("inside" in found[0][1]) == (world.size > 1)
    assert "outside" not in found[0][1]


@pytest.mark.parametrize("kind", [LaunchError, LayoutError])
def test_a_digest_that_differs_on_any_rank_is_an_error_on_all(world: World, kind: type[MpidlError]) -> None:
    world.check_equal("the model", "the same", kind)
    for other in range(1, world.size):
        own = "another" if world.rank == other else "the same"
        found = world.allgather_object(outcome(functools.partial(world.check_equal, "the model", own, kind)))
        assert len(set(found)) == 1
        assert found[0] is not None
        assert found[0][0] is kind
        assert f"the model of rank {other} ({world.hostnames[other]}) differs from rank 0's" in found[0][1]


def test_rank_0_that_differs_from_all_others_is_found(world: World) -> None:
    own = "mine" if world.rank == 0 else "theirs"
    found = world.allgather_object(outcome(lambda: world.check_equal("the code", own)))
    assert len(set(found)) == 1
    assert (found[0] is None) == (world.size == 1)
