"""Plain weights and plain optimizer state, which torch loads without mpidl."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mpidl.checkpoint.files import list_checkpoints, sync, usual_mode
from mpidl.checkpoint.manifest import MANIFEST
from mpidl.checkpoint.whole import read_optimizer, read_weights
from mpidl.errors import CheckpointError, DamagedError
from mpidl.runtime import warn

WEIGHTS = "weights.safetensors"
Read = TypeVar("Read")


def save_weights(state: Mapping[str, torch.Tensor], path: pathlib.Path) -> None:
    """Write a state dict; the file appears whole. Tied tensors are written under each of their names.

    Raises:
        CheckpointError: the file cannot be written.
    """
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    _write_whole(path, lambda temporary: save_file(copies, temporary))


def save_optimizer(state: Mapping[str, Any], path: pathlib.Path) -> None:
    """Write an optimizer's state dict for `torch.load(path, weights_only=True)`; the file appears whole.

    Raises:
        CheckpointError: the file cannot be written.
    """
    _write_whole(path, lambda temporary: torch.save(dict(state), temporary))


def _write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    temporary = path.with_name(f".new-{path.name}")
    try:
        write(temporary)
        usual_mode(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer makes RuntimeErrors of the system's
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}") from None


def load_weights(path: str | pathlib.Path, epoch: int | str | None = None) -> dict[str, torch.Tensor]:
    """The state dict found at a path: a run directory, a checkpoint directory or a safetensors file. No MPI.

    Args:
        path: of a run directory, its newest checkpoint that is whole is read, with a warning about any that is not,
            or its `weights.safetensors` where there is none.
        epoch: of a run directory, the checkpoint after so many epochs; "2+17": and 17 iterations.

    Raises:
        CheckpointError: there is nothing to read, or it is damaged.
    """
    return find_weights(path, epoch)[1]


def find_weights(
    path: str | pathlib.Path, epoch: int | str | None = None
) -> tuple[pathlib.Path, dict[str, torch.Tensor]]:
    """As `load_weights`, with the file or checkpoint directory that was read."""
    path = pathlib.Path(path)
    if path.is_file():
        return path, _read(path)
    if epoch is None and (path / WEIGHTS).is_file() and not list_checkpoints(path):
        return path / WEIGHTS, _read(path / WEIGHTS)
    return _read_checkpoint(path, epoch, read_weights)


def load_optimizer(path: str | pathlib.Path, epoch: int | str | None = None) -> dict[str, Any]:
    """The state dict of the optimizer found in a run directory or a checkpoint directory, in torch's format. No MPI.

    Arguments and errors are those of `load_weights`.
    """
    return _read_checkpoint(pathlib.Path(path), epoch, read_optimizer)[1]


def _read_checkpoint(
    path: pathlib.Path, epoch: int | str | None, read: Callable[[pathlib.Path], Read]
) -> tuple[pathlib.Path, Read]:
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a run directory, a checkpoint or a .safetensors file")
    if epoch is None and (path / MANIFEST).is_file():
        return path, read(path)
    if epoch is None:
        return _read_newest(path, read)
    found = {_text(position): each for position, each in list_checkpoints(path)}
    if str(epoch) not in found:
        there = ", ".join(found) or "none"
        raise CheckpointError(f"{path} does not hold the checkpoint of epoch {epoch}; checkpoints there: {there}")
    return found[str(epoch)], read(found[str(epoch)])


def _read_newest(path: pathlib.Path, read: Callable[[pathlib.Path], Read]) -> tuple[pathlib.Path, Read]:
    """The newest of a run directory that is whole; a training may write there, and remove old ones meanwhile."""
    tried: list[pathlib.Path] = []
    while True:
        left = [each for _, each in list_checkpoints(path) if each not in tried]
        if not left:
            raise CheckpointError(f"{path} does not hold a checkpoint; checkpoints there: none")
        try:
            return left[-1], read(left[-1])
        except DamagedError as error:
            tried.append(left[-1])
            is_there = left[-1].exists()
            if is_there and len(left) == 1:
                raise
            if is_there:
                warn(f"{error}; the one before it is tried")


def _text(position: tuple[int, int]) -> str:
    """`2`, or `2+17` where 17 iterations more are done."""
    return f"{position[0]}+{position[1]}" if position[1] else str(position[0])


def _read(path: pathlib.Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from None
