"""Claims about mpidl.job: what a configuration's names become, and whose run directory is whose."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import mpidl.runtime
from mpidl import config as configuration
from mpidl import job, losses
from mpidl.config import Config
from mpidl.errors import ConfigError, DataError


def own_optimizer(parameters: Any, lr: float, scale: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr * scale)


def wrong_labels() -> Any:
    return torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 10, 2])


@pytest.mark.parametrize("name", configuration.OPTIMIZERS)
def test_every_optimizer_has_its_name_and_the_learning_rate(name: str) -> None:
    made = job.find_optimizer(Config(optimizer=name, lr=0.25))([torch.nn.Parameter(torch.zeros(2))])
    assert type(made).__name__.lower() == name
    assert made.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("name", configuration.OPTIMIZERS)
def test_layer_wise_optimizers_and_no_others_leave_biases_alone(name: str) -> None:
    model, config = torch.nn.Linear(3, 2), Config(optimizer=name)
    groups = job.find_param_groups(config, model)
    optimizer = job.find_optimizer(config)(groups or model.parameters())
    alone = [group for group in optimizer.param_groups if not group.get("adapt", True)]
    assert [id(parameter) for group in alone for parameter in group["params"]] == (
        [id(model.bias)] if name in ("lars", "lamb") else []
    )


@pytest.mark.parametrize("name", configuration.LOSSES)
def test_every_loss_is_a_function_of_torch(name: str) -> None:
    found = job.find_loss(Config(loss=name))
    assert isinstance(found, losses.Fitting)
    assert found.function is getattr(torch.nn.functional, name)


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "message"),
    [
        (
            "cross_entropy",
            torch.zeros(4, 5),
            torch.tensor([0, 1, 5, 2]),
            r"float32 of shape \(4, 5\).*Target 5 is out of",
        ),
        ("cross_entropy", torch.zeros(4), torch.zeros(4, dtype=torch.int64), r"shape \(4,\), with the targets, int64"),
        ("mse_loss", torch.zeros(4, 1), torch.zeros(4), r"\(4, 1\).*\(4,\): .* shapes must be equal; change the model"),
        ("cross_entropy", {"logits": torch.zeros(4, 5)}, torch.zeros(4), "what the model returns, a dict"),
    ],
)
def test_outputs_that_do_not_fit_the_targets_are_told_with_both_shapes(
    loss: str, outputs: Any, targets: torch.Tensor, message: str
) -> None:
    with pytest.raises(DataError, match=f"^{loss} does not take .*{message}"):
        job.find_loss(Config(loss=loss))(outputs, targets)


def test_lists_become_the_pairs_that_torch_wants() -> None:
    config = Config(optimizer="adam", optimizer_args={"betas": [0.8, 0.9]})
    made = job.find_optimizer(config)([torch.nn.Parameter(torch.zeros(2))])
    assert made.param_groups[0]["betas"] == (0.8, 0.9)


def test_an_own_optimizer_gets_the_learning_rate_and_arguments() -> None:
    config = Config(optimizer=f"{__name__}:own_optimizer", lr=0.5, optimizer_args={"scale": 0.5})
    made = job.find_optimizer(config)([torch.nn.Parameter(torch.zeros(2))])
    assert made.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer_args": {"momentun": 0.9}}, "'momentun', which sgd does not take; did you mean momentum?"),
        ({"optimizer_args": {"zzz": 1}}, "; it takes momentum, dampening"),
        ({"optimizer_args": {"momentum": -1.0}}, "Invalid momentum value: -1.0"),
        ({"optimizer_args": {"lr": 1.0}}, "the learning rate is the setting lr"),
    ],
)
def test_wrong_optimizer_arguments_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        job.find_optimizer(Config(**values))
    assert message in str(raised.value)


def rates(config: Config, num_samples: int, count: int) -> list[float]:
    optimizer = job.find_optimizer(config)([torch.nn.Parameter(torch.zeros(1))])
    make = job.find_schedule(config, num_samples)
    assert make is not None
    scheduler, found = make(optimizer), []
    for _ in range(count):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def test_the_rate_rises_to_lr_and_falls_along_a_cosine() -> None:
    config = Config(lr=1.0, schedule="cosine", warmup_iterations=4, epochs=3, batch_size=8)
    rise = [(index + 1) / 5 for index in range(4)]
    fall = [(1 + math.cos(math.pi * index / 20)) / 2 for index in range(20)]
    assert rates(config, 64, 24) == pytest.approx(rise + fall)


def test_the_rate_stays_after_the_warm_up_or_falls_from_the_start() -> None:
    constant = Config(lr=1.0, warmup_iterations=1, epochs=3, batch_size=8)
    assert rates(constant, 64, 4) == pytest.approx([0.5, 1, 1, 1])
    cosine = Config(lr=1.0, schedule="cosine", epochs=1, batch_size=8)
    assert rates(cosine, 16, 2) == pytest.approx([1.0, 0.5])
    assert job.find_schedule(Config(), 64) is None


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup_iterations 8 is not less than the 8 iterations"):
        job.find_schedule(Config(warmup_iterations=8, epochs=1, batch_size=8), 64)


def test_the_seed_alone_decides_the_first_weights() -> None:
    torch.manual_seed(1)
    first = job.prepare(Config(seed=5)).model.state_dict()
    torch.rand(3)
    second = job.prepare(Config(seed=5)).model.state_dict()
    other = job.prepare(Config(seed=6)).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_labels_out_of_range_are_found_before_training() -> None:
    with pytest.raises(DataError, match="10"):
        job.prepare(Config(data=f"{__name__}:wrong_labels"))


def test_auto_takes_the_first_free_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    taken = [job.claim_run_dir(Config(), "digits") for _ in range(3)]
    assert taken == [Path("runs/digits"), Path("runs/digits-2"), Path("runs/digits-3")]
    # What "auto" threads were is written down, since the bits depend on it.
    resolved = Config(run_dir="runs/digits-2", threads_per_rank=mpidl.runtime.init().threads_per_rank)
    assert configuration.load(taken[1] / "config.toml") == resolved


def test_a_run_is_never_replaced_but_other_files_may_lie_there(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path / "run"), data_dir="data")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "slurm-1.out").touch()
    assert job.claim_run_dir(config, "x") == tmp_path / "run"
    assert configuration.load(tmp_path / "run" / "config.toml").data_dir == str(Path("data").absolute())
    with pytest.raises(ConfigError, match="holds a run already; continue that one with --resume"):
        job.claim_run_dir(config, "x")


def test_a_run_that_failed_before_it_began_leaves_nothing(tmp_path: Path) -> None:
    path = job.claim_run_dir(Config(run_dir=str(tmp_path / "run")), "x")
    job.release_run_dir(path)
    assert not path.exists()
    path = job.claim_run_dir(Config(run_dir=str(tmp_path / "run")), "x")
    (path / "metrics.jsonl").touch()
    job.release_run_dir(path)
    assert (path / "config.toml").exists()


def test_a_run_directory_is_its_owner_s_alone(tmp_path: Path) -> None:
    path = job.claim_run_dir(Config(run_dir=str(tmp_path / "runs" / "own")), "x")
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot write the run directory /proc/run"):
        job.claim_run_dir(Config(run_dir="/proc/run"), "x")
