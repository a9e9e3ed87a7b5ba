"""The flags of `mpidl bench`. No MPI, no torch: help has to be quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable

OPTIMIZERS = ("sgd", "adam")


def add_benches(bench: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Give the parser of `mpidl bench` its benchmarks; returns their parsers by name, `bench sync` and so on."""
    kinds = bench.add_subparsers(dest="bench", required=True, metavar="BENCH")
    sync = kinds.add_parser(
        "sync", help="gradient sum, update and weights everywhere, without compute", allow_abbrev=False
    )
    sync.add_argument("--millions", type=_positive(float), default=25.0, help="million parameters (default: 25)")
    sync.add_argument("--model", dest="model_name", metavar="NAME", help="the parameters of this model instead")
    step = kinds.add_parser("step", help="whole iterations of a model", allow_abbrev=False)
    step.add_argument(
        "--model", dest="model_name", metavar="NAME", default="vgg16_32", help="what to train (default: vgg16_32)"
    )
    step.add_argument("--batch", type=_positive(int), default=32, metavar="N", help="images of each rank (default: 32)")
    step.add_argument(
        "--iterations", type=_positive(int), default=4, metavar="N", help="in one repetition of a way (default: 4)"
    )
    for parser in (sync, step):
        parser.add_argument(
            "--optimizer", dest="optimizer_name", choices=OPTIMIZERS, default="sgd",
            help="sgd has momentum (default: sgd)",
        )  # fmt: skip
        parser.add_argument("--ways", metavar="A,B", help="only these (default: all that can be run here)")
        parser.add_argument(
            "--wire-gbit", type=_positive(float), metavar="GBIT", help="a node's link (default: measured)"
        )
    kernels = kinds.add_parser("kernels", help="sums and conversions on one rank", allow_abbrev=False)
    kernels.add_argument("--millions", type=_positive(float), default=25.0, help="million elements (default: 25)")
    balance = kinds.add_parser(
        "balance", help="iterations with a slow rank, with and without moves", allow_abbrev=False
    )
    balance.add_argument(
        "--slow", choices=("wait", "busy"), default="wait",
        help="the last rank waits longer, or shares its core with a busy process (default: wait)",
    )  # fmt: skip
    balance.add_argument("--factor", type=_positive(float), default=2.0, help="how much longer it waits (default: 2)")
    balance.add_argument("--partitions", type=_positive(int), default=16, metavar="N", help="default: 16")
    plan = kinds.add_parser(
        "plan", help="what it costs to tell ranks what to compute: group plans and a centralised scheduler",
        allow_abbrev=False,
    )  # fmt: skip
    _add_plan(plan)
    for parser, repeats in ((sync, 15), (step, 8), (kernels, 15), (plan, 9), (balance, 6)):
        _add_common(parser, repeats)
    return {
        "bench sync": sync,
        "bench step": step,
        "bench kernels": kernels,
        "bench plan": plan,
        "bench balance": balance,
    }


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


def _add_common(parser: argparse.ArgumentParser, repeats: int) -> None:
    parser.add_argument(
        "--repeats", type=_positive(int), default=repeats, metavar="N", help=f"of each way (default: {repeats})"
    )
    parser.add_argument("--threads", type=_positive(int), default=1, metavar="N", help="of each rank (default: 1)")
    parser.add_argument("--json", dest="json_file", metavar="FILE", help="write all figures there")
    parser.add_argument("--picture", dest="picture_file", metavar="FILE", help="draw them (needs matplotlib)")


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
