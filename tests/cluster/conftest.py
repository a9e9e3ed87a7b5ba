"""One Slurm cluster for all tests that want it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.cluster.local_slurm import LocalSlurm, miss, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalSlurm]:
    """Four nodes."""
    if reason := why_not():
        miss(reason)
    cluster = LocalSlurm(f"test-{uuid.uuid4().hex}")
    try:
        cluster.slurm_py("up", 4).check()
        yield cluster
    finally:
        cluster.slurm_py("down").check()
