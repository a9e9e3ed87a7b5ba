"""The parsers of all commands: what they take, and what their help says. Loads neither MPI nor torch.

Under `mpirun` all ranks parse the same arguments, and rank 0 alone prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from mpidl import bench, completion, config, examples, launching, local_folder, report_page, standby
from mpidl._version import __version__
from mpidl.errors import ConfigError

_EVALUATE_FLAGS = ("data_dir", "eval_batch_size", "threads_per_rank")


class Parser(argparse.ArgumentParser):
    """Prints from rank 0 only, reports mistakes as `ConfigError`, and takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        command = options["prog"].removeprefix("mpidl").strip()
        super().__init__(
            **options,
            allow_abbrev=False,
            epilog=examples.epilog(command),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise ConfigError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's, with near names, and the same words in every Python."""
        if action.choices is not None and value not in action.choices:
            name, choices = (
                "/".join(action.option_strings) or action.metavar or action.dest,
                list(map(str, action.choices)),
            )
            hint = config.near(str(value), choices) or f"; see `{self.prog} --help`"
            raise ConfigError(f"{name} is {value!r}, must be one of {', '.join(choices)}{hint}")

    def _print_message(self, message: str, file: Any = None) -> None:
        if is_printing():
            super()._print_message(message, file)


def is_printing() -> bool:
    """Whether this process is rank 0, or the only one."""
    from mpidl.runtime import launched_rank

    return launched_rank() in (None, 0)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; its settings are in `overrides`, field name -> value.

    Raises:
        ConfigError: an unknown command or flag, with near names, or a value that a setting does not take.
    """
    commands = parsers()
    parsed, unknown = commands[""].parse_known_args(arguments)
    parsed.arguments = list(arguments)
    command = commands[f"bench {parsed.bench}" if parsed.command == "bench" else parsed.command]
    if unknown:
        flags = [flag for action in command._actions for flag in action.option_strings]
        hint = config.near(unknown[0].split("=")[0], flags)
        raise ConfigError(f"unknown argument {unknown[0]}{hint or f'; see `{command.prog} --help`'}")
    parsed.overrides = config.overrides_from(parsed)
    return parsed


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command's parser by its name, `bench sync` and so on; under "" the program's, which has all of them."""
    program = Parser(prog="mpidl", description="Data-parallel training of PyTorch models over MPI.")
    program.add_argument("--version", action="version", version=f"mpidl {__version__}")
    commands = program.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, **options: Any) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", **options)

    _add_train(
        command(
            "train",
            "train a model",
            usage="mpidl train [JOB | --resume RUN_DIR | --replay RUN_DIR] [--SETTING VALUE ...]",
        )
    )
    launching.add_flags(
        command(
            "launch",
            "start a training, and again when a rank is lost",
            usage="mpidl launch [-n RANKS] [--restarts N] [--mpirun COMMAND] mpidl train ...",
        )
    )
    _add_evaluate(command("evaluate", "loss and accuracy of a run's weights"))
    _add_export(command("export", "write a run's weights as one .safetensors file"))
    plan = command("plan", "show the plans of a run")
    plan.add_argument("action", choices=["show"], help="what to do with them")
    _add_run_dir(plan)
    top = command("top", "watch a running job")
    _add_run_dir(top, "run directory, on a file system that this machine sees, too")
    top.add_argument("--once", action="store_true", help="print how it stands, and leave")
    report_page.add_flags(command("report", "a page about runs and benches, to read or print"))
    benches = bench.add_benches(command("bench", "measure ways side by side, and the limit"))
    _add_doctor(command("doctor", "find out what is wrong with this cluster"))
    shells = command("completion", "print a script that completes mpidl's commands in a shell")
    shells.add_argument("shell", choices=completion.SHELLS, metavar="SHELL", help=", ".join(completion.SHELLS))
    return {"": program, **commands.choices, **benches}


def _add_run_dir(parser: argparse.ArgumentParser, help: str = "run directory") -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help=help)


def _add_train(train: argparse.ArgumentParser) -> None:
    train.add_argument("job", nargs="?", metavar="JOB", help="job file in TOML; its keys are the settings below")
    train.add_argument("--resume", metavar="RUN_DIR", help="go on after the newest checkpoint of this run")
    train.add_argument("--replay", metavar="RUN_DIR", help="carry out the plans of this run again, as they were")
    train.add_argument(local_folder.FLAG, dest="announced", help=argparse.SUPPRESS)
    train.add_argument(standby.FLAG, help=argparse.SUPPRESS)
    config.add_flags(train)


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    _add_run_dir(evaluate)
    evaluate.add_argument("--weights", metavar="PATH", help="other weights: a .safetensors file or a checkpoint")
    config.add_flags(evaluate, _EVALUATE_FLAGS)


def _add_export(export: argparse.ArgumentParser) -> None:
    _add_run_dir(export)
    export.add_argument(
        "--checkpoint",
        metavar="EPOCH",
        help="epochs that the checkpoint is after, or epochs+iterations (default: newest)",
    )
    export.add_argument(
        "--optimizer-state", metavar="FILE", help="also write the optimizer's state dict there, for torch.load"
    )
    export.add_argument("--output", metavar="FILE", help="file to write (default: weights.safetensors in RUN_DIR)")


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument(
        "--run-dir", dest="folder", metavar="FOLDER", default=".", help="a folder that all nodes share (default: .)"
    )
    doctor.add_argument("--json", action="store_true", help="print all that was found as JSON")
