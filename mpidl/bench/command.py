"""`mpidl bench`: the same course for every benchmark."""

from __future__ import annotations

import argparse
import functools
import importlib
from pathlib import Path

from mpidl import runtime
from mpidl.bench import picture, report
from mpidl.errors import ConfigError
from mpidl.telemetry import Console


def run(parsed: argparse.Namespace) -> None:
    """Start MPI, measure on all ranks, and let rank 0 tell. Collective.

    Raises:
        ConfigError: on every rank, before anything is measured: unknown names, or files that cannot be written.
        DisagreementError: on every rank: two ways do not give the same result.
    """
    world = runtime.init(parsed.threads)
    world.check_equal("the command line", " ".join(parsed.arguments), ConfigError)
    with world.agreed("checking where the figures go"):
        if world.rank == 0:
            _check_files(parsed)
    # torch is imported here, after the ranks have settled threads and instruction set.
    found: report.Report = importlib.import_module(f"mpidl.bench.{parsed.bench}").measure(world, parsed)
    if world.rank != 0:
        return
    console = Console()
    for table in found.tables:
        console.print_table(table.title, table.rows, table.headers)
    for note in found.notes:
        console.print(note)
    command = f"mpirun -n {world.size} mpidl {' '.join(parsed.arguments)}"
    if parsed.json_file:
        report.write_json(Path(parsed.json_file), parsed.bench, report.machine(world), command, found.rows)
    if parsed.picture_file:
        draw = found.draw or functools.partial(picture.draw, rows=found.rows)
        draw(Path(parsed.picture_file), command)


def _check_files(parsed: argparse.Namespace) -> None:
    """A long measurement must not end with a file that cannot be written."""
    if parsed.picture_file:
        picture.check(parsed.picture_file)
    for file in filter(None, (parsed.json_file, parsed.picture_file)):
        if not Path(file).parent.is_dir():
            raise ConfigError(f"{file} cannot be written: there is no folder {Path(file).parent}; make it first")
