"""The flags of `mpidl bench`. No MPI, no torch: help has to be quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

OPTIMIZERS = ("sgd", "adam")
SCALINGS = ("weak", "strong")


def add_benches(bench: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Give the parser of `mpidl bench` its benchmarks; returns their parsers by name, `bench sync` and so on."""
    kinds = bench.add_subparsers(dest="bench", required=True, metavar="BENCH")
    sync = kinds.add_parser("sync", help="gradient sum, update and weights everywhere, without compute")
    sync.add_argument("--millions", type=_positive(float), default=25.0, help="million parameters (default: 25)")
    sync.add_argument("--model", dest="model_name", metavar="NAME", help="the parameters of this model instead")
    step = kinds.add_parser("step", help="whole iterations of a model")
    _add_training(step, batch=32, iterations=4)
    scaling = kinds.add_parser("scaling", help="throughput over 1, 2, 4, ... nodes, or ranks of one, of this run")
    _add_scaling(scaling)
    checkpoint = kinds.add_parser(
        "checkpoint", help="writing and reading a checkpoint, and how long training stands still"
    )
    checkpoint.add_argument(
        "--millions", type=_positive(float), default=83.3, help="million parameters (default: 83.3, with adam 1 GB)"
    )
    checkpoint.add_argument("--folder", default=".", metavar="DIR", help="on the disk to measure (default: here)")
    for parser, optimizer in ((sync, "sgd"), (step, "sgd"), (scaling, "sgd"), (checkpoint, "adam")):
        parser.add_argument(
            "--optimizer", dest="optimizer_name", choices=OPTIMIZERS, default=optimizer,
            help=f"sgd has momentum (default: {optimizer})",
        )  # fmt: skip
        parser.add_argument("--ways", metavar="A,B", help="only these (default: all that can be run here)")
    for parser in (sync, step, scaling):
        parser.add_argument(
            "--wire-gbit", type=_positive(float), metavar="GBIT", help="a node's link (default: measured)"
        )
    kernels = kinds.add_parser("kernels", help="sums and conversions on one rank")
    kernels.add_argument("--millions", type=_positive(float), default=25.0, help="million elements (default: 25)")
    balance = kinds.add_parser("balance", help="iterations with a slow rank, with and without moves")
    balance.add_argument(
        "--slow", choices=("wait", "busy"), default="wait",
        help="the last rank waits longer, or shares its core with a busy process (default: wait)",
    )  # fmt: skip
    balance.add_argument("--factor", type=_positive(float), default=2.0, help="how much longer it waits (default: 2)")
    balance.add_argument("--partitions", type=_positive(int), default=16, metavar="N", help="default: 16")
    plan = kinds.add_parser(
        "plan", help="what it costs to tell ranks what to compute: group plans and a centralised scheduler"
    )
    _add_plan(plan)
    simulate = kinds.add_parser("simulate", help="iterations on networks of 16 to 4,096 nodes, simulated")
    _add_simulate(simulate)
    repeats_of = {sync: 15, step: 8, scaling: 5, kernels: 15, plan: 9, balance: 6, simulate: 1, checkpoint: 5}
    for parser, repeats in repeats_of.items():
        _add_common(parser, repeats)
    return {f"bench {name}": parser for name, parser in kinds.choices.items()}


def _add_training(parser: argparse.ArgumentParser, batch: int, iterations: int) -> None:
    parser.add_argument(
        "--model", dest="model_name", metavar="NAME", default="vgg16_32", help="what to train (default: vgg16_32)"
    )
    parser.add_argument(
        "--batch", type=_positive(int), default=batch, metavar="N", help=f"samples of each rank (default: {batch})"
    )
    parser.add_argument(
        "--iterations", type=_positive(int), default=iterations, metavar="N",
        help=f"in one repetition of a way (default: {iterations})",
    )  # fmt: skip


def _add_scaling(scaling: argparse.ArgumentParser) -> None:
    _add_training(scaling, batch=32, iterations=2)
    scaling.add_argument(
        "--modes", type=_some_of(SCALINGS), default=list(SCALINGS), metavar="A,B",
        help="weak: --batch samples for each rank; strong: --global-batch for all (default: weak,strong)",
    )  # fmt: skip
    scaling.add_argument(
        "--global-batch", type=_positive(int), metavar="N",
        help="samples of all ranks in strong scaling (default: --batch for each rank of the run)",
    )  # fmt: skip
    scaling.add_argument(
        "--nodes", dest="node_counts", type=_numbers, metavar="A,B",
        help="measure so many nodes of this run only, each with all of its ranks (default: 1, 2, 4, ... and all)",
    )  # fmt: skip
    scaling.add_argument(
        "--bucket-mb", dest="bucket_mib", type=_positive(float), metavar="MIB",
        help="of gradients that mpidl exchanges together (default: what proves fastest, before anything is timed)",
    )  # fmt: skip
    waits = scaling.add_mutually_exclusive_group()
    waits.add_argument(
        "--waits", action="store_true",
        help="wait instead of computing, as long as one rank alone computes, which is measured first: for more "
        "emulated hosts than cores",
    )  # fmt: skip
    waits.add_argument(
        "--compute-ms", type=_positive(float), metavar="MS",
        help="the same, with so long a wait for --batch samples, and for others in proportion",
    )  # fmt: skip


def _add_plan(plan: argparse.ArgumentParser) -> None:
    sizes, partitions = "1,2,5,10,25,50,100,200", "4,8,16,32,64,128,256,512,1024"
    plan.add_argument(
        "--group-sizes", type=_numbers, default=_numbers(sizes), metavar="A,B", help=f"(default: {sizes})"
    )
    plan.add_argument(
        "--partitions", dest="partition_counts", type=_numbers, default=_numbers(partitions), metavar="A,B",
        help=f"of an iteration; as many tasks for the centralised scheduler (default: {partitions})",
    )  # fmt: skip
    plan.add_argument(
        "--iteration-ms", type=_positive(float), default=50.0, metavar="MS",
        help="the compute of an iteration that shares are given of (default: 50)",
    )  # fmt: skip
    plan.add_argument(
        "--waits", action="store_true", help="wait for so long in every iteration (default: compute nothing)"
    )
    plan.add_argument(
        "--with", dest="with_files", nargs="+", default=[], metavar="FILE",
        help="figures of earlier runs, as --json wrote them, to be told, drawn and fitted together",
    )  # fmt: skip


def _add_simulate(simulate: argparse.ArgumentParser) -> None:
    def add(flag: str, kind: Callable[[str], object], default: str, text: str, **options: str) -> None:
        simulate.add_argument(flag, type=kind, default=kind(default), help=f"{text} (default: {default})", **options)  # type: ignore[arg-type]

    add("--models", _names(), "vgg16,googlenet,inception_v3,resnet50", "whose tensors are exchanged", metavar="A,B")
    networks = ("fat_tree", "dragonfly", "adaptive_dragonfly")
    add("--networks", _names(networks), "fat_tree,dragonfly", f"of {', '.join(networks)}", metavar="A,B")
    add("--nodes", _numbers, "16,64,256,1024,4096", "in all", metavar="A,B")
    add("--gbits", _rates, "10,25,100,400", "of a link", metavar="A,B")
    add(
        "--reductions",
        _names(("ordered", "mpi")),
        "ordered,mpi",
        "the first one is told, the other compared",
        metavar="A,B",
    )
    simulate.add_argument("--wire", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    simulate.add_argument(
        "--method", choices=("aggregated", "exchange", "flows"), default="exchange",
        help="aggregated: from the most loaded link; exchange: an exchange of each kind flow by flow as well; flows: "
        "whole iterations flow by flow beside it (default: exchange)",
    )  # fmt: skip
    add("--limit-s", _positive(float), "120", "seconds for one simulation flow by flow", metavar="S")
    simulate.add_argument(
        "--step", dest="step_files", nargs="+", default=[], metavar="FILE",
        help="figures of `bench step --json`, of all models with this batch: forward's and backward's times, and how "
        "fast sums and updates are (of mpidl-ordered on one node)",
    )  # fmt: skip
    add("--tflops", _positive(float), "1", "of a rank, in 10^12 operations a second, where no --step is given")
    add("--batch", _positive(int), "32", "images of each rank", metavar="N")
    add("--ranks-per-node", _positive(int), "1", "that share a node's link", metavar="N")
    add("--partitions-per-rank", _positive(int), "1", "that may move from a slow node", metavar="N")
    add("--slow-factor", _positive(float), "1", "how much longer one node computes; 1: none", metavar="X")
    simulate.add_argument(
        "--memory-gbytes", type=_positive(float), metavar="GB",
        help="that a rank's kernels and its optimizer read and write in a second (default: as --step has it, else 10)",
    )  # fmt: skip
    add("--wire-share", _positive(float), "0.95", "of a link's rate that messages get")
    add("--latency-us", _positive(float), "1", "of one link", metavar="US")
    add("--poll-us", _positive(float), "500", "until the exchange's thread sees that something is over", metavar="US")
    add("--taper", _positive(int), "1", "how much less rate a leaf, or a group, has to others than its nodes have")
    add("--throttle", _at_least_zero, "32", "ranks that an all-to-all sends to at a time; 0: all", metavar="N")
    simulate.add_argument(
        "--measured", nargs="+", default=[], metavar="FILE",
        help="figures of jobs/waits.py, to be simulated and compared, and nothing else",
    )  # fmt: skip


def _names(allowed: Sequence[str] | None = None) -> Callable[[str], list[str]]:
    def convert(text: str) -> list[str]:
        names = list(dict.fromkeys(filter(None, text.split(","))))
        unknown = [name for name in names if allowed is not None and name not in allowed]
        if unknown or not names:
            choice = f"; allowed are {', '.join(allowed)}" if allowed is not None else ""
            raise argparse.ArgumentTypeError(f"{(unknown or [text])[0]!r} is unknown{choice}")
        return names

    return convert


def _rates(text: str) -> list[float]:
    return sorted({_positive(float)(part) for part in text.split(",")})


def _at_least_zero(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 without decimals")
    return int(text)


def _add_common(parser: argparse.ArgumentParser, repeats: int) -> None:
    parser.add_argument(
        "--repeats", type=_positive(int), default=repeats, metavar="N", help=f"of each way (default: {repeats})"
    )
    parser.add_argument("--threads", type=_positive(int), default=1, metavar="N", help="of each rank (default: 1)")
    parser.add_argument("--json", dest="json_file", metavar="FILE", help="write all figures there")
    parser.add_argument("--picture", dest="picture_file", metavar="FILE", help="draw them (needs matplotlib)")


def _some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads some of these names, in their order here."""

    def convert(text: str) -> list[str]:
        given = text.split(",")
        for name in given:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(names)}")
        return [name for name in names if name in given]

    return convert


def _numbers(text: str) -> list[int]:
    """Numbers above 0 without decimals, ascending."""
    return sorted({int(_positive(int)(part)) for part in text.split(",")})


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0{' without decimals' * (kind is int)}")
        return value

    return convert
