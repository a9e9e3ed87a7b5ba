"""Claims about the command line before anything runs: parsing, help, version, and who prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpidl import cli
from mpidl.errors import ConfigError
from mpidl.runtime import without_launcher


@pytest.fixture(autouse=True)
def _without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite itself may run under mpirun."""
    for name in set(os.environ) - set(without_launcher()):
        monkeypatch.delenv(name)


def test_flags_become_typed_overrides() -> None:
    parsed = cli.parse(["train", "job.toml", "--batch-size", "32", "--optimizer-args", "{momentum = 0.9}"])
    assert (parsed.command, parsed.job) == ("train", "job.toml")
    assert parsed.overrides == {"batch_size": 32, "optimizer_args": {"momentum": 0.9}}


def test_evaluate_takes_few_flags_only() -> None:
    parsed = cli.parse(["evaluate", "runs/x", "--data-dir", "/data", "--weights", "w.safetensors"])
    assert (parsed.run_dir, parsed.weights, parsed.overrides["data_dir"]) == ("runs/x", "w.safetensors", "/data")
    with pytest.raises(ConfigError, match="unknown argument --epochs"):
        cli.parse(["evaluate", "runs/x", "--epochs", "3"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["train", "--batchsize", "3"], "unknown argument --batchsize; did you mean --batch-size"),
        (["train", "--epoch=3"], "unknown argument --epoch=3; did you mean --epochs"),
        (["train", "a.toml", "b.toml"], "unknown argument b.toml; see `mpidl train --help`"),
        (["train", "--lr"], "argument --lr: expected one argument; see `mpidl train --help`"),
        (["train", "--lr", "fast"], "--lr is 'fast', must be a number"),
        (["trian"], "COMMAND is 'trian', must be one of train, launch, "),
        (["trian"], "; did you mean train?"),
        (["bench", "sync", "--optimizer", "adm"], "--optimizer is 'adm', must be one of sgd, adam; did you mean adam?"),
        ([], "COMMAND"),
        (["evaluate"], "RUN_DIR"),
    ],
)
def test_a_mistake_is_told_in_words_with_exit_code_2(
    line: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("mpidl: error: ")
    assert message in told.err
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_prints(rank: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", str(rank))
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert bool(capsys.readouterr().out) == (rank == 0)


@pytest.mark.launches
@pytest.mark.parametrize("line", [["--version"], ["--help"], ["train", "--help"]])
def test_help_and_version_load_neither_torch_nor_mpi(line: list[str]) -> None:
    code = (
        "import sys\nfrom mpidl import cli\ntry:\n    cli.main(sys.argv[1:])\nfinally:\n"
        "    loaded = {'torch', 'numba', 'mpi4py.MPI', 'rich'} & set(sys.modules)\n    assert not loaded, loaded"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, *line], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "mpidl" in done.stdout


def test_resume_stands_alone(tmp_path: Path) -> None:
    for line in (["train", "x.toml", "--resume", "r"], ["train", "--resume", "r", "--run-dir", "s"]):
        with pytest.raises(ConfigError, match="leave out"):
            cli._training_config(cli.parse(line))
    with pytest.raises(ConfigError, match="is not a run directory: it has no"):
        cli._training_config(cli.parse(["train", "--resume", str(tmp_path)]))


def test_resume_reads_the_run_s_own_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('epochs = 7\nrun_dir = "elsewhere"\n')
    config = cli._training_config(cli.parse(["train", "--resume", str(tmp_path), "--lr", "0.5"]))
    assert (config.epochs, config.lr, config.run_dir) == (7, 0.5, str(tmp_path))
