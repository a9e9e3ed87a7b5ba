"""What a ParameterManager costs here: start-up, memory a rank, and the phases of an iteration, without any compute.

Run it: mpirun -n 4 python jobs/measure.py 100     (million parameters)
"""

from __future__ import annotations

import functools
import pathlib
import statistics
import sys
import time

import torch
from torch import nn

import mpidl

WIDTH = 1000
ITERATIONS = 20


def main(millions: float) -> None:
    """Print three tables from rank 0."""
    world = mpidl.init()
    before = memory_mib()
    model = nn.ParameterList([nn.Parameter(torch.zeros(WIDTH, WIDTH)) for _ in range(round(millions))])
    manager = mpidl.ParameterManager(model, functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    manager.step()
    ready = time.time() - process_started()
    seconds = []
    manager.take_times()
    for _ in range(ITERATIONS):
        mpidl.barrier()
        begin = time.perf_counter()
        manager.step()
        seconds.append(time.perf_counter() - begin)
    report = {
        "seconds from process start to the end of the first step": round(ready, 1),
        "MiB before (proportional set size)": round(before),
        "MiB after, a node's shared pages divided by its ranks": round(memory_mib()),
        "median milliseconds of a step": round(1e3 * statistics.median(seconds), 1),
        **{f"  of it {name}": round(1e3 * s / ITERATIONS, 1) for name, s in manager.take_times().items()},
        **{f"MiB of {name}": round(size / 2**20) for name, size in manager.memory_bytes().items()},
    }
    reports = world.gather_object(report)
    if reports:
        print(f"{millions:g} million parameters, {world.size} ranks on {world.num_nodes} node(s)")
        for name in report:
            print(f"{name:58}", *(f"{each[name]:>8}" for each in reports))


def memory_mib() -> float:
    """This process's memory in MiB, shared pages divided by the processes that share them (Linux)."""
    lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def process_started() -> float:
    """When this process started, in seconds since the epoch (Linux)."""
    ticks = float(pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    booted = next(line for line in pathlib.Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return float(booted.split()[1]) + ticks / 100


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 25)
