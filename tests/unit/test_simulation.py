"""What a simulated wire and a simulated iteration take, against what can be reckoned on paper; no MPI."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math

import pytest

from mpidl.errors import ConfigError
from mpidl.simulation import (
    Collective,
    FluidWire,
    Iteration,
    Overheads,
    Part,
    Platform,
    Round,
    alone_s,
    dragonfly,
    fat_tree,
    simulate,
    switch,
)

RATE, LATENCY = 1e9, 1e-6
NOTHING = Overheads(message_s=0.0, round_s=0.0)


def seconds(platform: Platform, collective: Collective, overheads: Overheads = NOTHING) -> float:
    return sum(alone_s(platform, overheads, collective))


def test_an_all_to_all_of_two_nodes_is_one_message_each_way() -> None:
    assert seconds(switch(2, RATE, LATENCY), Collective("alltoall", 2, 1e6)) == pytest.approx(2 * LATENCY + 1e6 / RATE)


def test_a_ring_allgather_takes_a_round_for_each_other_node() -> None:
    found = seconds(switch(6, RATE, LATENCY), Collective("allgather", 6, 1e6))
    assert found == pytest.approx(5 * (2 * LATENCY + 1e6 / RATE))


def test_recursive_doubling_gathers_little_in_as_many_rounds_as_bits() -> None:
    found = seconds(switch(16, RATE, LATENCY), Collective("allgather", 16, 100))
    assert found == pytest.approx(4 * 2 * LATENCY + 15 * 100 / RATE)


@pytest.mark.parametrize(("num_bytes", "rounds"), [(1e3, 4), (1e6, 15)])
def test_a_reduce_scatter_is_recursive_below_512_kib_and_pairwise_above(num_bytes: float, rounds: int) -> None:
    collective = Collective("reduce_scatter", 16, num_bytes)
    assert len(list(collective.rounds())) == rounds
    overheads = Overheads(message_s=0.0, round_s=3e-4, add_s_per_byte=1e-9)
    expected = rounds * (2 * LATENCY + 3e-4) + 15 * num_bytes * (1 / RATE + 1e-9)
    assert seconds(switch(16, RATE, LATENCY), collective, overheads) == pytest.approx(expected)


@pytest.mark.parametrize(("nodes", "peers"), [*itertools.product([2, 3, 8, 33, 100], [0, 1, 7, 32])])
def test_an_all_to_all_sends_from_every_node_to_every_other_once(nodes: int, peers: int) -> None:
    sent = collections.Counter(
        (node, each.target(node, distance, nodes))
        for each in Collective("alltoall", nodes, 1.0, peers).rounds()
        for distance in each.distances
        for node in range(nodes)
    )
    assert sent == dict.fromkeys(itertools.permutations(range(nodes), 2), 1)


@pytest.mark.parametrize("nodes", [2, 3, 5, 8, 13])
@pytest.mark.parametrize("num_bytes", [10.0, 1e6])
def test_a_gather_brings_every_node_the_parts_of_all_others(nodes: int, num_bytes: float) -> None:
    gathered = sum(each.num_bytes * len(each.distances) for each in Collective("allgather", nodes, num_bytes).rounds())
    assert gathered == pytest.approx((nodes - 1) * num_bytes)


def test_one_node_sends_nothing() -> None:
    assert seconds(switch(1, RATE, LATENCY), Collective("alltoall", 1, 1e6)) == 0


def test_a_tapered_leaf_limits_what_leaves_it_and_a_full_one_does_not() -> None:
    collective = Collective("alltoall", 64, 1e6, peers=0)
    full, half = (seconds(fat_tree(64, RATE, 0.0, taper), collective) for taper in (1, 2))
    assert full == pytest.approx(63 * 1e6 / RATE)
    assert half == pytest.approx(8 * 56 / 4 * 1e6 / RATE)  # 8 nodes of a leaf to 56 others by 4 links


def test_a_taper_that_does_not_divide_a_leaf_is_refused() -> None:
    with pytest.raises(ConfigError, match="--taper 3 does not divide the 8 nodes of a leaf"):
        fat_tree(64, RATE, LATENCY, 3)


@pytest.mark.parametrize("nodes", [16, 50, 64, 300, 1024, 4096])
def test_networks_have_room_for_all_nodes(nodes: int) -> None:
    for platform in (fat_tree(nodes, RATE, LATENCY), dragonfly(nodes, RATE, LATENCY)):
        assert nodes <= platform.capacity < 4 * nodes


def test_neighbouring_groups_of_a_dragonfly_share_one_link_unless_routes_adapt() -> None:
    """In the first 31 distances of 64 nodes in groups of 16, all 16 nodes send to all 16 of the group before."""
    sent = Round(tuple(range(1, 32)), 1e6)
    shortest, adaptive = (dragonfly(64, RATE, LATENCY, 2, is_adaptive=each) for each in (False, True))
    lanes = shortest.shape[2]
    assert shortest.seconds(sent) == pytest.approx(16 * 16 / lanes * 1e6 / RATE)
    assert 31 * 1e6 / RATE <= adaptive.seconds(sent) < shortest.seconds(sent)


def test_exchanges_under_way_share_the_wire() -> None:
    wire = FluidWire(switch(2, RATE, 0.0), NOTHING)
    both = [wire.start(Collective("alltoall", 2, 1e9)) for _ in range(2)]
    wire.advance(0.5)
    late = wire.start(Collective("alltoall", 2, 1e9))
    wire.advance(math.inf)
    assert wire.now == pytest.approx(2.75)  # 0.5 of two, then three share until the first two have 1
    assert [is_over() for is_over in (*both, late)] == [True, True, False]
    wire.advance(math.inf)
    assert wire.now == pytest.approx(3.0)
    assert late()


def test_a_measured_factor_makes_exchanges_of_its_kind_longer() -> None:
    wire = FluidWire(switch(2, RATE, 0.0), NOTHING, {"alltoall": 1.5})
    wire.start(Collective("alltoall", 2, 1e9))
    wire.advance(math.inf)
    assert wire.now == pytest.approx(1.5)


def parts(number: int, num_bytes: float, *, work_s: float = 0.0, nodes: int = 2) -> tuple[Part, ...]:
    """Buckets that become ready, and are needed, at even distances in a second each of forward and backward."""
    exchange = Collective("alltoall", nodes, num_bytes)
    return tuple(
        Part(work_s, work_s, work_s, exchange, (exchange,), ready_s=1 - index / number, needed_s=index / number)
        for index in range(number)
    )


def test_without_exchange_an_iteration_is_compute_and_update() -> None:
    found = simulate(Iteration(1.0, 1.0, parts(4, 0.0, nodes=1)), FluidWire(switch(1, RATE, 0.0), NOTHING))
    assert found.seconds == pytest.approx(2.0)
    with_work = Iteration(1.0, 1.0, parts(4, 0.0, work_s=0.01, nodes=1))
    found = simulate(with_work, FluidWire(switch(1, RATE, 0.0), NOTHING))
    assert found.update_s == pytest.approx(4 * 0.01)
    assert found.collect_s == pytest.approx(2 * 0.01)  # the bucket that is announced last is packed and added


def test_a_slow_wire_is_all_that_counts() -> None:
    """Weights of 40 s, then gradients of 40 s; a second each of forward and backward may come on top."""
    iteration = Iteration(1.0, 1.0, parts(4, 1e10))
    found = simulate(iteration, FluidWire(switch(2, RATE, 0.0), NOTHING))
    assert 80.0 <= found.seconds <= 82.0


def test_a_fast_wire_hides_but_the_last_gradients_and_the_first_weights() -> None:
    iteration = Iteration(1.0, 1.0, parts(4, 1e8))  # 0.1 s a bucket, each way
    found = simulate(iteration, FluidWire(switch(2, RATE, 0.0), NOTHING))
    assert found.collect_s == pytest.approx(0.1)
    # The first bucket's weights share the wire with those of the others, of which four may be under way.
    assert 2.1 + 0.1 <= found.seconds <= 2.1 + 0.4 + 1e-9


def test_changes_of_buffers_are_exposed_between_backward_and_update() -> None:
    few = Collective("alltoall", 2, 1e7)  # 10 ms, there and back; the last bucket's 0.1 s are on the wire with them
    iteration = Iteration(1.0, 1.0, parts(4, 1e8), changes=Part(0.0, 0.0, 0.02, few, (few,)))
    found = simulate(iteration, FluidWire(switch(2, RATE, 0.0), NOTHING))
    assert found.collect_s == pytest.approx(0.1 + 0.01)
    assert found.update_s == pytest.approx(0.02 + 0.01)


def test_counters_that_do_not_ride_with_gradients_are_waited_for_behind_them() -> None:
    counters = Collective("allgather", 2, 1e7)
    iteration = Iteration(1.0, 1.0, parts(4, 1e8), counters=counters, poll_s=0.001)
    found = simulate(iteration, FluidWire(switch(2, RATE, 0.0), NOTHING))
    assert found.collect_s == pytest.approx(0.1 + 0.001 + 0.01 + 0.001)


def test_an_all_to_all_of_few_owners_takes_what_comes_to_one_of_them() -> None:
    platform = switch(16, RATE, 0.0)
    evenly, of_few = (Collective("alltoall", 16, 1e3, busiest_bytes=each) for each in (0.0, 4e3))
    assert seconds(platform, evenly) == pytest.approx(15 * 1e3 / RATE)
    assert seconds(platform, of_few) == pytest.approx(15 * 4e3 / RATE)


def test_polls_are_waited_for() -> None:
    iteration = Iteration(1.0, 1.0, parts(1, 1e6))
    wires = [FluidWire(switch(2, RATE, 0.0), NOTHING) for _ in range(2)]
    without, with_polls = (
        simulate(dataclasses.replace(iteration, poll_s=each), wire).seconds
        for each, wire in zip((0.0, 0.01), wires, strict=True)
    )
    assert with_polls - without == pytest.approx(2 * 0.01)  # of the gradients, of the weights


def test_an_iteration_that_waits_for_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="waits for nothing"):
        FluidWire(switch(2, RATE, 0.0), NOTHING).advance(math.inf)
