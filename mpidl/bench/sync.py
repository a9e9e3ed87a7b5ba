"""`mpidl bench sync`: gradient sum, update and weights visible everywhere, without compute.

The limit of memory is the time that a plain copy takes for the bytes that the way of least traffic must move
(`limits.MEMORY_FORMULA`), with all ranks copying at once, in turn with the ways. Between several nodes the wire has a
limit too (`limits.WIRE_FORMULA`); the larger one counts. `kept.py` has what a rank keeps.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mpidl.bench import gloo, horovod, kept, limits, report
from mpidl.bench.cases import OPTIMIZERS, Exchanged, chosen, shapes_of_millions, shapes_of_model
from mpidl.bench.exchange_ways import WAYS, Way
from mpidl.bench.measuring import Timing, time_in_turn
from mpidl.bench.report import Report, Row, Table, mib, milliseconds, row, spread
from mpidl.errors import DisagreementError
from mpidl.runtime import World, on_all_ranks

_CHECKED_STEPS = 3
_RELATIVE, _ABSOLUTE = 1e-5, 1e-6
_COPY = "copy"


def measure(world: World, parsed: argparse.Namespace) -> Report:
    """Check that all ways agree, time them, and see what they keep. Collective.

    Raises:
        ConfigError: on every rank: unknown ways or models.
        DisagreementError: on every rank: a way's weights are not the expected ones.
    """
    optimizer = OPTIMIZERS[parsed.optimizer_name]
    with world.agreed("choosing ways and model"):
        names = chosen(parsed.ways, WAYS, horovod.unusable())
        shapes: Sequence[Sequence[int]] = (
            shapes_of_model(parsed.model_name) if parsed.model_name else shapes_of_millions(parsed.millions)
        )
    exchanged = Exchanged.of(parsed.model_name or f"{parsed.millions:g} million", shapes, optimizer, world.rank)
    with gloo.group(world):
        ways = {name: WAYS[name](world, exchanged) for name in names}
        check(world, exchanged, ways)
        copy = limits.Copy(world, limits.memory_bytes(world, exchanged.size, optimizer.num_states))
        timings = time_in_turn(world, {_COPY: copy, **ways}, parsed.repeats, after=horovod.stop)
        wire_s = limits.wire_seconds(world, exchanged.size, parsed.wire_gbit)
        rows = _timed_rows(world, exchanged, ways, timings, wire_s)
        for way in ways.values():
            way.close()
        del ways, copy
        rows_of_memory = kept.measure(world, names)
    tables = [_timed_table(rows), kept.table(rows_of_memory)]
    return Report([*rows, *rows_of_memory], tables, _notes(world, rows, wire_s))


def check(world: World, exchanged: Exchanged, ways: Mapping[str, Way]) -> None:
    """Run a few steps of every way and compare the weights, tensor by tensor, with float64. Collective.

    Raises:
        DisagreementError: on every rank, when some rank sees other weights than it should.
    """
    for _ in range(_CHECKED_STEPS):
        for way in ways.values():
            way.prepare()
            world.barrier()
            way.run()
            horovod.stop()
    options = {**exchanged.optimizer.options, "fused": False}
    wrong = np.zeros(len(ways))
    for index, (weight, gradient) in enumerate(zip(exchanged.weights, exchanged.gradients, strict=True)):
        expected = torch.nn.Parameter(weight.double())
        expected.grad = torch.from_numpy(world.allreduce(gradient.double().numpy())) / world.size
        optimizer = exchanged.optimizer.kind([expected], **options)
        for _ in range(_CHECKED_STEPS):
            optimizer.step()
        bound = _ABSOLUTE + _RELATIVE * expected.detach().abs()
        for which, way in enumerate(ways.values()):
            error = ((way.parameters[index].detach() - expected.detach()).abs() / bound).max()
            wrong[which] = max(wrong[which], float(error.nan_to_num(torch.inf)))
    wrong = world.allreduce(wrong, "max")
    if wrong.max() > 1:
        name = list(ways)[int(wrong.argmax())]
        raise on_all_ranks(
            DisagreementError(
                f"after {_CHECKED_STEPS} steps the weights of {name} are {wrong.max():.3g} times as far from those of "
                f"a float64 optimizer as rounding allows ({_ABSOLUTE:g} + {_RELATIVE:g} |w|); it does something else"
            )
        )


def _timed_rows(
    world: World, exchanged: Exchanged, ways: Mapping[str, Way], timings: Mapping[str, Timing], wire_s: float | None
) -> list[Row]:
    memory_s = timings[_COPY].seconds
    common = {"memory_limit_seconds": memory_s, "wire_limit_seconds": wire_s}
    limit_s = max(memory_s, wire_s or 0.0)
    copied = limits.memory_bytes(world, exchanged.size, exchanged.optimizer.num_states) / world.local_size
    figures = {name: (timing, copied if name == _COPY else ways[name].sent_bytes) for name, timing in timings.items()}
    first = report.baseline(list(ways))
    return [
        row(
            world, exchanged.name, name, seconds=timing.seconds, spread=timing.spread, limit_seconds=limit_s,
            bytes=num_bytes, cpu_seconds=timing.cpu_seconds, times_limit=timing.seconds / limit_s,
            baseline=first, times_baseline=timing.seconds / timings[first].seconds, **common,
        )
        for name, (timing, num_bytes) in figures.items()
    ]  # fmt: skip


def _timed_table(rows: Sequence[Row]) -> Table:
    title = report.title("sync", rows[0])
    headers = ("way", "ms", "quartiles", "x limit", "ratio", "CPU ms", "MiB sent")
    texts = [
        (
            r["way"], milliseconds(r["seconds"]), spread(r["spread"]), f"{r['times_limit']:.2f}",
            f"{r['times_baseline']:.2f}", milliseconds(r["cpu_seconds"]), "-" if r["way"] == _COPY else mib(r["bytes"]),
        )
        for r in rows
    ]  # fmt: skip
    return Table(title, headers, texts)


def _notes(world: World, rows: Sequence[Row], wire_s: float | None) -> list[str]:
    copied = rows[0]["bytes"] * world.local_size
    seconds = rows[0]["memory_limit_seconds"]
    notes = [
        f"memory limit {milliseconds(seconds)} ms: {limits.MEMORY_FORMULA} = {copied / 1e6:,.0f} MB, which the "
        f"{world.local_size} ranks of a node copy at {copied / seconds / 1e9:.1f} GB/s (read + written)"
    ]
    if wire_s is not None:
        notes.append(f"wire limit {milliseconds(wire_s)} ms: {limits.WIRE_FORMULA}")
    return notes
