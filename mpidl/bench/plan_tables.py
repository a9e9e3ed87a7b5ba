"""The tables and notes of `mpidl bench plan`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mpidl.bench.cost_model import Models
from mpidl.bench.report import Row, Table, milliseconds, spread


def tables(rows: Sequence[Row], said: Sequence[Row], compared: tuple[int, int]) -> list[Table]:
    """By group size, by partitions, and what the models say, if anything.

    Args:
        rows: what was measured, by this run and earlier ones.
        said: by the models.
        compared: the group size and the partitions at which the others are varied.
    """
    group_size, partitions = compared
    made = [_by_group_size(rows, partitions), _by_partitions(rows, group_size)]
    return [*made, _of_models(said, group_size)] if said else made


def percent(share: float) -> str:
    """With two significant digits: 0.0042 %, 12 %."""
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:,.0f} %"


def _by_group_size(rows: Sequence[Row], partitions: int) -> Table:
    texts = [
        (
            str(r["ranks"]), str(r["group_size"]), milliseconds(r["seconds"]), spread(r["spread"]),
            percent(r["share"]), f"{r['calls_per_group']:g}", f"{r['calls_per_group'] / r['group_size']:.3g}",
        )
        for r in rows
        if r["way"] == "mpidl" and r["partitions"] == partitions
    ]  # fmt: skip
    headers = ("ranks", "group size", "ms", "quartiles", "share", "calls a group", "an iteration")
    return Table(f"bench plan: control of an iteration, {partitions} partitions, by group size", headers, texts)


def _by_partitions(rows: Sequence[Row], group_size: int) -> Table:
    groups = {(r["ranks"], r["partitions"]): r for r in rows if r["way"] == "mpidl" and r["group_size"] == group_size}
    texts = []
    for r in rows:
        own = groups.get((r["ranks"], r["partitions"]))
        if r["way"] == "central" and own is not None:
            texts.append(
                (
                    str(r["ranks"]), str(r["partitions"]), milliseconds(own["seconds"]), percent(own["share"]),
                    milliseconds(r["seconds"]), percent(r["share"]), f"{r['seconds'] / own['seconds']:,.3g}",
                )
            )  # fmt: skip
    headers = ("ranks", "partitions", "mpidl, ms", "share", "central, ms", "share", "ratio")
    return Table(f"control of an iteration by partitions; mpidl with group size {group_size}", headers, texts)


def _of_models(said: Sequence[Row], group_size: int) -> Table:
    texts = [(f"{r['ranks']:,}", r["way"], milliseconds(r["seconds"]), percent(r["share"])) for r in said]
    headers = ("ranks", "way", "ms", "share")
    return Table(f"by the models; group size {group_size}", headers, texts)


def notes(parsed: argparse.Namespace, models: Models | None) -> list[str]:
    """What shares are of, and the models with what they take for granted."""
    compute = "replaced by waits" if parsed.waits else "left out"
    told = [f"share: of {parsed.iteration_ms:g} ms of compute an iteration, which was {compute}"]
    if models is None:
        return [*told, "no model: it takes three numbers of ranks; measure others with --json and add them by --with"]
    return [*told, *models.told()]
