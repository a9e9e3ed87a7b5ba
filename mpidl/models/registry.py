"""Models by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from mpidl.errors import ConfigError
from mpidl.imports import check_arguments, import_callable, near_names
from mpidl.models.digits import DigitsCNN
from mpidl.models.fashion import FashionCNN
from mpidl.models.googlenet import googlenet, googlenet_bn, inception_v1
from mpidl.models.inception import inception_v3
from mpidl.models.lenet import LeNet5
from mpidl.models.resnet import resnet50
from mpidl.models.transformer import gpt
from mpidl.models.vgg import vgg16, vgg16_bn, vgg19, vgg19_bn
from mpidl.models.vgg_small import VGG13, VGG16, VGG19

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits_cnn": DigitsCNN,
    "fashion_cnn": FashionCNN,
    "googlenet": googlenet,
    "googlenet_bn": googlenet_bn,
    "gpt": gpt,
    "inception_v1": inception_v1,
    "inception_v3": inception_v3,
    "lenet5": LeNet5,
    "resnet50": resnet50,
    "vgg13_32": VGG13,
    "vgg16": vgg16,
    "vgg16_32": VGG16,
    "vgg16_bn": vgg16_bn,
    "vgg19": vgg19,
    "vgg19_32": VGG19,
    "vgg19_bn": vgg19_bn,
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
    check_arguments(f"model {name}", factory, args)
    model = factory(**args)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned a {type(model).__name__}; a model is a torch.nn.Module")
    return model


def _built_in(name: str) -> Callable[..., nn.Module]:
    if name not in _MODELS:
        near = near_names(difflib.get_close_matches(name, NAMES))
        raise ConfigError(f"unknown model {name!r}{near}; allowed are {', '.join(NAMES)} and package.module:callable")
    return _MODELS[name]
