"""A model that stops a job at a known place, so that what is done to the job is done in the middle of a training."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import Tensor

import mpidl
from mpidl.runtime import signals
from tests.cli.jobs.parts import NoisyNet

PAUSE_S = 0.02


class GatedNet(NoisyNet):
    """Waits in the training pass that GATE names, as "FOLDER:PASS", for the file `open` or a signal.

    A rank that waits has left the file `reached-RANK` in the folder.
    """

    def __init__(self) -> None:
        super().__init__()
        folder, _, self.gate = os.environ.get("GATE", ":0").rpartition(":")
        self.folder, self.passes = Path(folder), 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += self.training
        if self.passes == int(self.gate) and self.training:
            (self.folder / f"reached-{mpidl.rank()}").touch()
            while not signals.received() and not (self.folder / "open").exists():
                time.sleep(PAUSE_S)
        return super().forward(images)
