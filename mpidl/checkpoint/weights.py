"""Plain weights: one safetensors file with the state dict's names, which torch loads without mpidl."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mpidl.checkpoint.files import MANIFEST, contiguous_copy, list_checkpoints, sync, usual_mode
from mpidl.checkpoint.sharded import read_weights
from mpidl.errors import CheckpointError

WEIGHTS = "weights.safetensors"


def save_weights(state: Mapping[str, torch.Tensor], path: pathlib.Path) -> None:
    """Write a state dict; the file appears whole. Tied tensors are written under each of their names.

    Raises:
        CheckpointError: the file cannot be written.
    """
    temporary = path.with_name(f".new-{path.name}")
    try:
        save_file({name: contiguous_copy(tensor) for name, tensor in state.items()}, temporary)
        usual_mode(temporary)
        sync(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from None


def load_weights(path: str | pathlib.Path, epoch: int | str | None = None) -> dict[str, torch.Tensor]:
    """The state dict found at a path: a run directory, a checkpoint directory or a safetensors file. No MPI.

    Args:
        path: of a run directory, its newest checkpoint is read, or its `weights.safetensors` where there is none.
        epoch: of a run directory, the checkpoint after so many epochs; "2+17": and 17 iterations.

    Raises:
        CheckpointError: there is nothing to read, or it is damaged.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return _read(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a run directory, a checkpoint or a .safetensors file")
    if epoch is None and (path / MANIFEST).is_file():
        return read_weights(path)
    found = {_text(position): each for position, each in list_checkpoints(path)}
    if epoch is None and not found and (path / WEIGHTS).is_file():
        return _read(path / WEIGHTS)
    wanted = next(reversed(found), "") if epoch is None else str(epoch)
    if wanted not in found:
        there = ", ".join(found) or "none"
        what = "a checkpoint" if epoch is None else f"the checkpoint of epoch {epoch}"
        raise CheckpointError(f"{path} does not hold {what}; checkpoints there: {there}")
    return read_weights(found[wanted])


def _text(position: tuple[int, int]) -> str:
    """`2`, or `2+17` where 17 iterations more are done."""
    return f"{position[0]}+{position[1]}" if position[1] else str(position[0])


def _read(path: pathlib.Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from None
