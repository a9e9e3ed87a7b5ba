"""Cores, torch threads and instruction sets of a rank. No MPI here: the world gathers, this module decides."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence

INSTRUCTION_SETS = ("default", "avx2", "avx512")
_ENVIRONMENT = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_CBWR": "AVX512"},
}


def own_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def instruction_set() -> int:
    """This machine's instruction set as an index into INSTRUCTION_SETS."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return 0
    if " avx512f" in flags and " avx512vl" in flags:
        return 2
    return 1 if " avx2" in flags else 0


def limit_instruction_set(of_all: Sequence[int]) -> str | None:
    """Hold torch's libraries to the lowest instruction set of all ranks, where they differ.

    The ranks that have the lowest are held to it too: left alone, MKL computes there in a mode of its own choice.

    Args:
        of_all: `instruction_set()` of every rank.

    Returns:
        A warning when it is too late for that because torch is loaded already, else None.
    """
    lowest, highest = min(of_all), max(of_all)
    if lowest == highest:
        return None
    if "torch" in sys.modules:
        return (
            f"some machines have {INSTRUCTION_SETS[highest]}, others only {INSTRUCTION_SETS[lowest]}, and torch was "
            "imported before mpidl.init(): the bits may depend on who computes what; call mpidl.init() first"
        )
    os.environ.update(_ENVIRONMENT[INSTRUCTION_SETS[lowest]])
    return None


def threads_for_rank(cores: Sequence[int], cores_of_all: Sequence[Sequence[int]]) -> int:
    """The cores that this rank really has: its own ones divided by the ranks of the machine that share them.

    Args:
        cores: this rank's cores.
        cores_of_all: the cores of every rank of the same machine, this one included.
    """
    mine = set(cores)
    sharing = sum(1 for other in cores_of_all if mine & set(other))
    return max(1, len(mine) // max(1, sharing))


def crowd(cores_of_all: Sequence[Sequence[int]]) -> tuple[list[int], list[int]] | None:
    """The ranks of a machine that have fewer cores than they are, where there are such; of several crowds the densest.

    Ranks that may run on other cores as well are no part of a crowd: the system moves them away.

    Returns:
        Their positions and their cores; None: every rank can have a core of its own.
    """
    sets = [frozenset(cores) for cores in cores_of_all]
    crowds = []
    for cores in {*sets, frozenset().union(*sets)}:
        inside = [position for position, other in enumerate(sets) if other <= cores]
        if len(inside) > len(cores):
            crowds.append((inside, sorted(cores)))
    return max(crowds, key=lambda found: (len(found[0]) / max(1, len(found[1])), found[1]), default=None)


def default_threads(cores: Sequence[int], cores_of_all: Sequence[Sequence[int]]) -> int:
    """OMP_NUM_THREADS when the user set it, else the cores that this rank really has."""
    return asked_threads() or threads_for_rank(cores, cores_of_all)


def asked_threads() -> int | None:
    """OMP_NUM_THREADS; None where the user has not set it."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    return int(setting) if setting.isdigit() and int(setting) > 0 else None


def set_threads(num_threads: int) -> None:
    """Give torch (loaded now or later) this many threads."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(num_threads)
