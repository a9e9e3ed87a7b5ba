"""Printing for people: what is printed alone, and tables, as wide as the terminal or the log."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import console as rich_console

from mpidl.telemetry import tables
from mpidl.telemetry.terminal import LOG_WIDTH, Terminal, find_terminal


class Console:
    """Prints to standard output.

    Args:
        terminal: where the output ends up; None, the default, finds out.
        is_terminal: whether there is one even if none is found, as under launchers that hide it.
    """

    def __init__(self, terminal: Terminal | None = None, *, is_terminal: bool = False) -> None:
        self.terminal = terminal or find_terminal()
        """None: the output goes to a log."""
        self.out = rich_console.Console(
            file=sys.stdout,
            force_terminal=is_terminal or self.terminal is not None,
            # On a terminal one column stays free: a full line would make some of them wrap.
            width=LOG_WIDTH if self.terminal is None else self.terminal.width() - 1,
            highlight=False,
            emoji=False,
        )

    def print(self, text: str) -> None:
        """Print text as it is: a line stays one line, however narrow the log is taken to be."""
        self.out.print(text, markup=False, soft_wrap=True)

    def print_table(self, title: str, rows: Sequence[tuple[str, ...]], headers: Sequence[str] = ()) -> None:
        """Print a table, as wide as its content and no wider than the output.

        One of many columns loses its frame where that would break words.
        """
        made = tables.table(title, rows, headers)
        if headers and tables.least_width(made, self.out) > self.out.width:
            tables.unframe(made)
        if self.out.is_terminal:
            self.out.print(made)
            return
        with self.out.capture() as captured:
            self.out.print(made)
        self.print("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))

    def fit(self) -> None:
        """Take the terminal's width anew: the user may have resized the window."""
        if self.terminal is not None:
            self.out.width = self.terminal.width() - 1
