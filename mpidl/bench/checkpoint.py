"""`mpidl bench checkpoint`: writing and reading a checkpoint, and how long training stands still for it.

*Written* is from the call to the last byte on disk (fsync), *the pause* until training could go on, each on the slowest
rank. What the disk allows is `dd conv=fsync` of as many bytes, what memory allows a plain copy of each rank's shard, by
all ranks at once; both in turn with the ways, so they meet the same machine. `dd` and plain calls go through the page
cache, as they do by default; mpidl goes past it where the file system lets it. It writes random numbers, `dd` zeros,
which cost nothing to make.

All files are read *cold*: they are on disk, and the page cache was told to forget them. What a layer below this
machine's keeps is not known. `dd` reads the files that mpidl wrote (its own are zeros, which some disks give back
several times as fast), and throws them away; mpidl checks them, and has them in memory that is fresh and in the model
at the end.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np

from mpidl.bench import gloo
from mpidl.bench.cases import OPTIMIZERS, chosen
from mpidl.bench.checkpoint_ways import WAYS, Copy, DdRead, Mpidl, MpidlLoad, Plain, PlainReads, State, Way
from mpidl.bench.measuring import Timed, Timing, quartiles, time_in_turn
from mpidl.bench.report import Report, Row, Table, milliseconds, row, spread
from mpidl.errors import ConfigError
from mpidl.runtime import World

_COPY = "copy"
_ALWAYS = ("dd", "plain-writes", "mpidl")


def measure(world: World, parsed: argparse.Namespace) -> Report:
    """Write and read in all ways. Collective.

    Raises:
        ConfigError: on every rank: unknown ways, or the folder cannot be written.
    """
    with world.agreed("choosing ways and folder"):
        names = [name for name in WAYS if name in {*_ALWAYS, *chosen(parsed.ways, WAYS, {})}]
        folder = pathlib.Path(parsed.folder) / "mpidl-bench-checkpoint"
        if world.rank == 0:
            _make(folder)
    try:
        with gloo.group(world):
            state = State(world, folder, parsed.millions, OPTIMIZERS[parsed.optimizer_name])
            rows = _measure(state, parsed, names)
            state.manager.close()
    finally:
        world.barrier()
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return Report(rows, [_table(rows, case) for case in dict.fromkeys(r["case"] for r in rows)], [])


def _make(folder: pathlib.Path) -> None:
    try:
        folder.mkdir()
    except OSError as error:
        raise ConfigError(f"--folder: {folder} cannot be made: {error.strerror}; choose another folder") from None


def _measure(state: State, parsed: argparse.Namespace, names: Sequence[str]) -> list[Row]:
    ways = {name: WAYS[name](state) for name in names}
    written = time_in_turn(state.world, {_COPY: Copy(state), **ways}, parsed.repeats)
    copied = {_COPY: written.pop(_COPY)}
    pauses = {name: _pause(state.world, way) for name, way in ways.items() if name not in ("dd", "plain-writes")}
    folders = {type(way): way.path for way in ways.values()}
    readers: dict[str, Timed] = {
        "dd": DdRead(state, folders[Mpidl] / "one"),
        "plain-reads": PlainReads(state, folders[Plain]),
        "mpidl": MpidlLoad(state, folders[Mpidl] / "one"),
    }
    read = time_in_turn(state.world, readers, parsed.repeats)
    for way in ways.values():
        way.close()
    case = f"{state.total_bytes / 1e9:.3g} GB, {parsed.optimizer_name}"
    return [
        *_rows(state, f"written: {case}", written, written["dd"]),
        *_rows(state, f"pause: {case}", copied | pauses, copied[_COPY]),
        *_rows(state, f"read: {case}", read, read["dd"]),
    ]


def _pause(world: World, way: Way) -> Timing:
    slowest = world.allreduce(np.array(way.pauses[1:]), "max")
    return Timing(*quartiles(slowest), 0.0)


def _rows(state: State, case: str, timings: dict[str, Timing], limit: Timing) -> list[Row]:
    return [
        row(
            state.world, case, name, seconds=timing.seconds, spread=timing.spread, limit_seconds=limit.seconds,
            bytes=state.total_bytes, bytes_per_s=state.total_bytes / timing.seconds,
            share_of_limit=limit.seconds / timing.seconds, cpu_seconds=timing.cpu_seconds or None,
        )
        for name, timing in timings.items()
    ]  # fmt: skip


def _table(rows: Sequence[Row], case: str) -> Table:
    headers = ("way", "ms", "quartiles", "GB/s", "of the limit's speed")
    texts = [
        (
            r["way"], milliseconds(r["seconds"]), spread(r["spread"]), f"{r['bytes_per_s'] / 1e9:.2f}",
            f"{100 * r['share_of_limit']:.0f} %",
        )
        for r in rows if r["case"] == case
    ]  # fmt: skip
    limit = "copy" if case.startswith("pause") else "dd"
    return Table(f"bench checkpoint: {case}, {rows[0]['ranks']} ranks; the limit is {limit}", headers, texts)
