"""What the built documentation needs besides the pages: the table of settings, and files of the repository."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mpidl import config  # noqa: E402  (the checkout's, whatever is installed)

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")
"""A link to a file that is in the repository and not in the documentation."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what is made from the code."""
    return OUTSIDE.sub(r"\1", markdown).replace("<!-- settings -->", _settings())


def _settings() -> str:
    rows = ["| setting | type | default | what it is |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(config.Config):
        kind = re.sub(r"Literal\[(.*)\]", r"\1", str(field.type)).replace(" | None", "").replace(" | ", ", ")
        kind = kind.replace("dict[str, Any]", "{key = value}")
        default = f"`{default}`" if (default := config.shown_default(field)) else ""
        cells = (f"`{field.name}`", f"`{kind}`", default, field.metadata["help"].replace("|", "\\|"))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
