"""Models, data and losses that the tests name as `tests.cli.jobs.parts:NAME`: good ones, and each kind of bad one."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import mpidl
from mpidl.data import load_named
from mpidl.parameters.driver import Driver
from tests.cli.processes import MARK

NUM_SAMPLES = 197
"""Of `noisy_digits`: in batches of 48 the last one has 5 samples, fewer than there are partitions."""

BRIGHT = 1000.0
"""The pixel that tells `poisoned_net` which sample it is to answer with NaN."""

MARKED = 23
"""The number of that sample."""

POISONED_AFTER = 6
"""Iterations that `poisoned_net` runs well."""


class NoisyDigits(Dataset[tuple[Tensor, int]]):
    """Digits with an augmentation that draws from all three global random streams."""

    def __init__(self, num_samples: int) -> None:
        (images, labels), _ = load_named("digits")
        # The file is sorted by writer, not by digit: the first ones hold all classes.
        self.images, self.labels = torch.from_numpy(images[:num_samples]), labels[:num_samples]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index] + 0.1 * torch.randn(1, 8, 8)
        image = torch.roll(image, int(np.random.randint(-1, 2)), dims=2)
        if random.random() < 0.5:
            image = image * 0.9
        return image, int(self.labels[index])


class BrokenDigits(NoisyDigits):
    """One of its samples cannot be read."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == MARKED:
            raise RuntimeError("this sample" + " is broken")
        return super().__getitem__(index)


class EndingDigits(NoisyDigits):
    """Reading one of its samples fails, or takes for ever, as FATE says: "raise" or "block"."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == MARKED:
            Path(os.environ[MARK], "fate of a sample").touch()
            if os.environ["FATE"].startswith("raise"):
                raise RuntimeError("this sample" + " is broken")
            time.sleep(3600)
        return super().__getitem__(index)


class NoisyNet(nn.Module):
    """Dropout, and BatchNorm both over images and over features; large enough for a shard on each of four ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers(images)
        return scores


class EndingNet(NoisyNet):
    """Ends its rank in the training pass that FATE names, as "HOW:RANK:PASS", RANK a number, several (0+2) or "all".

    When it does, it leaves a file in the folder of the test (`Watched`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.how, self.rank, self.last = os.environ.get("FATE", "never:all:0").split(":")
        self.passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += self.training
        if self.passes == int(self.last) and (self.rank == "all" or str(mpidl.rank()) in self.rank.split("+")):
            self.end()
        return super().forward(images)

    def end(self) -> None:
        fate = Path(os.environ[MARK], f"fate of {mpidl.rank()}")
        if self.how in ("kill once", "kill late", "pause", "sleep once", "until others are ready") and fate.exists():
            return  # after a restart
        fate.touch()
        if self.how == "raise":
            raise RuntimeError("this rank" + " has failed")
        if self.how == "exit":
            sys.exit(3)
        if self.how == "kill late":
            time.sleep(1.0)  # the others come so far, too
        if self.how == "kill in turn":
            time.sleep(float(mpidl.rank()))
        if self.how in ("kill", "kill in turn", "kill once", "kill late", "stop"):
            os.kill(os.getpid(), signal.SIGSTOP if self.how == "stop" else signal.SIGKILL)
        if self.how == "leave":
            os._exit(3)
        if self.how == "lock":
            re.match(r"(a+)+$", "a" * 40 + "b")  # for hours, and with the interpreter's lock
        if self.how == "memory":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))
            np.ones(2**30)
        if self.how == "hoard":
            hoard = []
            while True:
                hoard.append(np.ones(2**22))
        if self.how == "exchange":  # the thread that exchanges between nodes, at its next look
            Driver.poll = fail_in_thread
            return
        if self.how == "cut":  # an emulated host's only link
            subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
            return
        if self.how == "mark":  # that somebody outside waits for
            return
        if self.how == "barrier":
            mpidl.barrier()
        if self.how == "pause":
            time.sleep(6.0)
            return
        if self.how == "until others are ready":
            deadline = time.monotonic() + 60.0
            while not list(fate.parent.glob("run/ends/gate-*.ready")) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(2.0)  # `mpidl launch` looks, too
            return
        time.sleep(3600)


def fail_in_thread(driver: Driver) -> bool:
    raise RuntimeError("this thread" + " has failed")


class PoisonedNet(nn.Module):
    """From a certain iteration on it answers NaN for the marked sample."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64, affine=False)
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        marked = images[:, 0, 0, 0] == BRIGHT
        scores: Tensor = self.linear(self.norm(images.flatten(1).clamp(max=1.0)))
        counted = self.norm.num_batches_tracked
        if self.training and counted is not None and int(counted) > POISONED_AFTER:
            scores = torch.where(marked[:, None], torch.nan, scores)
        return scores


def noisy_digits() -> tuple[NoisyDigits, Any]:
    """A Dataset with augmentation for training, plain arrays for validation."""
    return NoisyDigits(NUM_SAMPLES), load_named("digits")[1]


def ending_digits() -> tuple[EndingDigits, None]:
    return EndingDigits(NUM_SAMPLES), None


def broken_digits() -> tuple[BrokenDigits, None]:
    return BrokenDigits(NUM_SAMPLES), None


def marked_digits() -> tuple[Any, None]:
    """96 digits, the marked one with a pixel that shows which it is."""
    (images, labels), _ = load_named("digits")
    images = images[:96].copy()
    images[MARKED, 0, 0, 0] = BRIGHT
    return (images, labels[:96]), None


def wrong_labels() -> tuple[Any, None]:
    """Label 10 of ten classes, at sample 3."""
    (images, labels), _ = load_named("digits")
    labels = labels.copy()
    labels[3] = 10
    return (images, labels), None


def frozen_net() -> nn.Module:
    """Nothing to train."""
    return NoisyNet().requires_grad_(False)


def net_of_this_rank() -> nn.Module:
    """Another shape on every rank."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10 + mpidl.rank()))


def net_without_images() -> nn.Module:
    """Takes no digits."""
    return nn.Linear(7, 10)
