# ruff: noqa: E402 -- each import is a part that is timed
"""Where the time goes between mpirun and the first iteration: one training job's start-up, by part, slowest rank.

Run it: env STARTED=$(date +%s.%N) mpirun -n 4 python jobs/startup.py
"""

import time

PARTS = [("launcher and Python", time.time())]


def mark(part: str) -> None:
    """A part has ended."""
    PARTS.append((part, time.time()))


import mpidl

mark("import mpidl")

from mpidl.runtime import init

mark("import mpidl.runtime (numpy)")
world = init()
mark("MPI, nodes and versions")

import functools
import os

import torch

mark("import torch")

from mpidl.data import digits
from mpidl.models import DigitsCNN

train_set, _ = digits()
mark("data and model")


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of the first batch: note when."""
    if PARTS[-1][0] != "first loss":
        mark("first loss")
    return torch.nn.functional.cross_entropy(outputs, targets)


trainer = mpidl.Trainer(
    DigitsCNN(),
    loss,
    functools.partial(torch.optim.SGD, lr=0.05),
    batch_size=64,
    partitions=8,
    threads_per_rank=1,
)
mark("import the trainer")
trainer.fit(train_set, epochs=1)
ends = world.allreduce(torch.tensor([at for _, at in PARTS], dtype=torch.float64).numpy(), "max")
if world.rank == 0:
    before = float(os.environ.get("STARTED", ends[0]))
    for (part, _), end in zip(PARTS, ends, strict=True):
        print(f"{part:30s} {end - before:6.2f} s")
        before = end
