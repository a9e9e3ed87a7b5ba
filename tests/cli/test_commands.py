"""The commands from end to end: what they print, what they write, and what they cost before they begin."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import mpidl
from mpidl import checkpoint
from mpidl import config as configuration
from tests.cli.processes import run_commands
from tests.launch import Completed, launch, run

MPIDL = [sys.executable, "-m", "mpidl"]
JOB = "tests/cli/jobs/small.toml"
HEAVY = ("torch", "mpi4py", "numba")
ESCAPE = "\x1b"


def mpidl_on(n: int, *args: str, **env: str) -> Completed:
    return launch(n, [*MPIDL, *args], env=env)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Completed]:
    """A run of three epochs, where the file says two, and what it printed."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    args = ["train", JOB, "--epochs", "3", "--lr", "0.05", "--optimizer-args", "{momentum = 0.8}"]
    return run_dir, mpidl_on(3, *args, "--run-dir", str(run_dir)).check()


# --- before anything starts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--version"], ["--help"], ["train", "--help"]], ids=" ".join)
def test_help_and_version_need_neither_mpi_nor_torch(args: list[str]) -> None:
    code = (
        "import sys\nimport mpidl.cli\n"
        f"try:\n    mpidl.cli.main({args})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"assert not set({HEAVY}) & set(sys.modules), sorted(sys.modules)\n"
    )
    alone = run([sys.executable, "-c", code]).check()
    assert alone.stdout.startswith("mpidl " if args == ["--version"] else "usage: mpidl")
    if args != ["train", "--help"]:
        together = mpidl_on(2, *args).check()
        assert together.stdout == alone.stdout, "once, from one rank"


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = (*HEAVY, "numpy", "rich")
    run([sys.executable, "-c", f"import sys, mpidl; assert not set({heavy}) & set(sys.modules)"]).check()


# --- train ------------------------------------------------------------------------------------------------------------


def test_a_run_directory_holds_configuration_events_checkpoints_and_weights(trained: tuple[Path, Completed]) -> None:
    run_dir, _ = trained
    found = sorted(path.name for path in run_dir.iterdir())
    assert found == ["FINISHED", "checkpoints", "config.toml", "metrics.jsonl", "plans.jsonl", "weights.safetensors"]
    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert checkpoints == ["epoch-000001", "epoch-000002", "epoch-000003"]
    kinds = [json.loads(line)["event"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    per_epoch = ["epoch", "validation"]  # a checkpoint is told when it is on disk
    assert [kind for kind in kinds[1:-1] if kind not in ("group", "balance", "checkpoint")] == 3 * per_epoch
    assert kinds.count("checkpoint") == 3
    for validation in events(run_dir, "validation"):
        assert 0 <= validation["accuracy"] <= 1
        assert validation["samples"] == 360
    assert [epoch["samples"] for epoch in events(run_dir, "epoch")] == 3 * [1437]


def test_the_resolved_configuration_is_defaults_then_file_then_flags(trained: tuple[Path, Completed]) -> None:
    run_dir, _ = trained
    resolved = tomllib.loads((run_dir / "config.toml").read_text())
    of_flags = {"epochs": 3, "lr": 0.05, "optimizer_args": {"momentum": 0.8}, "run_dir": str(run_dir)}
    of_file = {"batch_size": 64, "schedule": "cosine", "warmup_iterations": 4, "threads_per_rank": 1}
    of_defaults = {"seed": 0, "group_size": "auto", "reduction": "ordered", "validate_every": 1}
    expected = of_defaults | of_file | of_flags
    assert {name: resolved[name] for name in expected} == expected
    unset = {
        "data_dir",
        "clip_norm",
        "clip_value",
        "drop_budget_s",
        "end_when",
        "max_seconds",
        "keep_last",
        "keep_every",
        "on_event",
    }
    assert set(resolved) | unset == set(configuration.field_names())


def test_a_log_gets_plain_lines_of_at_most_100_columns(trained: tuple[Path, Completed]) -> None:
    run_dir, ended = trained
    assert ESCAPE not in ended.output
    assert "\r" not in ended.output
    lines = [line for line in ended.stdout.splitlines() if str(run_dir) not in line]
    assert max(map(len, lines)) <= 100
    start, _, rest = ended.stdout.partition("epoch 1/3  iteration 23")
    for derived in (
        "3 ranks on 1 node", "1 thread each", "rank 0: 0-", "64 samples an iteration", "38,282 parameters",
        "largest shard", "memory a rank", "1,437 training samples",
    ):  # fmt: skip
        assert derived in start, derived
    progress, _, result = rest.partition("\nresult")
    assert progress.count("validation  loss") == 3
    last = events(run_dir, "validation")[-1]
    assert f"{100 * last['accuracy']:.2f} %" in result
    assert ended.stderr == ""


def test_an_existing_run_is_not_replaced(trained: tuple[Path, Completed]) -> None:
    run_dir, _ = trained
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    ended = mpidl_on(2, "train", JOB, "--run-dir", str(run_dir))
    assert ended.returncode == 2, ended.output
    assert ended.stderr.count("mpidl: error: ") == 1
    assert f"{run_dir} holds a run already; continue that one with --resume {run_dir}" in ended.stderr
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_training_whose_time_is_up_leaves_with_75_and_its_resumption_ends_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stopped = mpidl_on(
        2, "train", "--data", "digits", "--epochs", "2", "--max-seconds", "0.01", "--run-dir", str(run_dir)
    )
    assert stopped.returncode == 75, stopped.output
    assert "the end of the job's time stopped all ranks after iteration" in stopped.stdout
    assert events(run_dir, "end")[-1]["status"] == "stopped"
    assert not (run_dir / "weights.safetensors").exists()
    mpidl_on(1, "train", "--resume", str(run_dir), "--max-seconds", "600").check()
    assert [epoch["samples"] for epoch in events(run_dir, "epoch")] == 2 * [1437]
    assert events(run_dir, "end")[-1]["status"] == "finished"


def test_a_run_s_plans_are_shown_and_repeated_to_the_bits(trained: tuple[Path, Completed], tmp_path: Path) -> None:
    run_dir, _ = trained
    shown = mpidl_on(2, "plan", "show", str(run_dir)).check()
    assert shown.stdout.count("validate") == 3, "once, from one rank"
    # The last column, with the lines of wrapped cells joined: long learning rates in groups cut short make it narrow.
    then = [line.split("|")[-2] for line in shown.stdout.splitlines() if line.count("|") > 2]
    assert "69: end epoch, validate" in " ".join(" ".join(then).split())
    again = tmp_path / "again"
    mpidl_on(3, "train", "--replay", str(run_dir), "--run-dir", str(again)).check()
    assert (again / "weights.safetensors").read_bytes() == (run_dir / "weights.safetensors").read_bytes()
    assert (again / "plans.jsonl").read_text() == (run_dir / "plans.jsonl").read_text()


# --- evaluate, export -------------------------------------------------------------------------------------------------


def test_evaluate_records_nothing_of_what_the_run_did(trained: tuple[Path, Completed], tmp_path: Path) -> None:
    run_dir = shutil.copytree(trained[0], tmp_path / "run")
    config = (run_dir / "config.toml").read_text()
    recording = config.replace("trace = 0", "trace = 2").replace("tensorboard = false", "tensorboard = true")
    assert recording.count("trace = 2") == recording.count("tensorboard = true") == 1
    (run_dir / "config.toml").write_text(recording)
    before = sorted(run_dir.rglob("*"))
    mpidl_on(1, "evaluate", str(run_dir)).check()
    assert sorted(run_dir.rglob("*")) == before


def test_evaluate_gives_the_validations_of_the_training(trained: tuple[Path, Completed], tmp_path: Path) -> None:
    run_dir, _ = trained
    of_first = str(run_dir / "checkpoints" / "epoch-000001")
    lines = {"last": ["evaluate", str(run_dir)], "first": ["evaluate", str(run_dir), "--weights", of_first]}
    validations = events(run_dir, "validation")
    assert validations[0]["accuracy"] != validations[-1]["accuracy"]
    for n in (1, 3):
        ended, _ = run_commands(n, tmp_path, lines)
        _, *tables = ended.stdout.split("mpidl evaluate")
        newest = str(checkpoint.list_checkpoints(run_dir)[-1][1])
        cases = ((newest, validations[-1]), (of_first, validations[0]))
        for table, (source, expected) in zip(tables, cases, strict=True):
            cells = [line.split("|")[1:3] for line in table.splitlines() if line.count("|") > 2]
            assert source in "".join(value.strip() for _, value in cells)
            rows = {name.strip(): value.strip() for name, value in cells}
            assert rows["loss"] == f"{expected['loss']:.5g}"
            assert rows["accuracy"] == f"{100 * expected['accuracy']:.2f} %"
            assert rows["samples"] == "360"


def test_exported_and_final_weights_load_in_plain_torch(trained: tuple[Path, Completed], tmp_path: Path) -> None:
    run_dir, _ = trained
    exported = tmp_path / "first.safetensors"
    ended = mpidl_on(2, "export", str(run_dir), "--checkpoint", "1", "--output", str(exported)).check()
    assert ended.stdout.count(str(exported)) == 1
    assert f" of {run_dir / 'checkpoints' / 'epoch-000001'} written to " in ended.stdout
    # The very layers of the digits' network, spelt out: nothing of mpidl is imported.
    code = f"""
import sys
import torch
from safetensors.torch import load_file
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten())
        self.classifier = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))

for path in {[str(exported), str(run_dir / "weights.safetensors")]}:
    Net().load_state_dict(load_file(path), strict=True)
assert "mpidl" not in sys.modules
"""
    run([sys.executable, "-c", code]).check()
    first, last = load_file(exported), load_file(run_dir / "weights.safetensors")
    newest = mpidl.load(run_dir)
    assert set(first) == set(last) == set(newest)
    assert all(newest[name].equal(last[name]) for name in last)
    assert not any(first[name].equal(last[name]) for name in last)


def test_what_is_not_there_is_named(trained: tuple[Path, Completed], tmp_path: Path) -> None:
    run_dir, _ = trained
    cases = {
        "no such epoch": (["export", str(run_dir), "--checkpoint", "7"], "checkpoints there: 1, 2, 3"),
        "no run to export": (["export", str(tmp_path)], "does not hold a checkpoint"),
        "no run to evaluate": (["evaluate", str(tmp_path)], "is not a run directory"),
        "no folder": (
            ["export", str(run_dir), "--output", "none/x"],
            "cannot write none/x: the folder none does not exist",
        ),
        "no such command": (["trian"], "did you mean train?"),
        "no command": ([], "COMMAND"),
        "no checkpoint": (["evaluate", str(run_dir), "--weights", str(tmp_path)], "does not hold a checkpoint"),
    }
    _, told = run_commands(1, tmp_path, {name: args for name, (args, _) in cases.items()})
    for name, (_, expected) in cases.items():
        codes, errors = told[name]
        assert codes == [4 if "checkpoint" in expected else 2], errors
        assert errors.count("mpidl: error: ") == 1
        assert expected in errors
        assert "Traceback" not in errors


# --- doctor -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 4], ids=["no launcher", "1 rank", "4 ranks"])
def test_doctor_finds_nothing_wrong_here(n: int) -> None:
    ended = mpidl_on(n, "doctor") if n else run([*MPIDL, "doctor"])
    ended.check()
    assert "problem: " not in ended.output
    assert ended.stdout.count("mpidl doctor") == 1
    for fact in ("MPI library", "mpirun", "shared memory free", "threads a rank", mpidl.__version__):
        assert fact in ended.stdout
    rows = [line for line in ended.stdout.splitlines() if line.startswith("| ranks")]
    assert rows == [] or str(max(n, 1)) in rows[0]
