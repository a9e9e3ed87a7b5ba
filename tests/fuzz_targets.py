"""Everything that mpidl reads from files and messages, with contents that are good: see `fuzzing.py`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import struct
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from mpidl import config, local_folder
from mpidl.bench import plan as bench_plan
from mpidl.bench import simulate_points
from mpidl.checkpoint import load_optimizer, load_weights, local_format
from mpidl.checkpoint.image import ShardImage
from mpidl.checkpoint.manifest import FORMAT, MANIFEST, sealed
from mpidl.checkpoint.slots import NUM_SLOTS, Slot
from mpidl.checkpoint.transfer import checksum
from mpidl.errors import MALFORMED, DamagedError
from mpidl.guard import ENDS, HANG
from mpidl.launching.course import RANKS_FILE, Course
from mpidl.parameters import Assignment
from mpidl.report_page.benches import machine_facts, read_bench, tables
from mpidl.report_page.runs import read_run
from mpidl.runtime.activity import RankState
from mpidl.runtime.hang_report import describe, describe_gone
from mpidl.runtime.node_files import NodeFiles
from mpidl.scheduling import Action, Group, GroupPlan, Header, Replay, as_trigger, read_recording
from mpidl.telemetry import top
from tests.fuzz_data import DATA
from tests.fuzzing import Target

HEADER = Header(num_samples=40, batch_size=10, epochs=2, partitions=4, world_size=2)
SHARD, REST = "shard-00000-of-00001.safetensors", "rest.safetensors"


def plan(first: int) -> GroupPlan:
    return GroupPlan(
        index=first, epoch=0, first_iteration=first, assignment=Assignment(4, (0, 2, 4)), spans=((0, 10), (10, 20)),
        learning_rates=((0.1, 0.2), (0.1, 0.3)), actions=Action.VALIDATE, budget_s=1.5,
    )  # fmt: skip


def lines(*values: Any) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


# --- plans ------------------------------------------------------------------------------------------------------------


def with_checksum(message: bytes) -> bytes:
    """The message with the checksum that fits it, and its length."""
    if len(message) < 16:
        return message
    head = message[:8] + struct.pack("<I", len(message))
    return head + struct.pack("<I", zlib.crc32(message[16:], zlib.crc32(head))) + message[16:]


def read_plans(folder: Path, content: bytes) -> None:
    (folder / "plans.jsonl").write_bytes(content)
    found = read_recording(folder)
    found.check(HEADER, validates=True)
    found.triggers(4, 2, keeps=True)
    replay = Replay(found, HEADER.world_size)
    for _ in found.groups:
        made = replay.next_plan()
        assert GroupPlan.decode(made.encode()).num_iterations == made.num_iterations <= found.largest_group


# --- checkpoints ------------------------------------------------------------------------------------------------------


def sum_of(content: bytes) -> str:
    return checksum(np.frombuffer(content, np.uint8)).hex()


def resealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """As a stranger writes it, who knows how checksums are made."""
    return sealed({key: value for key, value in manifest.items() if key != "checksum"})


def with_checksum_of_manifest(content: bytes) -> bytes:
    """The same manifest, whose checksum fits, where it is one at all."""
    try:
        return lines(resealed(json.loads(content)))
    except (ValueError, AttributeError, RecursionError):
        return content


def checkpoint() -> dict[str, bytes]:
    """The files of a checkpoint of a tiny model."""
    image = ShardImage(["weights", "state.momentum_buffer"], 6)
    for vector in image.vectors.values():
        vector[:] = np.arange(6)
    with tempfile.TemporaryDirectory() as folder:
        table = image.write(Path(folder, SHARD))
        shard = Path(folder, SHARD).read_bytes()
    rest = save({"mean": torch.zeros(3)})
    manifest = {
        "format": FORMAT, "layout": "x", "tensors": [["a", [2, 2]], ["b", [2]]], "aliases": {"tied": "a"},
        "optimizer": {
            "class": "SGD", "options": [{"lr": 0.1, "betas": [0.9, 0.99]}], "names": [["a", "b"]],
            "state": [{"arrays": ["momentum_buffer"], "scalars": {"step": 3.0}, "tensor_scalars": ["step"]}],
        },
        "buffers": ["mean"], "progress": {"iteration": 3}, "number": 1,
        "shards": [
            {"file": SHARD, "runs": [[0, 6]], "vectors": image.keys, "data_start": image.data_start, "checksum": table}
        ],
        "rest": {"file": REST, "checksum": sum_of(rest)},
    }  # fmt: skip
    return {MANIFEST: lines(sealed(manifest)), SHARD: shard, REST: rest}


FILES = checkpoint()


def read_checkpoint(folder: Path, replaced: dict[str, bytes]) -> None:
    path = folder / "checkpoints" / "epoch-000001"
    path.mkdir(parents=True, exist_ok=True)
    for name, content in (FILES | replaced).items():
        (path / name).write_bytes(content)
    load_weights(folder)
    load_optimizer(path)


def manifest_of(num_elements: int) -> bytes:
    """A manifest that states so many elements, in the file that there is."""
    manifest = json.loads(FILES[MANIFEST])
    manifest["tensors"] = [["a", [num_elements]], ["b", [0]]]
    manifest["shards"][0]["runs"] = [[0, num_elements]]
    return lines(resealed(manifest))


def read_rest_that_fits(folder: Path, content: bytes) -> None:
    """The sums are those of a stranger, who knows how they are made."""
    manifest = json.loads(FILES[MANIFEST])
    manifest["rest"]["checksum"] = sum_of(content)
    read_checkpoint(folder, {REST: content, MANIFEST: lines(resealed(manifest))})


def safetensors_that_states(num_elements: int) -> bytes:
    head = {"a": {"dtype": "F32", "shape": [num_elements], "data_offsets": [0, 4 * num_elements]}}
    return len(json.dumps(head)).to_bytes(8, "little") + json.dumps(head).encode() + bytes(16)


def read_weights(folder: Path, content: bytes) -> None:
    (folder / "weights.safetensors").write_bytes(content)
    load_weights(folder)


# --- what nodes keep for a restart ------------------------------------------------------------------------------------

KEPT = local_format.Header("k" * 32, "0" * 16, 0, 1, "x", ("weights", "state.momentum_buffer"), ((0, 6),), 4096)
COMMON = local_format.Common("0" * 16, 3, {"iteration": 3}, {"layout": "x"}, ["mean"], save({"mean": torch.zeros(3)}))


def kept_image() -> bytes:
    content = np.zeros(NUM_SLOTS * KEPT.slot_bytes, np.uint8)
    for number, half in enumerate(content.reshape(NUM_SLOTS, KEPT.slot_bytes)):
        slot = Slot(half, KEPT.keys, KEPT.size, KEPT.head_bytes, has_sum=True)
        slot.vectors["weights"][:] = np.arange(6)
        slot.close(number, [{"arrays": ["momentum_buffer"], "scalars": {"step": 3.0}}])
    return KEPT.encode() + content.tobytes()


def read_kept_image(folder: Path, content: bytes) -> None:
    (folder / "image").write_bytes(content)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        file, num_bytes = local_format.open_file(descriptor, "image")
        try:
            header, start = local_format.read_header(file, num_bytes)
            for number in range(NUM_SLOTS):
                local_format.read_slot(file, header, start, number).scalars()
        finally:
            os.close(file)
    except (OSError, local_format.UnfitError, *MALFORMED) as error:  # what those who look at a node's files pass over
        raise DamagedError(f"{folder}: {error}") from None
    finally:
        os.close(descriptor)


def read_kept_header(folder: Path, content: bytes) -> None:
    """The sum is that of a stranger, who knows how it is made; the slots are good ones."""
    head = b"mpidl kept state" + len(content).to_bytes(8, "little") + bytes.fromhex(sum_of(content)) + content
    slots = kept_image()[len(KEPT.encode()) :]
    read_kept_image(folder, head.ljust(-(-len(head) // 4096) * 4096, b"\0") + slots)


def read_kept_common(folder: Path, content: bytes) -> None:
    try:
        local_format.decode_common("key", content)
    except (local_format.UnfitError, *MALFORMED) as error:
        raise DamagedError(f"{folder}: {error}") from None


KEPT_HEADER = json.dumps({"format": 1, **dataclasses.asdict(KEPT)}).encode()
KEPT_COMMON = local_format.encode_common("key", COMMON)


# --- settings ---------------------------------------------------------------------------------------------------------


def read_toml(folder: Path, content: bytes) -> None:
    (folder / "job.toml").write_bytes(content)
    made = config.load(folder / "job.toml")
    (folder / "config.toml").write_text(config.to_toml(made), encoding="utf-8")
    assert config.config_hash(config.load(folder / "config.toml")) == config.config_hash(made)


def read_flag(folder: Path, content: bytes) -> None:
    given = argparse.Namespace(data_args=content.decode(errors="surrogateescape"))
    config.load(None, config.overrides_from(given))


def read_trigger(folder: Path, content: bytes) -> None:
    as_trigger("end_when", content.decode(errors="surrogateescape"))


# --- what runs and benchmarks tell ------------------------------------------------------------------------------------

START: dict[str, Any] = {
    "event": "start", "time": 1000.0, "ranks": 2, "nodes": 1, "hosts": ["vm"], "threads_per_rank": 1, "partitions": 4,
    "partition_ranges": [[0, 2], [2, 4]], "batch_size": 8, "group_size": "auto", "parameters": 100, "shard_size": 50,
    "memory_per_rank_bytes": {"weights": 400}, "train_samples": 32, "validation_samples": 8, "epochs": 4,
    "iterations_per_epoch": 4, "total_iterations": 16, "first_iteration": 0, "bits": "partitions",
    "reduction": "ordered", "seed": 0, "library": "MPI", "run_dir": "r", "versions": {"numpy": "2"},
}  # fmt: skip
EVENTS = [
    START,
    {
        "event": "group", "time": 1005.0, "iteration": 4, "iterations": 4, "samples": 32, "loss": 2.0, "seconds": 2.0,
        "lr": 0.1, "samples_per_s": 16.0, "group_size": 4, "phases": {"compute": 1.2, "wait": 0.4},
        "seconds_per_sample": [0.1, 0.3], "partition_starts": [0, 1, 4],
    },
    {"event": "epoch", "time": 1005.0, "epoch": 1, "iteration": 4, "loss": 2.0, "seconds": 5.0, "samples_per_s": 6.4},
    {"event": "validation", "time": 1006.0, "epoch": 1, "iteration": 4, "loss": "nan", "accuracy": 0.5},
    {"event": "checkpoint", "time": 1007.0, "iteration": 4, "bytes": 1024, "seconds": 0.1},
    {"event": "warning", "time": 1008.0, "message": "slow"},
    {"event": "end", "time": 1030.0, "status": "finished", "seconds": 30.0, "epochs": 4, "iterations": 16,
     "message": "done", "phases": {"compute": 1.0}},
]  # fmt: skip
BENCH = {
    "bench": "step", "command": "mpidl bench step",
    "machine": {"hosts": ["vm"], "processor": "x", "cores": 2, "ranks": 2, "nodes": 1, "threads_per_rank": 1,
                "versions": {"numpy": "2"}, "mpi": "MPICH"},
    "rows": [{"case": "vgg", "way": "mpidl", "ranks": 2, "nodes": 1, "partitions": 8, "group_size": 4, "seconds": 0.5,
              "spread": [0.4, 0.6], "limit_seconds": 0.3, "times_limit": 1.6, "bytes": 4000, "samples_per_s": 64.0,
              "efficiency": 0.9, "share": 0.1, "counts": [1, 2], "baseline": "mpidl", "cpu_seconds": 0.1}],
}  # fmt: skip


def read_metrics(folder: Path, content: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(content)
    run = read_run(folder)
    str((run.status, run.iteration, run.iterations_per_epoch, run.resumed_at))


def read_in_top(folder: Path, content: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(content)
    with contextlib.redirect_stdout(io.StringIO()):
        top.follow(folder, once=True)


def read_plan_figures(folder: Path, content: bytes) -> None:
    (folder / "bench.json").write_bytes(content)
    bench_plan.read_rows(folder / "bench.json")


def read_step_figures(folder: Path, content: bytes) -> None:
    (folder / "bench.json").write_bytes(content)
    simulate_points.read_rows(folder / "bench.json", "step", {"case": str, "ranks": int, "seconds": float})


def read_bench_file(folder: Path, content: bytes) -> None:
    (folder / "bench.json").write_bytes(content)
    bench = read_bench(folder / "bench.json")
    tables(bench), machine_facts(bench.machine)


def read_node_file(folder: Path, content: bytes) -> None:
    (folder / "hang").mkdir(exist_ok=True)
    (folder / "hang" / "node-00001.json").write_bytes(content)
    files = NodeFiles(folder, "key", 0, 2)
    files.see_alarm()
    for told in files.heard().values():
        f"{told.quiet_s:.0f}", describe(told.states)


def read_lost_file(folder: Path, content: bytes) -> None:
    (folder / HANG).mkdir(exist_ok=True)
    (folder / HANG / "lost-00001.json").write_bytes(content)
    if lost := NodeFiles(folder, "key", 0, 2).lost():
        describe_gone("vm", lost)


def read_end_file(folder: Path, content: bytes) -> None:
    (folder / ENDS).mkdir(exist_ok=True)
    (folder / ENDS / "rank-00001.json").write_bytes(content)
    Course(SimpleNamespace(run_dir=folder), None, 0)._rank_ends()  # type: ignore[arg-type]


def read_ranks_file(folder: Path, content: bytes) -> None:
    (folder / RANKS_FILE).write_bytes(content)
    command = SimpleNamespace(run_dir=folder, training=SimpleNamespace(partitions=8), starts_beside=False)
    process = SimpleNamespace(send_signal=lambda number: None)
    Course(command, 2, 0)._look_for_request(process)  # type: ignore[arg-type]


def read_kept_file(folder: Path, content: bytes) -> None:
    (folder / "kept.json").write_bytes(content)
    local_folder.read_kept(folder)


STATE = RankState(
    rank=1, host="vm", pid=3, iteration=8, phase="update", phase_s=4.2, waits_s=None, bucket=2, stack="File x"
)
LOST = {"job": "key", "rank": 1, "host": "vm", "process": 3, "code": -9}
NODE = {"job": "key", "count": 3, "has_alarm": True, "quiet_s": 5.0, "states": [dataclasses.asdict(STATE)]}

TARGETS = {
    "plan": Target((plan(0).encode(),), lambda _, content: GroupPlan.decode(content), names_the_file=False),
    "plan, its checksum fits": Target(
        (plan(0).encode(),), lambda _, content: GroupPlan.decode(with_checksum(content)), names_the_file=False
    ),
    "plans.jsonl": Target(
        (lines({"header": dataclasses.asdict(HEADER)},
               Group(plan(0), 2, ((1, Action.CHECKPOINT), (2, Action.VALIDATE)), ((1, (3,)),)).to_json(),
               Group(plan(2), 1, ((3, Action.END),)).to_json()),),
        read_plans, is_json=True,
    ),
    "manifest": Target(
        (FILES[MANIFEST],), lambda f, content: read_checkpoint(f, {MANIFEST: with_checksum_of_manifest(content)}),
        is_json=True,
        hostile=tuple(map(manifest_of, (2**10, 2**28, 2**40, 2**62))),
    ),
    "shard": Target((FILES[SHARD],), lambda f, content: read_checkpoint(f, {SHARD: content})),
    "rest": Target((FILES[REST],), read_rest_that_fits, hostile=(safetensors_that_states(2**40),)),
    "weights": Target((save({"a": torch.ones(2, 2), "b": torch.zeros(3)}),), read_weights,
                      hostile=(safetensors_that_states(2**40), b"\xff" * 7 + b"\x7f{}")),
    "kept image": Target((kept_image(),), read_kept_image),
    "kept header, its checksum fits": Target(
        (KEPT_HEADER,), read_kept_header, is_json=True,
        hostile=(
            KEPT_HEADER.replace(b"[[0, 6]]", b"[[0, 1099511627776]]"), KEPT_HEADER.replace(b"[[0, 6]]", b"[[0, 7000]]"),
            KEPT_HEADER.replace(b"4096}", b"4611686018427387904}"),
        ),
    ),
    "kept common": Target((KEPT_COMMON,), read_kept_common),
    "kept common, its checksum fits": Target(
        (KEPT_COMMON[16:],), lambda f, content: read_kept_common(f, bytes.fromhex(sum_of(content)) + content)
    ),
    **DATA,
    "job file": Target(
        (b'lr = 0.5\nepochs = 3\nend_when = "iterations(3)"\n[data_args]\na = [1, 2.5, "x"]\nb = {c = true}\n',),
        read_toml,
    ),
    "--data-args": Target((b'{augment = true, size = 3, name = "x", more = [1, {a = 2}]}',), read_flag,
                          names_the_file=False),
    "--end-when": Target((b'reached("accuracy", 0.99) | plateau("loss", 5) & (epochs(2) | seconds(1e3))',),
                         read_trigger, names_the_file=False),
    "metrics.jsonl": Target((lines(*EVENTS),), read_metrics, is_json=True),
    "metrics.jsonl of mpidl top": Target((lines(*EVENTS[:-1]), lines(*EVENTS)), read_in_top, is_json=True),
    "bench": Target((lines(BENCH),), read_bench_file, is_json=True),
    "figures of step": Target((lines(BENCH),), read_step_figures, is_json=True),
    "figures of plan": Target((lines({**BENCH, "bench": "plan", "rows": [dict.fromkeys(bench_plan._NEEDED, 1)]}),),
                              read_plan_figures, is_json=True),
    "lost file": Target((lines(LOST),), read_lost_file, is_json=True),
    "end file": Target((lines(LOST),), read_end_file, is_json=True),
    "RANKS": Target((b"2\n", b"4"), read_ranks_file),
    "kept file": Target((lines({"num_nodes": 2, "host": "vm", "iteration": 3}),), read_kept_file, is_json=True),
    "node file": Target((lines(NODE),), read_node_file, is_json=True),
}  # fmt: skip
