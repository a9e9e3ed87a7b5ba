"""The Trainer: the whole job behind three calls. The course of a training is in `training.py`."""

from __future__ import annotations

import gc
import os
import pathlib
import socket
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mpidl import checkpoint, recovery
from mpidl.data import as_source
from mpidl.errors import ConfigError
from mpidl.parameters import Assignment, OptimizerFactory, ParameterManager
from mpidl.planning import make_header
from mpidl.runtime import World, init
from mpidl.scheduling import LossFunction, Metric, Recording, ScheduleFactory, Trigger, read_recording
from mpidl.settings import Settings
from mpidl.start import Start
from mpidl.telemetry import Listener, Telemetry
from mpidl.training import Training


class Trainer:
    """Trains a model on all ranks. Every method is collective.

    The same partitions and threads a rank give the same bits on any number of ranks.

    Args:
        model: parameters float32, on the CPU. Rank 0's weights go to all ranks when `fit` begins. It is trained in
            training mode; parts of it that are in evaluation mode stay so.
        loss_fn: from (outputs, targets) to the mean loss of the samples, or to (sum, weight).
        optimizer: callable from parameters to an element-wise `torch.optim.Optimizer`, `mpidl.Lars` or `mpidl.Lamb`.
        batch_size: samples of an iteration, over all ranks.
        partitions: into how many parts an iteration's batch is cut; at least the number of ranks.
        group_size: iterations planned by one broadcast; "auto": so many that plans and reports take 1 to 5 % of time.
        max_group_seconds: the longest time that "auto" lets a group take, about: balance acts at a group's end.
        schedule: callable from an optimizer to a torch learning-rate scheduler, stepped every iteration; a
            ReduceLROnPlateau is stepped after every validation with its loss (another metric, or a warm-up before:
            `mpidl.scheduling.Plateau`).
        param_groups: as torch's.
        seed: of the order of samples, of augmentation and of dropout; the initial weights are the model's.
        reduction: "ordered", "mpi", "driver", "tree" or "allreduce", as `ParameterManager` has them.
        wire: what travels between nodes: "float32" or "bfloat16".
        balance: whether partitions move from slow ranks to fast ones as the run goes on. "auto": where that changes no
            bit of the result, so not with wire "bfloat16" between nodes, nor where the MPI library adds.
        drop_share: at most this share of an iteration's partitions may be dropped, where ranks are late; an iteration
            in which more would be is repeated. 0: nothing is dropped. It changes the numbers.
        drop_budget_s: seconds of an iteration after which a rank drops what it has not started; None: learned.
        drop_warmup: iterations to learn it from.
        error_feedback: with "bfloat16": what rounding takes from a gradient is kept and added to the next one.
        bucket_mb: MiB of gradients exchanged together between nodes; None: found out in the first iterations.
        clip_norm: bound of the mean gradient's L2 norm; None: none.
        clip_value: bound of each of its elements' magnitude; None: none.
        threads_per_rank: torch threads; default: the cores that the rank really has, divided by the ranks that share
            them, which changes with their number, and the bits with it: give a number to have the same ones.
        loader_workers: processes on each rank that read a Dataset ahead; 0: it is read between iterations.
        eval_batch_size: samples that one rank evaluates at a time.
        metrics: name -> function of (outputs, targets) returning the SUM over the batch's samples.
        validate_every: epochs between validations, or a trigger (`mpidl.triggers`, also as text); the training's end
            always has one; 0: never.
        checkpoint_every: likewise, of checkpoints in the run directory.
        keep_last: how many checkpoints to keep, the newest ones; None: all.
        keep_every: of the older ones, each of which the number, counted from the run's first, can be divided by this,
            stays as well.
        summarize_every: likewise, of "summary" events: loss since the last one, learning rate, gradient norm.
        end_when: a trigger that ends the training before its last epoch; None: none.
        max_seconds: after which the training stops by itself with a checkpoint, in time; None: when Slurm says.
        hang_seconds: where nothing has moved on any rank for so long, the job hangs: who keeps the others waiting is
            printed with its stack, after 30 seconds or iterations already. 0: nobody watches.
        on_hang: what is done then: "end" the job with exit code 76, or "warn".
        recovery: "auto": where MPI can (`mpirun --with-ft ulfm`), `fit` goes on without ranks that are lost, with the
            same bits; "off": the job ends.
        run_dir: where metrics, checkpoints and weights go; None: nowhere.
        progress: what rank 0 shows: "live" (a view that is drawn again and again), "plain" (lines), "quiet" (warnings
            only), "json" (the metrics' lines), or "auto": live on a terminal, plain in a log.
        trace: iterations of all ranks that are recorded into `trace.json` in the run directory, for Perfetto.
        tensorboard: whether TensorBoard's files are written into the run directory, too; needs the extra.
        histograms: whether each epoch's end has a "histograms" event, of each parameter's values.
        on_event: called on rank 0 with the name and the fields of each event; docs/metrics.md has examples.
        telemetry: where rank 0 records events, instead of what the last five say but for `trace` and `histograms`.
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
        max_group_seconds: float = 2.0,
        schedule: ScheduleFactory | None = None,
        param_groups: Iterable[Mapping[str, Any]] | None = None,
        seed: int = 0,
        reduction: str = "ordered",
        wire: str = "float32",
        balance: bool | str = "auto",
        drop_share: float = 0.0,
        drop_budget_s: float | None = None,
        drop_warmup: int = 50,
        error_feedback: bool = False,
        bucket_mb: float | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        threads_per_rank: int | None = None,
        loader_workers: int = 0,
        eval_batch_size: int = 256,
        metrics: Mapping[str, Metric] | None = None,
        validate_every: int | str | Trigger = 1,
        checkpoint_every: int | str | Trigger = 1,
        keep_last: int | None = None,
        keep_every: int | None = None,
        summarize_every: int | str | Trigger = 0,
        end_when: str | Trigger | None = None,
        max_seconds: float | None = None,
        hang_seconds: float = 900.0,
        on_hang: str = "end",
        recovery: str = "auto",
        run_dir: str | pathlib.Path | None = None,
        progress: str = "auto",
        trace: int = 0,
        tensorboard: bool = False,
        histograms: bool = False,
        on_event: Listener | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.model = model
        self.world = init(threads_per_rank).for_purpose("setup")
        self._settings = Settings(
            model=model,
            loss_fn=loss_fn,
            optimizer=optimizer,
            batch_size=batch_size,
            partitions=partitions,
            group_size=group_size,
            max_group_seconds=max_group_seconds,
            schedule=schedule,
            param_groups=None if param_groups is None else [dict(group) for group in param_groups],
            seed=seed,
            reduction=reduction,
            wire=wire,
            balance=balance,
            drop_share=drop_share,
            drop_budget_s=drop_budget_s,
            drop_warmup=drop_warmup,
            error_feedback=error_feedback,
            bucket_mb=bucket_mb,
            clip_norm=clip_norm,
            clip_value=clip_value,
            loader_workers=loader_workers,
            eval_batch_size=eval_batch_size,
            metrics=dict(metrics or {}),
            validate_every=validate_every,
            checkpoint_every=checkpoint_every,
            keep_last=keep_last,
            keep_every=keep_every,
            summarize_every=summarize_every,
            end_when=end_when,
            max_seconds=max_seconds,
            hang_seconds=hang_seconds,
            on_hang=on_hang,
            recovery=recovery,
            run_dir=None if run_dir is None else pathlib.Path(run_dir),
            progress=progress,
            trace=trace,
            tensorboard=tensorboard,
            histograms=histograms,
            on_event=on_event,
            telemetry=telemetry,
        )
        self._manager: ParameterManager | None = None
        self.stopped: str | None = None
        """Why the last `fit` ended before its time: a signal, the file STOP in the run directory, or the job's end."""
        with self.world.agreed("checking the settings"):
            self._settings.check(self.world)

    # --- training -------------------------------------------------------------------------------------------------

    def fit(
        self,
        train_set: Any,
        validation_set: Any = None,
        *,
        epochs: int,
        resume: bool = False,
        replay: str | pathlib.Path | None = None,
    ) -> list[dict[str, Any]]:
        """Train for `epochs` epochs in all, and write the final weights into the run directory.

        Args:
            train_set: any map-style Dataset, a tuple of arrays or tensors, or a Source.
            validation_set: likewise; None: no validation.
            epochs: of the whole training, the ones before a resumed checkpoint included.
            resume: go on from the run directory's newest checkpoint; start over where there is none.
            replay: the run directory of an earlier run, whose plans are carried out again, as they were, on as many
                ranks; what was due when is due then, and the run ends where that one did.

        Returns:
            The events of epochs and validations, on every rank.

        It stops before its end, with a checkpoint where there is a run directory, after the iteration in which any
        rank received SIGUSR1, SIGTERM or SIGINT (Ctrl-C), rank 0 saw a file STOP in the run directory, or the job's
        time was nearly up: see `stopped`.

        Raises:
            UserError: on every rank, before the first iteration: something does not fit.
            NonFiniteLossError: on every rank: a loss became NaN or infinite.
        """
        with self.world.agreed("reading the data"):
            train = as_source(train_set)
            validation = None if validation_set is None else as_source(validation_set)
            self._settings.check_lockstep(self.world, len(train))
        lengths = (len(train), None if validation is None else len(validation))
        given = (self._settings.digest(), epochs, resume, *lengths)
        self.world.check_equal("the Trainer's settings or the size of the data", repr(given), ConfigError)
        self._prepare_run_dir(resume)
        self._open_manager()
        recording = None
        if replay is not None:
            run_dir, validates = pathlib.Path(replay), validation is not None
            recording = self._read_plans(run_dir, len(train), epochs, resume=resume, validates=validates)

        def begin(world: World, start: Start) -> Training:
            manager = self._open_manager(world)
            return Training(self._settings, world, manager, train, validation, epochs=epochs, start=start)

        start = Start(resume=resume, replay=recording)
        training, history = recovery.run(begin, self._settings, self.world, start)
        self.stopped = training.stopped
        training.close()
        return history

    def _read_plans(
        self, run_dir: pathlib.Path, num_samples: int, epochs: int, *, resume: bool, validates: bool
    ) -> Recording:
        """The plans of an earlier run, on all ranks, after a look whether they fit."""
        found: Recording | None = None
        with self.world.agreed("reading the plans to repeat"):
            if resume:
                raise ConfigError("replay begins at the first iteration; leave resume out")
            if self.world.rank == 0:
                found = read_recording(run_dir)
                header = make_header(self._settings, self.world, num_samples, epochs)
                found.check(header, validates=validates)
        recording: Recording = self.world.broadcast_object(found)
        return recording

    def _prepare_run_dir(self, resume: bool) -> None:
        """See to it that all ranks can write the run directory, and that nothing in it is overwritten. Collective."""
        run_dir = self._settings.run_dir
        with self.world.agreed("preparing the run directory"):
            if run_dir is not None and self.world.rank == 0:
                _make_run_dir(run_dir, resume)
        with self.world.agreed("preparing the run directory"):
            if run_dir is not None:
                _check_is_writable(run_dir)

    def evaluate(self, data_set: Any) -> dict[str, float]:
        """The mean loss and metrics of a data set; every sample counts once; the same on all ranks."""
        with self.world.agreed("reading the data"):
            source = as_source(data_set)
        self._open_manager()
        with self._settings.open_validation_loader(source) as loader:
            return self._settings.evaluate(self.world, source, loader)

    def load(self, path: str | pathlib.Path) -> pathlib.Path:
        """Take weights from a run directory, a checkpoint or a safetensors file.

        Returns:
            The file or checkpoint that was read.

        Raises:
            CheckpointError, LayoutError: on every rank: there are none, or they do not fit the model.
        """
        source, state = pathlib.Path(path), dict[str, torch.Tensor]()
        with self.world.agreed(f"reading {path}"):
            if self.world.rank == 0:
                source, state = checkpoint.find_weights(path)
        self._open_manager().load_weights(state)
        return pathlib.Path(self.world.broadcast_object(source))

    def close(self) -> None:
        """Give the model private weights back and free the shared memory."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open_manager(self, world: World | None = None) -> ParameterManager:
        """The manager of the model's parameters, made at first need, and anew where the world is another."""
        if world is not None and world is not self.world:
            if self._manager is not None:
                self._manager.abandon()
            self._manager, self.world = None, world.for_purpose("setup")
            gc.collect()  # the memory before is wanted now
        if self._manager is None:
            self._manager = ParameterManager(
                self.model,
                self._settings.optimizer,
                reduction=self._settings.reduction,
                wire=self._settings.wire,
                error_feedback=self._settings.error_feedback,
                bucket_mb=self._settings.bucket_mb,
                clip_norm=self._settings.clip_norm,
                clip_value=self._settings.clip_value,
                param_groups=self._settings.param_groups,
                world=self.world,
                assignment=Assignment.even(self._settings.partitions, self.world.size),
            )
        return self._manager


def _make_run_dir(run_dir: pathlib.Path, resume: bool) -> None:
    found = checkpoint.list_checkpoints(run_dir)
    if found and not resume:
        raise ConfigError(
            f"the run directory {run_dir} holds checkpoints of an earlier run ({found[-1][1].name}); go on with "
            "resume=True, or choose another run_dir"
        )
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the run directory {run_dir} cannot be written: {error.strerror}; choose another run_dir"
        ) from None


def _check_is_writable(run_dir: pathlib.Path) -> None:
    """Every rank writes its part of each checkpoint there."""
    if not run_dir.is_dir():
        raise ConfigError(
            f"the run directory {run_dir} is not seen here, though rank 0 has made it; choose a run_dir on a file "
            "system that all nodes share"
        )
    probe = run_dir / f".writable-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"the run directory {run_dir} cannot be written: {error.strerror}; choose another run_dir"
        ) from None
