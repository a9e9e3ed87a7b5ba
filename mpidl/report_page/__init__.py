"""`mpidl report`: one HTML page from run directories and from what benchmarks wrote.

The way of the data: `runs` and `benches` read files and refuse what is damaged; `series` and `scaling` turn them into
numbers; `charts` and `bench_charts` draw, `html` escapes, and `page` puts it together. Only files are read, by one
process: no MPI, no torch, so it runs on a login node, also while the run goes on.

Importing this package loads neither MPI nor torch nor matplotlib.
"""

from __future__ import annotations

import argparse

__all__ = ["add_flags", "write"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `mpidl report` its arguments."""
    parser.add_argument("inputs", nargs="+", metavar="RUN_DIR|BENCH.json", help="run directories, figures of benches")
    parser.add_argument(
        "--output",
        default="report.html",
        metavar="FILE",
        help="page to write, replaced if there (default: report.html)",
    )
    parser.add_argument("--png", metavar="DIR", help="write the pictures there as well, as PNG files")


def write(parsed: argparse.Namespace) -> None:
    """Write the page and say where it is.

    Raises:
        ConfigError: matplotlib is missing, an input is not what is asked for or is damaged, or a file cannot be
            written.
    """
    from mpidl.report_page import command

    command.run(parsed)
