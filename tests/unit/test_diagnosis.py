"""What is wrong with a job's ranks: the findings that trainings and `mpidl doctor` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpidl.runtime.diagnosis import RankFacts, of_ranks
from mpidl.runtime.shared_folder import make_mark
from mpidl.runtime.threads import crowd

VERSIONS = {"mpidl": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "MPI library": "MPICH Version: 5.0.2"}


def rank(hostname: str = "a", **changes: Any) -> RankFacts:
    sound: dict[str, Any] = {"cores": (0, 1), "num_machine_cores": 8, "threads": 1, "versions": VERSIONS}
    return RankFacts(hostname=hostname, node=0, **sound | changes)


def of(version: str, **others: str | None) -> RankFacts:
    return rank("b", cores=(2, 3), versions={**VERSIONS, "mpidl": version, **others})


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (of("0.2.0"), "mpidl is 0.2.0 on rank 1 (b), but 0.1.0 on rank 0 (a)"),
        (of("0.1.0", torch=None), "torch is missing on rank 1 (b), but 2.13.0 on rank 0 (a)"),
        (of("0.1.0", python="3.12.0"), "python is 3.12.0 on rank 1 (b), but 3.11.7 on rank 0 (a)"),
        (of("0.1.0", **{"MPI library": "MPICH Version: 4"}), "MPI library is MPICH Version: 4 on rank 1 (b), but"),
    ],
)
def test_ranks_of_different_versions_do_not_start(other: RankFacts, what: str) -> None:
    (finding,) = of_ranks([rank(), other])
    assert finding.what.startswith(what)
    assert finding.stops


def test_the_last_number_of_python_does_not_matter() -> None:
    assert of_ranks([rank(), of("0.1.0", python="3.11.9")]) == []


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        ([[0], [1]], None),
        ([[0, 1], [0, 1]], None),
        ([[0, 1]] * 3, ([0, 1, 2], [0, 1])),
        ([[0], [0], [1, 2], [3]], ([0, 1], [0])),
        ([[0], [0, 1], [0, 1, 2]], None),
        ([[0], [1], [0, 1], [2, 3, 4]], ([0, 1, 2], [0, 1])),
        ([[5]], None),
    ],
)
def test_a_crowd_has_more_ranks_than_cores(
    cores: list[list[int]], expected: tuple[list[int], list[int]] | None
) -> None:
    assert crowd(cores) == expected


def test_ranks_bound_to_one_core_among_others_are_named() -> None:
    bound = [rank(cores=(0,)), rank(cores=(0,)), rank(cores=(1, 2)), rank(cores=(3,))]
    (finding,) = of_ranks(bound)
    assert finding.what == "a: ranks 0 and 1 are bound to core 0, while all ranks there have 4 cores together"
    assert finding.level == "error"
    assert not finding.stops


def test_spinning_threads_are_wrong_only_where_cores_are_shared() -> None:
    assert of_ranks([rank(spinning="OMP_WAIT_POLICY=active")]) == []
    shared = of_ranks([rank(spinning="OMP_WAIT_POLICY=active")] * 3)
    assert [finding.fix for finding in shared if "spin on cores" in finding.what] == ["unset OMP_WAIT_POLICY"]


def test_a_file_is_seen_where_the_folder_is_shared_only(tmp_path: Path) -> None:
    mark = make_mark(tmp_path)
    seconds = mark.seen_after(0.0)
    assert seconds is not None
    assert 0 <= seconds < 5
    mark.remove()
    mark.remove()
    assert mark.seen_after(0.0) is None
    assert list(tmp_path.iterdir()) == []
    assert "cannot be written to: No such file" in make_mark(tmp_path / "nothing").reason
