"""Which parts of a run `mpidl bench scaling` measures, and how well they scale. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from mpidl.bench.report import Row
from mpidl.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Size:
    """The first nodes of a run, or the first ranks of its only one."""

    nodes: int
    ranks: int
    samples: Mapping[str, int]
    """Of one iteration of all ranks, by mode."""

    def batches(self, mode: str) -> tuple[int, int]:
        """The fewest and the most samples that some rank has."""
        return self.samples[mode] // self.ranks, -(-self.samples[mode] // self.ranks)


def sizes_of(
    node_sizes: Sequence[int], modes: Sequence[str], batch: int, of_all: int, node_counts: Sequence[int] | None = None
) -> list[Size]:
    """1, 2, 4, ... and all nodes with all of their ranks; or ranks, where there is one node.

    Args:
        node_sizes: ranks of every node of the run.
        modes: "weak", "strong".
        batch: samples of each rank in weak scaling.
        of_all: samples of all ranks in strong scaling, on every size.
        node_counts: ascending; these numbers of nodes instead, a single one too.
    """
    by_node = node_counts is not None or len(node_sizes) > 1
    units = list(node_sizes) if by_node else [1] * node_sizes[0]
    doubled = [1 << power for power in range(len(units).bit_length()) if 1 << power < len(units)] + [len(units)]
    sizes = []
    for count in doubled if node_counts is None else node_counts:
        ranks = sum(units[:count])
        samples = {"weak": batch * ranks, "strong": of_all}
        sizes.append(Size(count if by_node else 1, ranks, {mode: samples[mode] for mode in modes}))
    return sizes


def cut(samples: int, num_ranks: int, rank: int) -> int:
    """How many of an iteration's samples a rank has: all the same, or one more or less."""
    return samples * (rank + 1) // num_ranks - samples * rank // num_ranks


def check_global_batch(samples: int | None, modes: Sequence[str], num_ranks: int) -> None:
    """See to it that every rank has something to do.

    Raises:
        ConfigError: fewer samples than ranks, or nobody wants to know.
    """
    if samples is None:
        return
    if "strong" not in modes:
        raise ConfigError("--global-batch is for strong scaling; add strong to --modes, or leave it out")
    if samples < num_ranks:
        raise ConfigError(
            f"{samples} sample(s) of --global-batch but {num_ranks} ranks; every rank needs at least one; raise it or "
            "lower -n"
        )


def check_node_counts(node_counts: Sequence[int] | None, num_nodes: int) -> None:
    """See to it that there are as many nodes.

    Raises:
        ConfigError: there are fewer.
    """
    if node_counts is not None and node_counts[-1] > num_nodes:
        raise ConfigError(f"--nodes {node_counts[-1]} but this run has {num_nodes} node(s); lower it or start on more")


def with_efficiency(rows: Iterable[Row], baseline: str) -> list[Row]:
    """The same rows with "efficiency" and "baseline".

    Efficiency is a rank's throughput to that of the baseline's way on the smallest size that was measured, in the same
    mode: of samples a second, how many are there of those that as many times the ranks should bring.
    """
    rows = list(rows)
    first: dict[str, Row] = {}
    for row in rows:
        before = first.get(row["case"])
        if row["way"] == baseline and (before is None or row["ranks"] < before["ranks"]):
            first[row["case"]] = row
    return [
        row | {"baseline": baseline, "efficiency": _of_a_rank(row) / _of_a_rank(first[row["case"]])} for row in rows
    ]


def _of_a_rank(row: Row) -> float:
    return float(row["samples_per_s"] / row["ranks"])
