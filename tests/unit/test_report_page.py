"""The page of `mpidl report`: what is read, counted, escaped and refused."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpidl import cli
from mpidl.errors import ConfigError
from mpidl.report_page import bench_charts, benches, html, page, scaling, series
from mpidl.report_page.runs import Run, read_run
from mpidl.runtime import faults, without_launcher
from tests.launch import run

START: dict[str, Any] = {
    "event": "start", "time": 1000.0, "ranks": 2, "nodes": 1, "hosts": ["vm"], "threads_per_rank": 1, "partitions": 4,
    "partition_ranges": [[0, 2], [2, 4]], "batch_size": 8, "group_size": "auto", "parameters": 100, "shard_size": 50,
    "memory_per_rank_bytes": {"weights": 400}, "train_samples": 32, "validation_samples": 8, "epochs": 4,
    "iterations_per_epoch": 4, "total_iterations": 16, "first_iteration": 0, "bits": "partitions",
    "reduction": "ordered", "seed": 0, "library": "MPI", "run_dir": "r", "versions": {},
}  # fmt: skip
END: dict[str, Any] = {
    "event": "end",
    "time": 1030.0,
    "status": "finished",
    "seconds": 30.0,
    "epochs": 4,
    "iterations": 16,
}


def group(iteration: int, time: float, **fields: Any) -> dict[str, Any]:
    return {
        "event": "group", "time": time, "iteration": iteration, "iterations": 4, "samples": 32, "loss": 2.0 / iteration,
        "seconds": 2.0, "group_size": 4, "phases": {"compute": 1.2, "wait": 0.4}, "seconds_per_sample": [0.1, 0.3],
    } | fields  # fmt: skip


def write_run(folder: Path, *events: dict[str, Any], rest: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + rest)
    return folder


def checkpoint(iteration: int, time: float) -> dict[str, Any]:
    return {"event": "checkpoint", "time": time, "iteration": iteration, "bytes": 1024, "seconds": 0.1}


@pytest.fixture
def resumed(tmp_path: Path) -> Run:
    """Killed behind iteration 12, of which the last four were computed again on three ranks, a day later."""
    three = {"ranks": 3, "partitions": 4, "partition_ranges": [[0, 2], [2, 3], [3, 4]], "first_iteration": 8}
    paces = {"seconds_per_sample": [0.1, 0.2, 0.1]}
    return read_run(write_run(
        tmp_path / "run", START, group(4, 1005), group(8, 1010), checkpoint(8, 1011), group(12, 1015, loss=99.0),
        {"event": "warning", "time": 87_000.0, "message": "before it starts"},
        START | three | {"time": 87_010.0}, group(12, 87_015, loss=0.25, **paces), group(16, 87_020, **paces),
        END | {"time": 87_021.0},
    ))  # fmt: skip


# --- runs -------------------------------------------------------------------------------------------------------------


def test_what_was_computed_again_counts_once_and_its_seconds_stay(resumed: Run) -> None:
    assert [found.iteration for found in resumed.groups] == [4, 8, 12, 16]
    assert resumed.groups[2].loss == 0.25
    assert [found.at_s for found in resumed.groups] == [5, 10, 20, 25]
    assert (resumed.seconds, resumed.resumed_at, resumed.status) == (26, [8], "finished")


def test_a_loss_that_the_others_survive_is_no_end(tmp_path: Path) -> None:
    fewer = {"ranks": 1, "partition_ranges": [[0, 4]], "first_iteration": 8, "goes_on": True, "time": 1013.0}
    lost = {"event": "recovery", "time": 1012.5, "iteration": 8, "message": "rank 1 (vm) was lost"}
    run = read_run(write_run(
        tmp_path / "run", START, group(8, 1010), lost, START | fewer, group(12, 1015), END | {"time": 1016.0},
    ))  # fmt: skip
    assert [event.kind for event in run.events] == ["start", "recovery", "goes on", "end"]
    assert run.events[1].text == "rank 1 (vm) was lost"
    assert [found.iteration for found in run.groups] == [8, 12]


def test_a_killed_launch_is_told_and_the_time_between_launches_is_not_counted(resumed: Run) -> None:
    told = [(event.at_s, event.iteration, event.kind) for event in resumed.events]
    assert told == [(0, 0, "start"), (11, 8, "checkpoint"), (15, 12, "warning"), (15, 12, "no end"), (15, 8, "resumed"),
                    (26, 16, "end")]  # fmt: skip


def test_partitions_follow_the_moves(tmp_path: Path) -> None:
    moved = group(8, 1010, partition_starts=[0, 3, 4])
    read = read_run(write_run(tmp_path, START, group(4, 1005), moved, group(12, 1015)))
    assert [found.counts for found in read.groups] == [(2, 2), (3, 1), (3, 1)]


@pytest.mark.parametrize("rest", ["", '{"event": "group", "ti', '{"event": "group"', "{"])
def test_a_run_that_goes_on_is_read_up_to_its_last_whole_line(tmp_path: Path, rest: str) -> None:
    read = read_run(write_run(tmp_path, START, group(4, 1005), rest=rest))
    assert ([found.iteration for found in read.groups], read.status) == ([4], "goes on, or was killed")


@pytest.mark.parametrize(
    "line",
    ["{", "3", '{"event": "group", "time": 1}', '{"event": "start", "time": 1}', '{"event": "end", "time": "soon"}',
     json.dumps(group(8, 1.0, phases=None)), json.dumps(group(8, 1.0, loss="low"))],
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    write_run(tmp_path, START, group(4, 1005), rest=f"{line}\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 3 is damaged, or was written by another version"):
        read_run(tmp_path)


def test_a_folder_that_tells_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run directory \(metrics\.jsonl: No such file"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="tells of no run yet"):
        read_run(write_run(tmp_path))
    (write_run(tmp_path, START) / "config.toml").write_text("epochs = = 3")
    with pytest.raises(ConfigError, match=r"config\.toml cannot be read: "):
        read_run(tmp_path)


def test_losses_that_are_not_numbers_are_kept(tmp_path: Path) -> None:
    read = read_run(write_run(tmp_path, START, group(4, 1005, loss="nan", seconds_per_sample=["nan", "nan"])))
    assert np.isnan(read.groups[0].loss)
    assert series.rank_paces(read) == []


# --- series -----------------------------------------------------------------------------------------------------------


def test_bins_keep_order_and_totals_and_never_join_launches_on_other_ranks(resumed: Run) -> None:
    assert [len(each) for each in series.bins(resumed.groups)] == [1, 1, 1, 1]
    binned = series.bins(resumed.groups, 1)
    assert [[found.iteration for found in each] for each in binned] == [[4, 8], [12, 16]]
    assert series.edges(binned).tolist() == [0, 8, 16]
    assert series.throughputs(binned).tolist() == [16, 16]
    assert np.allclose(series.losses(binned), [0.375, 0.1875])
    assert series.counts(binned).tolist()[1:] == [[2, 1], [pytest.approx(np.nan, nan_ok=True), 1]]


def test_phases_add_up_to_the_iteration(resumed: Run) -> None:
    found = series.phases(series.bins(resumed.groups))
    assert list(found) == ["compute", "wait", "other"]
    assert np.allclose(sum(found.values()), 0.5)
    assert np.allclose(found["other"], 0.1)


def test_the_slow_rank_is_found_by_the_median_rank(resumed: Run) -> None:
    paces = series.rank_paces(resumed)
    assert [pace.is_slow for pace in paces] == [False, True, False]
    assert (paces[1].times_median, paces[1].share_slowest, paces[1].counts) == (2.0, 1.0, (1, 1))
    table = series.times_median(series.paces(series.bins(resumed.groups)))
    assert np.allclose(table[:, -1], [1, 2, 1])


# --- benchmarks -------------------------------------------------------------------------------------------------------


def row(way: str, ranks: int, throughput: float, **fields: Any) -> dict[str, Any]:
    base = {
        "case": "weak",
        "model": "net",
        "batch": 8,
        "nodes": ranks,
        "spread": None,
        "limit_seconds": None,
        "bytes": 1.0,
    }
    return base | {"way": way, "ranks": ranks, "seconds": 1.0, "samples_per_s": throughput} | fields


def write_bench(path: Path, rows: list[dict[str, Any]], kind: str = "scaling") -> Path:
    path.write_text(json.dumps({"bench": kind, "machine": {}, "command": "mpidl bench", "rows": rows}))
    return path


def test_efficiency_is_a_rank_s_throughput_by_the_main_way_s_at_its_smallest_size() -> None:
    rows = [row("driver", 2, 9.0), row("mpidl-ordered", 2, 10.0), row("driver", 8, 12.0), row("mpidl-ordered", 8, 36.0)]
    (found,) = scaling.scalings(rows)
    assert (found.case, found.unit, found.main) == ("weak scaling, net, batch 8 a rank", "nodes", "mpidl-ordered")
    assert [size.efficiency for size in found.ways["mpidl-ordered"]] == [1.0, 0.9]
    assert [size.efficiency for size in found.ways["driver"]] == pytest.approx([0.9, 0.3])
    assert scaling.efficiencies(found).rows == [["2", "2", "90.0", "100.0"], ["8", "8", "30.0", "90.0"]]
    assert scaling.proposal(found).rows[1] == ["8", "8", "1,000", "36", "3.60", "4.00", "90.0"]


def test_a_simulation_s_own_efficiency_at_its_smallest_size_counts() -> None:
    rows = [row("ordered", 16, 8.0, efficiency=0.8), row("ordered", 64, 16.0, efficiency=0.4), row("ordered", 64, 12.0)]
    (found,) = scaling.scalings(rows)
    assert [size.efficiency for size in found.ways["ordered"]] == pytest.approx([0.8, 0.4])  # of two, the faster


def test_one_size_is_no_scaling() -> None:
    assert (
        scaling.scalings([row("mpidl", 2, 1.0), row("driver", 2, 1.0), {**row("x", 4, 1.0), "samples_per_s": None}])
        == []
    )


def test_a_table_has_a_column_for_each_figure_that_there_is(tmp_path: Path) -> None:
    rows = [
        {**row("mpidl", 2, 12.5), "case": "c", "seconds": 0.25},
        {**row("other", 2, 5.0), "case": "c", "seconds": None},
    ]
    (table,) = benches.tables(benches.read_bench(write_bench(tmp_path / "b.json", rows)))
    assert table.headers == ["way", "nodes", "ranks", "ms", "samples/s", "MiB"]
    assert [cells[3] for cells in table.rows] == ["250", "-"]


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"rows": []}', '{"bench": "x", "machine": {}, "command": "", "rows": [{"case": "c"}]}',
             '{"bench": "x", "machine": {}, "command": "", "rows": [{"case": "c", "way": "w", "seconds": "long"}]}']
)  # fmt: skip
def test_a_file_that_is_no_bench_s_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json (is no file that mpidl bench --json wrote|cannot be read)"):
        benches.read_bench(tmp_path / "other.json")


# --- the page ---------------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert('$\\frac{1}{0}$ & \"quotes\"')</script>"


class Parsed(HTMLParser):
    """A page's elements, in order, and what stands in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_cells_are_escaped_and_numbers_stand_right() -> None:
    made = html.table(["a", "b"], [[HOSTILE, "1,234.5"], ["x", "12 %"]], HOSTILE)
    found = Parsed(made)
    assert "script" not in found.tags
    assert found.text.count(HOSTILE) == 2
    assert made.count('class="n"') == 3
    assert html.table(["a"], []) == ""


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[list[Run], list[benches.Bench]]:
    """A run and a benchmark whose every text tries to break out, and a run without a group."""
    name = HOSTILE.replace("/", "|")
    warning = {"event": "warning", "time": 1006.0, "message": HOSTILE}
    validation = {"event": "validation", "time": 1007.0, "iteration": 8, "loss": 0.5, HOSTILE: 1.0}
    events = [START | {"hosts": [HOSTILE], "library": HOSTILE}, group(4, 1005), group(8, 1006), warning, validation]
    first = read_run(write_run(tmp_path / name, *events))
    second = read_run(write_run(tmp_path / "_empty", START))
    rows = [row(way, ranks, 1.0, case=HOSTILE) for way in (HOSTILE, "mpidl") for ranks in (1, 2)]
    return [first, second], [benches.read_bench(write_bench(tmp_path / f"{name}.json", rows))]


def test_a_page_is_whole_escaped_and_loads_nothing(hostile: tuple[list[Run], list[benches.Bench]]) -> None:
    text = page.build(*hostile)
    found = Parsed(text)
    assert not {"script", "link", "iframe", "object"} & found.tags
    assert found.text.count(HOSTILE) >= 5
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in found.links)
    assert not re.search(r"https?:|url\(|@import", text)
    for link in found.links:
        if link.startswith("data:"):
            drawn = base64.b64decode(link.partition(",")[2]).decode()
            assert not re.search(r"""href=["']\s*(?!#|data:)""", drawn)
            assert "<script" not in drawn
    assert "No group has ended yet." in found.text


def test_ways_are_bars_also_where_one_of_them_is_one_process(tmp_path: Path) -> None:
    rows = [row("compute alone", 2, 1.0), row("one process", 1, 0.9), row("mpidl", 2, 1.1)]
    bench = benches.read_bench(
        write_bench(tmp_path / "step.json", [each | {"phases": {"forward": 0.5}} for each in rows])
    )
    assert [chart.name for chart in bench_charts.of_bench("step", bench)] == ["step-1", "step-1-phases"]


def test_ranks_of_many_are_drawn_as_a_map(tmp_path: Path) -> None:
    ranges = {"ranks": 40, "partitions": 40, "partition_ranges": [[rank, rank + 1] for rank in range(40)]}
    paces = {"seconds_per_sample": [0.1] * 39 + [0.2]}
    read = read_run(write_run(tmp_path / "many", START | ranges, group(4, 1005, **paces), group(8, 1010, **paces), END))
    found = Parsed(page.build([read], [], tmp_path))
    assert "39, slow" in found.text
    assert "the 16 slowest of 40" in found.text
    assert (tmp_path / "run-1-many-ranks.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_the_same_name_are_told_apart() -> None:
    assert page.names_of([Path("a/run")]) == ["run"]
    assert page.names_of([Path("a/run"), Path("b/run"), Path("c/other")]) == ["1. a/run", "2. b/run", "3. other"]


def test_settings_that_differ_are_compared(tmp_path: Path) -> None:
    runs = []
    for name, rate in (("a", 0.1), ("b", 0.2)):
        folder = write_run(tmp_path / name, START)
        (folder / "config.toml").write_text(f'lr = {rate}\nepochs = 3\nrun_dir = "{name}"\n')
        runs.append(read_run(folder))
    assert page.differences(["a", "b"], runs).rows == [["lr", "0.1", "0.2"]]


def test_checkpoints_in_a_row_are_one_line_and_many_events_are_cut(tmp_path: Path) -> None:
    saved = [checkpoint(4, 1001), checkpoint(8, 1002), checkpoint(12, 1003)]
    _, row_, _ = page.happened(read_run(write_run(tmp_path, START, *saved))).rows
    assert row_ == ["1.0 s", "4 to 12", "checkpoint", "3 of them; the last: 1.0 KiB, 0.1 s"]
    warned = [{"event": "warning", "time": 1001.0, "message": f"w{number}"} for number in range(100)]
    rows = page.happened(read_run(write_run(tmp_path, START, *warned))).rows
    assert (len(rows), rows[30][3]) == (61, "42 more")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing does not exist; give run directories and files"),
        (["."], "is not a run directory"),
        (["run", "--output", "metrics.jsonl"], "--output metrics.jsonl: the name must end in .html"),
        (["run", "--output", "no/report.html"], "there is no folder no; make it first"),
        (["run", "--png", "no/pictures"], "no/pictures cannot be written: No such file"),
        ([], "RUN_DIR|BENCH.json"),
    ],
)
def test_bad_arguments_get_one_message_and_write_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(faults, "_job", None)  # the suite itself may be a job, under mpirun
    for name in set(os.environ) - set(without_launcher()):
        monkeypatch.delenv(name)
    write_run(tmp_path / "run", START)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("mpidl: error: ")
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.launches
def test_a_report_is_written_without_mpi_torch_and_numba(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", START, group(4, 1005), END)
    bench = write_bench(tmp_path / "scaling.json", [row("mpidl", 1, 1.0), row("mpidl", 2, 1.9)])
    arguments = [
        "report",
        str(folder),
        str(bench),
        "--output",
        str(tmp_path / "page.html"),
        "--png",
        str(tmp_path / "png"),
    ]
    code = (
        f"import sys\nfrom mpidl import cli\nassert cli.main({arguments}) == 0\n"
        "loaded = {'torch', 'numba', 'mpi4py'} & set(sys.modules)\nassert not loaded, loaded"
    )
    told = run([sys.executable, "-c", code]).check().stdout
    assert told.startswith("report on 1 run and 1 benchmark file written to ")
    assert "weak scaling, net" in Parsed((tmp_path / "page.html").read_text()).text
    assert {"loss-iterations.png", "throughput.png", "scaling-1.png"} <= {
        path.name for path in (tmp_path / "png").iterdir()
    }
