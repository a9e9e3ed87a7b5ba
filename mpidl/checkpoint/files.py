"""Files that appear whole or not at all, and the names inside a run directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
from typing import Any

import torch

from mpidl.errors import CheckpointError

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
_KEYS = {"tensors", "layout", "aliases", "shards", "rest", "optimizer", "buffers", "progress"}
_NAME = re.compile(r"epoch-(\d{6})(?:\+(\d{6,}))?")


Position = tuple[int, int]
"""Whole epochs, and iterations of the epoch behind them."""


def checkpoint_path(run_dir: pathlib.Path, epoch: int, iterations: int = 0) -> pathlib.Path:
    """Where the checkpoint after `epoch` epochs, and `iterations` iterations of the next, stands."""
    within = f"+{iterations:06d}" if iterations else ""
    return run_dir / CHECKPOINTS / f"epoch-{epoch:06d}{within}"


def list_checkpoints(run_dir: pathlib.Path) -> list[tuple[Position, pathlib.Path]]:
    """The whole checkpoints of a run directory, oldest first."""
    found = []
    for path in (run_dir / CHECKPOINTS).glob("epoch-*"):
        match = _NAME.fullmatch(path.name)
        if match and (path / MANIFEST).is_file():
            found.append(((int(match[1]), int(match[2] or 0)), path))
    return sorted(found)


def sync(path: pathlib.Path) -> None:
    """Have a file's content, or a directory's entries, on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def contiguous_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with memory of its own in the usual order, as safetensors wants it."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def usual_mode(path: pathlib.Path) -> None:
    """Give a file the mode that the user's umask says; safetensors makes it the owner's only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Write a JSON file and have it on disk."""
    path.write_text(json.dumps(value, indent=1) + "\n")
    sync(path)


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is not one that this version reads.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != 3:
        raise CheckpointError(f"{path / MANIFEST} is not of format 3, the one that this version reads")
    missing = sorted(_KEYS - manifest.keys())
    if missing:
        raise CheckpointError(f"{path / MANIFEST} lacks {', '.join(missing)}: it is damaged")
    try:
        _check_shards(manifest)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {type(error).__name__} {error}") from None
    return manifest


def _check_shards(manifest: dict[str, Any]) -> None:
    """Raise unless the shards cover all elements, and all entries are of the types that readers expect."""
    runs = []
    for entry in manifest["shards"]:
        if (str(entry["file"]), len(entry["sha256"])) != (entry["file"], 64):
            raise ValueError(f"the name or checksum of shard {entry['file']}")
        runs += [(int(start), int(stop), entry["file"]) for start, stop in entry["runs"]]
    position = 0
    for start, stop, file in sorted(runs):
        if start != position or stop <= start:
            raise ValueError(f"shard {file} does not go on at element {position}")
        position = stop
    total = sum(math.prod(int(length) for length in shape) for _, shape in manifest["tensors"])
    if position != total:
        raise ValueError(f"the shards end at element {position} of {total}")
    dict(manifest["aliases"]), dict(manifest["progress"])
    str(manifest["rest"]["file"]), len(manifest["rest"]["sha256"])
    optimizer = manifest["optimizer"]
    for state, options in zip(optimizer["state"], optimizer["options"], strict=True):
        if state:
            list(state["arrays"]), dict(state["scalars"]), list(state["tensor_scalars"])
        dict(options)


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(temporary: pathlib.Path, final: pathlib.Path) -> None:
    """Make a finished directory appear under its name at once, in place of an older one of that name."""
    for file in temporary.iterdir():
        sync(file)
    sync(temporary)
    if final.exists():
        old = final.with_name(f".old-{final.name}")
        remove(old)
        final.rename(old)
        try:
            temporary.rename(final)
        except OSError:
            old.rename(final)
            raise
        remove(old)
    else:
        temporary.rename(final)
    sync(final.parent)


def remove(path: pathlib.Path) -> None:
    """Remove a directory that may not be there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
