"""Worlds of other node layouts over the ranks of this test run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mpidl.runtime.startup
from mpidl.runtime import World


def node_layouts(world: World) -> list[tuple[int, ...]]:
    """Sizes of nodes to try: one node, uneven ones both ways, one rank a node; on several hosts only the last."""
    size = world.size
    layouts = [(1,) * size]
    if len(set(world.hostnames)) == 1:
        layouts += [(size,)]
        layouts += [(size - 1, 1), (1, size - 1)] if size > 2 else []
        layouts += [(size // 2, size - size // 2)] if size > 3 else []
    return list(dict.fromkeys(layouts))


@contextmanager
def with_nodes(world: World, sizes: Sequence[int]) -> Iterator[World]:
    """The same ranks on nodes of these sizes, which share nothing with each other. Collective."""
    from mpi4py import MPI

    node_of = tuple(node for node, size in enumerate(sizes) for _ in range(size))
    assert len(node_of) == world.size
    node_comm = world.comm.Split(node_of[world.rank], world.rank)
    in_column = node_comm.rank < min(sizes)
    column = world.comm.Split(node_comm.rank if in_column else MPI.UNDEFINED, world.rank)
    column_comm = column if in_column else None
    yield dataclasses.replace(world, node_comm=node_comm, column_comm=column_comm, node_of=node_of)
    # Not where a test failed: the other ranks may not come here.
    for comm in (node_comm, column_comm):
        if comm is not None:
            comm.Free()


@contextmanager
def as_the_world(world: World, sizes: Sequence[int]) -> Iterator[World]:
    """Let `mpidl.init()` give the same ranks on nodes of these sizes inside the block. Collective."""
    before = mpidl.runtime.startup._world
    with with_nodes(world, sizes) as other:
        mpidl.runtime.startup._world = other
        try:
            yield other
        finally:
            mpidl.runtime.startup._world = before
