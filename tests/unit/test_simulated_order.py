"""That the simulated iteration does what `parameters/pipeline.py` does, in its order; no MPI."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

from mpidl.parameters import WIRES, Assignment, errands, pipeline
from mpidl.parameters.driver import Flag
from mpidl.parameters.exchange import Bucket
from mpidl.parameters.team import Team
from mpidl.simulation import Collective, FluidWire, Iteration, Overheads, Part, simulate, switch, timeline

NUM_BUCKETS = 6


class Node:
    """The first of two nodes, as much of it as a pipeline needs; what is exchanged is over at once."""

    def __init__(self) -> None:
        self.rank, self.node_of, self.takes_threads = 0, (0, 1), False
        self.activity = SimpleNamespace(
            waiting=contextlib.nullcontext, at_bucket=lambda index: None, spans=SimpleNamespace(is_on=False)
        )

    def duplicate(self) -> Node:
        return self

    def start_node_barrier(self) -> Flag:
        flag = Flag()
        flag.raise_flag()
        return flag


def exchanges(of: str, count: int, node: Node, exchanged: Callable[[str, Any], Iterator[Flag]]) -> Any:
    """A vector of so many buckets, or of one."""
    buckets = [Bucket(index, index, index + 1, (index, index + 1)) for index in range(count)]
    return SimpleNamespace(
        name=of, world=node, size=count, sum=SimpleNamespace(size=count, nbytes=0), buckets=lambda _: buckets,
        whole=lambda: buckets[0], divide_sum=lambda divisor: None,
        start_spread=lambda lane, bucket: exchanged("publish", of if of == "changes" else bucket.index),
    )  # fmt: skip


def order_of_pipeline() -> tuple[list[Any], list[Any]]:
    """What is reduced, and what is published, in an iteration."""
    node = Node()
    told: dict[str, list[Any]] = {"reduce": [], "publish": []}

    def exchanged(kind: str, what: Any) -> Iterator[Flag]:
        told[kind].append(what)
        yield node.start_node_barrier()

    def reduction(job: Any, bucket: Bucket, counters: object) -> Iterator[Flag]:
        return exchanged("reduce", "changes" if job.exchange.name == "changes" else bucket.index)

    gradients, changes = (exchanges(*each, node, exchanged) for each in (("gradients", NUM_BUCKETS), ("changes", 1)))
    counters = SimpleNamespace(read_node=lambda *_: None)
    squares = lambda lane: exchanged("publish", "squares")  # noqa: E731
    made = pipeline.Pipeline(
        gradients, changes, cast(Any, counters), cast(Any, reduction), WIRES["float32"], Team(), cast(Any, squares)
    )
    assignment = Assignment.even(2, 2)
    made.begin(assignment)
    for bucket in made.buckets:
        made.announce(bucket.index)
    made.collect(assignment)
    made.begin_publishing()
    made.publish_changes(assignment, 1.0)
    made.end_publishing()
    made.wait()
    return told["reduce"], told["publish"]


def order_of_simulation() -> tuple[list[Any], list[Any]]:
    """The same, of a simulated iteration: its exchanges are told apart by their bytes."""
    names: dict[float, tuple[str, Any]] = {}

    def part(number: int, what: Any) -> Part:
        names[number], names[number + 100] = ("reduce", what), ("publish", what)
        exchange, back = (Collective("alltoall", 2, each) for each in (number, number + 100))
        return Part(0.0, 0.0, 0.0, exchange, (back,))

    parts = tuple(part(1 + index, index) for index in range(NUM_BUCKETS))
    names[200] = "publish", "squares"
    iteration = Iteration(1.0, 1.0, parts, changes=part(50, "changes"), squares=Collective("allgather", 2, 200))
    told: dict[str, list[Any]] = {"reduce": [], "publish": []}

    class Wire(FluidWire):
        def start(self, collective: Collective) -> Callable[[], bool]:
            kind, what = names[collective.num_bytes]
            told[kind].append(what)
            return super().start(collective)

    simulate(iteration, Wire(switch(2, 1e9, 0.0), Overheads()))
    return told["reduce"], told["publish"]


def test_what_is_exchanged_is_simulated_in_the_pipeline_s_order() -> None:
    reduced, published = order_of_pipeline()
    assert sorted(map(str, reduced)) == sorted(map(str, [*range(NUM_BUCKETS), "changes"]))
    assert order_of_simulation() == (reduced, published)


def test_as_many_are_simulated_under_way_as_the_pipeline_has() -> None:
    assert timeline.MAX_UNDER_WAY == errands.MAX_UNDER_WAY
    assert timeline.CHANGES == pipeline.CHANGES
