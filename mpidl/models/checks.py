"""What the built-in models check: their own arguments at construction, their input in forward."""

from __future__ import annotations

import torch
from torch import Tensor

from mpidl.errors import ConfigError, DataError


def check_count(model: str, name: str, value: int, minimum: int = 1) -> None:
    """Check an argument that counts something.

    Raises:
        ConfigError: the value is not an integer of at least `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{model}: {name} is {value!r}; give an integer of at least {minimum}")


def check_share(model: str, name: str, value: float) -> None:
    """Check an argument that is a share of a whole.

    Raises:
        ConfigError: the value is not a number in [0, 1).
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"{model}: {name} is {value!r}; give a number of at least 0 and below 1")


def check_switch(model: str, name: str, value: bool) -> None:
    """Check an argument that is on or off.

    Raises:
        ConfigError: the value is neither true nor false.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{model}: {name} is {value!r}; give true or false")


def check_images(model: str, images: Tensor, shape: tuple[int, int, int]) -> None:
    """Check a batch of images.

    Args:
        model: the model's name, for the message.
        images: (batch, channels, height, width) is expected.
        shape: the model's channels, height and width.

    Raises:
        DataError: the images have other dimensions, or are not of a floating-point type.
    """
    if tuple(images.shape[1:]) != shape:
        found, wanted = tuple(images.shape), ", ".join(map(str, shape))
        raise DataError(
            f"{model} takes images of shape (batch, {wanted}) but got {found}; reshape them in the data set"
        )
    if not images.is_floating_point():
        raise DataError(f"{model} takes floating-point images but got {images.dtype}; scale them in the data set")


def check_tokens(model: str, tokens: Tensor, context: int) -> None:
    """Check a batch of texts.

    Args:
        model: the model's name, for the message.
        tokens: integers, (batch, at most context positions) is expected.
        context: the most positions that the model looks at.

    Raises:
        DataError: the tokens have other dimensions or are not whole numbers.
    """
    if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= context:
        raise DataError(
            f"{model} takes tokens of shape (batch, at most {context}) but got {tuple(tokens.shape)}; give the model "
            "and the data the same context"
        )
    if tokens.dtype not in (torch.int64, torch.int32):
        raise DataError(f"{model} takes tokens of type int64 or int32 but got {tokens.dtype}")
