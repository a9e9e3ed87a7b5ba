"""What is kept in memory when a group begins, and what is there now: both come back to the last bit, on fewer ranks."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import mpidl
from mpidl.checkpoint import Memory, find
from mpidl.parameters import OptimizerFactory
from mpidl.runtime import World, run_on_first
from tests.mpi.cases import ADAMW, NESTEROV, NUM_FEATURES, made, normalised
from tests.mpi.worlds import node_layouts, with_nodes


def step(manager: mpidl.ParameterManager, iteration: int) -> None:
    """One iteration on this rank's own samples."""
    generator = torch.Generator().manual_seed(100 * iteration + manager.world.rank)
    inputs = torch.randn(6, NUM_FEATURES, generator=generator)
    manager.model(inputs).square().mean().backward()
    manager.step()


def trained(
    world: World, optimizer: OptimizerFactory, keeps: int
) -> tuple[Memory, dict[str, Any], list[dict[str, Any]]]:
    """A memory of so many starts, and weights and optimizer state as they were at the last of them; two steps ago."""
    manager = mpidl.ParameterManager(made(normalised), optimizer, world=world)
    memory = Memory(manager, world)
    for iteration in range(keeps):
        memory.keep(iteration, {"iteration": iteration}, now=1000.0 * iteration)
        if iteration == keeps - 1:
            weights = {name: value.clone() for name, value in manager.model.state_dict().items()}
            state = manager.state_dict()
        step(manager, iteration)
    step(manager, keeps)
    memory.freeze()
    manager.close()
    return memory, weights, [state]


@pytest.mark.parametrize("optimizer", [ADAMW, NESTEROV], ids=["adamw", "nesterov"])
@pytest.mark.parametrize("keeps", [1, 2, 5])
def test_what_was_kept_comes_back_on_other_nodes_too(world: World, optimizer: OptimizerFactory, keeps: int) -> None:
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as nodes:
            memory, weights, (state,) = trained(nodes, optimizer, keeps)
            found = find(memory, nodes)
            assert found is not None
            assert (found.iteration, found.state) == (keeps - 1, {"iteration": keeps - 1})
            manager = mpidl.ParameterManager(made(normalised, seed=2), optimizer, world=nodes)
            found.restore(manager, nodes)
            check(manager, weights, state)
            manager.close()


@pytest.mark.parametrize("keeps", [1, 2, 5])
def test_fewer_ranks_restore_the_bits_of_all_also_without_a_whole_node(world: World, keeps: int) -> None:
    for sizes in node_layouts(world):
        for num_left in sorted({world.size - 1, world.size - sizes[-1]} - {0}):
            with with_nodes(world, sizes) as nodes:
                memory, weights, (state,) = trained(nodes, ADAMW, keeps)

                def restore(part: World) -> None:
                    found = find(memory, part)  # noqa: B023
                    assert found is not None
                    assert found.iteration == keeps - 1
                    manager = mpidl.ParameterManager(made(normalised, seed=2), ADAMW, world=part)
                    found.restore(manager, part)
                    check(manager, weights, state)  # noqa: B023
                    step(manager, keeps)
                    manager.close()

                run_on_first(nodes, num_left, restore)


def test_two_nodes_in_a_row_are_more_than_can_be_lost(world: World) -> None:
    if world.size < 3:
        pytest.skip("two nodes have to be lost, and one to be left")
    with with_nodes(world, (world.size - 2, 1, 1)) as nodes:
        memory, _, _ = trained(nodes, ADAMW, 2)

        def look(part: World) -> None:
            assert find(memory, part) is None

        run_on_first(nodes, nodes.size - 2, look)


def test_starts_that_come_too_soon_are_left_out_on_all_ranks_alike(world: World) -> None:
    manager = mpidl.ParameterManager(made(normalised), ADAMW, world=world)
    memory = Memory(manager, world)
    for iteration in range(8):
        memory.keep(iteration, iteration, now=0.0)
        step(manager, iteration)
    found = find(memory, world)
    assert found is not None
    assert found.iteration == 3  # the start that was timed
    memory.keep(8, 8, now=1000.0)
    found = find(memory, world)
    assert found is not None
    assert found.iteration == 8
    manager.close()


# --- the state as it is now -------------------------------------------------------------------------------------------

PLAIN = functools.partial(torch.optim.SGD, lr=0.1)  # has no state
KEPT, DONE = 3, 6  # iterations at the last start that was kept, and when a rank was lost


class Anew(torch.optim.SGD):
    """Makes its state anew in each step, as an optimizer may."""

    def step(self, closure: Any = None) -> Any:
        """As SGD's."""
        result = super().step(closure)
        for state in self.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].clone()
        return result


def left_by(
    world: World, optimizer: OptimizerFactory, *, torn: bool = False, behind: bool = False, **settings: Any
) -> tuple[Memory, dict[str, Any], dict[str, Any]]:
    """What is left in memory where the last rank is lost some iterations behind a start; weights and state of then.

    Args:
        world: all ranks.
        optimizer: of the manager.
        torn: the last rank is lost while it updates.
        behind: rank 0 has not done all that was due.
        settings: of the manager.
    """
    manager = mpidl.ParameterManager(made(normalised), optimizer, world=world, **settings)
    memory = Memory(manager, world)
    for iteration in range(DONE):
        if iteration <= KEPT:
            memory.keep(iteration, {"iteration": iteration}, now=1000.0 * iteration)
        step(manager, iteration)
    weights = {name: value.clone() for name, value in manager.model.state_dict().items()}
    state = manager.state_dict()
    manager.model(torch.ones(6, NUM_FEATURES)).mean().backward()  # the next iteration, which does not come to an end
    if torn and world.rank == world.size - 1:
        manager.shard_optimizer.updating().__enter__()
    world.barrier()
    if not (behind and world.rank == 0):
        memory.freeze(DONE, {"iteration": DONE})
    else:
        memory.freeze()
    manager.zero_grad()
    manager.close()
    return memory, weights, state


@pytest.mark.parametrize("optimizer", [ADAMW, NESTEROV, PLAIN], ids=["adamw", "nesterov", "plain"])
def test_a_lost_rank_leaves_the_last_iteration_to_its_node(world: World, optimizer: OptimizerFactory) -> None:
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as nodes:
            memory, weights, state = left_by(nodes, optimizer)

            def restore(part: World) -> None:
                found = find(memory, part)  # noqa: B023
                assert found is not None
                is_there = part.size == world.size or sizes[-1] > 1  # noqa: B023
                assert found.iteration == found.state["iteration"] == (DONE if is_there else KEPT)
                manager = mpidl.ParameterManager(made(normalised, seed=2), optimizer, world=part)
                found.restore(manager, part)
                if is_there:
                    check(manager, weights, state)  # noqa: B023
                step(manager, DONE)
                manager.close()

            run_on_first(nodes, max(world.size - 1, 1), restore)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (ADAMW, {"torn": True}),
        (ADAMW, {"behind": True}),
        (functools.partial(Anew, lr=0.1, momentum=0.9), {}),
    ],
    ids=["a shard is torn", "a rank is behind", "the state is not where it was"],
)
def test_what_is_not_whole_is_not_taken(world: World, optimizer: OptimizerFactory, options: dict[str, Any]) -> None:
    memory, _, _ = left_by(world, optimizer, **options)
    found = find(memory, world)
    assert found is not None
    assert found.iteration == found.state["iteration"] == KEPT


def test_what_was_kept_is_not_mixed_with_what_came_after(world: World) -> None:
    """A rank that has updated, but does not know yet that all have, is at the start still, with buffers of later."""
    manager = mpidl.ParameterManager(made(normalised), ADAMW, world=world)
    memory = Memory(manager, world)
    for iteration in range(KEPT + 1):
        memory.keep(iteration, {"iteration": iteration}, now=1000.0 * iteration)
        weights = {name: value.clone() for name, value in manager.model.state_dict().items()}
        state = manager.state_dict()
        step(manager, iteration)
    memory.freeze(KEPT, {"iteration": KEPT})
    manager.close()
    found = find(memory, world)
    assert found is not None
    assert found.iteration == KEPT
    manager = mpidl.ParameterManager(made(normalised, seed=2), ADAMW, world=world)
    found.restore(manager, world)
    check(manager, weights, state)
    manager.close()


def test_weights_that_nobody_else_can_read_are_not_taken(world: World) -> None:
    if world.size == 1:
        pytest.skip("one rank is one node")
    with with_nodes(world, (world.size - 1, 1)) as nodes:
        memory, _, _ = left_by(nodes, ADAMW, wire="bfloat16")
        found = find(memory, nodes)
        assert found is not None
        assert found.iteration == KEPT


def check(manager: mpidl.ParameterManager, weights: dict[str, Any], state: dict[str, Any]) -> None:
    """Raise unless weights, buffers and the optimizer's state are these."""
    for name, value in manager.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    own = manager.state_dict()
    if manager.world.rank > 0:
        return
    assert own["state"].keys() == state["state"].keys()
    for number, values in state["state"].items():
        for key, value in values.items():
            np.testing.assert_array_equal(own["state"][number][key], value, err_msg=key)
