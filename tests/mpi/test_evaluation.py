"""Evaluation: every sample counts once, whatever the sizes, and the bits do not depend on the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import mpidl
from mpidl import checkpoint
from mpidl.errors import CheckpointError, DataError, LayoutError, UserError
from mpidl.metrics import accuracy
from mpidl.runtime import World
from tests.mpi import reference
from tests.mpi.cases import NUM_FEATURES, Augmented, classes, convolutional, dense, job_of, made, normalised, trainer_of
from tests.mpi.reference import differing
from tests.mpi.worlds import as_the_world, node_layouts


def largest_output(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """A metric that gives a Python number: the sum of the largest outputs."""
    del targets
    return float(outputs.max(1).values.sum())


METRICS = {"accuracy": accuracy, "largest": largest_output}


class Tagged(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Sample i has the target i."""

    def __init__(self, num_samples: int) -> None:
        self.inputs = classes(num_samples)[0]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], torch.tensor(index)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 7, 16, 33])
@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_every_sample_is_evaluated_once_whatever_the_sizes(world: World, num_samples: int, chunk: int) -> None:
    seen: list[int] = []

    def note(outputs: torch.Tensor, targets: torch.Tensor) -> int:
        assert len(outputs) == len(targets) <= chunk
        seen.extend(targets.tolist())
        return len(targets)

    def first_output(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        del targets
        return outputs[:, 0].mean()

    job = job_of(*classes(8), loss_fn=first_output)
    trainer = trainer_of(made(dense), job, eval_batch_size=chunk, metrics={"count": note})
    result = trainer.evaluate(Tagged(num_samples))
    everyones = world.allgather_object(seen)
    assert sorted(index for indices in everyones for index in indices) == list(range(num_samples))
    assert result["samples"] == num_samples
    assert result["count"] == 1.0
    trainer.close()
    with torch.no_grad():
        expected = made(dense).double()(classes(num_samples)[0].double())[:, 0].mean()
    assert result["loss"] == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("num_samples", [1, 3, 50])
def test_losses_and_metrics_are_the_oracles_to_the_bit_and_the_same_on_every_rank(
    world: World, num_samples: int
) -> None:
    data = classes(num_samples)
    job = job_of(*data)
    expected = reference.evaluate(made(normalised), job, 7, METRICS)
    for sizes in node_layouts(world):
        with as_the_world(world, sizes):
            trainer = trainer_of(made(normalised), job, eval_batch_size=7, metrics=METRICS)
            result = trainer.evaluate(data)
            trainer.close()
        assert result == expected
        assert world.allgather_object(result) == [result] * world.size


def test_evaluation_leaves_the_model_and_its_modes_as_they_were(world: World) -> None:
    data = classes(20)
    model = made(normalised)
    model.get_submodule("1").eval()
    modes = [module.training for module in model.modules()]
    trainer = trainer_of(model, job_of(*data))
    trainer.evaluate(data)
    trainer.close()
    assert [module.training for module in model.modules()] == modes
    assert differing(model.state_dict(), made(normalised).state_dict()) == []
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_modes_are_restored_when_a_metric_fails(world: World) -> None:
    def broken(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        raise UserError("this metric is broken")

    data = classes(20 * world.size)
    model = made(normalised)
    trainer = trainer_of(model, job_of(*data), metrics={"broken": broken}, eval_batch_size=4)
    with pytest.raises(UserError, match="this metric is broken"):
        trainer.evaluate(data)
    assert all(module.training for module in model.modules())
    trainer.close()


def test_weighted_losses_are_means_over_their_weights(world: World) -> None:
    def token_loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (targets + 1).float()
        return (F.cross_entropy(outputs, targets, reduction="none") * weights).sum(), weights.sum()

    data = classes(37)
    trainer = trainer_of(made(dense), job_of(*data, loss_fn=token_loss), eval_batch_size=5)
    result = trainer.evaluate(data)
    assert result == reference.evaluate(made(dense), job_of(*data, loss_fn=token_loss), 5)
    with torch.no_grad():
        losses = F.cross_entropy(made(dense).double()(data[0].double()), data[1], reduction="none")
    weights = (data[1] + 1).double()
    assert result["loss"] == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=1e-5)
    trainer.close()


def test_weights_that_add_up_to_zero_are_an_error_on_all_ranks(world: World) -> None:
    def weightless(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
        del targets
        return outputs.sum() * 0, 0

    data = classes(9)
    trainer = trainer_of(made(dense), job_of(*data, loss_fn=weightless))
    with pytest.raises(UserError, match="weights add up to zero"):
        trainer.evaluate(data)
    trainer.close()


def test_random_augmentation_is_the_same_in_every_evaluation(world: World) -> None:
    dataset = Augmented(23)
    job = job_of(dataset.labels, samples=reference.of_dataset(dataset, seed=4), seed=4)
    expected = reference.evaluate(made(convolutional), job, 6, METRICS)
    trainer = trainer_of(made(convolutional), job, eval_batch_size=6, metrics=METRICS)
    assert [trainer.evaluate(dataset), trainer.evaluate(dataset)] == [expected, expected]
    trainer.close()


class TwoHeads(nn.Module):
    """Inputs by keyword, outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(NUM_FEATURES, 5)

    def forward(self, *, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.head(features)}


def test_metrics_get_the_models_outputs_and_the_targets_as_they_are(world: World) -> None:
    inputs, labels = classes(11)
    dataset = [({"features": inputs[index]}, {"label": labels[index]}) for index in range(11)]

    def loss(outputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(outputs["scores"], targets["label"])

    def right(outputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return (outputs["scores"].argmax(1) == targets["label"]).sum()

    job = job_of(labels, loss_fn=loss)
    trainer = trainer_of(made(TwoHeads), job, eval_batch_size=3, metrics={"right": right})
    result = trainer.evaluate(AsDataset(dataset))
    with torch.no_grad():
        scores = made(TwoHeads)(features=inputs)["scores"]
    assert result["right"] == pytest.approx(float((scores.argmax(1) == labels).double().mean()))
    trainer.close()


class AsDataset(Dataset[Any]):
    """A list as a Dataset."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def test_data_that_only_one_rank_cannot_read_is_an_error_on_all_ranks(world: World) -> None:
    data: Any = classes(9)
    if world.rank == world.size - 1:
        data = (data[0], data[1][:-1])
    trainer = trainer_of(made(dense), job_of(*classes(9)))
    with pytest.raises(DataError):
        trainer.evaluate(data)
    trainer.close()


def test_loaded_weights_are_evaluated_and_trained_on(world: World, shared_tmp_path: Path) -> None:
    data = classes(40)
    job = job_of(*data, epochs=1)
    other = made(normalised, seed=6)
    if world.rank == 0:
        checkpoint.save_weights(other.state_dict(), shared_tmp_path / "weights.safetensors")
    world.barrier()
    for path in (shared_tmp_path, shared_tmp_path / "weights.safetensors"):
        model = made(normalised)
        trainer = trainer_of(model, job, eval_batch_size=7, metrics=METRICS)
        trainer.load(path)
        assert trainer.evaluate(data) == reference.evaluate(other, job, 7, METRICS)
        trainer.fit(data, epochs=1)
        trainer.close()
        expected = made(normalised, seed=6)
        reference.train(expected, job)
        assert differing(model.state_dict(), expected.state_dict()) == []


def test_weights_that_are_missing_or_of_another_model_are_refused_on_all_ranks(
    world: World, shared_tmp_path: Path
) -> None:
    trainer = trainer_of(made(dense), job_of(*classes(40)))
    with pytest.raises(CheckpointError, match="does not exist"):
        trainer.load(shared_tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="does not hold a checkpoint"):
        trainer.load(shared_tmp_path)
    if world.rank == 0:
        checkpoint.save_weights(made(normalised).state_dict(), shared_tmp_path / "weights.safetensors")
        (shared_tmp_path / "junk.safetensors").write_bytes(b"\xff" * 40)
    world.barrier()
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        trainer.load(shared_tmp_path / "junk.safetensors")
    with pytest.raises(LayoutError, match="do not fit the model"):
        trainer.load(shared_tmp_path)
    assert mpidl.load(shared_tmp_path).keys() == made(normalised).state_dict().keys()
    trainer.close()
