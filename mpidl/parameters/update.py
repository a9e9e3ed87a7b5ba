"""The optimizer of one shard: any element-wise `torch.optim` optimizer over this rank's part of the weights.

The optimizer sees one-dimensional tensors: for each param group, the runs of its parameters inside this rank's shard.
They are views of the node's weights, and their gradients are views of this rank's summed gradient, so `step()` writes
where everyone reads. State (momentum, moments) exists on the owner only: 1/world_size of it on each rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpidl.errors import LayoutError
from mpidl.parameters.layout import FlatLayout, Piece, clip, merge_pieces
from mpidl.parameters.model import Group, padded_runs

Float32Array = NDArray[np.float32]
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]

ELEMENT_WISE = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
"""The optimizers of torch.optim that treat every element alike."""


class ShardOptimizer:
    """An optimizer over one shard.

    Args:
        factory: makes the optimizer of a list of param groups.
        groups: each param group's options and the names of its parameters.
        layout: of the whole vector.
        weights: float32, (layout.size,), the node's copy; the shard of it is updated in place.
        gradient: float32, (shard size,); the mean gradient over the shard, written before each `step`.
        shard: [start, stop) of the vector.

    Raises:
        LayoutError: the factory does not give an element-wise torch optimizer, or refuses its arguments.
    """

    def __init__(
        self,
        factory: OptimizerFactory,
        groups: Sequence[Group],
        layout: FlatLayout,
        weights: Float32Array,
        gradient: Float32Array,
        shard: Piece,
    ) -> None:
        self.shard = shard
        self.pieces: list[list[Piece]] = []
        param_groups = []
        for options, names in groups:
            runs = padded_runs(layout, names)
            pieces = merge_pieces(clip(run, shard) for run in runs) or [(shard[0], shard[0])]
            tensors = []
            for start, stop in pieces:
                tensor = torch.nn.Parameter(torch.from_numpy(weights[start:stop]))
                tensor.grad = torch.from_numpy(gradient[start - shard[0] : stop - shard[0]])
                tensors.append(tensor)
            self.pieces.append(pieces)
            param_groups.append({**options, "params": tensors})
        self._gradients = [[tensor.grad for tensor in group["params"]] for group in param_groups]
        self.optimizer = _make(factory, param_groups)

    def step(self) -> None:
        """Update this rank's shard of the weights."""
        for group, gradients in zip(self.optimizer.param_groups, self._gradients, strict=True):
            for tensor, gradient in zip(group["params"], gradients, strict=True):
                tensor.grad = gradient  # optimizer.zero_grad() takes it away
        self.optimizer.step()

    def describe(self) -> str:
        """A hash over what must be the same on all ranks: the optimizer's class and options."""
        plain = (type(None), bool, int, float, str, tuple)
        groups = [
            sorted((key, repr(value)) for key, value in group.items() if isinstance(value, plain))
            for group in self.optimizer.param_groups
        ]
        return hashlib.sha256(repr((type(self.optimizer).__qualname__, groups)).encode()).hexdigest()

    def _tensors(self) -> list[tuple[int, Piece, torch.Tensor]]:
        """(group, piece, tensor) of every tensor of the optimizer."""
        found = []
        for index, (group, pieces) in enumerate(zip(self.optimizer.param_groups, self.pieces, strict=True)):
            found += [(index, piece, tensor) for piece, tensor in zip(pieces, group["params"], strict=True)]
        return found

    def arrays(self) -> dict[str, Float32Array]:
        """The element-wise state over the whole shard: name -> float32, (shard size,); zeros where there is none."""
        start, stop = self.shard
        arrays: dict[str, Float32Array] = {}
        for _, piece, tensor in self._tensors():
            for key, value in self.optimizer.state.get(tensor, {}).items():
                if isinstance(value, torch.Tensor) and value.dim() == 1 and piece[0] < piece[1]:
                    whole = arrays.setdefault(key, np.zeros(stop - start, np.float32))
                    whole[piece[0] - start : piece[1] - start] = value.detach().numpy()
        return arrays

    def scalars(self) -> list[dict[str, Any]]:
        """Per group: which element-wise state exists and the scalar state, as plain JSON values.

        A group without elements on this rank gives an empty entry; another rank has it.
        """
        entries: list[dict[str, Any]] = [{} for _ in self.pieces]
        for index, piece, tensor in self._tensors():
            state = self.optimizer.state.get(tensor, {})
            if not state or piece[0] == piece[1]:
                continue
            entry = entries[index]
            entry["arrays"] = sorted(k for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim() == 1)
            entry["scalars"] = {
                k: v.item() if isinstance(v, torch.Tensor) else v
                for k, v in state.items()
                if isinstance(v, int | float) or _is_scalar_tensor(v)
            }
            entry["tensor_scalars"] = sorted(k for k, v in state.items() if _is_scalar_tensor(v))
        return entries

    def load(self, arrays: Mapping[str, Float32Array], scalars: Sequence[Mapping[str, Any]]) -> None:
        """Take the state that `arrays` and `scalars` gave, cut to this shard."""
        start = self.shard[0]
        for index, piece, tensor in self._tensors():
            entry = scalars[index]
            if piece[0] == piece[1]:
                continue
            self.optimizer.state.pop(tensor, None)
            if not entry:
                continue
            state: dict[str, Any] = {}
            for key in entry["arrays"]:
                state[key] = torch.from_numpy(arrays[key][piece[0] - start : piece[1] - start].copy())
            for key, value in entry["scalars"].items():
                state[key] = torch.tensor(value, dtype=torch.float32) if key in entry["tensor_scalars"] else value
            self.optimizer.state[tensor] = state


def _is_scalar_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0


def _make(factory: OptimizerFactory, param_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    try:
        optimizer = factory(param_groups)
    except (TypeError, ValueError) as error:  # Muon, for one, refuses one-dimensional tensors by itself
        raise LayoutError(
            f"the optimizer cannot be made over shards: {error}; those that can are {', '.join(ELEMENT_WISE)}"
        ) from error
    _check_element_wise(optimizer)
    given = [id(tensor) for group in param_groups for tensor in group["params"]]
    if [id(tensor) for group in optimizer.param_groups for tensor in group["params"]] != given:
        raise LayoutError(
            f"the {type(optimizer).__name__} holds other tensors than those it was given; it must be made of the "
            "callable's argument, not of model.parameters()"
        )
    return optimizer


def _check_element_wise(optimizer: torch.optim.Optimizer) -> None:
    kind = type(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise LayoutError(
            f"optimizer gave a {kind.__name__}, not a torch.optim.Optimizer; pass a callable such as "
            "functools.partial(torch.optim.SGD, lr=0.1)"
        )
    if kind.__module__.startswith("torch.") and kind.__name__ not in ELEMENT_WISE:
        raise LayoutError(
            f"{kind.__name__} does not treat every element alike, so it cannot work on shards; element-wise ones "
            f"are {', '.join(ELEMENT_WISE)}"
        )
