"""The test run itself: what a failing, hanging or dying rank does to it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, Completed, launch, run


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """An empty suite with this suite's conftest."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "conftest.py")
    return tmp_path


def pytest_on(n: int, suite: Path, code: str, *options: str, timeout_s: float = 60.0) -> Completed:
    """Run one test module on n ranks; 0 is plain pytest."""
    (suite / "test_it.py").write_text(f"import os, time\nimport pytest\nimport mpidl.runtime\n{code}")
    config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(suite), "-p", "no:cacheprovider"]
    args: list[str | Path] = [sys.executable, "-m", "pytest", *config, suite, *options]
    env = {"MPIDL_TEST_TIMEOUT": f"{timeout_s:g}"}
    return launch(n, args, env=env) if n else run(args, env=env)


def test_ranks_that_agree_end_in_one_summary(suite: Path) -> None:
    code = "def test_a(world): assert world.size == 3\ndef test_b(): pass\n"
    ended = pytest_on(3, suite, code, f"--junitxml={suite}/report.xml").check()
    assert ended.stdout.count("2 passed") == 1
    assert ended.stdout.count("test session starts") == 1
    assert 'tests="2"' in (suite / "report.xml").read_text()


@pytest.mark.parametrize("failing", ["== 1", ">= 1"], ids=["one fails", "two fail"])
@pytest.mark.parametrize("others", ["pass", "world.barrier()"], ids=["the rest end", "the rest wait"])
def test_a_failure_of_some_ranks_is_reported_once_and_ends_all(suite: Path, others: str, failing: str) -> None:
    code = f"""
def test_first(world):
    if world.rank {failing}:
        print("printed by", world.rank)
        raise ValueError("only" + " here")
    {others}

def test_second():
    pytest.exit("never" + " run")
"""
    ended = pytest_on(3, suite, code)
    assert ended.returncode != 0
    assert ended.seconds < 40.0
    assert ended.output.count("ValueError: only here") == 1, ended.output
    assert ended.output.count("printed by 1") == 1, ended.output
    assert "rank 1 of 3" in ended.output
    assert "never run" not in ended.output


def test_the_lowest_of_the_ranks_that_failed_reports(suite: Path) -> None:
    code = "def test_all(world): assert world.rank == -1\n"
    ended = pytest_on(3, suite, code)
    assert ended.returncode == 1, ended.output
    assert "rank 0 of 3 (3 failed)" in ended.stdout
    assert "assert 0 == -1" in ended.stdout
    assert "assert 1 == -1" not in ended.output
    assert ended.stdout.count("1 failed") == 1


def test_a_failing_setup_on_one_rank_keeps_the_others_from_the_test(suite: Path) -> None:
    code = """
@pytest.fixture
def fragile(world):
    assert world.rank != 2

def test_with_it(world, fragile):
    world.barrier()
"""
    ended = pytest_on(3, suite, code)
    assert ended.returncode == 1, ended.output
    assert "rank 2 of 3 (1 failed)" in ended.stdout
    assert ended.stdout.count("1 error") == 1


def test_a_test_skipped_on_one_rank_only_fails(suite: Path) -> None:
    code = """
def test_sometimes(world):
    if world.rank == 1:
        pytest.skip("not here")
"""
    ended = pytest_on(2, suite, code)
    assert ended.returncode == 1, ended.output
    assert "skipped on ranks [1] only" in ended.stdout


def test_a_hanging_rank_prints_its_stack_and_ends_all(suite: Path) -> None:
    code = """
def stuck():
    time.sleep(1000)

def test_hangs(world):
    if world.rank == 1:
        stuck()
"""
    ended = pytest_on(2, suite, code, timeout_s=2.0)
    assert ended.returncode != 0
    assert ended.seconds < 40.0
    assert ended.output.count("in stuck") == 1, ended.output


def test_a_dying_rank_ends_all(suite: Path) -> None:
    code = """
def test_dies(world):
    if world.rank == 1:
        os._exit(7)
    world.barrier()
"""
    ended = pytest_on(3, suite, code)
    assert ended.returncode != 0


def test_different_tests_on_the_ranks_are_refused(suite: Path) -> None:
    code = "if mpidl.runtime.launched_rank() != 1:\n    def test_a(): pass\ndef test_b(): pass\n"
    ended = pytest_on(3, suite, code)
    assert ended.returncode != 0
    assert "the ranks collected different tests" in ended.output


def test_tests_that_launch_run_under_plain_pytest_only(suite: Path) -> None:
    code = "@pytest.mark.launches\ndef test_launches(): pass\ndef test_other(): pass\n"
    assert "2 passed" in pytest_on(0, suite, code).check().stdout
    assert "1 passed, 1 deselected" in pytest_on(2, suite, code).check().stdout
