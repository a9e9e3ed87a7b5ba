"""Data sets named on the command line or in a configuration."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from mpidl.data.arrays import is_array
from mpidl.data.cifar10 import cifar10
from mpidl.data.digits import digits
from mpidl.data.fashion_mnist import fashion_mnist
from mpidl.data.files import open_npy, open_npz_sets
from mpidl.data.images import images
from mpidl.data.synthetic import synthetic
from mpidl.data.text import text
from mpidl.errors import ConfigError, DataError
from mpidl.imports import check_arguments, import_callable, near_names

TrainAndValidation: TypeAlias = tuple[Any, Any]  # each is something that `as_source` takes; validation or None

_BUILT_IN: dict[str, Callable[..., TrainAndValidation]] = {
    "cifar10": cifar10,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "images": images,
    "synthetic": synthetic,
    "text": text,
}
NAMES = tuple(_BUILT_IN)


def load_named(
    name: str, data_dir: str | None = None, data_args: Mapping[str, Any] | None = None
) -> TrainAndValidation:
    """Load the training and the validation set that a name stands for.

    Args:
        name: one of
            `digits`, which comes with the package;
            `fashion_mnist`, from the idx files in data_dir or where Debian's package installs them;
            `cifar10`, from the files of its binary version in data_dir;
            `images`, folders of images in data_dir;
            `text`, text files in data_dir, or the file data_dir;
            `synthetic`, random samples of any shape;
            `FILE.npz`, with the arrays x and y, and x_val and y_val if there is validation (`open_npz_sets`
            lists the other names);
            `X.npy,Y.npy`, memory-mapped inputs and targets, without validation;
            `package.module:callable`, which returns (training set, validation set or None), or one data set;
            two arrays or tensors are one data set. It is called with data_dir=... if it takes it.
        data_dir: the folder of the files; relative paths in the name start there. By default they start in
            the current directory.
        data_args: further arguments of what the name stands for, where that is a built-in name or a callable.

    Returns:
        (training set, validation set or None), each of which `as_source` takes.

    Raises:
        ConfigError: the name is unknown, or the callable cannot be imported or called.
        DataError: the data are missing or damaged, or the callable returned something else.
    """
    args = dict(data_args or {})
    if name in _BUILT_IN:
        return _call(name, _BUILT_IN[name], data_dir, args)
    if ":" in name:
        return _call(name, import_callable(name), data_dir, args)
    base = Path(data_dir or "")
    if args and name.endswith((".npz", ".npy")):
        raise ConfigError(f"data_args has {', '.join(args)}, but {name} takes none; leave them out")
    if name.endswith(".npz"):
        return open_npz_sets(base / name)
    if name.endswith(".npy"):
        paths = [base / part.strip() for part in name.split(",")]
        if len(paths) != 2:
            raise ConfigError(f"{name!r} names {len(paths)} .npy files; give two, inputs and targets: x.npy,y.npy")
        return (open_npy(paths[0]), open_npy(paths[1])), None
    near = near_names(difflib.get_close_matches(name, NAMES))
    raise ConfigError(
        f"unknown data {name!r}{near}; known are {', '.join(NAMES)}; or give FILE.npz, X.npy,Y.npy or "
        "package.module:callable"
    )


def _call(name: str, function: Callable[..., Any], data_dir: str | None, args: dict[str, Any]) -> TrainAndValidation:
    if "data_dir" in inspect.signature(function).parameters:
        args |= {"data_dir": data_dir}
    elif data_dir is not None:
        raise ConfigError(f"{name} takes no data_dir, but one was given, {data_dir}; leave it out, or let it take one")
    check_arguments(f"data {name}", function, args)
    result = function(**args)
    if result is None:
        raise DataError(f"{name} returned None; return (training set, validation set) or one data set")
    if isinstance(result, tuple | list) and len(result) == 2 and not is_array(result[0]):
        return result[0], result[1]
    return result, None
