"""How long a killed rank costs where the job starts again: `python jobs/restarts.py`, beside `make soak`'s in place.

The same small network (the digits') trains on RANKS ranks, once under `mpidl launch`, which starts again from what its
nodes have kept, once as DistributedDataParallel over gloo under `torchrun --max-restarts`, in a loop as torch's
tutorials have it, which saves a snapshot (model, optimizer) after every EVERY iterations. Random ranks are killed with
SIGKILL at random moments; told are the seconds from each kill to the end of the next iteration, and how many
iterations were done twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import soak
import torch
import torch.distributed as dist
from torch import nn

from mpidl.models import build

EVERY = 10
LIMIT_S = 60.0
"""For iterations after a start or a kill."""
SETTINGS = [
    "--batch-size", "64", "--optimizer", "adamw", "--lr", "0.001", "--threads-per-rank", "1", "--epochs", "100000",
    "--checkpoint-every", f"iterations({EVERY})", "--group-size", "1", "--validate-every", "0",
]  # fmt: skip


def worker(folder: Path) -> None:
    """One rank under torchrun."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = build("digits_cnn", num_classes=10)
    optimizer, done, snapshot = torch.optim.AdamW(model.parameters(), lr=0.001), 0, folder / "snapshot.pt"
    if snapshot.exists():
        kept = torch.load(snapshot, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        done = kept["done"]
    parallel = nn.parallel.DistributedDataParallel(model)
    inputs, targets = torch.randn(64 // size, 1, 8, 8), torch.randint(10, (64 // size,))
    while True:
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(inputs), targets).backward()
        optimizer.step()
        done += 1
        if rank > 0:
            continue
        if done % EVERY == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": done}, f"{snapshot}~")
            Path(f"{snapshot}~").replace(snapshot)
        with (folder / "iterations").open("a") as file:
            file.write(f"{json.dumps([time.time(), done])}\n")


def iterations(folder: Path) -> list[tuple[float, int]]:
    """When each iteration ended, and its number."""
    file = folder / "iterations"
    if file.exists():
        return [(moment, done) for moment, done in map(json.loads, file.read_text().split("\n")[:-1])]
    return [(event["time"], event["iteration"]) for event in soak.all_events(folder, "group")]


def ranks_of(job: subprocess.Popen[bytes]) -> list[int]:
    """The processes that compute."""
    found = []
    for pid in soak.processes_of(job.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if Path(f"/proc/{pid}").exists() else []
        is_worker = b"worker" in words and b"--max-restarts" not in b" ".join(words)
        if is_worker or (soak.is_rank(pid) and not soak.processes_of(pid)):  # an mpidl rank's parent is its guard
            found.append(pid)
    return found


def kill_again_and_again(
    command: list[str], folder: Path, kills: int, chance: random.Random
) -> list[tuple[float, int]]:
    """Seconds from each kill to the end of the next iteration of the start after, and iterations done twice."""
    told = list[tuple[float, int]]()
    with (folder.parent / "log").open("w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(kills):
                wait(job, folder, time.time(), 20)
                time.sleep(chance.uniform(0, 1.0))
                killed_at, before = time.time(), iterations(folder)[-1][1]
                os.kill(chance.choice(ranks_of(job)), signal.SIGKILL)
                time.sleep(0.5)  # what was under way is written
                before = max(before, iterations(folder)[-1][1])
                moment, done = wait(job, folder, time.time(), 1)
                told.append((moment - killed_at, before - done + 1))
                print(f"  {told[-1][0]:.2f} s, {told[-1][1]} iterations done twice", flush=True)
        finally:
            job.terminate()  # so that it leaves nothing behind
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(timeout=LIMIT_S)
            soak.end(job)
    return told


def wait(job: subprocess.Popen[bytes], folder: Path, since: float, number: int) -> tuple[float, int]:
    """The last of so many iterations that end from now on."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and job.poll() is None:
        found = [each for each in iterations(folder) if each[0] > since]
        if len(found) >= number:
            return found[number - 1]
        time.sleep(0.02)
    said = (folder.parent / "log").read_text().splitlines()
    found = [line for line in said if "Error" in line]
    raise TimeoutError(f"no iteration in {LIMIT_S:g} s; it said: {found[-1][:200] if found else said[-1:]}")


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="of each (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims (default: 0)")
    given = parser.parse_args()
    bin_dir, many = Path(sys.executable).parent, str(given.kills + 1)
    for name in ("mpidl launch", "torchrun"):
        with tempfile.TemporaryDirectory(prefix="mpidl-restarts-") as own:
            folder = Path(own, "run")
            train = [f"{bin_dir}/mpidl", "train", "--data", "digits", *SETTINGS, "--run-dir", str(folder)]
            command = [f"{bin_dir}/mpidl", "launch", "--restarts", many, "-n", str(given.ranks), *train]
            if name == "torchrun":
                folder.mkdir()
                command = [
                    f"{bin_dir}/torchrun", "--standalone", "--nproc-per-node", str(given.ranks), "--max-restarts", many,
                    __file__, "worker", str(folder),
                ]  # fmt: skip
            print(name, flush=True)
            try:
                told = kill_again_and_again(command, folder, given.kills, random.Random(given.seed))
            except TimeoutError as error:
                print(f"{name}: does not go on: {error}", flush=True)
                continue
            seconds = [each for each, _ in told]
            again = f"{sum(again for _, again in told)} iterations done twice"
            took = f"median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s"
            print(f"{name}: {len(told)} ranks killed; {took}; {again}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(Path(sys.argv[2]))
    else:
        main()
