"""Claims about mpidl.telemetry: what is written, what is shown, and where it thinks it is shown."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpidl.runtime import without_launcher
from mpidl.telemetry import Console, Telemetry, tables
from mpidl.telemetry.terminal import Terminal, find_terminal
from tests import launch

START: dict[str, Any] = {
    "ranks": 4, "nodes": 1, "hosts": ["vm"] * 4, "threads_per_rank": 1, "partitions": 8,
    "partition_ranges": [[0, 2], [2, 4], [4, 6], [6, 8]], "batch_size": 64, "group_size": "auto",
    "parameters": 38282, "shard_size": 9600, "memory_per_rank_bytes": {"weights": 2048, "rows": 1024},
    "train_samples": 1437, "validation_samples": 360, "epochs": 3, "iterations_per_epoch": 23,
    "total_iterations": 69, "bits": "partitions", "reduction": "ordered", "seed": 0,
    "library": "MPICH Version:      5.0.2\nmore", "run_dir": "runs/[digits]", "first_iteration": 0,
    "versions": {"mpidl": "0.1.0"},
}  # fmt: skip
GROUP: dict[str, Any] = {
    "epoch": 1, "iteration": 5, "iterations": 5, "samples": 320, "loss": 2.25, "lr": 0.1, "seconds": 0.1,
    "samples_per_s": 3200.0, "group_size": 5, "phases": {}, "wait_s": 0.0, "slowest_rank": 1,
}  # fmt: skip
END: dict[str, Any] = {
    "status": "finished", "iterations": 69, "epochs": 3, "seconds": 75.0, "samples_per_s": 1000.0, "loss": 0.5,
    "validation": {"epoch": 3, "iteration": 69, "seconds": 0.1, "samples": 360, "loss": 0.25, "accuracy": 0.975},
    "weights": "runs/digits/weights.safetensors", "run_dir": "runs/digits", "message": "",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite itself may run under mpirun, and where there is no terminal."""
    for name in set(os.environ) - set(without_launcher()):
        monkeypatch.delenv(name)
    monkeypatch.setenv("TERM", "xterm")


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_event_is_one_json_line_that_is_there_at_once(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, quiet=True)
    telemetry.record("group", loss=np.float32(0.5), ranges=[(0, 2)], path=tmp_path, seen={1: np.int64(3)})
    written = read(tmp_path)[0]
    assert written.pop("time") > 1e9
    assert written == {
        "event": "group", "loss": 0.5, "ranges": [[0, 2]], "path": str(tmp_path), "seen": {"1": 3},
    }  # fmt: skip
    telemetry.close()
    telemetry.close()


def test_numbers_that_json_does_not_have_become_strings(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, quiet=True)
    telemetry.record("group", loss=float("nan"), best=[float("inf"), -float("inf")])
    telemetry.close()
    assert read(tmp_path)[0]["loss"] == "nan"
    assert read(tmp_path)[0]["best"] == ["inf", "-inf"]


def test_a_resumed_run_appends_and_drops_a_line_cut_short(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "start"}\n{"event": "gro')
    telemetry = Telemetry(tmp_path, quiet=True)
    telemetry.record("end")
    telemetry.close()
    assert [event["event"] for event in read(tmp_path)] == ["start", "end"]


def test_a_file_that_cannot_be_written_is_a_warning_once(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = Telemetry(Path("/proc/nowhere"))
    telemetry.record("checkpoint")
    telemetry.record("checkpoint")
    telemetry.close()
    assert capsys.readouterr().out.count("the run goes on without it") == 1


def test_no_run_directory_means_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    telemetry = Telemetry(None, quiet=True)
    telemetry.record("end")
    telemetry.close()
    assert not list(tmp_path.iterdir())


def test_a_log_gets_plain_ascii_lines_that_never_wrap(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    console = Console(clock=clock)
    console.show("start", START)
    console.show("epoch", {"epoch": 1, "iteration": 23, "loss": 0.5, "samples_per_s": 20311.4, "samples": 1437})
    console.show("validation", {"epoch": 1, "iteration": 23, "loss": 0.25, "accuracy": 0.975, "samples": 360})
    console.show("warning", {"message": "[bold] " + "x" * 200})
    console.show("end", END)
    console.close()
    out = capsys.readouterr().out
    assert out.isascii()
    assert "\x1b" not in out
    lines = out.splitlines()
    assert "epoch 1/3  iteration 23  0 samples  0.0 s  20,311 samples/s  loss 0.5000" in lines
    assert "epoch 1/3  validation  loss 0.25  accuracy 97.50 %" in lines
    assert "mpidl: warning: [bold] " + "x" * 200 in lines
    for text in ("4 ranks on 1 node (vm), 1 thread each", "rank 3: 6-7", "38,282 parameters", "runs/[digits]",
                 "3.0 KiB: weights 2.0 KiB, rows 1.0 KiB", "validation accuracy | 97.50 %"):  # fmt: skip
        assert text in out


def test_a_log_gets_a_line_every_ten_seconds_within_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    console = Console(clock=clock)
    console.show("start", START)
    capsys.readouterr()
    for second in range(1, 26):
        clock.now = float(second)
        console.show("group", {**GROUP, "iteration": 5 * second})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "epoch 1/3  iteration 50  3,200 samples  10.0 s  3,200 samples/s  loss 2.2500",
        "epoch 1/3  iteration 100  6,400 samples  20.0 s  3,200 samples/s  loss 2.2500",
    ]


def test_a_terminal_gets_a_bar_of_its_width(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = pty.openpty()
    clock = Clock()
    console = Console(Terminal(theirs), clock=clock)
    console.show("start", START)
    clock.now = 1.0
    console.show("group", GROUP)
    console.show("end", END)
    console.close()
    out = capsys.readouterr().out
    os.close(ours)
    os.close(theirs)
    assert "5/69" in out
    assert "loss 2.2500  3,200 samples/s" in out
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l"), "the cursor must be visible at the end"


def test_a_pipe_is_no_terminal_and_neither_is_a_launcher_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_terminal() is None
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    assert find_terminal() is None


@pytest.mark.launches
def test_under_mpirun_the_launcher_s_output_decides() -> None:
    code = "from mpidl.telemetry.terminal import find_terminal as f; t = f(); print('width', t and t.width())"
    command = [launch.mpirun(), "-n", "1", *(["--oversubscribe"] if launch.is_open_mpi() else [])]
    command += [sys.executable, "-c", code]
    assert "width None" in launch.run(command).check().stdout
    spawn = f"import os, pty; os.environ['TERM'] = 'xterm'; pty.spawn({command!r})"
    assert re.search(r"width \d+", launch.run([sys.executable, "-c", spawn]).check().stdout)


@pytest.mark.parametrize(
    ("number", "text"), [(5, "5"), (41200, "41,200"), (99.96, "100"), (0.1234, "0.123"), (1e6, "1,000,000")]
)
def test_counts_read_well(number: float, text: str) -> None:
    assert tables.count(number) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**50, "1024.0 TiB")])
def test_sizes_read_well(number: int, text: str) -> None:
    assert tables.size(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (61.2, "0:01:01")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert tables.duration(seconds) == text


def test_many_ranks_are_cut_short() -> None:
    ranges = [[rank, rank + 1] for rank in range(64)]
    fields = {**START, "ranks": 64, "partition_ranges": ranges, "hosts": [f"node{i}" for i in range(64)]}
    rows = dict(tables.of_start(fields))
    assert rows["partitions"].endswith("rank 5: 5, ... rank 63: 63")
    assert rows["ranks"].startswith("64 ranks on 1 node (node0, node1, node2, node3, node4, node5, ...)")


@pytest.mark.parametrize(
    ("groups", "sizes", "text"),
    [
        (21, [1, 23], "0.42 % of the time; 21 groups of 1 to 23 iterations"),
        (1, [1, 1], "0.42 % of the time; 1 group of 1 iteration"),
        (3, [5, 5], "0.42 % of the time; 3 groups of 5 iterations"),
    ],
)
def test_the_end_tells_the_share_of_coordination_and_the_groups(groups: int, sizes: list[int], text: str) -> None:
    fields = {**END, "groups": groups, "group_sizes": sizes, "coordination_s": 0.3, "coordination_share": 0.0042}
    assert dict(tables.of_end(fields))["coordination"] == text
    assert "coordination" not in dict(tables.of_end(END)), "nothing was run"


def test_a_failed_run_shows_its_message_and_a_resumed_one_where_it_began() -> None:
    failed = dict(
        tables.of_end({**END, "status": "failed", "message": "loss is nan", "validation": None, "loss": None})
    )
    assert failed["message"] == "loss is nan"
    assert dict(tables.of_start({**START, "first_iteration": 23}))["resumed"] == "after iteration 23 of 69"


def test_the_end_tells_the_shares_of_the_iterations_time_largest_first() -> None:
    found = dict(
        tables.of_end({**END, "phases": {"load": 0.05, "compute": 8.0, "wait": 1.0, "update": 0.0, "total": 10.0}})
    )
    assert found["iterations' time"] == "compute 80 %, wait 10 %, other 9.5 %, waiting for data 0.5 %"
