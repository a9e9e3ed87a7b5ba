"""Data sets named on the command line or in a configuration."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from mpidl.data.arrays import is_array
from mpidl.data.digits import digits
from mpidl.data.fashion_mnist import fashion_mnist
from mpidl.data.files import open_npy, open_npz_sets
from mpidl.errors import ConfigError, DataError
from mpidl.imports import import_callable, near_names

TrainAndValidation: TypeAlias = tuple[Any, Any]  # each is something that `as_source` takes; validation or None

_BUILT_IN: dict[str, Callable[[Path | None], TrainAndValidation]] = {
    "digits": lambda data_dir: digits(),
    "fashion_mnist": fashion_mnist,
}
NAMES = tuple(_BUILT_IN)


def load_named(name: str, data_dir: str | None = None) -> TrainAndValidation:
    """Load the training and the validation set that a name stands for.

    Args:
        name: one of
            `digits`, which comes with the package;
            `fashion_mnist`, from the idx files in data_dir or where Debian's package installs them;
            `FILE.npz`, with the arrays x and y, and x_val and y_val if there is validation (`open_npz_sets`
            lists the other names);
            `X.npy,Y.npy`, memory-mapped inputs and targets, without validation;
            `package.module:callable`, which returns (training set, validation set or None), or one data set;
            two arrays or tensors are one data set. It is called with data_dir=... if it takes it.
        data_dir: the folder of the files; relative paths in the name start there. By default they start in
            the current directory.

    Returns:
        (training set, validation set or None), each of which `as_source` takes.

    Raises:
        ConfigError: the name is unknown, or the callable cannot be imported or called.
        DataError: the data are missing or damaged, or the callable returned something else.
    """
    folder = Path(data_dir) if data_dir is not None else None
    if name in _BUILT_IN:
        return _BUILT_IN[name](folder)
    if ":" in name:
        return _call(name, data_dir)
    base = folder or Path()
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


def _call(spec: str, data_dir: str | None) -> TrainAndValidation:
    function = import_callable(spec)
    if "data_dir" in inspect.signature(function).parameters:
        result = function(data_dir=data_dir)
    elif data_dir is not None:
        raise ConfigError(f"{spec} takes no data_dir, but one was given, {data_dir}; leave it out, or let it take one")
    else:
        result = function()
    if result is None:
        raise DataError(f"{spec} returned None; return (training set, validation set) or one data set")
    if isinstance(result, tuple | list) and len(result) == 2 and not is_array(result[0]):
        return result[0], result[1]
    return result, None
