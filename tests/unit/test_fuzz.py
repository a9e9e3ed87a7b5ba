"""Whatever stands in a file or a message: it is read, or refused with a clear error, and nothing else happens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fuzz_targets import TARGETS
from tests.fuzzing import Broken, Target, assert_harmless, damaged

each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
pytestmark = pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required:UserWarning")


@each_target
def test_good_contents_are_read_and_hostile_ones_refused(target: Target, tmp_path: Path) -> None:
    for content in target.seeds:
        refusal = assert_harmless(target, tmp_path, content)
        assert refusal is None
    for content in target.hostile:
        refusal = assert_harmless(target, tmp_path, content)
        assert refusal is not None


@each_target
def test_damaged_contents_get_a_clear_error_or_none(target: Target, tmp_path: Path) -> None:
    for seed in range(40):
        content = damaged(target, random.Random(seed))
        try:
            assert_harmless(target, tmp_path, content)
        except Broken as error:
            raise AssertionError(f"seed {seed}, {content[:300]!r}: {error}") from error


@each_target
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@example(b"").via("nothing at all")
@given(st.binary(max_size=200))
def test_garbage_gets_a_clear_error_or_none(target: Target, tmp_path: Path, content: bytes) -> None:
    assert_harmless(target, tmp_path, content)


def test_the_guard_sees_what_a_reader_must_not_do(tmp_path: Path) -> None:
    import pickle
    import subprocess
    from collections import OrderedDict

    def read(folder: Path, content: bytes) -> None:
        nothing: dict[str, int] = {}
        acts: dict[bytes, Callable[[], object]] = {
            b"raise": lambda: nothing["x"],
            b"take": lambda: bytes(64 << 20),
            b"run": lambda: subprocess.run(["true"], check=True),
            b"unpickle": lambda: pickle.loads(pickle.dumps(OrderedDict)),
        }
        acts[content]()

    for content in (b"raise", b"take", b"run", b"unpickle"):
        with pytest.raises(Broken):
            assert_harmless(Target((), read), tmp_path, content)
