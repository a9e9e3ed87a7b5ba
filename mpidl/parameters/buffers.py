"""Buffers that forward changes in training: averaged over partitions by samples; integer counters advance once.

Each rank's module holds buffers of its own, because forward writes into them; `base` is their value at the start of
the iteration, the same on every rank. A partition contributes (value after it - base) * its weight to the row; the
weighted mean of these differences is added to the base by every rank alike. A buffer that did not change therefore
stays as it is, to the last bit, and a batch counter that every partition advanced by one advances by one.

Which buffers travel: in the first iteration all persistent numeric ones; from then on those of normalisation layers
that track statistics and those that the first iteration changed (checkpoints keep their names). The others (masks,
tables) stay out, and an error says so if forward changes one after all; so it is with bool and complex ones, which have
no mean. Buffers that are not persistent are caches and each rank's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mpidl.errors import LayoutError
from mpidl.parameters.layout import FlatLayout

Float32Array = NDArray[np.float32]


@dataclasses.dataclass(eq=False)
class _Buffer:
    """One persistent buffer: where it hangs, its value at the iteration's start, and torch's write counter then."""

    name: str
    module: nn.Module
    key: str
    base: torch.Tensor
    has_mean: bool
    always_travels: bool
    seen: torch.Tensor | None = None
    """The tensor that was last known to hold the base's values, and its version then."""
    version: int = 0

    @property
    def tensor(self) -> torch.Tensor:
        found = self.module._buffers[self.key]
        if found is None or found.shape != self.base.shape or found.dtype != self.base.dtype:
            raise LayoutError(
                f"buffer {self.name} changed its shape or dtype from {tuple(self.base.shape)} {self.base.dtype}; "
                "register a cache with persistent=False"
            )
        return found

    def note(self) -> None:
        """Remember that the tensor holds the base's values now."""
        self.seen = self.tensor
        self.version = self.seen._version


class ModelBuffers:
    """The persistent numeric buffers of a model, and those of them that travel."""

    def __init__(self, model: nn.Module) -> None:
        self._all = _find(model)
        self._travelling = [buffer for buffer in self._all if buffer.has_mean]
        self._settled = False
        self.layout = self._lay_out()

    def _lay_out(self) -> FlatLayout:
        return FlatLayout.of((buffer.name, tuple(buffer.base.shape)) for buffer in self._travelling)

    def tensors(self) -> list[torch.Tensor]:
        """All persistent buffers as the modules hold them."""
        return [buffer.tensor for buffer in self._all]

    def take_base(self) -> None:
        """Make the modules' present values the base: at construction, and after weights were loaded."""
        for buffer in self._all:
            buffer.base = buffer.tensor.clone()
            buffer.note()

    def values(self) -> dict[str, torch.Tensor]:
        """The values of the iteration's start, by name; nobody writes into these tensors, also later."""
        return {buffer.name: buffer.base for buffer in self._all}

    def restore(self, values: Mapping[str, torch.Tensor]) -> None:
        """Give the modules what `values` gave."""
        for buffer in self._all:
            buffer.tensor.copy_(values[buffer.name])

    def reset(self) -> None:
        """Give the modules the values of the iteration's start."""
        for buffer in self._travelling:
            buffer.tensor.copy_(buffer.base)

    def write_changes(self, row: Float32Array, weight: float) -> None:
        """Write (value - base) * weight of every travelling buffer into a row of `layout.size` float32."""
        for buffer, slot in zip(self._travelling, self.layout.slots, strict=True):
            value = buffer.tensor
            # Equal values give zero, also where both are infinite (an attention mask) or not a number.
            is_equal = (value == buffer.base) | (value.isnan() & buffer.base.isnan())
            change = torch.where(is_equal, 0, value - buffer.base).to(torch.float32) * weight
            row[slot.offset : slot.stop] = change.reshape(-1).numpy()
        self._check_still()

    def _check_still(self) -> None:
        """Raise unless the buffers that do not travel have their base's values."""
        travelling = {buffer.name for buffer in self._travelling}
        for buffer in self._all:
            tensor = buffer.tensor
            if buffer.name in travelling or (tensor is buffer.seen and tensor._version == buffer.version):
                continue
            if not torch.equal(tensor, buffer.base):
                raise LayoutError(
                    f"buffer {buffer.name} was changed and is not among those that are averaged over ranks "
                    f"({'it changed after the first iteration only' if buffer.has_mean else 'it has no mean'}); "
                    "change it in every iteration, register it with persistent=False if each rank may keep its own, "
                    "or use load_weights to change it yourself"
                )
            buffer.note()

    def advance(self, mean_change: Float32Array) -> bool:
        """Add the weighted mean of all partitions' changes to the base, and give it to the modules.

        Args:
            mean_change: float32, (layout.size,), the same on every rank.

        Returns:
            Whether the set of travelling buffers, and so `layout`, has changed (after the first iteration only). It
            follows from `mean_change`, so every rank returns the same.
        """
        changed = set()
        for buffer, slot in zip(self._travelling, self.layout.slots, strict=True):
            change = torch.from_numpy(mean_change[slot.offset : slot.stop]).reshape(slot.shape)
            if torch.any(change != 0):
                changed.add(buffer.name)
            whole = change if buffer.base.is_floating_point() else torch.round(change)
            # Not base + 0: that makes a negative zero positive.
            buffer.base = torch.where(change == 0, buffer.base, buffer.base + whole.to(buffer.base.dtype))
        self.reset()
        return not self._settled and self._settle(changed)

    def _settle(self, changed: set[str]) -> bool:
        self._settled = True
        before = self._travelling
        self._travelling = [b for b in self._all if b.has_mean and (b.always_travels or b.name in changed)]
        self.layout = self._lay_out()
        for buffer in self._all:
            buffer.note()
        return len(self._travelling) != len(before)

    @property
    def settled_names(self) -> list[str] | None:
        """The buffers that travel, by name; None before the first iteration has ended."""
        return [buffer.name for buffer in self._travelling] if self._settled else None

    def settle(self, names: list[str]) -> bool:
        """Let these travel from now on, as in the run that a checkpoint is of; returns whether `layout` has changed."""
        return self._settle(set(names))


def _find(model: nn.Module) -> list[_Buffer]:
    found, seen = [], set()
    for prefix, module in model.named_modules():
        for key, tensor in module._buffers.items():
            if tensor is None or key in module._non_persistent_buffers_set or id(tensor) in seen:
                continue
            has_mean = tensor.dtype != torch.bool and not tensor.is_complex()
            seen.add(id(tensor))
            name = f"{prefix}.{key}" if prefix else key
            tracks = isinstance(module, _NormBase) and module.track_running_stats
            found.append(_Buffer(name, module, key, tensor.detach().clone(), has_mean, tracks))
    return found
