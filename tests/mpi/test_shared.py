"""Memory that the ranks of a node share: seen by neighbours, gone afterwards, an error on all ranks without room."""

from __future__ import annotations

import errno
import os
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from mpidl.runtime import SharedMemoryError, World, faults, share, shared
from tests.mpi.worlds import node_layouts, with_nodes


def left_behind(world: World) -> list[str]:
    """Names in the directory for shared memory that only mpidl could have made. Collective."""
    world.barrier()
    names = [path.name for path in shared.DIRECTORY.iterdir() if not path.name.startswith("mpich_shm")]
    world.barrier()  # nobody makes new ones meanwhile
    kept_for_restarts = re.compile(r"mpidl-\d+-[0-9a-f]{16}")  # of other jobs
    return [name for name in names if "mpidl" in name and not kept_for_restarts.fullmatch(name)]


def mapped() -> int:
    """How many segments this process has mapped, its neighbours' included: files without a name."""
    maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
    return sum(f"{shared.DIRECTORY}/#" in line for line in maps)


def expect_failure(world: World, num_bytes: int) -> str:
    """Share where some rank cannot; returns the text that all ranks got."""
    with pytest.raises(SharedMemoryError) as caught:
        share(world, num_bytes)
    assert faults.is_on_all_ranks(caught.value)
    text = str(caught.value)
    assert set(world.allgather_object(text)) == {text}
    return text


def test_neighbours_see_what_a_rank_writes_and_other_nodes_do_not(world: World) -> None:
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            segments = share(other, 8 * 100)
            assert len(segments) == other.local_size
            own = segments[other.local_rank].view(np.int64)
            assert (own == 0).all()
            other.barrier()
            own[:] = 1000 * other.rank + np.arange(100)
            other.node_barrier()
            first = other.first_rank_of(other.node)
            for local_rank, segment in enumerate(segments):
                assert (segment.view(np.int64) == 1000 * (first + local_rank) + np.arange(100)).all()
            other.node_barrier()
            # Written by a neighbour, read by the owner.
            neighbour = (other.local_rank + 1) % other.local_size
            segments[neighbour][:] = 7 + other.local_rank
            other.node_barrier()
            assert (segments[other.local_rank] == 7 + (other.local_rank - 1) % other.local_size).all()
            other.barrier()


def test_sizes_may_differ_and_be_zero(world: World) -> None:
    def size_of(rank: int) -> int:
        return [0, 1, 4096, 5000, 100_000][rank % 5]

    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            segments = share(other, size_of(other.rank))
            first = other.first_rank_of(other.node)
            assert [segment.size for segment in segments] == [size_of(first + i) for i in range(other.local_size)]
            segments[other.local_rank][:] = other.rank + 1
            other.node_barrier()
            for i, segment in enumerate(segments):
                assert (segment == first + i + 1).all()
                assert segment.size == 0 or segment.ctypes.data % 4096 == 0
            other.node_barrier()
    assert all(segment.size == 0 for segment in share(world, 0))


def test_segments_made_later_are_apart_from_those_made_before(world: World) -> None:
    first, second = share(world, 64), share(world, 64)
    first[world.local_rank][:] = 1
    world.node_barrier()
    assert all((segment == 0).all() for segment in second)
    assert all((segment == 1).all() for segment in first)


def test_nothing_is_left_in_the_directory_even_while_the_memory_is_used(world: World) -> None:
    segments = share(world, 10_000)
    world.barrier()
    assert left_behind(world) == []
    segments[world.local_rank][:] = 3
    world.node_barrier()
    assert all((segment == 3).all() for segment in segments)


def test_memory_is_given_back_when_its_arrays_are_gone(world: World) -> None:
    before = mapped()
    segments = share(world, 10_000)
    view = segments[0].view(np.int32)[5:]
    assert mapped() - before == (world.local_size if world.local_size > 1 else 0)
    del segments
    view[0] = 1  # a view keeps its own segment
    assert mapped() - before == (1 if world.local_size > 1 else 0)
    del view
    assert mapped() == before


REASONS = {
    "missing directory": "No such file",
    "a file for a directory": "Not a directory",
    "full": "No space left",
}


def spoil(monkeypatch: pytest.MonkeyPatch, way: str, folder: Any) -> None:
    """Let this rank's next segment fail."""
    if way == "missing directory":
        monkeypatch.setattr(shared, "DIRECTORY", folder / "missing")
    elif way == "a file for a directory":
        (folder / "file").touch()
        monkeypatch.setattr(shared, "DIRECTORY", folder / "file")
    else:
        monkeypatch.setattr(os, "posix_fallocate", no_room)


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("way", REASONS)
@pytest.mark.parametrize("who", ["all", "first", "last"])
def test_a_failure_on_any_rank_is_an_error_on_all_of_all_nodes(
    world: World, shared_tmp_path: pathlib.Path, way: str, who: str
) -> None:
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other, pytest.MonkeyPatch.context() as monkeypatch:
            failing = {"all": set(range(world.size)), "first": {0}, "last": {world.size - 1}}[who]
            if other.rank in failing:
                spoil(monkeypatch, way, shared_tmp_path)
            if all(sizes[other.node_of[rank]] == 1 for rank in failing):
                # A rank that is alone on its node needs nothing from there.
                share(other, 3 << 20)[other.local_rank][:] = 1
            else:
                text = expect_failure(other, 3 << 20)
                assert "3 MiB in " in text
                assert REASONS[way] in text
                assert any(other.hostnames[rank] in text for rank in failing)
            monkeypatch.undo()
            assert left_behind(other) == []
            assert all((segment == 0).all() for segment in share(other, 100))


def test_more_than_there_is_is_an_error_and_no_bus_error_later(world: World) -> None:
    room = os.statvfs(shared.DIRECTORY)
    total_bytes = room.f_blocks * room.f_frsize
    if world.allreduce(np.array([total_bytes]), "min")[0] == 0:
        pytest.skip(f"{shared.DIRECTORY} has no limit")
    last = world.size - 1
    if world.node_sizes[-1] == 1:
        pytest.skip("the last rank is alone on its node")
    text = expect_failure(world, 2 * total_bytes if world.rank == last else 100)
    assert f"{2 * total_bytes / 2**20:.0f} MiB" in text or len(set(world.hostnames)) > 1
    assert "No space left" in text
    assert left_behind(world) == []
