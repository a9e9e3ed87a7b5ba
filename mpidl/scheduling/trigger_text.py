"""Triggers written as text, as in a job file: the calls of `triggers.py`, joined by `|` and `&`, or `or` and `and`."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from mpidl.errors import ConfigError
from mpidl.scheduling.triggers import Trigger, at_end, epochs, iterations, loss_below, plateau, reached, seconds

WORDS: dict[str, Callable[..., Trigger]] = {
    function.__name__: function for function in (iterations, epochs, seconds, at_end, loss_below, reached, plateau)
}


def parse(text: str) -> Trigger:
    """Read a trigger from text, such as `epochs(2) | seconds(600)` or `reached("accuracy", 0.99)`.

    Raises:
        ConfigError: not such a text.
    """
    try:
        return _build(ast.parse(text.strip(), mode="eval").body)
    except ConfigError:
        raise
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ConfigError(
            f"{text!r} is not a trigger ({reason}); combine {', '.join(WORDS)} with | and &, "
            "such as: epochs(1) | seconds(600)"
        ) from None


def _build(node: ast.expr) -> Trigger:
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _build(left) | _build(right)
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return _build(left) & _build(right)
        case ast.BoolOp(op=op, values=[first, *others]):
            made = _build(first)
            for other in others:
                made = made | _build(other) if isinstance(op, ast.Or) else made & _build(other)
            return made
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in WORDS:
            options = {str(keyword.arg): _constant(keyword.value) for keyword in keywords}
            return WORDS[name](*map(_constant, args), **options)
    raise ValueError(f"it has {ast.unparse(node)}")


def _constant(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        raise ValueError(f"{node.id} needs quotes")
    return ast.literal_eval(node)


def as_trigger(name: str, value: int | str | Trigger | None) -> Trigger | None:
    """The trigger that a setting means: a number is of epochs, 0 and None are never.

    Raises:
        ConfigError: it means none; the message begins with the setting's name.
    """
    if value is None or value == 0:
        return None
    if isinstance(value, Trigger):
        return value
    try:
        return parse(value) if isinstance(value, str) else epochs(value)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
