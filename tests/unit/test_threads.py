"""Threads, cores and instruction sets of a rank."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from mpidl.runtime import threads
from tests.launch import run


@pytest.mark.parametrize(
    ("cores_of_all", "expected"),
    [
        ([[0, 1, 2, 3]], [4]),
        ([[0, 1]] * 2, [1, 1]),
        ([[0, 1]] * 4, [1, 1, 1, 1]),  # more ranks than cores: never none
        ([[0, 1, 2, 3, 4, 5, 6]] * 2, [3, 3]),
        ([[0, 1], [2, 3]], [2, 2]),  # bound to cores of their own
        ([[0], [1], [2], [3]], [1, 1, 1, 1]),
        ([[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]], [2, 2, 4]),
        ([[0]] * 4, [1, 1, 1, 1]),
    ],
)
def test_cores_are_divided_by_the_ranks_that_share_them(cores_of_all: list[list[int]], expected: list[int]) -> None:
    assert [threads.threads_for_rank(cores, cores_of_all) for cores in cores_of_all] == expected


@pytest.mark.parametrize(("setting", "expected"), [("3", 3), ("", 2), ("0", 2), ("all", 2), ("-4", 2)])
def test_omp_num_threads_counts_when_it_is_a_number(
    monkeypatch: pytest.MonkeyPatch, setting: str, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert threads.default_threads([0, 1, 2, 3], [[0, 1, 2, 3]] * 2) == expected


def test_without_omp_num_threads_the_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads.default_threads([0, 1, 2, 3], [[0, 1, 2, 3]] * 2) == 2


def test_the_own_cores_are_those_of_the_affinity() -> None:
    assert threads.own_cores() == sorted(os.sched_getaffinity(0))


def test_torch_gets_the_threads_when_it_is_loaded_and_when_it_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        threads.set_threads(2)
        assert torch.get_num_threads() == 2
        assert os.environ["OMP_NUM_THREADS"] == "2"
    finally:
        torch.set_num_threads(kept)


def test_equal_instruction_sets_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    before = dict(os.environ)
    assert threads.limit_instruction_set([2, 2, 2]) is None
    assert dict(os.environ) == before


@pytest.mark.parametrize("of_all", [[1, 2], [2, 1, 1], [2, 0, 1]])
def test_where_they_differ_every_rank_is_held_to_the_lowest(monkeypatch: pytest.MonkeyPatch, of_all: list[int]) -> None:
    # The rank that has the lowest too: by itself MKL computes in another mode than when it is told to use that set.
    monkeypatch.delitem(sys.modules, "torch")
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "to be restored")
    assert threads.limit_instruction_set(of_all) is None
    lowest = threads.INSTRUCTION_SETS[min(of_all)]
    assert os.environ["ATEN_CPU_CAPABILITY"] == lowest
    assert {"default": "SSE4_2", "avx2": "AVX2"}[lowest] == os.environ["MKL_CBWR"]
    assert {"default": "SSE41", "avx2": "AVX2"}[lowest] == os.environ["ONEDNN_MAX_CPU_ISA"]


def test_where_torch_is_loaded_already_a_warning_says_that_it_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "as it was")
    warning = threads.limit_instruction_set([2, 1])
    assert warning is not None
    assert "avx512" in warning
    assert "avx2" in warning
    assert "mpidl.init()" in warning
    assert os.environ["ATEN_CPU_CAPABILITY"] == "as it was"


@pytest.mark.launches
def test_torch_knows_the_instruction_set_s_name() -> None:
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    name = threads.INSTRUCTION_SETS[min(1, threads.instruction_set())]
    done = run([sys.executable, "-c", code], env={"ATEN_CPU_CAPABILITY": name}).check()
    assert done.stdout.strip().lower() == name
