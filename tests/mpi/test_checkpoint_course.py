"""The course of a checkpoint in a training: written while it goes on, waited for, failed, damaged, removed."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpidl
from mpidl import checkpoint
from mpidl.checkpoint import whole
from mpidl.checkpoint.image import ShardImage
from mpidl.errors import CheckpointError, ConfigError
from mpidl.runtime import World
from mpidl.telemetry import Telemetry
from tests.mpi.cases import ADAM, ADAMW, NESTEROV, classes, dense, job_of, made, normalised, trainer_of
from tests.mpi.reference import differing
from tests.mpi.test_checkpoint import biases_apart, flip, on_rank_0, step
from tests.mpi.worlds import as_the_world, node_layouts

DATA = classes(64)
WRITE = ShardImage.write
JOB = {"checkpoint_every": "iterations(1)", "group_size": 2}


def train(
    world: World, run_dir: Path, epochs: int = 3, *, resume: bool = False, **options: Any
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Two iterations an epoch; the weights, and the events of all trainings in this directory."""
    model = made(normalised)
    telemetry = Telemetry(run_dir, quiet=True) if world.rank == 0 else None
    trainer = trainer_of(model, job_of(*DATA, optimizer=ADAM), run_dir=run_dir, telemetry=telemetry, **options)
    try:
        trainer.fit(DATA, epochs=epochs, resume=resume)
    finally:
        trainer.close()
        if telemetry is not None:
            telemetry.close()
    world.barrier()
    return model.state_dict(), [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def positions(run_dir: Path) -> list[tuple[int, int]]:
    return [position for position, _ in checkpoint.list_checkpoints(run_dir)]


def warnings(events: list[dict[str, Any]]) -> list[str]:
    return [event["message"] for event in events if event["event"] == "warning"]


@pytest.fixture
def undisturbed(world: World, shared_tmp_path: Path) -> dict[str, torch.Tensor]:
    return train(world, shared_tmp_path / "undisturbed")[0]


@pytest.fixture
def manager(world: World) -> Iterator[mpidl.ParameterManager]:
    manager = mpidl.ParameterManager(made(normalised), ADAM)
    step(manager)
    yield manager
    manager.close()


def test_training_goes_on_while_a_checkpoint_of_the_past_is_written(
    world: World, shared_tmp_path: Path, manager: mpidl.ParameterManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()

    def waiting(image: ShardImage, path: Path, beat: Callable[[], None]) -> str:
        assert may_write.wait(60)
        return WRITE(image, path, beat)

    monkeypatch.setattr(ShardImage, "write", waiting)
    writer = checkpoint.Writer(manager, shared_tmp_path)
    expected = {name: value.clone() for name, value in manager.model.state_dict().items()}
    validations = [1]
    writer.begin(shared_tmp_path / "one", {"validations": validations})
    step(manager)  # weights, moments and buffers are other ones now
    validations.append(2)
    assert writer.poll() is None
    assert writer.is_busy
    world.barrier()
    assert not (shared_tmp_path / "one").exists()
    may_write.set()
    outcome = writer.complete()
    assert outcome is not None
    assert outcome.error is None
    assert differing(manager.model.state_dict(), expected) != []
    found = checkpoint.load_weights(shared_tmp_path / "one")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert checkpoint.load(manager, shared_tmp_path / "one") == {"validations": [1]}
    writer.close()


def test_memory_for_snapshots_is_made_once_and_not_by_who_trains(
    world: World, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_by = list[str]()
    make = ShardImage.__init__

    def noting(image: ShardImage, keys: list[str], size: int) -> None:
        made_by.append(threading.current_thread().name)
        make(image, keys, size)

    monkeypatch.setattr(ShardImage, "__init__", noting)
    train(world, shared_tmp_path / "run")
    assert [name.partition("_")[0] for name in made_by] == ["mpidl-checkpoint"]


@pytest.mark.parametrize("steps_before", [0, 1])
def test_what_was_prepared_for_other_states_is_made_anew(
    world: World, shared_tmp_path: Path, steps_before: int
) -> None:
    with contextlib.closing(mpidl.ParameterManager(made(normalised), ADAM)) as manager:
        for _ in range(steps_before):
            step(manager)
        writer = checkpoint.Writer(manager, shared_tmp_path)
        writer.prepare()  # before the first step there are no moments
        step(manager)
        expected = {name: value.clone() for name, value in manager.model.state_dict().items()}
        writer.begin(shared_tmp_path / "one", {})
        assert writer.complete() is not None
        writer.close()
        step(manager)
        checkpoint.load(manager, shared_tmp_path / "one")
        assert differing(manager.model.state_dict(), expected) == []


def test_polling_alone_completes_a_checkpoint(
    world: World, shared_tmp_path: Path, manager: mpidl.ParameterManager
) -> None:
    writer = checkpoint.Writer(manager, shared_tmp_path)
    calls = manager.world.calls.number_of("checkpoint")
    writer.begin(shared_tmp_path / "one", {})
    deadline = time.monotonic() + 60
    while (outcome := writer.poll()) is None:
        time.sleep(0.001 * (1 + world.rank))  # ranks find out at different times
        assert time.monotonic() < deadline
    assert (outcome.error, outcome.path) == (None, shared_tmp_path / "one")
    assert manager.world.calls.number_of("checkpoint") - calls == 4, "scalars, all have copied, reports, the outcome"
    writer.close()


def test_one_that_comes_too_soon_waits_and_says_so(
    world: World, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, torch.Tensor]
) -> None:
    def slow(image: ShardImage, path: Path, beat: Callable[[], None]) -> str:
        time.sleep(0.4 if world.rank == world.size - 1 or world.rank == 0 else 0.0)
        return WRITE(image, path, beat)

    monkeypatch.setattr(ShardImage, "write", slow)
    state, events = train(world, shared_tmp_path / "slow", **JOB)
    assert differing(state, undisturbed) == []
    (message,) = warnings(events)
    assert "the checkpoint after iteration 2 had to wait" in message
    told = [event for event in events if event["event"] == "checkpoint"]
    assert [event["iteration"] for event in told] == [1, 2, 3, 4, 5, 6]
    assert [event["waited_s"] > 0 for event in told] == [False, True, True, True, True, True]
    assert positions(shared_tmp_path / "slow") == [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]


def test_training_goes_on_over_a_full_disk_and_says_so_loudly(
    world: World, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, torch.Tensor]
) -> None:
    written = []

    def sometimes_full(image: ShardImage, path: Path, beat: Callable[[], None]) -> str:
        written.append(path)
        if world.rank == min(world.size, 7) - 1 and len(written) in (1, 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return WRITE(image, path, beat)

    monkeypatch.setattr(ShardImage, "write", sometimes_full)
    state, events = train(world, shared_tmp_path / "full", **JOB)
    assert differing(state, undisturbed) == []
    assert positions(shared_tmp_path / "full") == [(1, 0), (2, 0), (2, 1), (3, 0)]
    first, second = [message for message in warnings(events) if "had to wait" not in message]
    assert first.startswith("CHECKPOINT NOT WRITTEN: cannot write ")
    assert f"No space left on device (rank {min(world.size, 7) - 1} on " in first
    assert "there is none yet" in first
    assert f"all since {shared_tmp_path}/full/checkpoints/epoch-000001 is lost if this run ends now" in second
    assert list((shared_tmp_path / "full" / "checkpoints").glob(".*")) == []


def test_the_newest_whole_one_is_taken_and_the_damaged_one_is_named(
    world: World, shared_tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    run_dir = shared_tmp_path / "damaged"
    train(world, run_dir, epochs=2, checkpoint_every="iterations(1)")
    name = f"shard-00000-of-{world.size:05d}.safetensors"
    newest = run_dir / "checkpoints" / "epoch-000002" / name
    second = run_dir / "checkpoints" / "epoch-000001+000001" / "manifest.json"
    on_rank_0(world, functools.partial(flip, newest))
    on_rank_0(world, functools.partial(second.write_text, '{"format": 4'))
    state, events = train(world, run_dir, resume=True, checkpoint_every="iterations(1)", keep_last=2)
    assert differing(state, undisturbed) == []
    told = [message for message in warnings(events) if "DAMAGED" in message]
    assert [f"{newest} is damaged" in told[0], f"{second.parent} is not a whole checkpoint" in told[1]] == [True, True]
    assert [event["first_iteration"] for event in events if event["event"] == "start"] == [0, 2]
    assert positions(run_dir) == [(2, 1), (3, 0)], "written anew, then removed like others"


def test_where_all_are_damaged_nothing_is_lost_by_starting_over(world: World, shared_tmp_path: Path) -> None:
    train(world, shared_tmp_path, epochs=2)
    for path in shared_tmp_path.glob("checkpoints/*/rest.safetensors"):
        on_rank_0(world, functools.partial(flip, path))
    with pytest.raises(CheckpointError, match="all checkpoints of .* are damaged, the newest is .*epoch-000002"):
        train(world, shared_tmp_path, resume=True)


def test_old_ones_go_when_a_new_one_is_there(world: World, shared_tmp_path: Path) -> None:
    options = {"checkpoint_every": "iterations(1)", "keep_last": 2, "keep_every": 3}
    train(world, shared_tmp_path, epochs=2, **options)
    assert positions(shared_tmp_path) == [(1, 1), (2, 0)]
    train(world, shared_tmp_path, epochs=4, resume=True, **options)
    assert positions(shared_tmp_path) == [(1, 1), (3, 0), (3, 1), (4, 0)], "the third and sixth, and the last two"
    assert list((shared_tmp_path / "checkpoints").glob(".*")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": 0}, "keep_last is 0; it must be at least 1"),
        ({"keep_every": 2}, "keep_every is 2, but without keep_last all checkpoints are kept"),
    ],
)
def test_what_is_kept_is_checked_before_the_first_iteration(
    world: World, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_of(made(dense), job_of(*DATA), **options)


def test_each_rank_reads_what_it_needs_and_no_more(
    world: World, shared_tmp_path: Path, manager: mpidl.ParameterManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpidl.checkpoint.image.CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr("mpidl.checkpoint.reading.CHUNK_BYTES", 1 << 14)
    checkpoint.save(manager, shared_tmp_path / "one", {})
    read, positions = os.preadv, []

    def counting(descriptor: int, buffers: Any, position: int) -> int:
        positions.append((position, read(descriptor, buffers, position)))
        return positions[-1][1]

    monkeypatch.setattr(os, "preadv", counting)
    for sizes in dict.fromkeys((node_layouts(world)[-1], node_layouts(world)[0])):
        with as_the_world(world, sizes):
            other = mpidl.ParameterManager(made(normalised, seed=3), ADAM)
            positions.clear()
            checkpoint.load(other, shared_tmp_path / "one")
            needed = 3 * 4 * sum(stop - start for start, stop in map(other.layout.unpadded, other.shard_runs))
            pieces = 3 * (len(other.shard_runs) + 1) + world.size
            held = sum(number for _, number in positions)
            assert needed <= held <= needed + pieces * 2 * (1 << 14), "pieces, rounded up to chunks; tables"
            assert differing(other.model.state_dict(), manager.model.state_dict()) == []
            world.barrier()
            other.close()


@pytest.mark.parametrize("bucket_mb", [1, 64])
def test_other_buckets_and_nodes_do_not_matter(
    world: World, shared_tmp_path: Path, undisturbed: dict[str, torch.Tensor], bucket_mb: float
) -> None:
    run_dir = shared_tmp_path / "buckets"
    train(world, run_dir, epochs=2, checkpoint_every="iterations(3)")
    on_rank_0(world, functools.partial(os.rename, run_dir / "checkpoints/epoch-000002", shared_tmp_path / "later"))
    with as_the_world(world, node_layouts(world)[0]):  # one rank a node, so there are buckets
        assert differing(train(world, run_dir, resume=True, bucket_mb=bucket_mb)[0], undisturbed) == []


@pytest.mark.parametrize("groups", [None, biases_apart])
@pytest.mark.parametrize("optimizer", [ADAMW, NESTEROV])
def test_an_exported_state_is_what_plain_torch_goes_on_with(
    world: World, shared_tmp_path: Path, optimizer: Any, groups: Any
) -> None:
    if optimizer is NESTEROV and groups:
        return  # the groups are Adam's
    model = made(normalised)
    given = groups(model) if groups else None
    manager = mpidl.ParameterManager(model, optimizer, param_groups=given)
    step(manager)
    checkpoint.save(manager, shared_tmp_path / "one", {})
    step(manager, 1)
    if world.rank == 0:
        checkpoint.save_optimizer(checkpoint.load_optimizer(shared_tmp_path / "one"), shared_tmp_path / "optimizer.pt")
        plain = made(normalised, seed=7)
        plain.load_state_dict(checkpoint.load_weights(shared_tmp_path / "one"))
        torch_s = optimizer(groups(plain) if groups else plain.parameters())
        torch_s.load_state_dict(torch.load(shared_tmp_path / "optimizer.pt", weights_only=True))
        expected = manager_state(plain, torch_s)
        found = whole.read_optimizer(shared_tmp_path / "one")
        assert found["param_groups"] == expected["param_groups"]
        for number, entry in found["state"].items():
            assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(expected["state"][number][key]))
                       for key, value in entry.items())  # fmt: skip
        if world.size == 1:
            alone = [value.detach() for value in after_one_step(plain, torch_s)]
            assert all(
                torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(alone, model.parameters(), strict=True)
            )
    world.barrier()
    manager.close()


def manager_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state: dict[str, Any] = optimizer.state_dict()
    assert len(state["state"]) == len(list(model.parameters()))
    return state


def after_one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What `step(manager, 1)` does on one rank."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model(torch.randn(6, 20, generator=generator)).square().mean().backward()
    optimizer.step()
    return list(model.parameters())


def test_moments_of_param_groups_that_have_none_are_zeros_on_every_rank(world: World, shared_tmp_path: Path) -> None:
    """One group has momentum, the other none, so ranks hold different kinds of state."""
    model = made(normalised)
    first, *others = model.parameters()
    groups = [{"params": [first], "momentum": 0.9}, {"params": others, "momentum": 0.0}]
    manager = mpidl.ParameterManager(model, lambda given: torch.optim.SGD(given, lr=0.1), param_groups=groups)
    step(manager)
    checkpoint.save(manager, shared_tmp_path / "one", {})
    expected = manager.state_dict()
    found = checkpoint.load_optimizer(shared_tmp_path / "one")
    if world.rank == 0:
        buffers = {n: e["momentum_buffer"] for n, e in expected["state"].items() if "momentum_buffer" in e}
        assert {n for n, e in found["state"].items() if "momentum_buffer" in e} == set(buffers) == {0}
        assert np.array_equal(found["state"][0]["momentum_buffer"], buffers[0])
    checkpoint.load(manager, shared_tmp_path / "one")
    world.barrier()
    manager.close()
