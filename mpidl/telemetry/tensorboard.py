"""The run's events as TensorBoard's files."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpidl.errors import ConfigError

_NAMED = {"group": "train", "epoch": "epoch", "validation": "validation", "summary": "summary"}
_GROUPS_EVERY_S = 1.0
"""Groups may be shorter; writing the numbers of one takes about a millisecond."""

_PLACES = ("epoch", "iteration", "iterations", "samples")


def check_tensorboard() -> None:
    """Raise ConfigError where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard is asked for, and is not installed: pip install tensorboard, or leave it out")


class TensorBoard:
    """A listener that writes scalars, phases' shares and histograms. The files are opened at the first event.

    Args:
        folder: gets the files; a resumed run adds another.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._wrote_group_at = float("-inf")

    def __call__(self, event: str, fields: Mapping[str, Any]) -> None:
        """Write one event."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second

            self._writer = SummaryWriter(str(self._folder))
        if event == "group":
            now = time.monotonic()
            if now - self._wrote_group_at < _GROUPS_EVERY_S:
                return
            self._wrote_group_at = now
        step = fields.get("iteration", 0)
        for name, value in _scalars(event, fields).items():
            self._writer.add_scalar(name, value, step)
        if event == "histograms":
            for name, told in fields["parameters"].items():
                self._add_histogram(name, told, step)
        if event in ("epoch", "validation", "histograms"):
            self._writer.flush()
        if event == "end":
            self._writer.close()

    def _add_histogram(self, name: str, told: Mapping[str, Any], step: int) -> None:
        counts, edges = np.array(told["counts"]), np.linspace(told["min"], told["max"], len(told["counts"]) + 1)
        middles, number = (edges[:-1] + edges[1:]) / 2, float(counts.sum())
        self._writer.add_histogram_raw(
            name,
            min=told["min"],
            max=told["max"],
            num=number,
            sum=float(counts @ middles),
            sum_squares=float(counts @ middles**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


def _scalars(event: str, fields: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event, by TensorBoard's names, such as `train/loss` and `phases/compute`."""
    if event not in _NAMED:
        return {}
    numbers = {name: value for name, value in fields.items() if isinstance(value, int | float | np.number)}
    found = {f"{_NAMED[event]}/{name}": float(value) for name, value in numbers.items() if name not in _PLACES}
    if event == "group" and fields["seconds"]:
        found |= {f"phases/{name}": 100 * s / fields["seconds"] for name, s in fields["phases"].items()}
    return found
