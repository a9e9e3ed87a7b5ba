"""The loader: its order, reading ahead, worker processes, and how they end."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpidl.data import ArraySource, DatasetSource, Loader, ReadError, Source, permute, sample_seed, seed_everything
from mpidl.data.order import Int64Array, kept_random_state
from mpidl.data.workers import WorkerPool, worker_environment
from mpidl.errors import ConfigError, DataError

NUM_SAMPLES = 100
FAILING, FACTS, PRINTING = 90, 91, 92  # samples with a purpose
RANK_VARIABLES = {
    "PMI_RANK": "1",
    "PMI_SIZE": "4",
    "PMI_FD": "9",
    "PMIX_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "1",
    "PRTE_LAUNCHED": "1",
    "HYDRA_HOST_FILE": "hosts",
    "MPI_LOCALRANKID": "1",
    "MPICH_PORT": "1",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}
WITH_PROCESSES = pytest.mark.launches


def noisy_dataset() -> Any:
    """A Dataset of a class that no worker could import by name, as those of a notebook."""

    class Noisy:
        def __len__(self) -> int:
            return NUM_SAMPLES

        def __setstate__(self, state: dict[str, Any]) -> None:
            from mpi4py import MPI  # what a Dataset's module may do

            self.__dict__.update(state, mpi=MPI)

        def __getitem__(self, index: int) -> Any:
            if index == FAILING:
                raise OSError("no such image")
            if index == FACTS:
                return self.facts()
            if index == PRINTING:
                print("a line of the Dataset's own")
                os.write(1, b"and one past Python\n")
            return torch.rand(2, 3) + index, {"label": index, "a": np.random.rand(3), "b": random.random()}

        def facts(self) -> dict[str, Any]:
            state = self.__dict__
            return {
                "pid": os.getpid(),
                "torch_threads": torch.get_num_threads(),
                "mpi_started": "mpi" in state and state["mpi"].Is_initialized(),
                "names": [name for name in os.environ if name in RANK_VARIABLES],
                "input": sys.stdin.read(1) if "mpi" in state else "",
            }

    return Noisy()


def flat(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, dict):
        batch = list(batch.values())
    return [part for each in batch for part in flat(each)] if isinstance(batch, list | tuple) else [batch]


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(flat(one), flat(other), strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(claim: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not claim() and time.monotonic() < deadline:
        time.sleep(0.02)
    return claim()


def loader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("mpidl-loader")}


class Counting:
    """A source that counts what was read of it."""

    def __init__(self, needs_seeds: bool, num_samples: int = 10**9) -> None:
        self.needs_seeds = needs_seeds
        self.num_samples = num_samples
        self.num_reads = 0

    def __len__(self) -> int:
        return self.num_samples

    def read(self, indices: Int64Array, seeds: Sequence[int] | None) -> Any:
        self.num_reads += 1
        if 13 in indices:
            raise OSError("13")
        return indices, seeds


@pytest.mark.parametrize("needs_seeds", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_come_in_the_order_of_their_requests(needs_seeds: bool, shuffle: bool) -> None:
    asked = [(0, 0, 3), (0, 3, 7), (0, 500_000_000, 500_000_002), (1, 0, 3), (7, 999_999_999, 10**9), (0, 0, 3)]
    with Loader(Counting(needs_seeds), seed=4, shuffle=shuffle) as loader:
        for epoch, start, stop in asked:
            loader.request(epoch, start, stop)
        for epoch, start, stop in asked:
            indices, seeds = loader.next()
            positions = np.arange(start, stop)
            assert np.array_equal(indices, permute(positions, 10**9, 4, epoch) if shuffle else positions)
            expected = [sample_seed(4, epoch, index) for index in indices.tolist()]
            assert seeds == (expected if needs_seeds else None)
        with pytest.raises(IndexError, match="outstanding"):
            loader.next()


class Slow(Counting):
    """Takes a while to read."""

    def read(self, indices: Int64Array, seeds: Sequence[int] | None) -> Any:
        time.sleep(0.002)
        return super().read(indices, seeds)


@pytest.mark.parametrize("source", [Counting(True), Counting(False), Slow(False)])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_skipped_is_never_given_and_the_rest_in_order(source: Counting, seed: int) -> None:
    draw, expected = random.Random(seed), deque[int]()
    with Loader(source, seed=0, shuffle=False) as loader:
        for number in range(20, 320):
            loader.request(0, number, number + 1)
            expected.append(number)
            while expected and draw.random() < 0.5:
                if draw.random() < 0.5:
                    loader.skip()
                    expected.popleft()
                else:
                    assert loader.next()[0].tolist() == [expected.popleft()]
        for number in expected:
            assert loader.next()[0].tolist() == [number]
        with pytest.raises(IndexError, match="outstanding"):
            loader.skip()


def test_an_error_in_what_is_skipped_is_nobodys() -> None:
    for needs_seeds in (True, False):
        with Loader(Counting(needs_seeds, 20), seed=0, shuffle=False) as loader:
            loader.request(0, 13, 14)
            loader.request(0, 16, 17)
            loader.skip()
            assert loader.next()[0].tolist() == [16]


@pytest.mark.parametrize("positions", [(0, 0), (3, 2), (-1, 3), (5, 11)])
def test_positions_outside_the_data_set_are_refused(positions: tuple[int, int]) -> None:
    with Loader(Counting(False, 10), seed=0, shuffle=False) as loader, pytest.raises(ValueError, match="10 samples"):
        loader.request(0, *positions)


def test_a_thread_reads_ahead_a_few_batches_and_no_more() -> None:
    source = Counting(False)
    with Loader(source, seed=0, shuffle=True) as loader:
        for number in range(20_000):
            loader.request(0, number, number + 1)
        assert wait_until(lambda: source.num_reads == 3)
        time.sleep(0.05)
        assert source.num_reads == 3
        loader.next()
        assert wait_until(lambda: source.num_reads == 4)
    assert not loader_threads()


@pytest.mark.parametrize("needs_seeds", [False, True])
def test_an_error_is_raised_in_its_turn_and_reading_goes_on(needs_seeds: bool) -> None:
    with Loader(Counting(needs_seeds, 20), seed=0, shuffle=False) as loader:
        for start in (10, 13, 16):
            loader.request(0, start, start + 2)
        assert loader.next()[0].tolist() == [10, 11]
        with pytest.raises(OSError, match="13"):
            loader.next()
        assert loader.next()[0].tolist() == [16, 17]


def test_a_closed_loader_refuses_and_may_be_closed_again() -> None:
    loader = Loader(Counting(False), seed=0, shuffle=False)
    loader.request(0, 0, 1)
    loader.close()
    loader.close()
    assert not loader_threads()
    with pytest.raises(ValueError, match="closed"):
        loader.next()
    with pytest.raises(ValueError, match="closed"):
        loader.request(0, 0, 1)


def test_a_forgotten_loader_ends_its_thread() -> None:
    Loader(Counting(False), seed=0, shuffle=False).request(0, 0, 1)
    assert wait_until(lambda: not loader_threads())


def test_arrays_are_loaded_as_tensors() -> None:
    x, y = np.random.default_rng(0).random((50, 4)), np.arange(50)
    with Loader(ArraySource([x, y]), seed=1, shuffle=True, num_workers=2) as loader:
        loader.request(3, 0, 50)
        inputs, targets = loader.next()
    assert sorted(targets.tolist()) == list(range(50))
    assert np.array_equal(inputs, x[targets])


def test_reading_a_dataset_leaves_the_random_state_and_threads_alone() -> None:
    num_threads = torch.get_num_threads()
    with kept_random_state(), Loader(DatasetSource(noisy_dataset()), seed=1, shuffle=False) as loader:
        seed_everything(5)
        expected = torch.rand(3), np.random.rand(3), random.random()
        seed_everything(5)
        for start in (0, FACTS, FAILING):
            loader.request(0, start, start + 1)
        loader.next()
        assert loader.next()["torch_threads"].tolist() == [1]
        with pytest.raises(ReadError, match=r"dataset\[90\]"):
            loader.next()
        assert torch.equal(torch.rand(3), expected[0])
        assert np.array_equal(np.random.rand(3), expected[1])
        assert random.random() == expected[2]
    assert torch.get_num_threads() == num_threads


def test_a_negative_number_of_workers_is_refused() -> None:
    with pytest.raises(ConfigError, match="-1 loader workers"):
        Loader(Counting(True), seed=0, num_workers=-1, shuffle=False)


def test_a_dataset_that_cannot_be_pickled_is_refused_with_advice() -> None:
    dataset = noisy_dataset()
    dataset.lock = threading.Lock()
    with pytest.raises(DataError, match=r"cannot be sent to worker processes: .*lock.*use no workers"):
        Loader(DatasetSource(dataset), seed=0, num_workers=1, shuffle=False)
    assert not loader_threads()


def test_a_worker_s_environment_has_nothing_of_the_launcher() -> None:
    kept = {"PATH": "/bin", "SLURM_JOB_ID": "7", "ATEN_CPU_CAPABILITY": "default", "MPIR_CVAR_NOLOCAL": "1"}
    environment = worker_environment(kept | RANK_VARIABLES)
    assert not set(environment) & set(RANK_VARIABLES)
    assert kept.items() <= environment.items()
    assert environment["MPI4PY_RC_INITIALIZE"] == "0"
    assert environment["OMP_NUM_THREADS"] == "1"


@pytest.fixture(scope="module")
def loader_with_workers() -> Iterator[Loader]:
    """Two worker processes, started from what looks like a rank of a job; shared, since each imports torch."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RANK_VARIABLES.items():
            patch.setenv(name, value)
        loader = Loader(DatasetSource(noisy_dataset()), seed=6, num_workers=2, shuffle=True)
    with loader:
        yield loader
    assert not loader_threads()


def position_of(index: int) -> int:
    return int(np.flatnonzero(permute(np.arange(NUM_SAMPLES), NUM_SAMPLES, 6, 0) == index)[0])


def facts_of_workers(loader: Loader) -> list[dict[str, Any]]:
    position = position_of(FACTS)
    for _ in range(2):
        loader.request(0, position, position + 1)
    return [loader.next() for _ in range(2)]


@WITH_PROCESSES
def test_workers_give_the_bits_of_reading_without_them(loader_with_workers: Loader) -> None:
    special = sorted(position_of(index) for index in (FAILING, FACTS, PRINTING))
    batches = [(0, start, min(start + 7, special[0])) for start in range(0, special[0], 7)] * 3 + [(0, 1, 2)]
    with Loader(DatasetSource(noisy_dataset()), seed=6, shuffle=True) as loader:
        for batch in batches:
            loader.request(*batch)
            loader_with_workers.request(*batch)
        for _ in batches:
            assert same(loader.next(), loader_with_workers.next())


@WITH_PROCESSES
def test_workers_know_nothing_of_mpi_and_use_one_thread_each(loader_with_workers: Loader) -> None:
    facts = facts_of_workers(loader_with_workers)
    assert len({each["pid"].item() for each in facts} | {os.getpid()}) == 3
    for each in facts:
        assert each["mpi_started"].tolist() == [False]
        assert each["torch_threads"].tolist() == [1]
        assert each["names"] == []
        assert each["input"] == [""]


@WITH_PROCESSES
def test_an_error_in_a_worker_names_the_sample_and_reading_goes_on(loader_with_workers: Loader) -> None:
    for index in (FAILING, PRINTING):
        loader_with_workers.request(0, position_of(index), position_of(index) + 1)
    message = r"dataset\[90\] of 100 failed(.|\n)*in __getitem__(.|\n)*OSError: no such image"
    with pytest.raises(ReadError, match=message) as caught:
        loader_with_workers.next()
    assert caught.value.index == FAILING
    assert flat(loader_with_workers.next())[1].tolist() == [PRINTING]


@WITH_PROCESSES
def test_signals_to_the_whole_job_do_not_end_workers(loader_with_workers: Loader) -> None:
    pids = [each["pid"].item() for each in facts_of_workers(loader_with_workers)]
    for pid in pids:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, number)
    assert [each["pid"].item() for each in facts_of_workers(loader_with_workers)] == pids


@WITH_PROCESSES
def test_what_workers_read_for_nothing_is_thrown_away_and_no_more_is_asked_for(loader_with_workers: Loader) -> None:
    pool, positions = loader_with_workers._reader, [position_of(index) for index in range(40)]
    assert isinstance(pool, WorkerPool)
    for _ in range(300):  # one worker's batches are always taken, the other's never
        for index in (1, 2):
            loader_with_workers.request(0, positions[index], positions[index] + 1)
        assert loader_with_workers.next()[1]["label"].tolist() == [1]
        loader_with_workers.skip()
        assert sum(worker._outcomes.qsize() for worker in pool._workers) <= 4
    for position in positions:
        loader_with_workers.request(0, position, position + 1)
    for index in range(40):
        if index % 3:
            loader_with_workers.skip()
        else:
            assert loader_with_workers.next()[1]["label"].tolist() == [index]


@WITH_PROCESSES
def test_many_requests_do_not_fill_the_pipes(loader_with_workers: Loader) -> None:
    for _ in range(20_000):  # 480 kB, more than a pipe takes
        loader_with_workers.request(0, 0, 1)
    pool = loader_with_workers._reader
    assert isinstance(pool, WorkerPool)
    assert len(pool._queued) > 19_000
    loader_with_workers.next()


def sleeping_source(started: Path) -> Source:
    """Sample 0 comes at once, others never; the data set is larger than a pipe."""

    class Sleeping:
        def __init__(self) -> None:
            self.much = np.zeros(10**6)

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> int:
            if index:
                with started.open("a") as file:
                    file.write("x")
                time.sleep(600)
            return os.getpid()

    return DatasetSource(Sleeping())  # type: ignore[arg-type]


@WITH_PROCESSES
def test_a_killed_worker_is_an_error_and_close_ends_busy_and_new_ones(tmp_path: Path) -> None:
    before, started = loader_threads(), tmp_path / "started"
    with Loader(sleeping_source(started), seed=0, num_workers=2, shuffle=False) as loader:
        for start in (0, 0, 1, 1, 1):
            loader.request(0, start, start + 1)
        pids = [loader.next().item() for _ in range(2)]
        assert wait_until(lambda: started.exists() and len(started.read_text()) == 2)
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(ReadError, match=r"worker 0 \(process \d+\) died: exit code -9, killed by SIGKILL"):
            loader.next()
        with Loader(sleeping_source(started), seed=0, num_workers=1, shuffle=False) as new:
            new.request(0, 0, 1)
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 10
    assert not any(is_running(pid) for pid in pids)
    assert loader_threads() == before


SCRIPT = """
import os, signal, sys, time
from mpidl.data import Loader, as_source

class OfMain:
    def __init__(self): self.path = sys.argv[1]
    def __len__(self): return 10
    def __getitem__(self, index):
        if index == 2:
            open(self.path, "w").write(str(os.getpid()))
            time.sleep(600)
        if index == 1: raise SystemExit("by its own will")
        return index

class Fragile(OfMain):
    def __setstate__(self, state): raise ImportError("no such codec")

def failure(loader):
    try: loader.next()
    except Exception as error: print(str(error).splitlines()[0], str(error).splitlines()[-1])

dying = Loader(as_source(OfMain()), seed=0, num_workers=2, shuffle=False)
with Loader(as_source(Fragile()), seed=0, num_workers=1, shuffle=False) as fragile:
    for index in range(3): dying.request(0, index, index + 1)
    fragile.request(0, 0, 1)
    print(dying.next().tolist(), flush=True)
    failure(dying)
    failure(fragile)
while not os.path.exists(sys.argv[1]) or not os.path.getsize(sys.argv[1]): time.sleep(0.02)
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@WITH_PROCESSES
def test_a_script_s_own_dataset_is_loaded_and_its_workers_die_with_it(tmp_path: Path) -> None:
    script, started = tmp_path / "script.py", tmp_path / "started"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(script), str(started)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "[0]"
    assert lines[2] == "a loader worker could not rebuild the data set ImportError: no such codec"
    assert re.match(r"loader worker 1 \(process \d+\) died: exit code 1", lines[1])
    assert "by its own will" in result.stderr
    pid = int(started.read_text())
    assert wait_until(lambda: not is_running(pid), timeout_s=5)
