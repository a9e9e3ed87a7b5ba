"""torch.distributed's gloo between the ranks of this job: what the peers run on."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator

from torch import distributed

from mpidl.runtime import World

_LIMIT = datetime.timedelta(minutes=5)


@contextlib.contextmanager
def group(world: World) -> Iterator[None]:
    """Make gloo's default group of all ranks, and take it away at the end. Collective.

    Rank 0 listens on a free port that the system picks, on its own interface only, and tells the others through MPI.
    Where all ranks are on one host traffic stays on the loopback interface. On several, set GLOO_SOCKET_IFNAME to the
    interface of each host; else gloo takes what the host's name leads to.
    """
    if len(set(world.hostnames)) == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    listener = None
    if world.rank == 0:
        listener = socket.create_server((_own_address(os.environ.get("GLOO_SOCKET_IFNAME")), 0), backlog=world.size)
    host, port = world.broadcast_object(None if listener is None else listener.getsockname())
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        host, port, world.size, is_master=listener is not None, timeout=_LIMIT, wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )  # fmt: skip
    distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=_LIMIT)
    try:
        yield
        world.barrier()  # nobody may take a connection away that another one still uses
    finally:
        distributed.destroy_process_group()


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


def _own_address(interface: str | None) -> str:
    """The IPv4 address of an interface of this host, or the one that its name leads to."""
    if interface in ("lo", "lo0"):
        return "127.0.0.1"
    if interface is None:
        return socket.gethostbyname(socket.gethostname())
    import fcntl
    import struct

    siocgifaddr = 0x8915  # Linux: netdevice(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), siocgifaddr, struct.pack("256s", interface[:15].encode()))
    return socket.inet_ntoa(answer[20:24])
