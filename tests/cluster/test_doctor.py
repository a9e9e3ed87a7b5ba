"""`mpidl doctor` between hosts: what is not shared, and links that are slower than their devices."""

from __future__ import annotations

import json
import sys

import pytest

from tests.cluster.test_hosts import hosts, needs_hosts

pytestmark = pytest.mark.thorough

FABRIC = """
mount -t sysfs sysfs /sys
mkdir /dev/shm/class && cp -r /sys/class/net /dev/shm/class 2>/dev/null
port=/dev/shm/class/infiniband/mlx5_0/ports/1
mkdir -p $port && echo '4: ACTIVE' >$port/state && echo '100 Gb/sec (4X EDR)' >$port/rate
mount --bind /dev/shm/class /sys/class
mount -t tmpfs tmpfs /mnt
exec "$0" -m mpidl doctor --json --run-dir /mnt
"""


@needs_hosts
def test_a_folder_that_is_not_shared_and_tcp_beside_a_fabric_are_found() -> None:
    ended = hosts("with", 2, "--rate", "200mbit", "--", "unshare", "--mount", "sh", "-c", FABRIC, sys.executable)
    assert ended.returncode == 1, ended.output
    document = json.loads(ended.stdout)
    problem, *warnings = [finding["what"] for finding in document["findings"]]
    assert problem == "host2 did not see, within 10 s, a file that rank 0 wrote to /mnt: it is not shared"
    assert any("MPI sends by TCP between host1 and host2 (eth0, 0.0" in what for what in warnings), warnings
    (link,) = document["facts"]["links"]
    assert 5e6 < link["bytes_per_s"] < 75e6  # of 25e6, on a machine that may be busy; loopback has some 1e9
