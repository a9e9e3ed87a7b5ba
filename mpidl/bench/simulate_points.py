"""What simulations of points and of measured iterations have in common."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpidl import models
from mpidl.bench.report import Row
from mpidl.bench.workload import Machine
from mpidl.errors import ConfigError
from mpidl.simulation import Overheads

ASSUMED_GBYTES = 10.0
"""That a rank reads and writes in a second, where nothing else is told."""

Speeds = tuple[float, float]
"""Bytes that a rank's sums, and its optimizer, read and write in a second."""

Kind = type | tuple[str, ...]
"""What is wanted: one of some names, or of a type; of numbers only those above 0."""

_KINDS: dict[type, str] = {str: "a text", int: "a whole number above 0", float: "a number above 0", dict: "a mapping"}


def meta_model(name: str) -> nn.Module:
    """A model without weights.

    Raises:
        ConfigError: unknown, or without the shape of its images.
    """
    with torch.device("meta"):
        model = models.build(name)
    if not hasattr(model, "image_shape"):
        raise ConfigError(f"model {name} does not tell the shape of its images (image_shape); choose another one")
    return model


def read_rows(path: Path, bench: str, kinds: Mapping[str, Kind]) -> list[Row]:
    """The rows of a benchmark's figures.

    Args:
        path: the file.
        bench: who wrote it.
        kinds: what every row has to have.

    Raises:
        ConfigError: the file cannot be read, is another's, or something is missing in a row.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    rows = document.get("rows") if isinstance(document, dict) and document.get("bench") == bench else None
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{path} has no figures of {bench}; give a file that it wrote")
    for row in rows:
        check_row(row, kinds, path)
    return rows


def check_row(row: Any, kinds: Mapping[str, Kind], path: Path) -> None:
    """See that a row, or a mapping in it, has what is wanted.

    Raises:
        ConfigError: it has not.
    """
    for name, kind in kinds.items():
        value = row.get(name) if isinstance(row, dict) else None
        if not _fits(value, kind):
            wanted = " or ".join(kind) if isinstance(kind, tuple) else _KINDS[kind]
            raise ConfigError(
                f"{path} is damaged, or was written by another version: {name!r} of a row is {value!r}, not {wanted}; "
                "measure again"
            )


def _fits(value: Any, kind: Kind) -> bool:
    if isinstance(kind, tuple):
        return value in kind
    if kind in (int, float):
        is_number = isinstance(value, int) or (isinstance(value, float) and kind is float)
        return is_number and 0 < value < math.inf
    return isinstance(value, kind)


def machine_of(parsed: argparse.Namespace, speeds: Speeds | None = None) -> Machine:
    """A node, as the flags have it; `speeds` as measured, else of the flag, else `ASSUMED_GBYTES`."""
    sum_bytes_s, update_bytes_s = speeds or 2 * (1e9 * (parsed.memory_gbytes or ASSUMED_GBYTES),)
    return Machine(
        ranks_per_node=parsed.ranks_per_node,
        partitions_per_rank=parsed.partitions_per_rank,
        memory_bytes_s=sum_bytes_s,
        update_bytes_s=update_bytes_s,
        poll_s=1e-6 * parsed.poll_us,
        throttle=parsed.throttle,
    )


def overheads_of(machine: Machine) -> Overheads:
    """Of messages: a round is seen to be over as late as an exchange; the library adds as fast as memory is."""
    return Overheads(round_s=machine.poll_s, add_s_per_byte=3 / machine.memory_bytes_s / machine.ranks_per_node)
