"""Checkpoints: a resumed run has the bits of the undisturbed one; what is damaged or foreign is refused by all."""

from __future__ import annotations

import errno
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mpidl
from mpidl import checkpoint
from mpidl.checkpoint import publication, whole
from mpidl.checkpoint.image import ShardImage
from mpidl.errors import CheckpointError, ConfigError, NonFiniteLossError
from mpidl.metrics import accuracy
from mpidl.runtime import World
from mpidl.scheduling import Plateau
from mpidl.telemetry import Telemetry
from tests.mpi import reference
from tests.mpi.cases import (
    ADAM,
    ADAMW,
    NESTEROV,
    NUM_FEATURES,
    SGD,
    Augmented,
    Scale,
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

EPOCHS = 3


def decaying(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: 0.9**iteration)


def biases_apart(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if "bias" in name], "weight_decay": 0.0, "betas": (0.8, 0.99)},
        {"params": [p for name, p in named if "bias" not in name]},
    ]


def fit(
    model: nn.Module, job: Job, data: Any, run_dir: Path | None, *, resume: bool = False, **options: Any
) -> list[dict[str, Any]]:
    trainer = trainer_of(model, job, run_dir=run_dir, metrics={"accuracy": accuracy}, **options)
    try:
        return trainer.fit(data, classes(30, seed=9) if job.groups else None, epochs=job.epochs, resume=resume)
    finally:
        trainer.close()


def numbers(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without times."""
    times = ("seconds", "samples_per_s")
    return [{key: value for key, value in event.items() if key not in times} for event in history]


def on_rank_0(world: World, action: Callable[[], Any]) -> None:
    """Let rank 0 do something with files, while the others wait."""
    if world.rank == 0:
        action()
    world.barrier()


# --- resuming ---------------------------------------------------------------------------------------------------------


def with_everything() -> tuple[Callable[[], nn.Module], Job, Any]:
    """Moments, a schedule, groups, dropout, BatchNorm, a rest."""
    data = classes(80)
    job = job_of(*data, optimizer=ADAMW, schedule=decaying, groups=biases_apart, epochs=EPOCHS, seed=5)
    return normalised, job, data


def with_augmentation() -> tuple[Callable[[], nn.Module], Job, Any]:
    dataset = Augmented(50)
    samples = reference.of_dataset(dataset, seed=6)
    return convolutional, job_of(dataset.labels, samples=samples, optimizer=NESTEROV, epochs=EPOCHS, seed=6), dataset


@pytest.mark.parametrize("case", [with_everything, with_augmentation])
def test_resuming_after_any_epoch_gives_the_bits_of_the_undisturbed_run(
    world: World, shared_tmp_path: Path, case: Callable[[], tuple[Any, Job, Any]]
) -> None:
    build, job, data = case()
    undisturbed, expected = made(build), made(build)
    history = fit(undisturbed, job, data, shared_tmp_path / "whole")
    states = []
    for _ in reference.epochs(expected, job):
        states.append({name: value.clone() for name, value in expected.state_dict().items()})
    assert differing(undisturbed.state_dict(), states[-1]) == []
    for epoch in range(1, EPOCHS):
        run_dir = shared_tmp_path / f"after-{epoch}"
        name = f"checkpoints/epoch-{epoch:06d}"
        on_rank_0(world, functools.partial(shutil.copytree, shared_tmp_path / "whole" / name, run_dir / name))
        saved = checkpoint.load_weights(run_dir)
        assert set(saved) == set(states[epoch - 1])
        assert all(torch.equal(saved[key], value) for key, value in states[epoch - 1].items())
        model = made(build, seed=90)
        torch.manual_seed(epoch)
        resumed = fit(model, job, data, run_dir, resume=True)
        assert differing(model.state_dict(), undisturbed.state_dict()) == []
        assert numbers(resumed) == numbers(history)[-len(resumed) :]
        assert {event["epoch"] for event in resumed} == set(range(epoch + 1, EPOCHS + 1))


def by_accuracy(optimizer: torch.optim.Optimizer) -> Plateau:
    """Halves the rates at every validation but the first, after a warm-up that ends in the second epoch."""
    arguments = {"mode": "max", "patience": 0, "factor": 0.5, "threshold": 9.0}
    return Plateau(optimizer, metric="accuracy", warmup_iterations=4, **arguments)


def test_a_resumed_run_has_the_plateau_rates_of_the_undisturbed_one(world: World, shared_tmp_path: Path) -> None:
    data, held_out = classes(80), classes(30, seed=9)
    whole = shared_tmp_path / "whole"

    def train(run_dir: Path, epochs: int, *, resume: bool = False, keep: bool = False) -> dict[str, torch.Tensor]:
        model = made(normalised)
        options = {"run_dir": run_dir, "metrics": {"accuracy": accuracy}, "validate_every": 2, "group_size": 2}
        telemetry = Telemetry(run_dir if keep and world.rank == 0 else None, quiet=True)
        trainer = trainer_of(model, job_of(*data, schedule=by_accuracy), telemetry=telemetry, **options)
        trainer.fit(data, held_out, epochs=epochs, resume=resume)
        trainer.close()
        return model.state_dict()

    undisturbed = train(whole, 6, keep=True)
    world.barrier()
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if line["event"] == "group"]
    assert rates[0] < max(rates) > rates[-1], "it has to rise and to fall"
    for epoch in range(1, 6):
        run_dir, name = shared_tmp_path / f"after-{epoch}", f"checkpoints/epoch-{epoch:06d}"
        on_rank_0(world, functools.partial(shutil.copytree, whole / name, run_dir / name))
        assert differing(train(run_dir, 6, resume=True), undisturbed) == []
    # Planned for three epochs, it validates after the third as well, which the longer one does not.
    train(shared_tmp_path / "longer", 3)
    assert differing(train(shared_tmp_path / "longer", 6, resume=True), undisturbed) == []


def test_a_run_with_a_narrow_wire_resumes_to_the_bits_of_the_undisturbed_one(
    world: World, shared_tmp_path: Path
) -> None:
    data = classes(64)
    job = job_of(*data, optimizer=ADAM, epochs=2)
    name = "checkpoints/epoch-000001"
    for sizes in dict.fromkeys((node_layouts(world)[0], node_layouts(world)[-1])):
        folder = shared_tmp_path / "-".join(map(str, sizes))
        whole, run_dir = folder / "whole", folder / "resumed"
        with as_the_world(world, sizes):
            undisturbed, resumed = made(normalised), made(normalised, seed=90)
            history = fit(undisturbed, job, data, whole, wire="bfloat16")
            on_rank_0(world, functools.partial(shutil.copytree, whole / name, run_dir / name))
            again = fit(resumed, job, data, run_dir, resume=True, wire="bfloat16")
        assert differing(resumed.state_dict(), undisturbed.state_dict()) == [], sizes
        assert numbers(again) == numbers(history)[-len(again) :]
        masters = [checkpoint.load_weights(each, epoch=2) for each in (whole, run_dir)]
        assert differing(*masters) == []
        seen = undisturbed.state_dict()["0.weight"]
        assert torch.equal(seen, masters[0]["0.weight"]) == (len(sizes) == 1), "masters are finer than what travels"


def test_a_resumed_run_can_be_longer_than_was_planned(world: World, shared_tmp_path: Path) -> None:
    data = classes(64)
    expected, model = made(dense), made(dense)
    fit(made(dense), job_of(*data, optimizer=ADAM, epochs=1), data, shared_tmp_path)
    longer = job_of(*data, optimizer=ADAM, epochs=3)
    reference.train(expected, longer)
    fit(model, longer, data, shared_tmp_path, resume=True)
    assert differing(model.state_dict(), expected.state_dict()) == []


def test_resuming_a_finished_run_runs_nothing_and_keeps_its_weights(world: World, shared_tmp_path: Path) -> None:
    data = classes(64)
    model, again = made(dense), made(dense, seed=2)
    fit(model, job_of(*data), data, shared_tmp_path)
    assert fit(again, job_of(*data), data, shared_tmp_path, resume=True) == []
    assert differing(again.state_dict(), model.state_dict()) == []


def test_resuming_where_there_is_no_checkpoint_starts_over_and_says_so(world: World, shared_tmp_path: Path) -> None:
    data = classes(64)
    model, expected = made(dense), made(dense)
    reference.train(expected, job_of(*data))
    fit(model, job_of(*data), data, shared_tmp_path, resume=True, telemetry=Telemetry(shared_tmp_path, quiet=True))
    assert differing(model.state_dict(), expected.state_dict()) == []
    world.barrier()
    events = [json.loads(line) for line in (shared_tmp_path / "metrics.jsonl").read_text().splitlines()]
    (message,) = [
        event["message"] for event in events if event["event"] == "warning" and "had to wait" not in event["message"]
    ]
    assert message == f"{shared_tmp_path} holds no checkpoint; the run starts over"


def test_resuming_without_a_run_directory_is_an_error(world: World) -> None:
    data = classes(64)
    with pytest.raises(ConfigError, match="run_dir"):
        fit(made(dense), job_of(*data), data, None, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "written with seed 0, this run has 1"),
        ({"batch_size": 16}, "written with batch_size 32, this run has 16"),
        ({"partitions": 9}, "written with partitions 8, this run has 9"),
    ],
)
def test_resuming_a_run_of_other_settings_is_refused(
    world: World, shared_tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    data = classes(64)
    fit(made(dense), job_of(*data, epochs=1), data, shared_tmp_path)
    with pytest.raises(ConfigError, match=message):
        fit(made(dense), job_of(*data, **change), data, shared_tmp_path, resume=True)


def test_resuming_on_other_data_is_refused(world: World, shared_tmp_path: Path) -> None:
    fit(made(dense), job_of(*classes(64), epochs=1), classes(64), shared_tmp_path)
    with pytest.raises(ConfigError, match="written with train_samples 64, this run has 65"):
        fit(made(dense), job_of(*classes(65)), classes(65), shared_tmp_path, resume=True)


def test_checkpoints_are_due_every_so_many_epochs_and_at_the_end(world: World, shared_tmp_path: Path) -> None:
    data = classes(32)
    fit(made(dense), job_of(*data, epochs=5), data, shared_tmp_path, checkpoint_every=2)
    world.barrier()
    assert [position for position, _ in checkpoint.list_checkpoints(shared_tmp_path)] == [(2, 0), (4, 0), (5, 0)]
    plain, sharded_ones = load_file(shared_tmp_path / "weights.safetensors"), checkpoint.load_weights(shared_tmp_path)
    assert differing(dict(sorted(plain.items())), dict(sorted(sharded_ones.items()))) == []


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(world: World, shared_tmp_path: Path) -> None:
    def exploding(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: 1.0 if iteration < 4 else 1e38)

    data = classes(128)
    job = job_of(*data, schedule=exploding, epochs=4)
    with pytest.raises(
        NonFiniteLossError, match=r"partition \d is \S+ in iteration [67]; .* checkpoint is .*epoch-000001"
    ):
        fit(made(dense), job, data, shared_tmp_path, checkpoint_every=1)
    expected = made(dense)
    reference.train(expected, job_of(*data, epochs=1))
    world.barrier()
    found = checkpoint.load_weights(shared_tmp_path, epoch=1)
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


# --- what is in a checkpoint ------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Tied, frozen, scalar and empty tensors, and buffers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(NUM_FEATURES, 300)
        self.frozen = nn.Linear(300, 300).requires_grad_(False)
        self.norm = nn.BatchNorm1d(300)
        self.decoder = nn.Linear(300, NUM_FEATURES)
        self.decoder.weight = nn.Parameter(torch.randn(NUM_FEATURES, 300) / 10)
        self.tied = nn.Linear(300, NUM_FEATURES, bias=False)
        self.tied.weight = self.decoder.weight
        self.scale = Scale()
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("table", torch.arange(7))
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("cache", torch.ones(1), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.frozen(torch.tanh(self.encoder(inputs))))
        return self.scale(self.decoder(hidden) + self.tied(hidden))


def step(manager: mpidl.ParameterManager, iterations: int = 2) -> None:
    """Train on something, the same in every call."""
    for iteration in range(iterations):
        generator = torch.Generator().manual_seed(100 * iteration + manager.world.rank)
        torch.manual_seed(100 * iteration + manager.world.rank)
        manager.model(torch.randn(6, NUM_FEATURES, generator=generator)).square().mean().backward()
        manager.step()


@pytest.fixture
def managers() -> Iterator[Callable[..., mpidl.ParameterManager]]:
    """Makes managers that are closed at the end of a test that passed."""
    made_managers = []

    def make(build: Callable[[], nn.Module], optimizer: Any = ADAM, seed: int = 1, **options: Any) -> Any:
        made_managers.append(mpidl.ParameterManager(made(build, seed), optimizer, **options))
        return made_managers[-1]

    yield make
    for manager in made_managers:
        manager.close()


@pytest.mark.parametrize("build", [Mixed, tiny, normalised])
@pytest.mark.parametrize("optimizer", [SGD, ADAM])
def test_saving_and_loading_gives_every_tensor_and_moment_back(
    world: World, shared_tmp_path: Path, managers: Any, build: Callable[[], nn.Module], optimizer: Any
) -> None:
    manager = managers(build, optimizer)
    step(manager)
    manager.param_groups[0]["lr"] = 0.03125
    size = checkpoint.save(manager, shared_tmp_path / "one", {"epoch": 7, "text": "as given"})
    state, moments = {n: v.clone() for n, v in manager.model.state_dict().items()}, manager.state_dict()
    step(manager)
    after = {name: value.clone() for name, value in manager.model.state_dict().items()}

    found = checkpoint.load_weights(shared_tmp_path / "one")
    assert set(found) == set(state)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in state.items())
    assert size == sum(file.stat().st_size for file in (shared_tmp_path / "one").iterdir())

    other = managers(build, optimizer, seed=3)
    step(other)  # has moments of its own to lose
    assert checkpoint.load(other, shared_tmp_path / "one") == {"epoch": 7, "text": "as given"}
    assert differing(other.model.state_dict(), state) == []
    assert other.param_groups[0]["lr"] == 0.03125
    loaded = other.state_dict()
    for index, entry in moments.get("state", {}).items():
        assert entry.keys() == loaded["state"][index].keys()
        assert all(torch.equal(value, loaded["state"][index][key]) for key, value in entry.items())
    step(other)
    assert differing(other.model.state_dict(), after) == []


def test_a_checkpoint_can_be_read_on_other_nodes_than_it_was_written_on(
    world: World, shared_tmp_path: Path, managers: Any
) -> None:
    manager = managers(Mixed)
    step(manager)
    checkpoint.save(manager, shared_tmp_path / "one", {})
    with as_the_world(world, node_layouts(world)[0]):  # one rank a node: nothing is shared
        other = mpidl.ParameterManager(made(Mixed, seed=4), ADAM)
        checkpoint.load(other, shared_tmp_path / "one")
        assert differing(other.model.state_dict(), manager.model.state_dict()) == []
        world.barrier()
        other.close()


def test_a_checkpoint_without_moments_forgets_those_there_are(
    world: World, shared_tmp_path: Path, managers: Any
) -> None:
    manager = managers(dense)
    checkpoint.save(manager, shared_tmp_path / "one", {})
    step(manager)
    expected = {name: value.clone() for name, value in manager.model.state_dict().items()}
    checkpoint.load(manager, shared_tmp_path / "one")
    step(manager)
    assert differing(manager.model.state_dict(), expected) == []


# --- what is refused --------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    """Change one bit near the end, where the numbers are."""
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_or_missing_file_is_refused_by_all_ranks_and_nothing_is_loaded(
    world: World, shared_tmp_path: Path, managers: Any, damage: Callable[[Path], None]
) -> None:
    manager = managers(normalised)
    step(manager)
    path = shared_tmp_path / "one"
    checkpoint.save(manager, path, {})
    names = world.broadcast_object(sorted(file.name for file in path.glob("*.safetensors")))
    assert len(names) == min(world.size, 7) + 1  # 27 k parameters are seven blocks; and the rest
    before = {name: value.clone() for name, value in manager.model.state_dict().items()}
    for name in dict.fromkeys(("rest.safetensors", names[1], names[-1])):
        damaged = path.with_name(f"{name}-damaged")
        on_rank_0(world, functools.partial(shutil.copytree, path, damaged))
        on_rank_0(world, functools.partial(damage, damaged / name))
        with pytest.raises(CheckpointError, match=f"{name} (is damaged|cannot be read)"):
            checkpoint.load(manager, damaged)
        with pytest.raises(CheckpointError, match=f"{name} (is damaged|cannot be read)"):
            checkpoint.load_weights(damaged)
        assert differing(manager.model.state_dict(), before) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a whole checkpoint"),
        ("", "not a whole checkpoint"),
        ('{"format": 5, ', "not a whole checkpoint"),
        ("[]", "manifest.json is damaged: it holds no manifest"),
        ("[" * 100_000, "not a whole checkpoint"),
        ('{"format": 4}', "is of format 4, this version reads 5"),
        ('{"format": 5}', "manifest.json is damaged: its checksum"),
    ],
)
def test_a_manifest_that_is_missing_or_not_ours_is_refused(
    world: World, shared_tmp_path: Path, managers: Any, content: str | None, message: str
) -> None:
    manager = managers(dense)
    path = shared_tmp_path / "one"
    checkpoint.save(manager, path, {})
    manifest = path / "manifest.json"
    on_rank_0(world, lambda: manifest.unlink() if content is None else manifest.write_text(content) and None)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(manager, path)
    with pytest.raises(CheckpointError, match=message):
        whole.read_weights(path)


def test_a_run_whose_newest_checkpoint_has_no_manifest_resumes_from_the_one_before(
    world: World, shared_tmp_path: Path
) -> None:
    data = classes(64)
    model, again = made(dense), made(dense, seed=5)
    fit(model, job_of(*data), data, shared_tmp_path)
    on_rank_0(world, (shared_tmp_path / "checkpoints/epoch-000002/manifest.json").unlink)
    history = fit(again, job_of(*data), data, shared_tmp_path, resume=True)
    assert [event["epoch"] for event in history] == [2]
    assert differing(again.state_dict(), model.state_dict()) == []


def layer_norm() -> nn.Module:
    """The trained tensors of `batch_norm` by name and shape, without its statistics."""
    return nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, 9), nn.BatchNorm1d(9), nn.Linear(9, 2))


def renamed() -> nn.Module:
    return nn.Sequential(*batch_norm()[:2], nn.Identity(), nn.Linear(8, 2))


def longer() -> nn.Module:
    return nn.Sequential(*batch_norm(), nn.Linear(2, 2))


def one_group_more(model: nn.Module) -> list[dict[str, Any]]:
    first, *others = model.parameters()
    return [{"params": [first]}, {"params": others}]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (wider, r"it has 0.weight \(8, 20\) where this model has 0.weight \(9, 20\)"),
        (renamed, r"it has 2.weight \(2, 8\) where this model has 3.weight \(2, 8\)"),
        (longer, "it has 6 trained tensors, this model 8"),
        (layer_norm, "1.running_mean|1.num_batches_tracked|1.running_var"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_the_difference_named(
    world: World, shared_tmp_path: Path, managers: Any, build: Callable[[], nn.Module], message: str
) -> None:
    checkpoint.save(managers(batch_norm), shared_tmp_path / "one", {})
    manager = managers(build)
    before = {name: value.clone() for name, value in manager.model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        checkpoint.load(manager, shared_tmp_path / "one")
    assert differing(manager.model.state_dict(), before) == []


def test_a_checkpoint_that_lacks_buffers_of_the_model_is_refused(
    world: World, shared_tmp_path: Path, managers: Any
) -> None:
    checkpoint.save(managers(layer_norm), shared_tmp_path / "one", {})
    with pytest.raises(ConfigError, match="1.running_mean|1.num_batches_tracked|1.running_var"):
        checkpoint.load(managers(batch_norm), shared_tmp_path / "one")


def test_a_buffer_of_another_dtype_is_refused(world: World, shared_tmp_path: Path, managers: Any) -> None:
    def table(dtype: torch.dtype) -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("table", torch.zeros(3, dtype=dtype))
        return model

    checkpoint.save(managers(lambda: table(torch.float32)), shared_tmp_path / "one", {})
    with pytest.raises(ConfigError, match=r"table"):
        checkpoint.load(managers(lambda: table(torch.int64)), shared_tmp_path / "one")


def test_a_checkpoint_of_another_optimizer_is_refused(world: World, shared_tmp_path: Path, managers: Any) -> None:
    manager = managers(batch_norm, ADAM)
    step(manager, 1)
    checkpoint.save(manager, shared_tmp_path / "one", {})
    with pytest.raises(ConfigError, match="is of Adam with 1 param groups, this run has AdamW with 1"):
        checkpoint.load(managers(batch_norm, ADAMW), shared_tmp_path / "one")
    model = made(batch_norm)
    other = mpidl.ParameterManager(model, ADAM, param_groups=one_group_more(model))
    with pytest.raises(ConfigError, match="1 param groups, this run has Adam with 2"):
        checkpoint.load(other, shared_tmp_path / "one")
    other.close()


# --- what goes wrong while saving -------------------------------------------------------------------------------------


def full_disk(*arguments: Any, **keywords: Any) -> None:
    del arguments, keywords
    raise OSError(errno.ENOSPC, "No space left on device")


FAILING: dict[str, tuple[Any, str]] = {
    "shard": (ShardImage, "write"),
    "rest": (publication, "sync"),
    "manifest": (publication, "write_json"),
    "name": (publication, "publish"),
}


@pytest.mark.parametrize("step_of_writing", FAILING)
@pytest.mark.parametrize("first", [True, False])
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_keeps_the_checkpoint_there_was(
    world: World,
    shared_tmp_path: Path,
    managers: Any,
    monkeypatch: pytest.MonkeyPatch,
    step_of_writing: str,
    first: bool,
) -> None:
    manager = managers(normalised)
    step(manager)
    path = shared_tmp_path / "epoch-000001"
    checkpoint.save(manager, path, {"iteration": 1})
    expected = {name: value.clone() for name, value in manager.model.state_dict().items()}
    step(manager)
    failing = 0 if first or step_of_writing != "shard" else min(world.size, 7) - 1  # the others are rank 0's alone
    if world.rank == failing:
        monkeypatch.setattr(*FAILING[step_of_writing], full_disk)
    target = path if first else path.with_name("epoch-000002")
    with pytest.raises(CheckpointError, match="cannot write .*No space left on device"):
        checkpoint.save(manager, target, {"iteration": 2})
    world.barrier()
    assert [entry.name for entry in shared_tmp_path.iterdir()] == ["epoch-000001"]
    world.barrier()
    monkeypatch.undo()
    found = checkpoint.load_weights(path)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    checkpoint.save(manager, target, {"iteration": 2})
    assert checkpoint.load(manager, target) == {"iteration": 2}
    world.barrier()
    assert all(not entry.name.startswith(".") for entry in shared_tmp_path.iterdir())


def test_what_a_killed_run_left_is_cleared_away_by_the_next_save(
    world: World, shared_tmp_path: Path, managers: Any
) -> None:
    def litter() -> None:
        for name in (".new-one", ".old-one"):
            (shared_tmp_path / name).mkdir()
            (shared_tmp_path / name / "shard-00009-of-00010.safetensors").write_text("half")

    on_rank_0(world, litter)
    manager = managers(dense)
    checkpoint.save(manager, shared_tmp_path / "one", {})
    checkpoint.save(manager, shared_tmp_path / "one", {"second": True})
    assert checkpoint.load(manager, shared_tmp_path / "one") == {"second": True}
    world.barrier()
    assert [entry.name for entry in shared_tmp_path.iterdir()] == ["one"]


def test_weights_that_are_not_finite_are_not_saved(world: World, shared_tmp_path: Path, managers: Any) -> None:
    manager = managers(normalised)
    state = manager.model.state_dict()
    checkpoint.save(manager, shared_tmp_path / "one", {})
    state["8.bias"] = torch.full((5,), torch.nan)  # in one rank's shard only
    manager.load_weights(state)
    with pytest.raises(CheckpointError, match="not finite"):
        checkpoint.save(manager, shared_tmp_path / "two", {})
    world.barrier()
    assert [entry.name for entry in shared_tmp_path.iterdir()] == ["one"]


def test_a_full_disk_ends_a_training_on_all_ranks_with_the_checkpoint_before(
    world: World, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = classes(64)
    fit(made(dense), job_of(*data, epochs=1), data, shared_tmp_path)
    if world.rank == 0:
        monkeypatch.setattr(ShardImage, "write", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device.*rank 0.*the last whole one is .*epoch-000001"):
        fit(made(dense), job_of(*data), data, shared_tmp_path, resume=True)
    world.barrier()
    assert [path.name for path in (shared_tmp_path / "checkpoints").iterdir()] == ["epoch-000001"]
