"""A checkpoint as plain PyTorch has it: the model's whole state dict, the optimizer's whole state dict. No MPI."""

from __future__ import annotations

import itertools
import math
import pathlib
from typing import Any

import torch

from mpidl.checkpoint.manifest import MANIFEST, read_manifest
from mpidl.checkpoint.reading import Wanted, read_rest, read_vectors, state_keys
from mpidl.errors import DamagedError


def read_weights(path: pathlib.Path) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint directory, without a model.

    Raises:
        DamagedError: a file that holds weights or buffers is not what was written.
    """
    manifest = read_manifest(path)
    state = _tensors(path, manifest, "weights")
    state.update(read_rest(path, manifest))
    for alias, name in manifest["aliases"].items():
        if name not in state:
            raise DamagedError(f"{path / MANIFEST} is damaged: {alias} is {name}, which is not there")
        state[alias] = state[name]
    return state


def read_optimizer(path: pathlib.Path) -> dict[str, Any]:
    """The state dict of the checkpoint's optimizer over the whole model, as the torch optimizer itself would give it.

    `load_state_dict` of an optimizer of the same class over the same param groups takes it; where no groups were
    given, these are `model.parameters()`, less what is frozen.

    Raises:
        DamagedError: a file is not what was written.
    """
    manifest = read_manifest(path)
    saved = manifest["optimizer"]
    vectors = {key: _tensors(path, manifest, key) for key in state_keys(manifest) if key != "weights"}
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    numbers = itertools.count()
    for options, names, entry in zip(saved["options"], saved["names"], saved["state"], strict=True):
        own = {name: next(numbers) for name in names}
        groups.append({**_with_tuples(options), "params": list(own.values())})
        for name, number in own.items() if entry else ():
            state[number] = {key: vectors[f"state.{key}"][name].clone() for key in entry["arrays"]}
            for key, value in entry["scalars"].items():
                state[number][key] = torch.tensor(value) if key in entry["tensor_scalars"] else value
    return {"state": state, "param_groups": groups}


def _with_tuples(options: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only; torch's optimizers have pairs such as Adam's betas as tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def _tensors(path: pathlib.Path, manifest: dict[str, Any], key: str) -> dict[str, torch.Tensor]:
    """One of the vectors, cut into tensors by the names of the model's."""
    sizes = [math.prod(shape) for _, shape in manifest["tensors"]]
    vector = read_vectors(path, manifest, [Wanted((0, sum(sizes)), 0)], [key], sum(sizes))[key]
    parts = torch.from_numpy(vector).split(sizes)
    return {name: part.clone().view(shape) for (name, shape), part in zip(manifest["tensors"], parts, strict=True)}
