"""Manifests: what a stranger's, a damaged or another version's says is not believed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from mpidl.checkpoint.image import ShardImage
from mpidl.checkpoint.manifest import FORMAT, MANIFEST, read_manifest, sealed
from mpidl.checkpoint.transfer import checksum
from mpidl.checkpoint.whole import read_weights
from mpidl.errors import CheckpointError, DamagedError

NAME = "shard-00000-of-00001.safetensors"
MANY: dict[str, Any] = {
    "format": FORMAT,
    "tensors": [["a", [2, 3]], ["b", [4]]],
    "layout": "digest",
    "aliases": {"c": "a"},
    "shards": [{"file": NAME, "runs": [[0, 10]], "vectors": ["weights"], "data_start": 4096, "checksum": "ab" * 16}],
    "rest": {"file": "rest.safetensors", "checksum": "cd" * 16},
    "optimizer": {
        "class": "Adam",
        "state": [{"arrays": ["exp_avg"], "scalars": {"step": 3.0}, "tensor_scalars": ["step"]}],
        "options": [{"lr": 0.1, "betas": [0.9, 0.99]}],
        "names": [["a", "b"]],
    },
    "buffers": None,
    "number": 1,
    "progress": {"loss": float("nan"), "text": "\ud800ä", "sums": [0.1, 1e300, 10**30]},
}


def written(path: Path, manifest: dict[str, Any]) -> Path:
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = read_manifest(written(tmp_path, sealed(MANY)))
    assert repr(found) == repr(MANY)


def test_a_manifest_in_which_a_digit_has_changed_is_damaged(tmp_path: Path) -> None:
    text = json.dumps(sealed(MANY)).replace("1e+300", "1e+301")
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DamagedError, match="manifest.json is damaged: its checksum"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("number", [4, 6])
def test_a_checkpoint_of_another_version_is_not_called_damaged(tmp_path: Path, number: int) -> None:
    manifest = {"format": number} if number < FORMAT else sealed(MANY | {"format": number})
    with pytest.raises(CheckpointError, match=f"is of format {number}, this version reads {FORMAT}") as raised:
        read_manifest(written(tmp_path, manifest))
    assert not isinstance(raised.value, DamagedError)


HOSTILE: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "a path that leads out": (("shards", 0, "file"), "../../etc/passwd"),
    "an absolute path": (("rest", "file"), "/dev/zero"),
    "a folder": (("shards", 0, "file"), ".."),
    "a negative shape": (("tensors", 0, 1), [-2, -3]),
    "a shape of fractions": (("tensors", 0, 1), [1.5, 4.0]),
    "a shape without numbers": (("tensors", 0, 1), [float("nan")]),
    "a huge shape": (("tensors", 0, 1), [1 << 62, 1 << 62]),
    "runs with a hole": (("shards", 0, "runs"), [[0, 4], [5, 10]]),
    "runs that overlap": (("shards", 0, "runs"), [[0, 6], [4, 10]]),
    "no runs": (("shards", 0, "runs"), None),
    "a vector twice": (("shards", 0, "vectors"), ["weights", "weights"]),
    "a checksum of another length": (("shards", 0, "checksum"), "ab"),
    "an alias of a number": (("aliases",), {"c": 3}),
    "state that is no number": (("optimizer", "state", 0, "scalars"), {"step": "__import__('os')"}),
    "state without names": (("optimizer", "state", 0, "arrays"), [1]),
    "fewer groups": (("optimizer", "options"), []),
    "names of strangers": (("optimizer", "names"), [["z"]]),
    "buffers by number": (("buffers",), [3]),
    "no progress": (("progress",), 3),
    "an empty text for aliases": (("aliases",), ""),
    "an empty list for progress": (("progress",), []),
    "an empty text for buffers": (("buffers",), ""),
    "an empty list for options": (("optimizer", "options", 0), []),
    "an empty list for numbers of the state": (("optimizer", "state", 0, "scalars"), []),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_manifest_that_lies_is_refused_before_anything_is_done_with_it(tmp_path: Path, case: str) -> None:
    (*way, last), value = HOSTILE[case]
    manifest = json.loads(json.dumps(MANY))
    place = manifest
    for key in way:
        place = place[key]
    place[last] = value
    with pytest.raises(DamagedError, match="manifest.json is damaged: "):
        read_manifest(written(tmp_path, sealed(manifest)))


def test_a_checkpoint_that_says_that_it_is_huge_gets_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = [{**MANY["shards"][0], "runs": [[0, 1 << 50]]}]
    (tmp_path / NAME).write_bytes(b"short")
    monkeypatch.setattr("mpidl.checkpoint.reading.pages", lambda *args, **options: pytest.fail("memory was taken"))
    with pytest.raises(DamagedError, match=f"{NAME} is damaged: it ends after 5 bytes"):
        read_weights(written(tmp_path, sealed(MANY | {"tensors": [["a", [1 << 50]], ["b", [0]]], "shards": huge})))


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(DamagedError, match="it is not a file"):
        read_weights(written(tmp_path, sealed(MANY)))


@pytest.mark.parametrize("name", ["a", "frozen", "nobody"])
def test_a_second_name_is_of_what_is_trained_or_of_what_is_not(tmp_path: Path, name: str) -> None:
    image = ShardImage(["weights"], 10)
    image.vectors["weights"][:] = range(10)
    shards = [{**MANY["shards"][0], "data_start": image.data_start, "checksum": image.write(tmp_path / NAME)}]
    rest = save({"frozen": torch.ones(3)})
    (tmp_path / "rest.safetensors").write_bytes(rest)
    entry = {"file": "rest.safetensors", "checksum": checksum(np.frombuffer(rest, np.uint8)).hex()}
    written(tmp_path, sealed(MANY | {"shards": shards, "rest": entry, "aliases": {"c": name}}))
    if name == "nobody":
        with pytest.raises(DamagedError, match="c is nobody, which is not there"):
            read_weights(tmp_path)
        return
    found = read_weights(tmp_path)
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["c"].equal(found[name])
