"""Ctrl-C: the first one ends the iteration, keeps a checkpoint and says how to go on; the second ends at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.launch import ROOT, environment

TIMEOUT_S = 150.0


def start(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def test_an_interrupted_training_keeps_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    metrics = run_dir / "metrics.jsonl"
    with start(
        "-m", "mpidl", "train", "tests/cli/jobs/small.toml", "--epochs", "200", "--run-dir", str(run_dir)
    ) as job:
        try:
            wait_until(lambda: metrics.exists() and '"group"' in metrics.read_text(), job)
            job.send_signal(signal.SIGINT)
            out, errors = job.communicate(timeout=TIMEOUT_S)
        finally:
            job.kill()
    assert job.returncode == 75, out + errors
    assert errors.strip() == "mpidl: interrupted: stopping after this iteration; Ctrl-C again ends at once"
    flat = "".join(out.replace("|", " ").split())
    assert f"mpidltrain--resume{run_dir}" in flat
    assert any((run_dir / "checkpoints").iterdir())


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    code = (
        "import time; from mpidl.runtime import signals; signals.listen(); print('ready', flush=True); time.sleep(100)"
    )
    with start("-c", code + "; time.sleep(100)") as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() == "\n"
            assert "Ctrl-C again ends at once" in process.stderr.readline()
            assert process.poll() is None, "the first one only takes a note"
            process.send_signal(signal.SIGINT)
            assert process.wait(TIMEOUT_S) == -signal.SIGINT
        finally:
            process.kill()
