"""What nodes keep in files for a restart: it comes back to the last bit, elsewhere too; what is damaged is left out."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mpidl
from mpidl import local_folder
from mpidl.checkpoint import Found, LocalFiles, Memory, find, find_in_files
from mpidl.local_folder import Announced
from mpidl.runtime import World, run_on_first
from tests.mpi.cases import ADAMW, NESTEROV, made, normalised
from tests.mpi.test_memory import check, step
from tests.mpi.worlds import node_layouts, with_nodes

Kept = tuple[dict[str, Any], dict[str, Any]]
"""Weights and optimizer state at a start."""


@pytest.fixture
def key(world: World, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a launch, whose folders lie in the test's own."""
    monkeypatch.setattr(local_folder, "DIRECTORY", shared_tmp_path)
    given: str = world.broadcast_object(secrets.token_hex(16))
    return given


def announced(key: str, node: int) -> Announced:
    """Each of a test's nodes has a folder of its own."""
    return Announced(f"mpidl-{os.getuid()}-{node:016x}", key)


def folder_of(node: int) -> Path:
    return local_folder.DIRECTORY / announced("", node).name


def train(world: World, key: str, keeps: int, optimizer: Any = ADAMW) -> dict[int, Kept]:
    """Keep so many starts, as a training that is killed two steps later; what there was at each of them."""
    manager = mpidl.ParameterManager(made(normalised), optimizer, world=world)
    files = LocalFiles(world, announced(key, world.node), manager)
    files.clear(only_of_others=True)
    memory, kept = Memory(manager, world, files=files), {}
    for iteration in range(keeps):
        memory.keep(iteration, {"iteration": iteration}, now=1000.0 * iteration)
        weights = {name: value.clone() for name, value in manager.model.state_dict().items()}
        kept[iteration] = weights, manager.state_dict()
        step(manager, iteration)
    step(manager, keeps)
    memory.freeze()
    manager.close()
    return kept


def look(world: World, key: str, newer_than: int = -1) -> tuple[Found | str, mpidl.ParameterManager]:
    """What a new start finds, with a model of other weights."""
    manager = mpidl.ParameterManager(made(normalised, seed=2), ADAMW, world=world)
    files = LocalFiles(world, announced(key, world.node), manager)
    files.clear(only_of_others=True)
    return find_in_files(files, newer_than, lambda state: "iteration" in state), manager


def check_found(world: World, key: str, iteration: int, kept: Kept) -> None:
    """Raise unless a new start finds this one, to the bit."""
    found, manager = look(world, key)
    assert isinstance(found, Found), found
    assert (found.iteration, found.state) == (iteration, {"iteration": iteration})
    found.restore(manager, world)
    check(manager, *kept)
    step(manager, iteration)
    manager.close()


def weights_at(content: bytearray, iteration: int) -> int:
    """Where the weights of a start begin in an image file: behind its header's page, and the slot's."""
    slot_bytes = (len(content) - 4096) // 2
    return 4096 + (iteration + 1) % 2 * slot_bytes + 4096


def on_one(world: World, act: Callable[[], object]) -> None:
    """Do something on rank 0 while nobody reads."""
    world.barrier()
    if world.rank == 0:
        act()
    world.barrier()


@pytest.mark.parametrize("keeps", [1, 2, 3, 6])
def test_a_new_start_finds_the_newest_also_on_fewer_ranks_and_without_a_whole_node(
    world: World, key: str, keeps: int
) -> None:
    for number, sizes in enumerate(node_layouts(world)):
        for num_left in sorted({world.size, world.size - 1, world.size - sizes[-1]} - {0}):
            with with_nodes(world, sizes) as nodes:
                own_key = f"{key[:-4]}{number:02x}{num_left:02x}"
                kept = train(nodes, own_key, keeps)[keeps - 1]
                lost = len(sizes) - 1
                if num_left == world.size - sizes[-1] and lost:
                    on_one(world, lambda: local_folder.remove(announced("", lost).name))  # noqa: B023
                run_on_first(nodes, num_left, lambda part: check_found(part, own_key, keeps - 1, kept))  # noqa: B023


def test_two_nodes_in_a_row_are_more_than_can_be_lost(world: World, key: str) -> None:
    if world.size < 3:
        pytest.skip("two nodes have to be lost, and one to be left")
    with with_nodes(world, (world.size - 2, 1, 1)) as nodes:
        train(nodes, key, 2)
        on_one(world, lambda: local_folder.remove(announced("", 1).name))
        on_one(world, lambda: local_folder.remove(announced("", 2).name))
        found, manager = look(nodes, key)
        assert found == "of what was kept on the nodes, up to iteration 1, no newer start is whole and fits"
        manager.close()


@pytest.mark.parametrize("what", ["image", "header", "common", "short"])
def test_what_is_damaged_is_left_out_and_the_start_before_is_taken(world: World, key: str, what: str) -> None:
    kept = train(world, key, 6)

    def damage() -> None:
        (image,) = folder_of(0).glob("*-00000.own")
        newest = [file for file in folder_of(0).glob("*.common") if b'"iteration": 5,' in file.read_bytes()]
        file = newest[0] if what == "common" else image
        content = bytearray(file.read_bytes())
        if what == "image":
            content[weights_at(content, 5)] ^= 1
        elif what == "header":
            content[60] ^= 1
        elif what == "common":
            content[len(content) // 2] ^= 1
        else:
            content = content[:-1]
        file.write_bytes(content)

    on_one(world, damage)
    if what in ("image", "common"):
        check_found(world, key, 4, kept[4])
        return
    found, manager = look(world, key)
    assert isinstance(found, str), "rank 0's only image is gone"
    manager.close()


def test_a_buddy_s_copy_stands_in_for_a_damaged_image(world: World, key: str) -> None:
    if world.size < 2:
        pytest.skip("a buddy is on another node")
    with with_nodes(world, (world.size - 1, 1)) as nodes:
        kept = train(nodes, key, 6)

        def damage() -> None:
            (image,) = folder_of(0).glob("*-00000.own")
            content = bytearray(image.read_bytes())
            for iteration in (4, 5):
                content[weights_at(content, iteration)] ^= 1
            image.write_bytes(content)

        on_one(world, damage)
        check_found(nodes, key, 5, kept[5])


def test_what_is_not_newer_or_another_launch_s_is_not_taken(world: World, key: str) -> None:
    train(world, key, 3)
    found, manager = look(world, key, newer_than=2)
    assert found == "what is kept on the nodes is not newer, of iteration 2"
    manager.close()
    found, manager = look(world, key[::-1] if key[::-1] != key else "0" * 32)
    assert found == "nothing is kept on the nodes"
    manager.close()
    assert not list(folder_of(0).iterdir()), "what is of an earlier launch is removed"


def test_what_is_of_another_optimizer_or_model_is_not_taken(world: World, key: str) -> None:
    train(world, key, 3, NESTEROV)
    found, manager = look(world, key)
    assert isinstance(found, str)
    manager.close()

    def frozen() -> torch.nn.Module:
        model = made(normalised)
        next(model.parameters()).requires_grad_(False)
        return model

    manager = mpidl.ParameterManager(frozen(), NESTEROV, world=world)
    files = LocalFiles(world, announced(key, 0), manager)
    assert isinstance(find_in_files(files, -1, lambda state: True), str)
    manager.close()


@pytest.mark.parametrize("loads", [True, False])
def test_frozen_parameters_that_a_checkpoint_has_brought_are_not_replaced_by_others(
    world: World, key: str, loads: bool
) -> None:
    """The files do not hold them: where the next start makes other ones, the checkpoint, which has them, is taken."""

    def started() -> tuple[mpidl.ParameterManager, LocalFiles, torch.Tensor]:
        model = made(normalised)
        frozen = next(model.parameters()).requires_grad_(False)
        manager = mpidl.ParameterManager(model, ADAMW, world=world)
        return manager, LocalFiles(world, announced(key, world.node), manager), frozen

    manager, files, frozen = started()
    if loads:
        frozen.fill_(7.0)
    memory = Memory(manager, world, files=files)
    memory.keep(3, {"iteration": 3}, now=0.0)
    manager.close()
    manager, files, _ = started()
    assert isinstance(find_in_files(files, -1, lambda state: True), str if loads else Found)
    manager.close()


def test_files_of_the_start_before_stay_until_all_have_new_ones_and_nothing_is_left_at_the_end(
    world: World, key: str
) -> None:
    train(world, key, 3)
    found, manager = look(world, key)
    assert isinstance(found, Found)
    found.restore(manager, world)
    before = {file.name for file in folder_of(0).iterdir()}
    files = LocalFiles(world, announced(key, world.node), manager)
    memory = Memory(manager, world, files=files)
    for iteration, is_there in ((10, True), (11, False)):
        memory.keep(iteration, {"iteration": iteration}, now=1000.0 * iteration)
        step(manager, iteration)
        world.barrier()
        assert before.issubset(file.name for file in folder_of(0).iterdir()) == is_there
        world.barrier()
    files.close()
    assert not folder_of(0).exists()
    manager.close()


@pytest.mark.parametrize("survives", [False, True])
def test_without_room_training_goes_on_without_files(
    world: World, key: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], survives: bool
) -> None:
    """Where ranks may be lost one by one, they keep it in memory instead."""

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    manager = mpidl.ParameterManager(made(normalised), ADAMW, world=world)
    files = LocalFiles(world, announced(key, world.node), manager)
    with monkeypatch.context() as patch:
        if world.rank == world.size - 1:
            patch.setattr("mpidl.checkpoint.local.create", full)
        memory = Memory(manager, world, files=files, survives=survives)
        for iteration in range(3):
            memory.keep(iteration, {"iteration": iteration}, now=1000.0 * iteration)
            step(manager, iteration)
    world.barrier()
    assert not list(folder_of(world.node).iterdir())
    told = capfd.readouterr().err
    said = "nothing is kept for a restart" if survives else "no room to keep"
    assert told.count("mpidl: ") == told.count(said) == (world.rank == 0)
    assert (find(memory, world) is not None) == survives
    world.barrier()
    files.close()
    manager.close()
