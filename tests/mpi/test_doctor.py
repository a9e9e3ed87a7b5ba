"""What `mpidl doctor` measures and tries, at any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

import mpidl
from mpidl.doctor import speed
from mpidl.doctor.facts import Link
from mpidl.errors import LaunchError
from mpidl.runtime import World, abilities, check_shared
from mpidl.runtime.shared_folder import Mark


def links(world: World) -> list[tuple[tuple[int, int], bool]]:
    found: list[Link] = [link for own in world.allgather_object(speed.measure(world)) for link in own]
    assert all(link.latency_s > 0 and link.bytes_per_s > 0 and link.copy_bytes_per_s > 0 for link in found)
    return [(link.ranks, link.is_inside) for link in found]


def test_every_node_is_measured_inside_and_with_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SMALL_S", 0.01)
    monkeypatch.setattr(speed, "_LARGE_S", 0.02)
    monkeypatch.setattr(speed, "_COPY_S", 0.01)
    world = mpidl.init()
    assert links(world) == [((0, 1), True)][: world.size - 1]
    apart = world.without_shared_memory()
    assert links(apart) == [((rank, rank + 1), False) for rank in range(world.size - 1)]


def test_a_folder_that_one_rank_does_not_see_is_an_error_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = mpidl.init()
    folder = world.broadcast_object(tmp_path)
    check_shared(world, folder)
    assert world.rank != 0 or list(folder.iterdir()) == []
    if world.rank == world.size - 1:
        monkeypatch.setattr(Mark, "seen_after", lambda self: None)
    with pytest.raises(LaunchError, match="did not see, within 10 s, a file that rank 0 wrote to .*: it is not shared"):
        check_shared(world, folder)
    with pytest.raises(LaunchError, match="cannot be written to: No such file"):
        check_shared(world, folder / "nothing")


def test_mpi_says_whether_it_survives_lost_ranks() -> None:
    is_open_mpi = "Open MPI" in mpidl.init().library
    assert abilities.survives_lost_ranks() is (False if is_open_mpi else None)  # started without --with-ft ulfm
    assert abilities.thread_level() in ("single", "funneled", "serialized", "multiple")
