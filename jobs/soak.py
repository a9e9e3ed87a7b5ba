"""Kill a training with SIGKILL again and again, and see that its checkpoints survive: `python jobs/soak.py`.

A small job on a few ranks writes a checkpoint after every iteration. It is started, killed at a random moment once it
has written some (one random rank, which ends the job, or all of its processes at once, as when the power goes), and
resumed. After each kill

- the newest checkpoint is whole: every sum of every file is right;
- it is not older than the newest that the run has told of: nothing is lost but the work since.

In the end the newest one is compared, bit by bit, with a run to the same iteration that nobody has disturbed.

`--in-place` kills single ranks of trainings that go on without them, with Open MPI's `mpirun --with-ft ulfm`. Each
training loses one rank, or two, at random moments, and must end with the bits of one that nobody has disturbed. Told is
how long it took from each kill to the end of the next iteration, by the report of its group.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mpidl.checkpoint import list_checkpoints, load_optimizer, load_weights
from mpidl.errors import CheckpointError

SETTINGS = [
    "--batch-size", "16", "--partitions", "4", "--optimizer", "adamw", "--lr", "0.001", "--threads-per-rank", "1",
    "--validate-every", "0", "--group-size", "5", "--epochs", "1000",
]  # fmt: skip
KEPT = ["--checkpoint-every", "iterations(1)", "--keep-last", "3", "--keep-every", "100"]
SHORT = ["--end-when", "iterations(150)", "--checkpoint-every", "iterations(35)", "--keep-last", "2"]
LIMIT_S = 300.0


def main() -> int:
    """Kill, look, resume; returns 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--in-place", action="store_true", help="kill ranks of jobs that go on without them")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims (default: 0)")
    parser.add_argument("--mpirun", default="mpirun", help="and its options, such as 'mpirun --oversubscribe'")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the job ends with this
    folder = Path(tempfile.mkdtemp(prefix="mpidl-soak-"))
    survives = ["--with-ft", "ulfm"] if given.in_place else []
    program = [sys.executable, "-m", "mpidl", "train"]
    launcher = [*given.mpirun.split(), *survives, "-n", str(given.ranks), *program]
    run_dir, chance = folder / "run", random.Random(given.seed)
    try:
        if given.in_place:
            alone = [*given.mpirun.split(), "-n", "1", *program]  # any number of ranks gives the same bits
            lose_again_and_again(launcher, alone, folder, given.kills, chance)
        else:
            kill_again_and_again(launcher, run_dir, given.kills, chance)
            compare(launcher, run_dir, folder / "undisturbed")
    except Lost as error:
        print(f"FAILED: {error}; its files are in {folder}", flush=True)
        return 1
    shutil.rmtree(folder)
    return 0


class Lost(Exception):
    """A checkpoint is not what it has to be."""


def kill_again_and_again(launcher: list[str], run_dir: Path, kills: int, chance: random.Random) -> None:
    """All kills, and a look after each."""
    newest = (0, 0)
    for number in range(1, kills + 1):
        resumes = bool(list_checkpoints(run_dir))
        what = ["--resume", str(run_dir)] if resumes else [*SETTINGS, *KEPT, "--run-dir", str(run_dir)]
        wanted, delay_s, takes_all = chance.randint(1, 6), chance.uniform(0, 0.1), chance.random() < 0.3
        job = subprocess.Popen(
            [*launcher, *what], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            wait_for_checkpoints(job, run_dir, wanted)
            time.sleep(delay_s)
            victims = processes_of(job.pid)
            ranks = [pid for pid in victims if is_rank(pid)]
            chosen = [job.pid, *victims] if takes_all else [chance.choice(ranks)]
            for pid in chosen:
                os.kill(pid, signal.SIGKILL)
            job.communicate(timeout=60)
        finally:
            end(job)
        left = sorted(path.name for path in (run_dir / "checkpoints").glob(".*"))
        newest = look(run_dir, newest)
        killed = "all" if takes_all else "one rank"
        print(f"{number}: {killed} killed; newest {newest[0]}+{newest[1]} is whole; half done: {left}", flush=True)


def lose_again_and_again(
    launcher: list[str], alone: list[str], folder: Path, kills: int, chance: random.Random
) -> None:
    """Train until so many ranks were killed, compare each training's weights, tell the times."""
    undisturbed = folder / "undisturbed"
    subprocess.run(
        [*alone, *SETTINGS, *SHORT, "--run-dir", str(undisturbed)], check=True, stdout=subprocess.DEVNULL,
        timeout=LIMIT_S,
    )  # fmt: skip
    expected, took, killed = (undisturbed / "weights.safetensors").read_bytes(), list[float](), 0
    repeated = 0
    while killed < kills:
        run_dir = folder / f"run-{killed:03d}"
        times = lose(launcher, run_dir, 1 + (chance.random() < 0.3), chance)
        if not (run_dir / "weights.safetensors").exists():
            raise Lost(f"{run_dir.name} has no weights")
        if (run_dir / "weights.safetensors").read_bytes() != expected:
            raise Lost(f"the weights of {run_dir.name} are not those of an undisturbed run")
        killed += len(times)
        took += [seconds for seconds in times if seconds is not None]
        repeated += sum(event["repeated"] for event in all_events(run_dir, "recovery"))
        told = ", ".join("after its end" if each is None else f"{each:.2f} s" for each in times)
        print(f"{killed}: the undisturbed bits; from kill to the end of the next iteration {told}", flush=True)
        shutil.rmtree(run_dir)
    worst, median = max(took), sorted(took)[len(took) // 2]
    print(f"{killed} ranks killed; median {median:.2f} s, worst {worst:.2f} s ({len(took)} before the training's end)")
    print(f"{repeated} iterations were done twice")


def lose(launcher: list[str], run_dir: Path, number: int, chance: random.Random) -> list[float | None]:
    """One training that loses so many ranks; the seconds until each loss was over; None: nothing was left to do."""
    told: list[float] = []
    log = run_dir.with_suffix(".log")
    with log.open("w") as output:
        job = subprocess.Popen(
            [*launcher, *SETTINGS, *SHORT, "--run-dir", str(run_dir)], stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            for _ in range(number):
                wait_for_groups(job, run_dir, chance.randint(1, 12))
                time.sleep(chance.uniform(0, 0.03))
                ranks = [pid for pid in processes_of(job.pid) if is_rank(pid)]
                if len(ranks) > 1 and job.poll() is None:
                    told.append(time.time())
                    os.kill(chance.choice(ranks), signal.SIGKILL)
            code = job.wait(timeout=60)
        except subprocess.TimeoutExpired:
            raise Lost(f"a training hangs without its lost ranks; it said: {log.read_text()}") from None
        finally:
            end(job)
    if code != 0:
        raise Lost(f"a training has ended with code {code}: {log.read_text()}")
    return [seconds_after(run_dir, moment) for moment in told]


def wait_for_groups(job: subprocess.Popen[bytes], run_dir: Path, wanted: int) -> None:
    """Return when the training has ended so many more groups, or has ended."""
    before, deadline = len(all_events(run_dir, "group")), time.monotonic() + LIMIT_S
    while job.poll() is None and len(all_events(run_dir, "group")) < before + wanted:
        if time.monotonic() > deadline:
            raise Lost(f"no {wanted} groups within {LIMIT_S:g} s")
        time.sleep(0.005)


def seconds_after(run_dir: Path, moment: float) -> float | None:
    """From a kill to the end of the first iteration behind the recovery from it; None: there was none any more."""
    recovered = [event["time"] for event in all_events(run_dir, "recovery") if event["time"] > moment]
    after = [event for event in all_events(run_dir, "group") if recovered and event["time"] > recovered[0]]
    if not after:
        return None
    later = after[0]["seconds"] * (1 - 1 / after[0]["iterations"])  # the group's other iterations
    return float(after[0]["time"] - later - moment)


def all_events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind that were written to their end."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines if f'"event": "{kind}"' in line and line.endswith("}")]


def wait_for_checkpoints(job: subprocess.Popen[str], run_dir: Path, wanted: int) -> None:
    """Return when the job has written so many."""
    before, deadline = told(run_dir), time.monotonic() + LIMIT_S
    while told(run_dir) < before + wanted:
        if job.poll() is not None:
            raise Lost(f"the job ended by itself with code {job.returncode}: {job.communicate()[1]}")
        if time.monotonic() > deadline:
            raise Lost(f"no {wanted} checkpoints within {LIMIT_S:g} s")
        time.sleep(0.002)


def events(run_dir: Path) -> list[dict[str, Any]]:
    """The "checkpoint" events."""
    return all_events(run_dir, "checkpoint")


def told(run_dir: Path) -> int:
    """How many checkpoints the run has told of."""
    return len(events(run_dir))


def look(run_dir: Path, before: tuple[int, int]) -> tuple[int, int]:
    """Check the newest checkpoint; returns its position."""
    found = list_checkpoints(run_dir)
    if not found:
        raise Lost("there is no checkpoint")
    position, path = found[-1]
    try:
        load_weights(path)
        load_optimizer(path)
    except CheckpointError as error:
        raise Lost(f"the newest is not whole: {error}") from None
    newest = Path(str(events(run_dir)[-1]["path"])).name
    if path.name < newest or position < before:
        raise Lost(f"the newest is {path.name}, the run has told of {newest}, and before that of {before}")
    return position


def processes_of(parent: int) -> list[int]:
    """The ids of all that a process has started, and of what these have."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, left = [], [parent]
    while left:
        own = [pid for pid, its in parents.items() if its == left[0]]
        found, left = found + own, left[1:] + own
    return found


def is_rank(pid: int) -> bool:
    """Whether a process is one of the ranks, not of the launcher."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return words[0] == sys.executable.encode() and b"train" in words


def end(job: subprocess.Popen[Any]) -> None:
    """Leave nothing behind."""
    for pid in [*processes_of(job.pid), job.pid] if job.poll() is None else []:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    job.wait()


def compare(launcher: list[str], run_dir: Path, other: Path) -> None:
    """Run to the newest checkpoint without a disturbance, and compare the bits."""
    (_, path) = list_checkpoints(run_dir)[-1]
    iterations = json.loads((path / "manifest.json").read_text())["progress"]["iteration"]
    end_when = ["--end-when", f"iterations({iterations})", "--checkpoint-every", "0"]
    subprocess.run(
        [*launcher, *SETTINGS, *end_when, "--run-dir", str(other)], check=True, stdout=subprocess.DEVNULL,
        timeout=LIMIT_S + iterations,
    )  # fmt: skip
    expected, found = load_weights(other / "weights.safetensors"), load_weights(path)
    if not all(tensor.equal(found[name]) for name, tensor in expected.items()):
        raise Lost(f"after {iterations} iterations the weights are not those of an undisturbed run")
    print(f"after {iterations} iterations the weights are those of an undisturbed run", flush=True)


if __name__ == "__main__":
    sys.exit(main())
