"""The Trainer: plan, execute, report, group by group.

For each group: every rank has its plan; the broadcast of the next one is started; the group's iterations run without
any other message; a gather brings the ranks' times to the coordinator; what is due (validation, checkpoint, the end) is
done by all ranks together. The next plan is received after the group's first iteration, so that the loader reads ahead
over the group's edge.
"""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpidl import checkpoint
from mpidl.data import Loader, Source, as_source
from mpidl.errors import CheckpointError, ConfigError, NonFiniteLossError
from mpidl.parameters import Assignment, ParameterManager
from mpidl.parameters.counters import LOSS_SUM, SAMPLES, WEIGHT
from mpidl.parameters.update import OptimizerFactory
from mpidl.runtime import World, init, on_all_ranks
from mpidl.scheduling import (
    REPORT_FIELDS,
    Action,
    Coordinator,
    Executor,
    GroupPlan,
    GroupSize,
    LearningRates,
    LossFunction,
    Metric,
    PlanChannel,
    ScheduleFactory,
    Triggers,
    capacity,
    evaluate,
    num_iterations,
)
from mpidl.summary import describe_start
from mpidl.telemetry import Telemetry


class Trainer:
    """Trains a model on all ranks. Every method is collective.

    The same partitions give the same bits on any number of ranks.

    Args:
        model: parameters float32, on the CPU. Rank 0's weights go to all ranks when `fit` begins.
        loss_fn: from (outputs, targets) to the mean loss of the samples, or to (sum, weight).
        optimizer: callable from parameters to an element-wise `torch.optim.Optimizer`.
        batch_size: samples of an iteration, over all ranks.
        partitions: into how many parts an iteration's batch is cut; at least the number of ranks.
        group_size: iterations planned by one broadcast, or "auto".
        schedule: callable from an optimizer to a torch learning-rate scheduler, stepped every iteration.
        param_groups: as torch's.
        seed: of the order of samples, of augmentation and of dropout.
        reduction: "ordered" or "mpi".
        threads_per_rank: torch threads; default: the cores that the rank really has.
        loader_workers: processes on each rank that read a Dataset ahead; 0: it is read between iterations.
        eval_batch_size: samples that one rank evaluates at a time.
        metrics: name -> function of (outputs, targets) returning the SUM over the batch's samples.
        validate_every: epochs between validations; 0: never.
        checkpoint_every: epochs between checkpoints in the run directory; 0: never.
        run_dir: where metrics, checkpoints and weights go; None: nowhere.
        telemetry: where rank 0 records events; default: `metrics.jsonl` in the run directory, and the console.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        optimizer: OptimizerFactory,
        *,
        batch_size: int,
        partitions: int = 8,
        group_size: int | str = "auto",
        schedule: ScheduleFactory | None = None,
        param_groups: Iterable[Mapping[str, Any]] | None = None,
        seed: int = 0,
        reduction: str = "ordered",
        threads_per_rank: int | None = None,
        loader_workers: int = 0,
        eval_batch_size: int = 256,
        metrics: Mapping[str, Metric] | None = None,
        validate_every: int = 1,
        checkpoint_every: int = 1,
        run_dir: str | pathlib.Path | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.model = model
        self.world = init(threads_per_rank)
        self._loss_fn = loss_fn
        self._optimizer = optimizer
        self._param_groups = None if param_groups is None else [dict(group) for group in param_groups]
        self._schedule = schedule
        self._batch_size = batch_size
        self._partitions = partitions
        self._group_size = group_size
        self._seed = seed
        self._reduction = reduction
        self._loader_workers = loader_workers
        self._eval_batch_size = eval_batch_size
        self._metrics = dict(metrics or {})
        self._validate_every = validate_every
        self._checkpoint_every = checkpoint_every if run_dir is not None else 0
        self._run_dir = None if run_dir is None else pathlib.Path(run_dir)
        self._telemetry = telemetry
        self._manager: ParameterManager | None = None
        with self.world.agreed("checking the settings"):
            _check_settings(self.world, batch_size, partitions, group_size)

    # --- training -------------------------------------------------------------------------------------------------

    def fit(
        self, train_set: Any, validation_set: Any = None, *, epochs: int, resume: bool = False
    ) -> list[dict[str, Any]]:
        """Train for `epochs` epochs in all, and write the final weights into the run directory.

        Args:
            train_set: any map-style Dataset, a tuple of arrays or tensors, or a Source.
            validation_set: likewise; None: no validation.
            epochs: of the whole training, the ones before a resumed checkpoint included.
            resume: go on from the run directory's newest checkpoint; start over where there is none.

        Returns:
            The events of epochs and validations, on every rank.

        Raises:
            UserError: on every rank, before the first iteration: something does not fit.
            NonFiniteLossError: on every rank: a loss became NaN or infinite.
        """
        with self.world.agreed("reading the data"):
            train = as_source(train_set)
            validation = None if validation_set is None else as_source(validation_set)
        with self.world.agreed("preparing the run directory"):
            self._prepare_run_dir()
        training = _Training(self, train, validation, epochs, resume)
        try:
            return training.run()
        finally:
            training.close()

    def _prepare_run_dir(self) -> None:
        if self._run_dir is None or self.world.rank > 0:
            return
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            probe = self._run_dir / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"the run directory {self._run_dir} cannot be written: {error.strerror}; choose another run_dir"
            ) from None

    def evaluate(self, data_set: Any) -> dict[str, float]:
        """The mean loss and metrics of a data set; every sample counts once; the same on all ranks."""
        with self.world.agreed("reading the data"):
            source = as_source(data_set)
        if self._manager is None:
            self._open_manager()
        return self._evaluate(source)

    def _evaluate(self, source: Source) -> dict[str, float]:
        return evaluate(
            self.world,
            self.model,
            self._loss_fn,
            source,
            batch_size=self._eval_batch_size,
            metrics=self._metrics,
            seed=self._seed,
            num_workers=self._loader_workers,
        )

    def load(self, path: str | pathlib.Path) -> None:
        """Take weights from a run directory, a checkpoint or a safetensors file.

        Raises:
            CheckpointError, LayoutError: on every rank: there are none, or they do not fit the model.
        """
        state: dict[str, torch.Tensor] = {}
        with self.world.agreed(f"reading {path}"):
            if self.world.rank == 0:
                state = checkpoint.load_weights(path)
        self._open_manager().load_weights(state)

    def close(self) -> None:
        """Give the model private weights back and free the shared memory."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open_manager(self) -> ParameterManager:
        """The manager of the model's parameters, made at first need."""
        if self._manager is None:
            self._manager = ParameterManager(
                self.model,
                self._optimizer,
                reduction=self._reduction,
                param_groups=self._param_groups,
                world=self.world,
                assignment=Assignment.even(self._partitions, self.world.size),
            )
        return self._manager


def _check_settings(world: World, batch_size: int, partitions: int, group_size: int | str) -> None:
    if partitions < world.size:
        raise ConfigError(
            f"{world.size} ranks but only {partitions} partitions; every rank needs at least one; lower -n or raise "
            "partitions"
        )
    if batch_size < partitions:
        raise ConfigError(
            f"batch_size {batch_size} is smaller than partitions {partitions}; every partition needs at least one "
            "sample; raise batch_size or lower partitions"
        )
    if group_size != "auto" and (isinstance(group_size, str) or group_size < 1):
        raise ConfigError(f'group_size is {group_size!r}; it must be "auto" or a number of at least 1')


class _Training:
    """One call of `fit`: the objects that live as long as it, and its course."""

    def __init__(
        self, trainer: Trainer, train: Source, validation: Source | None, epochs: int, resume: bool
    ) -> None:
        self._trainer = trainer
        self._world = trainer.world
        self._validation = validation
        self._telemetry = trainer._telemetry
        if self._telemetry is None and self._world.rank == 0:
            self._telemetry = Telemetry(trainer._run_dir)
        self._manager = trainer._open_manager()
        self._triggers = Triggers(
            iterations_per_epoch=num_iterations(len(train), trainer._batch_size),
            epochs=epochs,
            validate_every=trainer._validate_every if validation is not None else 0,
            checkpoint_every=trainer._checkpoint_every,
        )
        self._num_samples = len(train)
        self._last_checkpoint: pathlib.Path | None = None
        self._first_iteration = self._resume() if resume else 0
        self._loader = Loader(
            train, seed=trainer._seed, num_workers=trainer._loader_workers, shuffle=True
        )
        self._executor = Executor(
            self._manager,
            trainer.model,
            trainer._loss_fn,
            self._loader,
            batch_size=trainer._batch_size,
            seed=trainer._seed,
        )
        group_size = GroupSize(trainer._group_size)
        self._coordinator = self._make_coordinator(group_size) if self._world.rank == 0 else None
        num_groups = len(self._manager.param_groups)
        size = capacity(group_size.largest, self._world.size, num_groups)
        self._channel = PlanChannel(self._world, self._coordinator, size)
        self._history: list[dict[str, Any]] = []
        self._epoch = np.zeros(3)  # loss_sum, weight, samples of the epoch so far
        self._epoch_began = time.perf_counter()

    def _make_coordinator(self, group_size: GroupSize) -> Coordinator:
        trainer = self._trainer
        groups = [{k: v for k, v in g.items() if k != "params"} for g in trainer._param_groups or [{}]]
        return Coordinator(
            num_samples=self._num_samples,
            batch_size=trainer._batch_size,
            assignment=self._manager.assignment,
            triggers=self._triggers,
            group_size=group_size,
            learning_rates=LearningRates(trainer._optimizer, groups, trainer._schedule),
            first_iteration=self._first_iteration,
        )

    def close(self) -> None:
        """Complete what was started and end the loader."""
        self._loader.close()
        if self._telemetry is not None:
            self._telemetry.close()

    # --- the course -----------------------------------------------------------------------------------------------

    def run(self) -> list[dict[str, Any]]:
        """Run all groups; returns the events of epochs and validations."""
        began = time.perf_counter()
        self._record("start", **describe_start(self._facts()))
        self._trainer.model.train()
        if self._first_iteration < self._triggers.total_iterations:
            self._channel.start()
            plan: GroupPlan | None = self._channel.receive()
            self._executor.request(plan)
            while plan is not None:
                plan = self._run_group(plan)
        self._finish(time.perf_counter() - began)
        return self._history

    def _run_group(self, plan: GroupPlan) -> GroupPlan | None:
        """Run one group and what is due at its end; returns the next plan, None after the last."""
        following = None
        is_last = bool(plan.actions & Action.END)
        if not is_last:
            self._channel.start()
        began = time.perf_counter()
        sums = np.zeros(3)
        for index in range(plan.num_iterations):
            try:
                table = self._executor.iterate(plan, index)
            except NonFiniteLossError as error:
                self._channel.drop()
                self._fail(error)
                raise
            sums += table[:, [LOSS_SUM, WEIGHT, SAMPLES]].sum(axis=0)
            if index == 0 and not is_last:
                following = self._channel.receive()
                self._executor.request(following)
        self._report(plan, sums, time.perf_counter() - began)
        self._act(plan)
        return following

    def _report(self, plan: GroupPlan, sums: NDArray[np.float64], seconds: float) -> None:
        """The group's one gather: times of all ranks to the coordinator."""
        self._epoch += sums
        times = self._world.gather(self._executor.take_seconds())
        if self._coordinator is None or times is None:
            return
        self._coordinator.observe(plan, seconds)
        busy = times[:, :2].sum(axis=1)
        self._record(
            "group",
            epoch=plan.epoch + 1,
            iteration=plan.first_iteration + plan.num_iterations,
            iterations=plan.num_iterations,
            samples=int(sums[2]),
            loss=sums[0] / sums[1],
            lr=plan.learning_rates[-1][0],
            seconds=seconds,
            samples_per_s=sums[2] / seconds,
            group_size=plan.num_iterations,
            phases=dict(zip(REPORT_FIELDS, times.mean(axis=0).tolist(), strict=True)),
            wait_s=float(times[:, REPORT_FIELDS.index("wait")].mean()),
            slowest_rank=int(busy.argmax()),
        )

    def _act(self, plan: GroupPlan) -> None:
        """What is due at the group's end, by all ranks together."""
        done = plan.first_iteration + plan.num_iterations
        epoch = plan.epoch + 1
        if plan.actions & Action.END_EPOCH:
            seconds = time.perf_counter() - self._epoch_began
            loss, samples = self._epoch[0] / self._epoch[1], int(self._epoch[2])
            self._event("epoch", epoch=epoch, iteration=done, loss=float(loss), samples=samples, seconds=seconds)
            self._epoch[:] = 0
        if plan.actions & Action.VALIDATE and self._validation is not None:
            began = time.perf_counter()
            result = self._trainer._evaluate(self._validation)
            self._event("validation", epoch=epoch, iteration=done, **result, seconds=time.perf_counter() - began)
        if plan.actions & Action.CHECKPOINT:
            self._save(epoch, done)
        if plan.actions & Action.END_EPOCH:
            self._epoch_began = time.perf_counter()

    def _event(self, event: str, **fields: Any) -> None:
        if event == "epoch":
            fields["samples_per_s"] = fields["samples"] / fields["seconds"]
        self._history.append({"event": event, **fields})
        self._record(event, **fields)

    def _record(self, event: str, **fields: Any) -> None:
        if self._world.rank == 0 and self._telemetry is not None:
            self._telemetry.record(event, **fields)

    # --- checkpoints and the end ----------------------------------------------------------------------------------

    def _save(self, epoch: int, iteration: int) -> None:
        run_dir = self._trainer._run_dir
        assert run_dir is not None, "checkpoints are due only where there is a run directory"
        began = time.perf_counter()
        path = checkpoint.checkpoint_path(run_dir, epoch)
        progress = {"epoch": epoch, "iteration": iteration, **self._identity()}
        size = checkpoint.save(self._manager, path, progress)
        self._last_checkpoint = path
        seconds = time.perf_counter() - began
        self._record("checkpoint", epoch=epoch, iteration=iteration, path=str(path), bytes=size, seconds=seconds)

    def _identity(self) -> dict[str, Any]:
        """What must be the same in a resumed run for the same numbers."""
        trainer = self._trainer
        return {
            "seed": trainer._seed,
            "batch_size": trainer._batch_size,
            "partitions": trainer._partitions,
            "train_samples": self._num_samples,
            "threads_per_rank": self._world.threads_per_rank,
        }

    def _resume(self) -> int:
        """Load the newest checkpoint; returns the first iteration to run."""
        run_dir = self._trainer._run_dir
        if run_dir is None:
            raise on_all_ranks(ConfigError("resume needs a run_dir to resume from"))
        found = checkpoint.list_checkpoints(run_dir) if self._world.rank == 0 else []
        path = self._world.broadcast_object(found[-1][1] if found else None)
        if path is None:
            self._record("warning", message=f"{run_dir} holds no checkpoint; the run starts over")
            return 0
        progress = checkpoint.load(self._manager, path)
        threads = progress["threads_per_rank"]
        self._world = self._trainer.world = init(threads)
        for name, value in self._identity().items():
            if progress[name] != value:
                raise on_all_ranks(
                    CheckpointError(
                        f"{path} was written with {name} {progress[name]}, this run has {value}; resume with the same"
                    )
                )
        self._last_checkpoint = path
        return int(progress["iteration"])

    def _fail(self, error: NonFiniteLossError) -> None:
        last = self._last_checkpoint
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        advice = "; lower the learning rate, or look at that batch"
        error.args = (f"{error}; all ranks stopped before its update; {kept}{advice}",)
        self._record("end", status="failed", message=str(error), run_dir=_text(self._trainer._run_dir))

    def _finish(self, seconds: float) -> None:
        weights = None
        run_dir = self._trainer._run_dir
        with self._world.agreed("writing the weights"):
            if run_dir is not None and self._world.rank == 0:
                weights = run_dir / checkpoint.WEIGHTS
                checkpoint.save_weights(self._trainer.model.state_dict(), weights)
        ended = [event for event in self._history if event["event"] == "epoch"]
        validations = [event for event in self._history if event["event"] == "validation"]
        samples = sum(event["samples"] for event in ended)
        self._record(
            "end",
            status="finished",
            iterations=self._triggers.total_iterations,
            epochs=self._triggers.epochs,
            seconds=seconds,
            samples_per_s=samples / seconds,
            loss=ended[-1]["loss"] if ended else None,
            validation={k: v for k, v in validations[-1].items() if k != "event"} if validations else {},
            weights=_text(weights),
            run_dir=_text(run_dir),
        )

    def _facts(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "manager": self._manager,
            "batch_size": trainer._batch_size,
            "group_size": trainer._group_size,
            "reduction": trainer._reduction,
            "seed": trainer._seed,
            "train_samples": self._num_samples,
            "validation_samples": 0 if self._validation is None else len(self._validation),
            "triggers": self._triggers,
            "first_iteration": self._first_iteration,
            "run_dir": _text(trainer._run_dir),
        }


def _text(path: pathlib.Path | None) -> str | None:
    return None if path is None else str(path)
