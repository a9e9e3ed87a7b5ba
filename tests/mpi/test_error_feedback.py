"""Error feedback: what rounding takes from gradients comes with the next ones, on any layout of nodes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpidl
from mpidl import checkpoint
from mpidl.errors import LayoutError, NonFiniteLossError
from mpidl.runtime import World
from tests.mpi.cases import NUM_FEATURES, SGD, dense, made
from tests.mpi.worlds import node_layouts, with_nodes

pytestmark = pytest.mark.thorough

SIZE = 40_000
ITERATIONS = 64
SMALL = 2.0**-12
GRADIENT = 1.5 + SMALL
"""A bfloat16's digit there is 32 times SMALL: without feedback SMALL is always lost, with it nothing after 32 steps."""

DESCENT = functools.partial(torch.optim.SGD, lr=1.0)


def vector() -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.zeros(SIZE))])


def give(manager: mpidl.ParameterManager, gradient: float | torch.Tensor) -> None:
    for parameter in manager.model.parameters():
        (parameter * gradient).sum().backward()


def descended(world: World, gradients: list[float], **settings: Any) -> np.ndarray:
    """The float32 weights of all ranks' shards, after a step with each gradient on every rank, from 0."""
    manager = mpidl.ParameterManager(vector(), DESCENT, world=world, wire="bfloat16", **settings)
    for gradient in gradients:
        give(manager, gradient)
        manager.step()
    weights = manager.shard_weights()
    manager.close()
    return weights


def test_a_gradient_s_small_part_gets_through_and_without_feedback_it_never_does(world: World) -> None:
    expected = -ITERATIONS * GRADIENT
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            fed = descended(other, [GRADIENT] * ITERATIONS, error_feedback=True)
            plain = descended(other, [GRADIENT] * ITERATIONS)
        assert np.abs(fed / expected - 1).max(initial=0) < 1e-6, sizes
        if len(sizes) > 1 and fed.size:
            # Only the owner's own node's part is exact.
            assert np.abs(plain / expected - 1).min() > SMALL / world.size / 4, sizes


def test_after_any_gradients_no_more_than_one_rounding_is_missing(world: World) -> None:
    generator = np.random.default_rng(3)
    gradients = [float(each) for each in generator.standard_normal(50).astype(np.float32)]
    expected = -np.sum(gradients)
    with with_nodes(world, (1,) * world.size) as other:
        fed = descended(other, gradients, error_feedback=True)
    assert np.abs(fed - expected).max(initial=0) < max(map(abs, gradients)) * 2.0**-8 + 1e-5


def test_the_same_gradients_give_the_same_bits_again(world: World) -> None:
    gradients = [GRADIENT, 0.3, -0.7, 1e-3, 0.1]
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            first, again = (descended(other, gradients, error_feedback=True) for _ in range(2))
        assert first.tobytes() == again.tobytes()


def test_a_checkpoint_holds_no_residuals_and_loading_one_forgets_them(world: World, shared_tmp_path: Path) -> None:
    with with_nodes(world, (1,) * world.size) as other:
        make = functools.partial(
            mpidl.ParameterManager, optimizer=DESCENT, world=other, wire="bfloat16", error_feedback=True
        )
        manager, fresh = make(vector()), make(vector())
        for _ in range(20):  # so that the next one would carry a digit
            give(manager, GRADIENT)
            manager.step()
        checkpoint.save(manager, shared_tmp_path / "c", {})
        before = manager.shard_weights()
        checkpoint.load(fresh, shared_tmp_path / "c")
        assert fresh.shard_weights().tobytes() == before.tobytes()
        checkpoint.load(manager, shared_tmp_path / "c")
        assert not has_residuals(manager)
        for each in (manager, fresh):
            for _ in range(3):
                give(each, GRADIENT)
                each.step()
        assert manager.shard_weights().tobytes() == fresh.shard_weights().tobytes()
        assert has_residuals(manager) == (world.size > 1)
        manager.load_weights(made(vector).state_dict())
        assert not has_residuals(manager)
        manager.close()
        fresh.close()


def has_residuals(manager: mpidl.ParameterManager) -> bool:
    feedback = getattr(manager._sync.route, "_feedback", None)
    return feedback is not None and any(each.any() for each in feedback._residuals.values())


@pytest.mark.parametrize("dropped", ["a norm that is not finite", "no samples"])
def test_what_a_dropped_iteration_has_left_is_forgotten(world: World, dropped: str) -> None:
    with with_nodes(world, (1,) * world.size) as other:
        manager = mpidl.ParameterManager(
            vector(), DESCENT, world=other, wire="bfloat16", error_feedback=True, clip_norm=1e9
        )
        for _ in range(3):
            give(manager, GRADIENT + 2.0**-22)  # left: more digits than a message of nothing else would carry
            manager.step()
        assert has_residuals(manager) == (world.size > 1)
        if dropped == "no samples":
            assert manager.step(num_samples=0) == 0
        else:
            give(manager, torch.cat([torch.full((SIZE - 1,), GRADIENT), torch.tensor([torch.inf])]))
            with pytest.raises(NonFiniteLossError):
                manager.step()
        assert not has_residuals(manager)
        manager.close()


def test_what_was_sent_too_early_is_forgotten(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpidl.parameters.layout.MIN_CELL_SIZE", 1)  # several buckets: the last waits for `step`

    gradient = 1.5 + 9 * SMALL  # rounded down, and up where what one of them has left is added

    def trained(too_early: bool) -> np.ndarray:
        manager = mpidl.ParameterManager(vector(), DESCENT, world=other, wire="bfloat16", error_feedback=True)
        for iteration in range(3):
            if iteration == 2:
                manager._sync.route.forget()  # what both then start from
            if too_early and iteration == 2:
                give(manager, gradient)
                manager.zero_grad()
            give(manager, gradient)
            manager.step()
        weights = manager.shard_weights()
        manager.close()
        return weights

    with with_nodes(world, (1,) * world.size) as other:
        assert trained(True).tobytes() == trained(False).tobytes()


def test_residuals_are_as_long_as_what_a_rank_sends_and_are_counted(world: World) -> None:
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            manager = mpidl.ParameterManager(made(dense), SGD, world=other, wire="bfloat16", error_feedback=True)
            size = manager.layout.size
            counted = other.allreduce(np.array([manager.memory_bytes().get("error feedback", 0)]))[0]
            assert counted == 4 * size * (len(sizes) - 1)
            manager.close()


def test_messages_are_counted_where_there_are_any(world: World) -> None:
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as other:
            manager = mpidl.ParameterManager(made(dense), SGD, world=other, wire="bfloat16")
            manager.model(torch.ones(2, NUM_FEATURES)).sum().backward()
            manager.step()
            own = manager.memory_bytes().get("message buffers", 0)
            # At the least the whole gradient's words, sent and received, were out at the same time somewhere.
            assert own == 0 if len(sizes) == 1 else own >= 2 * sum(b - a for a, b in manager.shard_runs)
            manager.close()


@pytest.mark.parametrize("settings", [{}, {"wire": "bfloat16", "reduction": "mpi"}])
def test_feedback_where_no_gradient_is_rounded_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(LayoutError, match="error_feedback is for gradients that are rounded"):
        mpidl.ParameterManager(made(dense), SGD, error_feedback=True, **settings)
