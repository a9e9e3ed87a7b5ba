"""From a configuration to a trainer with its data, and the run directory that its results go to."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpidl import data, losses, metrics, models, optimizers, runtime, scheduling
from mpidl.config import CONFIG_FILE, LAYER_WISE, Config, near, to_toml
from mpidl.errors import ConfigError
from mpidl.imports import import_callable
from mpidl.telemetry import Listener, Telemetry
from mpidl.trainer import Trainer

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    cls.__name__.lower(): cls
    for cls in (
        torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam,
        torch.optim.RAdam, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.Rprop,
        torch.optim.ASGD, optimizers.Lars, optimizers.Lamb,
    )
}  # fmt: skip

# What makes a directory a run's: other files, such as Slurm's output, may lie there before.
_RUN_ENTRIES = (CONFIG_FILE, "metrics.jsonl", "plans.jsonl", "checkpoints", "weights.safetensors")

_CLASSIFYING = ("cross_entropy", "nll_loss")

_ABOUT_CLASSES = "correct the labels, or num_classes (of a text's model: vocab_size) in model_args"

_BALANCE: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a trainer is made of; made without any communication."""

    model: nn.Module
    loss: Callable[..., Any]
    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: scheduling.ScheduleFactory | None
    metrics: dict[str, Callable[..., Any]]
    train_set: Any
    validation_set: Any
    on_event: Listener | None


def build_trainer(
    config: Config, telemetry: Telemetry | None = None, run_dir: Path | None = None
) -> tuple[Trainer, Any, Any]:
    """Make the trainer that a configuration describes.

    Collective: every rank must call it, with the same configuration.

    Args:
        config: what to train.
        telemetry: gets the trainer's events; default: what the configuration says.
        run_dir: where checkpoints and weights go; None: nowhere.

    Returns:
        The trainer, the training set, and the validation set or None.

    Raises:
        ConfigError, DataError, LayoutError: something does not exist or does not fit (on every rank).
    """
    with runtime.init().agreed("setting up"):
        parts = prepare(config)
    trainer = Trainer(
        parts.model,
        parts.loss,
        parts.optimizer,
        batch_size=config.batch_size,
        partitions=config.partitions,
        group_size=config.group_size,
        max_group_seconds=config.max_group_seconds,
        schedule=parts.schedule,
        param_groups=find_param_groups(config, parts.model),
        seed=config.seed,
        reduction=config.reduction,
        wire=config.wire,
        balance=_BALANCE[config.balance],
        drop_share=config.drop_share,
        drop_budget_s=config.drop_budget_s,
        drop_warmup=config.drop_warmup,
        error_feedback=config.error_feedback,
        bucket_mb=None if config.bucket_mb == "auto" else config.bucket_mb,
        clip_norm=config.clip_norm,
        clip_value=config.clip_value,
        threads_per_rank=None if config.threads_per_rank == "auto" else config.threads_per_rank,
        loader_workers=config.loader_workers,
        eval_batch_size=config.eval_batch_size,
        metrics=parts.metrics,
        validate_every=config.validate_every,
        checkpoint_every=config.checkpoint_every,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        summarize_every=config.summarize_every,
        end_when=config.end_when,
        max_seconds=config.max_seconds,
        hang_seconds=config.hang_seconds,
        on_hang=config.on_hang,
        recovery=config.recovery,
        run_dir=run_dir,
        progress=config.progress,
        trace=config.trace,
        tensorboard=config.tensorboard,
        histograms=config.histograms,
        on_event=parts.on_event,
        telemetry=telemetry,
    )
    return trainer, parts.train_set, parts.validation_set


def prepare(config: Config) -> Parts:
    """Find and make everything that the configuration names, on this rank alone.

    Raises:
        ConfigError, DataError: something cannot be found, or does not fit.
    """
    loss, optimizer = find_loss(config), find_optimizer(config)
    found, held_out = data.load_named(config.data, config.data_dir, config.data_args)
    train_set = data.as_source(found)
    validation_set = None if held_out is None else data.as_source(held_out)
    schedule = find_schedule(config, len(train_set))
    # Rank 0's weights go to all ranks; the seed alone decides them, whatever was drawn before.
    torch.manual_seed(config.seed)
    model = models.build(config.model, **config.model_args)
    if hasattr(model, "auxiliary_weight"):
        loss = losses.WithAuxiliary(loss, model.auxiliary_weight)  # type: ignore[arg-type]  # a number, to torch's Module
    num_classes = getattr(model, "num_classes", None)
    if config.loss in _CLASSIFYING and isinstance(num_classes, int):
        for source in filter(None, (train_set, validation_set)):
            data.check_labels(source, num_classes, _ABOUT_CLASSES)
    return Parts(
        model=model,
        loss=loss,
        optimizer=optimizer,
        schedule=schedule,
        metrics={"accuracy": metrics.accuracy} if config.loss in _CLASSIFYING else {},
        train_set=train_set,
        validation_set=validation_set,
        on_event=None if config.on_event is None else import_callable(config.on_event),
    )


def find_loss(config: Config) -> Callable[..., Any]:
    """The function of outputs and targets that `config.loss` names; torch's say in words what does not fit."""
    if ":" in config.loss:
        return import_callable(config.loss)
    return losses.Fitting(getattr(nn.functional, config.loss))


def find_optimizer(config: Config) -> Callable[..., torch.optim.Optimizer]:
    """A callable from parameters to the optimizer, with the learning rate and arguments filled in.

    Raises:
        ConfigError: the optimizer has no such argument, or does not take its value.
    """
    # TOML has lists only; torch wants pairs such as Adam's betas as tuples.
    arguments = {
        name: tuple(value) if isinstance(value, list) else value for name, value in config.optimizer_args.items()
    }
    if "lr" in arguments:
        raise ConfigError("optimizer_args has lr; the learning rate is the setting lr")
    if ":" in config.optimizer:
        return functools.partial(import_callable(config.optimizer), lr=config.lr, **arguments)
    factory = _OPTIMIZERS[config.optimizer]
    allowed = [name for name in inspect.signature(factory).parameters if name not in ("params", "lr")]
    for name in arguments:
        if name not in allowed:
            hint = near(name, allowed) or f"; it takes {', '.join(allowed)}"
            raise ConfigError(f"optimizer_args has {name!r}, which {config.optimizer} does not take{hint}")
    made = functools.partial(factory, lr=config.lr, **arguments)
    try:
        made([nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{config.optimizer} does not take lr {config.lr} with {arguments}: {error}") from None
    return made


def find_param_groups(config: Config, model: nn.Module) -> list[dict[str, Any]] | None:
    """Layers, and apart what layer-wise optimizers are to leave alone; None for other optimizers: one group."""
    return optimizers.layer_groups(model) if config.optimizer in LAYER_WISE else None


def find_schedule(config: Config, num_samples: int) -> scheduling.ScheduleFactory | None:
    """A callable from the optimizer to the scheduler that the configuration names.

    Args:
        config: its `schedule`, `schedule_args`, `warmup_iterations`, `epochs` and `batch_size` count.
        num_samples: samples of the training set.

    Returns:
        None where the learning rate never changes.

    Raises:
        ConfigError: the warm-up is as long as the run, or the schedule does not take its arguments.
    """
    per_epoch = scheduling.num_iterations(num_samples, config.batch_size)
    total, warmup = config.epochs * per_epoch, config.warmup_iterations
    if warmup and warmup >= total:
        raise ConfigError(
            f"warmup_iterations {warmup} is not less than the {total} iterations of the run ({config.epochs} epochs "
            f"of {num_samples} samples in batches of {config.batch_size}); lower it or raise epochs"
        )
    course = scheduling.Course(epochs=config.epochs, iterations_per_epoch=per_epoch, warmup_iterations=warmup)
    return scheduling.named_schedule(config.schedule, config.schedule_args, course)


def claim_run_dir(config: Config, name: str) -> Path:
    """Make the run directory and write the resolved configuration into it; rank 0's task.

    A directory is never taken twice: the earlier run's work would be lost.

    Args:
        config: with `run_dir` "auto", the first free one of runs/NAME, runs/NAME-2, ...
        name: what to call an "auto" directory.

    Raises:
        ConfigError: the directory holds a run already, or cannot be written.
    """
    if config.run_dir != "auto":
        path = Path(config.run_dir)
        if not _claim(config, path):
            raise ConfigError(
                f"{path} holds a run already; continue that one with --resume {path}, or give another --run-dir"
            )
        return path
    numbered = (Path("runs", name if number == 1 else f"{name}-{number}") for number in range(1, 1_000_000))
    return next(path for path in numbered if _claim(config, path))


def _claim(config: Config, path: Path) -> bool:
    """Take the directory by creating its configuration file, which only one job can do."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is no folder; give another --run-dir")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any((path / name).exists() for name in _RUN_ENTRIES):
            return False
        with (path / CONFIG_FILE).open("x", encoding="utf-8") as file:
            file.write(_resolved(config, path))
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(f"cannot write the run directory {path}: {error.strerror}; give another --run-dir") from None
    return True


def reopen_run_dir(config: Config, path: Path) -> Callable[[], None]:
    """Write the configuration that a resumed run goes on with; rank 0's task.

    Returns:
        To be called when the run has ended: puts the earlier configuration back if it did not even begin.

    Raises:
        ConfigError: the directory cannot be written.
    """
    file, metrics = path / CONFIG_FILE, path / "metrics.jsonl"

    def num_recorded() -> int:
        return metrics.stat().st_size if metrics.exists() else 0

    def give_back() -> None:
        if num_recorded() == recorded:
            _replace(file, earlier)

    try:
        earlier, recorded = file.read_text(encoding="utf-8"), num_recorded()
        _replace(file, _resolved(config, path))
    except OSError as error:
        raise ConfigError(f"cannot write the run directory {path}: {error.strerror}; check its permissions") from None
    return give_back


def _replace(file: Path, text: str) -> None:
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(file)


def release_run_dir(path: Path) -> None:
    """Give back a directory whose run failed before it began."""
    if [name for name in _RUN_ENTRIES if (path / name).exists()] == [CONFIG_FILE]:
        (path / CONFIG_FILE).unlink()
        with contextlib.suppress(OSError):  # other files lie there
            path.rmdir()


def _resolved(config: Config, run_dir: Path) -> str:
    """The configuration as a later command, perhaps from another folder, needs it."""
    values = asdict(config) | {"run_dir": str(run_dir)}
    # The number that "auto" gave decides the bits; another number of ranks would give another.
    if config.threads_per_rank == "auto":
        values["threads_per_rank"] = runtime.init().threads_per_rank
    if config.data_dir is not None:
        values["data_dir"] = str(Path(config.data_dir).absolute())
    return to_toml(Config(**values))
