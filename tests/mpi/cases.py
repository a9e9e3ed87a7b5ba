"""Models, data and jobs that several tests train, and how a Trainer is made of a job."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import mpidl
from mpidl.telemetry import Telemetry
from tests.mpi.reference import Job, of_arrays

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
NESTEROV = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
ADAM = functools.partial(torch.optim.Adam, lr=2e-3)
ADAMW = functools.partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.1)

NUM_FEATURES, NUM_CLASSES = 20, 5


def made(build: Callable[[], nn.Module], seed: int = 1) -> nn.Module:
    """A model of which every weight and buffer is a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def dense() -> nn.Module:
    """29 k parameters: on five ranks every shard holds some."""
    return nn.Sequential(
        nn.Linear(NUM_FEATURES, 200), nn.Tanh(), nn.Linear(200, 120), nn.Tanh(), nn.Linear(120, NUM_CLASSES)
    )


def normalised() -> nn.Module:
    """BatchNorm and dropout."""
    return nn.Sequential(
        nn.Linear(NUM_FEATURES, 150),
        nn.BatchNorm1d(150),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(150, 150),
        nn.BatchNorm1d(150, momentum=None),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(150, NUM_CLASSES),
    )


def tiny() -> nn.Module:
    """23 parameters: less than one block of the flat vector, and tensors smaller than the number of ranks."""
    return nn.Sequential(nn.Linear(NUM_FEATURES, 1), nn.Tanh(), nn.Linear(1, 1, bias=False), Scale())


class Scale(nn.Module):
    """One scalar parameter of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.factor


def convolutional() -> nn.Module:
    """For images of 1 x 10 x 10."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(144, 100),
        nn.Tanh(),
        nn.Linear(100, NUM_CLASSES),
    )


def classes(num_samples: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels that a linear map with noise explains."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_samples, NUM_FEATURES, generator=generator)
    scores = inputs[:, :NUM_CLASSES] * 2 + torch.randn(num_samples, NUM_CLASSES, generator=generator)
    return inputs, scores.argmax(1)


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images that are cropped, flipped and made noisy by all three random generators."""

    def __init__(self, num_samples: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.labels = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
        noise = torch.randn(num_samples, 1, 14, 14, generator=generator)
        self.images = noise + self.labels.view(-1, 1, 1, 1).float() - 2

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        top, left = int(np.random.randint(5)), random.randrange(5)
        image = self.images[index, :, top : top + 10, left : left + 10]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image + 0.1 * torch.randn(image.shape), self.labels[index]


class Kept(Telemetry):
    """Events in a list."""

    def __init__(self) -> None:
        super().__init__(None, quiet=True)
        self.events: list[dict[str, Any]] = []

    def record(self, event: str, **fields: object) -> None:
        self.events.append({"event": event, **fields})

    def of(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each["event"] == event]


def job_of(*arrays: torch.Tensor, **changes: Any) -> Job:
    """Classification of these arrays, by default two epochs of SGD with momentum in batches of 32."""
    settings: dict[str, Any] = {
        "loss_fn": F.cross_entropy,
        "optimizer": SGD,
        "samples": of_arrays(*arrays),
        "num_samples": len(arrays[0]),
        "batch_size": 32,
        "epochs": 2,
        **changes,
    }
    return Job(**settings)


def trainer_of(model: nn.Module, job: Job, **options: Any) -> mpidl.Trainer:
    """A Trainer that does the job, silently."""
    return mpidl.Trainer(
        model,
        job.loss_fn,
        job.optimizer,
        batch_size=job.batch_size,
        partitions=job.partitions,
        seed=job.seed,
        schedule=job.schedule,
        param_groups=job.groups(model) if job.groups else None,
        threads_per_rank=1,
        **{"telemetry": Telemetry(None, quiet=True), **options},
    )
