"""Letting each module wait for its own weights, and no others, while allgathers run into the next forward.

A module waits when its forward begins, and whoever else reads a parameter through a module (tied weights, a penalty
on `model.parameters()`) waits when it is read: the module's table of parameters is replaced by one that looks. Only
tensors that somebody keeps elsewhere pass the gate unseen, so nothing runs ahead unless it was asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mpidl.parameters.layout import FlatLayout, Piece


class Gate:
    """Where readers of weights wait for the buckets that are not complete yet.

    Args:
        model: whose modules.
        parameters: (name, parameter) in the layout's order.
        layout: of the weights.
        buckets: elements [start, stop) of each bucket.
        wait: returns when the buckets of these numbers are complete.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[tuple[str, nn.Parameter]],
        layout: FlatLayout,
        buckets: Sequence[Piece],
        wait: Callable[[set[int]], None],
    ) -> None:
        self._wait = wait
        self._slots = [(id(p), slot) for (_, p), slot in zip(parameters, layout.slots, strict=True)]
        self.set_buckets(buckets)
        self._hooks: list[Any] = []
        self._modules = [module for module in model.modules() if module._parameters]
        for module in self._modules:
            self._hooks.append(module.register_forward_pre_hook(_Entrance(self)))
            module._parameters = GatedParameters(module._parameters, self)

    def set_buckets(self, buckets: Sequence[Piece]) -> None:
        """Other buckets, while all weights are complete."""
        self._pending: set[int] = set()
        self._all = set(range(len(buckets)))
        self._buckets_of = {
            key: {b for b, (start, stop) in enumerate(buckets) if slot.offset < stop and start < slot.stop}
            for key, slot in self._slots
        }

    def shut(self) -> None:
        """All weights are about to change."""
        self._pending = set(self._all)

    @property
    def is_shut(self) -> bool:
        """Whether somebody may have to wait."""
        return bool(self._pending)

    def open(self) -> None:
        """Wait for all weights."""
        if self._pending:
            self._wait(self._pending)
            self._pending = set()

    def pass_through(self, parameters: Sequence[Any]) -> None:
        """Wait for the weights of these parameters."""
        if not self._pending:
            return
        needed = set().union(*(self._buckets_of.get(id(parameter), ()) for parameter in parameters)) & self._pending
        if needed:
            self._wait(needed)
            self._pending -= needed

    def forget(self) -> None:
        """Wait for nothing any more: what was under way was given up."""
        self._pending = set()

    def remove(self) -> None:
        """Give the modules plain tables back."""
        self.open()
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            module._parameters = dict(module._parameters)


class _Entrance:
    """A module's hook before its forward."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __call__(self, module: nn.Module, _: Any) -> None:
        if self._gate.is_shut:
            module._parameters.values()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the module, by `copy` or `pickle`, waits for nobody."""
        return functools.partial, (_pass_by,)


def _pass_by(*_: Any) -> None:
    pass


class GatedParameters(dict[str, Any]):
    """A module's parameters by name; reading waits for their weights."""

    def __init__(self, parameters: dict[str, Any], gate: Gate) -> None:
        super().__init__(parameters)
        self._gate = gate

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        self._gate.pass_through([parameter])
        return parameter

    def get(self, name: str, default: Any = None) -> Any:
        """As a dict's."""
        return self[name] if name in self else default  # noqa: SIM401  (that would not wait)

    def values(self) -> Any:
        """As a dict's."""
        found = super().values()
        self._gate.pass_through(list(found))
        return found

    def items(self) -> Any:
        """As a dict's."""
        self.values()
        return super().items()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, by `copy` or `pickle`, is a plain table."""
        return dict, (dict(self.items()),)
