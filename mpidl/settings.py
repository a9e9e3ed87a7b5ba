"""What a Trainer was given, checked against the ranks."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mpidl.data import Loader, Source
from mpidl.errors import ConfigError
from mpidl.parameters import BASELINES, OptimizerFactory
from mpidl.runtime import World, check_watch, ulfm
from mpidl.scheduling import (
    LossFunction,
    Metric,
    ScheduleFactory,
    Trigger,
    as_trigger,
    evaluate,
    last_partitions,
    most_dropped,
)
from mpidl.sync_batchnorm import needs_lockstep
from mpidl.telemetry import Listener, Telemetry, TensorBoard, check_progress, check_tensorboard

RECOVERY = ("auto", "off")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a Trainer was given; its docstring says what each means."""

    model: nn.Module
    loss_fn: LossFunction
    optimizer: OptimizerFactory
    batch_size: int
    partitions: int
    group_size: int | str
    max_group_seconds: float
    schedule: ScheduleFactory | None
    param_groups: list[dict[str, Any]] | None
    seed: int
    reduction: str
    wire: str
    balance: bool | str
    drop_share: float
    drop_budget_s: float | None
    drop_warmup: int
    error_feedback: bool
    bucket_mb: float | None
    clip_norm: float | None
    clip_value: float | None
    loader_workers: int
    eval_batch_size: int
    metrics: Mapping[str, Metric]
    validate_every: int | str | Trigger
    checkpoint_every: int | str | Trigger
    keep_last: int | None
    keep_every: int | None
    summarize_every: int | str | Trigger
    end_when: str | Trigger | None
    max_seconds: float | None
    hang_seconds: float
    on_hang: str
    recovery: str
    run_dir: pathlib.Path | None
    progress: str
    trace: int
    tensorboard: bool
    histograms: bool
    on_event: Listener | None
    telemetry: Telemetry | None

    def digest(self) -> str:
        """What must be the same on all ranks; functions by their names, paths and models not at all."""
        left_out = (
            "model",
            "run_dir",
            "progress",
            "on_event",
            "telemetry",
            "optimizer",
            "param_groups",
            "loader_workers",
        )  # or checked elsewhere
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        values["metrics"] = list(self.metrics)
        for name in ("loss_fn", "schedule"):
            values[name] = getattr(values[name], "__qualname__", type(values[name]).__name__)
        return repr((values, self.run_dir is None))

    def survives(self, world: World) -> bool:
        """Whether the others go on where a rank is lost: where MPI does, and each partition may be anybody's."""
        return self._can_keep() and ulfm.is_on()

    def outlives(self) -> bool:
        """Whether state is kept for a restart, where `mpidl launch` would start the training again."""
        return self._can_keep() and self.run_dir is not None

    def _can_keep(self) -> bool:
        shares = self.reduction not in BASELINES and not needs_lockstep(self.model)
        return self.recovery == "auto" and shares

    def check(self, world: World) -> None:
        """Raise ConfigError where the settings do not fit each other or the ranks."""
        if self.partitions < world.size:
            raise ConfigError(
                f"{world.size} ranks, but partitions is {self.partitions}; every rank needs at least one; lower -n "
                "or raise partitions"
            )
        if self.batch_size < self.partitions:
            raise ConfigError(
                f"batch_size {self.batch_size} is smaller than partitions {self.partitions}; every partition needs at "
                "least one sample; raise batch_size or lower partitions"
            )
        for name, value in self.model.state_dict().items():
            if not isinstance(value, torch.Tensor):
                raise ConfigError(
                    f"{name} of the model's state dict is a {type(value).__name__}; checkpoints hold tensors only: "
                    "keep it in a buffer instead of get_extra_state"
                )
        for name in ("validate_every", "checkpoint_every", "summarize_every", "end_when"):
            as_trigger(name, getattr(self, name))
        for name, number in (("keep_last", self.keep_last), ("keep_every", self.keep_every)):
            if number is not None and number < 1:
                raise ConfigError(f"{name} is {number}; it must be at least 1, or None")
        if self.keep_every is not None and self.keep_last is None:
            raise ConfigError(
                f"keep_every is {self.keep_every}, but without keep_last all checkpoints are kept; give both"
            )
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ConfigError(f"max_seconds is {self.max_seconds}; it must be positive, or None")
        check_watch(self.hang_seconds, self.on_hang)
        if self.recovery not in RECOVERY:
            raise ConfigError(f"recovery is {self.recovery!r}; it must be {' or '.join(map(repr, RECOVERY))}")
        if self.group_size != "auto" and (isinstance(self.group_size, str) or self.group_size < 1):
            raise ConfigError(f'group_size is {self.group_size!r}; it must be "auto" or a number of at least 1')
        if self.balance not in (True, False, "auto"):
            raise ConfigError(f'balance is {self.balance!r}; it must be True, False or "auto"')
        if not self.max_group_seconds > 0:
            raise ConfigError(f"max_group_seconds is {self.max_group_seconds}; it must be above 0")
        self._check_telling()
        self._check_dropping()

    def _check_telling(self) -> None:
        check_progress(self.progress)
        if self.trace < 0:
            raise ConfigError(f"trace is {self.trace}; it must be a number of iterations, or 0 for none")
        if self.run_dir is None and (self.trace or self.tensorboard):
            name = "trace" if self.trace else "tensorboard"
            raise ConfigError(f"{name} writes into the run directory, and there is none; give a run_dir")
        if self.tensorboard:
            check_tensorboard()

    def make_telemetry(self) -> Telemetry:
        """What rank 0 records events with."""
        listeners = [self.on_event] if self.on_event is not None else []
        if self.tensorboard and self.run_dir is not None:
            listeners.append(TensorBoard(self.run_dir / "tensorboard"))
        return Telemetry(self.run_dir, progress=self.progress, listeners=listeners)

    def _check_dropping(self) -> None:
        share, budget_s = self.drop_share, self.drop_budget_s
        if not 0 <= share < 1:
            raise ConfigError(f"drop_share is {share}; it must be at least 0 (nothing is dropped) and below 1")
        if budget_s is not None and not 0 < budget_s < float("inf"):
            raise ConfigError(f"drop_budget_s is {budget_s}; it must be a number of seconds above 0, or None")
        if self.drop_warmup < 1:
            raise ConfigError(f"drop_warmup is {self.drop_warmup}; it must be at least 1 iteration")
        if share == 0:
            if budget_s is not None:
                raise ConfigError(f"drop_budget_s is {budget_s}, but drop_share 0 lets nothing be dropped; give both")
            return
        if not most_dropped(share, self.partitions):
            raise ConfigError(
                f"drop_share {share} of {self.partitions} partitions is less than one; give at least "
                f"{1 / self.partitions:.3g}, or more partitions"
            )
        if needs_lockstep(self.model):
            raise ConfigError(
                "the model has SyncBatchNorm, whose forward all ranks have to run together, so none may drop its part; "
                "leave drop_share out, or keep torch's BatchNorm"
            )

    def check_lockstep(self, world: World, num_samples: int) -> None:
        """Raise ConfigError where a model whose forward is a collective would not run once on every rank."""
        if not needs_lockstep(self.model):
            return
        size, parts = self.batch_size, self.partitions
        if parts != world.size:
            raise ConfigError(
                f"the model has SyncBatchNorm, whose forward all ranks have to run together: partitions is {parts} on "
                f"{world.size} ranks; give partitions {world.size}, or keep torch's BatchNorm"
            )
        last = last_partitions(num_samples, size, parts)
        if last < parts:
            fitting = [s for s in range(size - 1, parts - 1, -1) if last_partitions(num_samples, s, parts) == parts]
            advice = f"batch_size {fitting[0]} would do" if fitting else "use fewer ranks and partitions"
            raise ConfigError(
                f"the model has SyncBatchNorm, whose forward all ranks have to run together: the last of {num_samples} "
                f"samples in batches of {size} fill only {last} of the {parts} partitions; {advice}"
            )

    def open_train_loader(self, source: Source) -> Loader:
        """A loader of the training set."""
        return Loader(source, seed=self.seed, num_workers=self.loader_workers, shuffle=True)

    def open_validation_loader(self, source: Source) -> Loader:
        """A loader for `evaluate`; the caller closes it."""
        return Loader(source, seed=self.seed, num_workers=self.loader_workers, shuffle=False)

    def evaluate(self, world: World, source: Source, loader: Loader) -> dict[str, float]:
        """The mean loss and metrics of a data set. Collective."""
        return evaluate(
            world,
            self.model,
            self.loss_fn,
            source,
            batch_size=self.eval_batch_size,
            metrics=self.metrics,
            seed=self.seed,
            loader=loader,
        )
