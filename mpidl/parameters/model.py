"""What the parameter manager asks of a model and of param groups, checked before anything is allocated."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mpidl._version import __version__
from mpidl.errors import LayoutError
from mpidl.parameters.layout import FlatLayout

Group = tuple[dict[str, Any], tuple[str, ...]]
"""A param group: its options, and the names of its parameters in the user's order."""


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that require gradients, tied ones once, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def check_model(model: nn.Module) -> None:
    """Raise LayoutError unless every parameter is float32 on the CPU and one is trainable."""
    if not isinstance(model, nn.Module):
        raise LayoutError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise LayoutError(f"parameter {name} has no shape yet; run one forward pass before")
        if parameter.device.type != "cpu":
            raise LayoutError(f"parameter {name} is on {parameter.device}; only the CPU is supported: model.cpu()")
        if parameter.dtype != torch.float32:
            raise LayoutError(f"parameter {name} is {parameter.dtype}; only torch.float32 is supported: model.float()")
    if not trainable_parameters(model):
        raise LayoutError(
            f"{type(model).__name__} has no trainable parameter (of {sum(1 for _ in model.parameters())}); "
            "set requires_grad_(True) on those to train"
        )


def group_parameters(
    parameters: Sequence[tuple[str, nn.Parameter]], param_groups: Iterable[Mapping[str, Any]] | None
) -> list[Group]:
    """Resolve param groups to names: each trainable parameter must be in exactly one."""
    if param_groups is None:
        return [({}, tuple(name for name, _ in parameters))]
    names = {id(parameter): name for name, parameter in parameters}
    groups: list[Group] = []
    seen: set[str] = set()
    for index, group in enumerate(param_groups):
        if not isinstance(group, Mapping) or "params" not in group:
            raise LayoutError(f'param group {index} is not a dict with the key "params"')
        members = group["params"]
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        if not all(isinstance(member, torch.Tensor) for member in members):
            kinds = ", ".join(sorted({type(member).__name__ for member in members}))
            raise LayoutError(f'"params" of param group {index} holds {kinds}; it must be parameters of the model')
        unknown = [tuple(member.shape) for member in members if id(member) not in names]
        if unknown:
            raise LayoutError(f"param group {index} holds a tensor of shape {unknown[0]} that the model does not train")
        own = tuple(names[id(member)] for member in members)
        twice = seen.intersection(own) or {name for name in own if own.count(name) > 1}
        if twice:
            raise LayoutError(f"parameter {min(twice)} is in two param groups")
        seen.update(own)
        groups.append(({key: value for key, value in group.items() if key != "params"}, own))
    left_out = [name for name, _ in parameters if name not in seen]
    if left_out:
        raise LayoutError(
            f"parameter {left_out[0]} is in no param group ({len(left_out)} left out); add it, or freeze it with "
            "requires_grad_(False)"
        )
    return groups


def describe_model(model: nn.Module, groups: Sequence[Group]) -> str:
    """A hash over everything that must be the same on all ranks: names, shapes, groups, code versions."""
    tensors = [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    buffers = [(name, tuple(b.shape), str(b.dtype)) for name, b in model.named_buffers()]
    options = [(sorted((key, repr(value)) for key, value in group.items()), names) for group, names in groups]
    versions = (__version__, torch.__version__)
    return hashlib.sha256(repr((tensors, buffers, options, versions)).encode()).hexdigest()


def check_state_names(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Raise LayoutError unless names and shapes are those of the model's state dict."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state_dict.items()}
    complaints = [f"{name} is missing" for name in sorted(expected.keys() - given.keys())]
    for name in sorted(given.keys() - expected.keys()):
        near = difflib.get_close_matches(name, expected, 1)
        complaints.append(f"{name} is not in the model" + (f" (near: {near[0]})" if near else ""))
    complaints += [
        f"{name} has shape {given[name]}, the model wants {expected[name]}"
        for name in sorted(expected.keys() & given.keys())
        if expected[name] != given[name]
    ]
    if complaints:
        raise LayoutError("the weights do not fit the model: " + "; ".join(complaints[:4]))


def padded_runs(layout: FlatLayout, names: Iterable[str]) -> list[tuple[int, int]]:
    """The [start, stop) of the named tensors, each with the alignment gap behind it."""
    wanted = set(names)
    stops = [slot.offset for slot in layout.slots[1:]] + [layout.size]
    return [(slot.offset, stop) for slot, stop in zip(layout.slots, stops, strict=True) if slot.name in wanted]
