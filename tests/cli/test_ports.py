"""A job listens where its MPI does, and nowhere else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cli.processes import Watched
from tests.launch import launch

pytestmark = pytest.mark.thorough

# MPI first, alone; then a training with everything that runs beside it: the watchdog, the exchange's thread, workers.
CODE = """
import glob, os, sys
from mpi4py import MPI

def listening():
    rows = [line.split() for name in ("tcp", "tcp6", "udp", "udp6")
            if os.path.exists(f"/proc/net/{name}") for line in open(f"/proc/net/{name}").readlines()[1:]]
    inodes = {row[9] for row in rows if row[3] in ("0A", "07")}  # TCP's LISTEN; udp that takes from anybody
    unix = [line.split() for line in open("/proc/net/unix").readlines()[1:]]
    inodes |= {row[6] for row in unix if row[3] == "00010000"}  # __SO_ACCEPTCON
    found = set()
    for path in glob.glob(f"/proc/{os.getpid()}/fd/*") + [
        each for child in children() for each in glob.glob(f"/proc/{child}/fd/*")
    ]:
        try:
            found |= {os.readlink(path)} & {f"socket:[{inode}]" for inode in inodes}
        except OSError:
            continue
    return found

def children():
    return open(f"/proc/self/task/{os.getpid()}/children").read().split()

before = listening()
import torch, mpidl
from tests.cli.jobs.parts import NoisyNet, noisy_digits

class Looking(NoisyNet):
    def forward(self, images):
        global found, workers
        found |= listening()
        workers = max(workers, len(children()))
        return super().forward(images)

found, workers = set(), 0
train, _ = noisy_digits()
trainer = mpidl.Trainer(
    Looking(), torch.nn.functional.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1), batch_size=48, partitions=4,
    run_dir=sys.argv[1], loader_workers=1, hang_seconds=60,
)
trainer.fit(train, epochs=1)
assert workers, "no worker was looked at"
print("beyond MPI's:", sorted((found | listening()) - before))
"""


def test_nothing_listens_on_a_port_of_its_own(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    env = {**watched.env, "MPIDL_EMULATED_NODES": "2"}
    ended = launch(2, [sys.executable, "-c", CODE, str(tmp_path / "run")], env=env).check()
    assert ended.stdout.count("beyond MPI's: []") == 2, ended.output
