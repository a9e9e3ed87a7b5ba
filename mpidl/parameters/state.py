"""The optimizer's whole state in torch's own format, gathered on rank 0 and scattered from there.

For own loops: `torch.save(manager.state_dict())` on rank 0. The Trainer's checkpoints do not pass here: each rank
writes its shard.

Phases: ranks agree on which state exists (objects, small); then, tensor by tensor, shards travel between their owners
and rank 0. If a rank stops, the others wait in the all-to-all until the job is aborted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpidl.errors import LayoutError
from mpidl.parameters.layout import FlatLayout, Shards
from mpidl.parameters.model import Group
from mpidl.parameters.update import ShardOptimizer
from mpidl.runtime import World

Float32Array = NDArray[np.float32]


def gather_shards(world: World, own: Float32Array, shards: Shards) -> Float32Array:
    """The whole vector on rank 0, an empty array elsewhere. Collective."""
    if shards.is_replicated:
        return own if world.rank == 0 else own[:0]
    sizes = [shards.size_of(rank) for rank in range(world.size)]
    offsets = _offsets(sizes)
    received = np.empty(sum(sizes) if world.rank == 0 else 0, np.float32)
    nothing = [0] * world.size
    to_root = [own.size, *nothing[1:]]
    receive = sizes if world.rank == 0 else nothing
    world.alltoall_varying(own, to_root, nothing, received, receive, offsets)
    whole = np.empty_like(received)
    for rank in range(world.size if world.rank == 0 else 0):
        place = offsets[rank]
        for start, stop in shards.runs(rank):
            whole[start:stop] = received[place : place + stop - start]
            place += stop - start
    return whole


def scatter_shards(world: World, whole: Float32Array, shards: Shards) -> Float32Array:
    """Each rank's shard of rank 0's vector. Collective."""
    if shards.is_replicated:
        own = whole.copy() if world.rank == 0 else np.empty(shards.size_of(world.rank), np.float32)
        world.broadcast(own)
        return own
    sizes = [shards.size_of(rank) for rank in range(world.size)]
    own = np.empty(sizes[world.rank], np.float32)
    nothing = [0] * world.size
    send, outgoing = nothing, np.empty(0, np.float32)
    if world.rank == 0:
        send = sizes
        runs = [run for rank in range(world.size) for run in shards.runs(rank)]
        outgoing = np.concatenate([outgoing, *(whole[start:stop] for start, stop in runs)])
    world.alltoall_varying(outgoing, send, _offsets(sizes), own, [own.size, *nothing[1:]], nothing)
    return own


def _offsets(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:rank]) for rank in range(len(sizes))]


def merge_scalars(per_rank: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Each group's entry from the first rank that holds elements of the group."""
    return [dict(next((entry for entry in entries if entry), {})) for entries in zip(*per_rank, strict=True)]


def group_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Each group's options (learning rate, betas, ...), without its tensors."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def full_state(
    world: World, update: ShardOptimizer, groups: Sequence[Group], layout: FlatLayout, shards: Shards
) -> dict[str, Any]:
    """The state dict that `optimizer` over the whole model would give, on rank 0; {} elsewhere. Collective."""
    scalars = merge_scalars(world.allgather_object(update.scalars()))
    arrays = update.arrays()
    keys = sorted({key for entry in scalars for key in entry.get("arrays", [])})
    whole = {
        key: gather_shards(world, arrays.get(key, np.zeros(update.shard_size, np.float32)), shards) for key in keys
    }
    if world.rank > 0:
        return {}
    slots = {slot.name: slot for slot in layout.slots}
    state: dict[int, dict[str, Any]] = {}
    param_groups, index = [], 0
    for options, (_, names), entry in zip(group_options(update.optimizer), groups, scalars, strict=True):
        param_groups.append({**options, "params": list(range(index, index + len(names)))})
        for name in names:
            slot = slots[name]
            if entry:
                own: dict[str, Any] = {
                    key: torch.from_numpy(whole[key][slot.offset : slot.stop].copy()).view(slot.shape)
                    for key in entry["arrays"]
                }
                for key, value in entry["scalars"].items():
                    own[key] = torch.tensor(value) if key in entry["tensor_scalars"] else value
                state[index] = own
            index += 1
    return {"state": state, "param_groups": param_groups}


def load_full_state(
    world: World,
    update: ShardOptimizer,
    groups: Sequence[Group],
    layout: FlatLayout,
    shards: Shards,
    state: Mapping[str, Any],
) -> None:
    """Take rank 0's state dict of an ordinary torch optimizer over the same model. Collective.

    Raises:
        LayoutError: on every rank: not a state dict, or of other groups or shapes.
    """
    with world.agreed("loading the optimizer's state"):
        if world.rank == 0:
            _check_state(groups, layout, state)
    vectors, scalars, options = _flatten(groups, layout, state) if world.rank == 0 else ({}, [], [])
    keys, scalars, options = world.broadcast_object((sorted(vectors), scalars, options))
    arrays = {key: scatter_shards(world, vectors.get(key, np.empty(0, np.float32)), shards) for key in keys}
    update.load(arrays, scalars)
    for group, values in zip(update.optimizer.param_groups, options, strict=True):
        group.update(values)


def _check_state(groups: Sequence[Group], layout: FlatLayout, state: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise LayoutError('an optimizer\'s state dict has the keys "state" and "param_groups"')
    sizes = [len(group["params"]) for group in state["param_groups"]]
    if sizes != [len(names) for _, names in groups]:
        raise LayoutError(
            f"the state is of param groups of {sizes} parameters, the model has {[len(names) for _, names in groups]}"
        )
    slots = {slot.name: slot for slot in layout.slots}
    names = [name for _, names in groups for name in names]
    order = [index for group in state["param_groups"] for index in group["params"]]
    for index, name in zip(order, names, strict=True):
        for key, value in state["state"].get(index, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() > 0 and tuple(value.shape) != slots[name].shape:
                raise LayoutError(f"{key} of {name} has shape {tuple(value.shape)}, not {slots[name].shape}")


def _flatten(
    groups: Sequence[Group], layout: FlatLayout, state: Mapping[str, Any]
) -> tuple[dict[str, Float32Array], list[dict[str, Any]], list[dict[str, Any]]]:
    """Whole vectors by key, and per group the scalars (those of its first parameter) and options."""
    slots = {slot.name: slot for slot in layout.slots}
    vectors: dict[str, Float32Array] = {}
    scalars, options = [], []
    for (_, names), group in zip(groups, state["param_groups"], strict=True):
        options.append({key: value for key, value in group.items() if key != "params"})
        entry: dict[str, Any] = {}
        for index, name in zip(group["params"], names, strict=True):
            slot, found = slots[name], state["state"].get(index, {})
            # A zero-dimensional parameter's moments are zero-dimensional too: only "step" and its like are scalars.
            tensors = {k: v for k, v in found.items() if _is_elementwise(k, v, slot.shape)}
            for key, value in tensors.items():
                vector = vectors.setdefault(key, np.zeros(layout.size, np.float32))
                vector[slot.offset : slot.stop] = value.detach().reshape(-1).float().numpy()
            others = {k: v for k, v in found.items() if k not in tensors and v is not None}
            if found and not entry:
                entry = {
                    "arrays": sorted(tensors),
                    "scalars": {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in others.items()},
                    "tensor_scalars": sorted(k for k, v in others.items() if isinstance(v, torch.Tensor)),
                }
        scalars.append(entry)
    return vectors, scalars, options


SCALAR_STATE = ("step", "mu_product", "eta", "mu")
"""State of torch.optim's element-wise optimizers that is one number per parameter."""


def _is_elementwise(key: str, value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, torch.Tensor) and key not in SCALAR_STATE and tuple(value.shape) == shape
