"""Objects named on the command line or in a configuration as `package.module:name`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from mpidl.errors import ConfigError

_SPEC = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*(\.[^\W\d]\w*)*)")


def import_attribute(spec: str) -> Any:
    """Import the object that `package.module:name` names; name may have dots.

    The current directory is put first on sys.path if it is not there, so that a module of the user's own beside
    the job is found.

    Raises:
        ConfigError: the spec is not of that form, the module cannot be imported (its own exception is the
            cause), or it has no such name.
    """
    match = _SPEC.fullmatch(spec)
    if match is None or match["module"].endswith(".py"):
        advice = "; give the module without .py, packages with dots" if ".py" in spec else ""
        raise ConfigError(f"{spec!r} is not of the form package.module:name{advice}")
    module_name, name = match["module"], match["name"]
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"cannot import {module_name!r} for {spec!r}: {type(error).__name__}: {error}; looked in the current "
            f"directory, {os.getcwd()}, and in the installed packages"
        ) from error
    for depth, part in enumerate(name.split(".")):
        if not hasattr(found, part):
            owner = ".".join([module_name, *name.split(".")[:depth]])
            near = difflib.get_close_matches(part, [each for each in dir(found) if not each.startswith("_")])
            raise ConfigError(f"{owner} has no {part!r}{near_names(near)}")
        found = getattr(found, part)
    return found


def import_callable(spec: str) -> Callable[..., Any]:
    """Import the function or class that `package.module:name` names.

    Raises:
        ConfigError: as `import_attribute`, or what is there cannot be called.
    """
    found = import_attribute(spec)
    if not callable(found):
        raise ConfigError(f"{spec} is a {type(found).__name__}, which cannot be called; name a function or a class")
    return found  # type: ignore[no-any-return]


def check_arguments(what: str, function: Callable[..., Any], args: dict[str, Any]) -> None:
    """See that a function takes the arguments, by its signature: a TypeError from inside it stays what it is.

    Args:
        what: to call the function in messages, such as "model lenet5".
        function: what will be called.
        args: its keyword arguments.

    Raises:
        ConfigError: it does not take them; names what it takes.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # what is written in C may have none
        return
    parameters = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    known = inspect.Signature(parameters)
    names = [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        for name in args:
            if name not in names:
                near = near_names(difflib.get_close_matches(name, names))
                raise ConfigError(f"{what} does not take {name!r}; it takes {known}{near}")
    try:
        signature.bind(**args)
    except TypeError as error:
        raise ConfigError(f"{what}: {error}; it takes {known}") from None


def near_names(names: list[str]) -> str:
    """The end of an error message that offers names: '; did you mean a or b?', or nothing without any."""
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""
