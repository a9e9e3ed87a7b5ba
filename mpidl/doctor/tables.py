"""What `mpidl doctor` prints: rows of text for tables, and all of it as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from mpidl.doctor.facts import Facts, Link, Network
from mpidl.runtime.diagnosis import Finding

NODE_HEADERS = ("node", "host", "ranks", "cores", "cores a rank", "threads a rank", "shared memory free", "networks")
"""Of `describe_nodes`."""
LINK_HEADERS = ("between", "latency", "bandwidth", "by", "memory copy")
"""Of `describe_links`."""
_SHOWN = 8
"""Rows of a table; there are as many in the JSON as there are."""

_GPU = {"no GPU": "none", "unseen": "there, but torch does not see it", "yes": "MPI reads its memory (tried)",
        "no": "MPI does not read its memory (tried)"}  # fmt: skip
_LOST = {True: "told of, and survived (ULFM)", False: "end the job; mpirun --with-ft ulfm would tell of them",
         None: "end the job (no ULFM)"}  # fmt: skip


def describe(facts: Facts) -> list[tuple[str, str]]:
    """The facts about software and launch, as rows of name and text."""
    launched = "" if facts.launcher.size is None else f", {_counted(facts.launcher.size, 'process', 'processes')}"
    versions = [f"{name} {version or '(not installed)'}" for name, version in facts.versions.items()]
    rows = [
        ("versions", ", ".join(versions)),
        ("MPI packages", ", ".join(facts.mpi_packages) or "none: the site's own MPI"),
        ("MPI library", facts.library or "cannot be loaded"),
        ("mpirun", facts.mpirun or "none in PATH"),
        ("launcher", facts.launcher.name + launched),
        ("ranks", str(facts.num_ranks) if facts.thread_level else "MPI was not started"),
    ]
    if facts.thread_level:
        rows += [("MPI thread level", facts.thread_level), ("lost ranks", _LOST[facts.survives_lost_ranks])]
    if facts.ranks:
        rows.append(("GPU", _GPU[facts.ranks[0].gpu]))
        seen = [each.folder_s for each in facts.ranks.values() if each.folder_s is not None]
        if facts.thread_level and not facts.folder_reason and seen:
            by = _counted(len(seen), "rank", "ranks")
            rows.append(("folder", f"{facts.folder}, seen by {by} within {1e3 * max(seen):.0f} ms"))
    return rows


def describe_nodes(facts: Facts) -> list[tuple[str, ...]]:
    """One row a node, under `NODE_HEADERS`."""
    rows: list[tuple[str, ...]] = []
    for node in sorted({each.rank.node for each in facts.ranks.values()}):
        around = [each for each in facts.ranks.values() if each.rank.node == node]
        ranks = [each.rank for each in around]
        free = around[0].shared_memory_free
        rows.append(
            (
                str(node),
                ranks[0].hostname,
                str(len(ranks)),
                f"{len({core for rank in ranks for core in rank.cores})} of {ranks[0].num_machine_cores}",
                _from_to([len(rank.cores) for rank in ranks]),
                _from_to([rank.threads for rank in ranks]),
                "none" if free is None else f"{free / (1 << 30):.1f} GiB",
                ", ".join(_described(each) for each in around[0].networks if each.kind != "loopback") or "none",
            )
        )
    return _shortened(rows)


def describe_links(facts: Facts) -> list[tuple[str, ...]]:
    """One row a link, the slowest first, under `LINK_HEADERS`."""
    inside = sorted((link for link in facts.links if link.is_inside), key=lambda link: link.bytes_per_s)
    between = sorted((link for link in facts.links if not link.is_inside), key=lambda link: link.bytes_per_s)
    return _shortened([_row(facts, link) for link in between]) + _shortened([_row(facts, link) for link in inside])


def _row(facts: Facts, link: Link) -> tuple[str, ...]:
    hosts = [facts.ranks[rank].rank.hostname for rank in link.ranks]
    place = f"on {hosts[0]}" if link.is_inside else f"{hosts[0]}, {hosts[1]}"
    return (
        f"ranks {link.ranks[0]}, {link.ranks[1]} ({place})",
        f"{1e6 * link.latency_s:,.1f} µs",
        f"{link.bytes_per_s / 1e9:.2f} GB/s",
        link.device or ("memory" if link.is_inside else "memory or fabric"),
        f"{link.copy_bytes_per_s / 1e9:.2f} GB/s",
    )


def as_json(facts: Facts, findings: Sequence[Finding]) -> str:
    """The whole: facts, findings, and whether nothing is wrong."""
    is_sound = not any(finding.level == "error" for finding in findings)
    document = {
        "is_sound": is_sound,
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "facts": dataclasses.asdict(facts),
    }
    return json.dumps(document, indent=2)


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _described(network: Network) -> str:
    return f"{network.name} {network.gbit:g} Gbit/s" if network.gbit else network.name


def _shortened(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    if len(rows) <= _SHOWN:
        return rows
    return [*rows[:_SHOWN], (f"{len(rows) - _SHOWN} more", *("" for _ in rows[0][1:]))]


def _from_to(numbers: Sequence[int]) -> str:
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
