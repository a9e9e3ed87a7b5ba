"""Faults that are met by `jobs/faults.py` alone: each job fails, says so once, and leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, is_open_mpi, run

pytestmark = pytest.mark.thorough

CASES = [
    "an exception in the exchange's thread", "Ctrl-C", "SIGTERM to the launcher", "out of memory (`MemoryError`)",
    "a rank that leaves with `os._exit(3)`",
]  # fmt: skip


def test_each_fault_ends_the_job_cleanly(tmp_path: Path) -> None:
    launcher = f"{'openmpi' if is_open_mpi() else 'mpich'}={sys.prefix}"
    args = ["--patience", "8", "--launcher", launcher, "-o", str(tmp_path / "faults.md"), *CASES]
    run([sys.executable, ROOT / "jobs" / "faults.py", *args], timeout=400.0).check()
    table = (tmp_path / "faults.md").read_text()
    assert table.count("; `") == len(CASES), table
    assert "**" not in table
