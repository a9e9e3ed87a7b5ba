"""Trains short jobs and writes down all that must not depend on the ranks: `bits.py OUTPUT_FOLDER JOB...`."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import mpidl
from mpidl import cli
from mpidl.data import load_named
from mpidl.metrics import accuracy
from mpidl.telemetry import Telemetry
from tests.cli.jobs.parts import NoisyNet, noisy_digits

JOBS: dict[str, dict[str, Any]] = {
    "noise": {"group_size": 1, "loader_workers": 0},
    "noise_by_worker": {"group_size": 4, "loader_workers": 1},
    "adam": {"optimizer": functools.partial(torch.optim.Adam, lr=0.01), "group_size": "auto"},
}


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The losses and metrics that a run has written down, without times."""
    kept = ("event", "epoch", "iteration", "loss", "lr", "accuracy", "samples")
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    wanted = [event for event in events if event["event"] in ("epoch", "validation")]
    if all(event["iterations"] == 1 for event in events if event["event"] == "group"):
        wanted += [event for event in events if event["event"] == "group"]
    return [{key: event[key] for key in kept if key in event} for event in wanted]


def train(run_dir: Path, **settings: Any) -> dict[str, Any]:
    """Train the noisy network. Collective; the weights' hash is read on rank 0 only."""
    torch.manual_seed(1)
    model = NoisyNet()
    optimizer = settings.pop("optimizer", functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    trainer = mpidl.Trainer(
        model, nn.functional.cross_entropy, optimizer, batch_size=48, partitions=8, run_dir=run_dir,
        schedule=functools.partial(CosineAnnealingLR, T_max=15), metrics={"accuracy": accuracy},
        telemetry=Telemetry(run_dir if mpidl.rank() == 0 else None, quiet=True), **settings,
    )  # fmt: skip
    train_set, validation_set = noisy_digits()
    history = trainer.fit(train_set, validation_set, epochs=3)
    own = (logits(model), [event["loss"] for event in history])
    everyones = trainer.world.allgather_object(own)
    assert all(other == own for other in everyones), "the ranks predict differently"
    trainer.close()
    return {"logits": own[0]} | files(run_dir)


def files(run_dir: Path) -> dict[str, Any]:
    """What the files of a run say, on rank 0."""
    if mpidl.rank() != 0:
        return {}
    return {"weights": file_hash(run_dir / "weights.safetensors"), "numbers": numbers(run_dir)}


def logits(model: nn.Module) -> str:
    """The predictions for the validation set, as a hash of their bytes."""
    images = load_named("digits")[1][0]
    model.eval()
    with torch.no_grad():
        scores = model(torch.from_numpy(images)).numpy()
    assert np.isfinite(scores).all()
    return hashlib.sha256(scores.tobytes()).hexdigest()


def train_by_command(run_dir: Path) -> dict[str, Any]:
    """Train the digits as the command line does."""
    job = Path(__file__).with_name("small.toml")
    assert cli.main(["train", str(job), "--group-size", "1", "--run-dir", str(run_dir)]) == 0
    return files(run_dir)


def main(folder: Path, names: list[str]) -> None:
    """Run the jobs that are named."""
    mpidl.init(threads_per_rank=1)
    results = {}
    for name in names:
        results[name] = train(folder / name, **JOBS[name]) if name in JOBS else train_by_command(folder / name)
    if mpidl.rank() == 0:
        (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
