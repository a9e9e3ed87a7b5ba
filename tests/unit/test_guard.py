"""What a rank's guard prints when the rank has ended."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.launch import run

RANK = "import os, sys; from mpidl import guard; guard.begin(); guard.tell(rank=1); {told}; os._exit({code})"


@pytest.mark.skipif(sys.platform != "linux", reason="guards are there on Linux only")
@pytest.mark.parametrize(
    ("told", "code", "is_printed"),
    [
        ("guard.tell(size=3, run_dir=sys.argv[1])", 3, True),
        ("guard.tell(size=3, has_said=1)", 3, False),
        ("guard.tell(size=3)", 0, False),
        ("guard.tell()", 2, False),
        ("guard.tell(size=3, is_standby=True)", 3, False),
        ("guard.tell(size=3, run_dir=sys.argv[1], is_standby=True); guard.tell(is_standby=False)", 3, True),
    ],
    ids=["without a word", "said why", "in peace", "before there were ranks", "standing by", "no more"],
)
def test_a_rank_that_leaves_with_an_error_and_does_not_say_why_is_named(
    told: str, code: int, is_printed: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").touch()
    env = {name: "" for name in os.environ if name.startswith("OMPI_MCA_mpi_ft")} | {"PMI_RANK": "1"}
    ended = run([sys.executable, "-c", RANK.format(told=told, code=code), str(tmp_path)], env=env)
    assert ended.returncode == code, ended.output
    resume = f"mpidl train --resume {tmp_path} goes on from the newest checkpoint"
    expected = f"left with code 3 and did not say why; {resume}"
    assert ended.stderr.count(expected) == is_printed, ended.output
    assert ended.stderr.count("\n") == is_printed, ended.output
    if is_printed:
        assert ended.stderr.startswith("mpidl: error: rank 1 of 3 was lost: process "), ended.output
