"""One training: its course from the first plan to the final weights.

For each group: every rank has its plan; the broadcast of the next one is started; the group's iterations run without
any other message; a gather brings the ranks' times to the coordinator. The next plan is received after the group's
first iteration, or before it where it is the only one, so that the loader reads ahead over the group's edge.

After every iteration each rank finds out by itself, from what came with the gradients, what is due (`triggers.py`):
validation, checkpoint, summary, the end; or that some rank asks all to stop (`stopping.py`). All ranks find the same,
and do it together, in the middle of a group or at its end; then the group goes on. Where the training ends, a plan that
is under way is received and dropped.

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

from mpidl import checkpoint, local_folder
from mpidl.config import FINISHED
from mpidl.data import Loader, Source
from mpidl.errors import CheckpointError, MpidlError, NonFiniteLossError
from mpidl.keeping import Keeping
from mpidl.parameters import Assignment, ParameterManager
from mpidl.parameters.counters import DROPPED, FLAGS, LOSS_SUM, SAMPLES, SECONDS, WEIGHT
from mpidl.planning import make_coordinator, make_header, make_triggers, measured
from mpidl.progress import ONLY_AT_END, Checkpoints, Progress, mark_finished
from mpidl.reports import Reports
from mpidl.runtime import World, activity, on_all_ranks, signals, watch
from mpidl.runtime.faults import is_on_all_ranks
from mpidl.runtime.spans import MAIN
from mpidl.scheduling import (
    STOP_FILE,
    Action,
    Coordinator,
    Executor,
    Group,
    GroupPlan,
    GroupSize,
    PlanChannel,
    PlanLog,
    Replay,
    StopRequests,
    capacity,
    describe_stop,
    end_time_of_job,
    last_partitions,
    take_away,
)
from mpidl.settings import Settings
from mpidl.start import Left, Start
from mpidl.summary import (
    describe_end,
    describe_histograms,
    describe_lost,
    describe_place,
    describe_recovery,
    describe_start,
)
from mpidl.tracing import Tracing


class Training:
    """One call of `fit`, or what of it is between two losses of ranks: the objects that live as long, and the course.

    Args:
        settings: of the Trainer.
        world: all ranks.
        manager: of the parameters.
        train: the training set.
        validation: the validation set.
        epochs: of the whole training.
        start: where it begins.
        make_executor: as Executor.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        manager: ParameterManager,
        train: Source,
        validation: Source | None,
        *,
        epochs: int,
        start: Start,
        make_executor: Callable[..., Executor] = Executor,
    ) -> None:
        self._began = self._epoch_began = time.perf_counter()
        if start.left is not None:
            self._began = start.left.began
        self._settings = settings
        self._world = world
        self._manager = manager
        self._validation = validation
        self._validation_loader: Loader | None = None
        replay, left, self._loss = start.replay, start.left, start.loss
        self._telemetry = settings.telemetry or (left.telemetry if left else None)
        if self._telemetry is None and world.rank == 0:
            self._telemetry = settings.make_telemetry()
        self._num_samples = len(train)
        self._source = "memory" if start.found is not None else "a checkpoint"
        self._replay = replay
        self._triggers = make_triggers(settings, len(train), epochs, validates=validation is not None, replay=replay)
        per_epoch = self._triggers.iterations_per_epoch
        self._checkpoints = Checkpoints(settings, world, manager, self._num_samples, per_epoch, self._tell_checkpoint)
        if left is not None:
            self._checkpoints.last, self._checkpoints.last_iteration = left.newest
        self._history: list[dict[str, Any]] = []
        self._summary_sums = np.zeros(3)
        self._clock = 0.0
        """The clock of the rank with partition 0, when the last iteration ended."""
        self._keeping = Keeping(settings, world, manager, start)
        self._progress = self._where_to_begin(start)
        self.memory: checkpoint.Memory | None = None
        """What is kept for the case that ranks are lost."""
        survives, files = settings.survives(world) and replay is None, self._keeping.files
        if survives or files is not None:
            before = None if start.found is None else start.found.before
            self.memory = checkpoint.Memory(manager, world, before, files, survives=survives)
        self._survives = survives
        self._first_iteration = self._settled = self._progress.iteration
        """And up to where all is done that was due."""
        self._lost: list[dict[str, Any]] = list(left.lost) if left else []
        self._done_before, self._begun_before = (left.done, left.begun) if left else (0, -1)
        """How far the course before had come, and its last checkpoint."""
        if start.loss is not None:
            self._lost += describe_lost(start.loss.lost, self._first_iteration)
        group_size = GroupSize(settings.group_size, settings.max_group_seconds)
        self._coordinator: Coordinator | Replay | None = None
        with world.agreed("making the learning-rate schedule"):
            self._triggers.check(measured(settings, self._triggers))
            if world.rank == 0:
                self._coordinator = Replay(replay, world.size) if replay else self._make_coordinator(group_size)
        self._remember_validations()
        self._loader = left.loader if left else settings.open_train_loader(train)
        self._stop_requests = self._listen()
        watch(settings.hang_seconds, settings.on_hang, settings.run_dir, is_training=True, survives=survives)
        self._executor = make_executor(
            manager,
            settings.model,
            settings.loss_fn,
            self._loader,
            batch_size=settings.batch_size,
            seed=settings.seed,
            stop_flags=self._stop_requests.flags,
            drop_share=settings.drop_share,
            drops=None if replay is None else replay.drops,
        )
        if left is not None:
            self._take_over(left)
        largest = replay.largest_group if replay else group_size.largest
        size = capacity(min(largest, per_epoch), world.size, len(manager.param_groups))
        self._channel = PlanChannel(world, self._coordinator, size)
        self._reports = Reports(manager, self._executor, self._coordinator, group_size, self._record)
        self._coordination = self._reports.coordination
        total = self._triggers.total_iterations
        self._tracing = Tracing(settings.trace, self._first_iteration, total, world, settings.run_dir, self._record)
        self._acts: list[tuple[int, Action]] = []
        """What was done in this group: iterations that were done, and the action."""
        self._dropped: list[tuple[int, tuple[int, ...]]] = []
        """And what was dropped: iterations that were done, and the last one's partitions."""
        self._groups: list[Group] = left.groups if left else []
        """The last two that have ended, by a loss too."""
        self._plan_log: PlanLog | None = None
        self.stopped: str | None = None
        """Why it ended before its time; None: it did not."""

    def _listen(self) -> StopRequests:
        signals.listen()
        is_first, run_dir = self._world.rank == 0, self._settings.run_dir
        stop_file = None if run_dir is None or not is_first else run_dir / STOP_FILE
        max_seconds = None if self._replay else self._settings.max_seconds
        if max_seconds is not None:
            max_seconds -= time.perf_counter() - self._began
        self._end_time = end_time_of_job(max_seconds) if is_first else None
        made = StopRequests(stop_file, self._end_time)
        if self._loss is None:
            made.obeyed()  # by an earlier run that ended before it saw the file
        return made

    def _make_coordinator(self, group_size: GroupSize) -> Coordinator:
        settings, first = self._settings, self._first_iteration
        return make_coordinator(settings, self._manager, self._triggers, group_size, self._num_samples, first)

    def _resumed(self) -> Progress:
        """What the newest checkpoint holds, loaded."""
        found = self._checkpoints.load_newest()
        if found is None:
            self._record("warning", message=f"{self._settings.run_dir} holds no checkpoint; the run starts over")
            return Progress()
        # A longer, undisturbed training would not have had those of the end.
        found.validations = [each for each in found.validations if not each.get(ONLY_AT_END)]
        return found

    def _where_to_begin(self, start: Start) -> Progress:
        """What is done already, with weights and optimizer as they were then."""
        if start.found is not None:
            return self._recovered(start.found)
        if not start.resume:
            return Progress()
        found = self._keeping.find(self._checkpoints, self._record)
        if found is None:
            return self._resumed()
        progress = self._recovered(found)
        self._checkpoints.take_threads(found.state)
        return progress

    def _recovered(self, found: checkpoint.Found) -> Progress:
        """What was kept when a group began, loaded."""
        found.restore(self._manager, self._world)
        self._summary_sums = np.array(found.state["summary_sums"])
        return Progress.of(found.state)

    def _take_over(self, left: Left) -> None:
        """Go on with what the course before has left."""
        self._validation_loader = left.validation_loader
        self._executor.go_on_from(left.clock_began, left.drops)
        self._history = [event for event in left.history if event["iteration"] <= self._first_iteration]

    def abandon(self) -> Left:
        """Let go of what a loss has made useless, and leave the rest to the next course. Not collective."""
        self._world.activity.spans.end()  # one rank's part of a trace is of no use
        self._checkpoints.abandon()
        done = self._progress.iteration
        if self.memory is not None:
            self.memory.freeze(*((done, self._kept_state()) if done == self._settled else ()))
        if self._plan_log is not None:
            self._plan_log.close()
        for loader in filter(None, (self._loader, self._validation_loader)):
            loader.forget()
        return Left(
            loader=self._loader,
            validation_loader=self._validation_loader,
            history=self._history,
            began=self._began,
            clock_began=self._executor.began,
            drops=self._executor.drops,
            newest=(self._checkpoints.last, self._checkpoints.last_iteration),
            begun=max(self._checkpoints.begun, self._begun_before),
            groups=self._groups,
            done=done,
            telemetry=self._telemetry,
            lost=self._lost,
        )

    def _remember_validations(self) -> None:
        for result in self._progress.validations:
            self._triggers.validated(result)
            if self._coordinator is not None:
                self._coordinator.validated(result["iteration"], result)

    def close(self) -> None:
        """Complete what was started and end the loader."""
        signals.stop_listening()
        self._world.activity.spans.end()  # where an error has ended the training
        watch(self._settings.hang_seconds, "warn")
        self._world.activity.enter(activity.OWN_CODE)
        self._loader.close()
        if self._plan_log is not None:
            self._plan_log.close()
        if self._validation_loader is not None:
            self._validation_loader.close()
        if self._telemetry is not None:
            self._telemetry.close()

    # --- the course -----------------------------------------------------------------------------------------------

    def run(self) -> list[dict[str, Any]]:
        """Run all groups; returns the events of epochs and validations."""
        try:
            self._run()
        except MpidlError as error:
            if is_on_all_ranks(error):  # else the others may be anywhere, and the job ends
                self._checkpoints.finish()
            raise
        return self._history

    def _run(self) -> None:
        self._tell_loss()
        self._keeping.began()
        self._record("start", **describe_start(self._facts()))
        self._warn_of_idle_ranks()
        if self._world.rank == 0 and self._settings.run_dir is not None:
            take_away(self._settings.run_dir / FINISHED)
            settings, epochs = self._settings, self._triggers.epochs
            header = make_header(settings, self._world, self._num_samples, epochs)
            self._plan_log = PlanLog(self._settings.run_dir, header)
            for group in self._groups:  # who was rank 0 may have been lost before it had written what is not repeated
                if group.plan.first_iteration < self._first_iteration:
                    self._plan_log.write(group.cut(self._first_iteration))
        if not self._settings.model.training:
            self._settings.model.train()
        if not self._is_over():
            self._progress.ended_by = None
            self._send()
            following = self._run_group(self._receive())
            while following is not None:
                following = self._run_group(following)
        self._finish()

    def _tell_loss(self) -> None:
        """Record what was lost, and where the training goes on."""
        if self._loss is None:
            return
        seconds = time.perf_counter() - self._loss.noticed
        first = self._first_iteration
        repeated = self._done_before - first
        told = describe_recovery(self._loss.lost, self._world.size, first, repeated, seconds, self._source)
        self._record("recovery", **told)
        if self._checkpoints.lacks(self._begun_before, first):
            with self._world.activity.within(activity.CHECKPOINT):
                self._checkpoints.save(self._progress)

    def _warn_of_idle_ranks(self) -> None:
        settings, size = self._settings, self._world.size
        parts = last_partitions(self._num_samples, settings.batch_size, settings.partitions)
        if self._triggers.iterations_per_epoch == 1 and parts < size:
            idle = f"ranks from {parts} on have nothing to do, and signals to them are not seen"
            self._record("warning", message=f"{self._num_samples} samples fill {parts} of the partitions: {idle}")

    def _is_over(self) -> bool:
        """Whether the checkpoint that this run began from is of a training that has ended."""
        progress, triggers = self._progress, self._triggers
        has_ended = progress.ended_by is not None and progress.ended_by == repr(triggers.end)
        return progress.iteration > 0 and (has_ended or progress.iteration >= triggers.total_iterations)

    def _run_group(self, plan: GroupPlan) -> GroupPlan | None:
        """Run one group and what is due on its way; returns the next plan, None after the last."""
        if self.memory is not None:
            self.memory.keep(self._progress.iteration, self._kept_state(), self._clock)
        try:
            return self._run_iterations(plan)
        except NonFiniteLossError as error:
            self._channel.drop()
            self._fail(error)
            raise
        finally:
            self._groups = [*self._groups[-1:], self._carried_out(plan)]
            self._write_down(plan)
            self._acts.clear()
            self._dropped.clear()

    def _kept_state(self) -> dict[str, Any]:
        """What is kept with weights and optimizer for the case that ranks are lost."""
        return {**self._checkpoints.describe(self._progress), "summary_sums": self._summary_sums.tolist()}

    def _write_down(self, plan: GroupPlan) -> None:
        """Keep the group as far as it was carried out."""
        if self._plan_log is not None:
            with self._coordination.timed():
                self._plan_log.write(self._carried_out(plan))

    def _carried_out(self, plan: GroupPlan) -> Group:
        return Group(plan, self._progress.iteration - plan.first_iteration, tuple(self._acts), tuple(self._dropped))

    def _run_iterations(self, plan: GroupPlan) -> GroupPlan | None:
        following = None
        is_sent_ahead = not plan.actions & (Action.END | Action.WAIT)
        if is_sent_ahead:
            self._send()
        if is_sent_ahead and plan.num_iterations == 1:
            following = self._receive()  # behind its only iteration, reading could not run ahead
        seconds = 0.0
        for index in range(plan.num_iterations):
            if self._tracing.is_due(self._progress.iteration):
                self._executor.settle()
                self._tracing.turn(self._progress.iteration)
            began = time.perf_counter()
            table = self._iterate(plan, index)
            if index == 0 and is_sent_ahead and following is None:
                following = self._receive()
            seconds += time.perf_counter() - began
            is_end = index == plan.num_iterations - 1
            if is_end:
                self._reports.gather(plan, index + 1, seconds)
            if not self._act(plan, self._executor.assignment(plan, index), table):
                self._channel.drop()
                if not is_end:
                    self._reports.gather(plan, index + 1, seconds)
                return None
            self._settled = self._progress.iteration
            if self._progress.iteration > self._first_iteration + 1:
                self._stop_requests.took_iteration(time.perf_counter() - began)
            elif self._triggers.checkpoint is not None:  # the first one compiles, and makes the optimizer's state
                self._executor.settle()
                self._checkpoints.prepare()
        if plan.actions & Action.WAIT:
            self._send()
            following = self._receive()
        return following

    def _send(self) -> None:
        """Start the broadcast of a plan."""
        with self._coordination.timed(), self._world.activity.spans.within(MAIN, "building and sending a plan"):
            self._channel.start()

    def _receive(self) -> GroupPlan:
        """Complete the broadcast of a plan, and let the loader read what it needs."""
        with self._coordination.timed(), self._world.activity.within(activity.PLAN):
            plan = self._channel.receive()
        return self._executor.accept(plan)

    def _iterate(self, plan: GroupPlan, index: int) -> NDArray[np.float64]:
        table = self._executor.iterate(plan, index)
        self._progress.iteration += 1
        if table[:, FLAGS].any():
            (dropped,) = np.nonzero(table[:, FLAGS].astype(int) & DROPPED)
            self._dropped += [(self._progress.iteration, tuple(dropped.tolist()))] if dropped.size else []
        self._reports.add(table)
        self._checkpoints.poll()
        self._clock = float(table[0, SECONDS])
        sums = table[:, [LOSS_SUM, WEIGHT, SAMPLES]].sum(axis=0)
        self._progress.epoch_sums += sums
        self._summary_sums += sums
        return table

    # --- what is due ----------------------------------------------------------------------------------------------

    def _act(self, plan: GroupPlan, assignment: Assignment, table: NDArray[np.float64]) -> bool:
        """Do what is due after an iteration, all ranks together; returns whether the training goes on.

        Args:
            plan: of the group.
            assignment: of the iteration.
            table: its counters.
        """
        triggers, progress = self._triggers, self._progress
        loss, seconds = table[:, LOSS_SUM].sum() / table[:, WEIGHT].sum(), table[0, SECONDS]
        facts = triggers.facts(progress.iteration, loss, seconds, progress.newest_validation)
        ends_epoch = progress.iteration % triggers.iterations_per_epoch == 0
        if ends_epoch:
            self._did(Action.END_EPOCH)
            self._tell_epoch()
            progress.epoch_sums[:] = 0
        only_at_end = facts.is_last and not triggers.holds_before_end(triggers.validate, facts)
        if triggers.fires(triggers.validate, facts):
            self._validate(only_at_end=only_at_end)
            facts = triggers.facts(progress.iteration, loss, seconds, progress.newest_validation)
        if triggers.fires(triggers.summarize, facts):
            self._summarize()
        if facts.is_last:
            self._did(Action.END)
            if not ends_epoch:
                self._tell_epoch()
            if progress.iteration < triggers.total_iterations:
                progress.ended_by = repr(triggers.end)
        if triggers.fires(triggers.checkpoint, facts):
            self._save(plan)
        stop = describe_stop(table[:, FLAGS].astype(int), assignment)
        if stop is not None and not facts.is_last:
            self._stop(plan, stop)
        if ends_epoch:
            self._epoch_began = time.perf_counter()
        return not facts.is_last and stop is None

    def _did(self, action: Action) -> None:
        self._acts.append((self._progress.iteration, action))

    @property
    def _epoch(self) -> int:
        """The number of the epoch, from 1, that the last iteration belongs to."""
        return -(-self._progress.iteration // self._triggers.iterations_per_epoch)

    def _tell_epoch(self) -> None:
        sums, seconds = self._progress.epoch_sums, time.perf_counter() - self._epoch_began
        loss, samples = float(sums[0] / sums[1]), int(sums[2])
        self._event("epoch", loss=loss, samples=samples, seconds=seconds, **self._reports.drops("epoch"))
        if self._settings.histograms:
            self._executor.settle()
            if self._world.rank == 0:
                told = describe_histograms(self._settings.model)
                self._record("histograms", epoch=self._epoch, iteration=self._progress.iteration, parameters=told)

    def _summarize(self) -> None:
        """Write down how the training goes: the loss since the last summary, the gradient's norm."""
        self._did(Action.SUMMARIZE)
        self._executor.settle()
        sums, self._summary_sums = self._summary_sums, np.zeros(3)
        self._record(
            "summary",
            epoch=self._epoch,
            iteration=self._progress.iteration,
            loss=sums[0] / sums[1],
            samples=int(sums[2]),
            lr=self._manager.param_groups[0]["lr"],
            grad_norm=self._manager.grad_norm,
        )

    def _validate(self, *, only_at_end: bool) -> None:
        assert self._validation is not None, "validations are due only where there is a validation set"
        self._did(Action.VALIDATE)
        if only_at_end:
            self._did(Action.ONLY_AT_END)
        self._executor.settle()
        began = time.perf_counter()
        if self._validation_loader is None:
            self._validation_loader = self._settings.open_validation_loader(self._validation)
        with self._world.activity.within(activity.VALIDATION):
            result = self._settings.evaluate(self._world, self._validation, self._validation_loader)
        self._event("validation", **result, seconds=time.perf_counter() - began)
        kept = {"iteration": self._progress.iteration, **result}
        self._progress.validations.append(kept | {ONLY_AT_END: True} if only_at_end else kept)
        self._triggers.validated(result)
        if self._coordinator is not None:
            self._coordinator.validated(self._progress.iteration, result)

    def _save(self, plan: GroupPlan) -> None:
        self._did(Action.CHECKPOINT)
        self._executor.settle()
        self._write_down(plan)  # what the checkpoint holds, in case that this run is killed
        with self._world.activity.within(activity.CHECKPOINT):
            self._checkpoints.save(self._progress)

    def _tell_checkpoint(self, event: str, **fields: Any) -> None:
        """One is complete, or something is wrong with one."""
        if event == "checkpoint":
            self._stop_requests.took_checkpoint(fields["seconds"])
        self._record(event, **fields)

    def _stop(self, plan: GroupPlan, reason: str) -> None:
        """Keep what there is, and say how to go on."""
        self._executor.settle()
        kept = "nothing is kept, since there is no run directory"
        if self._settings.run_dir is not None:
            with self._world.activity.within(activity.CHECKPOINT):
                self._checkpoints.complete()
            if self._checkpoints.last_iteration != self._progress.iteration:
                self._save(plan)
            self._finish_checkpoints()
            kept = f"mpidl train --resume {self._settings.run_dir} goes on (in Python: resume=True)"
            if local_folder.announced is not None:
                kept = "a checkpoint has all of it"  # mpidl launch says what comes next
        self._stop_requests.obeyed()
        self.stopped = f"{reason} stopped all ranks after iteration {self._progress.iteration}; {kept}"

    def _event(self, event: str, **fields: Any) -> None:
        fields = {"epoch": self._epoch, "iteration": self._progress.iteration, **fields}
        if event == "epoch":
            fields["samples_per_s"] = fields["samples"] / fields["seconds"]
        self._history.append({"event": event, **fields})
        self._record(event, **fields)

    def _record(self, event: str, **fields: Any) -> None:
        if self._world.rank == 0 and self._telemetry is not None:
            self._telemetry.record(event, **fields)

    # --- the end --------------------------------------------------------------------------------------------------

    def _fail(self, error: NonFiniteLossError) -> None:
        """Say where the last good weights are, and record the end."""
        with self._world.activity.within(activity.CHECKPOINT):
            self._checkpoints.complete()
        last = self._checkpoints.last
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        advice = "; lower the learning rate, or look at that batch"
        error.args = (f"{error}; all ranks stopped there; {kept}{advice}",)
        self._record_end("failed", str(error), {})

    def _finish_checkpoints(self) -> None:
        """Raise on all ranks where what there is at the end could not be kept."""
        with self._world.activity.within(activity.CHECKPOINT):
            error = self._checkpoints.finish()
        if error is not None:
            self._record_end("failed", error, {})
            raise on_all_ranks(CheckpointError(error))

    def _finish(self) -> None:
        self._finish_checkpoints()
        done = self._progress.iteration
        self._tracing.end(done)
        if self._replay is not None and not self._replay.has_ended and self.stopped is None:
            self.stopped = f"the plans that are repeated end after iteration {done}"
        found = describe_end(self._history, time.perf_counter() - self._began)
        if self.stopped:
            self._record_end("stopped", self.stopped, found)
            self._keeping.close()
            return
        weights = None
        run_dir = self._settings.run_dir
        with self._world.activity.within(activity.CHECKPOINT), self._world.agreed("writing the weights"):
            if run_dir is not None and self._world.rank == 0:
                weights = run_dir / checkpoint.WEIGHTS
                checkpoint.save_weights(self._settings.model.state_dict(), weights)
                mark_finished(run_dir, done)
        is_early = done < self._triggers.total_iterations
        reason = "the run that is repeated did" if self._replay else f"end_when says: {self._settings.end_when}"
        message = f"ended early, as {reason}" if is_early else None
        if not is_early and self._first_iteration == done and self._loss is None:
            message = "nothing was left to do; with more epochs (--epochs) it goes on"
        self._record_end("finished", message, {**found, "weights": _text(weights)})
        self._keeping.close()

    def _record_end(self, status: str, message: str | None, found: dict[str, Any]) -> None:
        done = self._progress.iteration
        told: dict[str, Any] = {"message": message} if message else {}
        if self._lost:
            told["lost"] = self._lost
        self._record(
            "end",
            status=status,
            **told,
            iterations=done,
            epochs=done // self._triggers.iterations_per_epoch,
            **{"seconds": time.perf_counter() - self._began, **found},
            **self._reports.drops("end"),
            **self._coordination.describe(),
            phases=self._reports.phases,
            run_dir=_text(self._settings.run_dir),
        )

    def _facts(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "manager": self._manager,
            "places": self._world.gather_object(describe_place(self._world)),
            "batch_size": settings.batch_size,
            "group_size": settings.group_size,
            "reduction": settings.reduction,
            "wire": settings.wire,
            "balance": settings.balance,
            "drop_share": settings.drop_share,
            "seed": settings.seed,
            "train_samples": self._num_samples,
            "validation_samples": 0 if self._validation is None else len(self._validation),
            "triggers": self._triggers,
            "first_iteration": self._first_iteration,
            "recovery": self._survives,
            "goes_on": self._loss is not None,
            "lost": self._lost,
            "elapsed_s": time.perf_counter() - self._began,
            "run_dir": _text(settings.run_dir),
            "end_time": self._end_time,
        }


def _text(path: pathlib.Path | None) -> str | None:
    return None if path is None else str(path)
