"""The command line: `mpidl train | evaluate | export | plan | bench | doctor`.

Help and version need neither MPI nor torch; every command imports what it needs when it runs. Under `mpirun` all ranks
parse the same arguments, and rank 0 alone prints.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mpidl import bench as benchmarks
from mpidl import config as configuration
from mpidl._version import __version__
from mpidl.config import CONFIG_FILE, Config
from mpidl.errors import ConfigError

if TYPE_CHECKING:
    from mpidl.runtime import World

_REPLAY_FLAGS = ("run_dir", "data_dir", "loader_workers")
_EVALUATE_FLAGS = ("data_dir", "eval_batch_size", "threads_per_rank")


class _Parser(argparse.ArgumentParser):
    """Prints from rank 0 only, and reports mistakes as `ConfigError`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")

    def _print_message(self, message: str, file: Any = None) -> None:
        if _is_printing():
            super()._print_message(message, file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None: the process's own.

    Returns:
        The exit code: 0 for success, 2 for a mistake of the user's, others as `errors` has them.
    """
    from mpidl import runtime

    try:
        parsed = parse(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        if (runtime.launched_size() or 1) > 1:
            return runtime.run_command(functools.partial(_refuse, error))
        print(f"mpidl: error: {error}", file=sys.stderr)
        return error.exit_code
    return runtime.run_command(lambda: _COMMANDS[parsed.command](parsed))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; its settings are in `overrides`, field name -> value.

    Raises:
        ConfigError: an unknown command or flag, with near names, or a value that a setting does not take.
    """
    parser, commands = _parsers()
    parsed, unknown = parser.parse_known_args(arguments)
    parsed.arguments = list(arguments)
    command = commands[f"bench {parsed.bench}" if parsed.command == "bench" else parsed.command]
    if unknown:
        flags = [flag for action in command._actions for flag in action.option_strings]
        hint = configuration.near(unknown[0].split("=")[0], flags)
        raise ConfigError(f"unknown argument {unknown[0]}{hint or f'; see `{command.prog} --help`'}")
    parsed.overrides = configuration.overrides_from(parsed)
    return parsed


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(prog="mpidl", allow_abbrev=False, description="Data-parallel training of PyTorch models over MPI.")
    parser.add_argument("--version", action="version", version=f"mpidl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model: mpirun -n 4 mpidl train job.toml", allow_abbrev=False)
    train.add_argument("job", nargs="?", help="job file in TOML; its keys are the settings below")
    train.add_argument("--resume", metavar="RUN_DIR", help="go on after the newest checkpoint of this run")
    train.add_argument("--replay", metavar="RUN_DIR", help="carry out the plans of this run again, as they were")
    configuration.add_flags(train)

    evaluate = commands.add_parser("evaluate", help="loss and accuracy of a run's weights", allow_abbrev=False)
    evaluate.add_argument("run_dir", metavar="RUN_DIR", help="run directory")
    evaluate.add_argument("--weights", metavar="PATH", help="other weights: a .safetensors file or a checkpoint")
    configuration.add_flags(evaluate, _EVALUATE_FLAGS)

    export = commands.add_parser("export", help="write a run's weights as one .safetensors file", allow_abbrev=False)
    export.add_argument("run_dir", metavar="RUN_DIR", help="run directory")
    export.add_argument(
        "--checkpoint",
        metavar="EPOCH",
        help="epochs that the checkpoint is after, or epochs+iterations (default: newest)",
    )
    export.add_argument("--output", metavar="FILE", help="file to write (default: weights.safetensors in RUN_DIR)")

    plan = commands.add_parser("plan", help="show the plans of a run: mpidl plan show RUN_DIR", allow_abbrev=False)
    plan.add_argument("action", choices=["show"], help="what to do with them")
    plan.add_argument("run_dir", metavar="RUN_DIR", help="run directory")

    bench = commands.add_parser("bench", help="measure ways side by side, and the limit", allow_abbrev=False)
    benches = benchmarks.add_benches(bench)

    doctor = commands.add_parser("doctor", help="look at MPI, launcher, cores and memory", allow_abbrev=False)
    return parser, {"train": train, "evaluate": evaluate, "export": export, "plan": plan, "doctor": doctor, **benches}


def _is_printing() -> bool:
    from mpidl.runtime import launched_rank

    return launched_rank() in (None, 0)


def _start(load: Callable[[], Config]) -> tuple[Config, World]:
    """Read the configuration, start MPI, and see that all ranks have the same one. Collective.

    A rank that cannot read it must not leave before MPI has started: the others would wait for it there forever.
    """
    from mpidl import runtime

    failure: ConfigError | None = None
    try:
        config = load()
    except ConfigError as error:
        config, failure = Config(), error
    world = runtime.init(None if config.threads_per_rank == "auto" else config.threads_per_rank)
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

    signals.listen()  # one that comes before the first iteration must not end a single rank
    config, world = _start(lambda: _training_config(parsed))
    from mpidl import job
    from mpidl.telemetry import Telemetry

    run_dir, give_back = None, None
    with world.agreed("making the run directory"):
        if world.rank == 0 and parsed.resume:
            run_dir = Path(parsed.resume)
            give_back = job.reopen_run_dir(config, run_dir)
        elif world.rank == 0:
            name = Path(parsed.replay).name if parsed.replay else _run_name(parsed.job, config.data)
            run_dir = job.claim_run_dir(config, name)
            give_back = functools.partial(job.release_run_dir, run_dir)
    run_dir = world.broadcast_object(run_dir)
    telemetry = Telemetry(run_dir if world.rank == 0 else None, quiet=world.rank != 0)
    try:
        trainer, train_set, validation_set = job.build_trainer(config, telemetry, run_dir)
        resume, replay = bool(parsed.resume), parsed.replay
        trainer.fit(train_set, validation_set, epochs=config.epochs, resume=resume, replay=replay)
    finally:
        telemetry.close()
        if give_back is not None:
            give_back()
    return STOPPED if trainer.stopped else 0


def evaluate(parsed: argparse.Namespace) -> None:
    """Print the loss and metrics of a run's weights on its validation set. Collective."""
    config, world = _start(lambda: _config_of_run(parsed))
    from mpidl import job
    from mpidl.telemetry import Console, tables

    trainer, _, validation_set = job.build_trainer(config)
    if validation_set is None:
        raise ConfigError(f"the data set {config.data} has no validation samples to evaluate on")
    weights = parsed.weights or parsed.run_dir
    trainer.load(weights)
    found = trainer.evaluate(validation_set)
    if world.rank == 0:
        rows = [(name, tables.measure(name, value)) for name, value in found.items()]
        Console().print_table("mpidl evaluate", [("weights", str(weights)), ("data", config.data), *rows])


def export(parsed: argparse.Namespace) -> None:
    """Write a run's weights as one plain .safetensors file; one process does it all."""
    if not _is_printing():
        return
    from mpidl import checkpoint

    run_dir = Path(parsed.run_dir)
    weights = checkpoint.load_weights(run_dir, epoch=parsed.checkpoint)
    name = "weights" if parsed.checkpoint is None else f"weights-{parsed.checkpoint}"
    output = Path(parsed.output) if parsed.output else run_dir / f"{name}.safetensors"
    checkpoint.save_weights(weights, output)
    print(f"{len(weights)} tensors written to {output}")


def plan(parsed: argparse.Namespace) -> None:
    """Print the groups of a run as they were carried out; one process does it all."""
    if not _is_printing():
        return
    from mpidl.scheduling import read_recording
    from mpidl.telemetry import Console, tables

    recording = read_recording(Path(parsed.run_dir))
    rows = [tables.of_group(number, group.to_json()) for number, group in enumerate(recording.groups)]
    Console().print_table(f"plans of {parsed.run_dir}", rows, tables.GROUP_HEADERS)


def doctor(parsed: argparse.Namespace) -> int:
    """Print what was found out about this machine and what is wrong with it. Collective."""
    from mpidl.runtime import doctor as examination

    facts = examination.gather_facts()
    if facts is None:
        return 0
    from mpidl.telemetry import Console

    findings = examination.diagnose(facts)
    console = Console()
    console.print_table("mpidl doctor", examination.describe(facts))
    console.print_table("nodes", examination.describe_nodes(facts), examination.NODE_HEADERS)
    for finding in findings:
        console.print(f"{finding.level}: {finding.what}\n    fix: {finding.fix}")
    if not findings:
        console.print("nothing is wrong")
    return int(any(finding.level == "error" for finding in findings))


_COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "export": export,
    "plan": plan,
    "bench": benchmarks.run,
    "doctor": doctor,
}
