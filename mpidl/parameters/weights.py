"""The node's one copy of the weights, and how the model comes to live in it.

Phases of `place` (collective): 1. rank 0 copies its parameters into its node's vector; 2. the vector goes to the first
rank of every other node; 3. after a node barrier each rank makes its parameters views of the vector. Each view has a
storage of its own, no larger than the parameter, so `torch.save` writes what one expects. Frozen parameters and
buffers stay private and are overwritten with rank 0's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpidl.parameters.layout import FlatLayout
from mpidl.runtime import World

Float32Array = NDArray[np.float32]
Parameters = Sequence[tuple[str, nn.Parameter]]


def place(
    world: World,
    model: nn.Module,
    parameters: Parameters,
    layout: FlatLayout,
    weights: Float32Array,
    *,
    with_caches: bool,
) -> None:
    """Give all ranks rank 0's weights, as views of `weights`, and rank 0's other tensors. Collective.

    Args:
        world: all ranks.
        model: whose tensors.
        parameters: the trainable ones, in the layout's order.
        layout: of `weights`.
        weights: float32, (layout.size,), the node's copy; overwritten.
        with_caches: whether buffers that are not persistent go to all ranks too. Later on each rank has its own.
    """
    if world.rank == 0:
        for (_, parameter), slot in zip(parameters, layout.slots, strict=True):
            weights[slot.offset : slot.stop] = parameter.detach().reshape(-1).numpy()
    _to_all_nodes(world, weights)
    for (_, parameter), slot in zip(parameters, layout.slots, strict=True):
        parameter.data = torch.from_numpy(weights[slot.offset : slot.stop]).view(slot.shape)
    trained = {id(parameter) for _, parameter in parameters}
    frozen = [parameter.data for parameter in model.parameters() if id(parameter) not in trained]
    for tensor in [*frozen, *_buffers(model, with_caches)]:
        _broadcast_tensor(world, tensor)


def _to_all_nodes(world: World, weights: Float32Array) -> None:
    """Bring rank 0's node's weights to every node. Every rank takes part; only the first of a node receives."""
    receives = world.local_rank == 0 and world.node > 0
    counts, nothing = [0] * world.size, [0] * world.size
    for node in range(1, world.num_nodes):
        counts[world.first_rank_of(node)] = weights.size
    empty = np.empty(0, np.float32)
    world.alltoall_varying(
        weights if world.rank == 0 else empty,
        counts if world.rank == 0 else nothing,
        nothing,
        weights if receives else empty,
        [weights.size if receives else 0, *nothing[1:]],
        nothing,
    )
    world.node_barrier()


def _buffers(model: nn.Module, with_caches: bool) -> list[torch.Tensor]:
    """The model's buffers; those that are expanded (several elements in one place) get memory of their own."""
    found = []
    for module in model.modules():
        for key, tensor in module._buffers.items():
            if tensor is None or (key in module._non_persistent_buffers_set and not with_caches):
                continue
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()
                module._buffers[key] = tensor
            found.append(tensor)
    return found


def _broadcast_tensor(world: World, tensor: torch.Tensor) -> None:
    """Overwrite a tensor of any dtype with rank 0's. Collective."""
    # A tensor of one element may have any stride, and keeps it in a plain clone.
    values = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    world.broadcast(values.view(torch.uint8).numpy())
    tensor.copy_(values.view(tensor.shape))


def take_back(parameters: Parameters) -> None:
    """Give this rank's model private copies of its weights."""
    for _, parameter in parameters:
        parameter.data = parameter.data.clone()
