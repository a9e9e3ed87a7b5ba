"""Ways to start ranks under Slurm, with the MPI of this environment and with Debian's: the same weights by each."""

from __future__ import annotations

import hashlib
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.local_slurm import LocalSlurm, miss, plugin
from tests.launch import ROOT, is_open_mpi, run

pytestmark = pytest.mark.slurm

TRAINING = [str(ROOT / "tests/cli/jobs/small.toml"), "--end-when", "iterations(3)", "--run-dir", "run"]
LIBRARIES = Path("/usr/lib", f"{platform.machine()}-linux-gnu")
OWN = "Open MPI v" if is_open_mpi() else "MPICH Version"


@dataclass(frozen=True)
class Way:
    """How a job starts its ranks.

    Attributes:
        script: in jobs/.
        plugin: srun's --mpi.
        library: of Debian's, under the name that mpi4py wants it to have; "" for this environment's own.
        debian: its file's name.
        says: how it begins what it calls itself.
    """

    script: str
    plugin: str
    says: str
    library: str = ""
    debian: str = ""


WAYS = {
    "srun": Way("train.sbatch", plugin(), OWN),
    "mpirun": Way("train-mpirun.sbatch", "", OWN),
}
if not is_open_mpi():  # once is enough
    WAYS |= {
        "srun, Debian's MPICH": Way("train.sbatch", "pmi2", "MPICH Version: 4", "libmpi.so.12", "libmpich.so.12"),
        "srun, Debian's Open MPI": Way("train.sbatch", "pmix", "Open MPI v4", "libmpi.so.40", "libmpi.so.40"),
    }


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "weights.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of one process without a launcher."""
    folder = tmp_path_factory.mktemp("one")
    run([sys.executable, "-m", "mpidl", "train", *TRAINING], cwd=folder, env={"PYTHONPATH": str(ROOT)}).check()
    return weights(folder / "run")


@pytest.mark.parametrize("name", WAYS)
def test_each_launcher_gives_the_same_weights(name: str, cluster: LocalSlurm, expected: str, tmp_path: Path) -> None:
    way = WAYS[name]
    env = {"SLURM_MPI_TYPE": way.plugin} if way.plugin else {}
    if way.library:
        if not (LIBRARIES / way.debian).exists():
            miss(f"no {way.debian} of Debian's here: apt-get install libmpich12 libopenmpi3")
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / way.library).symlink_to(LIBRARIES / way.debian)
        env |= {"MPI4PY_LIBMPI": str(tmp_path / "lib" / way.library), "LD_LIBRARY_PATH": str(tmp_path / "lib")}
    job = cluster.submit(tmp_path, way.script, TRAINING, "--nodes=2", env=env)
    told = cluster.output(cluster.wait(job, "COMPLETED"))
    assert "2 ranks on 2 nodes (host1, host2)" in told, told
    assert way.says in " ".join(told.replace("|", "").split()), told
    assert weights(tmp_path / "run") == expected
