"""Partitions that are dropped when an iteration's budget is spent, on a rank that is late."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpidl
from mpidl.errors import ConfigError
from mpidl.runtime import World
from mpidl.scheduling import read_recording
from tests.mpi import reference
from tests.mpi.cases import (
    ADAM,
    SGD,
    Augmented,
    Kept,
    classes,
    convolutional,
    dense,
    job_of,
    made,
    normalised,
    trainer_of,
)
from tests.mpi.reference import Job, differing
from tests.mpi.test_trainer import assert_bits_of_the_oracle
from tests.mpi.worlds import as_the_world, node_layouts

pytestmark = pytest.mark.thorough

LATE_S = 0.5
PER_RANK = 4


def late_loss(world: World, seconds: float) -> Any:
    """A loss that takes so long on the last rank."""

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if world.rank == world.size - 1:
            time.sleep(seconds)
        return F.cross_entropy(outputs, targets)

    return loss_fn


def train_without(model: nn.Module, job: Job, dropped: set[int]) -> float:
    """One epoch of the oracle in which these partitions are left out of every batch but the first; its mean loss."""
    optimizer = job.optimizer(model.parameters())
    loss_sums, weights = [], []
    model.train()
    for iteration, span in enumerate(reference.batches(job.num_samples, job.batch_size)):

        def part(number: int, start: int, stop: int, iteration: int = iteration) -> float:
            if number in dropped and iteration > 0:
                return 0.0
            positions = reference.permute(reference.np.arange(start, stop), job.num_samples, job.seed, 0)
            inputs, targets = job.samples(0, positions.tolist())
            reference.seed_everything(reference.partition_seed(job.seed, iteration, number))
            loss_sum, weight = reference.summed(F.cross_entropy(model(inputs), targets), stop - start)
            loss_sum.backward()
            loss_sums.append(float(loss_sum.detach()))
            weights.append(weight)
            return float(weight)

        parts = reference.cut(span, job.batch_size, job.partitions)
        reference.update(model, optimizer, [functools.partial(part, n, *each) for n, each in enumerate(parts)])
    return sum(loss_sums) / sum(weights)


@pytest.mark.parametrize("workers", [None, 0, 1])
def test_what_was_not_started_in_time_is_left_out_and_the_rest_divided_by_what_ran(
    world: World, workers: int | None
) -> None:
    partitions = PER_RANK * world.size
    num_samples, batch_size = 3 * 3 * partitions, 3 * partitions
    dataset = Augmented(num_samples)
    data: Any = classes(num_samples) if workers is None else dataset
    build = normalised if workers is None else convolutional
    samples = reference.of_arrays(*data) if workers is None else reference.of_dataset(dataset, seed=0)
    job = job_of(
        *classes(num_samples), samples=samples, partitions=partitions, batch_size=batch_size, epochs=1, optimizer=ADAM,
        loss_fn=late_loss(world, LATE_S),
    )  # fmt: skip
    expected = made(build)
    loss = train_without(expected, job, {partitions - 1, partitions - 2})
    for sizes in node_layouts(world)[: 1 if workers else 2]:
        model, kept = made(build), Kept()
        with as_the_world(world, sizes):
            trainer = trainer_of(
                model, job, drop_share=0.5, drop_budget_s=1.5 * LATE_S, telemetry=kept, balance=False,
                loader_workers=workers or 0,
            )  # fmt: skip
            history = trainer.fit(data, epochs=1)
            trainer.close()
        assert differing(model.state_dict(), expected.state_dict()) == []
        assert history[0]["loss"] == pytest.approx(loss, rel=1e-12)
        assert history[0]["samples"] == num_samples - 2 * 2 * 3
        assert history[0]["dropped_partitions"] == 2 * 2
        if world.rank == 0:
            assert sum(event["dropped_partitions"] for event in kept.of("group")) == 2 * 2
            (end,) = kept.of("end")
            assert (end["dropped_partitions"], end["repeated_iterations"]) == (2 * 2, 0)
            assert kept.of("start")[0]["bits"] == "none"


@pytest.mark.parametrize("workers", [None, 1])
def test_an_iteration_of_which_too_much_was_dropped_is_repeated_with_all_and_has_their_bits(
    world: World, workers: int | None
) -> None:
    partitions = PER_RANK * world.size
    dataset = Augmented(5 * partitions)
    arrays = classes(5 * partitions)
    data: Any = arrays if workers is None else dataset
    samples = reference.of_arrays(*arrays) if workers is None else reference.of_dataset(dataset, seed=0)
    job = job_of(
        *arrays, samples=samples, partitions=partitions, batch_size=2 * partitions, epochs=1,
        loss_fn=late_loss(world, 0.05),
    )  # fmt: skip
    for sizes in node_layouts(world)[: 1 if workers else 2]:
        kept = Kept()
        with as_the_world(world, sizes):
            assert_bits_of_the_oracle(
                dense if workers is None else convolutional, job, data, drop_share=1 / partitions, drop_budget_s=0.075,
                telemetry=kept, loader_workers=workers or 0, balance=False,
            )  # fmt: skip
        if world.rank == 0:
            (end,) = kept.of("end")
            assert end["repeated_iterations"] >= 1  # not the first, and the last batch is smaller
            assert end["dropped_partitions"] == 0


def test_a_budget_is_learned_and_then_holds(world: World) -> None:
    partitions = PER_RANK * world.size
    late: list[float] = []

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        late.append(0.0)
        if world.rank == world.size - 1 and len(late) > 10 * PER_RANK:
            time.sleep(0.3)
        return F.cross_entropy(outputs, targets)

    data = classes(12 * 2 * partitions)
    job = job_of(*data, partitions=partitions, batch_size=2 * partitions, epochs=1, loss_fn=loss_fn)
    kept = Kept()
    trainer = trainer_of(
        made(dense), job, drop_share=3 / partitions, drop_warmup=4, group_size=2, telemetry=kept, balance=False
    )
    trainer.fit(data, epochs=1)
    trainer.close()
    if world.rank == 0:
        dropped = [event["dropped_partitions"] + 3 * event["repeated_iterations"] for event in kept.of("group")]
        assert dropped[:3] == [0, 0, 0]  # the fifth iteration ends the warm-up, and the plan for the sixth is made
        assert dropped[-1] >= 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop_share": 1.0}, "drop_share is 1.0; it must be at least 0"),
        ({"drop_share": 0.01}, "drop_share 0.01 of 32 partitions is less than one; give at least 0.0312"),
        ({"drop_budget_s": 1.0}, "drop_budget_s is 1.0, but drop_share 0 lets nothing be dropped"),
        ({"drop_share": 0.2, "drop_budget_s": 0.0}, "drop_budget_s is 0.0; it must be a number of seconds above 0"),
        ({"drop_share": 0.2, "drop_warmup": 0}, "drop_warmup is 0"),
    ],
)
def test_settings_of_dropping_that_do_not_fit_are_refused(world: World, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mpidl.Trainer(made(dense), F.cross_entropy, SGD, batch_size=64, partitions=32, **settings)


def test_a_model_whose_forward_is_a_collective_drops_nothing(world: World) -> None:
    model = mpidl.convert_sync_batchnorm(made(normalised))
    with pytest.raises(ConfigError, match="SyncBatchNorm, whose forward all ranks have to run together"):
        mpidl.Trainer(model, F.cross_entropy, SGD, batch_size=64, partitions=max(2, world.size), drop_share=0.5)


def test_a_replay_drops_what_was_dropped_whoever_is_late_now(world: World, shared_tmp_path: Path) -> None:
    partitions = PER_RANK * world.size
    data = classes(4 * 2 * partitions)
    kept = []
    for name, late_s, replay in (("first", 0.1, None), ("again", 0.0, shared_tmp_path / "first")):
        job = job_of(
            *data, partitions=partitions, batch_size=2 * partitions, epochs=1, optimizer=ADAM,
            loss_fn=late_loss(world, late_s),
        )  # fmt: skip
        model = made(dense)
        trainer = trainer_of(
            model, job, run_dir=shared_tmp_path / name, drop_share=0.5, drop_budget_s=0.15, balance=False
        )
        trainer.fit(data, epochs=1, replay=replay)
        trainer.close()
        world.barrier()
        kept.append((model.state_dict(), read_recording(shared_tmp_path / name).drops))
    assert differing(kept[0][0], kept[1][0]) == []
    assert kept[0][1] == kept[1][1]
    assert set(kept[0][1]) <= {2, 3, 4}
    assert kept[0][1], "nothing was dropped"
