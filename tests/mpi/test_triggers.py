"""What is due is done by all ranks after the same iteration, whatever the group size; and what stops a training."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mpidl import checkpoint, triggers
from mpidl.config import FINISHED
from mpidl.errors import ConfigError
from mpidl.metrics import accuracy
from mpidl.runtime import World, signals
from mpidl.scheduling import Executor, GroupPlan, read_recording
from mpidl.telemetry import Telemetry
from tests.mpi.cases import ADAM, classes, dense, job_of, made, normalised, trainer_of
from tests.mpi.reference import differing

pytestmark = pytest.mark.thorough

OF_THE_MACHINE = ("balance", "straggler", "warning")
"""Events that depend on how fast it is."""
EPOCHS, NUM_SAMPLES = 3, 170  # six iterations an epoch
TRAIN, HELD_OUT = classes(NUM_SAMPLES), classes(40, seed=9)


class Recorder(Telemetry):
    """Keeps the events."""

    def __init__(self) -> None:
        super().__init__(None, quiet=True)
        self.events: list[dict[str, Any]] = []

    def record(self, event: str, **fields: object) -> None:
        self.events.append({"event": event, **fields})


def events_of(recorder: Recorder) -> list[tuple[Any, ...]]:
    """What was done when, and the numbers that came of it; checkpoints, told when on disk, just before the end."""
    told = ("event", "epoch", "iteration", "loss", "accuracy", "samples", "grad_norm", "lr", "status", "message")
    kept = [event for event in recorder.events if event["event"] not in ("start", "group", *OF_THE_MACHINE)]
    kept.sort(key=lambda event: {"checkpoint": 1, "end": 2}.get(event["event"], 0))
    return [tuple((key, event[key]) for key in told if key in event) for event in kept]


def train(
    world: World,
    run_dir: Path | None,
    *,
    resume: bool = False,
    replay: Path | None = None,
    job: Any = None,
    **options: Any,
) -> Any:
    """The weights after a training, its events (on rank 0), and why it stopped."""
    model, recorder = made(normalised), Recorder()
    job = job or job_of(*TRAIN, epochs=EPOCHS, optimizer=ADAM)
    trainer = trainer_of(
        model, job, run_dir=run_dir, telemetry=recorder, metrics={"accuracy": accuracy}, eval_batch_size=20, **options
    )
    trainer.fit(TRAIN, HELD_OUT, epochs=job.epochs, resume=resume, replay=replay)
    trainer.close()
    return model.state_dict(), events_of(recorder), trainer.stopped


def drawn(draw: random.Random) -> str:
    """A trigger whose times are a function of the training's numbers."""
    leaf = draw.choice(
        [
            f"iterations({draw.randint(1, 7)})",
            f"epochs({draw.randint(1, 2)})",
            "at_end()",
            f"loss_below({draw.uniform(0.5, 1.6)})",
            f"reached('accuracy', {draw.uniform(0.3, 0.9)})",
            f"plateau('loss', {draw.randint(1, 3)})",
        ]
    )
    return leaf if draw.random() < 0.4 else f"({leaf} {draw.choice('|&')} {drawn(draw)})"


@pytest.mark.parametrize("seed", range(4))
def test_any_triggers_act_after_the_same_iterations_with_the_same_bits_at_any_group_size(
    world: World, shared_tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    options = {name: drawn(draw) for name in ("checkpoint_every", "summarize_every")}
    # An end that groups are cut for, and one that comes in the middle of any.
    end_when = f"iterations(8) & {drawn(draw)}" if seed % 2 else f"loss_below({draw.uniform(1.1, 1.3)})"
    options |= {"validate_every": f"iterations(4) | {drawn(draw)}", "end_when": end_when}
    single = train(world, shared_tmp_path / "1", group_size=1, **options)
    for group_size in (draw.randint(2, 9), "auto"):
        run_dir = shared_tmp_path / str(group_size)
        weights, events, _ = train(world, run_dir, group_size=group_size, **options)
        assert differing(weights, single[0]) == []
        assert events == single[1]
        world.barrier()
        kept = [position for position, _ in checkpoint.list_checkpoints(run_dir)]
        assert kept == [position for position, _ in checkpoint.list_checkpoints(shared_tmp_path / "1")]


def test_a_loss_that_is_low_enough_ends_the_training_in_the_middle_of_a_group(
    world: World, shared_tmp_path: Path
) -> None:
    _, events, stopped = train(world, shared_tmp_path, group_size=50, end_when=triggers.loss_below(1.2))
    assert stopped is None
    if world.rank > 0:
        return
    found = [dict(event) for event in events]
    assert found[-1]["status"] == "finished"
    assert found[-1]["message"] == "ended early, as end_when says: loss_below(1.2)"
    last = {event["event"]: event for event in found}
    done = last["epoch"]["iteration"]
    assert done % 6, "it has to end within an epoch for this test to say anything"
    assert last["validation"]["iteration"] == last["checkpoint"]["iteration"] == done
    assert last["epoch"]["samples"] == done % 6 * 32


def test_times_are_the_same_iterations_on_all_ranks(world: World) -> None:
    """One rank's clock counts: ranks that looked at their own would not validate together, and hang."""
    model = made(dense)
    trainer = trainer_of(model, job_of(*TRAIN, epochs=8), group_size=7, validate_every="seconds(0.02)")
    history = trainer.fit(TRAIN, HELD_OUT, epochs=8)
    trainer.close()
    mine = [event["iteration"] for event in history if event["event"] == "validation"]
    assert world.allgather_object(mine) == [mine] * world.size
    assert mine[-1] == 48


def test_a_training_resumed_in_the_middle_of_an_epoch_is_the_undisturbed_one(
    world: World, shared_tmp_path: Path
) -> None:
    options = {"group_size": 4, "validate_every": "iterations(4)", "summarize_every": "iterations(9)"}
    weights, events, _ = train(world, None, **options)
    for at in (5, 6):
        run_dir = shared_tmp_path / str(at)
        train(world, run_dir, checkpoint_every=f"iterations({at})", end_when=f"iterations({at})", **options)
        world.barrier()
        ((_, path),) = checkpoint.list_checkpoints(run_dir)
        assert path.name == f"epoch-{at // 6:06d}" + (f"+{at % 6:06d}" if at % 6 else "")
        resumed, more, _ = train(world, run_dir, resume=True, **options)
        assert differing(resumed, weights) == []
        later = [e for e in events if dict(e)["event"] in ("epoch", "validation") and dict(e)["iteration"] > at]
        assert [e for e in more if dict(e)["event"] in ("epoch", "validation")] == later


# --- stopping ---------------------------------------------------------------------------------------------------------


class Asking(torch.nn.Module):
    """Asks the training to stop, in some forward of one rank."""

    def __init__(self, asks: Any, at: int) -> None:
        super().__init__()
        self.inner = normalised()
        self._asks, self._at, self._seen = asks, at, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self._seen += self.training
        if self._seen == self._at and self.training:
            self._asks()
        result: torch.Tensor = self.inner(inputs)
        return result


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_to_any_rank_stops_all_after_the_same_iteration_with_a_checkpoint(
    world: World, shared_tmp_path: Path, number: signal.Signals
) -> None:
    culprit = world.size - 1
    job = job_of(*TRAIN, epochs=EPOCHS, optimizer=ADAM)
    before = signal.getsignal(number)

    def ask() -> None:
        os.kill(os.getpid(), number)

    torch.manual_seed(0)
    model = Asking(ask if world.rank == culprit else lambda: None, at=8)
    recorder = Recorder()
    trainer = trainer_of(model, job, run_dir=shared_tmp_path, telemetry=recorder, group_size=5)
    trainer.fit(TRAIN, epochs=EPOCHS)
    stopped = trainer.stopped
    trainer.close()
    assert stopped is not None
    assert stopped.startswith(f"a signal to rank {culprit} stopped all ranks after iteration ")
    assert world.allgather_object(stopped) == [stopped] * world.size
    assert signal.getsignal(number) == before
    world.barrier()
    ((epoch, iterations), _) = checkpoint.list_checkpoints(shared_tmp_path)[-1]
    assert stopped.split("after iteration ")[1].split(";")[0] == str(epoch * 6 + iterations)
    if world.rank == 0:
        assert recorder.events[-1]["status"] == "stopped"
        assert not (shared_tmp_path / "weights.safetensors").exists()
        assert not (shared_tmp_path / FINISHED).exists()

    bits = []
    for run_dir in (shared_tmp_path, None):
        torch.manual_seed(0)
        model = Asking(lambda: None, at=0)
        again = trainer_of(model, job, run_dir=run_dir, telemetry=Recorder())
        again.fit(TRAIN, epochs=EPOCHS, resume=run_dir is not None)
        assert again.stopped is None
        assert (shared_tmp_path / FINISHED).exists()
        again.close()
        bits.append(model.state_dict())
    assert differing(*bits) == []


def test_a_file_stops_the_training_and_is_taken_away(world: World, shared_tmp_path: Path) -> None:
    file = shared_tmp_path / "STOP"
    timer = threading.Timer(0.5, file.touch)
    if world.rank == 0:
        file.touch()  # an old one, of a run that ended before it looked
        timer.start()
    weights, _, stopped = train(world, shared_tmp_path, job=job_of(*TRAIN, epochs=100_000), group_size=100)
    timer.cancel()
    assert stopped is not None
    assert stopped.startswith("the file STOP stopped all ranks after iteration ")
    world.barrier()
    assert not file.exists()
    assert len(weights)


def test_a_training_stops_by_itself_before_its_time_is_up(world: World, shared_tmp_path: Path) -> None:
    _, _, stopped = train(world, shared_tmp_path, job=job_of(*TRAIN, epochs=100_000), max_seconds=1.0)
    assert stopped is not None
    assert stopped.startswith("the end of the job's time stopped all ranks after iteration ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end_when": "epoch(3)"}, r"end_when: 'epoch\(3\)' is not a trigger"),
        ({"validate_every": "iterations(0)"}, r"validate_every: iterations\(0\): give a whole number"),
        ({"end_when": "reached('acuracy', 0.9)"}, "'acuracy' of the validation, but validations give loss, accuracy"),
        ({"max_seconds": 0.0}, "max_seconds is 0.0; it must be positive"),
    ],
)
def test_triggers_that_cannot_be_are_refused_on_all_ranks(world: World, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(world, None, **options)


def test_a_plateau_schedule_refuses_validations_that_nobody_can_foresee(world: World) -> None:
    job = job_of(*TRAIN, schedule=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(ConfigError, match=r"cannot be foreseen: validate_every is seconds\(60.0\)"):
        train(world, None, job=job, validate_every="seconds(60)")


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end_when", [None, "loss_below(1.2)"])
def test_a_replay_does_the_same_after_the_same_iterations_with_the_same_bits(
    world: World, shared_tmp_path: Path, end_when: str | None
) -> None:
    first, again = shared_tmp_path / "first", shared_tmp_path / "again"
    options = {"validate_every": "seconds(0.05)", "checkpoint_every": "seconds(0.1)", "end_when": end_when}
    weights, events, _ = train(world, first, **options)
    world.barrier()
    repeated, more, _ = train(world, again, replay=first, **options)
    assert differing(repeated, weights) == []
    # The end says in which of two ways it came about.
    assert more[:-1] == events[:-1]
    world.barrier()
    done = [
        [(group.plan.first_iteration, group.done, group.acts) for group in read_recording(run_dir).groups]
        for run_dir in (first, again)
    ]
    assert done[0] == done[1]
    kept = [[position for position, _ in checkpoint.list_checkpoints(each)] for each in (first, again)]
    assert kept[0] == kept[1]


def test_the_replay_of_a_stopped_run_stops_where_that_did(world: World, shared_tmp_path: Path) -> None:
    first = shared_tmp_path / "first"
    weights, _, stopped = train(world, first, max_seconds=0.05)
    assert stopped is not None
    done = stopped.split("after iteration ")[1].split(";")[0]
    world.barrier()
    repeated, _, again = train(world, shared_tmp_path / "again", replay=first, max_seconds=0.001)
    assert again == f"the plans that are repeated end after iteration {done}"
    assert differing(repeated, weights) == []


def test_the_replay_of_a_run_that_was_lengthened_by_other_settings_is_that_run(
    world: World, shared_tmp_path: Path
) -> None:
    first = shared_tmp_path / "first"
    train(world, first, job=job_of(*TRAIN, epochs=2, optimizer=ADAM), validate_every=3, group_size=4)
    weights, _, _ = train(world, first, resume=True, validate_every=2, group_size=5)
    world.barrier()
    repeated, _, stopped = train(world, shared_tmp_path / "again", replay=first)
    assert stopped is None
    assert differing(repeated, weights) == []


def test_a_training_that_ended_early_has_ended_when_it_is_resumed(world: World, shared_tmp_path: Path) -> None:
    weights, _, _ = train(world, shared_tmp_path, end_when="loss_below(1.2)")
    again, events, _ = train(world, shared_tmp_path, end_when="loss_below(1.2)", resume=True)
    assert differing(again, weights) == []
    assert [dict(event)["event"] for event in events] == (["end"] if world.rank == 0 else [])
    longer, _, _ = train(world, shared_tmp_path, resume=True)
    assert differing(longer, train(world, None)[0]) == []


def test_summaries_see_the_validation_of_their_iteration_and_the_end_that_it_brings(world: World) -> None:
    options = {"end_when": "reached('accuracy', 0.0)", "group_size": 50, "validate_every": "iterations(4)"}
    _, events, _ = train(world, None, summarize_every="at_end()", **options)
    found = [(dict(event)["event"], dict(event).get("iteration")) for event in events]
    assert found == ([("validation", 4), ("summary", 4), ("epoch", 4), ("end", None)] if world.rank == 0 else [])


@pytest.mark.parametrize("group_size", [1, 4])
def test_the_next_group_s_samples_are_asked_for_while_an_iteration_is_still_to_come(
    world: World, monkeypatch: pytest.MonkeyPatch, group_size: int
) -> None:
    course: list[tuple[str, int]] = []
    request, iterate = Executor.request, Executor.iterate

    def requested(self: Executor, plan: GroupPlan) -> None:
        course.append(("request", plan.first_iteration))
        request(self, plan)

    def iterated(self: Executor, plan: GroupPlan, index: int) -> Any:
        course.append(("iterate", plan.first_iteration + index))
        return iterate(self, plan, index)

    monkeypatch.setattr(Executor, "request", requested)
    monkeypatch.setattr(Executor, "iterate", iterated)
    train(world, None, group_size=group_size)
    for place, (what, iteration) in enumerate(course):
        if what == "request" and iteration > 0:
            assert ("iterate", iteration - 1) in course[place:], (
                f"{iteration} was asked for when nothing was left to do"
            )


def test_a_training_that_is_refused_leaves_the_signals_alone(world: World) -> None:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with pytest.raises(ConfigError, match="'nothing' of the validation"):
        train(world, None, end_when="reached('nothing', 1)")
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


def test_a_replay_that_does_not_fit_is_refused_on_all_ranks(world: World, shared_tmp_path: Path) -> None:
    train(world, shared_tmp_path / "first")
    world.barrier()
    with pytest.raises(ConfigError, match="made for batch_size 32, this run has 16"):
        train(world, None, replay=shared_tmp_path / "first", job=job_of(*TRAIN, batch_size=16, epochs=EPOCHS))
    with pytest.raises(ConfigError, match="has no plans to read"):
        train(world, None, replay=shared_tmp_path / "nothing")
