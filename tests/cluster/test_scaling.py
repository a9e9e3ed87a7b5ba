"""`mpidl bench scaling` over emulated hosts: what the talk's graph is made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpidl.bench.scaling import STRATEGIES
from tests.cluster.test_hosts import hosts, needs_hosts


@needs_hosts
def test_two_hosts_are_measured_against_one_with_waits_in_place_of_compute(tmp_path: Path) -> None:
    file, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    small = ["--model", "lenet5", "--batch", "4", "--repeats", "1", "--iterations", "1", "--modes", "weak"]
    files = ["--json", file, "--picture", picture]
    command = ["mpidl", "bench", "scaling", *small, "--compute-ms", "20", "--bucket-mb", "1", *files]
    ended = hosts("with", 2, "--rate", "200mbit", "--", *command).check()
    document = json.loads(file.read_text())
    assert document["machine"]["hosts"] == ["host1", "host2"]
    rows = [row for row in document["rows"] if row["case"] == "weak"]
    expected = [(nodes, way) for nodes in (1, 2) for way in STRATEGIES.split(",")]
    assert [(row["nodes"], row["way"]) for row in rows] == expected
    for row in rows:
        assert row["compute_seconds"] == pytest.approx(0.02)
        assert row["is_waited"]
        assert (row["wire_gbit"] or 0) < 0.5, "measured, and limited to 0.2"
    assert "waits in place of compute" in ended.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
