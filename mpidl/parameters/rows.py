"""Autograd's side of the gradient rows: every parameter's `.grad` is a view of the row that is open."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpidl.errors import LayoutError
from mpidl.parameters.layout import FlatLayout


class GradientRows:
    """The rows that this rank's backward passes add into, one open at a time.

    Args:
        parameters: (name, parameter) in the layout's order, already views of the node's weights.
        layout: of a row.
        rows: float32, (layout.size,) each; written by this rank's autograd while open.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        layout: FlatLayout,
        rows: Sequence[NDArray[np.float32]],
    ) -> None:
        self._parameters = parameters
        self._rows = rows
        self._views = [
            [torch.from_numpy(row[slot.offset : slot.stop]).view(slot.shape) for slot in layout.slots] for row in rows
        ]
        self._addresses = [parameter.data_ptr() for _, parameter in parameters]
        self.slot = 0
        """The row that is open."""

    def open(self, slot: int) -> None:
        """Zero a row and let autograd add into it."""
        self._rows[slot].fill(0)
        for (_, parameter), view in zip(self._parameters, self._views[slot], strict=True):
            parameter.grad = view
        self.slot = slot

    def close(self) -> None:
        """Bring gradients that are not in the row (set to None by the user, or replaced) into it.

        Raises:
            LayoutError: a gradient is sparse, or a parameter's memory is not the node's weights any more.
        """
        triples = zip(self._parameters, self._addresses, self._views[self.slot], strict=True)
        for (name, parameter), address, view in triples:
            if parameter.data_ptr() != address:
                raise LayoutError(
                    f"the memory of parameter {name} was replaced (by model.to(...) or `.data =`), so updates would "
                    "not reach it; do that before the ParameterManager is made"
                )
            gradient = parameter.grad
            if gradient is None:
                view.zero_()
            elif gradient.layout != torch.strided:
                raise LayoutError(f"the gradient of {name} is sparse; use sparse=False in the embedding")
            elif gradient.data_ptr() != view.data_ptr():
                view.copy_(gradient.detach())  # the graph behind it, with create_graph, must not live on here

    def tell_autograd(self) -> None:
        """Let graphs kept over an update fail, as after any change in place: the optimizer has views of its own."""
        torch.autograd.graph.increment_version([parameter for _, parameter in self._parameters])

    def scale(self, factor: float) -> None:
        """Multiply the open row."""
        self._rows[self.slot] *= np.float32(factor)

    def release(self) -> None:
        """Take the views away from the parameters."""
        for _, parameter in self._parameters:
            parameter.grad = None
