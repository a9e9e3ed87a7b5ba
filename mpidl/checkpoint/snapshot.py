"""What one rank's file holds, copied at one moment: the only part of a checkpoint that training waits for."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mpidl.checkpoint.image import ShardImage
from mpidl.parameters import FlatLayout, ParameterManager
from mpidl.parameters.layout import Piece

Float32Array = NDArray[np.float32]


class Compaction:
    """Where a shard's elements stand when alignment gaps are left out.

    Args:
        layout: of the whole vector.
        runs: the shard: elements [start, stop) of the vector, ascending; in memory they stand one behind the other.
    """

    def __init__(self, layout: FlatLayout, runs: Sequence[Piece]) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._places: list[int] = []
        offset = place = 0
        for run in runs:
            for _, start, stop in layout.tensors_in(run):
                self._add(offset + start - run[0], offset + stop - run[0], place)
                place += stop - start
            offset += run[1] - run[0]
        self.size = place
        """Elements without gaps."""

    def _add(self, start: int, stop: int, place: int) -> None:
        if self._stops and self._stops[-1] == start:
            self._stops[-1] = stop
            return
        self._starts.append(start)
        self._stops.append(stop)
        self._places.append(place)

    def copy(self, start: int, values: Float32Array, target: Float32Array) -> None:
        """Copy a piece of the shard to its place in `target`.

        Args:
            start: where the piece begins in the shard.
            values: (n,); the piece, gaps included.
            target: float32, (size,); written.
        """
        stop = start + values.size
        for index in range(max(0, bisect.bisect_right(self._starts, start) - 1), len(self._starts)):
            first, last = max(start, self._starts[index]), min(stop, self._stops[index])
            if self._starts[index] >= stop:
                return
            if first < last:
                place = self._places[index] + first - self._starts[index]
                target[place : place + last - first] = values[first - start : last - start]


class Snapshot:
    """Copies of this rank's shard of weights and moments, in buffers that are kept.

    Args:
        manager: whose.
    """

    def __init__(self, manager: ParameterManager) -> None:
        self._manager = manager
        self._compaction = Compaction(manager.layout, manager.shard_runs)
        self._image: ShardImage | None = None

    def prepare(self, states: Sequence[str]) -> None:
        """Make the image that `take` fills, which takes ten times as long as filling it. Not collective.

        Args:
            states: the names of all element-wise state, as `take` will be given them.
        """
        image = self._image_of(states)
        if image is not None:
            image.touch()

    def take(self, states: Sequence[str]) -> ShardImage | None:
        """Copy what there is now; None where this rank has nothing to write. Not collective.

        The image is overwritten by the next call. Unless `prepare` was called, the first call makes it.

        Args:
            states: the names of all element-wise state; where this rank's optimizer has none of it stand zeros.
        """
        manager, image = self._manager, self._image_of(states)
        if image is None:
            return None
        for start, values in manager.shard_weight_pieces():
            self._compaction.copy(start, values, image.vectors["weights"])
        for state, start, values in manager.shard_optimizer.state_pieces():
            self._compaction.copy(start, values, image.vectors[f"state.{state}"])
        return image

    def _image_of(self, states: Sequence[str]) -> ShardImage | None:
        """The image that is kept, made anew where it is of other states; None where this rank has nothing to write."""
        manager, size = self._manager, self._compaction.size
        if not size or (manager.is_replicated and manager.world.rank > 0):
            return None
        keys = ["weights", *(f"state.{state}" for state in states)]
        if self._image is None or self._image.keys != keys:
            self._image = ShardImage(keys, size)
        return self._image


class RestSnapshot:
    """Copies of what is not trained (buffers, frozen parameters), in tensors that are kept.

    Args:
        manager: whose model.
    """

    def __init__(self, manager: ParameterManager) -> None:
        self._manager = manager
        self._kept: dict[str, torch.Tensor] = {}

    def take(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Copy what there is now; the copies are overwritten by the next call. Not collective.

        Returns:
            The copies by their state-dict names, and the second names of tied parameters.
        """
        rest, aliases = rest_of(self._manager)
        before, self._kept = self._kept, {}
        for name, tensor in rest.items():
            kept = before.get(name)
            if kept is not None and (kept.shape, kept.dtype) == (tensor.shape, tensor.dtype):
                self._kept[name] = kept.copy_(tensor.detach())
            else:
                self._kept[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        return self._kept, aliases


def rest_of(manager: ParameterManager) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What is in the state dict and not trained, by name; and the second names of tied parameters."""
    trained = {slot.name for slot in manager.layout.slots}
    state = manager.model.state_dict(keep_vars=True)
    owner = {id(parameter): name for name, parameter in manager.model.named_parameters()}
    aliases = {name: owner[id(t)] for name, t in state.items() if owner.get(id(t), name) != name}
    return {name: t for name, t in state.items() if name not in trained and name not in aliases}, aliases
