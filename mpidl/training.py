"""One training: its course from the first plan to the final weights.

For each group: every rank has its plan; the broadcast of the next one is started; the group's iterations run without
any other message; a gather brings the ranks' times to the coordinator; what is due (validation, checkpoint, the end) is
done by all ranks together. The next plan is received after the group's first iteration, so that the loader reads ahead
over the group's edge.

Where the next plan depends on a validation (the plan has the action WAIT, in a training with a plateau schedule only),
it is built, broadcast and received after the group and all that is due at its end, and nothing is read ahead.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpidl import checkpoint
from mpidl.data import Loader, Source
from mpidl.errors import CheckpointError, ConfigError, NonFiniteLossError
from mpidl.parameters import ParameterManager
from mpidl.parameters.counters import LOSS_SUM, SAMPLES, WEIGHT
from mpidl.runtime import World, init, on_all_ranks
from mpidl.scheduling import (
    REPORT_FIELDS,
    Action,
    Coordination,
    Coordinator,
    Executor,
    GroupPlan,
    GroupSize,
    LearningRates,
    PlanChannel,
    Triggers,
    capacity,
    check_schedule,
    num_iterations,
)
from mpidl.settings import Settings
from mpidl.summary import describe_end, describe_start
from mpidl.telemetry import Telemetry


class Training:
    """One call of `fit`: the objects that live as long as it, and its course."""

    def __init__(
        self,
        settings: Settings,
        world: World,
        manager: ParameterManager,
        train: Source,
        validation: Source | None,
        *,
        epochs: int,
        resume: bool,
        make_executor: Callable[..., Executor] = Executor,
    ) -> None:
        self._settings = settings
        self._world = world
        self._manager = manager
        self._validation = validation
        self._validation_loader: Loader | None = None
        self._telemetry = settings.telemetry
        if self._telemetry is None and world.rank == 0:
            self._telemetry = Telemetry(settings.run_dir)
        self._triggers = Triggers(
            iterations_per_epoch=num_iterations(len(train), settings.batch_size),
            epochs=epochs,
            validate_every=settings.validate_every if validation is not None else 0,
            checkpoint_every=settings.checkpoint_every if settings.run_dir is not None else 0,
        )
        self._num_samples = len(train)
        # All results, also those before a resumed checkpoint: learning rates may depend on them.
        self._validations: list[dict[str, Any]] = []
        self._last_checkpoint: pathlib.Path | None = None
        self._first_iteration = self._resume() if resume else 0
        self._loader = Loader(train, seed=settings.seed, num_workers=settings.loader_workers, shuffle=True)
        self._executor = make_executor(
            manager,
            settings.model,
            settings.loss_fn,
            self._loader,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        self._coordination = Coordination()
        group_size = GroupSize(settings.group_size, settings.max_group_seconds)
        self._coordinator: Coordinator | None = None
        with world.agreed("making the learning-rate schedule"):
            if world.rank == 0:
                self._coordinator = self._make_coordinator(group_size)
        size = capacity(group_size.largest, world.size, len(manager.param_groups))
        self._channel = PlanChannel(world, self._coordinator, size)
        self._history: list[dict[str, Any]] = []
        self._epoch = np.zeros(3)  # loss_sum, weight, samples of the epoch so far
        self._began = self._epoch_began = time.perf_counter()

    def _make_coordinator(self, group_size: GroupSize) -> Coordinator:
        settings = self._settings
        groups = [{k: v for k, v in g.items() if k != "params"} for g in settings.param_groups or [{}]]
        validated = ("loss", *settings.metrics) if self._triggers.validate_every else ()
        check_schedule(settings.optimizer, groups, settings.schedule, self._triggers.total_iterations, validated)
        coordinator = Coordinator(
            num_samples=self._num_samples,
            batch_size=settings.batch_size,
            assignment=self._manager.assignment,
            triggers=self._triggers,
            group_size=group_size,
            learning_rates=LearningRates(settings.optimizer, groups, settings.schedule),
            first_iteration=self._first_iteration,
        )
        for result in self._validations:
            # The last epoch's validation is due nowhere else: a longer, undisturbed training has none there.
            if Action.VALIDATE in self._triggers.actions_after(result["iteration"]):
                coordinator.validated(result["iteration"], result)
        return coordinator

    def close(self) -> None:
        """Complete what was started and end the loader."""
        self._loader.close()
        if self._validation_loader is not None:
            self._validation_loader.close()
        if self._telemetry is not None:
            self._telemetry.close()

    # --- the course -----------------------------------------------------------------------------------------------

    def run(self) -> list[dict[str, Any]]:
        """Run all groups; returns the events of epochs and validations."""
        self._record("start", **describe_start(self._facts()))
        if not self._settings.model.training:
            self._settings.model.train()
        if self._first_iteration < self._triggers.total_iterations:
            self._send()
            following = self._run_group(self._receive())
            while following is not None:
                following = self._run_group(following)
        self._finish(time.perf_counter() - self._began)
        return self._history

    def _run_group(self, plan: GroupPlan) -> GroupPlan | None:
        """Run one group and what is due at its end; returns the next plan, None after the last."""
        following = None
        is_sent_ahead = not plan.actions & (Action.END | Action.WAIT)
        if is_sent_ahead:
            self._send()
        began = time.perf_counter()
        sums = np.zeros(3)
        for index in range(plan.num_iterations):
            try:
                table = self._executor.iterate(plan, index)
            except NonFiniteLossError as error:
                self._channel.drop()
                self._fail(error, done=plan.first_iteration + index)
                raise
            sums += table[:, [LOSS_SUM, WEIGHT, SAMPLES]].sum(axis=0)
            if index == 0 and is_sent_ahead:
                following = self._receive()
        seconds = time.perf_counter() - began
        with self._coordination.timed():
            self._report(plan, sums, seconds)
        self._act(plan)
        if plan.actions & Action.WAIT:
            self._send()
            following = self._receive()
        return following

    def _send(self) -> None:
        """Start the broadcast of a plan."""
        with self._coordination.timed():
            self._channel.start()

    def _receive(self) -> GroupPlan:
        """Complete the broadcast of a plan, and let the loader read what it needs."""
        with self._coordination.timed():
            plan = self._channel.receive()
        self._executor.request(plan)
        return plan

    def _report(self, plan: GroupPlan, sums: NDArray[np.float64], seconds: float) -> None:
        """The group's one gather: times of all ranks to the coordinator."""
        self._epoch += sums
        times = self._world.for_purpose("report").gather(self._executor.take_seconds())
        coordination_s = self._coordination.end_group(plan.num_iterations, seconds)
        if self._coordinator is None or times is None:
            return
        self._coordinator.observe(plan, seconds, coordination_s)
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
            coordination_s=coordination_s,
            coordination_share=self._coordinator.group_size.share,
            bucket_bytes=self._manager.bucket_bytes,
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
            if self._validation_loader is None:
                self._validation_loader = self._settings.open_validation_loader(self._validation)
            result = self._settings.evaluate(self._world, self._validation, self._validation_loader)
            self._event("validation", epoch=epoch, iteration=done, **result, seconds=time.perf_counter() - began)
            self._validations.append({"iteration": done, **result})
            if self._coordinator is not None:
                self._coordinator.validated(done, result)
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
        run_dir = self._settings.run_dir
        assert run_dir is not None, "checkpoints are due only where there is a run directory"
        began = time.perf_counter()
        path = checkpoint.checkpoint_path(run_dir, epoch)
        progress = {"epoch": epoch, "iteration": iteration, "validations": self._validations, **self._identity()}
        size = checkpoint.save(self._manager, path, progress)
        self._last_checkpoint = path
        seconds = time.perf_counter() - began
        self._record("checkpoint", epoch=epoch, iteration=iteration, path=str(path), bytes=size, seconds=seconds)

    def _identity(self) -> dict[str, Any]:
        """What must be the same in a resumed run for the same numbers."""
        settings = self._settings
        return {
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "partitions": settings.partitions,
            "train_samples": self._num_samples,
            "threads_per_rank": self._world.threads_per_rank,
        }

    def _resume(self) -> int:
        """Load the newest checkpoint; returns the first iteration to run."""
        run_dir = self._settings.run_dir
        if run_dir is None:
            raise on_all_ranks(ConfigError("resume needs a run_dir to resume from"))
        found = checkpoint.list_checkpoints(run_dir) if self._world.rank == 0 else []
        path = self._world.broadcast_object(found[-1][1] if found else None)
        if path is None:
            self._record("warning", message=f"{run_dir} holds no checkpoint; the run starts over")
            return 0
        progress = checkpoint.load(self._manager, path)
        threads = progress["threads_per_rank"]
        self._world = init(threads).for_purpose("setup")
        for name, value in self._identity().items():
            if progress[name] != value:
                raise on_all_ranks(
                    CheckpointError(
                        f"{path} was written with {name} {progress[name]}, this run has {value}; resume with the same"
                    )
                )
        self._last_checkpoint = path
        self._validations = progress.get("validations", [])
        return int(progress["iteration"])

    def _fail(self, error: NonFiniteLossError, done: int) -> None:
        """Say where the last good weights are, and record the end after `done` iterations."""
        last = self._last_checkpoint
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        advice = "; lower the learning rate, or look at that batch"
        error.args = (f"{error}; all ranks stopped there; {kept}{advice}",)
        self._record(
            "end",
            status="failed",
            message=str(error),
            iterations=done,
            epochs=done // self._triggers.iterations_per_epoch,
            seconds=time.perf_counter() - self._began,
            run_dir=_text(self._settings.run_dir),
        )

    def _finish(self, seconds: float) -> None:
        weights = None
        run_dir = self._settings.run_dir
        with self._world.agreed("writing the weights"):
            if run_dir is not None and self._world.rank == 0:
                weights = run_dir / checkpoint.WEIGHTS
                checkpoint.save_weights(self._settings.model.state_dict(), weights)
        self._record(
            "end",
            **describe_end(self._history, self._triggers, seconds),
            **self._coordination.describe(),
            weights=_text(weights),
            run_dir=_text(run_dir),
        )

    def _facts(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "manager": self._manager,
            "batch_size": settings.batch_size,
            "group_size": settings.group_size,
            "reduction": settings.reduction,
            "wire": settings.wire,
            "seed": settings.seed,
            "train_samples": self._num_samples,
            "validation_samples": 0 if self._validation is None else len(self._validation),
            "triggers": self._triggers,
            "first_iteration": self._first_iteration,
            "run_dir": _text(settings.run_dir),
        }


def _text(path: pathlib.Path | None) -> str | None:
    return None if path is None else str(path)
