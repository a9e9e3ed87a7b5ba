"""`mpidl bench` from end to end, in small: every way runs, the figures are written, mistakes are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpidl.bench import exchange_ways, horovod, kernels, step_ways
from tests.cli.processes import run_commands
from tests.launch import Completed

Told = dict[str, tuple[list[int], str]]

MISTAKES = {
    "way": (["sync", "--ways", "mpidl-ordred"], "unknown way 'mpidl-ordred'; did you mean mpidl-ordered"),
    "model": (["sync", "--model", "vgg"], "unknown model 'vgg'"),
    "step's model": (["step", "--model", "vgg"], "allowed are digits_cnn"),
    "earlier figures": (["plan", "--with", "no.json"], "--with no.json cannot be read"),
    "global batch": (["scaling", "--global-batch", "1"], "1 sample(s) of --global-batch but 2 ranks"),
    "folder": (["checkpoint", "--folder", "no/folder"], "no/folder/mpidl-bench-checkpoint cannot be made"),
    "file": (["kernels", "--json", "no/folder/x.json"], "there is no folder no/folder"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Completed, Told]:
    """One launch of all benchmarks, and of all mistakes."""
    folder = tmp_path_factory.mktemp("bench")
    few = ["--repeats", "2"]
    lines = {
        "sync": ["sync", *few, "--millions", "0.02", "--picture", str(folder / "sync.png")],
        "step": ["step", *few, "--model", "lenet5", "--batch", "4", "--iterations", "2", "--optimizer", "adam"],
        "kernels": ["kernels", *few, "--millions", "0.02"],
        "balance": ["balance", *few, "--partitions", "6"],
        "checkpoint": ["checkpoint", *few, "--millions", "0.02", "--folder", str(folder)],
        "plan": ["plan", *few, "--group-sizes", "1,5", "--partitions", "4", "--picture", str(folder / "plan.png")],
    }
    commands = {name: ["bench", *line, "--json", str(folder / f"{name}.json")] for name, line in lines.items()}
    mistakes = {name: ["bench", *line] for name, (line, _) in MISTAKES.items()}
    ended, told = run_commands(2, folder, commands | mistakes)
    return folder, ended, told


def document(measured: tuple[Path, Completed, Told], name: str) -> dict[str, Any]:
    folder, _, told = measured
    codes, errors = told[name]
    assert codes == [0, 0], errors
    assert errors == ""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    assert found["bench"] == name
    assert found["command"].startswith(f"mpirun -n 2 mpidl bench {name} ")
    assert found["machine"]["ranks"] == 2
    return found


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("sync", {"copy", *exchange_ways.WAYS} - set(horovod.unusable())),
        ("step", {step_ways.ALONE, step_ways.ONE, *step_ways.WAYS} - set(horovod.unusable())),
        ("kernels", {"copy", *kernels.WAYS}),
        ("balance", {"stay", "move"}),
    ],
)
def test_every_way_has_a_row_with_time_spread_and_limit(
    measured: tuple[Path, Completed, Told], name: str, ways: set[str]
) -> None:
    rows = document(measured, name)["rows"]
    timed = [row for row in rows if row["seconds"] is not None]
    assert {row["way"] for row in timed} == ways
    for row in timed:
        low, high = row["spread"]
        assert 0 < low <= row["seconds"] <= high
        assert row["limit_seconds"] > 0
        assert (row["ranks"], row["nodes"]) == (1 if row["way"] == step_ways.ONE else 2, 1)
    printed = measured[1].stdout
    assert printed.count(f"bench {name}") == 1, "once, from one rank"


def test_sync_tells_what_a_rank_keeps_of_vgg16(measured: tuple[Path, Completed, Told]) -> None:
    rows = document(measured, "sync")["rows"]
    kept = {row["way"]: row for row in rows if row["case"] == "kept by a rank: vgg16_32, adam"}
    assert set(kept) == set(exchange_ways.WAYS) - set(horovod.unusable())
    size = 4 * 14_991_946
    assert kept["ddp-gloo"]["bytes"] == 4 * size, "weights, gradients, two moments"
    assert kept["zero-gloo"]["bytes"] == 3 * size
    assert kept["mpidl-ordered"]["weights_bytes"] == pytest.approx(size / 2, rel=1e-3), "once on the node"
    assert kept["mpidl-ordered"]["state_bytes"] == pytest.approx(size, rel=1e-3), "half of two moments"
    for row in kept.values():
        assert row["measured_bytes"] == pytest.approx(row["bytes"], rel=0.15)


def test_step_tells_where_an_iteration_s_time_goes(measured: tuple[Path, Completed, Told]) -> None:
    rows = {row["way"]: row for row in document(measured, "step")["rows"]}
    alone = rows[step_ways.ALONE]
    for row in rows.values():
        samples = 4 if row["way"] == step_ways.ONE else 8
        assert row["samples_per_s"] == pytest.approx(samples / row["seconds"])
        assert row["exposed_seconds"] == pytest.approx(row["seconds"] - alone["seconds"])
        assert row["more_cpu_seconds"] == pytest.approx(row["cpu_seconds"] - alone["cpu_seconds"])
        assert set(row["phases"]) == set(step_ways.PHASES)
        assert row["phases"]["forward"] > 0
        assert row["phases"]["backward"] > 0
    assert rows["mpidl-ordered"]["phases"]["update"] > 0
    assert rows["mpidl-ordered"]["phases"]["wait"] > 0


def test_a_checkpoint_is_written_read_and_beside_its_limits(measured: tuple[Path, Completed, Told]) -> None:
    rows = document(measured, "checkpoint")["rows"]
    found = {(row["case"].split(":")[0], row["way"]) for row in rows}
    peers = {"torch.save", "torch-dcp", "torch-dcp-async"}
    assert {way for case, way in found if case == "written"} == {"dd", "plain-writes", "mpidl"} | peers
    assert {way for case, way in found if case == "pause"} == {"copy", "mpidl"} | peers
    assert {way for case, way in found if case == "read"} == {"dd", "plain-reads", "mpidl"}
    assert {row["bytes"] for row in rows} == {3 * 4 * 20_000}
    assert not (measured[0] / "mpidl-bench-checkpoint").exists()


def test_the_picture_is_drawn(measured: tuple[Path, Completed, Told]) -> None:
    assert (measured[0] / "sync.png").read_bytes().startswith(b"\x89PNG")


def test_plan_tells_the_calls_of_a_group(measured: tuple[Path, Completed, Told]) -> None:
    rows = document(measured, "plan")["rows"]
    calls = {row["group_size"]: row["calls_per_group"] for row in rows if row["way"] == "mpidl"}
    assert calls == {1: 2, 5: 2}
    printed = measured[1].stdout
    assert printed.count("bench plan: control of an iteration") == 1, "once, from one rank"
    assert "no model: it takes three numbers of ranks" in printed
    assert (measured[0] / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_once_before_anything_is_measured(measured: tuple[Path, Completed, Told], name: str) -> None:
    codes, errors = measured[2][name]
    assert codes == [2, 2], errors
    assert errors.count("mpidl: error: ") == 1
    assert MISTAKES[name][1] in errors
    assert "Traceback" not in errors
