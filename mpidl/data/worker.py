"""A process that reads samples for a loader: `python -m mpidl.data.worker`, started by `mpidl.data.workers`.

It never touches MPI. Standard input brings two frames, the `Assignment` and the source, then requests of 24
bytes; standard output takes one frame per request, in their order. Orders and seeds are worked out here.
"""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpidl.data.order import Order, Request
    from mpidl.data.pipe import Assignment, Frame
    from mpidl.data.sources import ReadError, Source

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> None:
    """Serve until standard input ends."""
    requests, replies = _take_pipes()  # before torch and user code, which may print, are imported
    # These go to all processes of a job (Ctrl-C, Slurm's warning before the end); whether to stop is the
    # parent's decision. A handler, unlike SIG_IGN, is not inherited by programs that a Dataset starts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)
    code = 0
    try:
        _serve(requests, replies)
    except (EOFError, BrokenPipeError):
        pass  # the parent has closed the loader, or died
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # half a second sooner than by way of torch's clean-up


def _serve(requests: io.FileIO, replies: io.FileIO) -> None:
    import torch

    from mpidl.data.order import Request
    from mpidl.data.pipe import REQUEST, decode, read_exactly, read_frame, write_frame
    from mpidl.data.sources import ReadError

    torch.set_num_threads(1)
    assignment: Assignment = decode(read_frame(requests))
    if assignment.dies_with_parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    torch.set_default_dtype(assignment.default_dtype)
    content = read_frame(requests)
    try:
        source: Source = decode(content)
    except Exception:
        failure = ReadError(f"a loader worker could not rebuild the data set\n{traceback.format_exc().rstrip()}")
        source = _Broken(failure)
    while True:
        request = Request(*REQUEST.unpack(read_exactly(requests, REQUEST.size)))
        write_frame(replies, _answer(source, assignment.order, request))


def _answer(source: Source, order: Order, request: Request) -> Frame:
    from mpidl.data.pipe import encode
    from mpidl.data.sources import ReadError

    try:
        (indices,) = order.indices([request])
        return encode(source.read(indices, order.seeds(request.epoch, indices)))
    except ReadError as error:
        return encode(error)
    except Exception:
        return encode(ReadError(f"a loader worker could not send a batch\n{traceback.format_exc().rstrip()}"))


class _Broken:
    """Stands for a data set that could not be rebuilt: every request gets the reason."""

    needs_seeds = True

    def __init__(self, failure: ReadError) -> None:
        self._failure = failure

    def __len__(self) -> int:
        return 0

    def read(self, indices: object, seeds: object) -> object:
        raise self._failure


def _take_pipes() -> tuple[io.FileIO, io.FileIO]:
    """Keep standard input and output to ourselves: what a Dataset prints goes to standard error."""
    requests, replies = io.FileIO(os.dup(0)), io.FileIO(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    return requests, replies


if __name__ == "__main__":
    main()
