"""What `mpidl launch` starts: the launcher's command line, and the run directory that it is about."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shlex
import shutil
from collections.abc import Callable, Sequence

from mpidl import local_folder, standby
from mpidl.errors import ConfigError
from mpidl.launching.flags import Training
from mpidl.runtime.launch import mpirun

_LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun", "srun")


@dataclasses.dataclass(frozen=True)
class Command:
    """The parts of the command line."""

    launcher: Sequence[str]
    program: Sequence[str]
    """mpidl, or python -m mpidl."""
    arguments: Sequence[str]
    """Of `mpidl train`, for the first start."""
    training: Training
    run_dir: pathlib.Path
    given_launcher: str | None = None
    """As the user has written it."""

    @property
    def starts_beside(self) -> bool:
        """Whether the launcher starts ranks where others run.

        Slurm gives a job step's cores to no other step, and other launchers reach an allocation's nodes by srun, too.
        """
        is_srun = any(pathlib.PurePath(word).name == "srun" for word in self.launcher)
        return not is_srun and "SLURM_JOB_ID" not in os.environ

    def line(
        self,
        ranks: int | None,
        announced: local_folder.Announced | None,
        *,
        resumes: bool,
        gate: standby.Gate | None = None,
    ) -> list[str]:
        """The command of the next start.

        Args:
            ranks: how many; None: the launcher knows.
            announced: where they keep their state for another start; None: nowhere.
            resumes: whether a start before it has begun the run.
            gate: where they wait until those of the start before have left; None: there are none.
        """
        anew = self.training.is_resumed or not resumes
        arguments = self.arguments if anew else ["--resume", str(self.run_dir)]
        told = [] if announced is None else [local_folder.FLAG, str(announced)]
        told += [] if gate is None else [standby.FLAG, str(gate.path)]
        return [*self._start(ranks), *self.program, "train", *arguments, *told]

    def removal(self, ranks: int | None, path: pathlib.Path) -> list[str]:
        """The command that removes a folder from all nodes."""
        return [*self._start(ranks), "rm", "-rf", "--", str(path)]

    def _start(self, ranks: int | None) -> list[str]:
        return [*self.launcher, *([] if ranks is None else ["-n", str(ranks)])]


def make(launcher: str | None, words: Sequence[str], read: Callable[[Sequence[str]], Training]) -> Command:
    """The command for the words behind `mpidl launch`'s own options; makes the run directory.

    Args:
        launcher: with its options, as in a shell; None: the mpirun of this environment.
        words: `mpidl train JOB ...`.
        read: the settings that arguments of `mpidl train` make.

    Raises:
        ConfigError: the launcher cannot be found, what it is to start is no `mpidl train`, or its settings are wrong.
    """
    program, arguments = _split(words)
    training = read(arguments)
    found = _launcher(launcher)
    run_dir = _made(training)
    if training.run_dir == "auto":
        arguments = [*arguments, "--run-dir", str(run_dir)]
    return Command(found, program, arguments, training, run_dir, launcher)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The program and its arguments behind `train`."""
    at = list(words).index("train") if "train" in words else 0
    if at and pathlib.PurePath(words[0]).name in _LAUNCHERS:
        raise ConfigError(
            f"mpidl launch starts {words[0]} itself: mpidl launch -n 4 --mpirun {words[0]} mpidl train JOB.toml, not "
            f"{shlex.join(words)!r}"
        )
    if not at or pathlib.PurePath(words[at - 1]).name != "mpidl":
        given = f"not {shlex.join(words)!r}" if words else "which is missing"
        raise ConfigError(f"mpidl launch starts a training: mpidl launch -n 4 mpidl train JOB.toml, {given}")
    return list(words[:at]), list(words[at + 1 :])


def _launcher(given: str | None) -> list[str]:
    if given is None:
        return [mpirun()]
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise ConfigError(f"--mpirun {given!r} cannot be read: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise ConfigError(f"--mpirun {given!r}: there is no such command; give the launcher and its options in quotes")
    return words


def _made(training: Training) -> pathlib.Path:
    """The run directory, there: ranks on any node write how they have ended into it."""
    if training.run_dir != "auto":
        return _make_dir(pathlib.Path(training.run_dir), may_exist=True)
    for number in range(1, 1_000_000):
        with contextlib.suppress(FileExistsError):
            name = training.name if number == 1 else f"{training.name}-{number}"
            return _make_dir(pathlib.Path("runs", name), may_exist=False)
    raise ConfigError(f"runs/ has too many runs of {training.name}; give --run-dir")


def _make_dir(path: pathlib.Path, *, may_exist: bool) -> pathlib.Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=may_exist)
    except OSError as error:
        if isinstance(error, FileExistsError) and not may_exist:
            raise
        raise ConfigError(f"cannot make the run directory {path}: {error.strerror}; give another --run-dir") from None
    return path
