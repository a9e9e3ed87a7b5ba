"""The run's events: one JSON object per line in `metrics.jsonl`, the same to the view, and to whoever else listens.

A training is worth more than what is told of it. A file that cannot be written, an output that is closed or on a full
disk, a listener that raises: each is told once, as a warning, is given up, and the run goes on.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from mpidl.telemetry.plain_json import to_line
from mpidl.telemetry.views import View, make_view

FILE_NAME = "metrics.jsonl"

Listener = Callable[[str, Mapping[str, Any]], None]
"""Takes each event's name and fields, on rank 0."""


class Telemetry:
    """Writes a run's events down and shows them. Only the coordinator's records anything.

    Args:
        run_dir: folder that gets `metrics.jsonl`; None: no file.
        quiet: show nothing at all.
        progress: how the run is shown: a name of `views.PROGRESS`.
        listeners: called with each event; what they get is not to be changed.
    """

    def __init__(
        self,
        run_dir: Path | None,
        quiet: bool = False,
        *,
        progress: str = "auto",
        listeners: Sequence[Listener] = (),
    ) -> None:
        self._path = None if run_dir is None else Path(run_dir) / FILE_NAME
        self._file: TextIO | None = None
        self._view: View | None = None if quiet else make_view(progress)
        self._listeners = list(listeners)

    def record(self, event: str, **fields: object) -> None:
        """Append one event to the file, at once, show it, and tell the listeners.

        Args:
            event: "start", "group", "balance", "straggler", "epoch", "validation", "summary", "histograms",
                "checkpoint", "recovery", "restart", "trace", "warning" or "end".
            fields: numbers, texts, lists and tables; NumPy and torch scalars become numbers, and NaN and
                infinities the strings "nan", "inf" and "-inf", which JSON has no numbers for.
        """
        self._write({"event": event, "time": time.time(), **fields})
        self._show(event, fields)
        for listener in list(self._listeners):
            try:
                listener(event, fields)
            except Exception as error:
                self._listeners.remove(listener)
                name = getattr(listener, "__qualname__", type(listener).__name__)
                self.record("warning", message=f"{name} raised {error!r} at event {event!r}; it is not called again")

    def close(self) -> None:
        """Close the file and leave the terminal in order; safe to call twice."""
        with contextlib.suppress(OSError):
            if self._view is not None:
                self._view.close()
        self._close_file()

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # what could not be written is tried once more
                file.close()

    def _write(self, event: dict[str, object]) -> None:
        if self._path is None:
            return
        try:
            if self._file is None:
                self._file = open_for_append(self._path)
            self._file.write(to_line(event) + "\n")
            self._file.flush()
        except OSError as error:
            path, self._path = self._path, None
            self._close_file()
            self._show(
                "warning", {"message": f"{path} cannot be written ({error.strerror}); the run goes on without it"}
            )

    def _show(self, event: str, fields: Mapping[str, Any]) -> None:
        if self._view is None:
            return
        try:
            self._view.show(event, fields)
        except OSError as error:
            self._view = None
            with contextlib.suppress(OSError):
                print(
                    f"mpidl: warning: standard output cannot be written ({error.strerror}); the run goes on unseen",
                    file=sys.stderr,
                )


def open_for_append(path: Path) -> TextIO:
    """Open the file for more lines, less a last line that a killed run left incomplete."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            with path.open("rb+") as file:
                file.truncate(content.rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")
