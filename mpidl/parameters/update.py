"""The optimizer of one shard: any element-wise `torch.optim` optimizer over this rank's part of the weights.

The optimizer sees one-dimensional tensors: for each param group, the runs of its parameters inside this rank's shard.
A layer-wise one (`norms.py`) sees pieces of one parameter each.
They are views of the node's weights, and their gradients are views of this rank's summed gradient, so `step()` writes
where everyone reads. State (momentum, moments) exists on the owner only: 1/world_size of it on each rank.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mpidl.errors import LayoutError
from mpidl.parameters.layout import FlatLayout, Piece, Slice, clip, merge_pieces
from mpidl.parameters.model import Group, padded_runs

Float32Array = NDArray[np.float32]
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]

ELEMENT_WISE = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
"""The optimizers of torch.optim that treat every element alike."""


class Home(Protocol):
    """Memory for the element-wise state, which is told when that changes."""

    vectors: Mapping[str, Float32Array]
    """By the state's name: (shard size,)."""

    def open(self) -> None:
        """An update begins."""

    def close(self) -> None:
        """It has ended, and all state is here."""


class ShardOptimizer:
    """An optimizer over one shard.

    Torch's own optimizers may update the shard slice by slice, so that a slice's gradient is still in cache when it is
    used. Others may count their calls: they get the whole shard at once (`goes_by_slices`).

    Args:
        factory: makes the optimizer of a list of param groups.
        groups: each param group's options and the names of its parameters.
        layout: of the whole vector.
        weights: for each slice, float32, (slice size,); updated in place.
        gradients: for each slice, float32, (slice size,); its mean gradient, written before its `step`. Slices that are
            updated one after the other may share memory.
        slices: the shard; an empty list where this rank owns nothing.

    Raises:
        LayoutError: the factory does not give an element-wise torch optimizer, or refuses its arguments.
    """

    def __init__(
        self,
        factory: OptimizerFactory,
        groups: Sequence[Group],
        layout: FlatLayout,
        weights: Sequence[Float32Array],
        gradients: Sequence[Float32Array],
        slices: Sequence[Slice],
    ) -> None:
        self.shard_size = sum(each.size for each in slices)
        self.num_slices = len(slices)
        self._slices = slices
        self._home: Home | None = None
        parts = []
        for _, names in groups:
            runs = merge_pieces(padded_runs(layout, names))
            parts.append(
                [p for i, each in enumerate(slices) for p in _parts_of(i, each, runs, weights[i], gradients[i])]
            )
        self._hold(parts)
        param_groups = [
            {**options, "params": list(tensors)} for (options, _), tensors in zip(groups, self._tensors, strict=True)
        ]
        self.optimizer = _make(factory, param_groups)

    def _hold(self, parts: list[list[_Part]]) -> None:
        self._parts = parts
        self._firsts = [
            [bisect.bisect_left(own, i, key=lambda part: part.index) for i in range(self.num_slices + 1)]
            for own in parts
        ]
        # A group without elements here holds an empty tensor, as optimizers refuse groups without any.
        self._tensors = [[part.tensor for part in own] or [torch.nn.Parameter(torch.empty(0))] for own in parts]

    def cut_at_tensors(self, layout: FlatLayout) -> dict[torch.Tensor, Piece]:
        """Let each of the optimizer's tensors be of one parameter; before the first step.

        Returns:
            The [start, stop) of each tensor in the flat vector.
        """
        self._hold([[each for part in parts for each in part.cut(layout)] for parts in self._parts])
        for group, tensors in zip(self.optimizer.param_groups, self._tensors, strict=True):
            group["params"] = tensors
        return {part.tensor: part.piece for part in itertools.chain(*self._parts)}

    def step(self, first: int, last: int) -> None:
        """Update the slices [first, last) of this rank's weights; every slice once an iteration."""
        is_whole = (first, last) == (0, self.num_slices)
        for index, group in enumerate(self.optimizer.param_groups):
            chosen = self._parts[index][self._firsts[index][first] : self._firsts[index][last]]
            for part in chosen:
                part.tensor.grad = part.gradient  # optimizer.zero_grad() takes it away
            group["params"] = self._tensors[index] if is_whole else [part.tensor for part in chosen]
        try:
            self.optimizer.step()
        finally:
            for group, tensors in zip(self.optimizer.param_groups, self._tensors, strict=True):
                group["params"] = tensors

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Around all steps of an iteration: the home's content is complete before and after, not within."""
        home = self._home
        if home is not None:
            home.open()
        yield
        if home is not None and self.is_in(home):
            home.close()

    def move_into(self, home: Home) -> None:
        """Let the element-wise state be in this memory, as far as it fits; torch's optimizers update it in place."""
        for part in itertools.chain(*self._parts):
            state = self.optimizer.state.get(part.tensor, {})
            for key, value in _element_wise(state):
                if value.dtype == torch.float32 and value.shape == part.tensor.shape:
                    state[key] = torch.from_numpy(home.vectors[key][part.own]).copy_(value)
        self._home = home

    def is_in(self, home: Home) -> bool:
        """Whether all state is in its home: an optimizer may make it anew, or more of it."""
        return all(
            key in home.vectors and value.data_ptr() == home.vectors[key][part.own].ctypes.data
            for part in itertools.chain(*self._parts)
            for key, value in _element_wise(self.optimizer.state.get(part.tensor, {}))
        )

    @property
    def has_hooks(self) -> bool:
        """Whether the user gave the optimizer hooks, which may want to see the whole shard at once."""
        return bool(self.optimizer._optimizer_step_pre_hooks or self.optimizer._optimizer_step_post_hooks)

    def set_gradients(self, gradients: Sequence[Float32Array]) -> None:
        """Take other memory for each slice's gradient."""
        for part in itertools.chain(*self._parts):
            offset = self._slices[part.index].offset
            inside = slice(part.own.start - offset, part.own.stop - offset)
            part.gradient = torch.from_numpy(gradients[part.index][inside])

    def describe(self) -> str:
        """A hash over what must be the same on all ranks: the optimizer's class and options."""
        plain = (type(None), bool, int, float, str, tuple)
        groups = [
            sorted((key, repr(value)) for key, value in group.items() if isinstance(value, plain))
            for group in self.optimizer.param_groups
        ]
        return hashlib.sha256(repr((type(self.optimizer).__qualname__, groups)).encode()).hexdigest()

    def arrays(self) -> dict[str, Float32Array]:
        """The element-wise state over the whole shard: name -> float32, (shard size,); zeros where there is none."""
        arrays: dict[str, Float32Array] = {}
        for key, start, values in self.state_pieces():
            whole = arrays.setdefault(key, np.zeros(self.shard_size, np.float32))
            whole[start : start + values.size] = values
        return arrays

    def state_pieces(self) -> Iterator[tuple[str, int, Float32Array]]:
        """The element-wise state piece by piece: (name, where it begins in the shard, values), nothing copied."""
        for part in itertools.chain(*self._parts):
            for key, value in _element_wise(self.optimizer.state.get(part.tensor, {})):
                yield key, part.own.start, value.detach().numpy()

    def scalars(self) -> list[dict[str, Any]]:
        """Per group: which element-wise state exists and the scalar state, as plain JSON values.

        A group without elements on this rank gives an empty entry; another rank has it.
        """
        return [next((entry for part in parts if (entry := self._scalars_of(part))), {}) for parts in self._parts]

    def _scalars_of(self, part: _Part) -> dict[str, Any]:
        state = self.optimizer.state.get(part.tensor, {})
        if not state:
            return {}
        return {
            "arrays": sorted(key for key, _ in _element_wise(state)),
            "scalars": {
                k: v.item() if isinstance(v, torch.Tensor) else v
                for k, v in state.items()
                if isinstance(v, int | float) or _is_scalar_tensor(v)
            },
            "tensor_scalars": sorted(k for k, v in state.items() if _is_scalar_tensor(v)),
        }

    def load(self, arrays: Mapping[str, Float32Array], scalars: Sequence[Mapping[str, Any]]) -> None:
        """Take the state that `arrays` and `scalars` gave, cut to this shard. The arrays become the optimizer's own."""
        for parts, entry in zip(self._parts, scalars, strict=True):
            for part in parts:
                self.optimizer.state.pop(part.tensor, None)
                if not entry:
                    continue
                state: dict[str, Any] = {key: torch.from_numpy(arrays[key][part.own]) for key in entry["arrays"]}
                for key, value in entry["scalars"].items():
                    state[key] = torch.tensor(value, dtype=torch.float32) if key in entry["tensor_scalars"] else value
                self.optimizer.state[part.tensor] = state


@dataclasses.dataclass(eq=False)
class _Part:
    """A tensor of the optimizer: what one slice and one param group have in common."""

    index: int
    """Of the slice."""
    piece: Piece
    """Where it is in the flat vector."""
    own: slice
    """Where it is in the shard."""
    tensor: torch.nn.Parameter
    gradient: torch.Tensor

    def cut(self, layout: FlatLayout) -> list[_Part]:
        """What is in it of each parameter; the gaps between them are in none."""
        found = []
        for _, start, stop in layout.tensors_in(self.piece):
            first, last = start - self.piece[0], stop - self.piece[0]
            own = slice(self.own.start + first, self.own.start + last)
            tensor = torch.nn.Parameter(self.tensor.detach()[first:last])
            found.append(_Part(self.index, (start, stop), own, tensor, self.gradient[first:last]))
        return found


def _parts_of(
    index: int, each: Slice, runs: Sequence[Piece], weights: Float32Array, gradient: Float32Array
) -> list[_Part]:
    parts = []
    for start, stop in merge_pieces(clip(run, (each.start, each.stop)) for run in runs):
        inside = slice(start - each.start, stop - each.start)
        own = slice(inside.start + each.offset, inside.stop + each.offset)
        tensor = torch.nn.Parameter(torch.from_numpy(weights[inside]))
        parts.append(_Part(index, (start, stop), own, tensor, torch.from_numpy(gradient[inside])))
    return parts


def goes_by_slices(factory: OptimizerFactory) -> bool:
    """Whether the optimizer keeps all of its state per tensor, so that it may be called for some at a time."""
    try:
        optimizer = factory([{"params": [torch.nn.Parameter(torch.empty(0))]}])
    except Exception:  # what is wrong with it is told where it is made
        return False
    return type(optimizer).__module__.startswith("torch.optim.")


def _element_wise(state: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """The entries of a tensor's state that have a value for each of its elements."""
    return [(key, value) for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim() == 1]


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
            f"are {', '.join(ELEMENT_WISE)}; mpidl.Lars and mpidl.Lamb can too"
        )
