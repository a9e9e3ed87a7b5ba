"""The run's events: one JSON object per line in `metrics.jsonl`, and the same events to the console."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TextIO

from mpidl.telemetry.console import Console

FILE_NAME = "metrics.jsonl"


class Telemetry:
    """Writes a run's events down and shows them. Only the coordinator's records anything.

    Args:
        run_dir: folder that gets `metrics.jsonl`; None: no file.
        quiet: show nothing.
    """

    def __init__(self, run_dir: Path | None, quiet: bool = False) -> None:
        self._path = None if run_dir is None else Path(run_dir) / FILE_NAME
        self._file: TextIO | None = None
        self._console = None if quiet else Console()

    def record(self, event: str, **fields: object) -> None:
        """Append one event to the file, at once, and show it.

        Args:
            event: "start", "group", "balance", "epoch", "validation", "checkpoint", "warning" or "end"; others are
                written but not shown.
            fields: numbers, texts, lists and tables; NumPy and torch scalars become numbers, and NaN and
                infinities the strings "nan", "inf" and "-inf", which JSON has no numbers for.
        """
        self._write({"event": event, "time": time.time(), **fields})
        if self._console is not None:
            self._console.show(event, fields)

    def close(self) -> None:
        """Close the file and leave the terminal in order; safe to call twice."""
        if self._console is not None:
            self._console.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, event: dict[str, object]) -> None:
        if self._path is None:
            return
        try:
            if self._file is None:
                self._file = open_for_append(self._path)
            self._file.write(json.dumps(_plain(event), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            # A full disk must not end a training run: the weights are worth more than the log.
            message = f"{self._path} cannot be written ({error.strerror}); the run goes on without it"
            self._path = None
            if self._console is not None:
                self._console.show("warning", {"message": message})


def open_for_append(path: Path) -> TextIO:
    """Open the file for more lines, less a last line that a killed run left incomplete."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            with path.open("rb+") as file:
                file.truncate(content.rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")


def _plain(value: object) -> object:
    """The value in JSON's own types."""
    if hasattr(value, "item"):  # NumPy and torch scalars, without importing either
        value = value.item()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
