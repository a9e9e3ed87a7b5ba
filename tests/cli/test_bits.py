"""The principle: the bits are a function of the partitions, whatever the ranks and nodes are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch import launch

SCRIPT = Path(__file__).parent / "jobs" / "bits.py"

Results = dict[str, dict[str, Any]]


# A loader worker on every rank takes as long to start as the rank: it is tried on some only.
JOBS = ["command", "noise", "adam"]
ALL_JOBS = [*JOBS, "noise_by_worker"]


def results(n: int, folder: Path, jobs: list[str], **env: str) -> tuple[Results, str]:
    """What the jobs gave on n ranks, and what was printed."""
    ended = launch(n, [sys.executable, SCRIPT, folder, *jobs], env=env).check()
    found: Results = json.loads((folder / "results.json").read_text())
    return found, ended.output


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results(1, tmp_path_factory.mktemp("one"), ALL_JOBS)[0]


def test_one_rank_learns(of_one_rank: Results) -> None:
    for name, result in of_one_rank.items():
        losses = [event["loss"] for event in result["numbers"] if event["event"] == "epoch"]
        assert losses[-1] < 0.9 * losses[0], name


def test_groups_and_loader_workers_change_no_number(of_one_rank: Results) -> None:
    first, second = (of_one_rank[name] for name in ("noise", "noise_by_worker"))
    assert (first["weights"], first["logits"]) == (second["weights"], second["logits"])
    assert first["numbers"][: len(second["numbers"])] == second["numbers"]


@pytest.mark.parametrize(
    ("n", "nodes", "jobs"),
    [
        (2, "", ["command"]), (3, "", ["command", "noise"]), (4, "", ["command", "noise"]), (5, "", ["noise"]),
        (4, "2", ALL_JOBS), (5, "3,2", JOBS),
    ],
    ids=["2 ranks", "3 ranks", "4 ranks", "5 ranks", "4 ranks on 2 nodes", "5 ranks on nodes of 3 and 2"],
)  # fmt: skip
def test_any_ranks_and_nodes_give_the_bits_of_one_rank(
    of_one_rank: Results, tmp_path: Path, n: int, nodes: str, jobs: list[str]
) -> None:
    found, _ = results(n, tmp_path, jobs, MPIDL_EMULATED_NODES=nodes)
    assert sorted(found) == sorted(jobs)
    for name, result in found.items():
        assert result == of_one_rank[name], name


def test_without_shared_memory_a_warning_says_the_cost_and_the_bits_stay(of_one_rank: Results, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    found, output = results(2, tmp_path, ["command"], MPIDL_SHM_DIR=str(missing))
    assert found["command"] == of_one_rank["command"]
    warnings = [line for line in output.splitlines() if "no shared memory" in line]
    assert len(warnings) == 1, output
    for part in (str(missing), "MiB more for weights", "--shm-size"):
        assert part in warnings[0]
