"""Iterations whose compute is waits: what `mpidl bench simulate --measured` compares the simulation with.

    sudo env "PATH=$PATH" jobs/local/hosts.py with 4 --rate 200mbit -- \
        python jobs/waits.py --model vgg13_32 --forward-ms 110 --backward-ms 220 --gbit 0.2 --json waits-4.json

Every layer of the model waits as long as its share of the operations says, forward and backward, in place of computing;
its parameters, their gradients and their exchange are real. So ranks that share a core do not compete for it, and the
time of an iteration is that of hosts with a core for each rank, as far as messages themselves need none. Before the
iterations the rate of all-to-alls of buckets is measured, looked at as seldom as the exchange's thread does: that is
what the simulation takes for the links' rate.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mpidl
from mpidl import models
from mpidl.bench.workload import LayerCost, layer_costs
from mpidl.parameters.driver import FIRST_SLEEP_S, LONGEST_SLEEP_S
from mpidl.runtime import Patience, Pending

_EXCHANGES, _UNDER_WAY = 12, 4


class _Waits(torch.autograd.Function):
    """Waits forward and backward; its gradients are ones."""

    @staticmethod
    def forward(ctx: Any, forward_s: float, backward_s: float, carried: Tensor, *parameters: Tensor) -> Tensor:
        time.sleep(forward_s)
        ctx.backward_s, ctx.shapes = backward_s, [parameter.shape for parameter in parameters]
        return carried.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(ctx.backward_s)
        ones = [torch.ones(()).expand(shape) for shape in ctx.shapes]
        return None, None, gradients[0], *ones


class Layer(nn.Module):
    """The parameters of one layer, and its waits."""

    def __init__(self, shapes: list[torch.Size], forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.own = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
        self.waits = forward_s, backward_s

    def forward(self, carried: Tensor) -> Tensor:
        """Hands on what it got."""
        return _Waits.apply(*self.waits, carried, *self.own)  # type: ignore[no-any-return]


def waiting_model(name: str, forward_s: float, backward_s: float) -> nn.Module:
    """The model's layers, in the order in which forward comes to them, waiting so long in all."""
    with torch.device("meta"):
        model = models.build(name)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    costs: list[LayerCost] = layer_costs(model)
    total = sum(cost.operations for cost in costs)
    shares = [cost.operations / total for cost in costs]
    return nn.Sequential(
        *[
            Layer([shapes[each] for each in cost.names], share * forward_s, share * backward_s)
            for cost, share in zip(costs, shares, strict=True)
        ]
    )


def exchange_rate(world: mpidl.World, bucket_bytes: float) -> float:
    """Bytes a second that a host sends in all-to-alls of buckets, some of them under way at a time. Collective."""
    count = max(1, int(bucket_bytes / 4 / world.size))
    counts = [0 if world.node_of[rank] == world.node else count for rank in range(world.size)]
    offsets = [count * rank for rank in range(world.size)]
    rooms = [np.ones((2, count * world.size), np.float32) for _ in range(_UNDER_WAY)]
    world.barrier()
    begin = time.perf_counter()
    under_way: collections.deque[Any] = collections.deque()
    for index in range(_EXCHANGES):
        if len(under_way) == _UNDER_WAY:
            _end(under_way.popleft())
        sent, received = rooms[index % _UNDER_WAY]
        under_way.append(world.start_alltoall_varying(sent, counts, offsets, received, counts, offsets))
    for pending in under_way:
        _end(pending)
    seconds = float(world.allreduce(np.array([time.perf_counter() - begin]), "max")[0])
    return 4.0 * _EXCHANGES * sum(counts) * world.local_size / seconds


def _end(pending: Pending) -> None:
    patience = Patience(yields=0, first_s=FIRST_SLEEP_S, longest_s=LONGEST_SLEEP_S)
    while not pending.is_over():
        patience.pause()


def main() -> None:
    """Measure, and write on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgg13_32")
    parser.add_argument("--forward-ms", type=float, default=110.0)
    parser.add_argument("--backward-ms", type=float, default=220.0)
    parser.add_argument("--reduction", default="ordered", choices=("ordered", "mpi"))
    parser.add_argument("--wire", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--bucket-mb", type=float, default=4.0)
    parser.add_argument("--iterations", type=int, default=8, help="timed, after two that are not")
    parser.add_argument("--gbit", type=float, help="the links' rate, to be told in the figures")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    world = mpidl.init()
    rate = exchange_rate(world, 2**20 * args.bucket_mb)
    model = waiting_model(args.model, args.forward_ms / 1e3, args.backward_ms / 1e3)
    optimizer = functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True)
    manager = mpidl.ParameterManager(
        model, optimizer, reduction=args.reduction, wire=args.wire, bucket_mb=args.bucket_mb, world=world
    )
    carried = torch.zeros(1, requires_grad=True)
    seconds: list[float] = []
    forward: list[float] = []
    backward: list[float] = []
    for _ in range(args.iterations + 2):
        begin = time.perf_counter()
        loss = model(carried).sum()
        forward.append(time.perf_counter() - begin)
        loss.backward()
        backward.append(time.perf_counter() - begin - forward[-1])
        manager.step(wait=False)
        seconds.append(time.perf_counter() - begin)
    manager.wait()
    slowest = world.allreduce(np.array(seconds), "max")[2:]
    mean_s = float(world.allreduce(np.array([np.mean(seconds[2:])]), "max")[0])
    phases = world.allreduce(np.array([np.mean(each[2:]) for each in (forward, backward)])) / world.size
    row = {
        "case": args.model, "way": args.reduction, "wire": args.wire, "ranks": world.size, "nodes": world.num_nodes,
        "seconds": mean_s, "spread": np.quantile(slowest, (0.25, 0.75)).tolist(),
        "forward_seconds": args.forward_ms / 1e3, "backward_seconds": args.backward_ms / 1e3,
        "compute_seconds": (args.forward_ms + args.backward_ms) / 1e3, "bucket_bytes": manager.bucket_bytes,
        "link_gbit": args.gbit, "exchange_bytes_per_s": rate,
        "phases": {"forward": phases[0], "backward": phases[1], "rest": mean_s - phases[0] - phases[1]},
    }  # fmt: skip
    manager.close()
    if world.rank == 0:
        args.json.write_text(json.dumps({"bench": "waits", "rows": [row]}, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row))


if __name__ == "__main__":
    main()
