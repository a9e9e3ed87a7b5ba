"""The command line: `mpidl train | launch | evaluate | export | plan | top | report | bench | doctor | completion`.

Help and version need neither MPI nor torch (`command_line.py` has the parsers); every command imports what it needs
when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mpidl import bench as benchmarks
from mpidl import command_line, completion, guard, launching, local_folder, report_page, standby
from mpidl import config as configuration
from mpidl._version import __version__
from mpidl.command_line import is_printing, parse
from mpidl.config import CONFIG_FILE, Config
from mpidl.errors import ConfigError

if TYPE_CHECKING:
    from mpidl.doctor.facts import Facts
    from mpidl.runtime import World

__all__ = ["main", "parse"]

_REPLAY_FLAGS = ("run_dir", "data_dir", "loader_workers", "progress", "trace", "tensorboard", "histograms", "on_event")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None: the process's own.

    Returns:
        The exit code: 0 for success, 2 for a mistake of the user's, others as `errors` has them.
    """
    if arguments is None and sys.argv[1:2] == ["train"]:
        guard.begin()  # before NumPy and torch start threads
    from mpidl import runtime

    try:
        parsed = parse(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        if (runtime.launched_size() or 1) > 1:
            return runtime.run_command(functools.partial(_refuse, error))
        print(f"mpidl: error: {error}", file=sys.stderr)
        return error.exit_code
    return runtime.run_command(lambda: _COMMANDS[parsed.command](parsed))


def _start(load: Callable[[], Config]) -> tuple[Config, World]:
    """Read the configuration, start MPI, and see that all ranks have the same one. Collective.

    A rank that cannot read it must not leave before MPI has started: the others would wait for it there forever.
    """
    from mpidl import runtime

    failure: ConfigError | None = None
    try:
        config = load()
        if config.run_dir != "auto":
            guard.tell(run_dir=config.run_dir)
    except ConfigError as error:
        config, failure = Config(), error
    world = runtime.init(None if config.threads_per_rank == "auto" else config.threads_per_rank)
    guard.tell(rank=world.rank, size=world.size)
    with world.agreed("reading the configuration"):
        if failure is not None:
            raise failure
    world.check_equal("the version of mpidl", __version__)
    world.check_equal("the configuration", configuration.config_hash(config), ConfigError)
    return config, world


def _refuse(error: ConfigError) -> None:
    """Leave together with the other ranks, whose arguments may be right. Collective."""

    def fail() -> NoReturn:
        raise error

    _start(fail)


def _training_config(parsed: argparse.Namespace) -> Config:
    if parsed.replay is not None:
        return _config_of_replay(parsed)
    if parsed.resume is None:
        return configuration.load(parsed.job, parsed.overrides)
    if parsed.job is not None:
        raise ConfigError(f"--resume {parsed.resume} has its own job file; leave out {parsed.job}")
    if "run_dir" in parsed.overrides:
        raise ConfigError("--resume goes on in the run's own directory; leave out --run-dir")
    return _config_of_run(parsed)


def _config_of_replay(parsed: argparse.Namespace) -> Config:
    for name, given in (("--resume", parsed.resume), ("a job file", parsed.job)):
        if given is not None:
            raise ConfigError(f"--replay {parsed.replay} has its own settings and begins anew; leave out {name}")
    for name in parsed.overrides:
        if name not in _REPLAY_FLAGS:
            raise ConfigError(
                f"--replay {parsed.replay} has its own settings; leave out --{name.replace('_', '-')}; flags allowed "
                f"with it: {', '.join('--' + each.replace('_', '-') for each in _REPLAY_FLAGS)}"
            )
    return configuration.load(_config_file(parsed.replay), {"run_dir": "auto", **parsed.overrides})


def _config_file(run_dir: str) -> Path:
    file = Path(run_dir) / CONFIG_FILE
    if not Path(run_dir).exists():
        raise ConfigError(f"{run_dir} does not exist; give the folder of a run")
    if not file.is_file():
        raise ConfigError(f"{run_dir} is not a run directory: it has no {CONFIG_FILE}; give the folder of a run")
    return file


def _config_of_run(parsed: argparse.Namespace) -> Config:
    """The configuration that a run directory holds, with the flags on top."""
    run_dir = parsed.resume if parsed.command == "train" else parsed.run_dir
    return configuration.load(_config_file(run_dir), {**parsed.overrides, "run_dir": str(Path(run_dir))})


def _run_name(job_file: str | None, data: str) -> str:
    """A folder's name for the run: the job file's, else the data's."""
    if job_file is not None:
        return Path(job_file).stem
    return data.replace(":", ".") if ":" in data else Path(data.split(",")[0]).stem


STOPPED = 75
"""Exit code of a training that stopped before its end and can be resumed: sysexits' EX_TEMPFAIL."""


def train(parsed: argparse.Namespace) -> int:
    """Train as the job file and flags say, and keep the results in a run directory. Collective."""
    from mpidl.runtime import signals

    local_folder.listen(parsed.announced)
    guard.tell(is_standby=parsed.standby is not None)
    signals.listen()  # one that comes before the first iteration must not end a single rank
    config, world = _start(lambda: _training_config(parsed))
    from mpidl import job, runtime

    if parsed.standby is not None:
        if not standby.wait(world, standby.Gate(Path(parsed.standby))):
            return 0
        guard.tell(is_standby=False)
    run_dir, gives_back = None, contextlib.ExitStack()
    with gives_back:
        with world.agreed("making the run directory"):
            if world.rank == 0:
                run_dir = _open_run_dir(parsed, config, gives_back)
        run_dir = world.broadcast_object(run_dir)
        if run_dir is None:
            return STOPPED
        guard.tell(run_dir=str(run_dir))
        runtime.check_shared(world, run_dir)
        trainer, train_set, validation_set = job.build_trainer(config, run_dir=run_dir)
        resume, replay = bool(parsed.resume), parsed.replay
        trainer.fit(train_set, validation_set, epochs=config.epochs, resume=resume, replay=replay)
    return STOPPED if trainer.stopped else 0


def _open_run_dir(parsed: argparse.Namespace, config: Config, gives_back: contextlib.ExitStack) -> Path | None:
    """The run directory, made or taken again, for rank 0; None: it is to stop before another job there has ended."""
    from mpidl import job
    from mpidl.occupation import occupy

    if parsed.resume:
        run_dir = Path(parsed.resume)
        leave = occupy(run_dir)
        if leave is not None:
            gives_back.callback(leave)
            gives_back.callback(job.reopen_run_dir(config, run_dir))
    else:
        name = Path(parsed.replay).name if parsed.replay else _run_name(parsed.job, config.data)
        run_dir = job.claim_run_dir(config, name)
        gives_back.callback(job.release_run_dir, run_dir)
        leave = occupy(run_dir)
        if leave is not None:
            gives_back.callback(leave)
    return None if leave is None else run_dir


def launch(parsed: argparse.Namespace) -> int:
    """Start a training by its launcher, and again where a rank was lost; this process is no rank."""
    return launching.start(parsed, _described)


def _described(arguments: Sequence[str]) -> launching.Training:
    """What arguments of `mpidl train` make of it."""
    parsed = parse(["train", *arguments])
    if parsed.replay is not None:
        raise ConfigError("mpidl launch cannot start a replay again; use mpirun")
    config = _training_config(parsed)
    name = _run_name(parsed.job, config.data)
    return launching.Training(config.run_dir, name, config.partitions, is_resumed=parsed.resume is not None)


def evaluate(parsed: argparse.Namespace) -> None:
    """Print the loss and metrics of a run's weights on its validation set. Collective."""
    config, world = _start(lambda: _config_of_run(parsed))
    from mpidl import job
    from mpidl.telemetry import Console, tables

    trainer, _, validation_set = job.build_trainer(replace(config, trace=0, tensorboard=False))
    if validation_set is None:
        raise ConfigError(f"the data set {config.data} has no validation samples to evaluate on")
    weights = trainer.load(parsed.weights or parsed.run_dir)
    found = trainer.evaluate(validation_set)
    if world.rank == 0:
        rows = [(name, tables.measure(name, value)) for name, value in found.items()]
        Console().print_table("mpidl evaluate", [("weights", str(weights)), ("data", config.data), *rows])


def export(parsed: argparse.Namespace) -> None:
    """Write a run's weights as one plain .safetensors file, and the optimizer's state; one process does it all."""
    if not is_printing():
        return
    from mpidl import checkpoint

    run_dir = Path(parsed.run_dir)
    for given in filter(None, (parsed.output, parsed.optimizer_state)):
        if not Path(given).parent.is_dir():
            raise ConfigError(f"cannot write {given}: the folder {Path(given).parent} does not exist")
    source, weights = checkpoint.find_weights(run_dir, epoch=parsed.checkpoint)
    name = "weights" if parsed.checkpoint is None else f"weights-{parsed.checkpoint}"
    output = Path(parsed.output) if parsed.output else run_dir / f"{name}.safetensors"
    checkpoint.save_weights(weights, output)
    print(f"{len(weights)} tensors of {source} written to {output}")
    if parsed.optimizer_state:
        state = checkpoint.load_optimizer(source if source.is_dir() else run_dir)
        checkpoint.save_optimizer(state, Path(parsed.optimizer_state))
        print(f"the optimizer's state written to {parsed.optimizer_state}")


def plan(parsed: argparse.Namespace) -> None:
    """Print the groups of a run as they were carried out; one process does it all."""
    if not is_printing():
        return
    from mpidl.scheduling import read_recording
    from mpidl.telemetry import Console, tables

    recording = read_recording(Path(parsed.run_dir))
    rows = [tables.of_group(number, group.to_json()) for number, group in enumerate(recording.groups)]
    Console().print_table(f"plans of {parsed.run_dir}", rows, tables.GROUP_HEADERS)


def top(parsed: argparse.Namespace) -> None:
    """Show how a run stands, again and again; one process does it all, and MPI is not started."""
    if not is_printing():
        return
    from mpidl.telemetry.top import follow

    follow(Path(parsed.run_dir), once=parsed.once)


def report(parsed: argparse.Namespace) -> None:
    """Write a page about runs and benchmarks; one process does it all."""
    if is_printing():
        report_page.write(parsed)


def print_completion(parsed: argparse.Namespace) -> None:
    """Print the script that completes commands in a shell."""
    if is_printing():
        print(completion.script(command_line.parsers()[""], parsed.shell), end="")


def doctor(parsed: argparse.Namespace) -> int:
    """Print what was found out about this machine and what is wrong with it. Collective.

    In the shell or script of a Slurm allocation a job step does it, over the whole allocation.
    """
    from mpidl.doctor import allocation
    from mpidl.doctor.examination import examine

    if step := allocation.job_step(parsed.arguments[1:]):
        return allocation.examine(step)
    return examine(Path(parsed.folder), functools.partial(_show_examined, is_json=parsed.json))


def _show_examined(facts: Facts, is_json: bool) -> int:
    """Print facts and findings; returns the exit code."""
    from mpidl.doctor import allocation, judgement, tables
    from mpidl.telemetry import Console

    findings, console = [*judgement.diagnose(facts), *allocation.found_before()], Console()
    if is_json:
        console.print(tables.as_json(facts, findings))
    else:
        console.print_table("mpidl doctor", tables.describe(facts))
        console.print_table("nodes", tables.describe_nodes(facts), tables.NODE_HEADERS)
        if links := tables.describe_links(facts):
            console.print_table("links", links, tables.LINK_HEADERS)
        for finding in findings:
            console.print(str(finding))
        if not findings:
            console.print("nothing is wrong")
    return int(any(finding.level == "error" for finding in findings))


_COMMANDS = {
    "train": train,
    "launch": launch,
    "evaluate": evaluate,
    "export": export,
    "plan": plan,
    "top": top,
    "report": report,
    "bench": benchmarks.run,
    "doctor": doctor,
    "completion": print_completion,
}
