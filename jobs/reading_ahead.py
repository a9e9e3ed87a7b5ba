"""How long ranks wait for slow data: mpirun -n 2 python jobs/reading_ahead.py [WORKERS [GROUP_SIZE]].

A sample takes 5 ms to read. Computing is replaced by waits of 25 ms an iteration and rank, so that nothing but the
reading is measured. The result table has the share of the time that was spent waiting for data; `loader start` is the
wait for the first batch, for which the worker processes have to start.
"""

import functools
import sys
import time

import torch
from torch import nn
from torch.utils.data import Dataset

import mpidl

PARTITIONS = 8


class Slow(Dataset):
    """Samples that take 5 ms each to read."""

    def __len__(self):
        return 6400

    def __getitem__(self, index):
        time.sleep(0.005)
        return torch.full((64,), float(index % 10)), index % 10


class Waiting(nn.Module):
    """Waits as long as a model of the same iteration would compute."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, inputs):
        """Of one partition."""
        time.sleep(0.025 * mpidl.size() / PARTITIONS)
        return self.linear(inputs)


if __name__ == "__main__":
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    trainer = mpidl.Trainer(
        Waiting(),
        nn.functional.cross_entropy,
        functools.partial(torch.optim.SGD, lr=0.01),
        batch_size=32,
        partitions=PARTITIONS,
        group_size=int(sys.argv[2]) if len(sys.argv) > 2 else "auto",
        threads_per_rank=1,
        loader_workers=workers,
    )
    trainer.fit(Slow(), epochs=3)
    trainer.close()
