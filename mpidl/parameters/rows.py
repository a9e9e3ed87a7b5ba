"""Autograd's side of the gradient rows: every gradient lands in the row that is open.

An open row is not zeroed. A parameter's `.grad` is None until backward has made its first gradient; a hook copies it
into the row and makes `.grad` a view of it, so that later ones are added there. What nothing was added to is zeroed
when the row is closed. (Zeroing the row first, and adding into it, took one pass over memory more.)

A hook also sees when a bucket of the row is complete: when each of its parameters has received as many gradients as in
the row that was closed before. `Announcements` keeps that count, and finds out in the end whether it was right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpidl.errors import LayoutError
from mpidl.parameters.layout import FlatLayout, Piece


class GradientRows:
    """The rows that this rank's backward passes add into, one open at a time.

    Args:
        parameters: (name, parameter) in the layout's order, already views of the node's weights.
        layout: of a row.
        rows: float32, (layout.size,) each; written by this rank's autograd while open.
        buckets: elements [start, stop) of each bucket.
        announce: called with a bucket's number when it is complete, in a row that was opened as the last one.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        layout: FlatLayout,
        rows: Sequence[NDArray[np.float32]],
        buckets: Sequence[Piece],
        announce: Callable[[int], None],
    ) -> None:
        self._parameters = parameters
        self._layout = layout
        self._rows: list[NDArray[np.float32]] = []
        self._views: list[list[torch.Tensor]] = []
        self.extend(rows)
        self._addresses = [parameter.data_ptr() for _, parameter in parameters]
        spans = [(slot.offset, max(slot.stop, slot.offset + 1)) for slot in layout.slots]
        self._announcements = Announcements(spans, buckets, announce)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(functools.partial(self._added, index))
            for index, (_, parameter) in enumerate(parameters)
        ]
        self.slot = 0
        """The row that is open."""
        self.is_last = False
        """Whether it is the iteration's last."""

    def extend(self, rows: Iterable[NDArray[np.float32]]) -> None:
        """Take more rows, in the slots behind those there are."""
        for row in rows:
            self._rows.append(row)
            self._views.append(
                [torch.from_numpy(row[slot.offset : slot.stop]).view(slot.shape) for slot in self._layout.slots]
            )

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def begin(self) -> None:
        """An exchange begins to which nothing was announced yet; `open` comes next."""
        self._announcements.begin()

    def open(self, slot: int, *, is_last: bool = False) -> None:
        """Let autograd write into a row, from nothing.

        Args:
            slot: which row.
            is_last: whether it is the iteration's last on this rank, whose buckets are announced.
        """
        self.slot, self.is_last = slot, is_last
        for _, parameter in self._parameters:
            parameter.grad = None
        for index in self._announcements.open(is_last):
            self._views[slot][index].zero_()

    def _added(self, index: int, parameter: torch.Tensor) -> None:
        """Autograd's hook: a gradient was added to `.grad`."""
        gradient, view = parameter.grad, self._views[self.slot][index]
        assert gradient is not None
        if gradient.layout == torch.strided:
            if gradient.data_ptr() != view.data_ptr():
                view.copy_(gradient.detach())  # the graph behind it, with create_graph, must not live on here
                parameter.grad = view
            self._announcements.add(index, view)

    def close(self) -> bool:
        """Complete the row: gradients that are not in it (set by the user) are brought in, what has none is zeroed.

        Returns:
            Whether every bucket that was announced is still as it was then.

        Raises:
            LayoutError: a gradient is sparse, or a parameter's memory is not the node's weights any more.
        """
        views = self._views[self.slot]
        for index, ((name, parameter), address) in enumerate(zip(self._parameters, self._addresses, strict=True)):
            if parameter.data_ptr() != address:
                raise LayoutError(
                    f"the memory of parameter {name} was replaced (by model.to(...) or `.data =`), so updates would "
                    "not reach it; do that before the ParameterManager is made"
                )
            gradient, view = parameter.grad, views[index]
            if gradient is None:
                if not self._announcements.is_zero(index):
                    view.zero_()
            elif gradient.layout != torch.strided:
                raise LayoutError(f"the gradient of {name} is sparse; use sparse=False in the embedding")
            elif gradient.data_ptr() != view.data_ptr():
                view.copy_(gradient.detach())
                self._announcements.replace(index)
        return self._announcements.close(views)

    @property
    def has_announced(self) -> bool:
        """Whether any bucket of the row was announced."""
        return self._announcements.has_announced

    def set_buckets(self, buckets: Sequence[Piece]) -> None:
        """Cut rows into other buckets, while none is open."""
        self._announcements.set_buckets(buckets)

    def tell_autograd(self) -> None:
        """Let graphs kept over an update fail, as after any change in place: the optimizer has views of its own."""
        torch.autograd.graph.increment_version([parameter for _, parameter in self._parameters])

    def scale(self, factor: float) -> None:
        """Multiply the open row."""
        self._rows[self.slot] *= np.float32(factor)

    def release(self) -> None:
        """Take hooks and views away from the parameters."""
        for hook in self._hooks:
            hook.remove()
        for _, parameter in self._parameters:
            parameter.grad = None


class Announcements:
    """Which buckets of a row are complete, judged by the row before.

    Args:
        spans: elements [start, stop) of each parameter.
        buckets: elements [start, stop) of each bucket.
        announce: called with the number of a bucket that is complete.
    """

    def __init__(self, spans: Sequence[Piece], buckets: Sequence[Piece], announce: Callable[[int], None]) -> None:
        self._spans = spans
        self._announce = announce
        self.set_buckets(buckets)
        self._expected: list[int] | None = None
        self._counts = [0] * len(spans)
        self._versions: dict[int, int] = {}
        self._missing: list[int] = []
        self._without: list[int] = []
        self._num_openings = self._expected_openings = 0
        self._is_last = False
        self._is_spoiled = False
        self.has_announced = False
        """Whether any bucket of the row was announced."""

    def set_buckets(self, buckets: Sequence[Piece]) -> None:
        """Cut the row into other buckets, while none is open."""
        self._buckets_of = [
            [b for b, (start, stop) in enumerate(buckets) if first < stop and start < last]
            for first, last in self._spans
        ]
        self._num_buckets = len(buckets)

    def begin(self) -> None:
        """An exchange begins to which nothing was announced yet."""
        self._is_spoiled = self.has_announced = False
        self._num_openings = 0

    def open(self, is_last: bool) -> list[int]:
        """Begin a row; returns the parameters that will receive no gradient, if they are as last time."""
        # What was announced to this exchange is thrown away here.
        self._is_spoiled |= self.has_announced
        self.has_announced = False
        self._counts = [0] * len(self._buckets_of)
        self._versions = {}
        self._is_last = is_last
        self._without = []
        self._num_openings += is_last
        # Where rows are thrown away in every iteration (one loss's gradients reach another's model), so is this one.
        if not is_last or self._expected is None or self._num_openings != self._expected_openings:
            self._missing = []
            return []
        self._missing = [0] * self._num_buckets
        for count, buckets in zip(self._expected, self._buckets_of, strict=True):
            for bucket in buckets:
                self._missing[bucket] += count > 0
        # Announced with the first of the others: nothing has to be told again if the row is thrown away before.
        self._without = [bucket for bucket, missing in enumerate(self._missing) if missing == 0]
        return [index for index, count in enumerate(self._expected) if count == 0]

    def is_zero(self, index: int) -> bool:
        """Whether `open` named this parameter, and nothing was added to its view since."""
        if not self._missing or self._expected is None:
            return False
        return self._expected[index] == 0 and self._counts[index] == 0

    def add(self, index: int, view: torch.Tensor) -> None:
        """A gradient was added to a parameter's view of the row."""
        self._counts[index] += 1
        self._versions[index] = view._version
        if not self._missing or self._expected is None or self._counts[index] != self._expected[index]:
            return
        complete, self._without = self._without, []
        for bucket in self._buckets_of[index]:
            self._missing[bucket] -= 1
            if self._missing[bucket] == 0:
                complete.append(bucket)
        for bucket in complete:
            self.has_announced = True
            self._announce(bucket)

    def replace(self, index: int) -> None:
        """A parameter's view was written by the user's own gradient."""
        self._versions[index] = -1

    def close(self, views: Sequence[torch.Tensor]) -> bool:
        """End a row; returns whether what was announced still holds.

        A change by the user's hand counts as one gradient more; so where there is one every time, it is waited for.
        """
        for index, version in self._versions.items():
            self._counts[index] += views[index]._version != version
        holds = not self._is_spoiled
        if self.has_announced and self._expected is not None and self._missing:
            announced = {bucket for bucket, missing in enumerate(self._missing) if missing == 0}
            for index, buckets in enumerate(self._buckets_of):
                if announced.intersection(buckets):
                    holds &= self._counts[index] == self._expected[index]
        if self._is_last:
            self._expected, self._expected_openings = list(self._counts), self._num_openings
        self._is_spoiled |= not holds
        return holds
