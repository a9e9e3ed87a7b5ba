"""The Trainer against plain PyTorch: the bits over the same partitions, and rounding against a plain loop."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpidl
from mpidl.errors import ConfigError, NonFiniteLossError, UserError
from mpidl.metrics import accuracy
from mpidl.runtime import World
from mpidl.scheduling import Plateau
from tests.mpi import reference
from tests.mpi.cases import (
    ADAM,
    ADAMW,
    NESTEROV,
    NUM_CLASSES,
    NUM_FEATURES,
    SGD,
    Augmented,
    Kept,
    classes,
    convolutional,
    dense,
    job_of,
    made,
    normalised,
    tiny,
    trainer_of,
)
from tests.mpi.reference import Job, differing
from tests.mpi.worlds import as_the_world, node_layouts

OPTIMIZERS = {"SGD": SGD, "Nesterov": NESTEROV, "Adam": ADAM, "AdamW": ADAMW}
OTHERS = {
    "amsgrad": functools.partial(torch.optim.Adam, lr=2e-3, amsgrad=True, weight_decay=1e-2),
    "dampening": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5, maximize=False),
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adagrad": functools.partial(torch.optim.Adagrad, initial_accumulator_value=0.1),
    "Adadelta": torch.optim.Adadelta,
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9, centered=True),
    "Rprop": functools.partial(torch.optim.Rprop, lr=1e-3),
    "ASGD": functools.partial(torch.optim.ASGD, t0=2.0),
}


def fit(model: nn.Module, job: Job, data: Any, validation: Any = None, **options: Any) -> list[dict[str, Any]]:
    """Train, and give the model back private weights."""
    trainer = trainer_of(model, job, **options)
    history = trainer.fit(data, validation, epochs=job.epochs)
    trainer.close()
    return history


def explained(kept: Kept, build: Any, job: Job, expected: nn.Module) -> str:
    """What helps to see where bits went astray: each group, and whether the oracle repeats itself."""
    again = made(build)
    reference.train(again, job)
    fields = ("iteration", "lr", "loss", "partition_starts")
    groups = [{field: event.get(field) for field in fields} for event in kept.of("group")]
    return f"oracle repeated: {differing(again.state_dict(), expected.state_dict())}; groups: {groups}"


def assert_bits_of_the_oracle(build: Any, job: Job, data: Any, **options: Any) -> None:
    """Weights, buffers and every epoch's loss are exactly those of plain PyTorch over the same partitions."""
    expected, model = made(build), made(build)
    losses = reference.train(expected, job)
    kept = Kept()
    history = fit(model, job, data, **{"telemetry": kept, **options})
    differences = differing(model.state_dict(), expected.state_dict())
    assert differences == [], explained(kept, build, job, expected)
    assert [event["loss"] for event in history if event["event"] == "epoch"] == losses
    assert [event["samples"] for event in history if event["event"] == "epoch"] == [job.num_samples] * job.epochs
    assert differing(model.state_dict(), made(build).state_dict()), "nothing was trained"


# --- the bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_losses_are_those_of_plain_pytorch_over_the_same_partitions(world: World, name: str) -> None:
    data = classes(128)
    assert_bits_of_the_oracle(dense, job_of(*data, optimizer=OPTIMIZERS[name]), data)


@pytest.mark.parametrize("name", OTHERS)
def test_every_element_wise_optimizer_gives_the_oracles_bits(world: World, name: str) -> None:
    data = classes(64)
    assert_bits_of_the_oracle(dense, job_of(*data, optimizer=OTHERS[name], batch_size=16, epochs=1), data)


@pytest.mark.parametrize("rest", [1, 2, 3, 13, 31])
def test_a_smaller_last_batch_is_used_and_weighs_what_it_has(world: World, rest: int) -> None:
    data = classes(64 + rest)
    assert_bits_of_the_oracle(normalised, job_of(*data, optimizer=ADAM), data)


def test_a_last_batch_of_fewer_partitions_finds_its_rows(world: World) -> None:
    # Spread evenly, one partition fewer would take some rank of so many one row more.
    partitions = {2: 28, 3: 9, 4: 11, 5: 8, 6: 9}.get(world.size, 11)
    for fewer in (1, 2, partitions // 2, partitions - 2, partitions - 1):
        data = classes(2 * partitions + 2 * fewer)
        job = job_of(*data, partitions=partitions, batch_size=2 * partitions, epochs=1)
        assert_bits_of_the_oracle(dense, job, data)


@pytest.mark.parametrize("partitions", [5, 6, 7, 9, 16])
def test_partitions_need_not_divide_anything(world: World, partitions: int) -> None:
    data = classes(70)
    assert_bits_of_the_oracle(dense, job_of(*data, partitions=partitions, batch_size=33), data)


def test_fewer_samples_than_partitions_are_trained_on_all_the_same(world: World) -> None:
    data = classes(5)
    assert_bits_of_the_oracle(dense, job_of(*data, batch_size=8), data)


def test_one_sample_is_a_data_set(world: World) -> None:
    data = classes(1)
    assert_bits_of_the_oracle(dense, job_of(*data, batch_size=8), data)


def test_batchnorm_and_dropout_give_the_oracles_bits(world: World) -> None:
    data = classes(101)
    assert_bits_of_the_oracle(normalised, job_of(*data, optimizer=ADAM, epochs=3, seed=7), data)


def test_augmentation_by_torch_numpy_and_random_gives_the_oracles_bits(world: World) -> None:
    dataset = Augmented(75)
    samples = reference.of_dataset(dataset, seed=11)
    job = job_of(dataset.labels, samples=samples, seed=11, optimizer=NESTEROV)
    assert_bits_of_the_oracle(convolutional, job, dataset)


@pytest.mark.parametrize("group_size", [1, 3, "auto"])
def test_the_group_size_changes_nothing(world: World, group_size: int | str) -> None:
    data = classes(109)
    assert_bits_of_the_oracle(normalised, job_of(*data, batch_size=16), data, group_size=group_size)


def test_a_model_smaller_than_one_shard_gives_the_oracles_bits(world: World) -> None:
    inputs, labels = classes(50)
    data = inputs, labels.float().unsqueeze(1)
    assert_bits_of_the_oracle(tiny, job_of(*data, loss_fn=F.mse_loss, optimizer=ADAM), data)


def test_other_ranks_weights_and_random_states_are_of_no_consequence(world: World) -> None:
    data = classes(64)
    expected = made(normalised)
    reference.train(expected, job := job_of(*data))
    model = made(normalised, seed=1 if world.rank == 0 else 1000 + world.rank)
    torch.manual_seed(world.rank)
    np.random.seed(world.rank)
    fit(model, job, data)
    assert differing(model.state_dict(), expected.state_dict()) == []


def test_seeds_give_different_runs(world: World) -> None:
    data = classes(64)
    one, other = made(dense), made(dense)
    fit(one, job_of(*data, seed=0), data)
    fit(other, job_of(*data, seed=1), data)
    assert differing(one.state_dict(), other.state_dict())


def warm_up(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: min(1.0, (iteration + 1) / 5))


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)


def one_cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20, cycle_momentum=False)


@pytest.mark.parametrize("schedule", [warm_up, cosine, one_cycle])
def test_the_learning_rate_moves_every_iteration(world: World, schedule: Any) -> None:
    data = classes(5 * 32)
    assert_bits_of_the_oracle(dense, job_of(*data, schedule=schedule), data, group_size=3)


def test_a_schedule_of_more_than_the_learning_rate_is_refused_before_the_first_iteration(world: World) -> None:
    def cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)

    data = classes(64)
    trainer = trainer_of(made(dense), job_of(*data, schedule=cycle))
    with pytest.raises(ConfigError, match="momentum"):
        trainer.fit(data, epochs=1)
    trainer.close()


def plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
    """Acts often: losses would have to halve."""
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.5)


@pytest.mark.parametrize(("group_size", "validate_every"), [(1, 1), (2, 2), ("auto", 1)])
def test_a_plateau_schedule_acts_on_every_validation_before_the_next_iteration(
    world: World, group_size: int | str, validate_every: int
) -> None:
    data, held_out = classes(90), classes(40, seed=4)
    job = job_of(*data, epochs=5)
    expected, model = made(normalised), made(normalised)
    scheduler, rates = None, []
    for epoch, (_, optimizer) in enumerate(reference.epochs(expected, job), 1):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler = scheduler or plateau(optimizer)
        if epoch % validate_every == 0:
            scheduler.step(reference.evaluate(expected, job_of(*held_out), 10)["loss"])
    assert len(set(rates)) > 1
    options = {"group_size": group_size, "validate_every": validate_every, "eval_batch_size": 10}
    fit(model, dataclasses.replace(job, schedule=plateau), data, held_out, **options)
    assert differing(model.state_dict(), expected.state_dict()) == []


@pytest.mark.parametrize(
    ("schedule", "options", "has_validation", "message"),
    [
        (plateau, {}, False, "this run has none; give validation data"),
        (plateau, {"validate_every": 0}, True, "this run has none; give validation data"),
        (functools.partial(Plateau, metric="accurac"), {}, True, "is not one of loss, accuracy; did you mean accuracy"),
    ],
)
def test_a_plateau_schedule_that_no_validation_serves_is_refused_on_all_ranks(
    world: World, schedule: Any, options: dict[str, Any], has_validation: bool, message: str
) -> None:
    data = classes(64)
    trainer = trainer_of(made(dense), job_of(*data, schedule=schedule), metrics={"accuracy": accuracy}, **options)
    with pytest.raises(ConfigError, match=message):
        trainer.fit(data, data if has_validation else None, epochs=2)
    trainer.close()


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights decay and biases, which lie between them, do not."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0, "lr": 1e-2},
        {"params": [p for name, p in named if not name.endswith("bias")]},
    ]


def test_interleaved_param_groups_keep_their_own_rates_and_decay(world: World) -> None:
    data = classes(100)
    job = job_of(*data, groups=two_groups, optimizer=ADAMW, schedule=warm_up)
    assert_bits_of_the_oracle(normalised, job, data)


# --- structure of data, models and losses -----------------------------------------------------------------------------


class Tied(nn.Module):
    """One matrix embeds and decodes; tokens weigh the same, not samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 96)
        self.mix = nn.Linear(96, 96)
        self.decoder = nn.Linear(96, 60, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        del lengths
        return self.decoder(torch.tanh(self.mix(self.embedding(tokens))))


def token_loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over tokens that are not padding, and their number."""
    total = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum")
    return total, (targets != 0).sum()


def sentences(num_samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 60, (num_samples, 9), generator=generator)
    lengths = torch.randint(0, 9, (num_samples,), generator=generator)  # some have no token at all
    targets = tokens.roll(-1, 1) * (torch.arange(9) < lengths.unsqueeze(1))
    return tokens, lengths, targets


def test_tied_weights_and_token_weighted_losses_of_a_tuple_of_inputs_are_exact(world: World) -> None:
    data = sentences(45)
    job = job_of(*data, loss_fn=token_loss, optimizer=ADAM, batch_size=16)
    expected, model = made(Tied), made(Tied)
    losses = reference.train(expected, job)
    history = fit(model, job, data)
    assert differing(model.state_dict(), expected.state_dict()) == []
    assert [event["loss"] for event in history] == losses
    assert model.get_parameter("decoder.weight") is model.get_parameter("embedding.weight")


def test_a_partition_of_no_weight_is_allowed_and_changes_nothing(world: World) -> None:
    tokens, lengths, targets = sentences(16)
    job = job_of(tokens, lengths, targets, loss_fn=token_loss, batch_size=16, epochs=1)
    targets[reference.permute(np.arange(4), 16, job.seed, 0)] = 0
    assert_bits_of_the_oracle(Tied, job, (tokens, lengths, targets))


class TwoHeads(nn.Module):
    """Inputs by keyword; an auxiliary head; an encoder of which a part is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(NUM_FEATURES, 64).requires_grad_(False)
        self.body = nn.Linear(64, 120)
        self.head = nn.Linear(120, 5)
        self.auxiliary = nn.Linear(120, 3)

    def forward(self, *, features: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.body(self.frozen(features)) + shift.unsqueeze(1))
        return self.head(hidden), self.auxiliary(hidden)


class Named(torch.utils.data.Dataset[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]):
    """Samples of two dicts."""

    def __init__(self, num_samples: int) -> None:
        self.inputs, self.labels = classes(num_samples)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        label = self.labels[index]
        return {"features": self.inputs[index], "shift": self.inputs[index, 0]}, {"main": label, "coarse": label // 2}


def both_heads(outputs: tuple[torch.Tensor, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(outputs[0], targets["main"]) + 0.3 * F.cross_entropy(outputs[1], targets["coarse"])


def test_dicts_auxiliary_heads_and_frozen_parameters_give_the_oracles_bits(world: World) -> None:
    dataset = Named(50)

    def samples(epoch: int, indices: Any) -> Any:
        return torch.utils.data.default_collate([dataset[index] for index in indices])

    job = job_of(dataset.labels, samples=samples, loss_fn=both_heads)
    assert_bits_of_the_oracle(TwoHeads, job, dataset)
    model = made(TwoHeads)
    fit(model, job, dataset)
    assert torch.equal(model.get_parameter("frozen.weight"), made(TwoHeads).get_parameter("frozen.weight"))


@pytest.mark.parametrize(
    ("loss_fn", "found"),
    [
        (functools.partial(F.cross_entropy, reduction="none"), r"shape \("),
        (lambda outputs, targets: F.cross_entropy(outputs, targets).item(), "float"),
    ],
)
def test_a_loss_that_is_no_scalar_tensor_is_an_error_that_says_what_it_is(
    world: World, loss_fn: Any, found: str
) -> None:
    data = classes(32)
    trainer = trainer_of(made(dense), job_of(*data, loss_fn=loss_fn, epochs=1))
    with pytest.raises(UserError, match=found):
        trainer.fit(data, epochs=1)
    trainer.close()


class PartlyFrozen(nn.Module):
    """The first normalisation layer was put into evaluation mode by its user."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(NUM_FEATURES, 40), nn.BatchNorm1d(40))
        self.second = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Linear(40, 5))
        self.first[1].running_mean.normal_()
        self.first.eval()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(inputs)))


def test_a_module_in_evaluation_mode_stays_in_it_and_its_buffers_stay_to_the_bit(world: World) -> None:
    data = classes(64)
    model = made(PartlyFrozen)
    fit(model, job_of(*data), data, data)
    assert not model.get_submodule("first.1").training
    assert model.get_submodule("second.1").training
    initial, trained = made(PartlyFrozen).state_dict(), model.state_dict()
    assert {"second.1.running_mean", "first.1.weight"} <= set(differing(trained, initial))
    assert not any(name.startswith("first.1.") and "running" in name for name in differing(trained, initial))
    assert trained["first.1.num_batches_tracked"] == 0
    assert trained["second.1.num_batches_tracked"] == 4


def test_a_model_in_evaluation_mode_is_trained_in_training_mode(world: World) -> None:
    data = classes(64)
    expected, model = made(normalised), made(normalised).eval()
    reference.train(expected, job := job_of(*data))
    fit(model, job, data)
    assert differing(model.state_dict(), expected.state_dict()) == []


# --- validation -------------------------------------------------------------------------------------------------------


def test_validations_are_those_of_the_oracle_after_every_epoch(world: World) -> None:
    data, held_out = classes(90), classes(77, seed=4)
    job = job_of(*data, epochs=3)
    held_out_job = job_of(*held_out)
    expected, model = made(normalised), made(normalised)
    results = []
    for _ in reference.epochs(expected, job):
        results.append(reference.evaluate(expected, held_out_job, 10, {"accuracy": accuracy}))
    history = fit(model, job, data, held_out, eval_batch_size=10, metrics={"accuracy": accuracy})
    found = [event for event in history if event["event"] == "validation"]
    assert [{name: event[name] for name in ("loss", "accuracy", "samples")} for event in found] == results
    assert [event["iteration"] for event in found] == [3, 6, 9]
    assert differing(model.state_dict(), expected.state_dict()) == []


def test_the_history_is_the_same_on_every_rank(world: World) -> None:
    data = classes(64)
    history = fit(made(dense), job_of(*data), data, data)
    numbers = [(event["event"], event["epoch"], event["iteration"], event["loss"]) for event in history]
    assert len(numbers) == 4
    assert world.allgather_object(numbers) == [numbers] * world.size


# --- against a plain loop ---------------------------------------------------------------------------------------------


def difference_to_plain_pytorch(optimizer: Any, iterations: int = 50) -> float:
    """The largest relative difference of weights between the Trainer and a plain loop without partitions."""
    data = classes(10 * 32)
    job = job_of(*data, optimizer=optimizer, epochs=iterations // 10)
    expected, model = made(dense), made(dense)
    losses = reference.train_plainly(expected, job)
    history = fit(model, job, data)
    assert [event["loss"] for event in history] == pytest.approx(losses, rel=1e-5)
    return reference.largest_difference(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_iterations_stay_within_2e_6_of_a_plain_loop(world: World, name: str, record_property: Any) -> None:
    difference = difference_to_plain_pytorch(OPTIMIZERS[name])
    record_property(f"largest relative difference, {name}", difference)
    if world.rank == 0:
        print(f"{name}: largest relative difference to plain PyTorch after 50 iterations {difference:.1e}")
    assert difference < 2e-6


# --- nodes and reductions ---------------------------------------------------------------------------------------------


def test_any_spread_over_nodes_gives_the_oracles_bits(world: World) -> None:
    data = classes(77)
    for sizes in node_layouts(world):
        with as_the_world(world, sizes) as other:
            assert mpidl.init() is other
            assert other.node_sizes == sizes
            assert_bits_of_the_oracle(normalised, job_of(*data, optimizer=ADAM), data)
            assert_bits_of_the_oracle(dense, job_of(*data, partitions=7, batch_size=21), data)


def test_the_mpi_reduction_is_right_to_rounding_on_any_nodes(world: World) -> None:
    # BatchNorm makes rounding grow: one iteration of it, and six of the smooth net.
    for build, num_samples, epochs in ((normalised, 33, 1), (dense, 77, 2)):
        data = classes(num_samples)
        expected = made(build)
        losses = reference.train(expected, job := job_of(*data, epochs=epochs))
        for sizes in node_layouts(world):
            model = made(build)
            with as_the_world(world, sizes):
                history = fit(model, job, data, reduction="mpi")
            assert [event["loss"] for event in history] == pytest.approx(losses, rel=1e-6)
            assert reference.largest_difference(model.state_dict(), expected.state_dict()) < 2e-6
            everyones = world.allgather_object({name: value.numpy() for name, value in model.state_dict().items()})
            assert all(np.array_equal(other[name], everyones[0][name]) for other in everyones for name in other)


def test_no_room_in_shared_memory_costs_a_warning_and_no_bit(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.setattr("mpidl.runtime.shared.DIRECTORY", tmp_path / "missing")
    data = classes(77)
    assert_bits_of_the_oracle(normalised, job_of(*data, optimizer=ADAM), data)
    shared = max(world.node_sizes) > 1
    printed = capsys.readouterr().err
    assert ("every rank becomes a node of its own" in printed) == (shared and world.rank == 0)


# --- a loss that is not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("group_size", [1, 4])
def test_a_loss_that_is_not_finite_stops_all_ranks_before_its_update(
    world: World, value: float, group_size: int
) -> None:
    inputs, labels = classes(160)
    job = job_of(inputs, labels, epochs=1)
    # The batch of iteration 3 of 5 (from 1) is positions 64 to 95; partition 5 has 84 to 87.
    poisoned = inputs.clone()
    poisoned[reference.permute(np.array([85]), 160, job.seed, 0)] = value
    expected, model = made(normalised), made(normalised)
    reference.train(expected, dataclasses.replace(job, max_iterations=2))
    trainer = trainer_of(model, job, group_size=group_size)
    with pytest.raises(NonFiniteLossError, match=r"partition 5 .*iteration 3\b"):
        trainer.fit((poisoned, labels), epochs=1)
    trainer.close()
    assert differing(model.state_dict(), expected.state_dict()) == []


@pytest.mark.parametrize("group_size", [1, 4])
def test_a_gradient_that_is_not_finite_is_named_though_losses_are_and_the_last_batch_is_for_few_ranks(
    world: World, group_size: int
) -> None:
    def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rooted = (outputs * 0).sum().sqrt() if torch.any(labels == NUM_CLASSES - 1) else 0.0  # 0, and its slope is NaN
        return F.cross_entropy(outputs, labels) + rooted

    inputs, labels = classes(100)
    labels %= NUM_CLASSES - 1
    # The batch of iteration 3 of 4 is positions 64 to 95; the last batch is of 4 samples, one partition.
    labels[reference.permute(np.array([85]), 100, 0, 0)] = NUM_CLASSES - 1
    for sizes in node_layouts(world):
        with as_the_world(world, sizes):
            model = made(normalised)
            trainer = trainer_of(model, job_of(inputs, labels, loss_fn=loss_fn), group_size=group_size)
            with pytest.raises(NonFiniteLossError, match=r"gradient is not finite in iteration 3\b"):
                trainer.fit((inputs, labels), epochs=1)
            trainer.close()
            buffers = world.allgather_object({name: buffer.tolist() for name, buffer in model.named_buffers()})
            assert buffers == buffers[:1] * world.size


# --- bad settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 4, "partitions": 5}, "batch_size 4 is smaller than partitions 5"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": "fast"}, "group_size is 'fast'"),
        ({"max_group_seconds": 0}, "max_group_seconds is 0; it must be above 0"),
        ({"max_group_seconds": float("nan")}, "max_group_seconds is nan"),
    ],
)
def test_settings_that_do_not_fit_are_refused_on_all_ranks(
    world: World, settings: dict[str, Any], message: str
) -> None:
    given = {"batch_size": 32, "partitions": 8, **settings}
    with pytest.raises(ConfigError, match=message):
        mpidl.Trainer(made(dense), F.cross_entropy, SGD, **given)


def test_fewer_partitions_than_ranks_are_refused(world: World) -> None:
    with pytest.raises(ConfigError, match=f"{world.size} ranks, but partitions is {world.size - 1}"):
        mpidl.Trainer(made(dense), F.cross_entropy, SGD, batch_size=64, partitions=world.size - 1)
