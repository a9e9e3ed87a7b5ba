"""The options of `mpidl launch`, and what it needs to know of a training, without loading anything large."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence

from mpidl.errors import LaunchError


@dataclasses.dataclass(frozen=True)
class Training:
    """What is known of the training's command line."""

    run_dir: str
    """As in its settings: "auto" for a new one."""
    name: str
    """What to call a new one."""
    partitions: int
    is_resumed: bool
    """Whether it has --resume: then it can be repeated as it is."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's options; what is behind them is the training's."""
    parser.add_argument("-n", dest="ranks", type=_positive, metavar="RANKS", help="ranks (default: the launcher knows)")
    parser.add_argument(
        "--restarts",
        type=_natural,
        default=3,
        metavar="N",
        help="how often it may start again, from what its nodes have kept or the newest checkpoint (default: 3)",
    )
    parser.add_argument(
        "--mpirun",
        metavar="COMMAND",
        help='launcher with its options, such as "mpirun --bind-to none" or srun (default: mpirun)',
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="mpidl train ...", help="what is started")


def start(parsed: argparse.Namespace, read: Callable[[Sequence[str]], Training]) -> int:
    """Start a training by its launcher, and again where that helps.

    Args:
        parsed: the options.
        read: what arguments of `mpidl train` make of it.

    Returns:
        The exit code.

    Raises:
        ConfigError: the launcher or what it is to start cannot be started.
        LaunchError: this process is itself one of several ranks.
    """
    from mpidl.launching import command, course
    from mpidl.runtime import launched_size

    if (launched_size() or 1) > 1:
        raise LaunchError("mpidl launch starts ranks of its own; start it once, not under mpirun or srun")
    made = command.make(parsed.mpirun, parsed.words, read)
    return course.Course(made, parsed.ranks, parsed.restarts).run()


def _positive(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(minimum: int, text: str) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {minimum}")
    return int(text)
