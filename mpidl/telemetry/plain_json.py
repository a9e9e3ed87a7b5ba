"""Values of events as JSON has them."""

from __future__ import annotations

import json
import math


def to_line(event: dict[str, object]) -> str:
    """The event as one line of JSON, without its end."""
    try:
        return json.dumps(event, allow_nan=False)  # nearly always possible, and several times as fast
    except (TypeError, ValueError):
        return json.dumps(plain(event), allow_nan=False)


def plain(value: object) -> object:
    """The value in JSON's own types; NaN and infinities become texts."""
    if hasattr(value, "item"):  # NumPy and torch scalars, without importing either
        value = value.item()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
