"""What a run prints before its first iteration and after its last, as pairs of a name and a text."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Fields = Mapping[str, Any]

_BITS = {
    "partitions": "a function of partitions and threads a rank: the same on any number of ranks and nodes",
    "layout": "a function of the partitions and of the nodes' layout",
    "none": "not repeatable: the order of addition, or what is dropped, is not fixed",
}
_RANKS_SHOWN = 6
_COUNTS_SHOWN = 16
ANY_WIDTH = 10_000
"""Columns, more than anything needs."""


def count(number: float) -> str:
    """41,200; from 100 on without decimals, below with three significant digits."""
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"


def size(num_bytes: float) -> str:
    """Bytes in the largest binary unit that keeps the number at 1 or more."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while num_bytes >= 1024 and len(units) > 1:
        num_bytes /= 1024
        del units[0]
    return f"{num_bytes:.0f} B" if units[0] == "B" else f"{num_bytes:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """h:mm:ss, and tenths of a second below a minute."""
    return f"{seconds:.1f} s" if seconds < 60 else str(datetime.timedelta(seconds=round(seconds)))


def measure(name: str, value: object) -> str:
    """A metric for people: accuracies in percent, other numbers with five significant digits."""
    if name == "samples":
        return count(float(str(value)))
    if isinstance(value, float):
        return f"{100 * value:.2f} %" if "accuracy" in name else f"{value:.5g}"
    return count(value) if isinstance(value, int) else str(value)


def measures(fields: Fields, leave_out: Sequence[str] = ()) -> str:
    """`loss 0.1234  accuracy 97.50 %`: the loss first, then each metric of a validation event."""
    names = ["loss", *sorted(set(fields) - {"loss", *leave_out})]
    return "  ".join(f"{name} {measure(name, fields[name])}" for name in names if name in fields)


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Percent of the iterations' time by phase, largest first, with "other".

    What takes less than 0.1 % is in "other", but for waiting for data; "other" itself is left out below that.

    Args:
        seconds: by phase; "load" is waiting for data, "total" all of it.
    """
    named = {("waiting for data" if name == "load" else name.replace("_", " ")): s for name, s in seconds.items()}
    # Phases are means over ranks, the total is one rank's: its clock may have started a little later.
    total = max(named.pop("total"), sum(named.values()))
    shown = {name: s for name, s in named.items() if s >= 1e-3 * total or name == "waiting for data"}
    if (other := total - sum(shown.values())) >= 1e-3 * total:
        shown["other"] = other
    return {name: 100 * s / total for name, s in sorted(shown.items(), key=lambda item: -item[1])}


def percent(share: float) -> str:
    """`81 %`; below ten with two significant digits."""
    return f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"


def phases(seconds: Mapping[str, float]) -> str:
    """`compute 81 %, waiting for data 0.4 %, ...`: the shares of the iterations' time, as `shares` has them."""
    return ", ".join(f"{name} {percent(share)}" for name, share in shares(seconds).items())


def of_start(fields: Fields) -> list[tuple[str, str]]:
    """The rows of the first table: what was derived from the configuration and the machine.

    Args:
        fields: the "start" event's.
    """
    memory: dict[str, int] = fields["memory_per_rank_bytes"]
    parts = ", ".join(f"{name.replace('_', ' ')} {size(number)}" for name, number in memory.items())
    total, per_epoch = fields["total_iterations"], fields["iterations_per_epoch"]
    first = fields.get("first_iteration", 0)
    group = "chosen while running" if fields["group_size"] == "auto" else f"{fields['group_size']} iterations"
    rows = [
        ("ranks", f"{number(fields['ranks'], 'rank')} on {_hosts(fields)}, "
                  f"{number(fields['threads_per_rank'], 'thread')} each"),
        ("partitions", f"{fields['partitions']}: {_owners(fields['partition_ranges'])}"),
        ("batch", f"{number(fields['batch_size'], 'sample')} an iteration; group size {group}"),
        ("model", f"{count(fields['parameters'])} parameters; largest shard {count(fields['shard_size'])}"),
        ("memory a rank", f"{size(sum(memory.values()))}: {parts}"),
        ("data", f"{count(fields['train_samples'])} training samples, "
                 f"{count(fields['validation_samples'] or 0)} validation samples"),
        ("epochs", f"{fields['epochs']} of {number(per_epoch, 'iteration')}, {count(total)} in all"),
        ("sums", f"{fields['reduction']}; bits are {_BITS.get(fields['bits'], fields['bits'])}"),
        ("seed", str(fields["seed"])),
        ("software", _software(fields)),
        ("run directory", str(fields["run_dir"] or "none: nothing is kept")),
    ]  # fmt: skip
    if fields.get("recovery"):
        rows.append(("lost ranks", "the others go on, in memory (recovery)"))
    if fields.get("slurm"):
        rows.append(("Slurm", str(fields["slurm"])))
    if fields.get("seconds_left") is not None:
        rows.append(("time left", f"{duration(fields['seconds_left'])}; stops before that, with a checkpoint"))
    if first:
        rows.append(("resumed", f"after iteration {count(first)} of {count(total)}"))
    return rows


def of_end(fields: Fields) -> list[tuple[str, str]]:
    """The rows of the result table.

    Args:
        fields: the "end" event's.
    """
    rows = [("status", str(fields["status"]))]
    if fields.get("message"):
        rows.append(("message", str(fields["message"])))
    rows.append(("time", duration(fields["seconds"])))
    rows.append(("done", f"{number(fields['epochs'], 'epoch')}, {number(fields['iterations'], 'iteration')}"))
    if fields.get("samples_per_s"):
        rows.append(("throughput", f"{count(fields['samples_per_s'])} samples/s"))
    if fields.get("lost"):
        rows.append(("lost ranks", lost_ranks(fields["lost"])))
    if "dropped_partitions" in fields:
        repeated = number(fields["repeated_iterations"], "iteration")
        rows.append(("dropped", f"{number(fields['dropped_partitions'], 'partition')}; {repeated} repeated"))
    if fields.get("phases", {}).get("total"):
        rows.append(("iterations' time", phases(fields["phases"])))
    if fields.get("groups"):
        rows.append(("coordination", _coordination(fields)))
    if fields.get("loss") is not None:
        rows.append(("training loss", measure("loss", fields["loss"])))
    validation = fields.get("validation") or {}
    for name in ("loss", *sorted(set(validation) - {"loss", "epoch", "iteration", "seconds", "samples"})):
        if name in validation:
            rows.append((f"validation {name}", measure(name, validation[name])))
    if fields.get("weights"):
        rows.append(("weights", str(fields["weights"])))
    if fields.get("run_dir"):
        rows.append(("run directory", str(fields["run_dir"])))
    return rows


def span(first: int, last: int) -> str:
    """`3 to 5`, `3` or `none`: numbers from the first to the last."""
    return "none" if last < first else f"{first:,}" if last == first else f"{first:,} to {last:,}"


def lost_ranks(lost: Sequence[Fields]) -> str:
    """`rank 2 (node07), on from iteration 86; ...`: of many those that were lost last."""
    more = [f"{len(lost) - _RANKS_SHOWN} before"] if len(lost) > _RANKS_SHOWN else []
    for iteration, together in itertools.groupby(lost[-_RANKS_SHOWN:], key=lambda each: each["iteration"]):
        names = " and ".join(f"rank {each['rank']} ({each['host']})" for each in together)
        more.append(f"{names}, on from iteration {count(iteration + 1)}")
    return "; ".join(more)


GROUP_HEADERS = ("group", "epoch", "iterations", "samples", "rate", "partitions", "then")


def of_group(number: int, fields: Fields) -> tuple[str, ...]:
    """A row about one group as it was carried out.

    Args:
        number: of the group, over all runs.
        fields: a line of `plans.jsonl`.
    """
    done, first = fields["done"], fields["first_iteration"]
    starts, rates = fields["assignment"]["starts"], [rate[0] for rate in fields["learning_rates"][: max(done, 1)]]
    spans = fields["spans"][:done]
    counts = [stop - start for start, stop in itertools.pairwise(starts)]
    acts: dict[int, list[str]] = {}
    for at, (name,) in fields["acts"]:
        if name == "ONLY_AT_END":
            continue
        acts.setdefault(at, []).append(name.lower().replace("_", " "))
    for at, partitions in fields["drops"]:
        acts.setdefault(at, []).append(f"{len(partitions)} dropped")
    planned, last = first + len(fields["spans"]), first + done
    return (
        str(number),
        str(fields["epoch"] + 1),
        span(first + 1, last) + ("" if last == planned else f" of {planned}"),
        count(sum(stop - start for start, stop in spans)),
        f"{rates[0]:.4g}" + ("" if rates[-1] == rates[0] else f" to {rates[-1]:.4g}"),
        " ".join(map(str, counts)) if len(counts) <= _COUNTS_SHOWN else f"{min(counts)} to {max(counts)}",
        "; ".join(f"{at}: {', '.join(names)}" for at, names in sorted(acts.items())),
    )


def table(title: str, rows: Sequence[tuple[str, ...]], headers: Sequence[str] = ()) -> Table:
    """A rich table, ASCII only: logs are read with everything from `less` to a web page."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.ASCII2, show_header=bool(headers))
    for index in range(max(len(headers), len(rows[0]) if rows else 0)):
        made.add_column(headers[index] if headers else "", overflow="fold", no_wrap=index == 0 and not headers)
    for row in rows:
        # Texts, not markup: a path may hold square brackets.
        made.add_row(*[Text(cell) for cell in row])
    return made


def unframe(made: Table) -> None:
    """Leave a table its columns and one blank between them."""
    made.box, made.padding = None, (0, 1, 0, 0)


def least_width(made: Table, console: RichConsole) -> int:
    """Columns that a table needs so that no word is broken."""
    return Measurement.get(console, console.options.update(max_width=ANY_WIDTH), made).minimum


def number(value: int, noun: str) -> str:
    """`1 rank`, `4 ranks`."""
    return f"{count(value)} {noun}" + ("" if value == 1 else "s")


def _hosts(fields: Fields) -> str:
    hosts = list(dict.fromkeys(fields["hosts"]))
    names = ", ".join(hosts[:_RANKS_SHOWN]) + (", ..." if len(hosts) > _RANKS_SHOWN else "")
    return f"{number(fields['nodes'], 'node')} ({names})"


def _owners(ranges: Sequence[Sequence[int]]) -> str:
    """`rank 0: 0-1, rank 1: 2-3`, cut short where there are many ranks."""
    texts = []
    for rank, (start, stop) in enumerate(ranges):
        held = "none" if stop == start else str(start) if stop == start + 1 else f"{start}-{stop - 1}"
        texts.append(f"rank {rank}: {held}")
    if len(texts) > _RANKS_SHOWN:
        texts[_RANKS_SHOWN:] = [f"... {texts[-1]}"]
    return ", ".join(texts)


def _coordination(fields: Fields) -> str:
    """`0.42 % of the time; 21 groups of 1 to 23 iterations`."""
    smallest, largest = fields["group_sizes"]
    sizes = str(largest) if smallest == largest else f"{smallest} to {largest}"
    groups = f"{number(fields['groups'], 'group')} of {sizes} iteration{'' if largest == 1 else 's'}"
    return f"{100 * fields['coordination_share']:.2g} % of the time; {groups}"


def _software(fields: Fields) -> str:
    versions: dict[str, str] = fields.get("versions") or {}
    named = [f"{name} {version}" for name, version in versions.items()]
    # MPI_Get_library_version may be a page long; its first line names it.
    return ", ".join([*named, " ".join(str(fields["library"]).split("\n")[0].split())])
