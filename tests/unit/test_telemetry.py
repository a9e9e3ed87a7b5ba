"""Claims about mpidl.telemetry: what is written, what is shown, and where it thinks it is shown."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console

from mpidl.errors import ConfigError
from mpidl.runtime import without_launcher
from mpidl.telemetry import Console, Telemetry, TensorBoard, check_progress, tables
from mpidl.telemetry.live import LiveView
from mpidl.telemetry.status import Status
from mpidl.telemetry.terminal import Terminal, find_terminal
from mpidl.telemetry.top import Follower, follow, picture, rank_rows
from mpidl.telemetry.views import PlainView
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
    "samples_per_s": 3200.0, "group_size": 5, "phases": {"load": 0.0, "compute": 0.08, "wait": 0.02}, "wait_s": 0.02,
    "slowest_rank": 1, "seconds_per_sample": [0.001, 0.002, 0.001, 0.001],
    "rank_phases": {"ranks": [0, 1, 2, 3], "load": [0.0] * 4, "compute": [0.07, 0.1, 0.07, 0.07], "wait": [0.03] * 4},
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
    console = PlainView(Console(), clock)
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
    assert all(line == line.rstrip() for line in lines)
    assert "epoch 1/3  iteration 23  1,437 samples  0.0 s  20,311 samples/s  loss 0.5000" in lines
    assert "epoch 1/3  validation  loss 0.25  accuracy 97.50 %" in lines
    assert "mpidl: warning: [bold] " + "x" * 200 in lines
    for text in ("4 ranks on 1 node (vm), 1 thread each", "rank 3: 6-7", "38,282 parameters", "runs/[digits]",
                 "3.0 KiB: weights 2.0 KiB, rows 1.0 KiB", "validation accuracy | 97.50 %"):  # fmt: skip
        assert text in out


def test_a_log_gets_a_line_every_ten_seconds_within_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    console = PlainView(Console(), clock)
    console.show("start", START)
    capsys.readouterr()
    for second in range(1, 26):
        clock.now = float(second)
        console.show("group", {**GROUP, "iteration": 5 * second})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "epoch 1/3  iteration 50  3,130 samples  10.0 s  3,200 samples/s  loss 2.2500",
        "epoch 1/3  iteration 100  6,260 samples  20.0 s  3,200 samples/s  loss 2.2500",
    ]


def test_the_lines_of_a_long_run_are_a_minute_apart(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    view = PlainView(Console(), clock)
    view.show("start", START)
    clock.now = 3600.0
    view.show("group", GROUP)
    capsys.readouterr()
    for second in range(3601, 3721):
        clock.now = float(second)
        view.show("group", GROUP)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_terminal_gets_a_live_view_of_its_width(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = pty.openpty()
    clock = Clock()
    console = LiveView(Console(Terminal(theirs)), clock)
    console.show("start", START)
    clock.now = 1.0
    console.show("group", GROUP)
    console.show("end", END)
    console.close()
    out = capsys.readouterr().out
    os.close(ours)
    os.close(theirs)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out)
    assert "epoch 1/3" in plain
    assert "5/69  7 %" in plain
    assert "loss 2.2500   lr 0.1   3,200 samples/s   elapsed 1.0 s   left 12.8 s" in plain
    assert "compute 80 %, wait 20 %" in plain
    assert "slowest: rank 1, 2.00 times the median's time a sample" in plain
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l"), "the cursor must be visible at the end"


def test_a_narrow_view_has_more_lines_and_loses_nothing(tmp_path: Path) -> None:
    phases = {"load": 0.1, "compute": 0.4, "wait": 0.2, "local_sum": 0.1, "update": 0.1, "allgather": 0.1}
    events = [("start", START), ("group", {**GROUP, "phases": phases, "rank_phases": {}}),
              ("validation", {"epoch": 0, "iteration": 5, "loss": 0.25, "accuracy": 0.975}),
              ("checkpoint", {"epoch": 0, "iteration": 5}),
              ("warning", {"message": "stopped after 5; go on with mpidl train --resume digits"})]  # fmt: skip
    write_events(tmp_path, *events)
    text = shown(tmp_path, 1003.0, 50)
    assert max(map(len, text.splitlines())) <= 50
    assert "…" not in text
    for piece in ("elapsed", "left", "allgather 10 %", "update 10 %", "accuracy 97.50 %", "checkpoint after 5"):
        assert piece in text, piece
    assert "go on with mpidl train --resume digits" in " ".join(text.split())


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_table_of_many_columns_breaks_no_word(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = ("node", "host", "ranks", "cores", "cores a rank", "threads a rank", "shared memory free", "networks")
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    console = Console()
    console.out.width = width - 1
    console.print_table("nodes", [("0", "vm", "2", "2 of 2", "1", "1", "23.5 GiB", "eth0")], headers)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) < width
    assert set(" ".join(headers).split()) <= set(re.findall(r"\w+", file.getvalue()))
    assert ("|" in file.getvalue()) == (width > 60)


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


def test_the_first_table_has_the_job_and_its_time_where_there_are_such() -> None:
    rows = dict(tables.of_start({**START, "slurm": "job 12 (train), restart 1", "seconds_left": 3723.0}))
    assert rows["Slurm"] == "job 12 (train), restart 1"
    assert rows["time left"] == "1:02:03; stops before that, with a checkpoint"
    assert not {"Slurm", "time left"} & set(dict(tables.of_start({**START, "slurm": None, "seconds_left": None})))


GOES_ON: dict[str, Any] = {
    **START, "ranks": 3, "goes_on": True, "elapsed_s": 30.0, "first_iteration": 8,
    "partition_ranges": [[0, 3], [3, 6], [6, 8]], "lost": [{"rank": 2, "host": "node07", "iteration": 8}],
}  # fmt: skip
RECOVERY = {"message": "rank 2 (node07) was lost; 3 ranks go on", "lost": GOES_ON["lost"]}


def test_the_lost_are_named_together_where_they_were_lost_together_and_of_many_the_last() -> None:
    before = [{"rank": 7, "host": "a", "iteration": 8}]
    lost = before + [{"rank": rank, "host": "b", "iteration": 20} for rank in (1, 2)]
    told = "rank 7 (a), on from iteration 9; rank 1 (b) and rank 2 (b), on from iteration 21"
    assert tables.lost_ranks(lost) == told
    assert tables.lost_ranks(before * 5 + lost).startswith("2 before; rank 7 (a) and rank 7 (a) and rank 7 (a)")


@pytest.mark.parametrize("is_new", [False, True], ids=["the same coordinator", "another coordinator"])
@pytest.mark.parametrize("kind", [PlainView, LiveView])
def test_a_loss_is_one_line_and_the_view_goes_on_without_another_first_table(
    kind: type[PlainView | LiveView], is_new: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    view = kind(Console(is_terminal=True))
    if not is_new:
        view.show("start", START)
        view.show("group", {**GROUP, "iteration": 9})
        capsys.readouterr()
    view.show("recovery", RECOVERY)
    view.show("start", GOES_ON)
    view.show("group", {**GROUP, "iteration": 10})
    view.show("end", {**END, "lost": GOES_ON["lost"]})
    told = capsys.readouterr().out
    assert "mpidl: rank 2 (node07) was lost; 3 ranks go on" in told
    assert "partitions" not in told
    assert "lost ranks" in told
    assert "rank 2 (node07), on from iteration 9" in " ".join(told.split())


def test_the_end_tells_the_shares_of_the_iterations_time_largest_first() -> None:
    found = dict(
        tables.of_end({**END, "phases": {"load": 0.05, "compute": 8.0, "wait": 1.0, "update": 0.0, "total": 10.0}})
    )
    assert found["iterations' time"] == "compute 80 %, wait 10 %, other 9.5 %, waiting for data 0.5 %"


# --- how it is shown --------------------------------------------------------------------------------------------------


def test_json_progress_prints_the_lines_of_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = Telemetry(tmp_path, progress="json")
    telemetry.record("group", loss=float("nan"), lr=0.5)
    telemetry.close()
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line | {"time": 0} for line in shown] == [line | {"time": 0} for line in read(tmp_path)]


def test_quiet_progress_leaves_warnings_on_standard_error_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = Telemetry(None, progress="quiet")
    for event, fields in (("start", START), ("group", GROUP), ("warning", {"message": "beware"}), ("end", END)):
        telemetry.record(event, **fields)
    telemetry.close()
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "mpidl: warning: beware\n")


def test_a_full_disk_is_told_once_and_closing_is_safe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr("mpidl.telemetry.events.open_for_append", lambda path: path.open("a"))
    telemetry = Telemetry(tmp_path, progress="plain")
    for _ in range(3):
        telemetry.record("checkpoint", path="x" * 100_000)
    telemetry.close()
    assert capsys.readouterr().out.count("cannot be written (No space left on device)") == 1


def test_a_log_on_a_full_disk_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Full:
        def show(self, event: str, fields: Any) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    telemetry = Telemetry(tmp_path)
    telemetry._view = Full()
    telemetry.record("group", loss=1.0)
    telemetry.record("end")
    telemetry.close()
    assert [line["event"] for line in read(tmp_path)] == ["group", "end"]
    assert capsys.readouterr().err.count("the run goes on unseen") == 1


def test_a_listener_gets_every_event_and_one_that_raises_is_not_called_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[str] = []

    def broken(event: str, fields: Any) -> None:
        raise ConnectionError("no server")

    telemetry = Telemetry(tmp_path, listeners=[broken, lambda event, fields: heard.append(event)])
    telemetry.record("summary", loss=1.0)
    telemetry.record("summary", loss=2.0)
    telemetry.close()
    assert heard == ["warning", "summary", "summary"]
    assert [line["event"] for line in read(tmp_path)] == ["summary", "warning", "summary"]
    assert "ConnectionError('no server')" in capsys.readouterr().out


def test_an_unknown_progress_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="'loud'; it must be one of auto, live, plain, quiet, json"):
        check_progress("loud")


@pytest.mark.parametrize("name", ["to_mlflow", "to_wandb"])
def test_the_documented_examples_send_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The services are stood in for; what matters is that events have what the examples take."""
    text = (launch.ROOT / "docs" / "seeing.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"def {name}(" in block]
    calls: list[tuple[str, dict[str, Any]]] = []

    def note(method: str) -> Any:
        return lambda *args, **options: calls.append(
            (method, args[0] if args and isinstance(args[0], dict) else options)
        )

    methods = ("start_run", "log_params", "log_metrics", "end_run", "init", "log", "finish")
    service = types.SimpleNamespace(**{method: note(method) for method in methods})
    monkeypatch.setitem(sys.modules, "mlflow", service)
    monkeypatch.setitem(sys.modules, "wandb", service)
    found: dict[str, Any] = {}
    exec(code, found)
    telemetry = Telemetry(None, quiet=True, listeners=[found[name]])
    for event, fields in (("start", START), ("group", GROUP), ("end", END)):
        telemetry.record(event, **fields)
    assert len(telemetry._listeners) == 1, "it raised"
    sent = dict(calls)
    assert sent["log_metrics" if name == "to_mlflow" else "log"]["group/loss"] == 2.25


def test_tensorboard_gets_scalars_phases_and_histograms(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry = Telemetry(None, quiet=True, listeners=[TensorBoard(tmp_path)])
    telemetry.record("start", **START)
    telemetry.record("group", **GROUP)
    telemetry.record("validation", iteration=5, epoch=1, loss=0.5, accuracy=0.75)
    weight = {"min": -1.0, "max": 1.0, "counts": [1, 0, 3]}
    telemetry.record("histograms", iteration=5, epoch=1, parameters={"conv.weight": weight})
    telemetry.record("end", **END)
    assert len(telemetry._listeners) == 1, "it raised"
    found = EventAccumulator(str(tmp_path)).Reload()
    assert found.Scalars("train/loss")[0].value == 2.25
    assert found.Scalars("train/lr")[0].step == 5
    assert found.Scalars("phases/compute")[0].value == pytest.approx(80)
    assert found.Scalars("validation/accuracy")[0].value == 0.75
    assert list(found.Histograms("conv.weight")[0].histogram_value.bucket) == [1, 0, 3]


# --- mpidl top --------------------------------------------------------------------------------------------------------

PLACES = [{"node": 0, "host": "node07", "cores": f"{2 * rank}-{2 * rank + 1}"} for rank in range(4)]


def write_events(folder: Path, *events: tuple[str, dict[str, Any]], began: float = 1000.0) -> None:
    lines = [{"event": event, "time": began + at, **fields} for at, (event, fields) in enumerate(events)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def shown(folder: Path, now: float, width: int = 140) -> str:
    console = rich.console.Console(width=width, file=io.StringIO(), record=True)
    console.print(picture(Follower(folder).read(), folder, now))
    return console.export_text()


def test_top_shows_progress_and_a_table_of_ranks_with_their_cores(tmp_path: Path) -> None:
    moved = {**GROUP, "iteration": 10, "partition_starts": [0, 3, 4, 6, 8]}
    validation = {"epoch": 1, "iteration": 5, "loss": 0.5, "accuracy": 0.75}
    events = [("start", {**START, "places": PLACES}), ("group", GROUP), ("validation", validation), ("group", moved)]
    write_events(tmp_path, *events)
    text = shown(tmp_path, 1003.0)
    assert "validation after 5: loss 0.5  accuracy 75.00 %\n" in re.sub(" +\n", "\n", text)
    assert "4 ranks on 1 node   runs" in text
    assert "epoch 1/3" in text
    assert "10/69" in text
    assert "slowest: rank 1 (node07), 2.00 times" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "node07 |" in line]
    assert rows[1] == ["1", "node07", "2-3", "1", "2.00", "100", "30"]
    assert rows[0][3] == "3"


def test_top_goes_on_with_those_that_are_left_and_names_the_lost(tmp_path: Path) -> None:
    write_events(tmp_path, ("start", START), ("group", GROUP), ("recovery", RECOVERY), ("start", GOES_ON), began=100.0)
    status = Follower(tmp_path).read()
    assert (status.iteration, status.started_at, status.counts) == (8, 73.0, [3, 3, 2])
    text = shown(tmp_path, 132.0)
    assert "3 ranks on 1 node" in text
    assert "lost: rank 2 (node07), on from iteration 9" in text


def test_top_says_what_a_run_without_news_may_be(tmp_path: Path) -> None:
    write_events(tmp_path, ("start", START), ("group", GROUP))
    assert "silent for 0:01:39: killed, hanging, or busy" in shown(tmp_path, 1100.0)
    (tmp_path / "STOP").touch()
    assert "asked to stop" in shown(tmp_path, 1100.0)
    write_events(tmp_path, ("end", {"status": "stopped"}), began=1101.0)
    assert "stopped" in shown(tmp_path, 1102.0)


def test_top_on_a_terminal_leaves_when_the_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setattr("mpidl.telemetry.console.find_terminal", lambda: Terminal(theirs))
    write_events(tmp_path, ("start", START), ("group", GROUP), ("end", END))
    follow(tmp_path, once=False)
    out = capsys.readouterr().out
    os.close(ours)
    os.close(theirs)
    assert "finished" in out
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l"), "the cursor must be visible at the end"


def test_top_reads_on_from_where_it_was_and_passes_over_damaged_lines(tmp_path: Path) -> None:
    write_events(tmp_path, ("start", START))
    follower = Follower(tmp_path)
    assert follower.read().iteration == 0
    line = json.dumps({"event": "group", "time": 1001.0, **GROUP})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "group"\n[1]\n{"event": "group", "time": 1}\n' + line[:40])
    assert follower.read().iteration == 0
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line[40:] + "\n")
    assert follower.read().iteration == 5


def test_of_many_ranks_top_shows_the_slowest() -> None:
    status = Status()
    ranks, seconds = list(range(64)), [1.0 + rank / 64 for rank in range(64)]
    status.apply("group", {**GROUP, "phases": {"load": 1.0}, "seconds_per_sample": [*seconds[:-1], "nan"],
                           "rank_phases": {"ranks": ranks, "load": seconds}}, 0.0)  # fmt: skip
    assert [row[0] for row in rank_rows(status)] == [str(rank) for rank in range(62, 46, -1)]


@pytest.mark.parametrize("width", [79, 200])
def test_top_breaks_no_word_at_80_columns(tmp_path: Path, width: int) -> None:
    names = ["load", "compute", "wait", "local_sum", "reduce_scatter", "update", "allgather"]
    group = {**GROUP, "phases": dict.fromkeys(names, 1.0),
             "rank_phases": {"ranks": [0, 1], **{name: [1.0, 2.0] for name in names}}}  # fmt: skip
    write_events(tmp_path, ("start", {**START, "places": PLACES}), ("group", group))
    text = shown(tmp_path, 1003.0, width)
    words = set(re.findall(r"\w+", text))
    assert {"rank", "host", "cores", "parts", "pace", "data", "compute", "wait", "local", "sum"} <= words
    assert {"reduce", "scatter", "update", "allgather"} <= words
    assert max(map(len, text.splitlines())) <= width


def test_top_on_a_narrow_terminal_goes_without_columns(tmp_path: Path) -> None:
    names = ["load", "compute", "wait", "local_sum", "update", "allgather"]
    group = {**GROUP, "phases": dict.fromkeys(names, 1.0),
             "rank_phases": {"ranks": [0, 1], **{name: [1.0, 2.0] for name in names}}}  # fmt: skip
    write_events(tmp_path, ("start", {**START, "places": PLACES}), ("group", group))
    text = shown(tmp_path, 1003.0, 59)
    assert max(map(len, text.splitlines())) <= 59
    assert {"rank", "host", "pace", "compute", "wait", "sum", "allgather"} <= set(re.findall(r"\w+", text))
    assert "cores" not in text


def test_top_names_what_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no is no run directory|does not exist: there is no metrics.jsonl"):
        Follower(tmp_path / "no")
    with pytest.raises(ConfigError, match="has not begun, or is no run directory"):
        Follower(tmp_path)


def test_the_time_left_follows_what_was_done_lately() -> None:
    status = Status()
    assert status.seconds_left(0.0) is None
    status.apply("start", {**START, "total_iterations": 1000}, 0.0)
    status.apply("group", {**GROUP, "iteration": 10}, 100.0)  # compiling
    for second in range(1, 91):
        status.apply("group", {**GROUP, "iteration": 10 + second}, 100.0 + second)
    assert status.seconds_left(190.0) == 900.0
    assert status.seconds_left(195.0) == 895.0


def test_samples_are_counted_as_everywhere_else() -> None:
    assert tables.measure("samples", 123456.0) == "123,456"
