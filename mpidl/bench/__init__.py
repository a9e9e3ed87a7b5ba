"""Benchmarks: ways to do the same thing side by side in one run, with the limit beside them.

`mpidl bench sync` measures an exchange without compute, `mpidl bench step` whole iterations, `mpidl bench kernels` the
sums of one rank, `mpidl bench plan` what it costs to tell ranks what to compute. The ranks of the run do all ways in
turn, repetition by repetition, so that all meet the same machine; before anything is timed they must give the same
results. `mpidl bench balance` trains with a slow rank, one run after the other.

Importing this package loads neither MPI nor torch.
"""

from __future__ import annotations

import argparse

from mpidl.bench.flags import add_benches

__all__ = ["add_benches", "run"]


def run(parsed: argparse.Namespace) -> None:
    """Run one benchmark and print, write and draw what it found. Collective."""
    from mpidl.bench import command

    command.run(parsed)
