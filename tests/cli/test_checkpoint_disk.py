"""Checkpoints and what happens to disks and processes: full, read-only, killed."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from mpidl.checkpoint import list_checkpoints, load_weights
from tests.launch import ROOT, is_open_mpi, mpirun, run

COMMANDS = Path(__file__).parent / "jobs" / "commands.py"
SMALL = ["train", "--batch-size", "64", "--epochs", "1", "--checkpoint-every", "iterations(1)", "--validate-every", "0"]
# Two folders for the duration of one job: one of a few checkpoints' size, one that cannot be written.
MOUNTED = """
mount -t tmpfs -o size=900k none "$1/small" && mount -t tmpfs -o ro none "$1/read-only" || exit 77
folder=$1; shift
"$@"; code=$?
cp -r "$folder/small/run" "$folder/copy"
exit $code
"""


def why_not() -> str:
    """Why nothing can be mounted here; "" where it can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    return run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], timeout=30.0).stderr.strip()


@pytest.mark.skipif(why_not() != "", reason="nothing can be mounted here")
def test_a_full_disk_and_a_read_only_one_are_told(tmp_path: Path) -> None:
    for name in ("small", "read-only"):
        (tmp_path / name).mkdir()
    lines = {name: [*SMALL, "--run-dir", str(tmp_path / name / "run")] for name in ("small", "read-only")}
    (tmp_path / "commands.json").write_text(json.dumps(lines))
    options = ["--oversubscribe"] if is_open_mpi() else []
    job: list[str | Path] = [mpirun(), "-n", "2", *options, sys.executable, COMMANDS, tmp_path / "commands.json"]
    ended = run(["unshare", "--mount", "sh", "-c", MOUNTED, "sh", tmp_path, *job], timeout=240.0).check()
    assert re.findall(r"=== codes (.*)", ended.stderr) == ["[4, 4]", "[2, 2]"], ended.output
    full, read_only = re.split(r"=== read-only", ended.stderr)
    assert ended.stdout.count("CHECKPOINT NOT WRITTEN: cannot write") > 1, "training goes on after the first"
    assert "No space left on device" in ended.stdout
    assert full.count("mpidl: error: ") == 1
    assert "No space left on device" in full
    assert "cannot write the run directory" in read_only
    assert "Read-only file system" in read_only
    found = list_checkpoints(tmp_path / "copy")
    assert found
    for _, path in found:
        load_weights(path)


@pytest.mark.thorough
def test_kills_at_random_moments_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    launcher = f"{mpirun()}{' --oversubscribe' if is_open_mpi() else ''}"
    args = ["--kills", "2", "--seed", "4", "--mpirun", launcher]
    ended = run([sys.executable, ROOT / "jobs" / "soak.py", *args], timeout=400.0, env={"TMPDIR": str(tmp_path)})
    ended.check()
    assert ended.stdout.count("is whole") == 2
    assert "the weights are those of an undisturbed run" in ended.stdout
    assert [path for path in tmp_path.iterdir() if "torchinductor" not in path.name] == [], "torch's own folder stays"
