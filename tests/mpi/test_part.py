"""Some ranks working as a world of their own, at any world size and node layout."""

from __future__ import annotations

import numpy as np
import pytest

from mpidl.errors import ConfigError
from mpidl.runtime import World, faults, on_all_ranks, run_on_first
from tests.mpi.worlds import node_layouts, with_nodes


def test_the_first_ranks_are_a_world_of_their_own_and_the_others_wait(world: World) -> None:
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as whole:
            for number in range(1, whole.size + 1):

                def work(part: World, number: int = number, whole: World = whole) -> float:
                    assert part.size == number
                    assert part.node_of == whole.node_of[:number]
                    assert (part.rank, part.node, part.local_rank) == (whole.rank, whole.node, whole.local_rank)
                    assert part.local_size == part.node_sizes[part.node]
                    in_column = part.local_rank < min(part.node_sizes)
                    assert (part.column_comm is not None) == in_column
                    assert part.column_comm is None or part.column_comm.size == part.num_nodes
                    return float(part.allreduce(np.array([part.rank + 1.0]))[0])

                total = run_on_first(whole, number, work)
                assert total == (number * (number + 1) / 2 if whole.rank < number else None)


def test_an_error_of_all_who_work_becomes_one_of_all_ranks(world: World) -> None:
    def fail(part: World) -> None:
        with part.agreed("working"):
            raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="no such thing") as caught:
        run_on_first(world, 1, fail)
    assert faults.is_on_all_ranks(caught.value)
    world.barrier()  # all are here, and nothing is left under way


def test_what_only_one_rank_meets_stays_with_it(world: World) -> None:
    """So that it ends the job: the others of the part may wait for this rank."""
    if world.size > 1:
        pytest.skip("the others would be left waiting, as they should")
    with pytest.raises(ConfigError, match="mine") as caught:
        run_on_first(world, 1, lambda part: (_ for _ in ()).throw(ConfigError("mine")))
    assert not faults.is_on_all_ranks(caught.value)


def test_parts_follow_each_other(world: World) -> None:
    def twice(part: World) -> None:
        raise on_all_ranks(ConfigError("again"))

    for _ in range(2):
        with pytest.raises(ConfigError, match="again"):
            run_on_first(world, world.size, twice)
    assert run_on_first(world, world.size, lambda part: part.size) == world.size
