"""Models by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from mpidl.errors import ConfigError
from mpidl.imports import import_callable, near_names
from mpidl.models.digits import DigitsCNN
from mpidl.models.fashion import FashionCNN
from mpidl.models.inception import InceptionV1
from mpidl.models.lenet import LeNet5
from mpidl.models.vgg import VGG13, VGG16

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits_cnn": DigitsCNN,
    "fashion_cnn": FashionCNN,
    "inception_v1": InceptionV1,
    "lenet5": LeNet5,
    "vgg13_32": VGG13,
    "vgg16_32": VGG16,
}

NAMES = tuple(_MODELS)
"""The built-in models' names."""


def build(name: str, **args: Any) -> nn.Module:
    """Make a model.

    Args:
        name: one of `NAMES`, or `package.module:callable` for a class or function that returns a module.
        **args: the model's own arguments.

    Raises:
        ConfigError: the name is unknown, the callable cannot be imported or returns no module, or it does not
            take the arguments.
    """
    factory = import_callable(name) if ":" in name else _built_in(name)
    _check_arguments(name, factory, args)
    model = factory(**args)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned a {type(model).__name__}; a model is a torch.nn.Module")
    return model


def _built_in(name: str) -> Callable[..., nn.Module]:
    if name not in _MODELS:
        near = near_names(difflib.get_close_matches(name, NAMES))
        raise ConfigError(f"unknown model {name!r}{near}; allowed are {', '.join(NAMES)} and package.module:callable")
    return _MODELS[name]


def _check_arguments(name: str, factory: Callable[..., nn.Module], args: dict[str, Any]) -> None:
    """Find wrong arguments by the signature: a TypeError from inside a user's model stays what it is."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # what is written in C may have none
        return
    try:
        signature.bind(**args)
    except TypeError as error:
        raise ConfigError(f"model {name}: {error}; it takes {signature}") from None
